"""Model folders of a chain, written without a stage."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdlora.arrivals import rows_by_arrival
from sdlora.classifier import ModelState
from sdlora.ledger import RECORD, file_sha256, record_bytes, record_hash
from sdlora.model_folder import write_model
from sdlora.tensors import write_tensors

_BACKBONE = "1" * 64


def write_chain(home: Path, steps: Sequence[ModelState], method: str = "sdlora") -> Path:
    """Write t00 and a folder for each step, t01 on. Return the folder that they lie in."""
    first_folder(home)
    before = ModelState()
    for place, learned in enumerate(steps, start=1):
        write_step(home, f"t{place:02}", learned, before=before, method=method)
        before = learned
    return home


def first_folder(home: Path) -> None:
    """Write the record of step t00, without a backbone."""
    (home / "t00").mkdir(parents=True)
    record = {
        "step": "t00",
        "previous": None,
        "backbone": _BACKBONE,
        "tasks": [],
        "classes": [],
        "directions": [],
        "files": {},
    }
    (home / "t00" / RECORD).write_bytes(record_bytes(record))


def write_step(
    home: Path, step: str, learned: ModelState, *, before: ModelState, method: str = "sdlora"
) -> None:
    """Write the folder of a step that goes on from the one before it."""
    folder, after = home / step, f"t{int(step[1:]) - 1:02}"
    folder.mkdir()
    record = {
        **_said(learned, step, method),
        "after": after,
        "previous": record_hash(home / after),
        "classes": [entry for entry in _classes(learned) if entry["task"] == step],
    }
    if step in learned.step_classes:
        record["step_classes"] = {step: list(learned.step_classes[step])}
    write_model(folder, learned, record, before=before)


def write_old_folder(home: Path, step: str, learned: ModelState) -> None:
    """Write a folder of format 1, which holds all that was learned so far."""
    folder = home / step
    for task, direction in learned.directions.items():
        tensors = {
            f"{target}.{name}": part
            for target, pair in direction.items()
            for name, part in pair._asdict().items()
        }
        write_tensors(folder / f"directions/{task}.safetensors", tensors)
    for kind in ("head", "settled", "statistics"):
        for task, held in getattr(learned, kind).items():
            write_tensors(folder / f"{kind}/{task}.safetensors", held._asdict())
    write_tensors(folder / "magnitudes.safetensors", learned.magnitudes)
    files = {
        path.relative_to(folder).as_posix(): file_sha256(path)
        for path in sorted(folder.rglob("*.safetensors"))
    }
    record = {
        **_said(learned, step, "sdlora"),
        "previous": "0" * 64,
        "tasks": list(learned.head),
        "classes": _classes(learned),
        "files": files,
    }
    (folder / RECORD).write_bytes(record_bytes(record))


def _said(learned: ModelState, step: str, method: str) -> dict[str, Any]:
    targets = list(next(iter(learned.directions.values()))) if learned.directions else []
    return {
        "step": step,
        "backbone": _BACKBONE,
        "method": method,
        "targets": targets,
        "directions": list(learned.directions),
        "magnitudes": {task: round(alpha.mean().item(), 6) for task, alpha in learned.magnitudes.items()},
    }


def _classes(learned: ModelState) -> list[Mapping[str, Any]]:
    first = rows_by_arrival(learned.head, learned.step_classes, newest=False)
    owners = [task for task, block in first.items() for _ in block.bias]
    return [{"label": label, "name": f"class {label}", "task": task} for label, task in enumerate(owners)]
