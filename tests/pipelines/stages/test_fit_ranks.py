"""A fit on several devices of one machine, which here are processes on the CPU: its result, and how it dies."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import psutil
import pytest
import torch

from pipelines.runtime.processes import TERMINATED
from sdlora.tensors import read_tensors
from tests.support.commands import environment
from tests.support.folders import contents
from tests.support.parameters import settings
from tests.support.repository import REPOSITORY
from tests.support.steps import FIT, run_fit

pytestmark = pytest.mark.slow


def on_two_devices(folder: Path, **changes: str) -> None:
    params = folder / "params.yaml"
    text = params.read_text()
    for key, old, new in (("devices", "1", "2"), *((k, *v.split(">")) for k, v in changes.items())):
        assert text.count(f"  {key}: {old}") == 1
        text = text.replace(f"  {key}: {old}", f"  {key}: {new}")
    params.write_text(text)


def start_fit(servers: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """Start the fit. `servers` names fork servers that run its processes, which by themselves load torch each."""
    return subprocess.Popen(
        [sys.executable, "-m", "pipelines", *FIT],
        env={**environment(), **(servers or {}), "PYTHONPATH": str(REPOSITORY)},
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_devices_learn_what_one_learns_and_one_that_dies_ends_the_fit_which_goes_on(
    project: Path, servers: dict[str, str]
) -> None:
    shutil.copy(REPOSITORY / "dvc.yaml", project)
    # Adam would divide the rounding of a small gradient by the gradient.
    Path("params.yaml").write_text(settings(optimizer="sgd", learning_rate="0.01"))
    run_fit("t01", "t00", "alone")
    on_two_devices(project, epochs="2>2", checkpoint_seconds="30>0.01")
    undisturbed = start_fit(servers)
    said = undisturbed.communicate(timeout=300)[1]
    assert undisturbed.returncode == 0, said
    assert "on 2 × cpu" in said
    expected = contents(project / "fit/t01")
    for path in Path("alone").rglob("*.safetensors"):
        one, two = read_tensors(path), read_tensors(Path("fit/t01", path.relative_to("alone")))
        assert one.keys() == two.keys()
        for name in one:
            torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-5)

    for name in ("fit/t01", ".sdlora"):
        for path in sorted(Path(name).rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
    Path("fit/t01").rmdir()
    killed = start_fit()
    while not list(Path(".sdlora").rglob("*.safetensors")):
        assert killed.poll() is None
        time.sleep(0.001)
    killed.send_signal(signal.SIGSTOP)  # it would be done before the other is found
    family = psutil.Process(killed.pid).children(recursive=True)
    next(child for child in family if "run-rank" in child.cmdline()).send_signal(signal.SIGKILL)
    killed.send_signal(signal.SIGCONT)
    said = killed.communicate(timeout=60)[1]
    # By its own handler, or before or after that by the signal itself.
    assert killed.returncode in (TERMINATED, -signal.SIGTERM), said
    assert "device 1 of the fit has ended with status -9" in said
    assert "Traceback" not in said
    assert psutil.wait_procs(family, timeout=20)[1] == []

    again = start_fit(servers)
    said = again.communicate(timeout=300)[1]
    assert again.returncode == 0, said
    assert "fit t01: going on from step" in said
    assert contents(project / "fit/t01") == expected
