"""`sdlora merge`: two branches become one, and where both appended tasks, theirs come after ours."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pipelines.ledger.journal import joined
from pipelines.planning.experiments import leaves
from pipelines.planning.tasks import known_tasks
from pipelines.project.errors import InputError
from pipelines.project.files import write_whole
from pipelines.project.git import committed, merged_text, run_git
from pipelines.project.layout import JOURNAL, LOCK, METRICS, PARAMS, StageName
from pipelines.project.params_text import (
    entry_lines,
    task_line,
    with_block_of,
    with_line,
    with_lines,
    with_value,
)
from pipelines.project.settings import Task
from pipelines.project.yaml_text import read_yaml
from pipelines.versioning.lock_text import lock_text, named_entries
from pipelines.versioning.project_lock import only_run

_FILES = (str(PARAMS), str(LOCK), str(METRICS))
"""The files that are merged by what they say."""
_SHOWN = 3
"""Names in one line."""


class _Sides(NamedTuple):
    """One thing as it is at the commit that both branches come from, on this branch and on the other."""

    base: Any
    ours: Any
    theirs: Any

    @property
    def picked(self) -> Any:  # noqa: ANN401 - of any kind
        """Return theirs where only they changed it, else ours."""
        return self.theirs if self.ours == self.base else self.ours


class _Tasks(NamedTuple):
    """What becomes of the tasks that the other branch has appended."""

    appended: Mapping[str, Task]
    """Key → task, those that come after ours."""
    others: Mapping[str, str]
    """The key of a task there → its key here, where it is another task here than there."""


def merge(branch: str) -> list[str]:
    """Merge a branch into the one that is checked out, and commit it. Return lines to print.

    Tasks that both have appended: ours stay, theirs come after them under the next keys, and have to be learned. What
    both changed otherwise, in params.yaml or in any other file, is refused, and all is as it was before.
    """
    theirs = run_git("rev-parse", "-q", "--verify", f"{branch}^{{commit}}", check=False).decode()
    if not theirs:
        raise InputError(f"merge: there is no branch {branch!r}; `git fetch` brings those of others")
    with only_run():
        _require_committed()
        ours = run_git("rev-parse", "HEAD").decode()
        base = run_git("merge-base", ours, theirs, check=False).decode()
        if not base:
            raise InputError(f"merge: {branch} has no commit in common with this branch; merge it with git")
        if base == theirs:
            return [f"{branch}: nothing to merge, all of it is here"]
        if base == ours:
            run_git("merge", "--quiet", "--ff-only", theirs)
            return [f"{branch}: merged, nothing was changed here since it began"]
        texts = {name: _Sides(*(committed(at, name) for at in (base, ours, theirs))) for name in _FILES}
        params, tasks, lines = _merged_params(texts[str(PARAMS)], branch)
        files = {
            str(PARAMS): params.encode(),
            str(LOCK): _merged_lock(texts[str(LOCK)], branch, tasks.others),
            str(METRICS): texts[str(METRICS)].picked,
        }
        _commit(theirs, branch, files, lines)
    return [f"{branch}: merged", *lines, *(["`sdlora run` learns what is new"] if tasks.appended else [])]


def _require_committed() -> None:
    """Refuse to merge where a file has changes that an aborted merge would lose."""
    changed = run_git("status", "--porcelain", "--untracked-files=no").decode().splitlines()
    if changed:
        raise InputError(
            f"merge: {changed[0][3:]} has changes that are in no commit; commit them, or `git merge --abort` what is "
            "under way"
        )


def _merged_params(texts: _Sides, branch: str) -> tuple[str, _Tasks, list[str]]:
    """Return params.yaml with what both sides changed, what becomes of their tasks, and lines that say so."""
    base, ours, theirs = (_decoded(text, PARAMS, branch) for text in texts)
    if not ours or not theirs:
        raise InputError(
            f"merge: there is no {PARAMS} {'here' if theirs else f'on {branch}'}; merge it with git"
        )
    raw = _Sides(*(read_yaml(text, origin=str(PARAMS)) if text else {} for text in (base, ours, theirs)))
    known_tasks(ours, PARAMS)
    there = known_tasks(theirs, Path(f"{PARAMS} of {branch}"))
    before = raw.base.get("tasks")
    tasks = _Sides(
        before if isinstance(before, dict) else {}, raw.ours.get("tasks") or {}, raw.theirs.get("tasks") or {}
    )
    found = _their_tasks(tasks, there)
    lines = [f"{old} of {branch} is {new} here" for old, new in found.others.items()]
    void = [key for key in raw.theirs.get("approvals") or {} if key in found.others]
    if void:
        kept = {key: value for key, value in raw.theirs["approvals"].items() if key not in void}
        theirs = _with_approvals(theirs, kept)
        lines.append(f"approvals: not taken of {', '.join(void)}: it is learned anew, with other results")
    block = theirs if tasks.ours == tasks.base else ours
    same = (with_block_of(text, "tasks", block).encode() if text else b"" for text in (base, ours, theirs))
    merged = merged_text(*same)
    if merged is None:
        raise InputError(
            f"merge: {PARAMS}: both branches changed {', '.join(_disputed(raw))}; give it one value on one of them, "
            "commit, and merge again"
        )
    text = merged.decode()
    for key, task in found.appended.items():
        text = with_line(text, key, task)
        lines.append(f"{PARAMS}: {task_line(key, task)}")
    known_tasks(text, Path(f"{PARAMS} with {branch} (nothing is merged)"))
    return text, found, lines


def _decoded(text: bytes | None, path: Path, where: str) -> str:
    """Return a text. Nothing where there is none."""
    try:
        return (text or b"").decode()
    except UnicodeDecodeError:
        raise InputError(f"merge: {path}, {where}: the file is not UTF-8; save it as UTF-8 there") from None


def _their_tasks(tasks: _Sides, there: Mapping[str, Task]) -> _Tasks:
    """Return what becomes of their tasks: nothing where only one side changed the tasks.

    Raises:
        InputError: both did, and not only by appending.
    """
    base, ours, theirs = (list(side.items()) for side in tasks)
    if ours in (base, theirs) or theirs == base:
        return _Tasks({}, {})
    if base != ours[: len(base)] or base != theirs[: len(base)]:
        key = next(
            key for key in tasks.base if not tasks.base[key] == tasks.ours.get(key) == tasks.theirs.get(key)
        )
        raise InputError(
            f"merge: {PARAMS}: both branches changed tasks, and one of them {key}, which was there before; make it "
            "the same on both, commit, and merge again"
        )
    learned = {_what(task): key for key, task in ours[len(base) :]}
    last = list(tasks.ours)[-1]
    appended: dict[str, Task] = {}
    others: dict[str, str] = {}
    for key, task in theirs[len(base) :]:
        known = learned.get(_what(task))
        new = known or f"t{int(last[1:]) + 1:02d}"
        if known is None:
            appended[new] = there[key].model_copy(update={"after": last})
            last = new
        after = appended[new].after if known is None else tasks.ours[new]["after"]
        if (new, after) != (key, task["after"]):
            others[key] = new
    return _Tasks(appended, others)


def _what(task: Mapping[str, Any]) -> str:
    """Return what a task teaches, wherever it comes in the chain."""
    return json.dumps({name: value for name, value in task.items() if name != "after"}, sort_keys=True)


def _with_approvals(text: str, kept: Mapping[str, Any]) -> str:
    lines = [line for key, value in kept.items() for line in entry_lines(key, value)]
    return with_lines(text, "approvals", lines) if lines else with_value(text, ("approvals",), {})


def _disputed(raw: _Sides) -> Iterable[str]:
    """Return the keys that both sides changed; those that differ, where they only stand on neighbouring lines."""
    base, ours, theirs = (
        dict(leaves({key: value for key, value in side.items() if key != "tasks"})) for side in raw
    )
    differing = sorted(keys for keys in {*ours, *theirs} if ours.get(keys) != theirs.get(keys))
    both = [keys for keys in differing if base.get(keys) not in (ours.get(keys), theirs.get(keys))]
    return [".".join(keys) for keys in (both or differing)[:_SHOWN]] or ["comments"]


def _merged_lock(texts: _Sides, branch: str, others: Mapping[str, str]) -> bytes | None:
    """Return dvc.lock with the entries of stages that one side changed; of those that both did, ours.

    Of tasks that are others here than there, nothing is taken: what they left is of another chain.
    """
    where = ("before both branches", "here", f"on {branch}")
    entries = _Sides(*(_lock_entries(text, at) for text, at in zip(texts, where, strict=True)))
    merged = {}
    for name in dict.fromkeys([*entries.ours, *entries.theirs]):
        entry = _Sides(*(side.get(name) for side in entries))
        found = entry.ours if StageName.parse(name).item in others else entry.picked
        if found is not None:
            merged[name] = found
    return lock_text(merged.values()).encode() if merged else texts.ours


def _lock_entries(text: bytes | None, where: str) -> dict[str, str]:
    entries = {} if text is None else named_entries(_decoded(text, LOCK, where))
    if entries is None:
        raise InputError(
            f"merge: {LOCK} {where} is not as DVC writes it; run `dvc repro` there, and commit it"
        )
    return entries


def _commit(commit: str, branch: str, files: Mapping[str, bytes | None], lines: list[str]) -> None:
    """Have Git merge a commit, with these files as they are here. Where it cannot, all is as it was before."""
    try:
        run_git("merge", "--no-commit", "--no-ff", "--quiet", commit, check=False)
        if not run_git("rev-parse", "-q", "--verify", "MERGE_HEAD", check=False):
            run_git("merge", "--no-commit", "--no-ff", commit)  # which says why it did not begin
        for name, data in files.items():
            if data is not None:
                write_whole(Path(name), data)
                run_git("add", "--", name)
        left = run_git("diff", "--name-only", "--diff-filter=U", "--relative", "-z").decode().split("\0")
        refused = [name for name in left if name and not _settle(name)]
        if refused:
            raise InputError(
                f"merge: both branches changed {', '.join(refused[:_SHOWN])}; make them the same on both, commit, and "
                "merge again"
            )
        run_git(
            "commit",
            "--quiet",
            "-m",
            "\n\n".join([f"Merge {branch}", *(["\n".join(lines)] if lines else [])]),
        )
    except BaseException:
        run_git("merge", "--abort", check=False)
        raise


def _settle(name: str) -> bool:
    """Settle a conflict of the journal by keeping the lines of both. False for other files."""
    if Path(name) != JOURNAL:
        return False
    ours, theirs = (committed(f":{stage}", name) or b"" for stage in (2, 3))
    write_whole(JOURNAL, joined(ours, theirs))
    run_git("add", "--", name)
    return True
