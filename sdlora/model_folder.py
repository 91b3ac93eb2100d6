"""A model folder: what a step leaves behind, exact to the bit, and checked against its record when it is read."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sdlora.adapters import Factors
from sdlora.classifier import ModelState
from sdlora.head import HeadBlock
from sdlora.ledger import RECORD, read_record, record_bytes
from sdlora.statistics import ClassStatistics
from sdlora.tensors import file_sha256, read_tensors, write_tensors

MAGNITUDES, _MEMORY = "magnitudes.safetensors", "memory.safetensors"


def write_model(
    folder: Path, learned: ModelState, record: Mapping[str, Any], *, before: Path | None = None
) -> dict[str, Any]:
    """Write `learned` and its ledger record into the existing `folder`. Returns the record as written.

    Files: `directions/TASK.safetensors` (`TARGET.up`, `TARGET.down`), `head/TASK.safetensors` (`weight`, `bias`),
    `magnitudes.safetensors` (TASK: one number per target, in the record's order of targets), where the head is settled
    `settled/TASK.safetensors` (the rows in use) and `statistics/TASK.safetensors` (the fields of `ClassStatistics`),
    where the method needs it `memory.safetensors`, and
    `step.json`, which is `record` with the hash of every other file. A file that the folder `before` holds of the
    same name and with the same tensors is copied, so a frozen direction keeps its bytes whatever wrote them.
    """
    for task, direction in learned.directions.items():
        tensors = {}
        for target, factors in direction.items():
            tensors[f"{target}.up"], tensors[f"{target}.down"] = factors
        _write_or_copy(folder, f"directions/{task}.safetensors", tensors, before)
    for task, block in learned.head.items():
        _write_or_copy(folder, f"head/{task}.safetensors", block._asdict(), before)
    for task, block in learned.settled.items():
        _write_or_copy(folder, f"settled/{task}.safetensors", block._asdict(), before)
    for task, statistics in learned.statistics.items():
        _write_or_copy(folder, f"statistics/{task}.safetensors", statistics._asdict(), before)
    write_tensors(folder / MAGNITUDES, learned.magnitudes)
    if learned.memory:
        write_tensors(folder / _MEMORY, learned.memory)
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.safetensors"))
    written = {**record, "files": {name: file_sha256(folder / name) for name in names}}
    (folder / RECORD).write_bytes(record_bytes(written))
    return written


def _write_or_copy(folder: Path, name: str, tensors: Mapping[str, torch.Tensor], before: Path | None) -> None:
    earlier = before / name if before else None
    if earlier and earlier.is_file():
        held = read_tensors(earlier)
        if held.keys() == tensors.keys() and all(torch.equal(held[key], tensors[key]) for key in held):
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(earlier, folder / name)
            return
    write_tensors(folder / name, tensors)


def read_model(folder: Path) -> tuple[ModelState, dict[str, Any]]:
    """Return what the steps up to this one have learned, and the step's record.

    Raises:
        FileNotFoundError: the folder, its record or a file that the record names is missing.
        ValueError: a file is not the one that the record names (its hash differs).
    """
    record = read_record(folder)
    for name, expected in record["files"].items():
        found = file_sha256(folder / name)
        if found != expected:
            raise ValueError(
                f"{folder / name}: changed since the step was frozen (sha256 {found[:12]}, its record says "
                f"{expected[:12]}); restore it with `dvc checkout`"
            )
    targets = record.get("targets", [])
    directions, head, settled, statistics = {}, {}, {}, {}
    for task in record.get("directions", []):
        tensors = read_tensors(folder / f"directions/{task}.safetensors")
        directions[task] = {
            target: Factors(tensors[f"{target}.up"], tensors[f"{target}.down"]) for target in targets
        }
    for task in record.get("tasks", []):
        head[task] = HeadBlock(**read_tensors(folder / f"head/{task}.safetensors"))
        if f"settled/{task}.safetensors" in record["files"]:
            settled[task] = HeadBlock(**read_tensors(folder / f"settled/{task}.safetensors"))
        if f"statistics/{task}.safetensors" in record["files"]:
            statistics[task] = ClassStatistics(**read_tensors(folder / f"statistics/{task}.safetensors"))
    memory = read_tensors(folder / _MEMORY) if _MEMORY in record["files"] else {}
    magnitudes = read_tensors(folder / MAGNITUDES) if (folder / MAGNITUDES).is_file() else {}
    ordered = {task: magnitudes[task] for task in directions if task in magnitudes}
    learned = ModelState(
        directions=directions,
        magnitudes=ordered,
        head=head,
        settled=settled,
        statistics=statistics,
        memory=memory,
    )
    return learned, record
