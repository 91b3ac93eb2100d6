"""What `sdlora audit verify` prints: a line for each step and each signature, and the exit status."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from pipelines.audits.retrain import retrain
from pipelines.audits.sign import check_signatures
from pipelines.audits.verify import verify
from pipelines.project.errors import FaultError
from pipelines.versioning.project_lock import no_run

_NOT_VERIFIED = 3
"""The exit status while a run is at work, which changes the files."""


def show_verification(*, as_json: bool, signers: Path | None, again: list[str]) -> int:
    """Verify the chain while no run changes it. Return the exit status."""
    with no_run() as alone:
        if alone:
            return _verified(as_json=as_json, signers=signers, again=again)
    line = "a run is at work: not verified"
    if as_json:
        line = json.dumps({"holds": None, "fault": line}, indent=2)
    sys.stdout.write(f"{line}\n")
    return _NOT_VERIFIED


def _verified(*, as_json: bool, signers: Path | None, again: list[str]) -> int:
    """Verify the chain, then its signatures, then learn the steps of `again` once more. Return the exit status.

    The status is 1 if something does not hold: nothing after it is looked at.
    """
    findings, signatures, retrained = [], [], []
    fault, where = None, ""

    def say(line: str) -> None:
        if not as_json:
            sys.stdout.write(f"{line}\n")
            sys.stdout.flush()

    for finding in verify():
        findings.append(finding)
        fault, where = finding.fault, finding.step
        state = fault or f"holds  {finding.files} files  {finding.record[:12]}".rstrip()
        if finding.receipt:
            state += f"  retired (receipt {finding.receipt[:12]})"
        say(f"{finding.step:6}  {state}")
    heads = {finding.step: finding.record for finding in findings if finding.record}
    try:
        if not fault:
            where = "the signatures"
            for signature in check_signatures(heads, signers):
                signatures.append(signature._asdict())
                say(
                    f"{signature.step:6}  signed by {signature.by}"
                    + ("" if signature.known else " (whose key?)")
                )
            for step in again:
                where = step
                seconds = retrain(step)
                retrained.append(step)
                say(f"{step:6}  learned again in {seconds:.0f} s: the same bytes")
    except FaultError as error:
        fault = str(error)
        say(fault)
    head = next(reversed(heads.values()), "")
    if as_json:
        report = {
            "holds": fault is None,
            "fault": fault,
            "head": head,
            "steps": [finding._asdict() for finding in findings],
            "signatures": signatures,
            "retrained": retrained,
        }
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
    say(f"the chain does not hold at {where}" if fault else f"the chain holds; its head is {head}")
    return 1 if fault else 0
