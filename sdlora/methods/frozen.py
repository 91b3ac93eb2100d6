"""The frozen backbone: only the new rows of the head are trained."""

from collections.abc import Mapping

import torch
from torch import Tensor

from sdlora.adapters import Factors
from sdlora.classifier import IncrementalClassifier, Learned
from sdlora.formulations import Formulation
from sdlora.methods.method import FitResult, Method


def begin(
    model: IncrementalClassifier,
    before: Learned,
    *,
    formulation: Formulation,
    rank: int,
    magnitude_start: float | None,
    generator: torch.Generator,
) -> None:
    """Add nothing: the features stay those of the backbone."""


def freeze(
    before: Learned, fit: FitResult, *, formulation: Formulation
) -> tuple[dict[str, Mapping[str, Factors]], dict[str, Tensor]]:
    """There is no direction to keep."""
    return {}, {}


METHOD = Method(begin=begin, freeze=freeze)
