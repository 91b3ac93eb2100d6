"""Chains of a sweep on one machine that come to the same stage at once: one computes it, the others take it over."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from pipelines.project.files import read_json
from pipelines.project.layout import TURNS
from pipelines.runtime.file_lock import held


@contextlib.contextmanager
def stage_lock(stage: str) -> Iterator[None]:
    """Wait while another chain computes the same stage. Outside of a sweep there is nobody to wait for."""
    turns = read_json(TURNS) if TURNS.is_file() else {"stages": {}}
    if stage not in turns["stages"]:
        yield
        return
    lock = Path(turns["folder"], turns["stages"][stage])
    with held(lock):
        yield
