"""A fit folder: the raw result of a fit, before anything is normalised or frozen."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypedDict

from sdlora.adapters import Factors
from sdlora.head import HeadBlock
from sdlora.ledger import ClassEntry, Labels, record_bytes
from sdlora.methods import FitResult
from sdlora.records import (
    FORMAT,
    Format,
    Name,
    Sha256,
    TaskId,
    WholeNumber,
    read_record_file,
    regular_size,
    shown,
)
from sdlora.tensor_checks import check_tensors, direction_shapes, require_finite
from sdlora.tensors import read_tensors, write_tensors

_FACTORS, FIT_MAGNITUDES = "factors.safetensors", "magnitudes.safetensors"
_HEAD, _MEMORY = "head.safetensors", "memory.safetensors"
_CURVE, _DESCRIPTION = "curve.csv", "fit.json"


class _Split(TypedDict):
    """What of a task's training images is read here: train.json."""

    images: Sha256


class _FitDescription(TypedDict):
    """What of fit.json is read here. It says more, for those who audit it."""

    format: NotRequired[Format]
    task: TaskId
    classes: list[ClassEntry]
    step_classes: NotRequired[dict[TaskId, Labels]]
    targets: list[Name]
    split: _Split
    adapter: dict[str, object]
    code: Name
    training: dict[str, object]
    seed: WholeNumber


class EpochRecord(NamedTuple):
    """One row of the training curve: means over the epoch's images, measured while training."""

    step: int
    epoch: int
    loss: float
    accuracy: float
    learning_rate: float


def write_fit(
    folder: Path, fit: FitResult, *, curve: Sequence[EpochRecord], description: Mapping[str, Any]
) -> None:
    """Write a fit's result, its training curve (one row per epoch) and its `description` into the existing `folder`."""
    tensors = {}
    for target, factors in fit.factors.items():
        tensors[f"{target}.up"], tensors[f"{target}.down"] = factors
    write_tensors(folder / _FACTORS, tensors)
    write_tensors(folder / FIT_MAGNITUDES, fit.magnitudes)
    rows = {
        f"{task}.{part}": tensor
        for task, block in fit.head.items()
        for part, tensor in block._asdict().items()
    }
    write_tensors(folder / _HEAD, rows)
    write_tensors(folder / _MEMORY, fit.memory)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(EpochRecord._fields)
    for row in curve:
        writer.writerow([row.step, row.epoch, *(f"{value:.6g}" for value in row[2:])])
    (folder / _CURVE).write_text(text.getvalue())
    described = {**description, "format": FORMAT, "targets": list(fit.factors)}
    (folder / _DESCRIPTION).write_bytes(record_bytes(described))


def read_curve(folder: Path) -> list[EpochRecord]:
    """Return the training curve of a fit folder, one record per epoch.

    Raises:
        FileNotFoundError: it is missing.
        ValueError: it is no training curve.
    """
    path = folder / _CURVE
    regular_size(path)
    try:
        with path.open(encoding="utf-8", newline="") as file:
            heading, *rows = list(csv.reader(file)) or [[]]
        if any(len(row) != len(EpochRecord._fields) for row in [heading, *rows]):
            raise ValueError(f"expected {','.join(EpochRecord._fields)} in every line")
        curve = [EpochRecord(int(row[0]), int(row[1]), *(float(value) for value in row[2:])) for row in rows]
        if not all(math.isfinite(value) for record in curve for value in record):
            raise ValueError("a number is not finite")
    except (ValueError, OverflowError, csv.Error) as error:
        raise ValueError(f"{path}: not a training curve ({shown(str(error), 100)}); restore it") from None
    return curve


def read_fit_description(folder: Path) -> dict[str, Any]:
    """Return what a fit says of itself.

    Raises:
        FileNotFoundError: it is missing.
        ValueError: it is no such description.
    """
    description: dict[str, Any] = read_record_file(folder / _DESCRIPTION, _FitDescription)
    return description


def read_fit(folder: Path, description: Mapping[str, Any], *, tasks: Sequence[str]) -> FitResult:
    """Return the result of a fit.

    Args:
        description: what the fit says of itself.
        tasks: ids of the tasks so far, in order of arrival.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is not whole, or does not hold what it must.
    """
    task, targets = description["task"], description["targets"]
    step_classes = {name: tuple(labels) for name, labels in description.get("step_classes", {}).items()}
    sizes = {f"classes of {task}": len(step_classes.get(task, description["classes"]))}
    factors = read_tensors(folder / _FACTORS)
    check_tensors(folder / _FACTORS, factors, direction_shapes(task, targets), sizes)
    magnitudes = read_tensors(folder / FIT_MAGNITUDES)
    held = [name for name in tasks if name in magnitudes]
    check_tensors(folder / FIT_MAGNITUDES, magnitudes, dict.fromkeys(held, ("magnitudes",)), sizes)
    # A step without a new direction has no targets of its own, and may have magnitudes.
    if held and targets and sizes["magnitudes"] not in (1, len(targets)):
        raise ValueError(
            f"{folder / FIT_MAGNITUDES}: {sizes['magnitudes']} magnitudes of each task for {len(targets)} targets; "
            "restore the file"
        )
    rows = read_tensors(folder / _HEAD)
    trained = [name for name in tasks if f"{name}.weight" in rows or name == task]
    shapes: dict[str, tuple[int | str, ...]] = {}
    for name in trained:
        shapes |= {
            f"{name}.weight": (f"classes of {name}", "features"),
            f"{name}.bias": (f"classes of {name}",),
        }
    check_tensors(folder / _HEAD, rows, shapes, sizes)
    memory = read_tensors(folder / _MEMORY)
    require_finite(folder / _MEMORY, memory)
    return FitResult(
        task=task,
        factors={target: Factors(factors[f"{target}.up"], factors[f"{target}.down"]) for target in targets},
        magnitudes={name: magnitudes[name] for name in held},
        head={name: HeadBlock(weight=rows[f"{name}.weight"], bias=rows[f"{name}.bias"]) for name in trained},
        memory=memory,
        step_classes=step_classes,
    )
