"""A fit on several machines, which here are calls of torchrun on ports of one: its result, and how one dies."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest
import torch

from sdlora.tensors import read_tensors
from tests.support.folders import contents
from tests.support.machines import said_by, start_machines
from tests.support.parameters import settings
from tests.support.repository import REPOSITORY
from tests.support.steps import FIT, run_fit

pytestmark = pytest.mark.slow


def change(folder: Path, key: str, value: str) -> None:
    """Give a key of the training settings another value."""
    params = folder / "params.yaml"
    lines = params.read_text().splitlines()
    (place,) = [n for n, line in enumerate(lines) if line.startswith(f"  {key}: ")]
    lines[place] = f"  {key}: {value}"
    params.write_text("\n".join(lines) + "\n")


BY_SGD = settings(optimizer="sgd", learning_rate="0.01")
"""Adam would divide the rounding of a small gradient by the gradient."""


@pytest.fixture
def project(project: Path) -> Path:
    (project / "params.yaml").write_text(BY_SGD)
    return project


@pytest.fixture(scope="module")
def learned(
    made: Path, servers: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[str]]:
    """The project after a fit on two machines of two processes that nothing disturbed, and what each has said."""
    folder = shutil.copytree(made, tmp_path_factory.mktemp("learned") / "project")
    shutil.copy(REPOSITORY / "dvc.yaml", folder)
    (folder / "params.yaml").write_text(BY_SGD)
    machines = start_machines([folder, folder], *FIT, servers=servers)
    said = said_by(machines)
    assert [machine.returncode for machine in machines] == [0, 0], said
    return folder, said


def test_two_machines_of_two_processes_learn_what_one_learns(
    project: Path, learned: tuple[Path, list[str]]
) -> None:
    folder, said = learned
    run_fit("t01", "t00", "alone")
    assert sum(text.count("on 4 × cpu") for text in said) == 1
    names = {path.relative_to("alone").as_posix() for path in Path("alone").rglob("*")}
    shared = folder / "fit/t01"
    assert names == {path.relative_to(shared).as_posix() for path in shared.rglob("*")}
    for path in Path("alone").rglob("*.safetensors"):
        one, four = read_tensors(path), read_tensors(shared / path.relative_to("alone"))
        assert one.keys() == four.keys()
        for name in one:
            torch.testing.assert_close(four[name], one[name], rtol=1e-4, atol=1e-5)


def test_a_machine_that_dies_ends_the_others_and_the_next_call_goes_on_to_the_same_bytes(
    project: Path, learned: tuple[Path, list[str]], servers: dict[str, str]
) -> None:
    shutil.copy(REPOSITORY / "dvc.yaml", project)
    change(project, "checkpoint_seconds", "0.01")
    expected = contents(learned[0] / "fit/t01")

    machines = start_machines([project, project], *FIT)
    while not list(Path(".sdlora").rglob("*.safetensors")):
        assert machines[0].poll() is None
        time.sleep(0.001)
    families = [psutil.Process(machine.pid).children(recursive=True) for machine in machines]
    (first,) = [n for n, family in enumerate(families) if any(p.environ()["RANK"] == "0" for p in family)]
    # The machine that does not begin the fit is gone at once.
    for process in [*families[1 - first], machines[1 - first]]:
        os.kill(process.pid, signal.SIGKILL)
    said = said_by(machines)[first]
    assert machines[first].returncode != 0
    assert said.count("a process on another machine has gone, or did not come") == 1
    assert psutil.wait_procs(families[first], timeout=20)[1] == []
    assert not Path("fit/t01").exists()

    machines = start_machines([project, project], *FIT, servers=servers)
    said_again = said_by(machines)
    assert [machine.returncode for machine in machines] == [0, 0], said_again
    assert sum(text.count("fit t01: going on from step") for text in said_again) == 1
    assert contents(project / "fit/t01") == expected


def test_a_machine_with_other_inputs_ends_the_fit_with_one_line_before_a_step(
    project: Path, servers: dict[str, str]
) -> None:
    shutil.copy(REPOSITORY / "dvc.yaml", project)
    other = shutil.copytree(project, project.parent / "other")
    change(other, "epochs", "3")
    machines = start_machines([project, other], *FIT, servers=servers)
    said = "".join(said_by(machines))
    assert any(machine.returncode for machine in machines)
    assert said.count("error: ") == 1
    assert "error: fit t01: its inputs, its settings or this program are others" in said
    assert not list(project.parent.rglob("fit/t01"))
