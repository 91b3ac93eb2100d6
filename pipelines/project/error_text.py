"""The texts of errors: one line for each that the user can mend."""

from __future__ import annotations

import errno
import traceback
from pathlib import Path

from pipelines.project.display import as_line
from pipelines.project.errors import InputError


def user_message(error: BaseException) -> str | None:
    """Return one line for an error that the user can mend, or None for a bug of this program.

    The user can mend bad input, a file that cannot be read or written, and a ValueError, or an OSError without a number
    of the system's, that this code raised on purpose.
    """
    if isinstance(error, InputError):
        return one_line(error)
    if isinstance(error, OSError) and error.errno is not None:
        where = f" ({error.filename})" if error.filename else ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return as_line(
                f"the disk is full{where}: nothing half-written was kept; make room and run the same again"
            )
        return as_line(f"{error.strerror}{where}")
    if isinstance(error, ValueError | OSError) and _raised_here(error):
        return one_line(error)
    return None


def failure_message(error: BaseException) -> str:
    """Return what is told of work that failed: the user's line, or the type and text of a bug."""
    return user_message(error) or f"{type(error).__name__}: {error}"


def one_line(error: BaseException) -> str:
    """Return the error's text as one line that a terminal shows, or its type where it has none."""
    return as_line(str(error)) or type(error).__name__


def _raised_here(error: BaseException) -> bool:
    """Return whether a line of this program raised the error, and not a library that it called."""
    frames = traceback.extract_tb(error.__traceback__)
    home = Path(__file__).resolve().parents[2]
    ours = (home / "pipelines", home / "sdlora")
    return bool(frames) and any(Path(frames[-1].filename).resolve().is_relative_to(folder) for folder in ours)
