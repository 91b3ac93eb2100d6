"""Sequential fine-tuning of one LoRA: the same factors are trained on in every step, and nothing protects them."""

import torch

from sdlora.classifier import IncrementalClassifier, ModelState
from sdlora.methods.method import Batches, FitResult, Frozen, Method, Settings, new_direction


def begin(
    model: IncrementalClassifier,
    before: ModelState,
    *,
    task: str,
    settings: Settings,
    batches: Batches,
    generator: torch.Generator,
) -> None:
    """Train the factors that the last step left (new ones, with B = 0, in the first). Their magnitude is 1."""
    model.set_directions({}, torch.ones(1, 1), trained=False)
    left = list(before.directions.values())
    model.train_direction(left[-1] if left else new_direction(model, rank=settings.rank, generator=generator))


def freeze(before: ModelState, fit: FitResult, *, settings: Settings) -> Frozen:
    """Keep the factors as they are, in place of those before."""
    return Frozen(directions={fit.task: fit.factors}, magnitudes={fit.task: torch.ones(len(fit.factors))})


METHOD = Method(begin=begin, freeze=freeze, replaces=True)
