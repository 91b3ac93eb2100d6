"""SD-LoRA-RR: SD-LoRA with a rank that falls from task to task (Wu et al., ICLR 2025, Eq. 6)."""

import torch

from sdlora.classifier import IncrementalClassifier, ModelState
from sdlora.methods import sdlora
from sdlora.methods.method import Batches, Method, Settings


def rank_of(task: str, settings: Settings) -> int:
    """Return the rank of the last entry of the schedule that is not after `task`.

    The paper's schedule, with its 1-based tasks, is 10 from t01, 8 from t04 and 6 from t08; the released code, whose
    tasks count from 0, changes one task later.

    Raises:
        ValueError: no entry begins at or before `task`.
    """
    begun = [start for start in settings.rank_schedule if int(start[1:]) <= int(task[1:])]
    if not begun:
        raise ValueError(f"adapter.rank_schedule has no rank for {task}; let its first entry be t01")
    return settings.rank_schedule[max(begun, key=lambda start: int(start[1:]))]


def begin(
    model: IncrementalClassifier,
    before: ModelState,
    *,
    task: str,
    settings: Settings,
    batches: Batches,
    generator: torch.Generator,
) -> None:
    """Train a new direction of the rank that the schedule has for `task`, none for 0, and all magnitudes."""
    sdlora.begin_with_rank(
        model, before, rank=rank_of(task, settings), settings=settings, generator=generator
    )


METHOD = Method(begin=begin, freeze=sdlora.freeze)
