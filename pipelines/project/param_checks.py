"""Checks of choices that must go together: between keys, between tasks, and with the names of files."""

import posixpath
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from pipelines.project.display import show_key, show_names, show_value
from pipelines.project.layout import RAW, RETIRED
from pipelines.project.settings import (
    Adapter,
    Approval,
    BackboneChoice,
    Cub200,
    Data,
    Fetch,
    Gate,
    ImageNetA,
    ImageNetR,
    Task,
    Workers,
)

_SDLORA = ("sdlora", "sdlora-rr", "sdlora-kd")
READ_BY = {
    "magnitude_start": _SDLORA,
    "magnitudes": _SDLORA,
    "initial_up": _SDLORA,
    "compress": _SDLORA,
    "penalty": ("olora", "nlora", "clora"),
}
"""Keys of `adapter` that are null by default, and the methods that read them."""
HEADS_OF = {"ncm": ("ncm", "lda", "rgda"), "joint": ("linear",)}
"""Methods that go with some heads only: one trains no rows that could be kept, one trains all rows together."""
JOINT_METHODS = {"joint"}
"""Methods that learn the images of all tasks so far with every task."""
TASK_KEY = r"t(0[1-9]|[1-9][0-9]{1,5})"
"""What a task may be called."""


def missing_source(source: str | Path, fetch: Fetch | None = None) -> str:
    """Return what to do about a source folder that is not there. `fetch` is what params.yaml brings, where that is
    known.
    """
    if str(source).startswith(f"{RETIRED}/"):
        return "it holds the receipt of deleted images; restore it from version control"
    folder, name = posixpath.split(posixpath.normpath(str(source)))
    if folder == str(RAW) and name in Fetch.names():
        if fetch is not None and fetch.entry(name) is None:
            return (
                f"{name} is not in fetch (retiring a task takes it out); copy the folder from a clone that has it, "
                "or add the entry"
            )
        return f"run `sdlora fetch {name} --out data/raw/{name}`, or `sdlora run`, which does"
    return "put images there, one folder for each class, or correct the path"


def fetch_faults(fetch: Fetch) -> Iterator[str]:
    """Yield a fault where an archive of one's own stands without the split `archive`, or that without it."""
    for name in Fetch.names():
        entry = fetch.entry(name)
        if not isinstance(entry, ImageNetR | ImageNetA | Cub200):
            continue
        for key in ("archive", "sha256"):
            value = getattr(entry, key)
            if entry.split == "archive" and value is None:
                what = (
                    "its path" if key == "archive" else f"what `sha256sum` prints of {entry.archive or 'it'}"
                )
                yield f"fetch.{name}.{key}: the split is your own archive, found nothing; write {what}"
            if entry.split != "archive" and value is not None:
                yield (
                    f"fetch.{name}.{key}: found {show_value(value)}, but the split {entry.split} does not read it;"
                    " remove it, or write split: archive"
                )


def backbone_faults(backbone: BackboneChoice) -> Iterator[str]:
    """Yield a fault where a local file and its hash do not come together: DVC cannot watch the file."""
    if backbone.weights and not backbone.sha256:
        yield (
            f"backbone.sha256: found null, expected the hash of {backbone.weights};"
            " write what `sha256sum` prints of it"
        )
    if backbone.sha256 and not backbone.weights:
        yield "backbone.sha256: found a hash without backbone.weights; name the file, or set it to null"


def adapter_faults(adapter: Adapter) -> Iterator[str]:
    """Yield choices that exclude each other."""
    heads = HEADS_OF.get(adapter.method, (adapter.head,))
    if adapter.head not in heads:
        expected = " or ".join(heads)
        yield f"adapter.head: found {show_value(adapter.head)}, expected {expected} with the method {adapter.method}"
    if adapter.temperature and adapter.head == "linear":
        yield ('adapter.temperature: found "auto", but the head linear is kept as it was trained; write null')
    if adapter.unknown and adapter.head == "linear":
        yield (
            f"adapter.unknown: found {show_value(adapter.unknown)}, but the head linear is kept as it was trained;"
            " write null"
        )
    if adapter.unknown in ("relative", "mahalanobis") and adapter.head == "aligned" and adapter.head in heads:
        yield (
            f"adapter.unknown: found {show_value(adapter.unknown)}, but logits of the head aligned are no distances; "
            "write max_logit, energy or null"
        )
    for key, methods in READ_BY.items():
        value = getattr(adapter, key)
        if value is not None and adapter.method not in methods:
            yield f"adapter.{key}: found {show_value(value)}, but {adapter.method} does not read it; write null"
    carried = adapter.magnitudes or ("carried" if adapter.formulation == "continuous" else "restarted")
    if adapter.method == "sdlora-kd" and carried == "restarted":
        yield (
            "adapter.magnitudes: sdlora-kd keeps what it absorbs in the earlier magnitudes, which restarted would "
            "throw away; write carried"
        )
    for start in adapter.rank_schedule:
        if not re.fullmatch(TASK_KEY, start):
            yield f"adapter.rank_schedule: found {show_value(start)}, expected a task's key; write t01, t02, ..."
    if (adapter.rank_schedule or adapter.method == "sdlora-rr") and "t01" not in adapter.rank_schedule:
        yield "adapter.rank_schedule: the first tasks have no rank; add t01"
    if adapter.rank_schedule.get("t01") == 0:
        yield "adapter.rank_schedule: found 0 for t01, which leaves no direction at all; write a rank of at least 1"
    if isinstance(adapter.targets, tuple) and len(set(adapter.targets)) < len(adapter.targets):
        yield f"adapter.targets: found {', '.join(adapter.targets)}; name each projection once"
    if adapter.formulation == "paper" and adapter.initial_up == "zero":
        yield (
            "adapter.initial_up: zero gives a direction without a norm, which the formulation paper divides by; "
            "write uniform or null"
        )


def task_faults(tasks: Mapping[str, Task]) -> Iterator[str]:
    """Yield what is wrong between the tasks: their keys, the chain of `after`, their sources and classes."""
    if not tasks:
        yield "tasks: no task is listed; write some with `sdlora plan FOLDER` or `sdlora add-task FOLDER`"
    before, number = "t00", 0
    owner: dict[str, str] = {}
    for position, (key, task) in enumerate(tasks.items(), start=1):
        where = f"tasks.{show_key(key)}"
        if not re.fullmatch(TASK_KEY, key):
            yield f"{where}: a task's key is t01, t02, ...; rename it, to t{position:02d} for example"
        elif int(key[1:]) <= number:
            yield f"{where}: stands after {before}; keep the tasks in ascending order"
        else:
            number = int(key[1:])
        if task.after != before:
            rule = (
                "the first task comes after t00" if before == "t00" else "each comes after the one above it"
            )
            yield f"{where}.after: found {show_value(task.after)}, expected {before}; {rule}"
        if task.retired and (task.source, task.manifest) != (f"{RETIRED}/{key}", None):
            yield (
                f"{where}.source: {show_value(task.source)} is where receipts of deleted images are, expected "
                f"{RETIRED}/{key} and no manifest; put back what `sdlora retire` wrote"
            )
        if not task.classes:
            yield f"{where}.classes: the list is empty; name at least one class folder"
        for name in task.classes:
            if owner.get(name) == key:
                yield f"{where}.classes: {show_value(name)} stands there twice; remove one"
            elif name in owner and task.kind != "more":
                yield (
                    f"{where}.classes: {show_value(name)} is already a class of {owner[name]}; remove one, or write "
                    "kind: more if these are more images of it"
                )
            owner.setdefault(name, key)
        before = key


def kind_faults(tasks: Mapping[str, Task], adapter: Adapter) -> Iterator[str]:
    """Yield a fault where the method learns each class once."""
    for key, task in tasks.items():
        if task.kind == "more" and adapter.method in JOINT_METHODS:
            yield (
                f"tasks.{show_key(key)}.kind: found more, but {adapter.method} learns all images at once, with one "
                "row for each class of a task; choose another adapter.method"
            )


def approval_faults(approvals: Mapping[str, Approval], tasks: Mapping[str, Task]) -> Iterator[str]:
    for key in approvals:
        if key not in tasks:
            yield f"approvals.{show_key(key)}: there is no such task; known are {show_names(tasks)}"


def gate_faults(gate: Gate, data: Data, adapter: Adapter) -> Iterator[str]:
    """Yield a fault where a gate is to measure on images that nobody holds out, or what nobody estimates."""
    if gate.drift is not None and adapter.head == "linear":
        yield (
            f"gate.drift: found {show_value(gate.drift)}, but the head linear keeps no statistics of classes, of which "
            "it is estimated; write null"
        )
    if gate.unknown is not None and adapter.unknown is None:
        yield (
            f"gate.unknown: found {show_value(gate.unknown)}, but adapter.unknown is null, so no image has a score; "
            "name one there, or write null"
        )
    if gate.on == "validation" and data.validation is None:
        yield "gate.on: found validation, but data.validation is null; write a share there, or gate.on: test"


def worker_faults(workers: Workers) -> Iterator[str]:
    """Yield times and places that do not go together."""
    if workers.push and not workers.branch:
        yield "workers.branch: found nothing (null), but workers.push names where to push it; name a branch"
    if workers.dead_after_seconds < 2 * workers.heartbeat_seconds:
        yield (
            f"workers.dead_after_seconds: found {workers.dead_after_seconds}, expected at least"
            f" {2 * workers.heartbeat_seconds}, two heartbeats: one may be late"
        )
