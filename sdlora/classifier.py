"""The model of a step: an adapted backbone with a growing head, and the plain tensors it is made of."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sdlora.adapters import Directions, Factors, inject_adapters, merge_adapters, target_of
from sdlora.arrivals import StepClasses, statistics_by_arrival
from sdlora.drift import DriftMap, carried
from sdlora.head import GrowingHead, HeadBlock, HeadRows
from sdlora.statistics import ClassStatistics
from sdlora.unknown import Rejection, UnknownScore


@dataclass(frozen=True, kw_only=True)
class ModelState:
    """What the steps so far have learned, as plain tensors: all that a model folder holds besides its record.

    The adapted weight of a target is `W₀ + Σ_task magnitudes[task][target] · up · down`.
    """

    directions: Mapping[str, Mapping[str, Factors]] = field(default_factory=dict)
    """Task id → target name → factors; frozen."""
    magnitudes: Mapping[str, Tensor] = field(default_factory=dict)
    """Task id → (targets,), in the order of the target names."""
    head: Mapping[str, HeadBlock] = field(default_factory=dict)
    """Task id → the rows of the classes that it saw, as they were trained; frozen."""
    settled: Mapping[str, HeadRows] = field(default_factory=dict)
    """Task id → the rows of the classes that arrived with it which are used in their place, anew at every step; empty
    where the trained ones are."""
    statistics: Mapping[str, ClassStatistics] = field(default_factory=dict)
    """Task id → what was taken of the classes that it saw, of its own images and at its own step; empty where the head
    needs none."""
    drift: Mapping[str, DriftMap] = field(default_factory=dict)
    """Step → how it moved the features; those that moved none have none."""
    memory: Mapping[str, Tensor] = field(default_factory=dict)
    """What the method keeps for its next step; empty for most."""
    rejection: Rejection | None = None
    """What is called unknown; None where nothing is."""
    step_classes: StepClasses = field(default_factory=dict)
    """Which classes the steps saw that may have seen known ones; empty in a chain without such a step."""

    @property
    def rows(self) -> Mapping[str, HeadRows]:
        """Task id → the rows that classify."""
        return self.settled or self.head

    def statistics_now(self) -> dict[str, ClassStatistics]:
        """Return the statistics of each class so far, of all its images, in the features of the last step."""
        now = carried(self.statistics, self.drift, tasks=list(self.statistics))
        return statistics_by_arrival(now, self.step_classes)

    @property
    def targets(self) -> tuple[str, ...]:
        """Which projections of a block the directions are of (`q`, `v`, …)."""
        names = next(iter(self.directions.values()), {})
        return tuple(dict.fromkeys(target_of(name) for name in names))


class IncrementalClassifier(nn.Module):
    """A frozen timm vision transformer (`num_classes=0`), directions at its targets, and a growing head."""

    def __init__(
        self, backbone: nn.Module, learned: ModelState, *, targets: Sequence[str] = ("q", "v")
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.feature_size: int = backbone.num_features  # type: ignore[assignment]
        self._targets = inject_adapters(backbone, targets)
        self.head = GrowingHead()
        for task, block in learned.rows.items():
            if block.weight.shape[1] != self.feature_size:
                raise ValueError(
                    f"the rows of {task} are of {block.weight.shape[1]} features, this backbone has "
                    f"{self.feature_size}: they were made on another one"
                )
            if len(block.bias):  # a step may have brought no class
                self.head.grow(block)
        self.unknown = UnknownScore(learned.rejection) if learned.rejection else None
        self.requires_grad_(False)

    @property
    def targets(self) -> Mapping[str, Directions]:
        """The directions by target name, in the order of the blocks."""
        return self._targets

    def hold(self, learned: ModelState) -> None:
        """Hold the directions that were learned, with their magnitudes, and train none."""
        if learned.directions:
            magnitudes = torch.stack([learned.magnitudes[task] for task in learned.directions])
            self.set_directions(learned.directions, magnitudes, trained=False)

    def set_directions(
        self,
        frozen: Mapping[str, Mapping[str, Factors]],
        magnitudes: Tensor,
        *,
        trained: bool,
        trains_earlier: bool = True,
    ) -> None:
        """Hold the directions of earlier tasks at every target.

        Args:
            frozen: task id → target name → factors.
            magnitudes: (tasks, targets), or (tasks, 1) for one parameter that all targets share; a last row
                beyond the tasks of `frozen` belongs to the direction that `train_direction` adds.
            trained: whether the magnitudes are.
            trains_earlier: whether those of `frozen` are, too.
        """
        self._require_fitting(frozen)
        like = next(self.backbone.parameters())
        magnitudes = magnitudes.to(like)
        columns = [nn.Parameter(column.clone(), requires_grad=trained) for column in magnitudes.unbind(1)]
        for index, (name, directions) in enumerate(self._targets.items()):
            held = [Factors(*(part.to(like) for part in factors[name])) for factors in frozen.values()]
            own = columns[index if len(columns) > 1 else 0]
            directions.set_frozen(held, own, trains_earlier=trains_earlier)

    def _require_fitting(self, frozen: Mapping[str, Mapping[str, Factors]]) -> None:
        """Refuse directions of another backbone: other targets, another order of them, or other sizes."""
        for task, direction in frozen.items():
            if list(direction) != list(self._targets):
                raise ValueError(
                    f"the direction of {task} is of {len(direction)} targets ({_some(direction)}), this backbone has "
                    f"{len(self._targets)} ({_some(self._targets)}): it was made on another one"
                )
            for name, at in self._targets.items():
                found = direction[name].up.shape[0], direction[name].down.shape[1]
                if found != (at.rows, at.columns):
                    raise ValueError(
                        f"the direction of {task} at {name} is {found[0]}×{found[1]}, this backbone has "
                        f"{at.rows}×{at.columns} there: it was made on another one"
                    )

    def train_direction(
        self,
        factors: Mapping[str, Factors],
        *,
        norm: Callable[[Factors], Tensor] | None = None,
        train_down: bool = True,
    ) -> None:
        """Train `factors` (target name → factors) as the newest direction of every target.

        Args:
            norm: what divides the direction in every forward pass, if anything.
            train_down: whether A is trained beside B.
        """
        like = next(self.backbone.parameters())
        for name, directions in self._targets.items():
            current = Factors(*(part.to(like) for part in factors[name]))
            directions.set_current(current, norm=norm, train_down=train_down)

    def merge(self) -> None:
        """Put the sum of all directions into the weights. Nothing of the directions is left, not even their memory."""
        merge_adapters(self.backbone)
        self._targets = {}

    def features(self, images: Tensor) -> Tensor:
        """Features (batch, d) of normalised images (batch, channels, height, width)."""
        return self.backbone(images)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (batch, all classes so far): every class seen is a candidate, no task id is used.

        The head computes in the type of its rows under autocast too: bfloat16 would round logits of a head from
        statistics by whole units.
        """
        features = self.features(images)
        with torch.autocast(features.device.type, enabled=False):
            return self.head(features.to(self.head.weights[0].dtype))

    def scored(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits as `forward` gives them, and the score (batch,) above whose threshold an image is unknown."""
        assert self.unknown is not None
        features = self.features(images)
        with torch.autocast(features.device.type, enabled=False):
            exact = features.to(self.head.weights[0].dtype)
            logits = self.head(exact)
            return logits, self.unknown(exact, logits)


def _some(names: Iterable[str]) -> str:
    return ", ".join(list(names)[:2]) + ", …"


def adapted_classifier(backbone: nn.Module, learned: ModelState) -> IncrementalClassifier:
    """Return the step's model with its directions still apart from the weights, nothing trainable.

    Changes `backbone`.
    """
    model = IncrementalClassifier(backbone, learned, targets=learned.targets)
    model.hold(learned)
    return model.eval()


def merged_classifier(backbone: nn.Module, learned: ModelState) -> IncrementalClassifier:
    """Return the step's model for inference: `backbone` with merged weights under its whole head, nothing trainable.

    It costs what the plain timm model costs. `backbone` is changed in place.
    """
    model = adapted_classifier(backbone, learned)
    model.merge()
    return model
