"""The choices of a run: the whole of `params.yaml`, validated before any work begins."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self, TypeVar

from pydantic import TypeAdapter, ValidationError

from pipelines.project.errors import InputError
from pipelines.project.layout import PARAMS
from pipelines.project.param_checks import (
    JOINT_METHODS,
    adapter_faults,
    approval_faults,
    backbone_faults,
    fetch_faults,
    gate_faults,
    kind_faults,
    task_faults,
    worker_faults,
)
from pipelines.project.param_faults import type_fault, wrong_keys
from pipelines.project.settings import (
    Adapter,
    Approval,
    BackboneChoice,
    Data,
    Evaluation,
    Fetch,
    Gate,
    Section,
    Seed,
    Task,
    Training,
    Workers,
)
from pipelines.project.yaml_text import read_text, read_yaml

_T = TypeVar("_T")


class Params(Section):
    """Every choice of a run."""

    seed: Seed
    """start of every random choice in training"""
    fetch: Fetch
    """the data sets to bring; {} for own images only"""
    data: Data
    """how images are divided, checked and packed"""
    backbone: BackboneChoice
    """the frozen model under all tasks"""
    adapter: Adapter
    """what a task adds to it"""
    training: Training
    """how each task is fitted"""
    evaluation: Evaluation
    """how each step is tested"""
    gate: Gate
    """what a step must keep before the next one is learned"""
    approvals: Mapping[str, Approval]
    """steps that a person let through all the same; {} for none"""
    workers: Workers
    """machines that run the chain unattended"""
    tasks: Mapping[str, Task]
    """the tasks in order of arrival"""

    @classmethod
    def load(cls, path: Path = PARAMS) -> Self:
        """Read and validate the file. An `InputError` names the first fault and counts the others."""
        return cls.parse(read_text(path), origin=str(path))

    @classmethod
    def parse(cls, text: str, *, origin: str) -> Self:
        """Validate the text of a params file that is called `origin` in errors."""
        raw = read_yaml(text, origin=origin)
        faults = list(wrong_keys(raw))
        if not faults:
            try:
                params = cls.model_validate(raw)
            except ValidationError as error:
                raise _refusal(origin, type_fault(error, cls), error.error_count()) from None
            faults = [
                *fetch_faults(params.fetch),
                *backbone_faults(params.backbone),
                *adapter_faults(params.adapter),
                *gate_faults(params.gate, params.data, params.adapter),
                *task_faults(params.tasks),
                *kind_faults(params.tasks, params.adapter),
                *approval_faults(params.approvals, params.tasks),
                *worker_faults(params.workers),
            ]
        if faults:
            raise _refusal(origin, faults[0], len(faults))
        return params


def tasks_read(params: Params, task: str) -> list[str]:
    """Whose images the fit of a task reads: its own, and those of all before it where the method learns them all."""
    tasks = list(params.tasks)
    return tasks[: tasks.index(task) + 1] if params.adapter.method in JOINT_METHODS else [task]


def _refusal(origin: str, first: str, count: int) -> InputError:
    return InputError(f"{origin}: {first}" + (f" (and {count - 1} more)" if count > 1 else ""))


def read_params(key: str, kind: type[_T]) -> _T:
    """Return what `params.yaml` has under a dotted key, as a stage reads it.

    A stage names each key that it reads, so that its fingerprint has the settings of that key and of no other. The
    whole file was validated by `Params.load` when the stage began.

    Raises:
        InputError: there is no such key, or another value than the key takes.
    """
    value: Any = read_yaml(read_text(PARAMS), origin=str(PARAMS))
    try:
        for part in key.split("."):
            value = value[part]
        return TypeAdapter(kind).validate_python(value)
    except (KeyError, TypeError):
        raise InputError(
            f"{PARAMS}: {key}: the key is missing; restore the file from version control"
        ) from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join([key, *map(str, first["loc"])])
        raise InputError(f"{PARAMS}: {where}: {first['msg']}; correct it") from None
