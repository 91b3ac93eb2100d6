"""O-LoRA (Wang et al., EMNLP 2023 Findings): a LoRA per task, orthogonal in its input to the earlier ones."""

import torch
from torch import Tensor

from sdlora.classifier import IncrementalClassifier, ModelState
from sdlora.methods.method import Batches, Method, Settings, keep_as_trained, new_direction, sum_on

_PENALTY = 0.5
"""λ₁ of the released code (cmnfriend/O-LoRA@07117e1, src/run_uie_lora.py:240); its λ₂ is 0."""


def begin(
    model: IncrementalClassifier,
    before: ModelState,
    *,
    task: str,
    settings: Settings,
    batches: Batches,
    generator: torch.Generator,
) -> None:
    """Train a new LoRA beside the frozen earlier ones, W₀ + Σ BₖAₖ (scale 1, where the released code has 4)."""
    sum_on(model, before, new_direction(model, rank=settings.rank, generator=generator))


def penalty(model: IncrementalClassifier, *, settings: Settings) -> Tensor:
    """λ Σ_targets Σ |A_old A_newᵀ|: the L1 norm of the code, over all earlier A (the paper squares it)."""
    terms = [
        (target.stacked_down @ target.down.T).abs().sum()
        for target in model.targets.values()
        if target.down is not None
    ]
    return (_PENALTY if settings.penalty is None else settings.penalty) * torch.stack(terms).sum()


METHOD = Method(begin=begin, freeze=keep_as_trained, penalty=penalty)
