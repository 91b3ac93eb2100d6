"""An answer to one closed gate re-runs that gate, with `sdlora run` and with plain DVC, and no other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.planning.approvals import keep_other_gates
from pipelines.versioning.plan import read_plan
from tests.support.commands import call

TASKS = ("t01", "t02", "t03")
STAGES = """stages:
  gate:
    foreach: ${tasks}
    do:
      cmd: mkdir -p artifacts/gate && echo ${key} > artifacts/gate/${key}
      params: [gate, approvals]
      deps: [images]
      outs: ["artifacts/gate/${key}"]
"""


def answer(**approvals: str) -> None:
    """Write approvals, as `sdlora approve` does, and keep the other gates."""
    given = {task: {"by": by, "limits": ["fall"]} for task, by in approvals.items()}
    lines = [*(f"  {task}: {{after: t00}}" for task in TASKS)]
    text = f"gate: {{fall: 0.1}}\napprovals: {json.dumps(given)}\ntasks:\n" + "\n".join(lines) + "\n"
    Path("params.yaml").write_text(text)
    if Path("dvc.lock").exists():
        keep_other_gates()


def stale() -> list[str]:
    return [name.removeprefix("gate@") for name in read_plan(TASKS).stale()]


@pytest.mark.slow
def test_an_answer_makes_one_gate_stale(make_project: Callable[[dict[str, str]], Path]) -> None:
    folder = make_project({"dvc.yaml": STAGES, "images": "x", "params.yaml": ""})
    answer()
    call(folder, "dvc", "repro", "-q")
    answer(t02="Ana")
    assert stale() == ["t02"]
    assert call(folder, "dvc", "status", "--json").count("gate@") == 1
    call(folder, "dvc", "repro", "-q")
    assert stale() == []
    answer(t02="Ana", t03="Ben")
    assert stale() == ["t03"]
    answer(t02="Zoë", t03="Ben")  # changed, and t03's answer was never used
    assert stale() == ["t02", "t03"]
    answer()  # taken back
    assert stale() == ["t02"]
    Path("params.yaml").write_text(Path("params.yaml").read_text().replace("0.1", "0.2"))
    keep_other_gates()
    assert stale() == list(TASKS)  # another limit judges all anew
