"""SD-LoRA-KD: a direction that the earlier ones explain is absorbed into their magnitudes (Wu et al., Eq. 7 and 8)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from sdlora.adapters import Factors, product_inner
from sdlora.classifier import Learned
from sdlora.methods import sdlora
from sdlora.methods.method import FitResult, Frozen, Method, Settings


def explain(
    directions: Mapping[str, Mapping[str, Factors]],
    new: Mapping[str, Factors],
    magnitudes: Tensor,
    *,
    shared: bool,
) -> tuple[Tensor, float]:
    """The least squares of αᵗD_t on the earlier directions, from r×r Gram matrices.

    Args:
        directions: earlier task → target → normalised factors.
        new: target → normalised factors of D_t.
        magnitudes: (targets,), αᵗ at each target.
        shared: one coefficient per task for all targets (the sum of the Grams), else one per task and target.

    Returns:
        The coefficients (tasks, targets) float64: what is added to the earlier magnitudes, α_t·Δα_k exactly, where
        Eq. 8 of the paper drops α_t. And the relative residual √(Σ‖α_tD_t − Σ_k Δ_kD_k‖² / Σ‖α_tD_t‖²), both
        sums over the targets.
    """
    alpha = magnitudes.double()
    grams, inners, energy = [], [], []
    for target, factors in new.items():
        held = [direction[target] for direction in directions.values()]
        grams.append(torch.stack([torch.stack([product_inner(a, b) for b in held]) for a in held]))
        inners.append(torch.stack([product_inner(a, factors) for a in held]))
        energy.append(product_inner(factors, factors))
    gram, inner = torch.stack(grams), torch.stack(inners) * alpha[:, None]
    total = (torch.stack(energy) * alpha.square()).sum()
    if shared:
        # lstsq and not solve: two earlier directions may be the same, and the Gram matrix then is singular.
        solved = torch.linalg.lstsq(gram.sum(0), inner.sum(0)[:, None], driver="gelsd").solution[:, 0]
        coefficients = solved.expand(len(new), -1)
    else:
        coefficients = torch.linalg.lstsq(gram, inner[:, :, None], driver="gelsd").solution[:, :, 0]
    fitted = torch.einsum("ti,tij,tj->", coefficients, gram, coefficients)
    residual = total - 2 * (coefficients * inner).sum() + fitted
    return coefficients.T.contiguous(), float((residual.clamp_min(0) / total).sqrt())


def freeze(before: Learned, fit: FitResult, *, settings: Settings) -> Frozen:
    """Freeze as SD-LoRA does, then absorb the new direction where the relative residual is below the tolerance.

    `settings.tolerance` is the share of the new direction's contribution (Frobenius norm over all targets) that no
    combination of the earlier ones reproduces: 0 absorbs nothing, 1 everything. The paper's own τ = 9·10⁻⁴ has no
    stated unit, and can never be met as a Frobenius norm (method.md 2.2).
    """
    whole = sdlora.freeze(before, fit, settings=settings)
    if not before.directions:
        return whole
    new = whole.directions[fit.task]
    added, residual = explain(
        before.directions, new, whole.magnitudes[fit.task], shared=not settings.formulation.per_target
    )
    facts: dict[str, float | int | str] = {**whole.facts, "residual": round(residual, 6), "absorbed": 0}
    if residual >= settings.tolerance:
        return Frozen(
            directions=whole.directions, magnitudes=whole.magnitudes, exact=whole.exact, facts=facts
        )
    magnitudes = {
        task: (whole.magnitudes[task].double() + extra).to(whole.magnitudes[task].dtype)
        for task, extra in zip(before.directions, added, strict=True)
    }
    return Frozen(
        directions=dict(before.directions),
        magnitudes=magnitudes,
        exact=whole.exact or whole,
        facts={**facts, "absorbed": 1},
    )


METHOD = Method(begin=sdlora.begin, freeze=freeze)
