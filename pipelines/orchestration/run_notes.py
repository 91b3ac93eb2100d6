"""Notes of runs where no Prefect server is named: what `sdlora history` tells to one.

A server of its own for each run would take longer than most stages, and nobody looks at it meanwhile. So a run leaves
a line in a file when it begins, and one when it ends. Of a process that was killed there is only the first.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

from pipelines.project.environment import HISTORY_FILE, PARENT_FLOW_RUN
from pipelines.project.error_text import failure_message, one_line
from pipelines.project.layout import HISTORY
from pipelines.runtime.console import log_line
from pipelines.runtime.processes import environment
from pipelines.runtime.stage import Stage, StageResult

_current: ContextVar[str | None] = ContextVar("current", default=None)


@contextlib.contextmanager
def local_history() -> Iterator[None]:
    """Have the runs inside be noted in this project, where no server is named and nobody else has them noted."""
    if os.environ.get("PREFECT_API_URL") or os.environ.get(HISTORY_FILE):
        yield
        return
    HISTORY.parent.mkdir(exist_ok=True)
    with environment({HISTORY_FILE: str(HISTORY.resolve())}):
        yield


def noted(stage: Stage, label: str, arguments: Mapping[str, str | Path]) -> StageResult:
    """Run a stage, and note when it began and how it ended, if this is to be noted."""
    if not os.environ.get(HISTORY_FILE):
        return stage(**arguments)
    run = str(uuid4())
    _note(
        run,
        part_of=os.environ.get(PARENT_FLOW_RUN) or None,
        flow=stage.name,
        name=label,
        parameters={key: str(value) for key, value in arguments.items()},
        host=socket.gethostname(),
        process=os.getpid(),
    )
    before = _current.set(run)
    try:
        result = stage(**arguments)
    except Exception as error:
        _note(run, state="Failed", message=failure_message(error))
        raise
    except BaseException as end:
        _note(run, state="Crashed", message=f"it was told to stop ({type(end).__name__})")
        raise
    finally:
        _current.reset(before)
    _note(run, state="Completed", message=f"{label} is done", rows=result.rows, documents=_documents(result))
    return result


def current_note() -> str | None:
    """Return the id of the run that this code is called in, if it is noted."""
    return _current.get()


def _documents(result: StageResult) -> dict[str, str]:
    """Return what a stage has to show. Finished work never fails for it."""
    try:
        return dict(result.documents())
    except Exception as trouble:
        log_line(f"history: nothing to show of it ({one_line(trouble)})")
        return {}


def _note(run: str, **facts: Any) -> None:  # noqa: ANN401 - whatever JSON can hold
    """Add a line. A disk that takes none costs a line on the terminal, never the work."""
    line = json.dumps({"run": run, "at": datetime.now(UTC).isoformat(), **facts})
    try:
        # In one write, as several stages may be at work. A line that was cut off must not take the next with it.
        with open(os.environ[HISTORY_FILE], "ab", buffering=0) as file:
            file.write(f"\n{line}\n".encode())
    except OSError as error:
        log_line(f"history: not noted ({one_line(error)})")
