"""Lines for people: what a program reports goes to standard output, what it remarks on its way to standard error."""

from __future__ import annotations

import contextlib
import json
import sys


def log_line(line: str) -> None:
    """Print a remark on standard error.

    Where the process that read it was killed, the work goes on: a fit must still save itself.
    """
    with contextlib.suppress(BrokenPipeError):
        sys.stderr.write(line + "\n")
        sys.stderr.flush()


def echo(line: str) -> None:
    """Print a line on standard output at once, so that it stands in order with what stages write."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def printable(text: str) -> str:
    """Return a text as a terminal may show it: whatever is not printable is escaped."""
    return text if text.isprintable() else json.dumps(text)
