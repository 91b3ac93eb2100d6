"""N-LoRA (Yang et al., COLING 2025): a LoRA per task whose update is sparse, so that it collides with few others."""

import torch
from torch import Tensor

from sdlora.classifier import IncrementalClassifier
from sdlora.methods import olora
from sdlora.methods.method import Method, Settings, keep_as_trained

_PENALTY = 0.001
"""λ; the released code has 0.4 for an r×r sum that is smaller by about (d/r)^1.5 (80 for d = 192, 670 for d = 768)."""


def penalty(model: IncrementalClassifier, *, settings: Settings) -> Tensor:
    """λ Σ_targets ‖B_t A_t‖₁ over the d×d update, as the paper has it.

    The released code (PKU-YuanGroup/N-LoRA@7301afe, src/uie_trainer_lora.py:101) sums the r×r product of the factors
    in the other order, which says nothing of the update's sparsity.
    """
    terms = [
        (target.up @ target.down).abs().sum()
        for target in model.targets.values()
        if target.up is not None and target.down is not None
    ]
    return (_PENALTY if settings.penalty is None else settings.penalty) * torch.stack(terms).sum()


METHOD = Method(begin=olora.begin, freeze=keep_as_trained, penalty=penalty)
