"""What DVC finds changed about each stage, and the order in which stages run: nothing is changed here."""

from __future__ import annotations

import contextlib
import hashlib
import heapq
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from pipelines.project.fingerprints import code_files
from pipelines.project.layout import CODE, CODE_STAGE, DVC_YAML, PARAMS, RETIRED, StageName
from pipelines.project.leftovers import leftovers
from pipelines.project.params import Params
from pipelines.project.regular_files import require_regular_files
from pipelines.project.yaml_text import read_text, read_yaml, value_at
from pipelines.versioning.artifacts import ArtifactStore, Lock, folder_md5, read_lock
from pipelines.versioning.dvc_failures import dvc_errors
from pipelines.versioning.patches import apply_patches
from pipelines.versioning.plan_memory import PlanMemory, Setup, StageFacts, Watch
from pipelines.versioning.pointers import pointer_of

if TYPE_CHECKING:
    from dvc.repo import Repo
    from dvc.stage import Stage as DvcStage


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
    code: Mapping[str, str | None] = field(repr=False, default_factory=dict)
    """Finished stage → the md5 of the fingerprint of the code that made it; None where dvc.lock has none."""
    remote: bool = False

    def stale(self) -> list[str]:
        """Return stages that must run, and those that may have to because they read what these make.

        What the stage `code` will write is known beforehand, and is among the reasons of the stages that it concerns.
        """
        found: set[str] = set()
        for name in self.order:
            if self.reasons[name] or self.needs[name] & found - {CODE_STAGE}:
                found.add(name)
        return [name for name in self.order if name in found]

    def until(self, task: str) -> Plan:
        """Return the plan of a task's stages, and of all that they need."""
        found = [name for name in self.order if StageName.parse(name).item == task]
        for name in found:  # which grows on the way
            found += [other for other in self.needs[name] if other not in found]
        return replace(self, order=[name for name in self.order if name in found])

    def only_missing(self, name: str) -> bool:
        """Return whether a finished stage would run for nothing but outputs that are not here."""
        words = ("is missing", "is not in the cache")
        missing = {f"{out} {what}" for out in self.outs.get(name, []) for what in words}
        return name in self.made and bool(self.reasons[name]) and missing.issuperset(self.reasons[name])


def read_plan(tasks: Collection[str], *, partial_checkout: bool = False) -> Plan:
    """Ask DVC, in this process, what dvc.yaml, dvc.lock and the files say. Changes nothing of these.

    DVC is asked about the stages to which something has happened since the last time (`plan_memory.py`). A finished
    stage needs no images, and what removed tasks have left changes nothing. With `partial_checkout`, what dvc.lock
    names and this machine does not hold is no reason to run a stage either: it is in the remote.
    """
    read_text(DVC_YAML)  # which says if the file is none of its kind
    memory = PlanMemory(partial_checkout=partial_checkout)
    if memory.is_whole and memory.setup:
        return _plan(memory.names, memory.stages, {}, tasks, remote=memory.setup.remote)
    with dvc_errors():
        from dvc.dvcfile import load_file
        from dvc.repo import Repo, lock_repo

        apply_patches()
        with contextlib.closing(Repo(_wait_for_lock=True)) as repo, lock_repo(repo):
            setup = Setup(
                remote=bool(repo.config["core"].get("remote")),
                cache=str(repo.cache.local.path),
                config=sorted(repo.config.files.values()),
                partial_checkout=partial_checkout,
            )
            loader = load_file(repo, str(DVC_YAML)).stages
            names = list(loader)
            known = {name: memory.stages[name] for name in names if name in memory.stages}
            stages = [loader[name] for name in names if name not in known]
            asked = _facts_of(stages, known)
            watch = Watch(setup, asked)
            reasons = _reasons(repo, stages, known, leftovers(tasks), setup, loader)
            _add_code_reasons(reasons, repo, {**known, **asked})
            watch.keep(names, [name for name in asked if not reasons[name]], memory)
            return _plan(names, {**known, **asked}, reasons, tasks, remote=setup.remote)


def _plan(
    names: list[str],
    stages: Mapping[str, StageFacts],
    reasons: Mapping[str, list[str]],
    tasks: Collection[str],
    *,
    remote: bool,
) -> Plan:
    facts = {name: stages[name] for name in names}
    outs = {name: found.outs for name, found in facts.items()}
    deps = {name: found.deps for name, found in facts.items()}
    needs = needs_of(outs, deps)
    return Plan(
        order=run_order(needs, list(tasks)),
        needs=needs,
        reasons={name: reasons.get(name, []) for name in names},
        made={name for name, found in facts.items() if found.made},
        outs=outs,
        deps=deps,
        code={name: found.code for name, found in facts.items() if found.made and found.reads_code},
        remote=remote,
    )


def _facts_of(stages: list[DvcStage], known: Mapping[str, StageFacts]) -> dict[str, StageFacts]:
    """Return what DVC says of stages, beside others of which it is known."""
    outs = {name: facts.outs for name, facts in known.items()}
    outs |= {stage.addressing: [out.def_path for out in stage.outs] for stage in stages}
    deps = {stage.addressing: [dep.def_path for dep in stage.deps] for stage in stages}
    needs = needs_of(outs, deps)
    return {
        name: StageFacts(
            outs=outs[name],
            deps=deps[name],
            needs=sorted(needs[name]),
            made=_is_made(stage),
            reads_code=_reads_code(stage),
            code=_code_of(stage),
            objects=[out.hash_info.value for out in stage.outs if out.use_cache and out.hash_info],
            reads_all_params=_reads_all_params(stage),
        )
        for name, stage in ((stage.addressing, stage) for stage in stages)
    }


def _reads_all_params(stage: DvcStage) -> bool:
    """Return whether a stage reads params.yaml as a whole, or of its tasks more than the entry of its own."""
    own = ["tasks", StageName.parse(stage.addressing).item]
    for dep in stage.deps:
        if dep.def_path == str(PARAMS):
            keys = [key.split(".") for key in getattr(dep, "params", ())]
            if not keys or any(key[0] == "tasks" and key[:2] != own for key in keys):
                return True
    return False


def _reasons(
    repo: Repo,
    stages: list[DvcStage],
    known: Mapping[str, StageFacts],
    left: list[Path],
    setup: Setup,
    loader: Mapping[str, DvcStage],
) -> dict[str, list[str]]:
    """Return why DVC would run each of some stages. Of the others it is known that it would not."""
    made = {out.def_path for stage in stages for out in stage.outs}
    made |= {path for facts in known.values() for path in facts.outs}
    for path in {dep.def_path for stage in stages for dep in stage.deps} - made:
        if Path(path).is_dir():
            require_regular_files(Path(path))
    changes = _changes_of(repo, stages)
    makers = {PurePath(out.def_path): out for stage in stages for out in stage.outs}
    gone = {
        PurePath(path)
        for found in changes.values()
        for path, what in _happened(found).items()
        if what == "deleted"
    }
    around = {str(place) for path in gone for place in (path, *path.parents)}
    for name, facts in known.items():
        if not around.isdisjoint(facts.outs):
            makers |= {PurePath(out.def_path): out for out in loader[name].outs}
    elsewhere = setup.partial_checkout and setup.remote
    excused = _excused(repo, stages, changes, left, makers, elsewhere=elsewhere)
    return {name: list(_reasons_of(changes[name], excused[name])) for name in changes}


def _changes_of(repo: Repo, stages: list[DvcStage]) -> dict[str, list[Any]]:
    """Return what `dvc status` finds changed about each stage."""
    if "lookup" in apply_patches():
        from pipelines.versioning.patches import lookup

        return lookup.changes_of(repo, stages)
    return {stage.addressing: stage.status().get(stage.addressing, []) for stage in stages}


def _is_made(stage: DvcStage) -> bool:
    return any(out.hash_info for out in stage.outs)


def _reads_code(stage: DvcStage) -> bool:
    return any(CODE in PurePath(dep.def_path).parents for dep in stage.deps)


def _code_of(stage: DvcStage) -> str | None:
    path = str(CODE / StageName.parse(stage.addressing).kind)
    return next((dep.hash_info.value for dep in stage.deps if dep.def_path == path and dep.hash_info), None)


def _excused(
    repo: Repo,
    stages: list[DvcStage],
    changes: Mapping[str, list[Any]],
    left: list[Path],
    makers: Mapping[PurePath, Any],
    *,
    elsewhere: bool,
) -> dict[str, set[tuple[str, str]]]:
    """Return for each stage what DVC finds and what is no reason to run it: a path, and what happened to it.

    Of a finished stage, images that no stage makes may be gone, as long as a file of DVC's that stands for them has
    the hash that dvc.lock has. A receipt of deleted images may not: nothing else tells what was deleted. With
    `elsewhere` so may all that is what dvc.lock names: what was read must be what its maker left, by the hashes of
    both.
    """
    kept: dict[PurePath, Any] = {}
    found: dict[str, set[tuple[str, str]]] = {}
    for stage in stages:
        happened = _happened(changes[stage.addressing])
        excused = {
            (str(dep), "modified")
            for dep in stage.deps
            if happened.get(str(dep)) == "modified" and _is_as_before_but_for(left, dep)
        }
        if happened and all(part.hash_info for part in (*stage.deps, *stage.outs)):
            gone = [dep for dep in stage.deps if happened.get(str(dep)) == "deleted"]
            for path in (PurePath(dep.def_path) for dep in gone):
                if not kept.keys() & {path, *path.parents} and (pointer := pointer_of(Path(path))):
                    kept |= _kept_by(repo, pointer)
            excused |= {
                (str(dep), "deleted")
                for dep in gone
                if (elsewhere or not _maker_of(dep, makers))
                and PurePath(RETIRED) not in PurePath(dep.def_path).parents
                and _as_made(dep, {**kept, **makers})
            }
            outs = [out for out in stage.outs if elsewhere and out.use_cache and not out.exists]
            excused |= {(str(out), what) for out in outs for what in ("deleted", "not in cache")}
        found[stage.addressing] = excused
    return found


def _happened(changes: list[Any]) -> dict[str, str]:
    """Return what happened to each file or folder, of what DVC finds changed about a stage."""
    groups = [group for change in changes if isinstance(change, dict) for group in change.values()]
    return {path: what for group in groups for path, what in group.items() if isinstance(what, str)}


def _kept_by(repo: Repo, pointer: Path) -> dict[PurePath, Any]:
    """Return what DVC keeps by a file of its own."""
    outs = [out for stage in repo.stage.load_all(str(pointer)) for out in stage.outs]
    return {PurePath(os.path.relpath(out.fs_path)): out for out in outs}


def _maker_of(dep: Any, makers: Mapping[PurePath, Any]) -> Any:  # noqa: ANN401 - of DVC, which ships no types
    """Return the output that a dep is, or is a part of. None where there is none."""
    path = PurePath(dep.def_path)
    return next((makers[place] for place in (path, *path.parents) if place in makers), None)


def _is_as_before_but_for(left: list[Path], dep: Any) -> bool:  # noqa: ANN401 - of DVC, which ships no types
    """Return whether a folder has the hash of dvc.lock once some paths in it are left out."""
    if not dep.hash_info or not any(path.is_relative_to(dep.def_path) for path in left):
        return False
    from dvc_data.hashfile.build import build

    tree: Any
    _, _, tree = build(dep.cache, dep.fs_path, dep.fs, dep.hash_name, ignore=dep.dvcignore, dry_run=True)
    files = {
        "/".join(key): found.value
        for key, _, found in tree
        if not any(Path(dep.def_path, *key).is_relative_to(path) for path in left)
    }
    return folder_md5(files) == dep.hash_info.value


def _as_made(dep: Any, makers: Mapping[PurePath, Any]) -> bool:  # noqa: ANN401 - of DVC, which ships no types
    out = _maker_of(dep, makers)
    if out is None or out.hash_info == dep.hash_info:
        return True
    tree = (
        out.get_dir_cache()
        if out.hash_info and out.hash_info.isdir and out.def_path != dep.def_path
        else None
    )
    if tree is None:
        return False
    key = PurePath(dep.def_path).relative_to(out.def_path).parts
    part = tree.get_obj(out.cache, key)
    return part is not None and part.hash_info == dep.hash_info


def needs_of(outs: Mapping[str, list[str]], deps: Mapping[str, list[str]]) -> dict[str, set[str]]:
    """Find for each stage those that make what it reads: a path, a part of a folder, or a folder of parts.

    Args:
        outs: Stage → what it leaves.
        deps: Stage → what it reads, of those for which it is asked.
    """
    makers = {path: name for name, paths in outs.items() for path in paths}
    within: dict[str, set[str]] = {}
    for path, maker in makers.items():
        for folder in _around(path):
            within.setdefault(folder, set()).add(maker)
    needs: dict[str, set[str]] = {}
    for name, paths in deps.items():
        around = {makers[place] for path in paths for place in (path, *_around(path)) if place in makers}
        needs[name] = around.union(*(within.get(path, set()) for path in paths))
    return needs


def _around(path: str) -> Iterator[str]:
    """Yield the folders that a path of DVC's is in."""
    while "/" in path.lstrip("/"):
        path = path.rpartition("/")[0]
        yield path


def _reasons_of(changes: list[Any], excused: set[tuple[str, str]]) -> Iterator[str]:
    """Say in words why DVC would run a stage."""
    words = {
        "modified": "changed",
        "deleted": "is missing",
        "new": "is new",
        "not in cache": "is not in the cache",
    }
    for change in changes:
        if isinstance(change, str):
            yield "its command changed" if change == "changed checksum" else change
            continue
        for path, what in (pair for group in change.values() for pair in group.items()):
            if isinstance(what, str) and (path, what) in excused:
                continue
            if isinstance(what, dict):  # params.yaml: {key: what happened to it}
                yield from (f"{key} {words.get(its, its)}" for key, its in what.items())
            else:
                yield f"{path} {words.get(what, what)}"


def run_order(needs: Mapping[str, set[str]], tasks: list[str]) -> list[str]:
    """Order stages so that each follows what it needs, and all of one task comes before any of the next."""
    position = {task: i for i, task in enumerate(tasks, start=1)}
    rank = {
        name: (position.get(StageName.parse(name).item or "", 0), place) for place, name in enumerate(needs)
    }
    waiting = {name: set(others) for name, others in needs.items()}
    followers: dict[str, list[str]] = {}
    for name, others in needs.items():
        for other in others:
            followers.setdefault(other, []).append(name)
    ready = [(rank[name], name) for name, others in waiting.items() if not others]
    heapq.heapify(ready)
    order = []
    while ready:
        _, done = heapq.heappop(ready)
        order.append(done)
        for name in followers.get(done, []):
            waiting[name].remove(done)
            if not waiting[name]:
                heapq.heappush(ready, (rank[name], name))
    return order


def code_hashes() -> dict[str, str]:
    """Return the md5 of each fingerprint of the code that runs, as DVC takes it, by the kind of stage."""
    return {name: hashlib.md5(text.encode()).hexdigest() for name, text in code_files().items()}


def _add_code_reasons(reasons: dict[str, list[str]], repo: Repo, stages: Mapping[str, StageFacts]) -> None:
    """Add to the reasons of some stages what the stage `code` will change, which is known beforehand."""
    if CODE_STAGE not in reasons:
        return
    if not _code_is_written():
        made_by = {name: facts.code for name, facts in stages.items() if facts.made and facts.reads_code}
        for name, reason in _code_reasons(made_by):
            reasons.setdefault(name, []).append(reason)
        if CODE.is_dir():  # else DVC says so, but for a checkout that has it in the remote
            reasons[CODE_STAGE] = reasons[CODE_STAGE] or ["the code of sdlora changed"]
    elif repo.stage.get_target(CODE_STAGE).always_changed:
        reasons[CODE_STAGE] = []  # it looks at the installed program, which DVC does not watch


def _code_reasons(made_by: Mapping[str, str | None]) -> Iterator[tuple[str, str]]:
    """Yield the finished stages that will run once the new fingerprints are written, and why."""
    hashes = code_hashes()
    for name, was in made_by.items():
        kind = StageName.parse(name).kind
        path = CODE / kind
        there = hashlib.md5(path.read_bytes()).hexdigest() if path.is_file() else None
        if was == there != hashes[kind]:  # else DVC has found it
            yield name, f"{path} will change"


def _code_is_written() -> bool:
    """Return whether what stands in `artifacts/code` is of the code that runs."""
    try:
        return all((CODE / name).read_text(encoding="utf-8") == text for name, text in code_files().items())
    except OSError:
        return False


def asked_otherwise(plan: Plan, params: Params, names: Iterable[str]) -> dict[str, set[str]]:
    """Return for each of some stages the reasons that mean no other input: dvc.yaml only asks for it in other words.

    Another version of this program may call a stage with other options, and name other parts of the outputs that it
    reads. All that the stage has read by dvc.lock must be as it was, by its bytes, and what it is said to read besides
    must be a part of an output that it has read from. It may also know more keys of params.yaml: one that is null is
    as if it were not there.
    """
    lock = read_lock(params)
    chosen = read_yaml(read_text(PARAMS), origin=str(PARAMS))
    found: dict[str, set[str]] = {}
    with TemporaryDirectory(prefix="sdlora-keep-") as scratch:
        store = ArtifactStore(lock, Path(scratch))
        for name in names:
            read = {path: md5 for path, md5 in lock.deps.get(name, {}).items() if _is_data(path)}
            new = [path for path in plan.deps[name] if path not in read and _is_data(path)]
            outs = {_output_of(path, lock) for path in read}
            same = all(store.workspace_md5(path) == md5 for path, md5 in read.items())
            known = all(_output_of(path, lock) in outs - {None} for path in new)
            words = ("changed", "is new")
            asked = {"changed command", *(f"{path} {what}" for path in new for what in words)}
            keys = (reason.removesuffix(" is new") for reason in plan.reasons[name])
            asked |= {f"{key} is new" for key in keys if _is_null(chosen, key)}
            found[name] = asked if same and known else set()
    return found


def _is_null(params: dict[str, Any], key: str) -> bool:
    """Return whether a dotted key is one of params.yaml, and has nothing behind it."""
    *around, last = key.split(".")
    block = value_at(params, tuple(around))
    return isinstance(block, dict) and last in block and block[last] is None


def _is_data(path: str) -> bool:
    return path != str(PARAMS) and CODE not in PurePath(path).parents


def _output_of(path: str, lock: Lock) -> str | None:
    """Return the output that a path is, or is a part of. None where there is none."""
    return next(
        (out for out in map(str, (PurePath(path), *PurePath(path).parents)) if out in lock.outs), None
    )


def record_as_it_is(names: Iterable[str]) -> None:
    """Have dvc.lock say of finished stages that they are up to date with their inputs as those are now.

    Nothing is computed, and nothing enters the run-cache: no other machine takes it for what the inputs give.
    """
    with dvc_errors():
        from dvc.repo import Repo, lock_repo

        with contextlib.closing(Repo(_wait_for_lock=True)) as repo, lock_repo(repo):
            stages = [repo.stage.get_target(name) for name in names]
            for stage in stages:
                stage.save(run_cache=False, allow_missing=True)  # images that are gone were what they were
                stage.commit()
            stages[0].dvcfile.dump_stages(stages, update_pipeline=False)


def adopt_param(kind: str, key: str) -> list[str]:
    """Have dvc.lock hold a parameter as it is, for finished stages that read of it the entry of their own task alone.

    A stage of which that entry is another one than when it ran stays as it is, and will run again. Return the others.
    """
    with dvc_errors():
        from dvc.repo import Repo, lock_repo

        with contextlib.closing(Repo(_wait_for_lock=True)) as repo, lock_repo(repo):
            stages = [
                stage
                for stage in repo.stage.load_all(str(DVC_YAML))
                if StageName.parse(stage.addressing).kind == kind and _is_made(stage) and _adopts(stage, key)
            ]
            if stages:
                stages[0].dvcfile.dump_stages(stages, update_pipeline=False)
            return [stage.addressing for stage in stages]


def _adopts(stage: DvcStage, key: str) -> bool:
    """Take over a parameter as it is. False where it is as it was, or the entry of the stage's task is another one."""
    task = StageName.parse(stage.addressing).item
    for dep in stage.deps:
        if key not in getattr(dep, "params", ()) or key not in (dep.hash_info.value or {}):
            continue
        was, now = dep.hash_info.value[key] or {}, dep.get_hash().value[key] or {}
        if was == now or was.get(task) != now.get(task):
            return False
        dep.hash_info.value[key] = now
        return True
    return False
