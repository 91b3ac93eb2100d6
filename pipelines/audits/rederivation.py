"""`sdlora audit verify --recompute` and `--retrain`: run stages again from their inputs, elsewhere, and compare."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from pipelines.data.pins import is_here
from pipelines.ledger.receipts import receipt_of
from pipelines.project.environment import OUTCOME_FILE, STAGE_SOCKET
from pipelines.project.errors import FaultError, InputError
from pipelines.project.files import read_json
from pipelines.project.fingerprints import program_fingerprint, stage_fingerprint
from pipelines.project.layout import (
    ARTIFACTS,
    CODE,
    DVC_YAML,
    LOCK,
    PARAMS,
    PINNED,
    TRAINED,
    StageName,
    read_beside_deps,
)
from pipelines.project.params import Params, tasks_read
from pipelines.project.provenance import library_versions
from pipelines.project.yaml_text import read_text, read_yaml
from pipelines.runtime.fork_server import STAGE_ENTRY, fork_server
from pipelines.runtime.progress import progress
from pipelines.runtime.stage_outcome import GATE, read_outcome
from pipelines.versioning.artifacts import ArtifactStore, Lock, read_lock

_PRELOADED_FROM = 3
"""Stages for which loading the libraries once is worth a process."""


def derived_stages(params: Params) -> list[StageName]:
    """Return the stages that follow without training from what a chain has: all but fits, backbone and downloads.

    A split follows where its source is here. What is given back for deleted images follows from nothing.
    """
    names = [StageName("start")]
    for key, task in params.tasks.items():
        if not task.retired:
            source = Path(task.source)
            names += [StageName("split", key)] if source.is_dir() and is_here(source) else []
            names += [StageName("freeze", key)]
        names += [StageName("evaluate", key), StageName("gate", key)]
    return [*names, StageName("report")]


def steps_to_train(params: Params, asked: Sequence[str]) -> list[str]:
    """Return the steps that `--retrain` names; `all` for all whose images are there. An `InputError` refuses others."""
    if "all" in asked:
        return [key for key, task in params.tasks.items() if not task.retired]
    for step in asked:
        if step not in params.tasks:
            raise InputError(f"--retrain {step}: there is no such task; known are {', '.join(params.tasks)}")
        if params.tasks[step].retired:
            raise InputError(
                f"--retrain {step}: its images were deleted ({receipt_of(step)}), so it cannot be learned again; "
                "choose another step"
            )
    return list(asked)


def run_again(params: Params, stages: Sequence[StageName], *, notes: Path) -> None:
    """Run stages again, each in a project of its own. A `FaultError` names the first file that comes out another.

    Bytes repeat on one kind of machine, with the same libraries (docs/explanation/auditing.md); the error says which
    were others. What a call has found the same is noted, so that the same call goes on from there when it was ended.

    Args:
        params: The parameters of the chain, which was verified.
        stages: What to run.
        notes: A folder for the notes.
    """
    if not params.training.deterministic:
        raise InputError(
            "training.deterministic is false in params.yaml, so no two runs of a stage are alike"
        )
    lock = read_lock(params)
    done = {stage: notes / _key_of(lock, stage) for stage in stages}
    left = sum(not note.exists() for note in done.values())
    with TemporaryDirectory(prefix="sdlora-again-") as scratch, _preloaded(left):
        place = ArtifactStore(lock, Path(scratch))
        with progress("again", total=len(stages), unit="stages") as bar:
            for number, (stage, note) in enumerate(done.items(), start=1):
                if not note.exists():
                    _require_code(place, stage)
                    _run_and_compare(params, place, stage)
                    note.touch()
                bar.update(number, stage=str(stage))


@contextlib.contextmanager
def kept_notes() -> Iterator[Path]:
    """Give a folder for notes that stays until the work is whole: outside of the project, which is not believed."""
    folder = Path(tempfile.gettempdir()) / f"sdlora-again-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    state = folder.lstat()
    if folder.is_symlink() or state.st_uid != os.getuid() or state.st_mode & 0o077:
        raise InputError(
            f"{folder}: others may write there; remove it, or set TMPDIR to a folder of your own"
        )
    own = folder / hashlib.sha256(str(Path.cwd()).encode()).hexdigest()[:16]
    own.mkdir(exist_ok=True)
    yield own
    shutil.rmtree(own)


@contextlib.contextmanager
def _preloaded(stages: int) -> Iterator[None]:
    """Load the libraries once for many stages."""
    if stages < _PRELOADED_FROM:
        yield
        return
    with fork_server(STAGE_ENTRY, STAGE_SOCKET):
        yield


def _key_of(lock: Lock, stage: StageName) -> str:
    """Return a hash of all that decides whether a stage gives the same again."""
    name = str(stage)
    if name not in lock.commands:
        raise FaultError(f"{LOCK}: it does not know {name}; run `sdlora run`")
    outs = {path: lock.outs[path] for path in lock.made[name]}
    entry = [name, lock.commands[name], lock.deps[name], lock.parameters[name], outs]
    text = json.dumps([entry, program_fingerprint(), library_versions()], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _require_code(place: ArtifactStore, stage: StageName) -> None:
    """Refuse a stage that other code has made than is installed here."""
    path = CODE / stage.kind
    if str(CODE) in place.lock.outs:
        made_by = place.find(CODE) / stage.kind
        if not made_by.is_file() or made_by.read_text(encoding="utf-8") != stage_fingerprint(stage.kind).text:
            raise FaultError(
                f"{path}: {stage} was made by other code than is installed here, so it does not follow; install the "
                "version that made it"
            )


def _run_and_compare(params: Params, place: ArtifactStore, stage: StageName) -> None:
    """Run a stage in a project that holds what it reads and nothing else, and compare all that it leaves."""
    with TemporaryDirectory(prefix="sdlora-again-") as folder:
        project = Path(folder)
        for path in _read_by(params, place.lock, stage):
            (project / path).parent.mkdir(parents=True, exist_ok=True)
            (project / path).symlink_to(place.find(path).resolve())
        if PINNED.is_dir():  # each shard is compared with its hash before it is read
            (project / PINNED.parent).mkdir(exist_ok=True)
            (project / PINNED).symlink_to(PINNED.resolve())
        shutil.copy(DVC_YAML, project)
        _write_params(project / PARAMS)
        _run(project, stage, _arguments(place.lock, stage))
        for out in place.lock.made[str(stage)]:
            _compare(project, place, stage, Path(out))


def _read_by(params: Params, lock: Lock, stage: StageName) -> set[Path]:
    """Return the outputs and source folders that a stage reads. Not its code, which is installed."""
    found: set[Path] = set()
    for path in map(Path, lock.deps[str(stage)]):
        if path.is_relative_to(CODE):
            continue
        within = {out for out in map(Path, lock.outs) if path.is_relative_to(out)}
        below = {out for out in map(Path, lock.outs) if out.is_relative_to(path)}
        found |= within or (below if path.is_relative_to(ARTIFACTS) else set()) or {path}
    if stage.item and stage.kind in ("fit", "freeze"):
        tasks = tasks_read(params, stage.item) if stage.kind == "fit" else [stage.item]
        found |= {TRAINED / task for task in tasks}
    return found | set(read_beside_deps(stage, list(params.tasks)))


def _write_params(path: Path) -> None:
    """Write the parameters as they are, but for the store of checkpoints: from one nothing would be learned again."""
    from ruamel.yaml import YAML

    raw = read_yaml(read_text(PARAMS), origin=str(PARAMS))
    raw["training"]["checkpoint_store"] = None
    YAML(typ="safe", pure=True).dump(raw, path)


def _arguments(lock: Lock, stage: StageName) -> list[str]:
    """Return what a stage was called with. Nothing but a call of that stage, on files of the project, is run again."""
    program, *arguments = shlex.split(lock.commands[str(stage)]) or [""]
    inside = not any(Path(word).is_absolute() or ".." in Path(word).parts for word in arguments)
    own = [part for part in stage if part is not None]
    if program != "sdlora" or arguments[: len(own)] != own or not inside:
        raise FaultError(f"{LOCK}: the command of {stage} is none of this program's on this project's files")
    return arguments


def _run(project: Path, stage: StageName, arguments: list[str]) -> None:
    """Run a stage in a project of its own: nothing of the one that is audited is written."""
    command = [sys.executable, "-P", "-m", "pipelines", *arguments]
    outcome = project / "outcome.json"
    settings = {key: value for key, value in os.environ.items() if key != "PREFECT_API_URL"}
    done = subprocess.run(
        command,
        cwd=project,
        env={**settings, OUTCOME_FILE: str(outcome)},
        stdout=subprocess.DEVNULL,
        # The others are shorter than what there is to say of them.
        stderr=None if stage.kind == "fit" else subprocess.PIPE,
    )
    if done.returncode:
        ended = read_outcome(outcome)
        if ended is not None and ended.kind == GATE:
            raise FaultError(f"{stage}: run again it does not let the step through ({ended.line})")
        sys.stderr.buffer.write(done.stderr or b"")
        raise InputError(f"{stage} could not be run again ({ended.line if ended else 'it was killed'})")


def _compare(project: Path, place: ArtifactStore, stage: StageName, path: Path) -> None:
    """Compare an output that was made again with the one that was there."""
    was, now = place.find(path), project / path
    names = sorted(
        {
            file.relative_to(root).as_posix()
            for root in (was, now)
            for file in (root.rglob("*") if root.is_dir() else [root])
            if file.is_file()
        }
    )
    for name in names:
        old, new = was / name, now / name
        if not old.is_file() or not new.is_file() or old.read_bytes() != new.read_bytes():
            learned = "learned" if stage.kind in ("fit", "freeze") else "made"
            raise FaultError(f"{path / name}: {learned} again it is another{_because(was)}")


def _because(folder: Path) -> str:
    """Return which libraries are other ones than those that made a fit or a step, and whether machines shared it."""
    records = [folder / name for name in ("fit.json", "step.json") if (folder / name).is_file()]
    if not records:
        return ""
    record, here = read_json(records[0]), library_versions()
    versions = record["versions"]
    others = [
        f"{name} {versions.get(name)}, here {version}"
        for name, version in here.items()
        if versions.get(name) != version
    ]
    if "processes" in record:
        others.append(f"{record['processes']} processes shared the fit")
    return f" ({'; '.join(others)})" if others else ""
