"""dvc.lock comes out as DVC writes it, to the byte, and says what DVC reads."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from dvc import dvcfile
from dvc.repo import Repo

from pipelines.project.layout import LOCK_MEMORY
from pipelines.versioning.patches import lockfile
from tests.support.folders import write_project

DVC_YAML = """
stages:
  make:
    foreach: ${tasks}
    do:
      cmd: >-
        mkdir -p out/${key} && echo ${item.word} > out/${key}/file && echo a command that is so long that a line of
        YAML does not hold it, with 'quotes', "both" and a colon: here
      params:
        - tasks.${key}
        - rate
        - name
      deps:
        - code
      outs:
        - out/${key}
"""
PARAMS = """
rate: 1e-3
name: "0123"
tasks:
  t01: {word: one, list: ["4", "2"], nothing: null, share: 0.5, yes: true}
  t02: {word: two, list: [], nothing: {}, share: 10, yes: "yes"}
  t03: {word: "drei: ü", list: ["a b"], nothing: "", share: -0.0, yes: "~"}
"""


FILES = {"dvc.yaml": DVC_YAML, "params.yaml": PARAMS, "code": "#", ".gitignore": "/out/\n"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project all of whose stages DVC has run."""
    folder = write_project(tmp_path_factory.mktemp("made") / "project", FILES)
    repro(folder)
    return folder


@pytest.fixture
def project(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, as the working directory."""
    monkeypatch.chdir(shutil.copytree(made, tmp_path / "project"))
    return tmp_path / "project"


def repro(folder: Path, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "dvc", "repro", "-q", *arguments], cwd=folder, check=True)


def loaded(kind: type[Any]) -> tuple[Any, str]:
    with contextlib.closing(Repo()) as repo:
        data, text = kind(repo, "dvc.lock")._load()
        return data, text


def dumped(kind: type[Any], *names: str) -> bytes:
    """What dvc.lock is once stages were entered into it as they are in the workspace."""
    before = dvcfile.Lockfile
    dvcfile.Lockfile = kind
    try:
        with contextlib.closing(Repo()) as repo, repo.lock:
            for name in names:
                stage = repo.stage.load_one(name=name)
                stage.save(run_cache=False)
                stage.dump(update_pipeline=False)
    finally:
        dvcfile.Lockfile = before
    return Path("dvc.lock").read_bytes()


def both(*names: str) -> tuple[bytes, bytes]:
    shutil.copy("dvc.lock", "kept")
    theirs = dumped(dvcfile.Lockfile, *names)
    shutil.copy("kept", "dvc.lock")
    return theirs, dumped(lockfile.Lockfile, *names)


def test_a_lock_is_read_as_dvc_reads_it(project: Path) -> None:
    first = loaded(lockfile.Lockfile)
    assert first == loaded(dvcfile.Lockfile)
    assert loaded(lockfile.Lockfile) == first


def test_a_stage_that_changed_is_written_as_dvc_writes_it(project: Path) -> None:
    before = Path("dvc.lock").read_bytes()
    Path("code").write_text("# other")
    Path("out/t02/file").write_text("other")
    theirs, ours = both("make@t02", "make@t01")
    assert ours == theirs
    assert ours != before


def test_a_new_stage_is_written_as_dvc_writes_it(make_project: Callable[[dict[str, str]], Path]) -> None:
    repro(make_project(FILES), "make@t03", "make@t01")
    Path("out/t02").mkdir(parents=True)
    Path("out/t02/file").write_text("two")
    theirs, ours = both("make@t02")
    assert ours == theirs


def test_a_stage_that_did_not_change_leaves_the_file_alone(project: Path) -> None:
    before = Path("dvc.lock").stat()
    dumped(lockfile.Lockfile, "make@t01")
    after = Path("dvc.lock").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda text: "# by hand\n" + text, id="a-comment-above"),
        pytest.param(lambda text: text + "datasets: []\n", id="data-sets"),
        pytest.param(lambda text: text.replace("  make@t02:\n", "  make@t01:\n"), id="a-stage-twice"),
        pytest.param(lambda text: text.replace("    outs:\n", "    outs: 7\n    x:\n", 1), id="no-lock"),
        pytest.param(lambda text: text[: len(text) // 2].rpartition(":")[0], id="cut-off"),
        pytest.param(lambda text: "", id="empty"),
    ],
)
def test_a_lock_of_another_form_is_left_to_dvc(change: Callable[[str], str], project: Path) -> None:
    text = change(Path("dvc.lock").read_text())
    Path("dvc.lock").write_text(text)
    assert outcome(lambda: loaded(lockfile.Lockfile)) == outcome(lambda: loaded(dvcfile.Lockfile))


def outcome(work: Callable[[], Any]) -> Any:  # noqa: ANN401 - a value, or the type and text of an error
    try:
        return work()
    except Exception as error:
        return type(error), str(error)


def test_a_lock_that_changed_since_is_read_again(project: Path) -> None:
    loaded(lockfile.Lockfile)
    text = Path("dvc.lock").read_text()
    Path("dvc.lock").write_text(text.replace("word: one", "word: uno"))
    data, _ = loaded(lockfile.Lockfile)
    assert data["stages"]["make@t01"]["params"]["params.yaml"]["tasks.t01"]["word"] == "uno"
    Path("dvc.lock").unlink()
    assert loaded(lockfile.Lockfile) == ({}, "")


@pytest.fixture
def many(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The project's dvc.lock, of few entries, treated as one of many; and nothing that this process has read."""
    (project / ".sdlora").mkdir()
    monkeypatch.setattr(lockfile, "MANY_ENTRIES", 2)
    monkeypatch.setattr(lockfile, "_entries", {})
    return project / "dvc.lock"


def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this process one that has read nothing, and that cannot read YAML."""

    def refuse(*_: object) -> None:
        raise AssertionError("parsed")

    monkeypatch.setattr(lockfile, "_entries", {})
    monkeypatch.setattr(lockfile, "parse_yaml", refuse)


def test_the_next_process_need_not_parse_what_this_one_has_read(
    many: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = lockfile.read_entries(many)
    unread(monkeypatch)

    assert read
    assert lockfile.read_entries(many) == read
    assert repr(lockfile.read_entries(many)) == repr(read)


def test_an_entry_that_changed_since_is_not_taken_from_what_was_read(
    many: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = lockfile.read_entries(many)
    many.write_text(many.read_text().replace("word: one", "word: another"))
    monkeypatch.setattr(lockfile, "_entries", {})
    after = lockfile.read_entries(many)
    monkeypatch.setattr(lockfile, "_entries", {})
    monkeypatch.setattr(lockfile, "MANY_ENTRIES", 1000)

    assert after != before
    assert after == lockfile.read_entries(many)


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"a": 1}', b"\xff", b"null"])
def test_a_memory_that_is_damaged_is_read_anew(
    damage: bytes, many: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = lockfile.read_entries(many)
    memory = many.parent / LOCK_MEMORY
    whole = memory.read_bytes()
    memory.write_bytes(damage)
    monkeypatch.setattr(lockfile, "_entries", {})

    assert lockfile.read_entries(many) == read
    assert memory.read_bytes() == whole


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda known: known.update(dvc="1.0"), id="of-another-dvc"),
        pytest.param(
            lambda known: known.update({key: ["other", {}] for key in known if key != "dvc"}), id="names"
        ),
        pytest.param(
            lambda known: known.update({key: ["start", 1] for key in known if key != "dvc"}), id="contents"
        ),
        pytest.param(lambda known: known.update({key: 5 for key in known if key != "dvc"}), id="neither"),
    ],
)
def test_a_memory_that_cannot_be_right_is_read_anew(
    change: Callable[[dict[str, Any]], object], many: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = lockfile.read_entries(many)
    memory = many.parent / LOCK_MEMORY
    known = json.loads(memory.read_bytes())
    change(known)
    memory.write_text(json.dumps(known))
    monkeypatch.setattr(lockfile, "_entries", {})

    assert lockfile.read_entries(many) == read


def test_what_json_cannot_say_is_not_kept(many: Path) -> None:
    for content in ({"day": date(2026, 1, 1)}, {1: "a whole number as a key"}, {"share": float("nan")}):
        lockfile.keep_entries(many.parent / LOCK_MEMORY, {"text": ("name", content)})

        assert not (many.parent / LOCK_MEMORY).exists()
