"""Whether dvc.lock says of finished stages what dvc.yaml, params.yaml, the records and the source folders say."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipelines.data.packed import SampleRow
from pipelines.data.pins import is_here
from pipelines.data.source_files import Found
from pipelines.data.sources import task_images
from pipelines.ledger.verdicts import in_a_verdict
from pipelines.project.errors import FaultError
from pipelines.project.layout import CODE_STAGE, DVC_YAML, GATES, LOCK, MODELS, PARAMS, RETIRED, StageName
from pipelines.project.params import Params
from pipelines.project.settings import Gate
from pipelines.project.yaml_text import value_at
from pipelines.versioning.artifacts import ArtifactStore, Lock
from pipelines.versioning.stores import DeclaredStage
from sdlora.ledger import classes_of_step


def check_declared(lock: Lock, stages: Iterable[DeclaredStage]) -> None:
    """Check that dvc.lock has every stage as dvc.yaml and params.yaml have it: command, files, parameters."""
    for stage in stages:
        name = stage.name
        if name not in lock.commands:
            raise FaultError(f"{LOCK}: it does not know {name}; run `sdlora run`")
        if stage.command != lock.commands[name]:
            raise FaultError(f"{DVC_YAML}: the command of {name} is not the one that {LOCK} says was run")
        if {*stage.deps} - {str(PARAMS)} != {*lock.deps[name]} or not all(
            out in lock.outs for out in stage.outs
        ):
            raise FaultError(f"{DVC_YAML}: {name} reads or leaves other files than {LOCK} says")
        declared = {key: value for values in stage.params for key, value in values.items()}
        made_with = lock.parameters[name]
        for key in sorted({*declared, *made_with}):
            if declared.get(key) != made_with.get(key):
                found, was = (_short(values.get(key)) for values in (declared, made_with))
                raise FaultError(
                    f"{PARAMS}: {key} is {found}, but {LOCK} says that {name} was run with {was}; `sdlora run` "
                    "brings it up to date"
                )


def check_recorded(lock: Lock, step: str, record: Mapping[str, Any], verdict: Mapping[str, Any]) -> None:
    """Check that the parameters that dvc.lock has of a step's stages are those of its record and its verdict."""
    kinds = ("split", "fit", "freeze", "gate")
    read = {kind: lock.parameters.get(str(StageName(kind, step)), {}) for kind in kinds}
    for key, value in [*read["fit"].items(), *read["freeze"].items()]:
        known = value_at(record["parameters"], tuple(key.split(".")))
        if _without_nulls(known) != _without_nulls(value):
            raise FaultError(
                f"{MODELS / step}/step.json: {key} is {_short(known)}, but {_short(value)} in {LOCK}"
            )
    task = value_at(read["split"], (f"tasks.{step}",))
    kind, classes = value_at(task, ("kind",)) or "classes", value_at(task, ("classes",)) or []
    if (
        value_at(task, ("after",)) != ["t00", *record["tasks"]][-2]
        or (kind == "more") != (step in record.get("step_classes", {}))
        or not are_classes_of(classes, step, record)
    ):
        raise FaultError(f"{MODELS / step}/step.json: its classes, or its step before, are others in {LOCK}")
    limits, approved = value_at(read["gate"], ("gate",)), verdict["approved"]
    if _as_in_a_verdict(limits) != verdict["limits"]:
        raise FaultError(
            f"{GATES / step}/verdict.json: gate is {_short(verdict['limits'])}, but {_short(limits)} in {LOCK}"
        )
    approval = value_at(read["gate"], ("approvals", step)) or value_at(read["gate"], (f"approvals.{step}",))
    if approved and approved != {key: value_at(approval, (key,)) for key in ("by", "why")}:
        raise FaultError(f"{GATES / step}/verdict.json: {LOCK} knows no such approval of {step}")


def are_classes_of(names: Sequence[str], step: str, record: Mapping[str, Any]) -> bool:
    """Return whether a step saw these classes: those that arrived with it stand in the order of their labels."""
    saw = [entry["name"] for entry in classes_of_step(record, step)]
    new = [entry["name"] for entry in record["classes"] if entry["task"] == step]
    return sorted(names) == sorted(saw) and [name for name in names if name in new] == new


def _without_nulls(value: object) -> object:
    """Return a section without its keys that are null: a record leaves out those that came later than the record."""
    if isinstance(value, Mapping):
        return {key: found for key, found in value.items() if found is not None}
    return value


def _as_in_a_verdict(limits: object) -> object:
    """Return what dvc.lock has of a gate in the form of a verdict. As it is where it is none of a gate."""
    try:
        return in_a_verdict(Gate.model_validate(limits))
    except ValidationError:
        return limits


def check_read(place: ArtifactStore, stages: Iterable[DeclaredStage]) -> None:
    """Check that what stages read, by dvc.lock, is what others made, or what lies in the workspace if it is there."""
    for stage in stages:
        if stage.name == CODE_STAGE:  # it hashes the program, of which the fingerprints say what counts
            continue
        for path, md5 in place.lock.deps.get(stage.name, {}).items():
            if path.startswith(f"{RETIRED}/"):  # a receipt, of which more than its bytes is checked
                continue
            made = place.md5(path)
            if (made or place.workspace_md5(path) or md5) != md5:
                than = "the one that was made" if made else "the one that is there"
                raise FaultError(f"{LOCK}: {stage.name} read another {path} than {than}")


def check_source(place: ArtifactStore, params: Params, step: str, samples: Iterable[SampleRow]) -> None:
    """Check that the images of a step are those of its source, byte for byte, where the source is here."""
    task = params.tasks[step]
    source = Path(task.source)
    if task.retired or not source.is_dir() or not is_here(source):
        return
    listed = task_images(source, task.classes, manifest=task.manifest, data=params.data)
    images = {f"{step}/{found.part}/{found.name}/{found.file}": found for found in listed}
    for sample in samples:
        found = images.get(sample.id)
        if found is None or not _is_picture(place, found, sample.sha256):
            where = source if found is None else found.shown
            raise FaultError(f"{where}: {sample.id} of the ledger is not the picture there")


def _is_picture(place: ArtifactStore, found: Found, sha256: str) -> bool:
    """Return whether an image of a source has a hash. That of a file may have been taken ahead."""
    return found.is_of(sha256) if found.shard else place.hashes.sha256(found.path) == sha256


def _short(value: object) -> str:
    """Return a value as JSON, on one line that is not too long."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
