"""How a stage ended, in a file for whoever runs it: DVC passes on neither its exit status nor what it says of it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import NamedTuple

from pipelines.project.environment import OUTCOME_FILE

DONE = "done"
GATE = "gate"
"""A closed gate, which a person may open."""
INPUT = "input"
"""Anything else that the user can mend."""
BUG = "bug"


class StageOutcome(NamedTuple):
    """How a stage ended. Of a stage that DVC took from its cache there is none: nothing ran."""

    status: int
    """the exit status"""
    kind: str
    """`DONE`, `GATE`, `INPUT` or `BUG`"""
    line: str = ""
    """the error in one line"""


def leave_outcome(outcome: StageOutcome, *, keep_failure: bool = False) -> bool:
    """Leave the outcome for whoever runs this stage. Return whether somebody asked for it.

    With `keep_failure` one that the stage has left of its own failure stays.
    """
    path = os.environ.get(OUTCOME_FILE)
    if not path:
        return False
    left = read_outcome(Path(path)) if keep_failure else None
    if left is None or not left.status:
        Path(path).write_text(json.dumps(outcome._asdict()) + "\n", encoding="utf-8")
    return True


def read_outcome(path: Path) -> StageOutcome | None:
    """Read what a stage left. None where it left nothing, because it was killed or never started."""
    try:
        return StageOutcome(**json.loads(path.read_bytes()))
    except (FileNotFoundError, ValueError):
        return None
