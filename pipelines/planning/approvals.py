"""`sdlora approve`: a person lets a step through its gate, in `params.yaml` and from there in the ledger."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

from pipelines.ledger.verdicts import broken, measured_in, results_of
from pipelines.project.display import show_key, show_names, show_value
from pipelines.project.errors import InputError
from pipelines.project.files import write_whole
from pipelines.project.layout import EVALUATIONS, MODELS, PARAMS
from pipelines.project.names import line_fault
from pipelines.project.params import Params
from pipelines.project.params_text import entry_lines, with_lines
from pipelines.project.settings import Approval
from pipelines.project.yaml_text import read_text
from pipelines.versioning.plan import adopt_param
from pipelines.versioning.project_lock import only_run


def approve(task: str, *, by: str, why: str, path: Path = PARAMS) -> list[str]:
    """Write who lets `task` through, and why, beside the hash of the results that are there. Return lines to print.

    A later result of the same step is another matter: the approval does not hold for it.
    """
    text = read_text(path)
    params = Params.parse(text, origin=str(path))
    if task not in params.tasks:
        raise InputError(f"approve: there is no task {show_key(task)}; known are {show_names(params.tasks)}")
    results = evaluation_of(task)
    for option, value in (("--by", by), ("--why", why)):
        if fault := line_fault(value.strip()):
            raise InputError(f"approve: {option}: {show_value(value)} {fault}, for those who read the ledger")
    was = EVALUATIONS / params.tasks[task].after
    # A machine that has fetched the results alone has no model, which only this limit is about.
    model = None if params.gate.drift is None else MODELS / task
    faults = broken(params.gate, measured_in(results, was, params.gate.on, model=model))
    if not faults:
        raise InputError(f"approve: {task} breaks no limit of gate in {path}; there is nothing to approve")
    entry = Approval.model_validate(
        {"by": by.strip(), "why": why.strip(), "evaluation": results_of(results), "limits": sorted(faults)}
    )
    known: Mapping[str, Approval] = {**params.approvals, task: entry}
    lines = [
        line for name in sorted(known) for line in entry_lines(name, known[name].model_dump(mode="json"))
    ]
    changed = with_lines(text, "approvals", lines)
    if Params.parse(changed, origin=f"{path} (not changed)").approvals != known:
        raise InputError(
            f"{path}: its approvals are written in a way that cannot be edited safely; edit by hand"
        )
    write_whole(path, changed.encode())
    return [
        f"{path}: {task} approved by {entry.by}, although it {' and '.join(faults.values())}",
        "`sdlora run` goes on from there",
    ]


def evaluation_of(task: str) -> Path:
    """Return where the results of a step are."""
    folder = EVALUATIONS / task
    if not (folder / "metrics.json").is_file():
        raise InputError(
            f"{folder}/metrics.json: {task} has no results to approve of yet; run `sdlora run` first"
        )
    return folder


def keep_other_gates() -> None:
    """Have an answer re-run the gate that it is for, and no other: DVC knows `approvals` as a whole.

    While a run is at work nothing is written, and all gates run again after it.
    """
    with contextlib.suppress(InputError), only_run():
        adopt_param("gate", "approvals")
