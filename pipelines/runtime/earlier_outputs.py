"""What earlier steps have left, and who brings what is not here.

A stage asks for a folder, and knows nothing of DVC.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from pathlib import Path

Find = Callable[[str], Path]
"""Returns where the output of a step can be read, by its name."""
_Bring = Callable[[Path, str], AbstractContextManager[Find]]
"""Makes that of one of the outputs, and of the name of the record in each."""

_brought: ContextVar[_Bring | None] = ContextVar("brought", default=None)


def outputs_beside(folder: Path, record: str) -> AbstractContextManager[Find]:
    """Give a function that returns where an output beside `folder` can be read, by the name of its step.

    What is not here is brought as `bring_outputs` has arranged it. Where nobody has, the folders are where they are.

    Args:
        folder: One of the outputs.
        record: Name of the record in each, such as step.json: it names all files of its folder.
    """
    bring = _brought.get()
    return nullcontext(folder.parent.joinpath) if bring is None else bring(folder, record)


def bring_outputs(bring: _Bring) -> None:
    """Have all work in this context, and in what is called from it, find outputs of earlier steps in this way."""
    _brought.set(bring)
