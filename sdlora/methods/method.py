"""What a method is: two functions, one before the fit and one after it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sdlora.adapters import Factors, initial_factors
from sdlora.classifier import IncrementalClassifier, Learned
from sdlora.formulations import Formulation
from sdlora.head import HeadBlock


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """What a fit leaves: raw, nothing normalised, as trained."""

    task: str
    """The id of the task that was learned."""
    factors: Mapping[str, Factors]
    """Target name → the current direction's factors; empty where the method trains none."""
    magnitudes: Mapping[str, Tensor]
    """Task id → (targets,) or, where one magnitude is shared by all of them, (1,)."""
    head: HeadBlock
    """The new rows."""


class Begin(Protocol):
    """Prepare `model` for a step: what is trained, from which values (the head's new rows aside)."""

    def __call__(
        self,
        model: IncrementalClassifier,
        before: Learned,
        *,
        formulation: Formulation,
        rank: int,
        magnitude_start: float | None,
        generator: torch.Generator,
    ) -> None: ...


class Freeze(Protocol):
    """The directions and magnitudes after a step; the head's rows are appended alike for every method."""

    def __call__(
        self, before: Learned, fit: FitResult, *, formulation: Formulation
    ) -> tuple[dict[str, Mapping[str, Factors]], dict[str, Tensor]]: ...


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method is what it does before a fit and what it does after."""

    begin: Begin
    freeze: Freeze


def new_direction(
    model: IncrementalClassifier, *, rank: int, generator: torch.Generator
) -> dict[str, Factors]:
    """Initial factors for every target, drawn in the order of the targets.

    Raises:
        ValueError: `rank` exceeds what a target can hold.
    """
    for name, target in model.targets.items():
        if rank > min(target.rows, target.columns):
            raise ValueError(
                f"adapter.rank {rank} is more than {name} can hold ({target.rows}×{target.columns}); "
                "choose a smaller one"
            )
    return {
        name: initial_factors(target.rows, target.columns, rank, generator=generator)
        for name, target in model.targets.items()
    }
