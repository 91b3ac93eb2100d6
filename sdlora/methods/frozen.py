"""The frozen backbone: only the new rows of the head are trained."""

import torch

from sdlora.classifier import IncrementalClassifier, ModelState
from sdlora.methods.method import Batches, FitResult, Frozen, Method, Settings


def begin(
    model: IncrementalClassifier,
    before: ModelState,
    *,
    task: str,
    settings: Settings,
    batches: Batches,
    generator: torch.Generator,
) -> None:
    """Add nothing: the features stay those of the backbone."""


def freeze(before: ModelState, fit: FitResult, *, settings: Settings) -> Frozen:
    """There is no direction to keep."""
    return Frozen()


METHOD = Method(begin=begin, freeze=freeze, targets=())
