"""What is in DVC's run-cache and no whole entry is neither believed nor shared, and hides none."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from dvc.utils.serialize import YAMLError, parse_yaml

from pipelines.versioning.patches.runcache import is_whole
from tests.support.folders import write_project
from tests.support.repository import REPOSITORY

DVC_YAML = """
stages:
  make:
    cmd: echo made >> ran && cp word out
    deps:
      - word
    outs:
      - out
"""
RUNS = Path(".dvc/cache/runs")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose one stage has run once, and beside it its remote."""
    root = tmp_path_factory.mktemp("made")
    (root / "remote").mkdir()
    folder = write_project(
        root / "project", {"dvc.yaml": DVC_YAML, "word": "one", ".gitignore": "/out\n/ran\n"}
    )
    with (folder / ".dvc/config").open("a") as config:
        config.write("['remote \"r\"']\n    url = ../../remote\n")
    text = (folder / ".dvc/config").read_text()
    (folder / ".dvc/config").write_text(text.replace("[core]\n", "[core]\n    remote = r\n"))
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
        monkeypatch.chdir(folder)
        dvc("repro")
    return root


@pytest.fixture
def project(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, as the working directory."""
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"


def dvc(*arguments: str, status: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.versioning.patches", *arguments], capture_output=True, text=True
    )
    assert done.returncode == status, done.stderr
    return done.stderr


def entry(root: Path = RUNS) -> Path:
    (path,) = root.glob("??/*/" + "[0-9a-f]" * 64)
    return path


def forget() -> None:
    for name in ("dvc.lock", "out"):
        Path(name).unlink()


def test_an_entry_that_was_cut_off_anywhere_is_not_whole(project: Path) -> None:
    """Many cuts leave YAML, and something that DVC takes for an entry."""
    whole = entry()
    content = whole.read_text()
    assert is_whole(parse_yaml(content, "entry"), whole.name)
    taken = 0
    said = content.rindex("md5: ") + len("md5: ") + 32  # what follows is a size, which may be missing
    for cut in range(said):
        with contextlib.suppress(YAMLError):
            left = parse_yaml(content[:cut], "entry")
            taken += 1
            assert not is_whole(left, whole.name)
    assert taken > 50


@pytest.mark.parametrize("cut", [0, 160])
def test_an_entry_that_was_cut_off_hides_no_whole_one(cut: int, project: Path) -> None:
    whole = entry()
    content = whole.read_bytes()
    remote = project.parent / "remote/runs"
    dvc("push", "--run-cache")
    entry(remote).chmod(0o644)
    entry(remote).write_bytes(content[:cut])
    forget()
    dvc("repro", "--pull")
    assert whole.read_bytes() == content
    assert (project / "ran").read_text() == "made\n"
    dvc("push", "--run-cache")
    assert entry(remote).read_bytes() == content
    whole.chmod(0o644)
    whole.write_bytes(content[:cut])
    forget()
    dvc("repro", "--pull")
    assert whole.read_bytes() == content
    assert (project / "ran").read_text() == "made\n"


def leave_rubbish(whole: Path) -> None:
    """What a killed DVC, or a full disk, leaves beside an entry, newer than that."""
    later = time.time() + 60
    for name in (".AbC.tmp", "0" * 64, "f" * 64):
        path = whole.with_name(name)
        path.write_bytes(b"" if name.startswith(("0", ".")) else whole.read_bytes()[:40])
        os.utime(path, (later, later))
    no_text = whole.with_name("e" * 64)
    no_text.write_bytes(b"\xff\x00" * 20)
    os.utime(no_text, (later, later))


def test_a_stage_that_was_computed_is_not_computed_again_for_rubbish_beside_its_entry(project: Path) -> None:
    leave_rubbish(entry())
    forget()
    dvc("repro")
    assert (project / "out").read_text() == "one"
    assert (project / "ran").read_text() == "made\n"


def test_only_whole_entries_are_shared_and_what_is_broken_there_is_mended(project: Path) -> None:
    remote = project.parent / "remote/runs"
    whole = entry()
    leave_rubbish(whole)
    dvc("push", "--run-cache")
    assert [path.name for path in remote.glob("*/*/*") if path.stat().st_size] == [whole.name]
    assert not list(remote.glob("*/*/.*"))

    there = entry(remote)
    there.chmod(0o644)
    there.write_bytes(b"")
    dvc("push", "--run-cache")
    assert there.read_bytes() == whole.read_bytes()
    leave_rubbish(there)
    shutil.rmtree(".dvc/cache")
    forget()
    dvc("repro", "--pull")
    assert (project / "ran").read_text() == "made\n"
    assert (project / "out").read_text() == "one"


def test_what_is_there_is_not_copied_again(project: Path) -> None:
    dvc("push", "--run-cache")
    there = entry(project.parent / "remote/runs")
    before = there.stat().st_mtime_ns, there.stat().st_ino
    dvc("push", "--run-cache")
    assert (there.stat().st_mtime_ns, there.stat().st_ino) == before


def test_a_push_that_the_storage_refuses_fails(project: Path) -> None:
    (project.parent / "remote/runs").write_text("no folder")
    assert "the run-cache could not be copied" in dvc("push", "--run-cache", status=1)
