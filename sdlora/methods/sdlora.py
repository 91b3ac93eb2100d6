"""SD-LoRA (Wu et al., ICLR 2025): a new direction for every task, the magnitudes of all of them trained on."""

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
    """Train a direction from B = 0 and the magnitudes of all directions (Alg. 1, lines 1 and 5-8)."""
    start = formulation.magnitude_start if magnitude_start is None else magnitude_start
    tasks, columns = len(before.directions), len(model.targets) if formulation.per_target else 1
    magnitudes = torch.full((tasks + 1, columns), start)
    if formulation.carried and tasks:
        magnitudes[:tasks] = torch.stack([before.magnitudes[task] for task in before.directions])
    model.set_directions(before.directions, magnitudes, trained=True)
    model.train_direction(new_direction(model, rank=rank, generator=generator))


def freeze(
    before: Learned, fit: FitResult, *, formulation: Formulation
) -> tuple[dict[str, Mapping[str, Factors]], dict[str, Tensor]]:
    """Divide the new direction by its norm, which its magnitude takes over: the function stays the trained one.

    The norm is shared out over the two factors (B/√n, A/√n, as the paper's Fig. 1 draws what is stored).

    Raises:
        ValueError: a direction is zero or not finite, so that it cannot be normalised.
    """
    targets = list(fit.factors)
    norms = torch.stack([formulation.norm(fit.factors[target]) for target in targets])
    for target, norm in zip(targets, norms.tolist(), strict=True):
        if not 0 < norm < float("inf"):
            raise ValueError(
                f"{fit.task}: the direction at {target} has norm {norm} and cannot be "
                "frozen; it was not trained, or diverged"
            )
    direction = {
        target: Factors(up=factors.up / norm.sqrt(), down=factors.down / norm.sqrt())
        for (target, factors), norm in zip(fit.factors.items(), norms, strict=True)
    }
    magnitudes = {task: alpha.expand(len(targets)).clone() for task, alpha in fit.magnitudes.items()}
    magnitudes[fit.task] = magnitudes[fit.task] * norms
    return {**before.directions, fit.task: direction}, magnitudes


METHOD = Method(begin=begin, freeze=freeze)
