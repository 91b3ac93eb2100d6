"""A run that records nothing takes the branch's parameters, and leaves the clone as it was, wherever it ends."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import pytest

from pipelines.orchestration import worker_flows, worker_runs
from pipelines.orchestration.branch import edit
from pipelines.orchestration.unrecorded import put_back, unrecorded
from pipelines.project.errors import InputError
from tests.pipelines.orchestration.test_worker_flows import ServerAway
from tests.support.commands import NO_SERVER
from tests.support.repository import REPOSITORY
from tests.support.stand_in_chain import DVC_YAML, EVALUATE, FIT, REPORT, preload_nothing, ran

BEFORE = {"params.yaml": "first\n", "dvc.lock": "lock", "ledger/journal/fit@t01.json": "cost", "other": "x"}


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, text in BEFORE.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text)
    return tmp_path


def files(folder: Path) -> dict[str, str]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_text() for path in found}


def write(text: str) -> None:
    """Change everything, as a run does."""

    def params(path: Path) -> list[str]:
        path.write_text(text)
        return []

    edit(params)
    Path("dvc.lock").write_text(f"lock of {text}")
    Path("metrics.json").write_text("{}")
    Path("ledger/journal/fit@t01.json").write_text("another cost")
    Path("ledger/journal/fit@t02.json").write_text("cost")


def run(end: Exception | KeyboardInterrupt | None = None) -> None:
    with unrecorded():
        write("second\n")
        write("third\n")
        if end is not None:
            raise end


def test_what_a_run_changes_is_put_back_when_it_ends(clone: Path) -> None:
    run()
    assert files(clone) == BEFORE
    with pytest.raises(InputError, match="no such folder"):
        run(InputError("no such folder"))
    assert files(clone) == BEFORE


def test_what_a_killed_run_left_is_put_back_before_the_next(clone: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(KeyboardInterrupt())
    assert Path("params.yaml").read_text() == "third\n"
    put_back()
    assert files(clone) == BEFORE
    put_back()
    assert files(clone) == BEFORE


def test_a_persons_edit_after_a_killed_run_is_not_put_back(clone: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(KeyboardInterrupt())
    Path("params.yaml").write_text("my idea\n")
    before = files(clone)
    with pytest.raises(InputError, match=r"params\.yaml was edited after .*: copy it back") as caught:
        put_back()
    assert len(str(caught.value)) <= 300 + len(str(clone))
    assert files(clone) == before
    shutil.copy(".sdlora/unrecorded/params.yaml", "params.yaml")
    put_back()
    assert files(clone) == BEFORE


BRANCH = "sdlora/learned"
TASKS = 'tasks:\n  t01: {after: t00, source: images, classes: ["a"]}\n'
SECOND = '  t02: {after: t01, source: images, classes: ["b"]}\n'


@pytest.mark.slow
def test_a_run_without_a_record_learns_what_the_branch_says_and_commits_nothing(
    make_project: Callable[[dict[str, str]], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    shipped = (REPOSITORY / "params.yaml").read_text(encoding="utf-8").partition("tasks:\n")[0]
    params = shipped.replace("  branch:", f"  branch: {BRANCH}") + TASKS
    scripts = {"fit": FIT, "evaluate": EVALUATE, "report": REPORT}
    ignored = "/ran\n/artifacts/\n/.sdlora/\n/metrics.json\n"
    folder = make_project(
        {"dvc.yaml": DVC_YAML, "params.yaml": params, "code": "#", "images/readme": "", ".gitignore": ignored}
        | scripts
    )
    for name in scripts:
        (folder / name).chmod(0o755)

    def git(*arguments: str) -> str:
        person = ("-c", "user.name=tester", "-c", "user.email=tester@localhost")
        return subprocess.run(
            ["git", *person, *arguments], check=True, capture_output=True, text=True
        ).stdout.strip()

    git("init", "-q", "-b", "main")
    git("add", ".")
    git("commit", "-qm", "first")
    (folder / "params.yaml").write_text(params + SECOND)
    git("commit", "-qam", "second")
    git("branch", BRANCH)
    git("reset", "-q", "--hard", "HEAD^")
    tip = git("rev-parse", BRANCH)
    preload_nothing(monkeypatch)
    monkeypatch.setenv("SDLORA_PROJECT", str(folder))
    monkeypatch.setenv("PREFECT_API_URL", NO_SERVER)
    monkeypatch.setattr(worker_runs, "die_with", lambda parent: None)
    monkeypatch.setattr(worker_runs, "_this_attempt", lambda: ServerAway(uuid4()))
    with temporary_settings({PREFECT_API_URL: NO_SERVER, PREFECT_CLIENT_MAX_RETRIES: 0}):
        state = worker_flows.learn.fn(record=False)
    assert state.is_completed(), state.message
    assert state.message == "6 stages brought up to date; nothing was recorded"
    assert ran(folder) == ["fit t01", "evaluate t01", "fit t02", "evaluate t02", "report"]
    assert git("rev-parse", BRANCH) == tip
    assert (folder / "params.yaml").read_text() == params + SECOND  # the branch's
    assert not (folder / "dvc.lock").exists()
