"""Whether a chain of model folders is what its ledger says, from the files: hashes, and what had to stay frozen."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sdlora.ledger import RECORD, file_sha256, read_record, record_hash
from sdlora.methods import METHODS
from sdlora.model_folder import MAGNITUDES
from sdlora.tensors import read_tensors


class _Fault(NamedTuple):
    """One thing that does not hold."""

    file: str
    """Name inside the model folder."""
    what: str


def faults_of_step(folder: Path, step: str, before: Path | None) -> Iterator[_Fault]:
    """Yield what in a model folder does not hold. Nothing if all does.

    Held are: the record is of `step` and holds the hash of the record before; the files are those of the record, with
    its hashes; what was frozen before (directions, trained rows of the head, classes, backbone) is there unchanged; the
    magnitudes are those of the record, one for each direction and target.

    Args:
        folder: the model folder of `step`.
        before: that of the step before, already verified; None for step t00, which starts the chain.
    """
    try:
        record = read_record(folder)
    except FileNotFoundError:
        yield _Fault(RECORD, "the file is missing")
        return
    except ValueError as error:
        yield _Fault(RECORD, str(error).removeprefix(f"{folder / RECORD}: "))
        return
    if record["step"] != step:
        yield _Fault(RECORD, f"it is the record of {record['step']}, expected {step}")
    earlier: dict[str, Any] | None = None
    if before is None:
        if record["previous"] is not None:
            yield _Fault(RECORD, "it names a step before, but the chain begins here")
    else:
        earlier, expected = read_record(before), record_hash(before)
        if record["previous"] != expected:
            found = str(record["previous"])[:12]
            yield _Fault(RECORD, f"its step before is {found}, but that record's hash is {expected[:12]}")
        yield from _broken_continuity(record, earlier, step)
    yield from _changed_files(folder, record, before)
    if earlier is not None:
        yield from _moved(record, earlier)
        yield from _wrong_magnitudes(folder, record)


def _broken_continuity(record: dict[str, Any], earlier: dict[str, Any], step: str) -> Iterator[_Fault]:
    """Facts that only ever grow, or never change."""
    if record["backbone"] != earlier["backbone"]:
        yield _Fault(RECORD, "its backbone is not that of the step before")
    if record["tasks"] != [*earlier["tasks"], step]:
        yield _Fault(RECORD, f"its tasks are not those of the step before and {step}")
    if record["classes"][: len(earlier["classes"])] != earlier["classes"]:
        yield _Fault(RECORD, "the classes of the step before are not its first ones")


def _changed_files(folder: Path, record: dict[str, Any], before: Path | None) -> Iterator[_Fault]:
    """Files that are missing, too many, or not those whose hashes the record holds."""
    recorded = record["files"]
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {RECORD}
    yield from (_Fault(name, "the file is missing") for name in sorted(recorded.keys() - present))
    yield from (
        _Fault(name, "the record does not name this file") for name in sorted(present - recorded.keys())
    )
    for name in sorted(recorded.keys() & present):
        found = file_sha256(folder / name)
        if found != recorded[name]:
            where = _changed_tensor(folder / name, before / name if before else None)
            yield _Fault(name, f"{where}; its sha256 is {found[:12]}, the record says {recorded[name][:12]}")


def _changed_tensor(path: Path, earlier: Path | None) -> str:
    """Return which tensor of a changed file differs from that file of the step before, as far as can be said."""
    try:
        tensors = read_tensors(path)
    except ValueError:
        return "the file is damaged"
    if earlier is None or not earlier.is_file():
        return "the file was changed"
    held = read_tensors(earlier)
    differing = [
        name
        for name in sorted(tensors.keys() | held.keys())
        if name not in tensors or name not in held or not torch.equal(tensors[name], held[name])
    ]
    more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
    return f"the tensor {differing[0]}{more} was changed" if differing else "the file was changed"


def _moved(record: dict[str, Any], earlier: dict[str, Any]) -> Iterator[_Fault]:
    """Files of earlier tasks that had to stay what they were, by the hashes of both records."""
    method = METHODS.get(record.get("method", ""))
    if method is None:
        yield _Fault(RECORD, f"its method {record.get('method')!r} is unknown")
        return
    kept = [] if method.replaces else [f"directions/{task}.safetensors" for task in earlier["directions"]]
    kept += [] if method.joint else [f"head/{task}.safetensors" for task in earlier["tasks"]]
    for name in kept:
        was, now = earlier["files"].get(name), record["files"].get(name)
        if was is not None and now != was:
            found = "is gone" if now is None else f"was {was[:12]} and is {now[:12]}"
            yield _Fault(name, f"it was frozen at an earlier step, and {found}")


def _wrong_magnitudes(folder: Path, record: dict[str, Any]) -> Iterator[_Fault]:
    """Magnitudes that are not those of the record, or not one for each direction and target."""
    path = folder / MAGNITUDES
    if not path.is_file():  # named as missing already, if the record has it
        return
    try:
        found = read_tensors(path)
    except ValueError:
        return
    directions, targets = record["directions"], record.get("targets", [])
    if sorted(found) != sorted(directions):
        yield _Fault(
            MAGNITUDES, f"it is of {', '.join(sorted(found))}, the directions are {', '.join(directions)}"
        )
    means = {task: round(alpha.mean().item(), 6) for task, alpha in found.items()}
    for task, alpha in found.items():
        if alpha.shape != (len(targets),):
            yield _Fault(MAGNITUDES, f"{task} has {alpha.numel()} magnitudes for {len(targets)} targets")
        elif means[task] != record.get("magnitudes", {}).get(task):
            yield _Fault(MAGNITUDES, f"{task} has the mean {means[task]}, the record says otherwise")
