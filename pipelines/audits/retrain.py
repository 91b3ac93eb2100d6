"""`sdlora audit verify --retrain`: learn a step again from its inputs, and compare what comes out."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from pipelines.ledger.receipts import receipt_of
from pipelines.project.errors import FaultError, InputError
from pipelines.project.files import read_json
from pipelines.project.layout import DVC_YAML, FITS, LOCK, MODELS, PARAMS, SPLITS, TRAINED, StageName
from pipelines.project.params import Params
from pipelines.project.provenance import library_versions
from pipelines.project.yaml_text import read_text, read_yaml
from pipelines.versioning.artifacts import ArtifactStore, Lock, read_lock


def retrain(step: str) -> float:
    """Run `fit` and `freeze` of a step again, elsewhere. A `FaultError` names the first file that differs.

    Bytes repeat on one kind of machine, with the same libraries (docs/explanation/auditing.md); the error
    says which were others.
    Returns the seconds that it took.
    """
    from pipelines.project.method_settings import tasks_read

    params = Params.load()
    if step not in params.tasks:
        raise InputError(f"--retrain {step}: there is no such task; known are {', '.join(params.tasks)}")
    if params.tasks[step].retired:
        raise InputError(
            f"--retrain {step}: its images were deleted ({receipt_of(step)}), so it cannot be learned again; choose "
            "another step"
        )
    if not params.training.deterministic:
        raise InputError(
            "--retrain: training.deterministic is false in params.yaml, so no two fits are alike"
        )
    started = time.monotonic()
    with TemporaryDirectory(prefix="sdlora-retrain-") as scratch:
        (Path(scratch) / "found").mkdir()
        place = ArtifactStore(read_lock(params), Path(scratch) / "found")
        project = Path(scratch) / "project"
        before = params.tasks[step].after
        for path in {
            SPLITS / step,
            *(MODELS / name for name in ("t00", before)),
            *(TRAINED / name for name in tasks_read(params, step)),
        }:
            (project / path).parent.mkdir(parents=True, exist_ok=True)
            (project / path).symlink_to(place.find(path).resolve())
        shutil.copy(DVC_YAML, project)
        _write_params(project / PARAMS)
        for kind, made in (("fit", FITS / step), ("freeze", MODELS / step)):
            _run(project, _arguments(place.lock, StageName(kind, step)))
            _compare(project, place, made)
    return time.monotonic() - started


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
    if program != "sdlora" or arguments[:2] != list(stage) or not inside:
        raise FaultError(f"{LOCK}: the command of {stage} is none of this program's on this project's files")
    return arguments


def _run(project: Path, arguments: list[str]) -> None:
    """Run a stage in a project of its own: nothing of the one that is audited is written."""
    command = [sys.executable, "-P", "-m", "pipelines", *arguments]
    settings = {key: value for key, value in os.environ.items() if key != "PREFECT_API_URL"}
    done = subprocess.run(command, cwd=project, env=settings, stdout=subprocess.DEVNULL)
    if done.returncode:
        raise InputError(f"{arguments[0]} {arguments[1]} could not be run again; its reason stands above")


def _compare(project: Path, place: ArtifactStore, path: Path) -> None:
    """Compare a folder that was made again with the one that was there."""
    was, now = place.find(path), project / path
    names = sorted(
        {
            file.relative_to(root).as_posix()
            for root in (was, now)
            for file in root.rglob("*")
            if file.is_file()
        }
    )
    for name in names:
        old, new = was / name, now / name
        if not old.is_file() or not new.is_file() or old.read_bytes() != new.read_bytes():
            raise FaultError(f"{path}/{name}: learned again it is another{_because(was)}")


def _because(folder: Path) -> str:
    """Return which libraries are other ones than those that made a fit or a step."""
    record = read_json(folder / ("fit.json" if (folder / "fit.json").is_file() else "step.json"))
    versions = record["versions"]
    here = library_versions()
    others = [
        f"{name} {versions.get(name)}, here {version}"
        for name, version in here.items()
        if versions.get(name) != version
    ]
    return f" ({'; '.join(others)})" if others else ""
