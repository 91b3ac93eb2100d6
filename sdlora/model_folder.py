"""A model folder: what a step leaves behind, exact to the bit, and checked against its record when it is read."""

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypedDict

import torch

from sdlora.adapters import Factors
from sdlora.classifier import ModelState
from sdlora.drift import DRIFT_SHAPES, DriftMap
from sdlora.head import HeadBlock, HeadRows, QuadraticBlock
from sdlora.ledger import OWN_FILES, RECORD, Beside, file_sha256, read_record, record_bytes, require_files
from sdlora.records import Number, Rule, fault_of
from sdlora.statistics import ClassStatistics, statistics_shapes
from sdlora.tensor_checks import check_tensors, direction_shapes, require_finite
from sdlora.tensors import read_tensors, write_tensors
from sdlora.unknown import DISTANCES, FORM_SHAPES, SCORES, Quadratic, Rejection

MAGNITUDES, _CLASSIFIER, _MEMORY = "magnitudes.safetensors", "classifier.safetensors", "memory.safetensors"
_UNKNOWN = "unknown.safetensors"


def write_model(
    folder: Path, learned: ModelState, record: Mapping[str, Any], *, before: ModelState
) -> dict[str, Any]:
    """Write what a step has made, and its ledger record, into the existing `folder`. Return the record as written.

    Files: `directions/TASK.safetensors` (`TARGET.up`, `TARGET.down`), `head/TASK.safetensors` (`weight`, `bias`),
    `magnitudes.safetensors` (TASK: one number per target, in the record's order of targets). Where the head is made
    from statistics `statistics/TASK.safetensors` (the fields of `ClassStatistics`), `drift/TASK.safetensors` (those of
    `DriftMap`) if the features moved, and `classifier.safetensors` (the rows in use: `TASK.weight`, `TASK.bias`, and
    the other fields of `QuadraticBlock` where they are such). Where the method needs it `memory.safetensors`.
    Where a score for unknown images reads a form `unknown.safetensors` (the fields of `Quadratic`). `step.json` is
    `record` with the hash of every other file. What `before` holds already is not written again: it lies in the folder
    of an earlier step.
    """
    for kind, held, tensors in (
        ("directions", before.directions, {t: _named_factors(d) for t, d in learned.directions.items()}),
        ("head", before.head, {t: block._asdict() for t, block in learned.head.items()}),
        ("statistics", before.statistics, {t: s._asdict() for t, s in learned.statistics.items()}),
        ("drift", before.drift, {t: drift._asdict() for t, drift in learned.drift.items()}),
    ):
        for task, named in tensors.items():
            if task not in held or not _same(named, held[task]):
                write_tensors(folder / kind / f"{task}.safetensors", named)
    write_tensors(folder / MAGNITUDES, learned.magnitudes)
    if learned.settled:
        write_tensors(folder / _CLASSIFIER, _named_rows(learned.settled))
    if learned.memory:
        write_tensors(folder / _MEMORY, learned.memory)
    if learned.rejection and learned.rejection.form:
        write_tensors(folder / _UNKNOWN, learned.rejection.form._asdict())
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.safetensors"))
    hashes = {name: file_sha256(folder / name) for name in names}
    written = {**record, "format": OWN_FILES, "files": hashes}
    (folder / RECORD).write_bytes(record_bytes(written))
    return written


def _named_factors(direction: Mapping[str, Factors]) -> dict[str, torch.Tensor]:
    return {
        f"{target}.{name}": part
        for target, pair in direction.items()
        for name, part in pair._asdict().items()
    }


def _named_rows(blocks: Mapping[str, HeadRows]) -> dict[str, torch.Tensor]:
    return {
        f"{task}.{name}": part for task, block in blocks.items() for name, part in block._asdict().items()
    }


def _same(named: Mapping[str, torch.Tensor], held: Any) -> bool:  # noqa: ANN401 - one of four kinds
    """Return whether what is held of a task has these tensors, bit for bit."""
    known = _named_factors(held) if isinstance(held, Mapping) else held._asdict()
    return named.keys() == known.keys() and all(torch.equal(named[name], known[name]) for name in named)


def read_model(
    folder: Path, *, beside: Beside | None = None, statistics: bool = False
) -> tuple[ModelState, dict[str, Any]]:
    """Return what the steps up to this one have learned, and what their records say, as `read_record` does.

    Args:
        beside: where the folders of earlier steps are; None where they lie beside `folder`.
        statistics: whether class statistics and drift maps are read too, which only a new classifier is made from.

    Raises:
        FileNotFoundError: a folder, a record or a file that is needed is missing.
        ValueError: a file is not the one that its record names (its hash differs), or does not hold what it must.
    """
    record = read_record(folder, beside=beside)
    targets, tasks, files = record.get("targets", []), record["tasks"], record["files"]
    classes = Counter(entry["task"] for entry in record["classes"])
    step_classes = {task: tuple(labels) for task, labels in record.get("step_classes", {}).items()}
    seen = {**classes, **{task: len(labels) for task, labels in step_classes.items()}}
    sizes: dict[str, int] = {}

    def read(
        name: str, shapes: Mapping[str, tuple[int | str, ...]], others: Mapping[str, Any] | None = None
    ) -> dict[str, torch.Tensor]:
        path = require_files(folder, record, [name], beside=beside)[name]
        tensors = read_tensors(path)
        check_tensors(
            path, tensors, others if others and not tensors.keys() <= shapes.keys() else shapes, sizes
        )
        return tensors

    directions, head, known, drift = {}, {}, {}, {}
    for task in record["directions"]:
        tensors = read(f"directions/{task}.safetensors", direction_shapes(task, targets))
        directions[task] = {
            target: Factors(tensors[f"{target}.up"], tensors[f"{target}.down"]) for target in targets
        }
    for task in tasks:
        head[task] = HeadBlock(**read(f"head/{task}.safetensors", _linear_shapes(seen[task])))
        if statistics and f"statistics/{task}.safetensors" in files:
            shapes = statistics_shapes(seen[task])
            known[task] = ClassStatistics(**read(f"statistics/{task}.safetensors", shapes))
        if statistics and f"drift/{task}.safetensors" in files:
            drift[task] = DriftMap(**read(f"drift/{task}.safetensors", DRIFT_SHAPES))
    magnitudes = read(MAGNITUDES, dict.fromkeys(directions, (len(targets),))) if directions else {}
    learned = ModelState(
        directions=directions,
        magnitudes={task: magnitudes[task] for task in directions},
        head=head,
        settled=_rows_in_use(record, classes, read),
        statistics=known,
        drift=drift,
        memory=_memory(folder, record, beside=beside),
        rejection=_rejection(folder, record, read),
        step_classes=step_classes,
    )
    return learned, record


def _memory(folder: Path, record: Mapping[str, Any], *, beside: Beside | None) -> dict[str, torch.Tensor]:
    """Return what the method keeps for its next step. Nothing of most."""
    if _MEMORY not in record["files"]:
        return {}
    path = require_files(folder, record, [_MEMORY], beside=beside)[_MEMORY]
    memory = read_tensors(path)
    require_finite(path, memory)
    return memory


class _UnknownFacts(TypedDict):
    """What a record says of a step's threshold."""

    unknown: Annotated[str, Rule(SCORES.__contains__, f"one of {', '.join(SCORES)}")]
    unknown_threshold: Number


def _rejection(
    folder: Path, record: Mapping[str, Any], read: Callable[..., dict[str, torch.Tensor]]
) -> Rejection | None:
    """Return what a step calls unknown. None where it calls nothing so."""
    facts = record.get("freezing", {})
    if "unknown" not in facts:
        return None
    if fault := fault_of(facts, _UnknownFacts, "its freezing"):
        raise ValueError(f"{folder / RECORD}: {fault}; restore the file")
    reads = facts["unknown"] in DISTANCES
    form = Quadratic(**read(_UNKNOWN, FORM_SHAPES)) if reads else None
    return Rejection(facts["unknown"], facts["unknown_threshold"], form)


def _rows_in_use(
    record: Mapping[str, Any], classes: Mapping[str, int], read: Callable[..., dict[str, torch.Tensor]]
) -> dict[str, HeadRows]:
    """Return the rows that are used in place of the trained ones, by task. Nothing where the trained ones are."""
    tasks, files = record["tasks"], record["files"]
    if _CLASSIFIER in files:
        linear, quadratic = (
            {f"{task}.{name}": _row_shapes(classes[task])[name] for task in tasks for name in kind._fields}
            for kind in (HeadBlock, QuadraticBlock)
        )
        rows = read(_CLASSIFIER, linear, quadratic)
        kind: type[HeadRows] = HeadBlock if rows.keys() == linear.keys() else QuadraticBlock
        return {task: kind(*(rows[f"{task}.{name}"] for name in kind._fields)) for task in tasks}
    if any(name.startswith("settled/") for name in files):  # a record of format 1
        return {
            task: HeadBlock(**read(f"settled/{task}.safetensors", _linear_shapes(classes[task])))
            for task in tasks
        }
    return {}


def _linear_shapes(classes: int) -> dict[str, tuple[int | str, ...]]:
    return {"weight": (classes, "features"), "bias": (classes,)}


def _row_shapes(classes: int) -> dict[str, tuple[int | str, ...]]:
    return {
        **_linear_shapes(classes),
        "products": (classes, "principal directions", "features"),
        "offsets": (classes, "principal directions"),
    }
