"""A chain of stand-in stages: shell scripts that note that they ran, and leave their outcome as stages do."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.repository import REPOSITORY

NO_LIBRARIES = REPOSITORY / "tests/support/no_libraries"
LEAVE = """echo '{"status": 0, "kind": "done"}' | tee $SDLORA_OUTCOME_FILE > /dev/null"""
DVC_YAML = f"""
stages:
  start:
    cmd: >-
      mkdir -p artifacts/model && echo start > artifacts/model/t00 && {LEAVE}
    deps:
      - code
    outs:
      - artifacts/model/t00
  fit:
    foreach: ${{tasks}}
    do:
      cmd: ./fit ${{key}} ${{item.after}}
      params:
        - adapter.rank
        - tasks.${{key}}
      deps:
        - fit
        - artifacts/model/${{item.after}}
      outs:
        - artifacts/model/${{key}}
  evaluate:
    foreach: ${{tasks}}
    do:
      cmd: ./evaluate ${{key}}
      deps:
        - evaluate
        - artifacts/model/${{key}}
      outs:
        - artifacts/evaluation/${{key}}
  report:
    cmd: ./report
    params:
      - tasks
    deps:
      - artifacts/evaluation
    metrics:
      - metrics.json:
          cache: false
"""

FIT = f"""#!/bin/sh
echo "fit $1" >> ran
cut -c 1 rank-matters > artifacts/model/$1 2>/dev/null || true
echo "$1 after $2" >> artifacts/model/$1
{LEAVE}
"""
EVALUATE = f"""#!/bin/sh
echo "evaluate $1" >> ran
mkdir -p artifacts/evaluation/$1
counts='"tasks": ["t01", "t02"], "accuracy": [0.75, 1.0], "samples": [8, 8], "correct": [6, 8]'
test $1 = t01 && counts='"tasks": ["t01"], "accuracy": [0.875], "samples": [8], "correct": [7]'
echo "{{$counts}}" > artifacts/evaluation/$1/metrics.json
{LEAVE}
"""
REPORT = f"""#!/bin/sh
echo report >> ran
echo '{{"last_accuracy": 0.875, "average_accuracy": 0.8125, "forgetting": 0.125}}' > metrics.json
{LEAVE}
"""


def ran(folder: Path) -> list[str]:
    """What ran since the last call."""
    try:
        return (folder / "ran").read_text().splitlines()
    finally:
        (folder / "ran").unlink(missing_ok=True)
        (folder / "ran").touch()


def preload_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the fork servers of runs preload nothing: stages that are shell scripts need no libraries."""
    monkeypatch.setenv("PYTHONPATH", str(NO_LIBRARIES), prepend=os.pathsep)
