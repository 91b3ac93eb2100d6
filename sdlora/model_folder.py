"""A model folder: what a step leaves behind, exact to the bit, and checked against its record when it is read."""

import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sdlora.adapters import Factors
from sdlora.classifier import ModelState
from sdlora.head import HeadBlock
from sdlora.ledger import RECORD, file_sha256, read_record, record_bytes, require_files
from sdlora.records import FORMAT
from sdlora.statistics import ClassStatistics, statistics_shapes
from sdlora.tensor_checks import check_tensors, direction_shapes, require_finite
from sdlora.tensors import read_tensors, write_tensors

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
    hashes = {name: file_sha256(folder / name) for name in names}
    written = {**record, "format": FORMAT, "files": hashes}
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
        ValueError: a file is not the one that the record names (its hash differs), or does not hold what it must.
    """
    record = read_record(folder)
    targets, tasks, files = record.get("targets", []), record["tasks"], record["files"]
    of_tasks = [
        "head",
        *(kind for kind in ("settled", "statistics") if any(f.startswith(kind) for f in files)),
    ]
    needed = [f"{kind}/{task}.safetensors" for kind in of_tasks for task in tasks]
    needed += [f"directions/{task}.safetensors" for task in record["directions"]]
    needed += [MAGNITUDES] if record["directions"] else []
    require_files(folder, record, needed)
    classes = Counter(entry["task"] for entry in record["classes"])
    sizes: dict[str, int] = {}

    def read(name: str, shapes: Mapping[str, tuple[int | str, ...]]) -> dict[str, torch.Tensor]:
        tensors = read_tensors(folder / name)
        check_tensors(folder / name, tensors, shapes, sizes)
        return tensors

    directions, head, settled, statistics = {}, {}, {}, {}
    for task in record["directions"]:
        tensors = read(f"directions/{task}.safetensors", direction_shapes(task, targets))
        directions[task] = {
            target: Factors(tensors[f"{target}.up"], tensors[f"{target}.down"]) for target in targets
        }
    for task in tasks:
        rows: dict[str, tuple[int | str, ...]] = {
            "weight": (classes[task], "features"),
            "bias": (classes[task],),
        }
        head[task] = HeadBlock(**read(f"head/{task}.safetensors", rows))
        if "settled" in of_tasks:
            settled[task] = HeadBlock(**read(f"settled/{task}.safetensors", rows))
        if "statistics" in of_tasks:
            shapes = statistics_shapes(classes[task])
            statistics[task] = ClassStatistics(**read(f"statistics/{task}.safetensors", shapes))
    memory = read_tensors(folder / _MEMORY) if _MEMORY in files else {}
    require_finite(folder / _MEMORY, memory)
    magnitudes = {}
    if directions:
        magnitudes = read(MAGNITUDES, dict.fromkeys(directions, (len(targets),)))
    learned = ModelState(
        directions=directions,
        magnitudes={task: magnitudes[task] for task in directions},
        head=head,
        settled=settled,
        statistics=statistics,
        memory=memory,
    )
    return learned, record
