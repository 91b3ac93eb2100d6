"""What a method is: what it does before a fit, what it adds to the loss, and what it leaves after it."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from sdlora.adapters import Factors, initial_factors
from sdlora.arrivals import StepClasses
from sdlora.classifier import IncrementalClassifier, ModelState
from sdlora.formulations import Formulation
from sdlora.head import HeadBlock

Batches = Callable[[], Iterator[Tensor]]
"""The task's images once, normalised, batch by batch, on the model's device; never augmented."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The choices that methods read. Each reads those it knows."""

    formulation: Formulation
    rank: int
    """Rank of a new direction."""
    rank_schedule: Mapping[str, int] = field(default_factory=dict)
    """Task id → rank from that task on; read by `sdlora-rr`."""
    tolerance: float = 0.0
    """Relative residual below which a direction is absorbed; read by `sdlora-kd`."""
    compress: float | None = None
    """Share of a direction's energy that is kept when it is frozen; read by the SD-LoRA methods."""
    penalty: float | None = None
    """Weight of the term that the method adds to the loss; None for the method's own."""


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """What a fit leaves: raw, nothing normalised, as trained."""

    task: str
    """The id of the task that was learned."""
    factors: Mapping[str, Factors]
    """Target name → the current direction's factors; empty where none was trained."""
    magnitudes: Mapping[str, Tensor]
    """Task id → (targets,) or, where one magnitude is shared by all of them, (1,); empty where none was trained."""
    head: Mapping[str, HeadBlock]
    """Task id → the rows that were trained: those of this task, or of all tasks so far for a joint method."""
    memory: Mapping[str, Tensor] = field(default_factory=dict)
    """What the method keeps for its next step."""
    step_classes: StepClasses = field(default_factory=dict)
    """The labels of the task's classes, if some may be known; else empty."""


@dataclass(frozen=True, kw_only=True)
class Frozen:
    """What a method keeps of a fit."""

    directions: Mapping[str, Mapping[str, Factors]] = field(default_factory=dict)
    """Task id → target name → factors."""
    magnitudes: Mapping[str, Tensor] = field(default_factory=dict)
    """Task id → (targets,)."""
    exact: "Frozen | None" = None
    """The same without what changes the function (absorption, truncation), where something was changed."""
    facts: Mapping[str, float | int | str] = field(default_factory=dict)
    """What happened, for the ledger."""


class Begin(Protocol):
    """Prepare `model` for a step: what is trained, from which values (the head's new rows aside)."""

    def __call__(
        self,
        model: IncrementalClassifier,
        before: ModelState,
        *,
        task: str,
        settings: Settings,
        batches: Batches,
        generator: torch.Generator,
    ) -> None: ...


class Freeze(Protocol):
    """The directions and magnitudes after a step. The head's rows are added alike for every method."""

    def __call__(self, before: ModelState, fit: FitResult, *, settings: Settings) -> Frozen: ...


class _Penalty(Protocol):
    """A scalar that is added to the loss of every step, its weight included."""

    def __call__(self, model: IncrementalClassifier, *, settings: Settings) -> Tensor: ...


class _Remember(Protocol):
    """What the method keeps for its next step, from the trained model. Stored in the model folder."""

    def __call__(
        self, model: IncrementalClassifier, before: ModelState, *, settings: Settings, batches: Batches
    ) -> Mapping[str, Tensor]: ...


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method is what it does before a fit, in it, and after it."""

    begin: Begin
    freeze: Freeze
    penalty: _Penalty | None = None
    remember: _Remember | None = None
    targets: tuple[str, ...] = ("q", "v")
    """What it adapts in every block where `adapter.targets` does not say."""
    joint: bool = False
    """Whether it learns the images of all tasks so far at once, and with them all rows of the head."""
    replaces: bool = False
    """Whether the direction of a step takes the place of the earlier ones, of which then nothing stays frozen."""
    trains_head: bool = True
    """Whether the new rows of the head are trained; a method that trains nothing has no fit to make."""


def new_direction(
    model: IncrementalClassifier, *, rank: int, generator: torch.Generator, up: str = "zero"
) -> dict[str, Factors]:
    """Initial factors for every target, drawn in the order of the targets. `up` as in `initial_factors`.

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
        name: initial_factors(target.rows, target.columns, rank, generator=generator, up=up)
        for name, target in model.targets.items()
    }


def sum_on(
    model: IncrementalClassifier,
    before: ModelState,
    factors: Mapping[str, Factors],
    *,
    train_down: bool = True,
) -> None:
    """Hold all earlier directions with a fixed magnitude of 1 and train `factors` beside them.

    W₀ + Σₖ BₖAₖ: how the methods without magnitudes add up their LoRAs.
    """
    model.set_directions(before.directions, torch.ones(len(before.directions) + 1, 1), trained=False)
    model.train_direction(factors, train_down=train_down)


def keep_as_before(before: ModelState, fit: FitResult, *, settings: Settings) -> Frozen:
    """Keep what was there: the step trained nothing of the backbone, so the features stay what they were."""
    return Frozen(directions=before.directions, magnitudes=before.magnitudes)


def keep_as_trained(before: ModelState, fit: FitResult, *, settings: Settings) -> Frozen:
    """Keep the new factors beside the earlier ones, all with a magnitude of 1."""
    directions = {**before.directions, fit.task: fit.factors}
    return Frozen(
        directions=directions, magnitudes={task: torch.ones(len(fit.factors)) for task in directions}
    )
