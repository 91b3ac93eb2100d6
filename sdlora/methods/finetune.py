"""Sequential fine-tuning of one LoRA: the same factors are trained on in every step, and nothing protects them."""

from collections.abc import Mapping

import torch
from torch import Tensor

from sdlora.adapters import Factors
from sdlora.classifier import IncrementalClassifier, Learned
from sdlora.formulations import Formulation
from sdlora.methods.method import FitResult, Method, new_direction


def begin(
    model: IncrementalClassifier,
    before: Learned,
    *,
    formulation: Formulation,
    rank: int,
    magnitude_start: float | None,
    generator: torch.Generator,
) -> None:
    """Train the factors that the last step left (new ones, with B = 0, in the first); their magnitude is 1."""
    model.set_directions({}, torch.ones(1, 1), trained=False)
    left = list(before.directions.values())
    model.train_direction(left[-1] if left else new_direction(model, rank=rank, generator=generator))


def freeze(
    before: Learned, fit: FitResult, *, formulation: Formulation
) -> tuple[dict[str, Mapping[str, Factors]], dict[str, Tensor]]:
    """Keep the factors as they are, in place of those before."""
    return {fit.task: fit.factors}, {fit.task: torch.ones(len(fit.factors))}


METHOD = Method(begin=begin, freeze=freeze)
