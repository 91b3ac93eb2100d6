"""Edits of the `tasks` block of `params.yaml`. Every byte outside the edited lines stays as it is."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.data.manifests import manifests
from pipelines.data.pins import pin
from pipelines.data.shards import shards_of
from pipelines.data.sources import class_names, unread_tables
from pipelines.project.display import as_line
from pipelines.project.errors import InputError
from pipelines.project.files import write_whole
from pipelines.project.layout import PARAMS
from pipelines.project.names import manifest_fault, source_fault
from pipelines.project.params import Params
from pipelines.project.params_text import task_line, with_block, with_line
from pipelines.project.settings import Kind, Task
from pipelines.project.yaml_text import read_text, read_yaml


def plan(
    source: str | Path,
    *,
    tasks: int | None = None,
    classes_per_task: int | None = None,
    seed: int = 1993,
    path: Path = PARAMS,
    force: bool = False,
) -> list[str]:
    """Write a `tasks` block for all classes of a source, in place of the present one. Return lines to print.

    The order is numpy's legacy permutation of the naturally sorted names, as in the papers' code. Exactly one
    of `tasks` and `classes_per_task` is given; sizes differ by one at most, the larger first. A block of
    which a step has been computed is replaced only by `force`.
    """
    folder, manifest = inside_project(source, path)
    names = class_names(path.parent / folder, manifest=manifest, shown=folder)
    sizes = task_sizes(len(names), tasks=tasks, classes_per_task=classes_per_task)
    text = read_text(path)
    old = read_yaml(text, origin=str(path)).get("tasks")
    if not force:
        refuse_computed(old if isinstance(old, dict) else {}, path)

    block = chained(shuffled(names, seed), sizes, source=folder, manifest=manifest)
    replace_file(path, with_block(text, block), expected=block)
    lines = [f"{path}: {len(names)} classes of {folder} in {len(sizes)} tasks, in the order of seed {seed}"]
    if sizes[0] != sizes[-1]:
        more = sizes.count(sizes[0])
        lines.append(
            f"{len(names)} classes do not divide into {len(sizes)} equal tasks:"
            f" the first {more} {'has' if more == 1 else 'have'} {sizes[0]}, the others {sizes[-1]}"
        )
    return lines + [task_line(key, task) for key, task in block.items()] + _unread(path, folder, manifest)


def add_task(
    source: str | Path,
    *,
    classes: Sequence[str] | None = None,
    kind: Kind = "classes",
    path: Path = PARAMS,
) -> list[str]:
    """Append the next task: the given classes of a source, all that are new, or all where the kind is `more`. Return
    lines to print.
    """
    key, task, known, text = next_task(source, classes=classes, kind=kind, path=path)
    replace_file(path, text, expected={**known, key: task})
    held = {name for earlier in known.values() for name in earlier.classes}
    again = sum(name in held for name in task.classes)
    return [
        f"{path}: added {key}, {len(task.classes)} {'class' if len(task.classes) == 1 else 'classes'}"
        + (f", {again} of them known" if kind == "more" else ""),
        task_line(key, task),
        *([] if classes or kind == "more" else _left_out(path, task, known)),
        *_unread(path, task.source, task.manifest),
    ]


def _left_out(path: Path, task: Task, known: Mapping[str, Task]) -> list[str]:
    """Return a line about classes of a task's source that are known from elsewhere, which the task leaves out."""
    held = {name for earlier in known.values() for name in earlier.classes}
    held -= _taken_from(known, task.source, task.manifest)
    names = class_names(path.parent / task.source, manifest=task.manifest, shown=task.source)
    left = [name for name in names if name in held]
    if not left:
        return []
    some = ", ".join(left[:10]) + (f" and {len(left) - 10} more" if len(left) > 10 else "")
    source = Path(task.source, task.manifest or "").as_posix()
    remedy = f"`sdlora add-task {source} --kind more` learns these images of them too"
    return [as_line(f"left out as known: {some}; {remedy}")]


def _taken_from(known: Mapping[str, Task], source: str, manifest: str | None) -> set[str]:
    """Return the classes that tasks have of a source: more images of a class lie elsewhere."""
    there = (task for task in known.values() if (task.source, task.manifest) == (source, manifest))
    return {name for task in there for name in task.classes}


def pin_source(urls: Sequence[str], folder: Path, path: Path = PARAMS) -> list[str]:
    """Read shards that are elsewhere, and pin them in a folder of the project. Return lines to print."""
    source, _ = inside_project(folder, path)
    if fault := source_fault(source):
        raise InputError(f"{source}: it {fault}")
    return pin(urls, Path(source))


def _unread(path: Path, folder: str, manifest: str | None) -> list[str]:
    """Return a line about tables in a source of class folders, which nobody reads."""
    source = path.parent / folder
    listed = manifests(source, manifest) or shards_of(source, manifest)
    tables = [] if listed else unread_tables(source)
    if not tables:
        return []
    return [
        as_line(
            f"warning: {folder}/{tables[0].name}: a table that nobody reads, because the folders say the classes; "
            "give the table itself if it should"
        )
    ]


def next_task(
    source: str | Path,
    *,
    classes: Sequence[str] | None = None,
    kind: Kind = "classes",
    path: Path = PARAMS,
) -> tuple[str, Task, Mapping[str, Task], str]:
    """Return the task that a source would be: its key, itself, the tasks before it, and the text of params.yaml with
    it.
    """
    folder, manifest = inside_project(source, path)
    text = read_text(path)
    known = known_tasks(text, path)
    names = class_names(path.parent / folder, manifest=manifest, shown=folder)
    owner = {name: key for key, task in known.items() for name in task.classes}
    taken = owner if kind == "classes" else _taken_from(known, folder, manifest)
    chosen = list(classes or (name for name in names if name not in taken))
    there = set(names)
    for name in chosen:
        if name not in there:
            shown = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
            raise InputError(f"{folder}: there is no class {name!r}; classes there are {shown}")
        if name in owner and kind != "more":
            raise InputError(
                f"class {name!r} is already in {owner[name]} of {path}; leave it out, or add --kind more if these are "
                "more images of it"
            )
    if not chosen:
        remedy = "" if kind == "more" else ", but with --kind more, if these are more images of them"
        raise InputError(f"{folder}: all {len(names)} classes are in {path} already; nothing to add{remedy}")

    last = list(known)[-1] if known else "t00"
    key = f"t{int(last[1:]) + 1:02d}"
    task = _task(last, folder, manifest, chosen).model_copy(update={"kind": kind})
    return key, task, known, with_line(text, key, task) if known else with_block(text, {key: task})


def known_tasks(text: str, path: Path) -> Mapping[str, Task]:
    """Return the tasks of a params file. None where the block is absent or empty, the rest of the file being checked
    later.
    """
    raw = read_yaml(text, origin=str(path)).get("tasks")
    return Params.parse(text, origin=str(path)).tasks if raw else {}


def inside_project(source: str | Path, path: Path) -> tuple[str, str | None]:
    """Return the source folder as `params.yaml` names it, relative to the file's own folder and inside it. Its
    manifest.

    A manifest that stands for its folder is one by its name; in every other case the manifest is None.
    """
    if re.match(r"[a-z0-9+]+:/", str(source)):
        url = re.sub(":/+", "://", str(source), count=1)  # of which a path keeps one stroke
        raise InputError(
            f"{url}: a URL; `sdlora pin URL data/NAME` reads it and notes what was there, then give data/NAME"
        )
    manifest = None
    if not manifest_fault(Path(source).name) and not Path(source).is_dir():
        manifest, source = Path(source).name, Path(source).parent
    folder = Path(os.path.relpath(source, path.parent)).as_posix()
    if folder == "." or folder.startswith(".."):
        raise InputError(f"{source}: not a folder inside the project; copy or link the images into data/raw")
    return folder, manifest


def task_sizes(classes: int, *, tasks: int | None, classes_per_task: int | None) -> list[int]:
    """Sizes as even as possible, the larger ones first. `classes_per_task` is the most that one may have."""
    if (tasks is None) == (classes_per_task is None):
        raise InputError("plan: give either the number of tasks or the classes per task")
    asked = tasks if tasks is not None else classes_per_task
    assert asked is not None
    if not 1 <= asked <= classes:
        what = "tasks" if tasks is not None else "classes per task"
        raise InputError(f"plan: {asked} {what} for {classes} classes; give a number from 1 to {classes}")
    number = asked if tasks is not None else -(-classes // asked)
    return [classes // number + (position < classes % number) for position in range(number)]


def chained(
    order: Sequence[str], sizes: Sequence[int], *, source: str, manifest: str | None = None
) -> dict[str, Task]:
    """Return the classes in their order as tasks of these sizes, each after the one before it."""
    block: dict[str, Task] = {}
    before, start = "t00", 0
    for number, size in enumerate(sizes, start=1):
        key = f"t{number:02d}"
        block[key] = _task(before, source, manifest, order[start : start + size])
        before, start = key, start + size
    return block


def _task(after: str, source: str, manifest: str | None, classes: Sequence[str]) -> Task:
    """Return a task that is not checked yet: `replace_file` checks the whole file before it is written."""
    return Task.model_construct(after=after, source=source, manifest=manifest, classes=tuple(classes))


def shuffled(names: Sequence[str], seed: int) -> list[str]:
    """Return the class order of a seed, as the papers' code draws it."""
    import numpy as np

    if not 0 <= seed < 2**32:
        raise InputError(f"plan: the seed is {seed}; give a number from 0 to {2**32 - 1}")
    # The legacy generator on purpose: published class orders are its.
    order = np.random.RandomState(seed).permutation(len(names))
    return [names[index] for index in order]


def refuse_computed(tasks: Mapping[Any, Any], path: Path) -> None:
    """Refuse to replace a block of tasks from which steps were computed."""
    done = [str(key) for key in tasks if (path.parent / "artifacts" / "model" / str(key)).exists()]
    if done:
        raise InputError(
            f"{path}: tasks: {', '.join(done)} already computed (artifacts/model); add to them with"
            " `sdlora add-task`, or replace them all with --force"
        )


def replace_file(path: Path, text: str, *, expected: Mapping[str, Task]) -> None:
    """Put the new text in the file's place if it is valid and says what it should. Else leave the file."""
    params = Params.parse(text, origin=f"{path} (not changed)")
    if dict(params.tasks) != dict(expected):
        raise InputError(
            f"{path}: its tasks block is written in a way that cannot be edited safely; edit it by hand"
        )
    write_whole(path, text.encode())
