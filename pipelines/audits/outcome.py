"""What `sdlora audit verify` prints: a line for each thing that was verified, and the exit status."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.audits.rederivation import derived_stages, kept_notes, run_again, steps_to_train
from pipelines.audits.sign import check_signatures
from pipelines.audits.stored_objects import check_stored
from pipelines.audits.verify import StepVerification, verify
from pipelines.ledger.journal import heads_of, read_journal
from pipelines.project.errors import FaultError, InputError
from pipelines.project.layout import STEP_STAGES, StageName
from pipelines.project.params import Params
from pipelines.versioning.project_lock import no_run

_NOT_VERIFIED = 3
"""The exit status while a run is at work, which changes the files."""


@dataclass(frozen=True, kw_only=True)
class Checks:
    """What to look at beside the chain itself."""

    signers: Path | None = None
    """whose the signatures are: a file of allowed signers"""
    expect: str | None = None
    """a head that the chain must have"""
    cache: bool = False
    """read DVC's cache, and ask its remotes"""
    recompute: bool = False
    """derive again what follows without training"""
    retrain: Sequence[str] = ()
    """steps to learn again; `all` for all"""


def show_verification(checks: Checks, *, as_json: bool) -> int:
    """Verify the chain, and what else is asked for, while no run changes it. Return the exit status."""
    with no_run() as alone:
        if alone:
            return _verified(checks, as_json=as_json)
    line = "a run is at work: not verified"
    if as_json:
        line = json.dumps({"holds": None, "fault": line}, indent=2)
    sys.stdout.write(f"{line}\n")
    return _NOT_VERIFIED


def _verified(checks: Checks, *, as_json: bool) -> int:
    """Verify the chain, and then what else is asked for. Return the exit status.

    The status is 1 if something does not hold: nothing after it is looked at.
    """
    _require_head(checks.expect)
    steps: list[StepVerification] = []
    report: dict[str, Any] = {"signatures": [], "recomputed": [], "retrained": []}
    fault, where = None, ""

    def say(line: str) -> None:
        if not as_json:
            sys.stdout.write(f"{line}\n")
            sys.stdout.flush()

    for step in verify():
        steps.append(step)
        fault, where = step.fault, step.step
        say(f"{step.step:7} {fault or _held(step)}")
    heads = {step.step: step.head for step in steps if step.head}
    try:
        for place, lines in _others(checks, steps, heads, report) if fault is None else ():
            where = place
            for line in lines:
                say(line)
    except FaultError as error:
        fault = str(error)
        say(fault)
    head = next(reversed(heads.values()), "")
    if as_json:
        found = {
            "holds": fault is None,
            "fault": fault,
            "head": head,
            "steps": [_shown(step) for step in steps],
        }
        sys.stdout.write(json.dumps({**found, **report}, indent=2) + "\n")
    say(f"the chain does not hold at {where}" if fault else f"the chain holds; its head is {head}")
    return 1 if fault else 0


def _require_head(expect: str | None) -> None:
    """Refuse a head that is none."""
    if expect is not None and not re.fullmatch(r"[0-9a-f]{64}", expect):
        raise InputError(
            "--expect: not a head, which is 64 hexadecimal digits; `sdlora audit verify` prints it"
        )


def _held(step: StepVerification) -> str:
    """Return a line on a step that holds."""
    hashes = "".join(
        f"  {name} {value[:12]}" for name, value in (("record", step.record), ("head", step.head)) if value
    )
    receipt = f"  retired (receipt {step.receipt[:12]})" if step.receipt else ""
    return f"holds  {step.files} files{hashes}{receipt}"


def _shown(step: StepVerification) -> dict[str, Any]:
    """Return what JSON says of a step."""
    return {**step._asdict(), "results": dict(step.results)}


def _others(
    checks: Checks, steps: Sequence[StepVerification], heads: Mapping[str, str], report: dict[str, Any]
) -> Iterator[tuple[str, Iterator[str]]]:
    """Yield what else is looked at: where a fault would be, and the lines on it, which also go into the report."""
    yield "the journal", _journal(steps, report)
    yield "the signatures", _signatures(heads, checks.signers, report)
    if checks.expect:
        yield "its head", _expected(checks.expect, heads)
    if checks.cache:
        yield "what is stored", _stored(report)
    params = Params.load()
    again = steps_to_train(params, checks.retrain)
    if checks.recompute or again:
        with kept_notes() as notes:
            if checks.recompute:
                yield "what follows", _recomputed(params, notes, report)
            for step in again:
                yield step, _retrained(params, step, notes, report)


def _journal(steps: Sequence[StepVerification], report: dict[str, Any]) -> Iterator[str]:
    """Check the journal, and say of how many results it names who computed them."""
    try:
        lines = read_journal()
    except InputError as error:
        raise FaultError(str(error)) from None
    computed = {(line.stage, result) for line in lines.values() for result in line.output.values()}
    results = [result for step in steps for result in step.results.items()]
    told, chain = sum(result in computed for result in results), {step.step for step in steps}
    stages = {StageName.parse(line.stage) for line in lines.values()}
    beyond = sorted({its.item for its in stages if its.item and its.kind in STEP_STAGES} - chain)
    heads = heads_of(lines)
    report["journal"] = {
        "lines": len(lines),
        "heads": heads,
        "results": len(results),
        "told": told,
        "beyond": beyond,
    }
    if lines:
        more = f"  it also tells of {', '.join(beyond)}" if beyond else ""
        yield (
            f"journal holds  {len(lines)} lines  head {' '.join(head[:12] for head in heads)}  "
            f"{told} of {len(results)} results{more}"
        )


def _signatures(heads: Mapping[str, str], signers: Path | None, report: dict[str, Any]) -> Iterator[str]:
    """Check the signatures, and say whose they are."""
    for signature in check_signatures(heads, signers):
        report["signatures"].append(signature._asdict())
        yield f"{signature.step:7} signed by {signature.by}" + ("" if signature.known else " (whose key?)")


def _expected(head: str, heads: Mapping[str, str]) -> Iterator[str]:
    """Check that a head is one of the chain, which may have grown since."""
    step = next((step for step, its in heads.items() if its == head), None)
    if step is None:
        last, ends = list(heads.items())[-1]
        raise FaultError(
            f"{last}: the chain ends here with the head {ends[:12]}, and none of its steps has {head[:12]}: it was cut "
            "short, or made anew"
        )
    yield f"{step:7} has the head that was expected"


def _stored(report: dict[str, Any]) -> Iterator[str]:
    """Check what DVC's cache and remotes hold."""
    report["stored"] = {}
    for store, there, needed in check_stored():
        report["stored"][store] = {"objects": there, "needed": needed}
        yield f"{store} holds {there} of {needed} objects"


def _recomputed(params: Params, notes: Path, report: dict[str, Any]) -> Iterator[str]:
    """Derive again what follows without training."""
    stages, started = derived_stages(params), time.monotonic()
    run_again(params, stages, notes=notes)
    report["recomputed"] = [str(stage) for stage in stages]
    yield f"{len(stages)} stages run again in {time.monotonic() - started:.0f} s: the same bytes"


def _retrained(params: Params, step: str, notes: Path, report: dict[str, Any]) -> Iterator[str]:
    """Learn a step again."""
    started = time.monotonic()
    run_again(params, [StageName("fit", step), StageName("freeze", step)], notes=notes)
    report["retrained"].append(step)
    yield f"{step:7} learned again in {time.monotonic() - started:.0f} s: the same bytes"
