"""What tests that search share: how long they search, and what every input has to be answered with."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from hypothesis import HealthCheck, settings

from pipelines.project.error_text import user_message

_EXAMPLES = "SDLORA_FUZZ_EXAMPLES"
"""How many inputs each search tries. Where it is set, the inputs are others every time."""

SEARCH = settings(
    max_examples=int(os.environ.get(_EXAMPLES, "60")),
    derandomize=_EXAMPLES not in os.environ,
    deadline=None,
    database=None,
    suppress_health_check=[
        HealthCheck.function_scoped_fixture,
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
        HealthCheck.filter_too_much,
    ],
)
"""Decorates a test that searches."""

CASES = Path(__file__).parents[1] / "cases"
"""Inputs that a search has found, a folder for each kind of input."""

_LONGEST = 300
"""Characters of a line that a person reads."""


def assert_answered(error: BaseException) -> None:
    """Hold that the work is done, or one line says what, where, what was found and what to do."""
    line = user_message(error)
    assert line is not None, f"a traceback: {error!r}"
    assert_line(line)


def assert_line(line: str) -> None:
    """Hold that a text is one line that a terminal shows and a person reads."""
    assert line
    assert line.isprintable(), ascii(line)
    assert len(line) <= _LONGEST, f"{len(line)} characters: {line}"


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Hold that nothing, and no library in C, writes to standard error past Python."""
    kept = os.dup(2)
    with tempfile.TemporaryFile() as said:
        os.dup2(said.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
        said.seek(0)
        assert said.read() == b""
