"""SD-LoRA-KD: a direction that the earlier ones explain is absorbed into their magnitudes (Wu et al., Eq. 7 and 8)."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from sdlora.adapters import Factors
from sdlora.classifier import ModelState
from sdlora.methods import sdlora
from sdlora.methods.method import FitResult, Frozen, Method, Settings


class Products(NamedTuple):
    """Inner products of the contribution T = α_tD_t of a new direction and the earlier directions D_k, float64."""

    gram: Tensor
    """(targets, tasks, tasks): ⟨D_j, D_k⟩."""
    inner: Tensor
    """(targets, tasks): ⟨D_k, T⟩."""
    energy: Tensor
    """(targets,): ‖T‖²."""


def products(
    directions: Mapping[str, Mapping[str, Factors]], new: Mapping[str, Factors], magnitudes: Tensor
) -> Products:
    """Return the products of all directions at every target, from Gram matrices of stacked factors, never from d×d.

    Args:
        directions: earlier task → target → normalised factors.
        new: target → normalised factors of D_t.
        magnitudes: (targets,), α_t at each target.
    """
    grams = []
    for target, factors in new.items():
        pairs = [*(direction[target] for direction in directions.values()), factors]
        up = torch.cat([pair.up for pair in pairs], dim=1).double()
        down = torch.cat([pair.down for pair in pairs], dim=0).double()
        ranks = torch.tensor([len(pair.down) for pair in pairs])
        owner = torch.repeat_interleave(torch.eye(len(pairs), dtype=torch.float64), ranks, dim=0)
        grams.append(owner.T @ ((up.T @ up) * (down @ down.T)) @ owner)
    gram, alpha = torch.stack(grams), magnitudes.double()
    return Products(gram[:, :-1, :-1], gram[:, :-1, -1] * alpha[:, None], gram[:, -1, -1] * alpha.square())


def shared_coefficients(found: Products) -> Tensor:
    """Solve the least squares with one coefficient per task for all targets (tasks, targets): the sum of the Grams."""
    # lstsq and not solve: two earlier directions may be the same, and the Gram matrix then is singular.
    solved = torch.linalg.lstsq(found.gram.sum(0), found.inner.sum(0)[:, None], driver="gelsd").solution
    return solved.expand(-1, len(found.energy)).contiguous()


def own_coefficients(found: Products) -> Tensor:
    """Solve the least squares with a coefficient of its own for every task and target (tasks, targets)."""
    solved = torch.linalg.lstsq(found.gram, found.inner[:, :, None], driver="gelsd").solution
    return solved[:, :, 0].T.contiguous()


def relative_residual(found: Products, coefficients: Tensor) -> float:
    """√(Σ‖T − Σ_k Δ_kD_k‖² / Σ‖T‖²), both sums over the targets."""
    fitted = torch.einsum("it,tij,jt->", coefficients, found.gram, coefficients)
    residual = found.energy.sum() - 2 * (coefficients.T * found.inner).sum() + fitted
    return float((residual.clamp_min(0) / found.energy.sum()).sqrt())


def freeze(before: ModelState, fit: FitResult, *, settings: Settings) -> Frozen:
    """Freeze as SD-LoRA does, then absorb the new direction where the relative residual is below the tolerance.

    Magnitudes have to be carried for that: where they start anew at the next step, what was absorbed is lost.

    `settings.tolerance` is the share of the new direction's contribution (Frobenius norm over all targets) that no
    combination of the earlier ones reproduces: 0 absorbs nothing, 1 everything. The paper's own τ = 9·10⁻⁴ has no
    stated unit, and can never be met as a Frobenius norm (method.md 2.2).
    """
    whole = sdlora.freeze(before, fit, settings=settings)
    if not before.directions or fit.task not in whole.directions:
        return whole
    new = whole.directions[fit.task]
    found = products(before.directions, new, whole.magnitudes[fit.task])
    # What is added to the earlier magnitudes is α_t·Δα_k; Eq. 8 of the paper drops α_t.
    added = own_coefficients(found) if settings.formulation.per_target else shared_coefficients(found)
    residual = relative_residual(found, added)
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
