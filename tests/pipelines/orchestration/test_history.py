"""Runs without a Prefect server leave notes, and a server shows what they say, with their times."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest

from pipelines.orchestration.history import read_runs, show_history
from pipelines.orchestration.run_notes import current_note, local_history, noted
from pipelines.orchestration.stage_runs import launch
from pipelines.project.environment import PARENT_FLOW_RUN, WORKERS_PROJECT
from pipelines.project.errors import InputError
from pipelines.project.layout import HISTORY
from pipelines.runtime.stage import Stage, StageResult
from tests.support.forked_python import PYTHON
from tests.support.prefect_home import copy_home
from tests.support.repository import REPOSITORY


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder without a Prefect server, as the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setenv(WORKERS_PROJECT, "birds")
    return tmp_path


def measure(task: str) -> StageResult:
    return StageResult([{"task": task, "accuracy": 0.5}], lambda: {"measure-text": f"# {task}"})


def outer(part: Callable[[str], StageResult], monkeypatch: pytest.MonkeyPatch) -> StageResult:
    """A run with a part, as `sdlora run` has its stages."""
    monkeypatch.setenv(PARENT_FLOW_RUN, current_note() or "")
    noted(Stage("measure", part), "measure@t01", {"task": "t01"})
    return StageResult([])


def notes() -> list[dict[str, Any]]:
    return [json.loads(line) for line in HISTORY.read_text().splitlines() if line]


def test_a_run_is_noted_when_it_begins_and_when_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    with local_history():
        assert noted(Stage("pipeline", lambda: outer(measure, monkeypatch)), "pipeline", {}).rows == []

    whole, part, part_end, whole_end = notes()
    assert (whole["name"], whole["part_of"], part["name"]) == ("pipeline", None, "measure@t01")
    assert part["part_of"] == whole["run"] == whole_end["run"]
    assert part["parameters"] == {"task": "t01"}
    assert part_end["rows"] == [{"task": "t01", "accuracy": 0.5}]
    assert part_end["documents"] == {"measure-text": "# t01"}
    assert (part_end["state"], whole_end["state"]) == ("Completed", "Completed")


@pytest.mark.parametrize(
    ("error", "state", "message"),
    [
        (InputError("data/raw: no such folder"), "Failed", "data/raw: no such folder"),
        (KeyError("x"), "Failed", "KeyError: 'x'"),
        (SystemExit(143), "Crashed", "it was told to stop (SystemExit)"),
    ],
)
def test_how_a_run_failed_is_noted_and_the_error_is_its_own(
    error: BaseException, state: str, message: str
) -> None:
    def fail() -> StageResult:
        raise error

    with local_history(), pytest.raises(type(error)) as raised:
        noted(Stage("fit", fail), "fit@t01", {})

    assert raised.value is error
    assert (notes()[-1]["state"], notes()[-1]["message"]) == (state, message)


def test_nothing_is_noted_where_a_server_is_named(monkeypatch: pytest.MonkeyPatch, project: Path) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:1/api")
    with local_history():
        noted(Stage("measure", measure), "measure@t01", {"task": "t01"})

    assert list(project.iterdir()) == []


def test_a_stage_by_itself_is_not_noted_and_says_why(
    project: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    launch(Stage("measure", measure), task="t01")

    assert not HISTORY.exists()
    assert "no server (PREFECT_API_URL is not set); running measure@t01 plainly" in capfd.readouterr().err


def test_a_disk_that_takes_no_note_costs_a_line(capfd: pytest.CaptureFixture[str]) -> None:
    with local_history():
        HISTORY.mkdir()
        assert noted(Stage("measure", measure), "measure@t01", {"task": "t01"}).rows

    assert "history: not noted" in capfd.readouterr().err


def test_what_was_cut_off_or_damaged_takes_no_other_note_with_it() -> None:
    with local_history():
        HISTORY.write_text('{"run": "cut o')
        noted(Stage("measure", measure), "measure@t01", {"task": "t01"})
        with HISTORY.open("a") as file:
            file.write('\nnull\n[]\n{"run": "unknown", "state": "Completed"}\n')

    (run,) = read_runs(HISTORY)
    assert run.ended is not None
    assert not run.is_at_work()


def test_without_notes_there_is_nothing_to_show() -> None:
    with pytest.raises(InputError, match=r"\.prefect/runs\.jsonl: no run was noted here; `sdlora run` does"):
        show_history(4201)


@pytest.mark.slow
def test_a_server_shows_the_runs_with_the_times_of_their_notes(
    prefect_home: Path,
    prefect_preloaded: dict[str, str],
    project: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    copy_home(prefect_home, project / ".prefect")
    with local_history():
        noted(Stage("pipeline", lambda: outer(measure, monkeypatch)), "pipeline", {})
        killed = subprocess.run(
            [sys.executable, "-c", KILLED], env={**os.environ, "PYTHONPATH": str(REPOSITORY)}
        )
        assert killed.returncode == -signal.SIGKILL
        monkeypatch.setenv(PARENT_FLOW_RUN, "")
        noted(Stage("at_work", lambda: StageResult([])), "ends later", {})
    ends_later = notes()[-1]["run"]
    lines = HISTORY.read_text().splitlines()
    HISTORY.write_text("\n".join(lines[:-1]) + "\n")  # this process is at work still

    first, artifacts, said = shown(prefect_preloaded)
    again, _, said_again = shown(prefect_preloaded)

    assert "3 runs noted: 2 new here, 0 known, 1 at work" in said
    assert "3 runs noted: 0 new here, 2 known, 1 at work" in said_again
    assert again == first
    assert ends_later not in first
    states = {run["name"]: run["state_name"] for run in first.values()}
    assert states == {"pipeline": "Completed", "measure@t01": "Completed", "killed@t02": "Crashed"}
    times = {(note["run"], "state" in note): note["at"] for note in notes()}
    for name, run in first.items():
        assert run["start_time"][:23] == times[name, False][:23]
        assert run["end_time"][:23] == times.get((name, True), times[name, False])[:23]
    assert artifacts == {"birds-measure-t01": "table", "birds-measure-text": "markdown"}


KILLED = """
import os, signal
from pipelines.orchestration.run_notes import noted
from pipelines.runtime.stage import Stage
os.environ["SDLORA_PARENT_FLOW_RUN"] = ""
noted(Stage("killed", lambda: os.kill(os.getpid(), signal.SIGKILL)), "killed@t02", {})
"""


def shown(servers: dict[str, str]) -> tuple[dict[str, Any], dict[str, str], str]:
    """Have the history shown. Return the server's runs by id, its artifacts' kinds, and what was said."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    code = f"import sys; sys.executable = {servers[PYTHON]!r}\n"  # which starts Prefect's server
    code += f"from pipelines.orchestration.history import show_history; show_history({port})"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, **servers, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        said = ""
        while "look at them at" not in said:
            line = process.stdout.readline()
            assert line, said
            said += line
        runs = {run["id"]: run for run in asked(port, "flow_runs")}
        artifacts = {each["key"]: each["type"] for each in asked(port, "artifacts")}
        with urlopen(Request(f"http://127.0.0.1:{port}/runs", headers={"accept": "text/html"})) as page:
            assert b"<html" in page.read().lower()
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.communicate()
    return runs, artifacts, said


def asked(port: int, what: str) -> list[dict[str, Any]]:
    """What a server answers to a question for all of a kind."""
    request = Request(
        f"http://127.0.0.1:{port}/api/{what}/filter", b"{}", {"content-type": "application/json"}
    )
    with urlopen(request) as answer:
        found: list[dict[str, Any]] = json.load(answer)
    return found
