"""What became of a stage is read from what it left, and from no sentence that it or DVC prints."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.versioning.repro import StageFailedError, reproduce_stage

DVC_YAML = """
stages:
  gate:
    foreach: [t01]
    do:
      cmd: ./gate
      deps:
        - gate
      outs:
        - open
"""
DONE = """#!/bin/sh
echo '{"status": 0, "kind": "done"}' > $SDLORA_OUTCOME_FILE
echo "Stage 'gate@t01' is cached - skipping run, checking out outputs"
echo open > open
"""


@pytest.fixture
def project(make_project: Callable[[dict[str, str]], Path]) -> Path:
    """A project of one stage, which is a shell script."""
    folder = make_project({"dvc.yaml": DVC_YAML, "gate": DONE, ".gitignore": "/open\n"})
    (folder / "gate").chmod(0o755)
    return folder


def refusal(kind: str, line: str) -> str:
    outcome = json.dumps({"status": 2, "kind": kind, "line": line})
    return f"#!/bin/sh\necho '{outcome}' > $SDLORA_OUTCOME_FILE\nexit 2\n"


@pytest.mark.parametrize(
    ("kind", "line", "closed"),
    [
        pytest.param("gate", "error: in other words", "t01", id="a-closed-gate-in-any-words"),
        pytest.param("input", "error: gate: t01 has no evaluation", None, id="bad-input-of-the-gate"),
    ],
)
def test_a_closed_gate_is_known_by_its_kind(project: Path, kind: str, line: str, closed: str | None) -> None:
    (project / "gate").write_text(refusal(kind, line))
    with pytest.raises(StageFailedError) as found:
        reproduce_stage("gate@t01", pull=False)
    assert (str(found.value), found.value.status) == (line, 2)
    assert found.value.closed_gate == closed
    assert not found.value.interrupted


def test_an_output_is_from_the_cache_where_nothing_ran(project: Path) -> None:
    assert reproduce_stage("gate@t01", pull=False) is False
    (project / "open").unlink()
    (project / "dvc.lock").unlink()
    assert reproduce_stage("gate@t01", pull=False) is True
    assert (project / "open").read_text() == "open\n"
