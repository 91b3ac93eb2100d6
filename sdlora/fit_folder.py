"""A fit folder: the raw result of a fit, before anything is normalised or frozen."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sdlora.adapters import Factors
from sdlora.head import HeadBlock
from sdlora.ledger import record_bytes
from sdlora.methods import FitResult
from sdlora.tensors import read_tensors, write_tensors

_FACTORS, FIT_MAGNITUDES = "factors.safetensors", "magnitudes.safetensors"
_HEAD, _MEMORY = "head.safetensors", "memory.safetensors"
_CURVE, _DESCRIPTION = "curve.csv", "fit.json"


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
    (folder / _DESCRIPTION).write_bytes(record_bytes({**description, "targets": list(fit.factors)}))


def read_curve(folder: Path) -> list[EpochRecord]:
    """Return the training curve of a fit folder, one record per epoch."""
    with (folder / _CURVE).open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file)
        return [
            EpochRecord(
                int(row["step"]), int(row["epoch"]), *(float(row[name]) for name in EpochRecord._fields[2:])
            )
            for row in rows
        ]


def read_fit(folder: Path, *, task: str, targets: Sequence[str], tasks: Sequence[str]) -> FitResult:
    """Return the result of the fit of `task`.

    Args:
        targets: target names in the order of the model, as the fit's description holds them.
        tasks: ids of the tasks so far, in order of arrival.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is not whole.
    """
    tensors, magnitudes = read_tensors(folder / _FACTORS), read_tensors(folder / FIT_MAGNITUDES)
    rows = read_tensors(folder / _HEAD)
    return FitResult(
        task=task,
        factors={target: Factors(tensors[f"{target}.up"], tensors[f"{target}.down"]) for target in targets},
        magnitudes={name: magnitudes[name] for name in tasks if name in magnitudes},
        head={
            name: HeadBlock(weight=rows[f"{name}.weight"], bias=rows[f"{name}.bias"])
            for name in tasks
            if f"{name}.weight" in rows
        },
        memory=read_tensors(folder / _MEMORY),
    )
