"""All tasks so far at once, from the pre-trained model: what a method without old images could reach at most."""

import torch

from sdlora.classifier import IncrementalClassifier, ModelState
from sdlora.methods.finetune import freeze
from sdlora.methods.method import Batches, Method, Settings, new_direction


def begin(
    model: IncrementalClassifier,
    before: ModelState,
    *,
    task: str,
    settings: Settings,
    batches: Batches,
    generator: torch.Generator,
) -> None:
    """Train one new LoRA, with a magnitude of 1, and every row of the head. What came before is left out."""
    model.set_directions({}, torch.ones(1, 1), trained=False)
    model.train_direction(new_direction(model, rank=settings.rank, generator=generator))


METHOD = Method(begin=begin, freeze=freeze, joint=True, replaces=True)
