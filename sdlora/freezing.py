"""The end of a step: what a method keeps of its fit, and the head that goes with it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from sdlora.arrivals import rows_by_arrival
from sdlora.calibration import (
    UNDIVIDED,
    LeftOut,
    Temperature,
    calibration_of,
    fitted_temperature,
    left_out_logits,
    temperature_of,
    tempered,
)
from sdlora.choices import AdapterChoices, settings_of
from sdlora.classifier import ModelState
from sdlora.drift import carried, drift_map
from sdlora.false_alarms import Margin, alarm_threshold, margin_of
from sdlora.head import HeadRows
from sdlora.heads import HEADS, Head, distance_form
from sdlora.methods import METHODS, FitResult, Frozen, Method, Settings
from sdlora.methods.method import keep_as_before
from sdlora.retention import estimated_retention
from sdlora.seeding import generator_for
from sdlora.statistics import ClassStatistics, class_statistics
from sdlora.unknown import DISTANCES, Quadratic

_Features = Callable[[ModelState], Tensor]
"""The features (n, d) of the task's training images, on the CPU, under the model of what has been learned."""

FEATURE_BATCH = 256
"""Images in one forward pass; no choice of the user, because it may change the last bits."""
_ROWS = 2**16
"""Images whose features are in double precision at a time."""


class _TaskFeatures(Protocol):
    """The features of the task's training images under any model of the chain."""

    def labels(self) -> Tensor:
        """(n,), 0 … classes − 1 within the task."""

    def __call__(self, learned: ModelState, /) -> Tensor:
        """(n, d) on the CPU."""


@dataclass(frozen=True, kw_only=True)
class _LeavingOut:
    """What is chosen on images of a task that are left out in turn."""

    images: torch.Generator
    """What they are left out by."""
    tempered: bool
    """Whether one temperature divides all rows."""
    score: str | None
    """By which an image is called unknown. None where none is."""
    rate: float
    """The share of images of known classes that may be called so."""
    margin: Margin
    """Of the step before."""
    made: torch.Generator
    """What features of known classes are made by."""


@dataclass(frozen=True, kw_only=True)
class FrozenStep:
    """What has been learned after a step."""

    learned: ModelState
    trained: ModelState
    """The function that was trained: another one only where freezing absorbed or truncated something."""
    facts: Mapping[str, float | int | str] = field(default_factory=dict)
    """What happened, for the ledger."""

    @property
    def changed(self) -> bool:
        """Whether freezing changed the function."""
        return self.trained is not self.learned


def freeze(before: ModelState, fit: FitResult, *, method: Method, settings: Settings) -> FrozenStep:
    """Return what has been learned after the step: the method's directions and magnitudes, and the trained rows of the
    head.

    Tensors of earlier steps are handed on as they are. Where neither a direction nor magnitudes were trained (a task of
    one class), the features stay what they were. Needs no model.
    """
    keep = method.freeze if fit.factors or fit.magnitudes else keep_as_before
    frozen = keep(before, fit, settings=settings)

    def whole(kept: Frozen) -> ModelState:
        return ModelState(
            directions=kept.directions,
            magnitudes=kept.magnitudes,
            head={**before.head, **fit.head},
            statistics=before.statistics,
            drift=before.drift,
            memory=fit.memory,
            step_classes={**before.step_classes, **fit.step_classes},
        )

    learned = whole(frozen)
    trained = learned if frozen.exact is None else whole(frozen.exact)
    return FrozenStep(learned=learned, trained=trained, facts=frozen.facts)


def measured(step: FrozenStep, *, features: _Features) -> FrozenStep:
    """Return the step with what freezing changed of its output among the facts, on the task's own training images.

    `output_change` is √(Σ‖f' − f‖² / Σ‖f‖²) of the features f as trained and f' as frozen.
    """
    pairs = zip(features(step.trained).split(_ROWS), features(step.learned).split(_ROWS), strict=True)
    sums = torch.zeros(2, dtype=torch.float64)
    for trained, frozen in ((one.double(), other.double()) for one, other in pairs):
        sums += torch.stack([(frozen - trained).square().sum(), trained.square().sum()])
    change = (sums[0] / sums[1]).sqrt()
    return replace(step, facts={**step.facts, "output_change": round(float(change), 6)})


def recompute_head(
    before: ModelState,
    learned: ModelState,
    *,
    task: str,
    labels: Tensor,
    features: _Features,
    head: Head,
    covariance_rank: int,
    generator: torch.Generator,
) -> ModelState:
    """Return what has been learned, with all rows of the head settled from the statistics of the classes.

    The trained rows stay beside them, frozen as ever. How the features moved is learned from the task's images alone.
    The statistics of earlier classes stay as they were taken; the rows are made of them as all maps since carry them.
    Those of the task's own classes are taken in the new feature space.

    Args:
        before: what had been learned before the step, its statistics included.
        labels: (n,) of the task's training images, 0 … classes − 1 within the task, in the order of `features`.
        covariance_rank: principal directions kept of every class where the head reads its covariance.
    """
    if head.settle is None:
        return learned
    if before.statistics.keys() != before.head.keys():
        missing = ", ".join(name for name in before.head if name not in before.statistics)
        raise ValueError(
            f"{task}: no statistics of {missing}, whose steps were made with another adapter.head; "
            "bring them up to date with `sdlora run`"
        )
    new = features(learned)
    drift = dict(before.drift)
    if before.statistics and (learned.directions or before.directions):
        old = features(before)
        if not torch.equal(old, new):
            drift[task] = drift_map(old, new)
    rank = min(covariance_rank if head.covariance else 0, new.shape[1])
    statistics = {**before.statistics, task: class_statistics(new, labels, rank=rank)}
    taken = replace(learned, statistics=statistics, drift=drift)
    rows = head.settle(_starting_rows(before, learned), taken.statistics_now(), generator=generator)
    return replace(taken, settled=rows)


def _starting_rows(before: ModelState, learned: ModelState) -> dict[str, HeadRows]:
    """Return the rows that a head goes on from, each class at the step of its arrival: those in use, and new ones."""
    first = rows_by_arrival(learned.head, learned.step_classes, newest=False) if learned.step_classes else {}
    return {**learned.head, **first, **before.settled}


def settled(
    before: ModelState,
    step: FrozenStep,
    *,
    task: str,
    labels: Tensor,
    features: _Features,
    head: Head,
    covariance_rank: int,
    generator: torch.Generator,
    drawn: torch.Generator,
    lost: float,
    left_out: _LeavingOut | None = None,
    temperature: Temperature = UNDIVIDED,
) -> FrozenStep:
    """Return the step with all rows of the head settled, as `recompute_head` does.

    What its drift does to the earlier classes is among the facts: `old_accuracy_before`, `old_accuracy_after` and
    `drift_residual` as `Retention` has them. Of accuracy, `drift_loss` is the share that is lost over all steps so far.
    A step that moved no feature says nothing of itself.

    Args:
        drawn: what the estimate is drawn from.
        lost: `drift_loss` of the step before.
        left_out: how images are left out, for one temperature, by which all rows are divided, and for the threshold
            above which an image is called unknown. Both are among the facts, with the calibration error of these images
            before and after. None for neither.
        temperature: that of the step before, which its rows are divided by.
    """
    if temperature.value != 1:
        before = replace(before, settled=tempered(before.settled, 1 / temperature.value))
    known: dict[int, Tensor] = {}

    def once(learned: ModelState) -> Tensor:
        if id(learned) not in known:
            known[id(learned)] = features(learned)
        return known[id(learned)]

    learned = recompute_head(
        before,
        step.learned,
        task=task,
        labels=labels,
        features=once,
        head=head,
        covariance_rank=covariance_rank,
        generator=generator,
    )
    if left_out is not None:
        settle = _settler(before, step.learned, head, generator)
        learned, found = _calibrated(
            learned, once(step.learned), labels, task, settle, left_out, head=head, before=temperature
        )
        step = replace(step, facts={**step.facts, **found})
    facts = _estimate(
        before, learned, step.learned, task=task, features=once, labels=labels, drawn=drawn, lost=lost
    )
    return replace(step, learned=learned, facts={**step.facts, **facts})


def _estimate(
    before: ModelState,
    learned: ModelState,
    frozen: ModelState,
    *,
    task: str,
    features: _Features,
    labels: Tensor,
    drawn: torch.Generator,
    lost: float,
) -> dict[str, float]:
    """Return what the step's drift does to the earlier classes."""
    if task not in learned.drift:
        return {"drift_loss": lost} if lost else {}
    found = estimated_retention(
        before,
        learned,
        task=task,
        old=features(before),
        new=features(frozen),
        labels=labels,
        generator=drawn,
    )
    estimate = {
        "old_accuracy_before": found.before,
        "old_accuracy_after": found.after,
        "drift_residual": found.residual,
        "drift_loss": 1 - (1 - lost) * found.kept,
    }
    return {name: round(value, 4) for name, value in estimate.items()}


def _settler(
    before: ModelState, learned: ModelState, head: Head, generator: torch.Generator
) -> Callable[[Mapping[str, ClassStatistics]], Mapping[str, HeadRows]]:
    """Return what makes rows of statistics as they are made of those of all images."""
    assert head.settle is not None
    return partial(head.settle, _starting_rows(before, learned), generator=generator)


def _calibrated(
    learned: ModelState,
    features: Tensor,
    labels: Tensor,
    task: str,
    settle: Callable[[Mapping[str, ClassStatistics]], Mapping[str, HeadRows]],
    left_out: _LeavingOut,
    *,
    head: Head,
    before: Temperature,
) -> tuple[ModelState, dict[str, float | int | str]]:
    """Return what has been learned with its rows divided by one temperature and a threshold for unknown images, and
    what is known of both.

    Where no image can be left out, what the step before knows goes on. One class has neither.
    """
    now = carried(learned.statistics, learned.drift, tasks=list(learned.statistics))
    form = _form_of(head, left_out.score)
    found = left_out_logits(
        features,
        labels,
        task=task,
        statistics=now,
        step_classes=learned.step_classes,
        settle=settle,
        form=form,
        generator=left_out.images,
    )
    if found.logits.shape[1] < 2:
        return learned, {}
    facts: dict[str, float | int | str] = {}
    temperature = 1.0
    if left_out.tempered:
        temperature, facts = _temperature(found, before)
        learned = replace(learned, settled=tempered(learned.settled, temperature))
    if left_out.score is None:
        return learned, facts
    known = learned.statistics_now()
    own = form(known)
    alarms = alarm_threshold(
        left_out.score,
        left_out.rate,
        found,
        rows=learned.settled,
        form=own and own.divided(temperature),
        statistics=known,
        temperature=temperature,
        before=left_out.margin,
        generator=left_out.made,
    )
    if alarms is None:
        return learned, facts
    rejection, margin = alarms
    facts |= {
        "unknown": rejection.score,
        "unknown_threshold": rejection.threshold,
        "unknown_margin": margin.value,
        "unknown_images": margin.images,
    }
    return replace(learned, rejection=rejection), facts


def _form_of(head: Head, score: str | None) -> Callable[[Mapping[str, ClassStatistics]], Quadratic | None]:
    """Return what makes the form that a score is read with, under a head. Nothing where it reads none."""
    if score not in DISTANCES:
        return lambda _: None
    assert head.shared is not None
    return partial(distance_form, head.shared, relative=score == "relative")


def _temperature(found: LeftOut, before: Temperature) -> tuple[float, dict[str, float | int | str]]:
    """Return the temperature of a step, and what is known of it."""
    logits, truths, _ = found
    temperature = fitted_temperature(logits, truths, before=before) if len(logits) else before
    value = round(temperature.value, 4)
    facts: dict[str, float | int | str] = {
        "temperature": value,
        "temperature_information": round(temperature.information, 4),
    }
    if len(logits):
        facts["calibration_error_before"] = round(calibration_of(logits, truths), 4)
        facts["calibration_error_after"] = round(calibration_of(logits / value, truths), 4)
    return value, facts


def frozen_step(
    before: ModelState,
    result: FitResult,
    adapter: AdapterChoices,
    features: _TaskFeatures,
    seed: int,
    *,
    record: Mapping[str, Any],
) -> FrozenStep:
    """Return the step as the method freezes it, with the head that is chosen.

    Args:
        record: that of the step before.
    """
    step = freeze(before, result, method=METHODS[adapter.method], settings=settings_of(adapter))
    if step.changed:
        step = measured(step, features=features)
    head = HEADS[adapter.head]
    if head.settle is None:
        return _with_newest_rows(step)
    return settled(
        before,
        step,
        task=result.task,
        labels=features.labels(),
        features=features,
        head=head,
        covariance_rank=adapter.covariance_rank,
        generator=generator_for(seed, "settle", result.task),
        drawn=generator_for(seed, "retention", result.task),
        lost=lost_by_drift(record),
        left_out=_leaving_out(adapter, seed, result.task, record),
        temperature=temperature_of(record),
    )


def _leaving_out(
    adapter: AdapterChoices, seed: int, task: str, record: Mapping[str, Any]
) -> _LeavingOut | None:
    """Return how images are left out, where something is chosen on them."""
    if adapter.temperature is None and adapter.unknown is None:
        return None
    return _LeavingOut(
        images=generator_for(seed, "temperature", task),
        tempered=adapter.temperature is not None,
        score=adapter.unknown,
        rate=adapter.unknown_rate,
        margin=margin_of(record, adapter.unknown) if adapter.unknown else Margin(),
        made=generator_for(seed, "unknown", task),
    )


def _with_newest_rows(step: FrozenStep) -> FrozenStep:
    """Return the step with the rows in use where some classes have several: for each the one that was trained last."""
    learned = step.learned
    if not learned.step_classes:
        return step
    rows = rows_by_arrival(learned.head, learned.step_classes, newest=True)
    return replace(step, learned=replace(learned, settled=rows))


def lost_by_drift(record: Mapping[str, Any]) -> float:
    """Return the share of the accuracy of earlier classes that drift has cost by a step, as the steps estimate it."""
    return float(record.get("freezing", {}).get("drift_loss", 0.0))


def remembered(learned: ModelState) -> dict[str, Any]:
    """Return what the step keeps of images, in numbers: statistics of classes and of layers' inputs, and no image."""
    numbers = {"memory": sum(tensor.numel() for tensor in learned.memory.values())}
    if learned.statistics:
        kept = next(iter(learned.statistics.values()))
        _, size, rank = kept.factors.shape
        numbers |= {"means": size, "principal_directions": rank, "per_class": 2 + size + size * rank}
    return numbers
