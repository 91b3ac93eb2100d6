"""Whether a chain of model folders is what its ledger says, from the files: hashes, and what had to stay frozen."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from sdlora.ledger import RECORD, JoinedRecords, file_sha256, names_own_files, read_own_record, record_hash
from sdlora.methods import METHODS
from sdlora.model_folder import MAGNITUDES
from sdlora.tensors import read_tensors


class _Fault(NamedTuple):
    """One thing that does not hold."""

    file: str
    """Name inside the model folder."""
    what: str


def faults_of_step(
    folder: Path,
    step: str,
    chain: JoinedRecords,
    *,
    before: Path | None,
    sha256: Callable[[Path], str] = file_sha256,
) -> Iterator[_Fault]:
    """Yield what in a model folder does not hold. Nothing if all does, and then its record is added to `chain`.

    Held are: the record is of `step`, names the step before and holds the hash of its record; the files are those of
    the record, with its hashes; none of them takes the place of what an earlier step froze (directions, trained rows of
    the head); the backbone stays; the magnitudes are those of the record, one for each direction and target.

    Args:
        folder: the model folder of `step`.
        chain: the records of all steps before, already verified.
        before: the model folder of the step before; None for step t00, which starts the chain.
        sha256: returns the hash of a file, for those who have it already.
    """
    earlier = chain.record
    try:
        own = read_own_record(folder)
        chain.add(folder, own)
    except FileNotFoundError:
        yield _Fault(RECORD, "the file is missing")
        return
    except ValueError as error:
        yield _Fault(RECORD, str(error).removeprefix(f"{folder / RECORD}: "))
        return
    if own["step"] != step:
        yield _Fault(RECORD, f"it is the record of {own['step']}, expected {step}")
    if before is None or earlier is None:
        if own["previous"] is not None:
            yield _Fault(RECORD, "it names a step before, but the chain begins here")
    else:
        expected = record_hash(before)
        if own["previous"] != expected:
            found = str(own["previous"])[:12]
            yield _Fault(RECORD, f"its step before is {found}, but that record's hash is {expected[:12]}")
        yield from _broken_continuity(own, earlier, step)
    yield from _changed_files(folder, own, sha256)
    if earlier is not None:
        yield from _moved(own, earlier)
        yield from _wrong_magnitudes(folder, own)


def _broken_continuity(own: dict[str, Any], earlier: dict[str, Any], step: str) -> Iterator[_Fault]:
    """Facts that only ever grow, or never change."""
    if own["backbone"] != earlier["backbone"]:
        yield _Fault(RECORD, "its backbone is not that of the step before")
    if names_own_files(own):  # it has no tasks and classes but its own
        return
    if own["tasks"] != [*earlier["tasks"], step]:
        yield _Fault(RECORD, f"its tasks are not those of the step before and {step}")
    if own["classes"][: len(earlier["classes"])] != earlier["classes"]:
        yield _Fault(RECORD, "the classes of the step before are not its first ones")


def _changed_files(folder: Path, own: dict[str, Any], sha256: Callable[[Path], str]) -> Iterator[_Fault]:
    """Files that are missing, too many, or not those whose hashes the record holds."""
    recorded = own["files"]
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {RECORD}
    yield from (_Fault(name, "the file is missing") for name in sorted(recorded.keys() - present))
    yield from (
        _Fault(name, "the record does not name this file") for name in sorted(present - recorded.keys())
    )
    for name in sorted(recorded.keys() & present):
        found = sha256(folder / name)
        if found != recorded[name]:
            yield _Fault(
                name,
                f"the file was changed; its sha256 is {found[:12]}, the record says {recorded[name][:12]}",
            )


def _moved(own: dict[str, Any], earlier: dict[str, Any]) -> Iterator[_Fault]:
    """Files of earlier tasks that had to stay what they were."""
    method = METHODS.get(own.get("method", ""))
    if method is None:
        yield _Fault(RECORD, f"its method {own.get('method')!r} is unknown")
        return
    # What the chain says has the step itself among its tasks by now.
    kept = [] if method.replaces else [f"directions/{task}.safetensors" for task in earlier["directions"]]
    kept += (
        []
        if method.joint
        else [f"head/{task}.safetensors" for task in earlier["tasks"] if task != own["step"]]
    )
    if not names_own_files(own):
        for name in kept:
            was, now = earlier["files"].get(name), own["files"].get(name)
            if was is not None and now != was:
                found = "is gone" if now is None else f"was {was[:12]} and is {now[:12]}"
                yield _Fault(name, f"it was frozen at an earlier step, and {found}")
        return
    present = {f"directions/{task}.safetensors" for task in own["directions"]}
    for name in kept:
        if name in own["files"]:
            yield _Fault(name, "it was frozen at an earlier step, and is here again")
        elif name.startswith("directions/") and name not in present:
            yield _Fault(RECORD, f"{name} was frozen at an earlier step, and is gone")


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
