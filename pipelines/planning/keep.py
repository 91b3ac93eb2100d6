"""`sdlora keep`: what was made by older code stays as it is, and the ledger says so."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from pipelines.ledger.journal import RECORDS
from pipelines.ledger.kept import KeptStage, write_note
from pipelines.planning.new_project import add_keys, missing_keys, other_calls, renew_stages
from pipelines.project.errors import InputError
from pipelines.project.files import sha256_of
from pipelines.project.fingerprints import code_files, require_own_code
from pipelines.project.layout import CODE, CODE_STAGE, DVC_YAML, PARAMS, StageName
from pipelines.project.params import Params
from pipelines.versioning.plan import Plan, asked_otherwise, code_hashes, read_plan, record_as_it_is
from pipelines.versioning.project_lock import only_run
from pipelines.versioning.repro import reproduce_stage

_TRAINED = ("fit", "freeze")
"""Kinds of stages that are not made again without a word when code changes: they cost most, and images may be gone."""
_MADE_ANEW = (CODE_STAGE, "report")
"""Kinds of stages that are made again at no cost."""
_SHOWN = 3
"""Names in one line."""


def keep() -> list[str]:
    """Record that finished stages are up to date although their code has changed. Return lines to print.

    Only the code may be another: where a parameter, an input or an output changed too, a stage is left as it is.
    """
    params = Params.load()
    require_own_code()
    with only_run():
        return _keep(params)


def _keep(params: Params) -> list[str]:
    told = []
    if other_calls():
        renew_stages()
        told = [f"{DVC_YAML}: written as this version has it; `git diff {DVC_YAML}` shows what is other"]
    if lacking := missing_keys():
        add_keys(lacking)
        told.append(f"{PARAMS}: {', '.join(lacking)} added as null, which is as before")
    before = read_plan(params.tasks)
    outdated = _made_by_other_code(before)
    reproduce_stage(CODE_STAGE, pull=False)
    plan = read_plan(params.tasks)
    asked = asked_otherwise(plan, params, outdated)
    kept = {name: before.code[name] for name in outdated if _only_code(plan, name, asked[name])}
    if not kept:
        return [*told, "nothing to keep: no finished stage was made by other code alone"]
    hashes = code_hashes()
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    path = write_note(
        now,
        {
            name: KeptStage(made_by=was, now=hashes[StageName.parse(name).kind], result=_result(plan, name))
            for name, was in kept.items()
        },
    )
    record_as_it_is(kept)  # after the note: what is kept is never without one
    others = [name for name in outdated if name not in kept]
    reasons = [next(r for r in plan.reasons[name] if not r.startswith(f"{CODE}/")) for name in others]
    return [
        *told,
        f"kept as they are: {len(kept)} stages ({_shortened(kept)}); noted in {path}",
        *(f"not kept: {name}: {reason}" for name, reason in zip(others, reasons, strict=True)),
        "`sdlora run` does the rest; commit dvc.lock and ledger",
    ]


def require_decision(plan: Plan, params: Params, *, retrain: bool) -> Iterator[str]:
    """Yield lines on which finished stages the code of this program will re-run, and why.

    The stages of a retired task are not trained again: they give back what they left.

    Raises:
        InputError: some of them are trained, and nobody has decided whether they are trained again. Or dvc.yaml or
            params.yaml is of another version.
    """
    if others := other_calls():
        kind, options = next(iter(others.items()))
        raise InputError(
            f"{DVC_YAML} is of another version of sdlora (stage {kind}: {', '.join(options[:3])}); `sdlora keep` "
            "writes the one of this version, and keeps what was trained"
        )
    if lacking := missing_keys():
        raise InputError(
            f"{PARAMS}: {', '.join(lacking)}: of another version than {DVC_YAML}, which has DVC watch what is missing; "
            "`sdlora keep` adds it as null, and keeps what was trained"
        )
    outdated = _made_by_other_code(plan)
    trained = [name for name in outdated if _is_trained(StageName.parse(name), params)]
    if trained and not retrain:
        told = (
            "dvc.lock is of a version that knew no fingerprints of code"
            if None in (plan.code[name] for name in trained)
            else f"the code of {_shortened(trained)} changed ({_changed_definitions(trained)})"
        )
        raise InputError(
            f"{told}; `sdlora keep` keeps what was trained (as `dvc repro code` and `dvc commit -f` do) and "
            "notes it in ledger/, `sdlora run --retrain` trains it again"
        )
    for kind in dict.fromkeys(StageName.parse(name).kind for name in outdated):
        names = [name for name in outdated if StageName.parse(name).kind == kind]
        yield f"code of {kind} changed ({_changed_definitions(names)}): {_shortened(names)} will run again"


def _made_by_other_code(plan: Plan) -> list[str]:
    """Return the finished stages, in order, whose code has another fingerprint than when they were made."""
    hashes = code_hashes()
    found = []
    for name in plan.order:
        kind = StageName.parse(name).kind
        if name in plan.code and kind not in _MADE_ANEW and plan.code[name] != hashes[kind]:
            found.append(name)
    return found


def _is_trained(stage: StageName, params: Params) -> bool:
    return stage.kind in _TRAINED and not params.tasks[str(stage.item)].retired


def _only_code(plan: Plan, name: str, asked: Collection[str]) -> bool:
    """Return whether nothing but its code, and how dvc.yaml asks for it, is a reason to run a stage."""
    return all(reason.startswith(f"{CODE}/") or reason in asked for reason in plan.reasons[name])


def _result(plan: Plan, name: str) -> str | None:
    """Return the hash of the file that stands for what a stage has left. None where none does."""
    files = (Path(out) / record for out in plan.outs[name] for record in RECORDS)
    return next((sha256_of(path) for path in files if path.is_file()), None)


def _changed_definitions(names: Iterable[str]) -> str:
    """Say which definitions of stages are others than `artifacts/code` has."""
    found: dict[str, None] = {}
    new = code_files()
    try:
        old = {name: (CODE / name).read_text(encoding="utf-8") for name in new}
        were, are = json.loads(old["names.json"]), json.loads(new["names.json"])
        for kind in dict.fromkeys(StageName.parse(name).kind for name in names):
            then, now = (
                dict(zip(known[kind], (line.split()[0] for line in texts[kind].splitlines()), strict=True))
                for known, texts in ((were, old), (are, new))
            )
            found |= dict.fromkeys(name for name in {**then, **now} if then.get(name) != now.get(name))
    except (OSError, ValueError, LookupError):  # missing, or damaged: the stage `code` makes it anew
        return f"{CODE} has no older fingerprints"
    return _shortened(found) or "in another version than artifacts/code has"


def _shortened(names: Iterable[str]) -> str:
    """Return the first names and how many more there are."""
    known = list(names)
    more = f" and {len(known) - _SHOWN} more" if len(known) > _SHOWN else ""
    return ", ".join(known[:_SHOWN]) + more
