"""What torchrun says of a process is believed where it is whole, and refused in one line where it cannot be."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pipelines.project.errors import InputError
from pipelines.runtime.machines import Launched, devices_of_fit, launched
from tests.support.commands import environment
from tests.support.repository import REPOSITORY

WHOLE = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}


@pytest.fixture(autouse=True)
def no_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in WHOLE:
        monkeypatch.delenv(name, raising=False)


def tell(monkeypatch: pytest.MonkeyPatch, said: dict[str, str]) -> None:
    for name, value in said.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("said", [{}, {"WORLD_SIZE": "1"}, {"RANK": "0", "WORLD_SIZE": "1"}])
def test_one_process_is_no_group(monkeypatch: pytest.MonkeyPatch, said: dict[str, str]) -> None:
    tell(monkeypatch, said)
    assert launched() is None
    assert devices_of_fit(2) == 2


def test_a_process_of_torchrun_has_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    tell(monkeypatch, WHOLE)
    assert launched() == Launched(rank=3, size=4, local_rank=1, local_size=2)
    assert devices_of_fit(1) == devices_of_fit(2) == 2
    with pytest.raises(InputError, match=r"devices is 3, but torchrun started 2 .* --nproc-per-node 3$"):
        devices_of_fit(3)


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ({"MASTER_ADDR": ""}, "MASTER_ADDR not set"),
        (
            {"LOCAL_RANK": "", "TORCHELASTIC_USE_AGENT_STORE": ""},
            "LOCAL_RANK, TORCHELASTIC_USE_AGENT_STORE not",
        ),
        ({"MASTER_PORT": "http"}, "MASTER_PORT is 'http'"),
        ({"RANK": "-1"}, "RANK is '-1'"),
        ({"RANK": "4"}, "the RANK is 4"),
        ({"LOCAL_RANK": "2"}, "the LOCAL_RANK 2 of 2"),
        ({"TORCHELASTIC_USE_AGENT_STORE": "False"}, "torchrun keeps no store"),
    ],
)
def test_what_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch, wrong: dict[str, str], line: str) -> None:
    tell(monkeypatch, {**WHOLE, **wrong})
    with pytest.raises(InputError, match=line) as error:
        launched()
    assert str(error.value).endswith("start all by torchrun, or unset both")


@pytest.mark.slow
@pytest.mark.parametrize("command", ["run", "fit"])
def test_a_rank_without_a_rendezvous_ends_with_one_line_and_status_2(command: str) -> None:
    words = ("t01", *(word for name in OPTIONS for word in (f"--{name}", "x")))
    done = subprocess.run(
        [sys.executable, "-m", "pipelines", command, *(words if command == "fit" else ())],
        cwd=REPOSITORY,
        env={**environment(), "RANK": "1", "WORLD_SIZE": "2"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(
        "error: RANK 1, WORLD_SIZE 2: one of several processes that share a fit, but LOCAL_RANK,"
    )


OPTIONS = ("train", "images", "classes", "before", "backbone", "out")
