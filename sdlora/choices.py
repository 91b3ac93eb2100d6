"""The choices of a chain, each with its default: what `params.yaml` holds in its blocks `adapter` and `training`."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Protocol

from sdlora.adapters import TARGETS
from sdlora.formulations import FORMULATIONS
from sdlora.heads import HEADS
from sdlora.methods import METHODS, Method, Settings
from sdlora.records import Rule
from sdlora.training import Schedule
from sdlora.unknown import DISTANCES, SCORES


class AdapterChoices(Protocol):
    """What a task adds to the backbone, as `adapter` in `params.yaml` says it."""

    @property
    def method(self) -> str: ...
    @property
    def head(self) -> str: ...
    @property
    def formulation(self) -> str: ...
    @property
    def magnitude_start(self) -> float | None: ...
    @property
    def magnitudes(self) -> str | None: ...
    @property
    def initial_up(self) -> str | None: ...
    @property
    def rank(self) -> int: ...
    @property
    def rank_schedule(self) -> Mapping[str, int]: ...
    @property
    def tolerance(self) -> float: ...
    @property
    def compress(self) -> float | None: ...
    @property
    def penalty(self) -> float | None: ...
    @property
    def covariance_rank(self) -> int: ...
    @property
    def temperature(self) -> str | None: ...
    @property
    def unknown(self) -> str | None: ...
    @property
    def unknown_rate(self) -> float: ...


def settings_of(adapter: AdapterChoices) -> Settings:
    """Return the settings of a method, the formulation with the user's own choices in it."""
    chosen = {
        "magnitude_start": adapter.magnitude_start,
        "carried": None if adapter.magnitudes is None else adapter.magnitudes != "restarted",
        "trains_earlier": False if adapter.magnitudes == "fixed" else None,
        "initial_up": adapter.initial_up,
    }
    own: dict[str, Any] = {name: value for name, value in chosen.items() if value is not None}
    return Settings(
        formulation=replace(FORMULATIONS[adapter.formulation], **own),
        rank=adapter.rank,
        rank_schedule=adapter.rank_schedule,
        tolerance=adapter.tolerance,
        compress=adapter.compress,
        penalty=adapter.penalty,
    )


def adapted_targets(chosen: str | Sequence[str] | None, method: Method) -> tuple[str, ...]:
    """Return which of `TARGETS` are adapted: all for `all`, the method's own for None."""
    return TARGETS if chosen == "all" else tuple(chosen or method.targets)


def _one_of(known: Collection[str], *, or_none: bool = False) -> Rule:
    words = ", ".join(map(repr, known)) + (" or None" if or_none else "")
    return Rule(lambda value: value in known or (or_none and value is None), f"one of {words}")


def _number(least: float, most: float = float("inf"), *, above: bool = False, or_none: bool = False) -> Rule:
    def holds(value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return or_none and value is None
        return (value > least if above else value >= least) and value <= most and value != float("inf")

    words = f"a number {'above' if above else 'from'} {least:g}" + (
        "" if most == float("inf") else f" to {most:g}"
    )
    return Rule(holds, words + (" or None" if or_none else ""))


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 1


_COUNT = Rule(_is_count, "a whole number of at least 1")
_SWITCH = Rule(lambda value: type(value) is bool, "True or False")
_ADAPTER: Mapping[str, Rule] = {
    "method": _one_of([name for name, method in METHODS.items() if not method.joint]),
    "head": _one_of(HEADS),
    "formulation": _one_of(FORMULATIONS),
    "targets": Rule(
        lambda value: (
            value in ("all", None) or (isinstance(value, tuple) and value and {*value} <= {*TARGETS})
        ),
        f"'all', a tuple of some of {', '.join(TARGETS)}, or None",
    ),
    "rank": _COUNT,
    "rank_schedule": Rule(
        lambda value: (
            isinstance(value, Mapping)
            and all(type(rank) is int and rank >= 0 for rank in value.values())
            and value.get("t01") != 0
        ),
        "ranks by task, that of t01 at least 1",
    ),
    "magnitude_start": _number(0, above=True, or_none=True),
    "magnitudes": _one_of(("carried", "restarted", "fixed"), or_none=True),
    "initial_up": _one_of(("zero", "uniform"), or_none=True),
    "tolerance": _number(0, 1),
    "compress": _number(0, 1, above=True, or_none=True),
    "penalty": _number(0, or_none=True),
    "covariance_rank": _COUNT,
    "temperature": _one_of(("auto",), or_none=True),
    "unknown": _one_of(SCORES, or_none=True),
    "unknown_rate": Rule(
        lambda value: isinstance(value, float) and 0 < value < 1, "a number between 0 and 1, not these"
    ),
}
"""What the choices of the block `adapter` must hold, in the order of `params.yaml`."""
_TRAINING: Mapping[str, Rule] = {
    "optimizer": _one_of(("sgd", "adam")),
    "learning_rate": _number(0, above=True),
    "head_rate": _number(0, above=True, or_none=True),
    "magnitude_rate": _number(0, or_none=True),
    "head_start": _one_of(("random", "small", "discriminant")),
    "feature_distillation": _number(0),
    "momentum": Rule(
        lambda value: isinstance(value, float | int) and 0 <= value < 1, "a number from 0 to below 1"
    ),
    "schedule": _one_of(("constant", "cosine")),
    "epochs": _COUNT,
    "batch_size": _COUNT,
    "crop_scale": _number(0, 1, above=True),
    "flip": _SWITCH,
    "precision": _one_of(("fp32", "tf32", "bf16")),
    "compile": _SWITCH,
    "deterministic": _SWITCH,
}
"""The same of the block `training`."""
_SEED = Rule(lambda value: type(value) is int and 0 <= value < 2**32, "a whole number from 0 to 2^32 - 1")
_SDLORA = ("sdlora", "sdlora-rr", "sdlora-kd")
CHOICE_READERS = {
    "magnitude_start": _SDLORA,
    "magnitudes": _SDLORA,
    "initial_up": _SDLORA,
    "compress": _SDLORA,
    "penalty": ("olora", "nlora", "clora"),
}
"""Choices that are None by default, and the methods that read them."""
SHARED_CHOICES = ("method", "head", "formulation", "targets")
"""What all steps of a chain share."""


@dataclass(frozen=True, kw_only=True)
class Choices:
    """How tasks are learned. Every field means what the key of its name in `params.yaml` does."""

    method: str = "sdlora"
    """A name of `METHODS` but `joint`, which learns the images of all tasks at once."""
    head: str = "rgda"
    """The classifier, a name of `HEADS`: `rgda`, `aligned`, `lda`, `ncm` or `linear`."""
    formulation: str = "continuous"
    """How directions are scaled and their magnitudes start: `continuous`, `reference` or `paper`."""
    targets: str | tuple[str, ...] | None = "all"
    """Which projections of every block are adapted: all, or some of them. None for the method's own."""
    rank: int = 10
    """Rank of each task's directions."""
    rank_schedule: Mapping[str, int] = field(
        default_factory=lambda: MappingProxyType({"t01": 10, "t04": 8, "t08": 6})
    )
    """Of `sdlora-rr` only: task and the rank from that task on. 0 is no new direction."""
    magnitude_start: float | None = None
    """First value of a new magnitude. None for the formulation's own."""
    magnitudes: str | None = None
    """`carried` from step to step, `restarted`, or `fixed`: carried and not trained. None for the formulation's own."""
    initial_up: str | None = None
    """How B of a new direction starts, `zero` or `uniform`. None for the formulation's own."""
    tolerance: float = 0.5
    """Of `sdlora-kd` only: a direction of which less than this share is new is absorbed."""
    compress: float | None = None
    """Share of a direction's energy that is kept when it is frozen. None keeps the rank."""
    penalty: float | None = None
    """Weight of what `olora`, `nlora` and `clora` add to the loss. None for the method's own."""
    covariance_rank: int = 16
    """Principal directions of every class that `aligned`, `rgda` and `lda` remember."""
    temperature: str | None = "auto"
    """`auto`: one number divides all logits of a step, so that confidences are right more often. `linear` has none."""
    unknown: str | None = "relative"
    """The score by which an image is of none of the classes: `relative`, `mahalanobis`, `energy`, `max_logit`. None for
    none, as with `linear`. `aligned` has no distances, and `max_logit` in place of `relative`."""
    unknown_rate: float = 0.05
    """Share of the images of known classes that may be called unknown."""
    optimizer: str = "adam"
    """`adam` or `sgd`."""
    learning_rate: float = 0.002
    """Of the factors, and of all that has no rate of its own."""
    head_rate: float | None = 0.01
    """Of the new rows of the head. None for `learning_rate`."""
    magnitude_rate: float | None = None
    """Of the magnitudes, which stay at 0. None for `learning_rate`."""
    head_start: str = "small"
    """How the new rows start: `random`, `small` or `discriminant`."""
    feature_distillation: float = 2.0
    """Weight that keeps the features of a task's images near those before the step."""
    momentum: float = 0.9
    """Of `sgd` only."""
    schedule: str = "cosine"
    """Course of the rates within a task: `cosine` or `constant`."""
    epochs: int = 8
    """Passes over a task's images."""
    batch_size: int = 64
    """Images in one step of the optimiser."""
    crop_scale: float = 0.5
    """Smallest share of the area that a random crop keeps. 1.0 is no crop."""
    flip: bool = False
    """Random horizontal flips."""
    precision: str = "fp32"
    """Of the forward pass: `fp32`, `tf32` or `bf16`."""
    compile: bool = False
    """Whether torch makes kernels for this model first, which takes a minute."""
    deterministic: bool = True
    """The same bytes from the same machine every time."""
    seed: int = 1993
    """Of initial values, the order of images, and crops."""

    def __post_init__(self) -> None:
        """Refuse what has no meaning.

        Raises:
            ValueError: one line names the choice, what was found and what is known.
        """
        if isinstance(self.targets, list):
            object.__setattr__(self, "targets", tuple(self.targets))
        if self.head == "linear":
            object.__setattr__(self, "temperature", None)
            object.__setattr__(self, "unknown", None)
        if self.head == "aligned" and self.unknown == "relative":
            object.__setattr__(self, "unknown", "max_logit")
        for name, rule in {**_ADAPTER, **_TRAINING, "seed": _SEED}.items():
            value = getattr(self, name)
            if not rule.holds(value):
                raise ValueError(f"{name} is {value!r}, expected {rule.words}")
        if fault := next((text for text, wrong in self._exclusions().items() if wrong), None):
            raise ValueError(fault)

    def _exclusions(self) -> dict[str, bool]:
        """Return what may not go together, in words, and whether it does."""
        unread = {
            f"{name} is {getattr(self, name)!r}, but {self.method} does not read it; leave it out": True
            for name, methods in CHOICE_READERS.items()
            if getattr(self, name) is not None and self.method not in methods
        }
        rowless = not METHODS[self.method].trains_head
        return {
            **unread,
            f"head is {self.head!r}, but {self.method} trains no rows; choose 'rgda', 'lda' or 'ncm'": rowless
            and self.head in ("linear", "aligned"),
            "magnitudes are restarted, which throws away what sdlora-kd keeps in them; choose 'carried'": (
                self.method == "sdlora-kd" and not settings_of(self).formulation.carried
            ),
            f"unknown is {self.unknown!r}, but logits of head {self.head!r} are no distances; choose 'max_logit'": (
                self.unknown in DISTANCES and HEADS[self.head].shared is None
            ),
            "rank_schedule has no rank for the first tasks; add t01": (
                self.method == "sdlora-rr" and "t01" not in self.rank_schedule
            ),
        }

    @property
    def fit_schedule(self) -> Schedule:
        """What a fit reads of these."""
        own = {name: getattr(self, name) for name in _TRAINING if name not in ("schedule", "deterministic")}
        return Schedule(decay=self.schedule, **own)

    @property
    def parameters(self) -> dict[str, Any]:
        """The same as blocks of `params.yaml`, and as a step's record has them."""
        adapter = {name: getattr(self, name) for name in _ADAPTER}
        targets = list(self.targets) if isinstance(self.targets, tuple) else self.targets
        adapter |= {"targets": targets, "rank_schedule": dict(self.rank_schedule)}
        if self.temperature is None:
            del adapter["temperature"]
        if self.unknown is None:
            del adapter["unknown"], adapter["unknown_rate"]
        training = {name: getattr(self, name) for name in _TRAINING}
        chosen = {name: value for name, value in training.items() if value is not None}
        return {"adapter": adapter, "training": {**chosen, "devices": 1}, "seed": self.seed}


def recorded_choices(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the choices that a step's record says, as arguments of `Choices`. What it does not say is not chosen."""
    adapter, training = parameters["adapter"], parameters["training"]
    adapter = {"temperature": None, "unknown": None, **adapter}
    unsaid = {"head_rate": None, "magnitude_rate": None, "head_start": "random", "feature_distillation": 0.0}
    found = {
        **{name: adapter[name] for name in _ADAPTER if name in adapter},
        **{name: training.get(name, unsaid.get(name)) for name in _TRAINING},
        "seed": parameters["seed"],
    }
    targets = adapter.get("targets")
    return found | {"targets": tuple(targets) if isinstance(targets, list) else targets}
