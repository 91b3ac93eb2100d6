"""What the patches raise that DVC does not."""

from __future__ import annotations

from dvc.exceptions import DvcException


class RunCacheError(DvcException):
    """An entry of the run-cache could not be copied: storage that fails, a full disk."""
