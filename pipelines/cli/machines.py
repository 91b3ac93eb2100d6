"""A command that torchrun starts several times: the first process runs it, and the others share its fits."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from pipelines.runtime.machines import launched, share_orders, tell_end
from pipelines.runtime.processes import die_with_starter


@contextlib.contextmanager
def on_all_machines() -> Iterator[None]:
    """Let the first process alone do what is inside. Every other one shares its fits instead, and ends.

    Without torchrun there is one process.
    """
    place = launched()
    if place is None or "DVC_STAGE" in os.environ:  # of `sdlora run`, which has others to end
        yield
        return
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # it traces each connection that is lost
    die_with_starter()
    if place.rank:
        from pipelines.stages.fit import accept_order

        share_orders(place, accept_order)
    status: object = 1
    try:
        yield
        status = 0
    except SystemExit as end:
        status = end.code or 0
        raise
    finally:
        tell_end(int(status != 0))
