"""What DVC says when it cannot go on, as one line: the error of the system behind it, where there is one."""

from __future__ import annotations

import contextlib
import logging
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from pipelines.project.error_text import one_line, user_message
from pipelines.project.errors import InputError

_LOGGERS = ("dvc", "dvc_data", "dvc_objects")
"""Who logs an error of DVC. What fails in one of its threads is logged there, and only counted in what is raised."""


def _system_fault(error: BaseException | None) -> str | None:
    """Return a line for what the system, or a database of DVC's, refused, if an error goes back to that."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and not isinstance(error, ConnectionError | TimeoutError):
            if line := user_message(error):
                return line
        elif isinstance(error, sqlite3.Error):
            return f"a database of DVC: {one_line(error)}; it needs room and rights in .dvc/tmp and in its site cache"
        error = error.__cause__ or error.__context__
    return None


@contextlib.contextmanager
def dvc_errors() -> Iterator[None]:
    """Turn what DVC says of a broken, busy or unreachable project into one line."""
    from dvc.exceptions import DvcException
    from dvc.scm import SCMError

    try:
        yield
    except SCMError as error:
        if any((place / ".git").exists() for place in (Path.cwd(), *Path.cwd().parents)):
            raise InputError(f"dvc: {one_line(error)}") from error
        raise InputError(
            f"{Path.cwd()}: no Git repository; make one (git init), or do without (dvc config core.no_scm true)"
        ) from error
    except DvcException as error:
        raise InputError(f"dvc: {_system_fault(error) or one_line(error)}") from error
    except RecursionError:
        raise InputError("dvc.yaml: more levels than DVC can read; restore it from version control") from None
    except sqlite3.Error as error:
        raise InputError(f"dvc: {_system_fault(error)}") from error


class SystemFaults(logging.Handler):
    """Remembers the first error of the system that DVC logs, in whatever thread."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.first: str | None = None
        for name in _LOGGERS:
            logging.getLogger(name).addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Look at the exception of a record."""
        self.first = self.first or _system_fault(record.exc_info[1] if record.exc_info else None)
