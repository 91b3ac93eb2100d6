"""A step is evaluated beside the next fit where no limit of its gate could forbid that fit, and only there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from ruamel.yaml import YAML

from pipelines.orchestration.overlap import overlap_environment
from pipelines.orchestration.run import run_pipeline
from tests.support.folders import replace
from tests.support.repository import REPOSITORY
from tests.support.stand_in_chain import DVC_YAML, LEAVE, REPORT, preload_nothing, ran

START = "mkdir -p artifacts/model && echo start > artifacts/model/t00"
GATED = f"{START} && mkdir -p artifacts/gate/t00 && ./open t00"
GATE = """  gate:
    foreach: ${tasks}
    do:
      cmd: ./gate ${key}
      deps:
        - gate
        - artifacts/evaluation/${key}
        - artifacts/gate/${item.after}/verdict.json
      outs:
        - artifacts/gate/${key}
"""
OPEN = """#!/bin/sh
printf '{\\n  "open": true\\n}\\n' > artifacts/gate/$1/open.json
echo verdict > artifacts/gate/$1/verdict.json
"""
DECIDE = """#!/bin/sh
echo "gate $1" >> ran
mkdir -p artifacts/gate/$1 && ./open $1
"""
FIT = """#!/bin/sh
echo "fit $1 begins" >> ran
i=0; while test -f slow && test $1 = t02 && ! grep -q "evaluate t01 ends" ran && test $i -lt 900
do sleep 0.1; i=$((i+1)); done
echo "$1 after $2" > artifacts/model/$1
echo "fit $1 ends" >> ran
"""
FIT += f"{LEAVE}\n"
EVALUATE = """#!/bin/sh
echo "evaluate $1 begins" >> ran
i=0; while test -f slow && ! grep -q "fit t02 begins" ran && test $i -lt 900; do sleep 0.1; i=$((i+1)); done
test -f broken && echo "why it broke" >&2 && exit 3
mkdir -p artifacts/evaluation/$1
counts='"tasks": ["t01", "t02"], "accuracy": [0.75, 1.0], "samples": [8, 8], "correct": [6, 8]'
test $1 = t01 && counts='"tasks": ["t01"], "accuracy": [0.875], "samples": [8], "correct": [7]'
echo "{$counts}" > artifacts/evaluation/$1/metrics.json
echo "evaluate $1 ends" >> ran
"""
EVALUATE += f"{LEAVE}\n"


@pytest.fixture
def project(make_project: Callable[[dict[str, str]], Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two tasks of stand-in stages with a gate; evaluations and fits note when they begin and end."""
    params = (REPOSITORY / "params.yaml").read_text(encoding="utf-8").partition("tasks:\n")[0]
    params += 'tasks:\n  t01: {after: t00, source: images, classes: ["a"]}\n'
    params += '  t02: {after: t01, source: images, classes: ["b"]}\n'
    dvc_yaml = DVC_YAML.replace(START, GATED)
    dvc_yaml = dvc_yaml.replace(
        "      - artifacts/model/t00\n", "      - artifacts/model/t00\n      - artifacts/gate/t00\n"
    )
    after = "        - artifacts/model/${item.after}\n"
    dvc_yaml = dvc_yaml.replace(after, after + "        - artifacts/gate/${item.after}/open.json\n")
    dvc_yaml = dvc_yaml.replace("  report:\n", GATE + "  report:\n")
    scripts = {"fit": FIT, "evaluate": EVALUATE, "gate": DECIDE, "open": OPEN, "report": REPORT}
    ignored = "/ran\n/artifacts/\n/.sdlora/\n/slow\n/broken\n"
    files = {
        "dvc.yaml": dvc_yaml,
        "params.yaml": params,
        "code": "#",
        "images/readme": "",
        ".gitignore": ignored,
    }
    folder = make_project({**files, **scripts})
    for name in scripts:
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:1/api")
    preload_nothing(monkeypatch)
    return folder


def test_both_are_at_work_at_once_and_the_verdict_is_written_when_both_have_ended(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "slow").touch()  # neither ends before the other: the fit waits for the evaluation's result
    assert run_pipeline() == 0
    done = ran(project)
    assert done.index("fit t02 begins") < done.index("evaluate t01 ends") < done.index("fit t02 ends")
    assert done.index("fit t02 ends") < done.index("gate t01") < done.index("gate t02")
    out = capsys.readouterr().out
    assert [out.count(f"{name}  done") for name in ("evaluate@t01", "evaluate@t02", "fit@t02")] == [1, 1, 1]
    assert run_pipeline() == 0
    assert ran(project) == []


def test_what_it_leaves_is_what_dvc_alone_leaves(project: Path) -> None:
    assert run_pipeline() == 0
    ours = YAML(typ="safe").load(project / "dvc.lock")
    assert subprocess.run([sys.executable, "-m", "dvc", "status", "-q"]).returncode == 0
    (project / "dvc.lock").unlink()
    subprocess.run([sys.executable, "-m", "dvc", "repro", "-q", "--force"], check=True)
    assert YAML(typ="safe").load(project / "dvc.lock") == ours


def test_where_all_is_in_the_cache_nothing_is_computed(project: Path) -> None:
    assert run_pipeline() == 0
    ran(project)
    subprocess.run(["rm", "-r", "artifacts", "dvc.lock"], cwd=project, check=True)
    assert run_pipeline() == 0
    assert ran(project) == []


def test_a_gate_that_has_lost_its_limit_lets_the_next_fit_begin(project: Path) -> None:
    """What refused has left nothing, and its evaluation is up to date."""
    (project / "gate").rename(project / "decide")
    (project / "gate").write_text('#!/bin/sh\ngrep -q "new_task:  " params.yaml && exec ./decide $1\n')
    (project / "gate").chmod(0o755)
    replace(project / "params.yaml", "  new_task:  ", "  new_task: 0.5")
    assert run_pipeline() == 1
    assert not (project / "artifacts/gate/t01").exists()
    replace(project / "params.yaml", "  new_task: 0.5", "  new_task:  ")
    ran(project)
    assert run_pipeline() == 0
    done = ran(project)
    assert "evaluate t01 begins" not in done
    assert done.index("fit t02 ends") < done.index("gate t01")


def test_with_a_limit_the_next_fit_waits_for_the_verdict(project: Path) -> None:
    replace(project / "params.yaml", "  new_task:  ", "  new_task: 0.5")
    assert run_pipeline() == 0
    done = ran(project)
    assert done.index("evaluate t01 ends") < done.index("gate t01") < done.index("fit t02 begins")


def test_an_evaluation_that_fails_costs_no_fit(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "broken").touch()
    assert run_pipeline() == 1
    printed = capsys.readouterr()
    assert "evaluate@t01 did not finish" in printed.err
    assert "why it broke" in printed.out
    done = ran(project)
    assert "fit t02 ends" in done
    assert not any(line.startswith("gate") for line in done)
    (project / "broken").unlink()
    assert run_pipeline() == 0
    done = ran(project)
    assert "fit t02 begins" not in done
    assert done.index("evaluate t01 ends") < done.index("gate t01")


def test_who_stops_the_run_stops_both(project: Path) -> None:
    (project / "slow").touch()
    replace(project / "evaluate", "fit t02 begins", "never")
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    run = subprocess.Popen(
        [sys.executable, "-m", "pipelines", "run"],
        cwd=project,
        env=environment,
        stderr=subprocess.PIPE,
    )
    with run:
        end = time.monotonic() + 60
        while "fit t02 begins" not in (project / "ran").read_text() if (project / "ran").exists() else True:
            assert time.monotonic() < end
            time.sleep(0.1)
        run.send_signal(signal.SIGINT)
        run.communicate(timeout=30)
    assert run.returncode
    while [process for process in psutil.process_iter() if is_in(process, project)]:
        assert time.monotonic() < end
        time.sleep(0.1)
    done = ran(project)
    assert "evaluate t01 ends" not in done
    assert "fit t02 ends" not in done


def is_in(process: psutil.Process, folder: Path) -> bool:
    try:
        return process.pid != os.getpid() and process.cwd() == str(folder)
    except psutil.Error:
        return False


@pytest.mark.parametrize(
    ("visible", "there", "devices", "room"),
    [
        (None, [], 1, {}),
        (None, ["0"], 1, None),
        (None, ["0", "1"], 1, {"CUDA_VISIBLE_DEVICES": "1"}),
        (None, ["0", "1"], 2, None),
        (None, ["2", "3"], 1, {"CUDA_VISIBLE_DEVICES": "1"}),
        ("3", ["0", "1", "2", "3"], 1, None),
        ("2,3", ["0", "1", "2", "3"], 1, {"CUDA_VISIBLE_DEVICES": "3"}),
        ("", ["0"], 1, {}),
    ],
)
def test_no_evaluation_takes_memory_from_a_fit_on_an_accelerator(
    visible: str | None,
    there: list[str],
    devices: int,
    room: dict[str, str] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr(Path, "glob", lambda self, pattern: [Path(f"/dev/nvidia{name}") for name in there])
    assert overlap_environment(devices) == room
