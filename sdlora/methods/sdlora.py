"""SD-LoRA (Wu et al., ICLR 2025): a new direction for every task, the magnitudes of all of them trained on."""

import math
from collections.abc import Mapping

import torch

from sdlora.adapters import Factors, truncate
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
    """Train a new direction of rank `settings.rank` and the magnitudes of all (Alg. 1, lines 1 and 5-8)."""
    begin_with_rank(model, before, rank=settings.rank, settings=settings, generator=generator)


def begin_with_rank(
    model: IncrementalClassifier,
    before: ModelState,
    *,
    rank: int,
    settings: Settings,
    generator: torch.Generator,
) -> None:
    """Train a new direction of the given rank, and the magnitudes of all directions. Rank 0 is no new direction."""
    formulation = settings.formulation
    tasks, columns = len(before.directions), len(model.targets) if formulation.per_target else 1
    dtype = next(model.backbone.parameters()).dtype
    rows = tasks + 1 if rank else tasks
    magnitudes = torch.full((rows, columns), formulation.magnitude_start, dtype=dtype)
    if formulation.carried and tasks:
        held = torch.stack([before.magnitudes[task] for task in before.directions])
        # One number for the whole network: the nearest to what the targets hold (equal ones stay as they are).
        magnitudes[:tasks] = held if formulation.per_target else held.mean(dim=1, keepdim=True)
    earlier = formulation.trains_earlier
    model.set_directions(before.directions, magnitudes, trained=bool(rank) or earlier, trains_earlier=earlier)
    if not rank:
        return
    factors = new_direction(model, rank=rank, generator=generator, up=formulation.initial_up)
    model.train_direction(factors, norm=formulation.norm if formulation.normalise_current else None)


def freeze(before: ModelState, fit: FitResult, *, settings: Settings) -> Frozen:
    """Divide the new direction by its norm, which its magnitude takes over: the function stays the trained one.

    The norm is shared out over the two factors (B/√n, A/√n, as the paper's Fig. 1 draws what is stored). Where
    the current direction was normalised in training, its magnitude is what it is. With `settings.compress` the
    direction is first truncated to the smallest rank that holds that share of its energy. A target that no gradient
    reaches (the query of a single token) keeps a direction of zeros; where none has another, none is kept.

    Without a new direction only the magnitudes are what was trained.

    Raises:
        ValueError: a direction is not finite.
    """
    if not fit.factors:
        targets = len(next(iter(before.directions.values())))
        magnitudes = {task: alpha.expand(targets).clone() for task, alpha in fit.magnitudes.items()}
        return Frozen(directions=before.directions, magnitudes=magnitudes)
    exact = _normalised(before, fit, fit.factors, settings=settings)
    if settings.compress is None:
        return exact
    smaller = {target: truncate(factors, energy=settings.compress) for target, factors in fit.factors.items()}
    # Truncation shortens a direction. The magnitude of the whole one goes with the shorter one's own norm.
    frozen = _normalised(before, fit, smaller, settings=settings)
    ranks = [factors.down.shape[0] for factors in smaller.values()]
    facts = {"compressed_rank_mean": round(sum(ranks) / len(ranks), 3), "compressed_rank_most": max(ranks)}
    return Frozen(directions=frozen.directions, magnitudes=frozen.magnitudes, exact=exact, facts=facts)


def _normalised(
    before: ModelState, fit: FitResult, factors: Mapping[str, Factors], *, settings: Settings
) -> Frozen:
    formulation, targets = settings.formulation, list(factors)
    norms = torch.stack([formulation.norm(factors[target]) for target in targets])
    for target, norm in zip(targets, norms.tolist(), strict=True):
        if not math.isfinite(norm):
            raise ValueError(
                f"{fit.task}: the direction at {target} has norm {norm}: it diverged; lower training.learning_rate"
            )
    magnitudes = {task: alpha.expand(len(targets)).clone() for task, alpha in fit.magnitudes.items()}
    if not norms.any():
        return Frozen(
            directions=before.directions, magnitudes={task: magnitudes[task] for task in before.directions}
        )
    divisors = torch.where(norms > 0, norms, 1).sqrt()
    direction = {
        target: Factors(up=pair.up / divisor, down=pair.down / divisor)
        for (target, pair), divisor in zip(factors.items(), divisors, strict=True)
    }
    trained = norms
    if formulation.normalise_current:
        whole = torch.stack([formulation.norm(fit.factors[target]) for target in targets])
        trained = norms / torch.where(whole > 0, whole, 1)
    magnitudes[fit.task] = magnitudes[fit.task] * trained
    return Frozen(directions={**before.directions, fit.task: direction}, magnitudes=magnitudes)


METHOD = Method(begin=begin, freeze=freeze)
