"""Every error that this program raises of its own.

    Exception
    ├── InputError            the user can mend it: one line, exit status 2
    │   ├── GateClosedError   a step broke a limit of its gate; a person may let it through
    │   └── PushError         a git remote took no commit; a later run tries again
    ├── FaultError            an audit found that something does not hold: exit status 1
    ├── UnequalError          an export is not the model, and was not kept: exit status 1
    ├── StageFailedError      a stage ended badly, and has said why (pipelines.versioning.repro)
    ├── TransientError        a download failed; the same request may go well later
    ├── RefusedError          a download failed; the next address is tried
    └── DvcException          DVC's own
        └── RunCacheError     an entry of the run-cache was not copied (pipelines.versioning.patches)
    BaseException
    └── _TimeIsUpError        ends a wait, and becomes a TimeoutError (pipelines.runtime.deadline)

Those that name a place stand there, because they hold what only that room knows. Any other exception is a bug, and
shown with its traceback, but for a file that the system does not give or take, and a `ValueError` or
`FileNotFoundError` that the library raises for what it cannot work with: those are one line too
(`pipelines.project.error_text`).
"""

from __future__ import annotations


class InputError(Exception):
    """Bad input. The text is one line: what was wrong, where, what was found, what to do."""


class GateClosedError(InputError):
    """A step broke a limit of its gate. A person may let it through."""


class PushError(InputError):
    """A remote did not take a commit. It may the next time."""


class FaultError(Exception):
    """Something does not hold: the file, and what is wrong with it."""


class UnequalError(Exception):
    """An export whose logits are not the model's. It was not kept."""


class TransientError(Exception):
    """The same request may well succeed a little later."""

    def __init__(self, fault: str, pause: float | None = None) -> None:
        super().__init__(fault)
        self.pause = pause


class RefusedError(Exception):
    """This address will not give the file, however often it is asked."""
