"""`sdlora approve`: a person lets a step through its gate, in `params.yaml` and from there in the ledger."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from pipelines.errors import InputError
from pipelines.files import read_json, sha256_of, write_whole
from pipelines.params import Approval, Params, read_text
from pipelines.tasks import PARAMS, with_lines

EVALUATIONS = Path("artifacts/evaluation")


def approve(task: str, *, by: str, why: str, path: Path = PARAMS) -> list[str]:
    """Write who lets `task` through, and why, beside the hash of the results that are there; return lines to print.

    A later result of the same step is another matter: the approval does not hold for it.
    """
    text = read_text(path)
    params = Params.parse(text, origin=str(path))
    if task not in params.tasks:
        raise InputError(f"approve: there is no task {task!r}; known are {', '.join(params.tasks)}")
    for option, value in (("--by", by), ("--why", why)):
        if not value.strip() or not value.isprintable():
            raise InputError(
                f"approve: {option} {value!r}: write a line of text, for those who read the ledger"
            )
    entry = Approval(by=by.strip(), why=why.strip(), evaluation=results_of(task))
    accuracy = read_json(EVALUATIONS / task / "metrics.json")["accuracy"]
    known: Mapping[str, Approval] = {**params.approvals, task: entry}
    lines = {name: json.dumps(known[name].model_dump(), ensure_ascii=False) for name in sorted(known)}
    changed = with_lines(text, "approvals", [f"{name}: {value}" for name, value in lines.items()])
    if Params.parse(changed, origin=f"{path} (not changed)").approvals != known:
        raise InputError(
            f"{path}: its approvals are written in a way that cannot be edited safely; edit by hand"
        )
    write_whole(path, changed.encode())
    return [
        f"{path}: {task} approved by {entry.by} (accuracy of each task: {', '.join(f'{a:.3f}' for a in accuracy)})",
        "`sdlora run` goes on from there",
    ]


def results_of(task: str) -> str:
    """The hash of the results of a step, which an approval is of."""
    metrics = EVALUATIONS / task / "metrics.json"
    if not metrics.is_file():
        raise InputError(f"{metrics}: {task} has no results to approve of yet; run `sdlora run` first")
    return sha256_of(metrics)
