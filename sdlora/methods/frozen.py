"""The frozen backbone: only the new rows of the head are trained."""

import torch

from sdlora.classifier import IncrementalClassifier, ModelState
from sdlora.methods.method import Batches, Method, Settings, keep_as_before


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


METHOD = Method(begin=begin, freeze=keep_as_before, targets=())
