"""A run that torchrun starts learns the new task on all machines, and leaves a chain that no other run finds stale."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from sdlora.tensors import read_tensors
from tests.support.commands import call, call_here, said_here
from tests.support.folders import contents
from tests.support.machines import said_by, start_machines

pytestmark = pytest.mark.slow


def test_a_run_on_two_machines_learns_the_new_task_alone_and_one_machine_goes_on_from_it(
    finished: tuple[Path, str], grown: tuple[Path, str], servers: dict[str, str], tmp_path: Path
) -> None:
    folder = shutil.copytree(finished[0], tmp_path / "project", symlinks=True)
    before = {name: contents(folder / "artifacts" / name) for name in ("fit/t01", "model/t01", "model/t02")}
    call_here(folder, "add-task", "more")
    machines = start_machines([folder, folder], "run", servers=servers)
    said = said_by(machines)
    assert [machine.returncode for machine in machines] == [0, 0], said
    assert sum(text.count("on 4 × cpu") for text in said) == 1
    for name, held in before.items():
        assert contents(folder / "artifacts" / name) == held
    assert json.loads((folder / "artifacts/fit/t03/fit.json").read_text())["processes"] == 4
    for path in (grown[0] / "artifacts/fit/t03").glob("*.safetensors"):
        one, four = read_tensors(path), read_tensors(folder / "artifacts/fit/t03" / path.name)
        assert one.keys() == four.keys()
        for name in one:
            # Adam divides the rounding of a small gradient by the gradient.
            assert torch.dist(four[name], one[name]) <= 0.01 * torch.linalg.vector_norm(one[name])
    assert "all up to date" in call(folder, "sdlora", "run")
    why, _ = said_here(folder, "audit", "verify", "--retrain", "t03", status=1)
    assert "(4 processes shared the fit)" in why
