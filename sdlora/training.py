"""One step's fit: the ordinary loop, the same for the first task and for every later one, resumable at any step."""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sdlora.adapters import Factors
from sdlora.augmentation import DRAWS, crop_and_flip
from sdlora.backbones import spell_out_attention
from sdlora.classifier import IncrementalClassifier, ModelState, merged_classifier
from sdlora.fit_folder import EpochRecord
from sdlora.head import HeadBlock, initial_block
from sdlora.heads import discriminant
from sdlora.image_store import ImageStore
from sdlora.methods import FitResult, Method, Settings
from sdlora.preprocessing import normalise
from sdlora.process_group import SINGLE, ProcessGroup
from sdlora.products import by_onednn
from sdlora.seeding import generator_for
from sdlora.statistics import class_statistics

_SMALL = 0.01
"""Deviation of rows that start small: their logits are near 0, so they pull at no feature before they have learned."""
_CALM, _PRINCIPAL = 8, 16
"""Of rows that start as a discriminant: what its logits are divided by, and the principal directions of a class."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How a step is trained. Every field changes the result."""

    optimizer: str
    """`sgd` or `adam`; no weight decay, which would move what must stay."""
    learning_rate: float
    """The rate of factors, and of magnitudes and head where they have none of their own."""
    momentum: float
    """Of SGD; Adam has its own."""
    decay: str
    """`constant`, or `cosine` from the rate to zero over the step."""
    epochs: int
    """Passes over the task's images."""
    batch_size: int
    """Images per optimiser step; the last batch of an epoch may be smaller."""
    crop_scale: float
    """Smallest share of the area that a random resized crop keeps; 1.0 for no crop."""
    flip: bool
    """Random horizontal flip."""
    precision: str
    """`fp32`; `tf32`, which is fp32 here (`set_deterministic` says how it rounds); or `bf16` for autocast."""
    compile: bool
    """Whether full batches go through kernels that torch.compile makes for this model and batch."""
    head_rate: float | None = None
    """The rate of the head's rows."""
    magnitude_rate: float | None = None
    """The rate of the magnitudes."""
    head_start: str = "random"
    """How the new rows start: `random`, `small` (see `initial_block`), or `discriminant` of the task's own features."""
    feature_distillation: float = 0.0
    """Weight in the loss of the mean of ‖f − g‖² / ‖g‖², of an image's features f as they are and g before the step.

    The first step has no earlier class that moves, so it has no such term."""


class TaskImages(NamedTuple):
    """A task's training images: uint8 (n, channels, height, width), and labels (n,) 0 … classes − 1, all present."""

    images: Tensor
    labels: Tensor


class Snapshot(NamedTuple):
    """The whole state of a fit between two optimiser steps: tensors, and the curve so far."""

    step: int
    tensors: dict[str, Tensor]
    curve: list[EpochRecord]


def _in_memory(size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    return torch.empty(size, dtype=dtype)


def _adapted(
    backbone: nn.Module, before: ModelState, method: Method, targets: Sequence[str] | None
) -> IncrementalClassifier:
    """Return the model that a method trains, in evaluation mode.

    There is no dropout or drop path anywhere in the frozen backbone: a fit in evaluation mode is what timm's default
    (all rates 0) trains, and it stays so for a backbone whose configuration sets them.
    """
    earlier = ModelState() if method.joint else before
    return IncrementalClassifier(
        backbone, earlier, targets=method.targets if targets is None else targets
    ).eval()


class Fit:
    """A step's fit in progress: a model, its images and its optimiser, advanced one optimiser step at a time.

    Everything random is drawn from (seed, task, epoch or step), so `restore(snapshot())` at any step goes on
    exactly as if nothing had happened: the same bytes on the same machine, when torch is deterministic.
    """

    def __init__(
        self,
        backbone: nn.Module,
        before: ModelState,
        *,
        tasks: Mapping[str, TaskImages],
        mean: Sequence[float],
        std: Sequence[float],
        method: Method,
        settings: Settings,
        schedule: Schedule,
        seed: int,
        device: torch.device,
        targets: Sequence[str] | None = None,
        group: ProcessGroup = SINGLE,
        image_room: int | None = None,
        empty: Callable[[tuple[int, int], torch.dtype], Tensor] = _in_memory,
        looked: Callable[[int], None] = lambda images: None,
    ) -> None:
        """Prepare to learn a task.

        Args:
            before: what the steps before have learned; not changed.
            tasks: task id → its images: the one task to learn; for a joint method all tasks so far, in order.
            targets: what is adapted in every block; None for the method's own.
            group: the processes that do this together, each with a fit of the same arguments on a device of its own.
            image_room: bytes that the images may take on the device; more stay in main memory (`ImageStore`).
            empty: returns an unfilled tensor on the CPU, for the features of all images where that is the device.
            looked: is told of each pass over all images, which some methods begin or end with, how many are done.

        Raises:
            ValueError: no image, or a setting that does not fit the model.
        """
        _require_images(tasks, method)
        self.task, self.schedule, self.seed = list(tasks)[-1], schedule, seed
        self._mean, self._std, self._device = mean, std, device
        self._before, self._method, self._settings, self._group = before, method, settings, group
        self._empty, self._looked = empty, looked
        self._images = ImageStore([images for images, _ in tasks.values()], device, room=image_room)
        if device.type == "cpu" and schedule.precision == "bf16":
            spell_out_attention(backbone)
        self._labels, self._grown = _labels_of(tasks).to(device), list(tasks)
        self._teacher = self._model_before(backbone)
        self.model = model = _adapted(backbone, before, method, targets).to(device)
        self._dtype = next(model.backbone.parameters()).dtype
        self._begin(tasks)
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._kept = self._snapshot_parameters()
        self._optimizer = _make_optimizer(self._trained, schedule) if self._trained else None
        self._steps_per_epoch = math.ceil(len(self._images) / schedule.batch_size)
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)
        self.step, self._order = 0, torch.empty(0, dtype=torch.long)
        self._whole_share = len(group.share(torch.arange(min(schedule.batch_size, len(self._images)))))
        self.micro_batch = schedule.batch_size
        """Images that go through the model at once; fewer than `schedule.batch_size` once memory has run out."""
        self._compiled = torch.compile(model.features, dynamic=False) if schedule.compile else None
        self._constant = self._constant_features()
        self._goals = self._features_before()
        self._start_rows(tasks)
        self.curve: list[EpochRecord] = []

    def _model_before(self, backbone: nn.Module) -> IncrementalClassifier | None:
        """Return the model of the steps before, where the features are to stay near its own."""
        kept = self._before.head and self._method.targets and not self._method.joint and not self.lone
        if not self.schedule.feature_distillation or not kept:
            return None
        return merged_classifier(copy.deepcopy(backbone), self._before).to(self._device)

    def _features_before(self) -> Tensor | None:
        """Return the features (n, d) of all images before the step. Those of augmented images are others every time."""
        if self._teacher is None or self._augments:
            return None
        teacher, self._teacher = self._teacher, None
        return self._all_features(teacher)

    def _begin(self, tasks: Mapping[str, TaskImages]) -> None:
        """Have the method prepare the model, and give the head the rows of the tasks."""
        if self.lone:
            self.model.hold(self._before)
        else:
            self._method.begin(
                self.model,
                self._before,
                task=self.task,
                settings=self._settings,
                batches=self._batches,
                generator=generator_for(self.seed, "directions", self.task),
            )
        for name, (_, own) in tasks.items():
            generator = generator_for(self.seed, "head", name)
            block = initial_block(
                int(own.max()) + 1,
                self.model.feature_size,
                generator=generator,
                deviation=_SMALL if self.schedule.head_start == "small" else None,
            )
            self.model.head.grow(HeadBlock(*(part.to(self._dtype) for part in block)))
        if self._method.trains_head and not self.lone:
            self.model.head.train_newest(len(tasks))
        self.model.to(self._device)

    def _snapshot_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters that a snapshot holds.

        The new direction's factors are among them even where one is not trained: another machine might not design it
        again to the bit.
        """
        current = {id(part) for target in self.model.targets.values() for part in (target.up, target.down)}
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad or id(p) in current}

    @property
    def device(self) -> torch.device:
        """Where it is trained. One of several in a group."""
        return self._device

    @property
    def lone(self) -> bool:
        """Whether there is one class only: a softmax over one logit has no gradient, so nothing is trained."""
        return not self._labels.any()

    @property
    def _augments(self) -> bool:
        """Whether the model sees another image than the one that is stored."""
        return self.schedule.crop_scale < 1.0 or self.schedule.flip

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole fit. None where nothing is trained."""
        return self.schedule.epochs * self._steps_per_epoch if self._trained else 0

    @property
    def images(self) -> int:
        """How many images the task has."""
        return len(self._images)

    @property
    def images_seen(self) -> int:
        """How many images the steps so far have used, repetitions counted."""
        epochs, within = divmod(self.step, self._steps_per_epoch)
        return epochs * self.images + min(within * self.schedule.batch_size, self.images)

    @property
    def trained_parameters(self) -> int:
        """How many numbers this step trains."""
        return sum(parameter.numel() for parameter in self._trained.values())

    def run(self) -> Iterator[int]:
        """Train on to the end, yielding the number of images seen at this call after every optimiser step.

        Raises:
            FloatingPointError: the loss of an epoch is not finite.
        """
        seen = 0
        while self.step < self.total_steps:
            seen += self._advance()
            yield seen

    def _advance(self) -> int:
        epoch, within = divmod(self.step, self._steps_per_epoch)
        if within == 0 or not len(self._order):
            generator = generator_for(self.seed, "order", self.task, epoch)
            self._order = torch.randperm(len(self._images), generator=generator)
        size = self.schedule.batch_size
        batch = self._order[within * size : (within + 1) * size]
        assert self._optimizer is not None
        for group in self._optimizer.param_groups:
            group["lr"] = self._decayed(group["start"])
        own = self._group.share(torch.arange(len(batch)))
        chosen = batch[own]
        there = chosen.to(self._device)
        inputs = self._augmented(chosen, own) if self._constant is None else self._constant[there]
        facts = self._backward(inputs, there, of=len(batch))
        self._add_up(facts)
        self._optimizer.step()
        self._sums += facts
        rate = self._decayed(self.schedule.learning_rate)
        self.step += 1
        if within + 1 == self._steps_per_epoch:
            self._close_epoch(epoch, rate)
        return len(batch)

    def _backward(self, inputs: Tensor, chosen: Tensor, *, of: int) -> Tensor:
        """Leave this share's part in the gradients of the mean loss of `of` images: inputs, and their indices.

        Returns (2,), in double: the share's part in the sum of their losses, and how many are right.

        Where memory runs out the batch is begun again in micro-batches of half the size, and stays so for the rest of
        the fit. Nothing but the gradients has been touched by then, so no step is lost and none is done twice.
        """
        while True:
            try:
                return self._accumulate(inputs, chosen, of=of)
            except torch.OutOfMemoryError:
                if self.micro_batch == 1:
                    raise
            # Out here nothing refers to what the failed pass has allocated.
            self.micro_batch = (min(self.micro_batch, len(chosen)) + 1) // 2
            if self._device.type == "cuda":
                torch.cuda.empty_cache()

    def _accumulate(self, inputs: Tensor, chosen: Tensor, *, of: int) -> Tensor:
        """Do as `_backward` does, in parts of at most `micro_batch` images, each weighted by how many it has.

        No image's logits depend on the images beside it (no layer here has statistics of a batch), so the gradients
        are those of the whole batch within rounding; in one part they are those to the bit.
        """
        assert self._optimizer is not None
        self._optimizer.zero_grad(set_to_none=True)
        if not len(chosen):
            return torch.zeros(2, dtype=torch.float64, device=self._device)
        losses: list[Tensor] = []
        rights: list[Tensor] = []
        for part, at in zip(inputs.split(self.micro_batch), chosen.split(self.micro_batch), strict=True):
            own = self._labels[at]
            features = self._features(part) if self._constant is None else part
            logits = self.model.head.newest(features, blocks=len(self._grown))
            loss = nn.functional.cross_entropy(logits, own)
            goals = self._goals_of(part, at)
            if goals is not None:
                loss = loss + self.schedule.feature_distillation * _relative_change(features, goals)
            if len(own) < of:
                loss = loss * (len(own) / of)
            # Of the parameters alone, so once; the first share is never empty.
            if self._method.penalty is not None and not losses and self._group.rank == 0:
                loss = loss + self._method.penalty(self.model, settings=self._settings)
            loss.backward()
            losses.append(loss.detach().double())
            rights.append((logits.argmax(dim=1) == own).sum().double())
        return torch.stack([torch.stack(losses).sum() * of, torch.stack(rights).sum()])

    def _add_up(self, facts: Tensor) -> None:
        """Put the sums over the group in place of this share's gradients and facts: those of the whole batch."""
        if self._group.size == 1:
            return
        for parameter in self._trained.values():
            if parameter.grad is None:  # the share was empty
                parameter.grad = torch.zeros_like(parameter)
        self._group.add([p.grad for p in self._trained.values() if p.grad is not None])
        self._group.add([facts])

    def _augmented(self, chosen: Tensor, places: Tensor) -> Tensor:
        """Return the images at these indices, normalised, and augmented for the current step by their places in its
        batch.
        """
        generator = generator_for(self.seed, "augmentation", self.task, self.step)
        draws = torch.rand(self.schedule.batch_size, DRAWS, generator=generator)
        return crop_and_flip(
            normalise(self._images[chosen], mean=self._mean, std=self._std).to(self._dtype),
            crop_scale=self.schedule.crop_scale,
            flip=self.schedule.flip,
            draws=draws[places],
        )

    @torch.no_grad()
    def _goals_of(self, batch: Tensor, chosen: Tensor) -> Tensor | None:
        """Return the features (batch, d) before the step of images as the model sees them, which have these indices."""
        if self._goals is not None:
            return self._goals[chosen]
        return None if self._teacher is None else self._features(batch, self._teacher)

    def _features(self, batch: Tensor, model: IncrementalClassifier | None = None) -> Tensor:
        """Features (batch, d) of images as the model takes them: the one in training, or another one."""
        bf16 = self.schedule.precision == "bf16"
        # What has another shape, the rest of an epoch, is not worth kernels of its own.
        whole = len(batch) == min(self.micro_batch, self._whole_share)
        compiled = self._compiled if whole and torch.is_grad_enabled() else None
        forward = compiled or (model or self.model).features
        products = nullcontext() if bf16 or compiled else by_onednn(self._device)
        with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=bf16), products:
            return forward(batch).to(self._dtype)

    def _batches(self) -> Iterator[Tensor]:
        """Yield all images once, in order, normalised and not augmented."""
        done = 0
        for part in self._images.split(self.schedule.batch_size):
            yield normalise(part, mean=self._mean, std=self._std).to(self._dtype)
            done += len(part)
            self._looked(done)

    def _constant_features(self) -> Tensor | None:
        """Return the features (n, d) of all images, once for all, where neither the images nor the backbone change."""
        adapted = any(parameter.requires_grad for parameter in self.model.backbone.parameters())
        if adapted or not self._trained or self._augments:
            return None
        return self._all_features()

    @torch.no_grad()
    def _all_features(self, model: IncrementalClassifier | None = None) -> Tensor:
        """Return the features (n, d) of all images, not augmented: under the model as it is now, or another one."""
        size = len(self._images), self.model.feature_size
        if self._device.type == "cpu":
            found = self._empty(size, self._dtype)
        else:
            found = torch.empty(size, dtype=self._dtype, device=self._device)
        for batch, place in zip(self._batches(), found.split(self.schedule.batch_size), strict=True):
            place.copy_(self._features(batch, model))
        return found

    @torch.no_grad()
    def _start_rows(self, tasks: Mapping[str, TaskImages]) -> None:
        """Put the discriminant of the task's features, as they are before the first step, in place of the drawn rows.

        Its logits are divided, so that the loss still has a gradient.
        """
        if self.schedule.head_start != "discriminant" or not self._trained or not self._method.trains_head:
            return
        found = (self._all_features() if self._constant is None else self._constant).cpu()
        parts = zip(found.split([len(labels) for _, labels in tasks.values()]), tasks.items(), strict=True)
        statistics = {
            name: class_statistics(features, labels.long(), rank=min(_PRINCIPAL, features.shape[1]))
            for features, (name, (_, labels)) in parts
        }
        weights, biases = (
            list(part)[-len(tasks) :] for part in (self.model.head.weights, self.model.head.biases)
        )
        drawn = dict(zip(tasks, map(HeadBlock, weights, biases), strict=True))
        generator = generator_for(self.seed, "head", self.task)
        for name, block in discriminant(drawn, statistics, generator=generator).items():
            for parameter, start in zip(drawn[name], block, strict=True):
                parameter.copy_(start / _CALM)

    def _decayed(self, rate: float) -> float:
        """Return what a rate has become at the present step."""
        if self.schedule.decay == "cosine":
            return rate * (1 + math.cos(math.pi * self.step / self.total_steps)) / 2
        return rate

    def _close_epoch(self, epoch: int, rate: float) -> None:
        loss, accuracy = (self._sums / len(self._images)).tolist()
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"{self.task}: the loss became {loss} in epoch {epoch + 1}; lower the learning rate ({rate:g})"
            )
        self.curve.append(EpochRecord(self.step, epoch + 1, loss, accuracy, rate))
        self._sums = torch.zeros_like(self._sums)

    def snapshot(self) -> Snapshot:
        """Return the whole state, on the CPU, copied."""
        tensors: dict[str, Tensor] = {f"parameter/{name}": p for name, p in self._kept.items()}
        for name, parameter in self._trained.items():
            assert self._optimizer is not None
            for key, value in self._optimizer.state.get(parameter, {}).items():
                if value is not None:
                    tensors[f"optimizer/{name}/{key}"] = torch.as_tensor(value)
        tensors["sums"] = self._sums
        return Snapshot(
            step=self.step,
            tensors={name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()},
            curve=list(self.curve),
        )

    @torch.no_grad()
    def restore(self, snapshot: Snapshot) -> None:
        """Go on from `snapshot`, taken by a fit of the same inputs.

        Raises:
            ValueError: the snapshot's parameters are not this fit's.
        """
        tensors = {name: tensor.to(self._device) for name, tensor in snapshot.tensors.items()}
        names = {name.removeprefix("parameter/") for name in tensors if name.startswith("parameter/")}
        if names != self._kept.keys():
            raise ValueError(f"{self.task}: the checkpoint holds {len(names)} other parameters than this fit")
        for name, parameter in self._kept.items():
            parameter.copy_(tensors[f"parameter/{name}"])
            prefix = f"optimizer/{name}/"
            state = {
                key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)
            }
            if state and self._optimizer is not None:
                self._optimizer.state[parameter] = state
        self._sums = tensors["sums"]
        self.step, self.curve = snapshot.step, list(snapshot.curve)
        self._order = torch.empty(0, dtype=torch.long)

    def result(self) -> FitResult:
        """Return what was learned, raw, on the CPU. Nothing of a direction that was not trained."""
        targets = {} if self.lone else self.model.targets
        factors = {
            name: Factors(up=_copy(target.up), down=_copy(target.down))
            for name, target in targets.items()
            if target.up is not None and target.down is not None
        }
        columns = [_copy(target.magnitudes) for target in targets.values() if target.magnitudes is not None]
        distinct = {id(target.magnitudes) for target in targets.values()}
        stacked = torch.stack(columns[: len(distinct)], dim=1) if columns else torch.zeros(0, 0)
        # One magnitude per direction that is held: the earlier ones, and the new one where there is one.
        held = [*self._before.directions, *([self.task] if factors else [])]
        tasks = held[-len(stacked) :] if len(stacked) else []
        head = self.model.head
        blocks = zip(head.weights[-len(self._grown) :], head.biases[-len(self._grown) :], strict=True)
        memory: Mapping[str, Tensor] = {}
        if self._method.remember is not None:
            memory = self._method.remember(
                self.model, self._before, settings=self._settings, batches=self._batches
            )
        return FitResult(
            task=self.task,
            factors=factors,
            magnitudes=dict(zip(tasks, stacked, strict=True)),
            head={self.task: self._lone_row()}
            if self.lone
            else {
                name: HeadBlock(_copy(weight), _copy(bias))
                for name, (weight, bias) in zip(self._grown, blocks, strict=True)
            },
            memory={name: _copy(tensor) for name, tensor in memory.items()},
        )

    @torch.no_grad()
    def _lone_row(self) -> HeadBlock:
        """Return the row of a class that no other was learned beside: its mean feature, as long as the earlier rows.

        A row that is left as it was drawn, or 0, hardly ever wins against trained ones (docs/explanation/method.md).
        """
        total = sum(self._features(batch).double().sum(0) for batch in self._batches())
        assert isinstance(total, Tensor)
        lengths = [block.weight.norm(dim=1) for block in self._before.head.values()]
        length = torch.cat(lengths).mean().item() if lengths else 1.0
        row = length * nn.functional.normalize(total, dim=0).to(self._dtype)
        return HeadBlock(weight=_copy(row[None]), bias=torch.zeros(1, dtype=self._dtype))


def _require_images(tasks: Mapping[str, TaskImages], method: Method) -> None:
    """Refuse a task without images, and several tasks for a method that learns one at a time."""
    for name, (images, _) in tasks.items():
        if not len(images):
            raise ValueError(f"{name}: no training image")
    if len(tasks) != 1 and not method.joint:
        raise ValueError(f"{len(tasks)} tasks for a method that learns one at a time")


def _relative_change(features: Tensor, goals: Tensor) -> Tensor:
    """Return the mean of ‖f − g‖² / ‖g‖² over images, a scalar, of features (batch, d) and goals (batch, d)."""
    return ((features - goals).square().sum(dim=1) / goals.square().sum(dim=1)).mean()


def _labels_of(tasks: Mapping[str, TaskImages]) -> Tensor:
    """Return the labels (n,) of all images among the new rows."""
    labels, classes = [], 0
    for _, own in tasks.values():
        labels.append(own.long() + classes)
        classes += int(own.max()) + 1
    return torch.cat(labels)


def _copy(parameter: Tensor) -> Tensor:
    return parameter.detach().cpu().clone().contiguous()


def _make_optimizer(trained: Mapping[str, nn.Parameter], schedule: Schedule) -> torch.optim.Optimizer:
    """Return an optimiser with a group for each rate, whose `start` it is. Equal rates make one group."""
    by_rate: dict[float, list[nn.Parameter]] = {}
    for name, parameter in trained.items():
        own = schedule.head_rate if name.startswith("head.") else None
        if name.endswith(".magnitudes"):
            own = schedule.magnitude_rate
        by_rate.setdefault(schedule.learning_rate if own is None else own, []).append(parameter)
    groups = [{"params": parameters, "lr": rate, "start": rate} for rate, parameters in by_rate.items()]
    if schedule.optimizer == "adam":
        return torch.optim.Adam(groups, lr=schedule.learning_rate, fused=True)
    return torch.optim.SGD(groups, lr=schedule.learning_rate, momentum=schedule.momentum, fused=True)
