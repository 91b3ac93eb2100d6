"""The steps that an audit looks at: where their files are, which images they were tested on, what their models said."""

from __future__ import annotations

import difflib
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np

from pipelines.data.packed import read_images
from pipelines.data.split_chain import SAMPLES, TEST, part_file
from pipelines.project.errors import FaultError, InputError
from pipelines.project.layout import ARTIFACTS, EVALUATIONS, LOCK
from pipelines.project.params import Params
from pipelines.versioning.artifacts import ArtifactStore, Lock, read_lock

if TYPE_CHECKING:
    from torch import nn

    from sdlora.backbones import Backbone
    from sdlora.ledger import ChainReader

Figures = dict[str, Any]

BATCH = 64
"""Images in one forward pass; no choice of the user, because it may change the last bits."""


@dataclass(frozen=True, kw_only=True)
class AuditedStep:
    """A step, of this project or of another: where its files can be read, and its ledger record."""

    name: str
    shown: str
    """as the user called it"""
    model: Path
    beside: Callable[[str], Path]
    """the model folder of another step of its chain; an `InputError` where it is nowhere"""
    split: Path | None
    """None where there is no such folder, and for t00, which knows no class; so with `evaluation`"""
    split_of: Callable[[str], Path | None]
    """the split of a task of its chain; None where it is nowhere"""
    evaluation: Path | None
    record: Figures

    @property
    def tasks(self) -> list[str]:
        """The tasks so far."""
        return list(self.record["tasks"])

    @property
    def classes(self) -> list[Figures]:
        """All classes so far, each its `label`, `name` and `task`. The index is the label."""
        return list(self.record["classes"])

    @property
    def hash(self) -> str:
        """The SHA-256 of the record."""
        from sdlora.ledger import record_hash

        return record_hash(self.model)

    def test_images(self, task: str) -> Path | None:
        """Return the packed test images of a task. None where they are gone."""
        return self._part(TEST, task)

    def samples(self, task: str) -> Path | None:
        """Return the samples of a task. None where they are gone."""
        return self._part(SAMPLES, task)

    def _part(self, part: str, task: str) -> Path | None:
        folder = self.split_of(task) if self.split else None
        path = folder / part_file(part, task) if folder else None
        return path if path is not None and path.is_file() else None


class Answers(NamedTuple):
    """What a step's model said of its test images, in the order of the test files. Every column is (n,)."""

    ids: np.ndarray
    tasks: np.ndarray
    """task ids of the images"""
    truths: np.ndarray
    """names of their classes"""
    guesses: np.ndarray
    """names of the classes that they were taken for"""
    confidences: np.ndarray

    @property
    def right(self) -> np.ndarray:
        """(n,) booleans."""
        return self.truths == self.guesses

    def take(self, rows: np.ndarray) -> Self:
        """Some of them, by index or by mask."""
        return type(self)(*(column[rows] for column in self))


class AuditedProject:
    """The steps of the project in the working directory. What is not in the workspace comes from DVC's cache."""

    def __init__(self, scratch: Path) -> None:
        self.params = Params.load()
        self._scratch = scratch

    @cached_property
    def _lock(self) -> Lock:
        return read_lock(self.params)

    @cached_property
    def _place(self) -> ArtifactStore:
        return ArtifactStore(self._lock, self._scratch)

    def find(self, kind: str, step: str) -> Path:
        """Return where an output of a step can be read. An `InputError` where it is nowhere."""
        path = ARTIFACTS / kind / step
        if path.exists():
            return path
        if not LOCK.is_file():
            raise InputError(
                f"{path}: it is missing, and there is no {LOCK} to say what it was; run `sdlora run`"
            )
        try:
            return self._place.find(path)
        except FaultError as fault:
            raise InputError(str(fault)) from None

    def has(self, kind: str, step: str) -> bool:
        """Return whether an output of a step is in the workspace, or known to dvc.lock."""
        path = ARTIFACTS / kind / step
        return path.exists() or (LOCK.is_file() and path.as_posix() in self._lock.outs)

    def step(self, which: str) -> AuditedStep:
        """Return a step of this project by name or number, or of any project by its model folder."""
        if Path(which).is_dir():
            return _step_of_folder(Path(which), which)
        number = re.fullmatch(r"t?([0-9]+)", which)
        name = f"t{int(number[1]):02}" if number else which
        if name != "t00" and name not in self.params.tasks:
            if "/" in which:
                raise InputError(
                    f"{which}: no such folder; name a step such as t03, or a folder artifacts/model/t03"
                )
            raise InputError(f"there is no step {which!r}; there are t00, {', '.join(self.params.tasks)}")
        model = self.find("model", name)
        return AuditedStep(
            name=name,
            shown=name,
            model=model,
            beside=partial(self.find, "model"),
            split=None if name == "t00" else self.find("split", name),
            split_of=partial(self.find, "split"),
            evaluation=None if name == "t00" else self.find("evaluation", name),
            record=self._records.read(model),
        )

    @cached_property
    def _records(self) -> ChainReader:
        from sdlora.ledger import ChainReader

        return ChainReader(partial(self.find, "model"))

    def evaluated(self) -> list[str]:
        """Return the steps that have a model and an evaluation, in order. An `InputError` where there is none."""
        found = [
            task for task in self.params.tasks if self.has("model", task) and self.has("evaluation", task)
        ]
        if not found:
            raise InputError(f"{EVALUATIONS}: no step was evaluated yet; run `sdlora run`")
        return found


@contextmanager
def opened_project() -> Iterator[AuditedProject]:
    """Open the project in the working directory, for as long as links into DVC's cache are needed."""
    with TemporaryDirectory(prefix="sdlora-audit-") as scratch:
        yield AuditedProject(Path(scratch))


def _step_of_folder(model: Path, shown: str) -> AuditedStep:
    """Return the step whose model folder this is. Its evaluation and split are looked for beside it."""
    if not (model / "step.json").is_file():
        raise InputError(f"{shown}: no model folder (no step.json in it); name one, or a step such as t03")
    home = model.resolve().parent

    def beside(other: str) -> Path:
        if not (home / other / "step.json").is_file():
            raise InputError(
                f"{home / other}: there is no model folder of {other} beside {shown}; put it there"
            )
        return home / other

    from sdlora.ledger import read_record

    record = read_record(model, beside=beside)
    name = record["step"]
    split, evaluation = (home.parent / kind / name for kind in ("split", "evaluation"))
    return AuditedStep(
        name=name,
        shown=shown,
        model=model,
        beside=beside,
        split=split if split.is_dir() and name != "t00" else None,
        split_of=split.parent.joinpath,
        evaluation=evaluation if evaluation.is_dir() and name != "t00" else None,
        record=record,
    )


def read_answers(step: AuditedStep) -> Answers | None:
    """Return what a step's model said of its test images. None where it was not evaluated."""
    if step.evaluation is None:
        return None
    path = step.evaluation / "predictions.arrow"
    table = read_images(path)
    labels, guesses = (table[column].to_numpy() for column in ("label", "prediction"))
    if len(table) and max(labels.max(), guesses.max()) >= len(step.classes):
        raise InputError(
            f"{path}: it has labels beyond the {len(step.classes)} classes of {step.shown}; run `sdlora run`"
        )
    names = _texts(entry["name"] for entry in step.classes)
    return Answers(
        ids=_texts(table["id"].to_pylist()),
        tasks=_texts(table["task"].to_pylist()),
        truths=names[labels],
        guesses=names[guesses],
        confidences=table["confidence"].to_numpy().astype(np.float64),
    )


def _texts(values: Iterable[str]) -> np.ndarray:
    """Texts as a column, compared as texts."""
    return np.array(list(values), dtype=object)


def test_pictures(step: AuditedStep, *, of: Iterable[str] | None) -> dict[str, str]:
    """Test image → `picture_hash`, of some tasks, or of all so far. Nothing of a step without a split."""
    return {row["id"]: row["pixels"] for row in samples_of(step, of=of) if row["split"] == "test"}


def samples_of(step: AuditedStep, *, of: Iterable[str] | None = None) -> Iterator[Figures]:
    """Yield all images of a step's split but for their bytes: `id`, `split`, `label`, `sha256`, `pixels`.

    Args:
        step: The step.
        of: Tasks that it knows. None for all of them.
    """
    for task in (step.tasks if of is None else of) if step.split else ():
        path = step.samples(task)
        if path is None:
            raise InputError(f"{step.shown}: the samples of {task} are missing; `dvc checkout` its split")
        table = read_images(path)
        yield from table.select(["id", "split", "label", "sha256", "pixels"]).to_pylist()


def same_images(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return the ids that stand for the same picture in both, in the order of `now`."""
    return [name for name, picture in now.items() if then.get(name) == picture]


def rows_of(answers: Answers, ids: Sequence[str]) -> Answers:
    """Return the answers to some images, in their order. All of them must be there."""
    row = {name: index for index, name in enumerate(answers.ids)}
    return answers.take(np.array([row[name] for name in ids], dtype=np.int64))


def score(right: np.ndarray) -> Figures:
    """Return an accuracy with its Wilson 95 % interval, of (n,) booleans."""
    from sdlora.comparison import wilson_interval

    hits, images = int(right.sum()), len(right)
    low, high = wilson_interval(hits, images)
    accuracy = hits / images if images else math.nan
    return {"right": hits, "images": images, "accuracy": accuracy, "low": low, "high": high}


def flip_facts(before: np.ndarray, now: np.ndarray) -> Figures:
    """Flips between two answers to the same images, (n,) booleans each, and McNemar's exact p-value."""
    from sdlora.comparison import flips

    found = flips(before, now)
    return {"lost": found.lost, "gained": found.gained, "p_value": found.p_value}


def correct_for_looks(rows: Sequence[Figures]) -> None:
    """Give every row that has a `p_value` its `p_holm`: adjusted for all of these having been looked at."""
    from sdlora.comparison import holm

    tested = [row for row in rows if row["p_value"] is not None]
    for row in rows:
        row["p_holm"] = None
    for row, adjusted in zip(tested, holm([row["p_value"] for row in tested]), strict=True):
        row["p_holm"] = adjusted


def taken_for(guesses: np.ndarray, owners: Mapping[str, str]) -> list[Figures]:
    """Return what images were taken for, the most frequent class first, with the task that it is of.

    Args:
        guesses: (n,) names of classes.
        owners: class → task.
    """
    ordered = sorted(Counter(guesses.tolist()).items(), key=lambda item: (-item[1], item[0]))
    return [{"class": name, "task": owners[name], "images": images} for name, images in ordered]


def spread(values: Iterable[float]) -> Figures:
    """Mean and range of some numbers. NaN of none."""
    found = np.array([value for value in values if not math.isnan(value)], dtype=np.float64)
    if not found.size:
        return dict.fromkeys(("mean", "lowest", "highest"), math.nan)
    return {"mean": float(found.mean()), "lowest": float(found.min()), "highest": float(found.max())}


def near(name: str, known: Sequence[str]) -> str:
    """Return the end of a sentence that says a name is unknown: the names that are like it, or some that there are."""
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return f"; did you mean {' or '.join(map(repr, close))}?"
    some = ", ".join(known[:8]) + (", …" if len(known) > 8 else "")
    return f"; there are {some}" if known else "; there are none"


def read_base(step: AuditedStep) -> Backbone:
    """Return the backbone of a step's chain."""
    from sdlora.backbones import read_backbone

    return read_backbone(step.beside("t00"))


def classifier_of(step: AuditedStep, base: Backbone) -> nn.Module:
    """Return the merged model of a step, on the device of this process. Its chain's backbone stays as it is."""
    import copy

    from sdlora.classifier import ModelState, merged_classifier
    from sdlora.devices import best_device
    from sdlora.model_folder import read_model

    learned = ModelState() if step.name == "t00" else read_model(step.model, beside=step.beside)[0]
    if step.record["backbone"] != base.description["sha256"]:
        raise InputError(
            f"{step.shown}: it began from another backbone (sha256 {step.record['backbone'][:12]}) than the one "
            f"beside it ({base.description['sha256'][:12]}); restore both with `dvc checkout`"
        )
    return merged_classifier(copy.deepcopy(base.model), learned).to(best_device())


def ancestors(step: AuditedStep) -> list[str]:
    """Hashes of the records before a step, the last one first, as far back as each is the one that is named."""
    from sdlora.ledger import read_own_record, record_hash

    found: list[str] = []
    previous = step.record.get("previous")
    for name in ["t00", *step.tasks][-2::-1] if step.tasks else []:
        if previous is None:
            break
        found.append(previous)
        try:
            folder = step.beside(name)
            if record_hash(folder) != previous:
                break
            previous = read_own_record(folder).get("previous")
        except (InputError, OSError, ValueError):
            break
    return found
