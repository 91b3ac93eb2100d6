"""What became of a stage is read from what it left, and from no sentence that it or DVC prints."""

from __future__ import annotations

import errno
import json
import re
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from dvc.exceptions import DvcException

from pipelines.project.errors import InputError
from pipelines.versioning.dvc_failures import dvc_errors
from pipelines.versioning.plan import read_plan
from pipelines.versioning.repro import StageFailedError, reproduce_stage
from tests.support.fuzzing import assert_answered

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


def test_what_the_system_refuses_dvc_is_the_line_of_a_stage_that_ended_well(project: Path) -> None:
    """Here the cache is a file; a full disk, a limit on files and a cache of another user are such errors too."""
    (project / ".dvc" / "cache").touch()
    with pytest.raises(StageFailedError) as found:
        reproduce_stage("gate@t01", pull=False)
    assert re.fullmatch(r"error: dvc: (Not a directory|File exists) \(.*/\.dvc/cache.*\)", str(found.value))
    assert found.value.status == 2
    assert not found.value.interrupted


def test_a_stage_that_has_said_why_it_failed_is_the_one_that_is_heard(project: Path) -> None:
    (project / "gate").write_text(refusal("input", "error: gate: no"))
    (project / ".dvc" / "cache").touch()
    with pytest.raises(StageFailedError, match="error: gate: no"):
        reproduce_stage("gate@t01", pull=False)


@pytest.mark.parametrize(
    ("cause", "line"),
    [
        (
            OSError(errno.ENOSPC, "", "a/b"),
            "the disk is full (a/b): nothing half-written was kept; make room",
        ),
        (OSError(errno.EFBIG, "File too large", "a/b"), "File too large (a/b)"),
        (
            PermissionError(errno.EACCES, "Permission denied", "raw/own/ant"),
            "Permission denied (raw/own/ant)",
        ),
        (OSError(errno.EROFS, "Read-only file system", ".dvc/cache"), "Read-only file system (.dvc/cache)"),
        (
            sqlite3.OperationalError("attempt to write a readonly database"),
            "attempt to write a readonly database",
        ),
    ],
)
def test_what_dvc_says_of_the_system_is_one_line_with_its_place(cause: Exception, line: str) -> None:
    failure = DvcException("failed to do it")
    failure.__cause__ = cause
    with pytest.raises(InputError) as found, dvc_errors():
        raise failure
    assert str(found.value).startswith("dvc: ")
    assert line in str(found.value)
    assert_answered(found.value)


@pytest.mark.parametrize(
    "text",
    [
        "stages: " + "[" * 20_000 + "]" * 20_000,
        "# " + "x" * 5_000_000,
        "stages: {a: b: c}",
        "stages: &a [*a]",
        "\x00",
    ],
    ids=["levels", "comment", "syntax", "itself", "binary"],
)
def test_a_dvc_yaml_that_nobody_writes_is_one_line(text: str, project: Path) -> None:
    (project / "dvc.yaml").write_text(text)
    with pytest.raises(InputError) as found:
        read_plan([])
    assert "dvc.yaml" in str(found.value)
    assert_answered(found.value)
