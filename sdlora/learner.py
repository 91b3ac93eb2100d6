"""A chain in Python: learn tasks one by one, predict, save. No YAML, and the bytes that the stages make."""

import copy
import platform
import shutil
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import Any, Self, TextIO

import numpy as np
import torch
from torch import Tensor, nn

from sdlora.adapters import inject_adapters
from sdlora.backbones import Backbone, backbone_of, create_backbone, read_backbone, write_backbone
from sdlora.choices import SHARED_CHOICES, Choices, adapted_targets, recorded_choices, settings_of
from sdlora.classifier import ModelState, merged_classifier
from sdlora.devices import arithmetic, best_device
from sdlora.evaluation import feature_batches, predict_batches
from sdlora.fit_folder import EpochRecord
from sdlora.freezing import FEATURE_BATCH, FrozenStep, frozen_step, remembered
from sdlora.ledger import RECORD, ClassEntry, classes_of_step, read_own_record, record_hash
from sdlora.loading import Step, inference_model, newest_step
from sdlora.methods import METHODS
from sdlora.model_folder import read_model, write_model
from sdlora.pictures import class_pixels, is_array, is_one, pixels_of
from sdlora.prediction import Guess, best_guesses, judged_guesses
from sdlora.preprocessing import Preprocessing, normalise
from sdlora.products import by_onednn
from sdlora.records import Name, fault_of, shown
from sdlora.training import Fit, TaskImages

_LIBRARIES = ("numpy", "pillow", "safetensors", "timm", "torch")
_BAR, _PAUSE = 24, 0.1
"""Characters of a full bar, and seconds between two states of it."""


class _Chain:
    """Model folders of a chain, and what its newest step has learned.

    A chain that was opened stays as it is. New steps lie in a temporary folder, which goes with this object.
    """

    def __init__(self, opened: Path | None, first: Callable[[], Backbone]) -> None:
        """Go on from the folder of a step, or begin with a backbone."""
        self._new = Path(tempfile.mkdtemp(prefix="sdlora-"))
        weakref.finalize(self, shutil.rmtree, self._new, ignore_errors=True)
        self._opened = opened
        if opened is None:
            (self._new / "t00").mkdir()
            write_backbone(self._new / "t00", first())
        self.base = read_backbone(self.place("t00"))
        self.preprocessing = Preprocessing.of(self.base.description)
        self.curves: dict[str, list[EpochRecord]] = {}
        self._read(self.place("t00") if opened is None else opened)

    def __reduce__(self) -> str:
        """Refuse a copy, whose files would go with this object."""
        raise TypeError("a Learner is not copied or pickled; save it, and open the folder with Learner.open")

    def _read(self, folder: Path) -> None:
        self.learned, self.record = read_model(folder, beside=self.place, statistics=True)
        self.model: nn.Module | None = None

    @property
    def classes(self) -> list[str]:
        """All classes so far, in the order of their labels."""
        return [entry["name"] for entry in self.record["classes"]]

    def place(self, step: str) -> Path:
        """Return the model folder of a step."""
        new = self._new / step
        return new if self._opened is None or new.is_dir() else self._opened.resolve().parent / step

    def add(self, step: str, learned: ModelState, record: Mapping[str, Any]) -> None:
        """Write the folder of a new step. It is there as a whole or not at all."""
        before = self.record["step"]
        unfinished = self._new / f"{step}.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        said = {"step": step, "after": before, "previous": record_hash(self.place(before)), **record}
        write_model(unfinished, learned, said, before=self.learned)
        self._read(unfinished.rename(self._new / step))

    def save(self, folder: Path) -> Path:
        """Copy all steps into a folder. Those that are there already stay."""
        steps = [step for step in ("t00", *self.record["tasks"]) if self.place(step).is_dir()]
        for step in steps:
            if (folder / step).exists() and _hash_of(folder / step) != record_hash(self.place(step)):
                raise ValueError(f"{folder / step}: another step stands there; save into a folder of its own")
        for step in steps:
            if not (folder / step).exists():
                part = folder / f".{step}.unfinished"
                shutil.rmtree(part, ignore_errors=True)
                shutil.copytree(self.place(step), part)
                part.rename(folder / step)
        return folder / steps[-1]


def _hash_of(folder: Path) -> str | None:
    return record_hash(folder) if (folder / RECORD).is_file() else None


@dataclass(frozen=True)
class _TaskFeatures:
    """The features of a task's training images under any model of the chain."""

    base: Backbone
    images: TaskImages
    preprocessing: Preprocessing
    device: torch.device

    def labels(self) -> Tensor:
        """(n,), 0 … classes − 1 within the task."""
        return self.images.labels

    def __call__(self, learned: ModelState, /) -> Tensor:
        """(n, d) on the CPU."""
        batches = feature_batches(
            merged_classifier(copy.deepcopy(self.base.model), learned).to(self.device),
            self.images.images,
            mean=self.preprocessing.mean,
            std=self.preprocessing.std,
            batch_size=FEATURE_BATCH,
            device=self.device,
        )
        return torch.cat(list(batches))


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Learner(Choices):
    """An image classifier that learns classes task by task, and forgets none.

    `Learner("glyph_vit").learn({"wren": pictures, "robin": pictures})`, and again for the next classes. What it leaves
    is what the stages leave of the same images and choices: equal bytes of directions, magnitudes, head, statistics
    and classifier.

    Args:
        backbone: a timm model's name with the tag of its weights, a timm model, which stays as it is, or a `Backbone`.
            A `Path` is that of a chain to go on with, as `Learner.open` does.
        device: of torch. None for the accelerator where there is one.
        progress: whether a line shows how far the training is.

    Raises:
        ValueError: a choice has no meaning, the backbone is not supported, or is not that of the chain.
        FileNotFoundError: weights or files are missing.
    """

    backbone: str | nn.Module | Backbone | Path = field(kw_only=False)
    device: str | None = None
    progress: bool = True
    _chain: _Chain = field(init=False)

    def __post_init__(self) -> None:
        """Read the backbone. Refuse choices that the chain was not begun with."""
        super().__post_init__()
        opened = newest_step(self.backbone) if isinstance(self.backbone, Path) else None
        chain = _Chain(opened, self._first)
        parameters = chain.record.get("parameters")
        held = recorded_choices(parameters) if parameters else {}
        for name in SHARED_CHOICES:
            value = held.get(name, getattr(self, name))
            if getattr(self, name) != value:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}, but {opened} was learned with {value!r}, which a chain keeps; "
                    "begin another Learner, or leave it out"
                )
        inject_adapters(copy.deepcopy(chain.base.model), self._adapted)  # refuses what cannot be adapted
        object.__setattr__(self, "_chain", chain)

    @property
    def _adapted(self) -> tuple[str, ...]:
        return adapted_targets(self.targets, METHODS[self.method])

    def _first(self) -> Backbone:
        if isinstance(self.backbone, Backbone):
            return self.backbone
        if isinstance(self.backbone, nn.Module):
            return backbone_of(self.backbone)
        if isinstance(self.backbone, str):
            return create_backbone(self.backbone)
        raise TypeError(
            f"backbone is of type {type(self.backbone).__name__}, expected a timm model, its name or a Path"
        )

    @classmethod
    def open(cls, folder: Path | str, **changes: Any) -> Self:  # noqa: ANN401 - any choice
        """Return a learner that goes on from a step, or from the newest one of a chain, with the choices of that step.

        Nothing is written there, until `save` is told so.

        Args:
            folder: of a step (artifacts/model/t05) or of a chain (artifacts/model), beside its earlier steps.
            changes: choices that are others from now on, `device` and `progress` among them.

        Raises:
            FileNotFoundError: the folder, or a file that a record names, is missing.
            ValueError: a file is not the one that its record names, or a change is none that a chain can go on with.
        """
        step = newest_step(Path(folder))
        parameters = read_own_record(step).get("parameters")
        return cls(step, **{**(recorded_choices(parameters) if parameters else {}), **changes})

    def __repr__(self) -> str:
        name, classes = self._chain.base.description["name"], len(self._chain.classes)
        tasks = len(self._chain.record["tasks"])
        return (
            f"<Learner on {name}: {classes} class{'es' * (classes != 1)} in {tasks} task{'s' * (tasks != 1)}>"
        )

    @property
    def classes_(self) -> np.ndarray:
        """Names of all classes so far, in the order of their labels."""
        return np.array(self._chain.classes, dtype=object)

    @property
    def tasks(self) -> dict[str, list[str]]:
        """Task id → names of the classes that it had pictures of."""
        record = self._chain.record
        return {task: [entry["name"] for entry in classes_of_step(record, task)] for task in record["tasks"]}

    @property
    def curves(self) -> Mapping[str, list[EpochRecord]]:
        """Task id → what each pass over its images was like, of the tasks that were learned here."""
        return self._chain.curves

    @property
    def record(self) -> Mapping[str, Any]:
        """What the newest step's record says, with all tasks, classes and files so far."""
        return self._chain.record

    def learn(
        self,
        images: Any,  # noqa: ANN401 - as `class_pixels` takes them
        labels: Any = None,  # noqa: ANN401 - names or numbers
        *,
        callbacks: Iterable[Callable[[EpochRecord], object]] = (),
    ) -> Self:
        """Learn a task: images of new classes, of known ones, or of both. Return this learner.

        A class that is known keeps its label, and from now on stands for its images of all tasks. A name is a class, so
        a misspelt one is a new class.

        Until it ends the learner stays what it was, so to interrupt it, or to raise in a callback, undoes the task.

        Args:
            images: `{name: pictures}`; or pictures, with `labels`; or a dataset of pairs of a picture and a label; or
                a Hugging Face dataset. A picture is one of Pillow, an array (h, w) or (h, w, channels), or a tensor
                (h, w) or (channels, h, w), of bytes or of numbers from 0 to 1. All are kept, as the backbone takes
                them, while the task is learned.
            labels: names or whole numbers, one for each picture.
            callbacks: each is called after every pass over the images.

        Raises:
            TypeError, ValueError: a picture, a label or a name cannot be used. The text says which and why.
            FloatingPointError: the loss is not finite. Choose a lower learning rate.
        """
        chain, device = self._chain, self._device
        task = f"t{int(chain.record['step'][1:]) + 1:02}"
        preprocessing = chain.preprocessing
        found = class_pixels(images, labels, preprocessing)
        entries, labels = _arrived(found, chain.record["classes"], task)
        counts = torch.tensor([len(pixels) for pixels in found.values()])
        places = torch.tensor(labels).argsort().argsort()
        own = TaskImages(torch.cat(list(found.values())), places.repeat_interleave(counts))
        step_classes = {} if len(entries) == len(labels) else {task: tuple(sorted(labels))}
        with arithmetic(self.deterministic, tf32=self.precision == "tf32"):
            fit = Fit(
                copy.deepcopy(chain.base.model),
                chain.learned,
                tasks={task: own},
                mean=preprocessing.mean,
                std=preprocessing.std,
                method=METHODS[self.method],
                settings=settings_of(self),
                schedule=self.fit_schedule,
                seed=self.seed,
                device=device,
                targets=self._adapted,
            )
            _train(fit, list(callbacks), shown_at=sys.stderr if self.progress else None)
            result = replace(fit.result(), step_classes=step_classes)
        features = _TaskFeatures(chain.base, own, preprocessing, device)
        with arithmetic(self.deterministic):
            step = frozen_step(chain.learned, result, self, features, self.seed, record=chain.record)
        said = {"classes": entries, **({"step_classes": step_classes} if step_classes else {})}
        chain.add(task, step.learned, self._said(fit, step, own) | said)
        chain.curves[task] = fit.curve
        return self

    partial_fit = learn
    """`learn`, as scikit-learn calls it."""

    def _said(self, fit: Fit, step: FrozenStep, own: TaskImages) -> dict[str, Any]:
        """Return what the record of a new step says, in the words of the stages, but for what only a project has."""
        learned, last = step.learned, fit.curve[-1:]
        newest = learned.directions.get(fit.task, {})
        return {
            "backbone": self._chain.record["backbone"],
            "targets": list(newest) or self._chain.record.get("targets", []),
            "method": self.method,
            "needs_old_images": False,
            "formulation": self.formulation,
            "head": self.head,
            "made_by": f"sdlora.Learner {metadata.version('sdlora')}",
            "versions": {
                "python": ".".join(platform.python_version_tuple()[:2]),
                **{name: metadata.version(name) for name in _LIBRARIES},
            },
            "determinism": "deterministic algorithms" if self.deterministic else "none required",
            "parameters": self.parameters,
            "pixels": {"images": len(own.images), "sha256": sha256(own.images.numpy().tobytes()).hexdigest()},
            "directions": list(learned.directions),
            "metrics": {
                name: float(f"{value:.6g}")
                for epoch in last
                for name, value in (("loss", epoch.loss), ("training_accuracy", epoch.accuracy))
            },
            "rank": max((pair.down.shape[0] for pair in newest.values()), default=0),
            "magnitudes": {name: round(alpha.mean().item(), 6) for name, alpha in learned.magnitudes.items()},
            "remembered": remembered(learned),
            "freezing": dict(step.facts),
        }

    @property
    def _device(self) -> torch.device:
        return torch.device(self.device) if self.device else best_device()

    def _model(self) -> nn.Module:
        """Return the newest step for inference."""
        chain = self._chain
        if not chain.classes:
            raise ValueError("nothing is learned yet; call learn first")
        if chain.model is None:
            base = Backbone(copy.deepcopy(chain.base.model), chain.base.description)
            chain.model = inference_model(Step(base, chain.learned, chain.record)).to(self._device)
        return chain.model

    def predict(self, image: Any, *, top: int = 5) -> list[Guess]:  # noqa: ANN401 - as `learn` takes pictures
        """Return the classes that a picture is most likely of, with their probabilities, the likeliest first.

        Raises:
            TypeError, ValueError: it is not one picture, or nothing is learned yet.
        """
        model, classes = self._model(), self._chain.classes
        if isinstance(image, list | tuple) or (is_array(image) and not is_one(image)):
            raise TypeError(f"several pictures ({len(image)}), expected one; predict_proba takes several")
        preprocessing = self._chain.preprocessing
        pixels = [pixels_of(image, preprocessing, "the picture")]
        return best_guesses(
            model, pixels, preprocessing, classes, top=max(1, min(top, len(classes))), bf16=False
        )[0]

    def predict_proba(self, images: Iterable[Any]) -> np.ndarray:
        """Return the probabilities (pictures, classes) of several pictures, in the order of `classes_`."""
        model, device = self._model(), self._device
        preprocessing = self._chain.preprocessing
        pixels = [pixels_of(one, preprocessing, f"picture {place}") for place, one in enumerate(images)]
        found = []
        for start in range(0, len(pixels), FEATURE_BATCH):
            batch = torch.from_numpy(np.stack(pixels[start : start + FEATURE_BATCH])).to(device)
            with torch.inference_mode(), by_onednn(device):
                logits = model(normalise(batch, mean=preprocessing.mean, std=preprocessing.std))
            found.append(logits.float().softmax(dim=1).cpu().numpy())
        return np.concatenate(found) if found else np.zeros((0, len(self._chain.classes)), dtype=np.float32)

    def is_unknown(self, images: Iterable[Any]) -> np.ndarray:
        """Return which of several pictures (pictures,) look like none of the classes.

        Of pictures that are of a class about a share of `unknown_rate` does.

        Raises:
            TypeError, ValueError: a picture cannot be used, or the newest step has no threshold.
        """
        chain, device = self._chain, self._device
        self._model()
        if chain.learned.rejection is None:
            raise ValueError(
                f"{chain.record['step']} has no threshold: unknown was None, or no picture could be left out"
            )
        preprocessing = chain.preprocessing
        pixels = [pixels_of(one, preprocessing, f"picture {place}") for place, one in enumerate(images)]
        classifier = merged_classifier(copy.deepcopy(chain.base.model), chain.learned).to(device)
        found: list[bool] = []
        for start in range(0, len(pixels), FEATURE_BATCH):
            some = pixels[start : start + FEATURE_BATCH]
            judged = judged_guesses(classifier, some, preprocessing, chain.classes, top=1, bf16=False)
            found += [one.unknown for one in judged]
        return np.array(found, dtype=bool)

    def score(self, images: Any, labels: Any = None) -> float:  # noqa: ANN401 - as in `learn`
        """Return the share of labelled pictures whose class, among all so far, is predicted.

        Raises:
            TypeError, ValueError: as in `learn`, or a class was not learned.
        """
        model, device, classes = self._model(), self._device, self._chain.classes
        preprocessing = self._chain.preprocessing
        right = total = 0
        for name, pixels in class_pixels(images, labels, preprocessing).items():
            if name not in classes:
                raise ValueError(
                    f"{shown(name)}: no class of that name was learned; known are {_some(classes)}"
                )
            for found, *_ in predict_batches(
                model,
                pixels.split(FEATURE_BATCH),
                mean=preprocessing.mean,
                std=preprocessing.std,
                device=device,
            ):
                right += int((found == classes.index(name)).sum())
                total += len(found)
        if not total:
            raise ValueError("no picture; give some")
        return right / total

    def save(self, folder: Path | str) -> Path:
        """Write all steps as the stages do: FOLDER/t00, FOLDER/t01, … Return the newest step's folder.

        Steps that are there already stay, so the same folder takes the next tasks too. `sdlora.load`,
        `Learner.open`, `sdlora predict` and `sdlora export` read it.

        Raises:
            ValueError: another chain's step stands there.
        """
        return self._chain.save(Path(folder))


def _arrived(
    found: Mapping[str, Tensor], known: Sequence[ClassEntry], task: str
) -> tuple[list[ClassEntry], list[int]]:
    """Return the classes that are new with a task, and the labels of all that it has pictures of, in their order.

    Refuse a task without a class, and a name that no record may hold.
    """
    if not found:
        raise ValueError("no picture; give some")
    for name in found:
        if fault := fault_of(name, Name, "the name of a class"):
            raise ValueError(fault)
    labels = {entry["name"]: entry["label"] for entry in known}
    new = [name for name in found if name not in labels]
    entries: list[ClassEntry] = [
        {"label": label, "name": name, "task": task} for label, name in enumerate(new, start=len(known))
    ]
    labels |= {entry["name"]: entry["label"] for entry in entries}
    return entries, [labels[name] for name in found]


def _some(names: list[str]) -> str:
    return ", ".join(map(shown, names[:5])) + (", …" if len(names) > 5 else "")


def _train(fit: Fit, callbacks: list[Callable[[EpochRecord], object]], *, shown_at: TextIO | None) -> None:
    """Train to the end. Tell callbacks of each epoch, and show a line with how far it is.

    In a notebook and on a terminal the line moves. Elsewhere it is written once, at the end.
    """
    moves = shown_at is not None and (shown_at.isatty() or "ipykernel" in sys.modules)
    started = last = time.monotonic()
    told = 0
    for seen in fit.run():
        for epoch in fit.curve[told:]:
            for callback in callbacks:
                callback(epoch)
        told, now = len(fit.curve), time.monotonic()
        ends = fit.step == fit.total_steps
        if shown_at and (ends or (moves and now - last >= _PAUSE)):
            start, end = "\r" if moves else "", "\n" if ends else ""
            shown_at.write(f"{start}{_line(fit, seen, now - started)}{end}")
            shown_at.flush()
            last = now


def _line(fit: Fit, seen: int, seconds: float) -> str:
    """Return how far a fit is."""
    full = _BAR * fit.step // fit.total_steps
    facts = [
        f"epoch {min(len(fit.curve) + (fit.step < fit.total_steps), fit.schedule.epochs)}/{fit.schedule.epochs}"
    ]
    if fit.curve:
        facts += [f"loss {fit.curve[-1].loss:.4f}", f"accuracy {100 * fit.curve[-1].accuracy:.1f} %"]
    return f"{fit.task} {'█' * full}{'░' * (_BAR - full)} {'  '.join([*facts, f'{seen / seconds:.0f} images/s'])} "
