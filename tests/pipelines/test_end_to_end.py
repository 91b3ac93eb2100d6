"""The whole chain on a few small pictures: the same bytes again, after a kill, and with a task added."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from pipelines.project.environment import PLAIN_DVC
from pipelines.project.layout import STEP_STAGES
from pipelines.runtime.fork_server import STAGE_ENTRY
from tests.support.commands import call, call_here, environment
from tests.support.finished_chain import entries, entries_of, hashes, stages_run

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("preloaded")]

FIRST = ["code", "start", "backbone"]
TASK = list(STEP_STAGES)


def forget(folder: Path) -> None:
    """Delete everything that any run has left."""
    for name in ("artifacts", ".dvc/cache", ".dvc/tmp", ".sdlora"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in ("dvc.lock", "metrics.json"):
        (folder / name).unlink(missing_ok=True)


@pytest.fixture
def project(finished: tuple[Path, str], tmp_path: Path) -> Path:
    """A copy of the finished project."""
    folder = tmp_path / "project"
    shutil.copytree(finished[0], folder)
    return folder


def test_a_run_does_every_stage_once_task_by_task(finished: tuple[Path, str]) -> None:
    done = stages_run(finished[1])
    tasks = [[f"{stage}@{task}" for stage in TASK] for task in ("t01", "t02")]
    assert sorted(done) == sorted([*FIRST, *tasks[0], *tasks[1], "report"])
    assert sorted(done[:3]) == sorted(FIRST)
    assert done[-1] == "report"
    for own in tasks:
        assert [name for name in done if name in own] == own
    assert done.index("freeze@t01") < done.index("fit@t02")


def test_the_same_again_is_up_to_date(project: Path) -> None:
    assert call(project, "sdlora", "run").startswith("all up to date")


@pytest.mark.parametrize("command", [("dvc", "repro"), ("sdlora", "run")], ids=" ".join)
def test_plain_dvc_from_nothing_leaves_the_same_bytes(
    command: tuple[str, ...], project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither Prefect nor the outer flow nor fork servers nor patches of DVC are part of the result."""
    lock, before = (project / "dvc.lock").read_text(), hashes(project)
    forget(project)
    monkeypatch.setenv(PLAIN_DVC, "1")
    call(project, *command)
    assert hashes(project) == before
    assert entries(project) == entries_of(lock)


def test_a_run_that_was_killed_in_a_fit_goes_on_and_leaves_the_same_bytes(
    project: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    lock, before = (project / "dvc.lock").read_text(), hashes(project)
    forget(project)
    params = project / "params.yaml"
    often = params.read_text().replace("checkpoint_seconds: 30", "checkpoint_seconds: 0.01")
    assert often != params.read_text()
    params.write_text(often)
    kill_when(project, lambda: checkpoints_of_second_fit(project))
    assert not (project / "artifacts/fit/t02").exists()
    assert (project / "artifacts/model/t01").exists()

    done = call_here(project, "run")
    assert "fit t02: going on from step" in capfd.readouterr().err
    assert "split@t01" not in stages_run(done)
    assert hashes(project) == before
    assert entries(project) == entries_of(lock)


@pytest.mark.parametrize(
    "victim", ["run", "dvc", "DVC's server", "stages' server", "dvc alone", "dvc alone with a server"]
)
def test_a_fit_ends_with_whatever_it_works_for_and_goes_on_to_the_same_bytes(
    victim: str, project: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = hashes(project)
    forget_second_fit(project)
    alone = victim.startswith("dvc alone")
    settings = environment()
    if alone:
        settings["SHELL"] = waiting_shell(project)
    if victim == "dvc alone with a server":  # some stages before the fit
        for name in ("artifacts/model/t00", "artifacts/split/t01", "artifacts/split/t02"):
            shutil.rmtree(project / name)
    with subprocess.Popen(
        ["dvc", "repro"] if alone else ["sdlora", "run"],
        cwd=project,
        env=settings,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        wait_until(lambda: any((project / ".sdlora/checkpoints").rglob("*.safetensors")), process)
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        apart = servers_of_stages(project) if alone else []
        assert bool(apart) == (victim == "dvc alone with a server")
        family += apart
        part_of(victim, family).kill()
        process.wait(timeout=60)
    _, left = psutil.wait_procs(family, timeout=20)
    assert left == []
    assert not (project / "artifacts/fit/t02").exists()

    call_here(project, "run")
    assert "fit t02: going on from step" in capfd.readouterr().err
    assert hashes(project) == before


def part_of(victim: str, family: list[psutil.Process]) -> psutil.Process:
    """The process of a role: what forks is the first with its command line, what it has forked the second."""
    sought, forked = {
        "run": ("run", False),
        "dvc": ("pipelines.versioning.dvc_server", True),
        "DVC's server": ("pipelines.versioning.dvc_server", False),
        "stages' server": (STAGE_ENTRY, False),
        "dvc alone": ("repro", False),
        "dvc alone with a server": ("repro", False),
    }[victim]
    found = [member for member in family if sought in words_of(member)]
    pids = {member.pid for member in found}
    return next(member for member in found if (member.ppid() in pids) == forked)


def servers_of_stages(project: Path) -> list[psutil.Process]:
    """All fork servers of stages in a project, and what they have forked, quickly: the fit lasts no second."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (place / "cmdline").read_bytes().split(b"\0")
            if STAGE_ENTRY.encode() in words and (place / "cwd").readlink() == project.resolve():
                found.append(psutil.Process(int(place.name)))
    return found


def words_of(process: psutil.Process) -> list[str]:
    """The command line of a process; of one that has ended, nothing."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def test_an_added_task_runs_its_stages_and_the_report_and_touches_nothing_else(
    finished: tuple[Path, str], grown: tuple[Path, str]
) -> None:
    before, after = hashes(finished[0]), hashes(grown[0])
    assert stages_run(grown[1]) == [*(f"{stage}@t03" for stage in TASK), "report"]
    changed = {name for name in before if after.get(name) != before[name]}
    assert all(name.startswith(("artifacts/report/", "metrics.json")) for name in changed)
    own = {
        name.removeprefix("artifacts/model/t03/") for name in after if name.startswith("artifacts/model/t03/")
    }
    assert own == {
        "classifier.safetensors", "directions/t03.safetensors", "drift/t03.safetensors", "head/t03.safetensors",
        "magnitudes.safetensors", "statistics/t03.safetensors", "step.json", "unknown.safetensors",
    }  # fmt: skip


def forget_second_fit(folder: Path) -> None:
    """Delete the second fit's outputs everywhere, and have the next one save itself all the time."""
    stage = entries(folder)["fit@t02"]
    assert isinstance(stage, dict)
    digest = stage["outs"][0]["md5"]
    (folder / ".dvc/cache/files/md5" / digest[:2] / digest[2:]).unlink()
    for name in ("artifacts/fit/t02", ".dvc/cache/runs", ".sdlora"):
        shutil.rmtree(folder / name, ignore_errors=True)
    params = folder / "params.yaml"
    often = params.read_text().replace("checkpoint_seconds: 30", "checkpoint_seconds: 0.01")
    assert often != params.read_text()
    params.write_text(often)


def waiting_shell(folder: Path) -> str:
    """A shell that waits for its command, as dash does, and bash does not."""
    shell = folder / ".sdlora-shell"
    shell.write_text('#!/bin/sh\ntest "$1" = -c || exit 1\neval "$2"\nexit $?\n')
    shell.chmod(0o755)
    return str(shell)


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < end
        time.sleep(0.005)


def checkpoints_of_second_fit(folder: Path) -> bool:
    """Whether a second fit has saved itself at least twice."""
    keys = [key for key in (folder / ".sdlora/checkpoints").glob("*") if key.is_dir()]
    return len(keys) == 2 and all(len(list(key.glob("*.safetensors"))) >= 2 for key in keys)


def kill_when(folder: Path, condition: Callable[[], bool]) -> None:
    """Start a run and kill it, with all that it started, as soon as the condition holds."""
    process = subprocess.Popen(
        ["sdlora", "run"],
        cwd=folder,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_until(condition, process)
    family = [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]
    for pid in family:
        os.kill(pid, signal.SIGKILL)
    process.wait()
    while any(psutil.pid_exists(pid) for pid in family):
        time.sleep(0.01)
