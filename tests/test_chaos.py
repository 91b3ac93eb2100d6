"""The short form of `make chaos`: two real workers, a real server and an S3 endpoint, and a few faults."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.repository import REPOSITORY

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_a_chain_whose_processes_are_killed_ends_with_the_bytes_of_an_undisturbed_one(tmp_path: Path) -> None:
    kinds = [option for part in ("training", "dvc", "SIGKILL to flow") for option in ("--only", part)]
    results = tmp_path / "results.jsonl"
    (tmp_path / "site").mkdir()
    command = [
        sys.executable,
        "benchmarks/chaos.py",
        "--faults",
        "3",
        "--seed",
        "3",
        "--epochs",
        "100",
        *kinds,
    ]
    done = subprocess.run(
        [*command, "--results", str(results), "--keep", str(tmp_path / "site")],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=850,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    faults = json.loads(results.read_text())["faults"]
    assert len(faults) == 3
    assert all(fault["lost"] is not None for fault in faults)
