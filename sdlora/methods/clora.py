"""CLoRA (Lu et al., ACL 2025): LoRA held away from fixed random subspaces, which all tasks leave alone together."""

import functools

import torch
from torch import Tensor

from sdlora.classifier import IncrementalClassifier
from sdlora.methods import olora
from sdlora.methods.method import Method, Settings, keep_as_trained
from sdlora.seeding import generator_for

_PENALTY = 0.01
"""λ; the released code's 1 is far above the cross-entropy at the sizes of a vision transformer."""
_SHARE = 2 / 3
"""k / d, the part of the dimensions that is left alone: 512 of 768 in the released code's example."""
SEED = 0
"""The subspaces are the same for all tasks, runs and steps: only then do the updates of all tasks avoid them."""


@functools.cache
def orthonormal(rows: int, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a random matrix (rows, k) with orthonormal columns. Its values depend on name and shape alone."""
    columns = round(_SHARE * rows)
    generator = generator_for(SEED, "clora", name, rows, columns)
    drawn = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(drawn).Q.to(dtype=dtype, device=device)


def penalty(model: IncrementalClassifier, *, settings: Settings) -> Tensor:
    """λ Σ_targets (½‖A V‖²_F + ½‖BᵀU‖²_F), V (in, k) and U (out, k) fixed and orthonormal.

    sutakori/CLoRA@802cda8, clora.py:41-89. The released code knows no tasks; the chain here is its own default (merge
    after training, then a new LoRA), with one U and V for all tasks.
    """
    terms = []
    for name, target in model.targets.items():
        if target.up is None or target.down is None:
            continue
        kind = (target.down.dtype, target.down.device)
        inside = orthonormal(target.columns, f"{name}.in", *kind)
        outside = orthonormal(target.rows, f"{name}.out", *kind)
        terms.append((target.down @ inside).square().sum() / 2 + (target.up.T @ outside).square().sum() / 2)
    return (_PENALTY if settings.penalty is None else settings.penalty) * torch.stack(terms).sum()


METHOD = Method(begin=olora.begin, freeze=keep_as_trained, penalty=penalty)
