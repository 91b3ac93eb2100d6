"""The outer flow `sdlora run`: find the stale stages, bring them up to date; and `sdlora status`."""

from __future__ import annotations

import contextlib
import fcntl
import heapq
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from pipelines.errors import InputError
from pipelines.files import read_json, write_whole
from pipelines.params import Params, missing_source
from pipelines.processes import die_with, end_group, environment, wake_the_ending
from pipelines.reconcile import close_dead_runs
from pipelines.server import prefect_server
from pipelines.stage import (
    ERROR_FILE,
    PARENT_FLOW_RUN,
    Stage,
    Summary,
    current_flow_run,
    first_line,
    run_linked,
    server_missing,
)
from pipelines.turns import turn
from pipelines.warm import warm_process

if TYPE_CHECKING:
    from dvc.stage import Stage as DvcStage
    from rich.table import Table

CHATTER = (
    "Running stage ",
    "> ",
    "Generating lock file ",
    "Updating lock file ",
    "To track the changes with git, run:",
    "\tgit add ",
    "To enable auto staging, run:",
    "\tdvc config core.autostage true",
    "Use `dvc push` ",
    "Stage '",
    "Data and pipelines are up to date.",
)
"""What DVC says of itself on stdout; the rest is the stage's."""

BROKEN = "error: gate: "
"""How the line of a gate begins that a person may open."""

UNPUSHED = Path(".sdlora/unpushed")
"""The stages whose outputs the remote has not taken, one a line."""

FROM_CACHE = "is cached - skipping run, checking out outputs"


class StageFailedError(Exception):
    """A stage ended badly; it said why in one line, and `status` is what the whole run ends with.

    One that was `cut_off` said nothing: it, or DVC, was killed, or DVC failed; the same again may go well.
    """

    def __init__(self, line: str, status: int, stage: str, *, cut_off: bool = False) -> None:
        super().__init__(line)
        self.status, self.stage = status, stage
        self.cut_off = cut_off

    @property
    def closed_gate(self) -> str | None:
        """The step that broke a limit of its gate, if that is what happened."""
        name, _, step = self.stage.partition("@")
        return step if name == "gate" and self.status == 2 and str(self).startswith(BROKEN) else None


@dataclass(frozen=True)
class Plan:
    """The stages in the order in which they run, and what DVC finds changed about each."""

    order: list[str]
    needs: Mapping[str, set[str]]
    """Stage → the stages whose outputs it reads."""
    reasons: Mapping[str, list[str]]
    """Stage → why it must run; empty if it need not, as far as its inputs are what they will be."""
    made: set[str]
    """Stages that have been run at some time."""
    outs: Mapping[str, list[str]] = field(repr=False, default_factory=dict)
    """Stage → what it leaves."""
    deps: Mapping[str, list[str]] = field(repr=False, default_factory=dict)
    """Stage → what it reads."""
    remote: bool = False

    def stale(self) -> list[str]:
        """Stages that must run, and those that may have to because they read what these make."""
        found: set[str] = set()
        for name in self.order:
            if self.reasons[name] or self.needs[name] & found:
                found.add(name)
        return [name for name in self.order if name in found]


def read_plan(tasks: Iterable[str], *, lean: bool = False) -> Plan:
    """Ask DVC, in this process, what dvc.yaml, dvc.lock and the files say. Changes nothing.

    With `lean`, what dvc.lock names and this machine does not hold is no reason to run a stage: it is in the remote.
    """
    with dvc_errors():
        from dvc.repo import Repo, lock_repo

        with contextlib.closing(Repo()) as repo, lock_repo(repo):
            stages = repo.stage.load_all("dvc.yaml")
            needs = needs_of(stages)
            remote = bool(repo.config["core"].get("remote"))
            elsewhere = left_elsewhere(stages) if lean and remote else {}
            return Plan(
                order=run_order(needs, list(tasks)),
                needs=needs,
                reasons={
                    s.addressing: list(reasons_of(s, elsewhere.get(s.addressing, set()))) for s in stages
                },
                made={stage.addressing for stage in stages if any(out.hash_info for out in stage.outs)},
                outs={stage.addressing: [out.def_path for out in stage.outs] for stage in stages},
                deps={stage.addressing: [dep.def_path for dep in stage.deps] for stage in stages},
                remote=remote,
            )


def left_elsewhere(stages: list[DvcStage]) -> dict[str, set[str]]:
    """Find for each finished stage what it read and left that is not on this machine, and is what dvc.lock names.

    What it read must be what its maker left, by the hashes of both in dvc.lock; images of a task, which no stage
    makes, may be gone.
    """
    makers = {PurePath(out.def_path): out for stage in stages for out in stage.outs}
    found = {}
    for stage in stages:
        if all(part.hash_info for part in (*stage.deps, *stage.outs)):
            deps = (dep for dep in stage.deps if not dep.exists and _as_made(dep, makers))
            outs = (out for out in stage.outs if out.use_cache and not out.exists)
            found[stage.addressing] = {str(part) for part in (*deps, *outs)}
    return found


def _as_made(dep: Any, makers: Mapping[PurePath, Any]) -> bool:  # noqa: ANN401 - of DVC, which ships no types
    path = PurePath(dep.def_path)
    out = next((makers[place] for place in (path, *path.parents) if place in makers), None)
    if out is None or out.hash_info == dep.hash_info:
        return True
    tree = (
        out.get_dir_cache()
        if out.hash_info and out.hash_info.isdir and out.def_path != dep.def_path
        else None
    )
    if tree is None:
        return False
    key = path.relative_to(out.def_path).parts
    part = tree.get_obj(out.cache, key)
    return part is not None and part.hash_info == dep.hash_info


def needs_of(stages: list[DvcStage]) -> dict[str, set[str]]:
    """Find for each stage those that make what it reads: a path, a part of a folder, or a folder of parts."""
    makers: dict[PurePath, str] = {PurePath(out.def_path): s.addressing for s in stages for out in s.outs}
    within: dict[PurePath, set[str]] = {}
    for path, maker in makers.items():
        for folder in path.parents:
            within.setdefault(folder, set()).add(maker)
    needs: dict[str, set[str]] = {}
    for stage in stages:
        paths = [PurePath(dep.def_path) for dep in stage.deps]
        around = {makers[place] for path in paths for place in (path, *path.parents) if place in makers}
        needs[stage.addressing] = around.union(*(within.get(path, set()) for path in paths))
    return needs


def reasons_of(stage: DvcStage, elsewhere: set[str]) -> Iterator[str]:
    """Say in words why DVC would run a stage; what is missing here and held elsewhere is no reason."""
    words = {
        "modified": "changed",
        "deleted": "is missing",
        "new": "is new",
        "not in cache": "is not in the cache",
    }
    for change in stage.status().get(stage.addressing, []):
        if isinstance(change, str):
            yield "its command changed" if change == "changed checksum" else change
            continue
        for path, what in (pair for group in change.values() for pair in group.items()):
            if what in ("deleted", "not in cache") and path in elsewhere:
                continue
            if isinstance(what, dict):  # params.yaml: {key: what happened to it}
                yield from (f"{key} {words.get(its, its)}" for key, its in what.items())
            else:
                yield f"{path} {words.get(what, what)}"


def run_order(needs: Mapping[str, set[str]], tasks: list[str]) -> list[str]:
    """Order stages so that each follows what it needs, and all of one task comes before any of the next."""
    position = {task: i for i, task in enumerate(tasks, start=1)}
    rank = {name: (position.get(name.partition("@")[2], 0), place) for place, name in enumerate(needs)}
    waiting = {name: set(others) for name, others in needs.items()}
    ready = [(rank[name], name) for name, others in waiting.items() if not others]
    heapq.heapify(ready)
    order = []
    while ready:
        _, done = heapq.heappop(ready)
        order.append(done)
        for name, others in waiting.items():
            if done in others:
                others.remove(done)
                if not others:
                    heapq.heappush(ready, (rank[name], name))
    return order


def run_pipeline() -> int:
    """Bring every stage up to date; return the exit status."""
    params = Params.load()
    with only_run():
        plan = read_plan(params.tasks)
        require_sources(params, plan)
        make_up(plan)
        if not plan.stale():
            print_line(f"all up to date: {len(plan.order)} stages, {len(params.tasks)} tasks")
            print_summary(params)
            return 0
        try:
            # Loading the libraries once is worth a process only if several stages will need them.
            warm = warm_process if len(plan.stale()) > 2 else contextlib.nullcontext
            with prefect_server(Path(".prefect")) as wait, warm():
                wait()
                bring = Stage("pipeline", lambda: bring_up_to_date(params, plan))
                missing = server_missing()
                if missing:
                    bring()
                else:
                    close_dead_runs()
                    run_linked(bring, "pipeline", {})
        except StageFailedError as failure:
            sys.stderr.write(f"{failure}\n")
            return failure.status
        print_summary(params)
    return 0


def finish(progressed: Callable[[], None]) -> Summary:
    """Bring every stage up to date inside a flow run that has begun; `progressed` is called after each.

    What other machines have made is taken from the remote only where a stage reads it.
    """
    params = Params.load()
    with only_run(wait=True):
        plan = read_plan(params.tasks, lean=True)
        require_remote(plan)
        require_sources(params, plan)
        if server_missing() is None:
            close_dead_runs()
        rows: Summary = []
        if plan.stale():
            with warm_process() if len(plan.stale()) > 2 else contextlib.nullcontext():
                rows = bring_up_to_date(params, plan, lean=True, progressed=progressed)
        make_up(plan)
        if unpushed():
            # Another machine would compute it again: better that this one comes back to it.
            raise StageFailedError(
                f"error: the DVC remote did not take {', '.join(sorted(unpushed()))}; what was done is kept here",
                1,
                "",
                cut_off=True,
            )
        return rows


def bring_up_to_date(
    params: Params, plan: Plan, *, lean: bool = False, progressed: Callable[[], None] = lambda: None
) -> Summary:
    """Run the stale stages in order; a stage whose inputs turn out to be what they were is left alone."""
    stale = plan.stale()
    width = len(str(len(stale)))
    rows: Summary = []
    current = plan
    outdated = False
    for count, name in enumerate(stale, start=1):
        head = f"[{count:{width}}/{len(stale)}] {name}"
        if not plan.reasons[name]:
            if outdated:
                current, outdated = read_plan(params.tasks, lean=lean), False
            if not current.reasons[name]:
                print_line(f"{head}  inputs are as before")
                continue
        print_line(f"{head} …")
        started = time.monotonic()
        if lean:
            obtain(name, plan, params)
        cached = bring(name, share=plan.remote)
        if not cached:
            progressed()
        outdated = True
        seconds = round(time.monotonic() - started, 1)
        print_line(f"{head}  {'from the cache' if cached else 'done'}, {seconds} s")
        rows.append({"stage": name, "seconds": seconds, "from cache": "yes" if cached else "no"})
    return rows


def obtain(name: str, plan: Plan, params: Params) -> None:
    """Fetch what a stage reads and this machine does not hold; what the remote has lost is made again.

    Training images are fetched only where the stage will really look at them.
    """
    pull([Path(dep) for dep in plan.deps[name]], plan, params)
    made = {out for outs in plan.outs.values() for out in outs}
    images = [Path(out) for out in images_read(name, params) if out in made and not Path(out).exists()]
    if images and not remembered(name):
        pull(images, plan, params)


def pull(read: list[Path], plan: Plan, params: Params) -> None:
    """Fetch outputs that are read and not here, or have their stages make them."""
    missing = {
        maker: [out for out in plan.outs[maker] if not Path(out).exists() and _is_read(Path(out), read)]
        for maker in plan.order
    }
    paths = [out for outs in missing.values() for out in outs]
    if not paths or not plan.remote or not dvc(["pull", *paths])[0]:
        return
    require_remote(plan)  # what it has lost is made again; what it only cannot give now is not
    for maker, outs in missing.items():
        if not all(Path(out).exists() for out in outs):
            obtain(maker, plan, params)
            bring(maker, share=plan.remote)


def images_read(name: str, params: Params) -> list[str]:
    """The folders of training images that a stage reads: they are no deps, what describes them is."""
    kind, _, task = name.partition("@")
    if kind not in ("fit", "freeze"):
        return []
    from pipelines.adapters import tasks_read

    return [f"artifacts/train/{key}" for key in (tasks_read(params, task) if kind == "fit" else [task])]


def remembered(name: str) -> bool:
    """Bring what a stage leaves from DVC's run-cache, here or in the remote; False where it has to be computed."""
    with dvc_errors():
        from dvc.repo import Repo, lock_repo
        from dvc.stage.cache import RunCacheNotFoundError, RunCacheNotSupported

        logging.getLogger("dvc.stage.cache").setLevel(logging.WARNING)  # `bring` says whence a stage came
        with contextlib.closing(Repo()) as repo, lock_repo(repo):
            with contextlib.suppress(RunCacheNotSupported):
                repo.stage_cache.pull(None)
            try:
                repo.stage_cache.restore(repo.stage.load_one(name=name), pull=True)
            except RunCacheNotFoundError:
                return False
            return True


def _is_read(out: Path, read: list[Path]) -> bool:
    return any(dep.is_relative_to(out) or out.is_relative_to(dep) for dep in read)


def bring(name: str, *, share: bool) -> bool:
    """Bring one stage up to date through DVC; return whether its outputs came from the cache."""
    with turn(name), TemporaryDirectory(prefix="sdlora-") as folder:
        error_file = Path(folder) / "error"
        settings = {
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
            "DVC_NO_ANALYTICS": "1",
            ERROR_FILE: str(error_file),
            PARENT_FLOW_RUN: current_flow_run() or "",
        }
        with environment(settings):
            command = ["repro", "--single-item", name, *(["--pull"] if share else [])]
            status, cached = dvc(command)
            if status:
                raise failure_of(name, status, error_file)
            if share:
                push(name)
    return cached


def push(name: str) -> None:
    """Share what a stage has left; what the remote does not take is noted, for `make_up`."""
    waiting = unpushed() - {name}
    if dvc(["push", "--run-cache", name])[0]:
        print_line(
            f"{name} could not be pushed to the DVC remote; it is kept here, and pushed by the next run"
        )
        waiting |= {name}
    write_whole(UNPUSHED, "\n".join(sorted(waiting)).encode())


def unpushed() -> set[str]:
    """The stages whose outputs the remote has not taken yet."""
    return set(UNPUSHED.read_text(encoding="utf-8").split()) if UNPUSHED.is_file() else set()


def make_up(plan: Plan) -> None:
    """Push what earlier runs could not; stages that are no more are forgotten."""
    for name in sorted(unpushed()) if plan.remote else []:
        if name in plan.order:
            push(name)
        else:
            write_whole(UNPUSHED, "\n".join(sorted(unpushed() - {name})).encode())


def require_remote(plan: Plan) -> None:
    """Refuse to work where the remote does not answer: what it holds would be computed again, and may come out other.

    Object stores say so themselves; a folder that is not mounted just looks empty.
    """
    if not plan.remote:
        return
    with dvc_errors():
        from dvc.repo import Repo

        with contextlib.closing(Repo()) as repo:
            remote = repo.cloud.get_remote_odb()
            root = remote.path.removesuffix("/files/md5")
            try:
                there = remote.fs.protocol != "local" or remote.fs.exists(root)
                list(remote.list_oids_exists(["0" * 32]))
            except Exception as trouble:  # every kind of storage raises its own
                raise StageFailedError(
                    f"error: the DVC remote does not answer ({first_line(trouble)})", 1, "", cut_off=True
                ) from trouble
    if not there:
        raise StageFailedError(
            f"error: the DVC remote is the folder {root}, which is not there; mount it, or make it if it is new",
            1,
            "",
            cut_off=True,
        )


def failure_of(name: str, status: int, error_file: Path) -> StageFailedError:
    """Make an error of what a stage wrote about its end, or of DVC's own failure."""
    if error_file.is_file():
        code, _, line = error_file.read_text(encoding="utf-8").strip().partition(" ")
        return StageFailedError(line, int(code), name)
    return StageFailedError(
        f"error: {name} did not finish (dvc: status {status}, reason above); run the same again",
        1,
        name,
        cut_off=True,
    )


def dvc(arguments: list[str]) -> tuple[int, bool]:
    """Run DVC in a group of its own; return its status, and whether outputs came from the cache."""
    parent = os.getpid()
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "dvc", "--wait-for-lock", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: die_with(parent),
    )
    cached = False
    try:
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                cached |= FROM_CACHE in line
                if line.strip() and not line.startswith(CHATTER):
                    print_line(line.rstrip())
        return process.wait(), cached
    except BaseException:
        end_group(process)
        raise


@contextlib.contextmanager
def only_run(*, wait: bool = False) -> Iterator[None]:
    """Refuse to work, or wait, while another `sdlora run` works in the same folder."""
    lock = Path(".sdlora/run.lock")
    lock.parent.mkdir(exist_ok=True)
    wake_the_ending(lock)
    with lock.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise InputError(
                f"another sdlora run is at work in {Path.cwd()}; wait for it or stop it"
            ) from None
        yield


@contextlib.contextmanager
def dvc_errors() -> Iterator[None]:
    """Turn what DVC says of a broken or busy project into one line."""
    from dvc.exceptions import DvcException

    try:
        yield
    except DvcException as error:
        raise InputError(f"dvc: {' '.join(str(error).split())}") from error


def require_sources(params: Params, plan: Plan) -> None:
    """Refuse a task whose folder of images is neither there nor made by a stage, where it would be read."""
    stale = set(plan.stale())
    every = [Path(out) for outs in plan.outs.values() for out in outs]
    for key, task in params.tasks.items():
        source = Path(task.source)
        made = f"split@{key}" in plan.order and f"split@{key}" not in stale
        made |= any(source == out or out in source.parents for out in every)
        if not made and not source.is_dir():
            raise InputError(
                f"tasks.{key}: no folder {task.source}: {missing_source(task.source, params.fetch)}"
            )


def print_line(text: str) -> None:
    """Print a line at once, so that it stands in order with what stages write."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def print_summary(params: Params) -> None:
    """Print the accuracy matrix and where the files are."""
    from rich.console import Console

    metrics = read_json(Path("metrics.json"))
    console = Console()
    console.print(accuracy_table(params))
    shown = {
        "last accuracy": metrics["last_accuracy"],
        "average accuracy": metrics["average_accuracy"],
        "forgetting": metrics["forgetting"],
    }
    console.print("   ".join(f"{name} [bold]{percent(value)}[/]" for name, value in shown.items()))
    console.print("report   artifacts/report/report.html\nmetrics  metrics.json", highlight=False)


def accuracy_table(params: Params) -> Table:
    """Make a table of the accuracy on each task (columns) after each step (rows)."""
    from rich.table import Table

    tasks = list(params.tasks)
    table = Table(title="accuracy in %, on each task after each step", title_justify="left")
    for heading in ("after", *tasks):
        table.add_column(heading, justify="right")
    for step in tasks:
        accuracy: list[float] = read_json(Path("artifacts/evaluation") / step / "metrics.json")["accuracy"]
        cells = [f"{100 * value:.1f}" for value in accuracy]
        table.add_row(step, *cells, *[""] * (len(tasks) - len(cells)))
    return table


def percent(value: float | None) -> str:
    """A share in per cent; a first task alone has no forgetting."""
    return "–" if value is None else f"{100 * value:.1f} %"


def show_status() -> None:
    """Print a table of tasks and stages, and why those that are not up to date are not."""
    from rich.console import Console
    from rich.table import Table

    plan = read_plan(Params.load().tasks)
    stale = set(plan.stale())
    kinds = dict.fromkeys(name.partition("@")[0] for name in plan.order)
    console = Console()
    table = Table()
    table.add_column("")
    rows: dict[str, dict[str, Any]] = {}
    for name in plan.order:
        kind, _, item = name.partition("@")
        rows.setdefault(item, {})[kind] = standing(name, plan, stale)
    columns = [kind for kind in kinds if any(kind in cells for item, cells in rows.items() if item)]
    for column in columns:
        table.add_column(column)
    for item, cells in rows.items():
        if item:
            table.add_row(item, *[cells.get(column, "") for column in columns])
    for kind, cell in rows.get("", {}).items():
        console.print(f"{kind}: {cell}", highlight=False)
    console.print(table)
    for name in plan.order:
        if plan.reasons[name] and name in plan.made:
            first, *rest = plan.reasons[name]
            console.print(f"{name}: {first}" + (f" (and {len(rest)} more)" if rest else ""), highlight=False)
    left = (
        f"{len(stale)} of {len(plan.order)} stages are not up to date: sdlora run"
        if stale
        else "all up to date"
    )
    console.print(left, highlight=False)


def standing(name: str, plan: Plan, stale: set[str]) -> str:
    """One word for how a stage stands."""
    if name not in stale:
        return "[green]done[/]"
    if name not in plan.made:
        return "[dim]never run[/]"
    return "[yellow]stale[/]" if plan.reasons[name] else "[yellow]may be stale[/]"
