"""`params.yaml` for a benchmark: its tasks in the papers' order, and parameter sets that are laid over it."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipelines.data.catalog import LAYOUTS, Benchmark, load_benchmark
from pipelines.planning.tasks import chained, refuse_computed, replace_file, shuffled, task_sizes
from pipelines.project.errors import InputError
from pipelines.project.files import write_whole
from pipelines.project.layout import PARAMS, RAW
from pipelines.project.params import Params
from pipelines.project.params_text import flow, task_line, with_block, with_value, yaml_nodes
from pipelines.project.settings import Task
from pipelines.project.yaml_text import read_text, read_yaml, value_at

_USUAL: dict[str, dict[str, Any]] = {
    "cub200": {"split": "official"},
    "domainnet": {"split": "coda-prompt"},
    "imagenet-a": {"split": "stratified"},
    "imagenet-r": {"split": "coda-prompt"},
}
"""Settings with which `plan` adds a data set: the published division nearest to the papers' that can be had."""

_WHOLE = {("adapter", "rank_schedule")}
"""Blocks that a parameter set replaces as a whole, because their keys are data."""


def plan_benchmark(
    name: str,
    *,
    tasks: int | None = None,
    classes_per_task: int | None = None,
    seed: int = 1993,
    path: Path = PARAMS,
    force: bool = False,
) -> list[str]:
    """Write the tasks of a benchmark, and the entry that fetches it. Return lines to print.

    The order is the papers': numpy's legacy permutation of their labels. The data need not be here.
    """
    text = read_text(path)
    raw = read_yaml(text, origin=str(path))
    block = _benchmark_tasks(
        name, raw, tasks=tasks, classes_per_task=classes_per_task, seed=seed, root=path.parent
    )
    if not force and not _same_tasks(raw, block):
        refuse_computed(raw["tasks"] if isinstance(raw.get("tasks"), dict) else {}, path)
    lines = [f"{path}: {sum(len(t.classes) for t in block.values())} classes of {name} in {len(block)} tasks,"
             f" in the order of seed {seed}"]  # fmt: skip
    new, added = _with_fetch(with_block(text, block), name, raw, path)
    replace_file(path, new, expected=block)
    lines += added
    return lines + [task_line(key, task) for key, task in block.items()]


def lay_over(
    overlay: Path, *, path: Path = PARAMS, seed: int | None = None, force: bool = False
) -> list[str]:
    """Lay a parameter set over `params.yaml`. Return a line for each key that it changes.

    The set holds only what differs, and `plan: {benchmark, tasks, seed}` in place of the tasks; `seed`, if
    given, is that of both the class order and the run. All is validated before a byte is written; what is not
    committed, or computed already with other tasks, is overwritten only by `force`.
    """
    wanted = read_yaml(read_text(overlay), origin=str(overlay))
    plan = wanted.pop("plan", None)
    text = new = read_text(path)
    raw = read_yaml(text, origin=str(path))
    if seed is not None:
        wanted["seed"] = seed
    there = yaml_nodes(text)
    lines = []
    for keys, value in leaves(wanted):
        present = value_at(raw, keys)
        if present != value or keys not in there:
            lines.append(f"{path}: {'.'.join(keys)}: {flow(present)} → {flow(value)}")
            new = with_value(new, keys, value)
    if plan is not None:
        new, planned = _with_plan(new, plan, overlay, seed=seed, path=path, force=force)
        lines += planned
    if not lines:
        return [f"{path}: is as {overlay} has it already"]
    Params.parse(new, origin=f"{path} with {overlay} (not written)")
    written = read_yaml(new, origin=str(path))
    if any(value_at(written, keys) != value for keys, value in leaves(wanted)):
        raise InputError(
            f"{path}: is written in a way that cannot be edited safely; edit it by hand as {overlay} says"
        )
    if not force and _uncommitted(path):
        raise InputError(
            f"{path}: has changes that are not committed and that {overlay} would overwrite in part; commit them,"
            " or go on with --force"
        )
    write_whole(path, new.encode())
    return lines


def _with_plan(
    text: str, plan: object, overlay: Path, *, seed: int | None, path: Path, force: bool
) -> tuple[str, list[str]]:
    """Return the text with the tasks that a parameter set plans, and what changed."""
    if not isinstance(plan, dict) or set(plan) != {"benchmark", "tasks", "seed"}:
        raise InputError(f"{overlay}: plan: expected {{benchmark: NAME, tasks: N, seed: N}}; correct it")
    if type(plan["tasks"]) is not int or type(plan["seed"]) is not int:
        raise InputError(f"{overlay}: plan: tasks and seed are whole numbers; correct them")
    raw = read_yaml(text, origin=str(path))
    chosen = plan["seed"] if seed is None else seed
    block = _benchmark_tasks(plan["benchmark"], raw, tasks=plan["tasks"], seed=chosen, root=path.parent)
    text, lines = _with_fetch(text, plan["benchmark"], raw, path)
    if _same_tasks(raw, block):
        return text, lines
    if not force:
        refuse_computed(raw["tasks"] if isinstance(raw.get("tasks"), dict) else {}, path)
    lines.append(f"{path}: tasks: {len(block)} of {plan['benchmark']}, in the order of seed {chosen}")
    return with_block(text, block), lines


def _with_fetch(text: str, name: str, raw: Mapping[str, Any], path: Path) -> tuple[str, list[str]]:
    """Return the text with an entry that fetches the data set, unless it has one or the images are the user's own."""
    if name in (raw.get("fetch") or {}) or _is_own(name, raw, path.parent):
        return text, []
    settings = _USUAL.get(name, {})
    return with_value(text, ("fetch", name), settings), [f"{path}: fetch: added {name}: {flow(settings)}"]


def _benchmark_tasks(
    name: str,
    raw: Mapping[str, Any],
    *,
    tasks: int | None = None,
    classes_per_task: int | None = None,
    seed: int,
    root: Path,
) -> dict[str, Task]:
    """Return the tasks of a benchmark in the papers' class order."""
    if name not in LAYOUTS:
        raise InputError(
            f"plan: {name!r} is not a known benchmark; known are {', '.join(LAYOUTS)};"
            " for images of your own give their folder"
        )
    benchmark = load_benchmark(name)
    classes = _own_classes(benchmark, root) if _is_own(name, raw, root) else benchmark.classes
    sizes = task_sizes(len(classes), tasks=tasks, classes_per_task=classes_per_task)
    return chained(shuffled(classes, seed), sizes, source=(RAW / name).as_posix())


def _is_own(name: str, raw: Mapping[str, Any], root: Path) -> bool:
    """Return whether the user put the benchmark's images there: the folder is there, and no stage makes it."""
    return name not in (raw.get("fetch") or {}) and (root / RAW / name).is_dir()


def _own_classes(benchmark: Benchmark, root: Path) -> list[str]:
    """Return the class folders that the user has, named as in the archive or by class, in the order of the labels."""
    train = root / RAW / benchmark.name / "train"
    folders = {entry.name for entry in train.iterdir() if entry.is_dir()} if train.is_dir() else set()
    for names in (list(benchmark.folders), benchmark.classes):
        if folders == set(names):
            return names
    raise InputError(
        f"{RAW / benchmark.name / 'train'}: its {len(folders)} class folders are not the {len(benchmark.folders)} of"
        f" {benchmark.title}; remove the folder to have it fetched, or plan it as your own: sdlora plan"
        f" {RAW / benchmark.name}"
    )


def _same_tasks(raw: Mapping[str, Any], block: Mapping[str, Task]) -> bool:
    """Return whether the tasks that a params file has are those of `block`."""
    return raw.get("tasks") == {
        key: {"after": task.after, "source": task.source, "classes": list(task.classes)}
        for key, task in block.items()
    }


def _uncommitted(path: Path) -> bool:
    """Return whether git has another version of the file, or none. Without git there is nothing to compare with."""
    command = ["git", "status", "--porcelain", "--", path.name]
    try:
        done = subprocess.run(command, cwd=path.parent, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        return False
    except subprocess.TimeoutExpired:
        return True
    return bool(done.stdout.strip()) if done.returncode == 0 else "not a git repository" not in done.stderr


def leaves(block: Mapping[str, Any], where: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield every value of a nested block with the keys that lead to it. An entry of `fetch` is one value."""
    for key, value in block.items():
        keys = (*where, str(key))
        if isinstance(value, dict) and keys not in _WHOLE and where != ("fetch",):
            yield from leaves(value, keys)
        else:
            yield keys, value
