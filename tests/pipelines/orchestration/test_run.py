"""The outer flow on a chain of stand-in stages: order, what is run again, what is not, and how it ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.orchestration.history import read_runs
from pipelines.orchestration.run import run_pipeline
from pipelines.orchestration.status import show_status
from pipelines.project.errors import InputError
from pipelines.project.layout import PLAN_MEMORY
from pipelines.project.params import Params
from pipelines.versioning.plan import read_plan, run_order
from pipelines.versioning.project_lock import only_run
from tests.support.commands import call
from tests.support.finished_chain import entries
from tests.support.folders import replace
from tests.support.repository import REPOSITORY
from tests.support.stand_in_chain import DVC_YAML, EVALUATE, FIT, REPORT, preload_nothing, ran
from tests.support.waiting import wait_for


@pytest.fixture
def project(make_project: Callable[[dict[str, str]], Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project of two tasks whose stages are shell scripts that note in `ran` that they ran."""
    params = (REPOSITORY / "params.yaml").read_text(encoding="utf-8").partition("tasks:\n")[0]
    params += 'tasks:\n  t01: {after: t00, source: images, classes: ["a"]}\n'
    params += '  t02: {after: t01, source: images, classes: ["b"]}\n'
    files = {"dvc.yaml": DVC_YAML, "params.yaml": params, "code": "#", "images/readme": ""}
    scripts = {"fit": FIT, "evaluate": EVALUATE, "report": REPORT}
    folder = make_project({**files, **scripts, ".gitignore": "/ran\n/artifacts/\n/.sdlora/\n"})
    for name in scripts:
        (folder / name).chmod(0o755)
    # A server that is named and does not answer: everything runs plainly.
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:1/api")
    preload_nothing(monkeypatch)
    return folder


EVERYTHING = ["fit t01", "evaluate t01", "fit t02", "evaluate t02", "report"]


def test_all_of_a_task_comes_before_any_of_the_next() -> None:
    needs: dict[str, set[str]] = {"fetch@digits": set(), "start": set(), "report": set()}
    for before, task in (("t00", "t01"), ("t01", "t02"), ("t02", "t10")):
        needs[f"split@{task}"] = {"fetch@digits", f"split@{before}" if before != "t00" else "start"}
        needs[f"fit@{task}"] = {f"split@{task}"} | ({f"fit@{before}"} if before != "t00" else set())
        needs[f"evaluate@{task}"] = {f"fit@{task}", f"split@{task}"}
        needs["report"] |= {f"evaluate@{task}"}
    assert run_order(needs, ["t01", "t02", "t10"]) == [
        *("fetch@digits", "start"),
        *("split@t01", "fit@t01", "evaluate@t01"),
        *("split@t02", "fit@t02", "evaluate@t02"),
        *("split@t10", "fit@t10", "evaluate@t10"),
        "report",
    ]


def test_everything_runs_once_and_then_all_is_up_to_date(
    project: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_pipeline() == 0
    assert ran(project) == EVERYTHING
    first = capfd.readouterr().out
    assert "[1/6] start …\n[1/6] start  done, " in first
    assert "Running stage" not in first
    assert "87.5" in first
    assert "average accuracy 81.2 %" in first
    assert "artifacts/report/report.html" in first

    monkeypatch.delenv("PREFECT_API_URL")  # now one would be started if there were something to do
    assert run_pipeline() == 0
    assert ran(project) == []
    assert capfd.readouterr().out.startswith("all up to date: 6 stages, 2 tasks\n")
    assert not (project / ".prefect").exists()


def test_up_to_a_task_only_its_stages_and_those_before_it_run(
    project: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_pipeline(until="t01") == 0
    assert ran(project) == EVERYTHING[:2]
    said = capfd.readouterr().out
    assert "[3/3] evaluate@t01  done, " in said
    assert said.endswith("up to t01; `sdlora run` does the rest, and the report\n")
    assert run_pipeline(until="t01") == 0
    assert capfd.readouterr().out.startswith("all up to date: 3 stages, 1 task\n")

    assert run_pipeline() == 0
    assert ran(project) == EVERYTHING[2:]
    with pytest.raises(InputError, match=r"run: params\.yaml has no task t03; known are t01, t02"):
        run_pipeline(until="t03")


def test_up_to_a_task_the_images_of_later_ones_may_be_missing(project: Path) -> None:
    replace(project / "params.yaml", "after: t01, source: images", "after: t01, source: later")
    assert run_pipeline(until="t01") == 0
    with pytest.raises(InputError, match=r"tasks\.t02: no folder later"):
        run_pipeline()


def test_a_stage_whose_inputs_turn_out_equal_is_left_alone(
    project: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_pipeline()
    ran(project)
    replace(project / "params.yaml", "rank: 10", "rank: 4")
    capfd.readouterr()
    assert run_pipeline() == 0
    assert ran(project) == ["fit t01", "fit t02"]
    assert "evaluate@t01  inputs are as before" in capfd.readouterr().out
    replace(project / "params.yaml", "rank: 4", "rank: 5")
    (project / "rank-matters").write_text("x")  # now the change makes another model, and the same evaluation
    assert run_pipeline() == 0
    assert ran(project) == EVERYTHING[:-1]


def test_what_was_made_before_comes_from_the_cache(project: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_pipeline()
    shutil.rmtree(project / "artifacts")
    (project / "dvc.lock").unlink()
    ran(project)
    assert run_pipeline() == 0
    assert ran(project) == []
    assert "from the cache" in capfd.readouterr().out
    assert (project / "artifacts/model/t02").is_file()


def test_a_new_task_runs_its_own_stages_and_the_report_only(project: Path) -> None:
    run_pipeline()
    before = {path: path.read_bytes() for path in (project / "artifacts").rglob("*") if path.is_file()}
    ran(project)
    with (project / "params.yaml").open("a") as file:
        file.write('  t03: {after: t02, source: images, classes: ["c"]}\n')
    assert run_pipeline() == 0
    assert ran(project) == ["fit t03", "evaluate t03", "report"]
    assert {path: path.read_bytes() for path in before} == before


def test_a_removed_task_leaves_nothing_that_counts_and_comes_back_from_the_cache(
    project: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_pipeline()
    whole = (project / "params.yaml").read_text()
    left = (project / "artifacts/model/t02").read_bytes()
    (project / "params.yaml").write_text(whole.rpartition("  t02:")[0])
    ran(project)
    capfd.readouterr()
    assert run_pipeline() == 0
    assert ran(project) == ["report"]
    assert "t02: no task of params.yaml any more" in capfd.readouterr().out
    assert not list((project / "artifacts").rglob("t02*"))

    # Another clone, in which the outputs of the task still lie about, has the same verdict, and changes nothing.
    lock = (project / "dvc.lock").read_bytes()
    (project / "artifacts/evaluation/t02").mkdir()
    (project / "artifacts/evaluation/t02/metrics.json").write_text("{}")
    assert read_plan(["t01"]).stale() == []
    (project / "artifacts/evaluation/t01/other").write_text("x")
    assert read_plan(["t01"]).reasons["report"] == ["artifacts/evaluation changed"]
    (project / "artifacts/evaluation/t01/other").unlink()
    assert run_pipeline() == 0
    assert (ran(project), (project / "dvc.lock").read_bytes()) == ([], lock)

    (project / "params.yaml").write_text(whole)
    assert run_pipeline() == 0
    assert ran(project) == []
    assert (project / "artifacts/model/t02").read_bytes() == left


def test_the_lock_file_is_the_one_of_a_plain_dvc_repro(project: Path, tmp_path: Path) -> None:
    """Whatever order a run brings stages up to date in, also one that was killed and gone on with."""
    call(project, "dvc", "repro", "-q")
    plain = shutil.copytree(project, tmp_path / "plain")
    before = entries(project)
    tasks = [
        '  t03: {after: t02, source: images, classes: ["c"]}\n',
        '  t04: {after: t03, source: images, classes: ["d"]}\n',
    ]
    add(project, tasks[0])
    run_pipeline()
    assert not (project / ".sdlora/dvc.lock.before").exists()
    (project / ".sdlora/dvc.lock.before").write_text("\n".join(before))  # as if it had been killed here
    add(project, tasks[1])
    run_pipeline()
    add(plain, "".join(tasks))
    call(plain, "dvc", "repro", "-q")
    assert list(entries(project))[len(before) :] == ["fit@t03", "fit@t04", "evaluate@t03", "evaluate@t04"]
    assert (project / "dvc.lock").read_bytes() == (plain / "dvc.lock").read_bytes()


def add(folder: Path, tasks: str) -> None:
    with (folder / "params.yaml").open("a") as file:
        file.write(tasks)


def test_a_stage_that_fails_ends_the_run_with_its_own_line_and_status(
    project: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    program = f"cd {REPOSITORY} && exec {sys.executable} -m pipelines split t01 --source no"
    condition = f"test $1 = t01 || {{ {program} --before a --out b --images c; exit $?; }}"
    replace(project / "fit", "#!/bin/sh\n", f"#!/bin/sh\n{condition}\n")
    assert run_pipeline() == 2
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    assert ran(project) == ["fit t01", "evaluate t01"]
    assert not (project / "metrics.json").exists()


def test_a_stage_that_ends_without_a_word_ends_the_run_with_status_1(
    project: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    replace(project / "fit", "#!/bin/sh\n", "#!/bin/sh\nkill -9 $$\n")
    assert run_pipeline() == 1
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("error: fit@t01 did not finish")


def test_broken_params_start_nothing(project: Path) -> None:
    replace(project / "params.yaml", "rank: 10", "rank: ten")
    with pytest.raises(InputError, match=r"adapter\.rank"):
        run_pipeline()
    assert not (project / "ran").exists()
    assert not (project / ".sdlora").exists()


def test_a_missing_folder_of_images_is_said_before_anything_runs(project: Path) -> None:
    shutil.rmtree(project / "images")
    with pytest.raises(InputError, match="images"):
        run_pipeline()
    assert not (project / "ran").exists()


def test_a_broken_dvc_yaml_is_one_line(project: Path) -> None:
    (project / "dvc.yaml").write_text("stages: [")
    with pytest.raises(InputError, match=r"^dvc: ") as found:
        run_pipeline()
    assert "\n" not in str(found.value)


def test_two_runs_in_one_folder_are_refused(project: Path) -> None:
    with only_run(), pytest.raises(InputError, match="another sdlora run is at work"):
        run_pipeline()


def test_an_interrupted_run_leaves_no_process_behind(project: Path) -> None:
    replace(project / "fit", "#!/bin/sh\n", "#!/bin/sh\necho $$ > pid\nexec sleep 60\n")
    (project / ".gitignore").write_text("/ran\n/artifacts/\n/pid\n/.sdlora/\n")
    process = subprocess.Popen(
        [sys.executable, "-m", "pipelines", "run"],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        wait_for(lambda: (project / "pid").exists() and (project / "pid").read_text())
        sleeper = int((project / "pid").read_text())
        process.send_signal(signal.SIGINT)
        assert process.stderr
        assert process.stderr.read().splitlines()[-1] == "interrupted; the same command goes on from here"
        assert process.wait() == 130
    wait_for(lambda: not Path(f"/proc/{sleeper}").exists())


def test_a_file_of_locks_that_a_full_disk_has_cut_off_stops_no_run(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / ".dvc/tmp").mkdir(exist_ok=True)
    (project / ".dvc/tmp/rwlock").write_text('{"/some/where": {"read": [{"pid"')
    assert run_pipeline() == 0
    assert ".dvc/tmp/rwlock was damaged" in capsys.readouterr().err
    assert ran(project) == EVERYTHING


def test_status_says_what_is_stale_and_why(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show_status()
    assert "6 of 6 stages are not up to date" in capsys.readouterr().out
    run_pipeline()
    capsys.readouterr()
    show_status()
    assert "all up to date" in capsys.readouterr().out
    replace(project / "params.yaml", "rank: 10", "rank: 4")
    ran(project)
    show_status()
    shown = capsys.readouterr().out
    assert "fit@t01: adapter.rank changed" in shown
    assert "5 of 6 stages are not up to date" in shown
    assert ran(project) == []

    show_status(as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert told["stages"]["fit@t01"] == {"state": "stale", "reasons": ["adapter.rank changed"]}
    assert {name: stage["state"] for name, stage in told["stages"].items()} == {
        **dict.fromkeys(["fit@t01", "fit@t02"], "stale"),
        **dict.fromkeys(["evaluate@t01", "evaluate@t02", "report"], "may be stale"),
        "start": "done",
    }
    assert (told["up_to_date"], told["to_decide"]) == (False, [])


def test_a_run_without_a_server_starts_none_and_is_noted(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PREFECT_API_URL")
    assert run_pipeline() == 0
    assert [path.name for path in (project / ".prefect").iterdir()] == ["runs.jsonl"]
    (run,) = read_runs(project / ".prefect/runs.jsonl")
    assert (run.began["name"], run.end()["state"]) == ("pipeline", "Completed")


def test_the_plan_reads_dvc_and_changes_nothing(project: Path) -> None:
    def files() -> list[str]:
        """All but what DVC, and this program for the next plan, note of what they have looked at."""
        return sorted(
            str(path)
            for path in project.rglob("*")
            if not {"tmp", PLAN_MEMORY.name} & {*path.relative_to(project).parts}
        )

    run_pipeline()
    before = files()
    plan = read_plan(Params.load().tasks)
    assert plan.stale() == []
    assert plan.order == ["start", "fit@t01", "evaluate@t01", "fit@t02", "evaluate@t02", "report"]
    assert files() == before
