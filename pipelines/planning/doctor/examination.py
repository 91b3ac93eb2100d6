"""The examination of a new source, or of all tasks and the machine."""

from __future__ import annotations

import json
from pathlib import Path

from pipelines.data.duplicates import Prints
from pipelines.data.sources import class_names
from pipelines.planning.doctor.duplicates import duplicate_findings, name_findings
from pipelines.planning.doctor.files import Seen, known_prints, look_at
from pipelines.planning.doctor.findings import Finding, counted
from pipelines.planning.doctor.machine import load_backbone, machine_findings
from pipelines.planning.doctor.similarity import backbone_findings
from pipelines.planning.tasks import inside_project, known_tasks, next_task
from pipelines.project.errors import InputError
from pipelines.project.layout import PARAMS
from pipelines.project.names import class_name_fault
from pipelines.project.params import Params
from pipelines.project.settings import Fetch
from pipelines.project.yaml_text import read_text


def examine(source: Path | None, *, quick: bool = False) -> list[Finding]:
    """Return all findings: of the machine if no source is given, then of each task. `quick` leaves the backbone out."""
    findings: list[Finding] = []
    if source is None:
        params = Params.load()
        checked = set(params.tasks)
        findings += machine_findings(params)
    else:
        found = _as_next_task(source, findings)
        if found is None:
            return findings
        params, checked = found
    base = None if quick else load_backbone(params, findings)
    fetched = frozenset(name for name in Fetch.names() if params.fetch.entry(name) is not None)
    seen: dict[str, Seen] = {}
    earlier: list[Prints] = []
    for key, task in params.tasks.items():
        if key in checked and task.retired:
            what = f"its images were deleted; others are compared with their hashes ({task.source})"
            findings.append(Finding("ok", "images", key, what, [], ""))
        if key in checked and not task.retired:
            seen[key] = look_at(key, task, params.data, findings, fetched=fetched)
            prints = seen[key].prints
            findings += duplicate_findings(key, task, prints, Prints.joined(earlier), params.data)
            earlier.append(prints)
        else:
            earlier.append(known_prints(key, task, params.data, findings))
    findings += name_findings(params.tasks, checked)
    if base is not None:
        findings += backbone_findings(params.tasks, seen, base, params.data)
    for key in seen:
        if not any(finding.task == key and finding.level != "ok" for finding in findings):
            what = (
                f"{counted(seen[key].images, 'image')} of "
                f"{counted(params.tasks[key].classes, 'class')}, nothing amiss"
            )
            findings.append(Finding("ok", "images", key, what, [], ""))
    order = {key: position for position, key in enumerate(["", *params.tasks])}
    return sorted(findings, key=lambda finding: order[finding.task])


def _as_next_task(source: Path, findings: list[Finding]) -> tuple[Params, set[str]] | None:
    """Return the parameters with the source as next task, and the tasks to examine. None if it can be none.

    Where it is the source of tasks with all its classes, those tasks are examined.
    """
    text = read_text(PARAMS)
    known = known_tasks(text, PARAMS)
    owner = {name: key for key, task in reversed([*known.items()]) for name in task.classes}
    try:
        folder, manifest = inside_project(source, PARAMS)
        names = class_names(Path(folder), manifest=manifest, shown=folder)
    except InputError as error:
        findings.append(Finding("error", "source", "", str(error), [], ""))
        return None
    bad = {name: fault for name in names if (fault := class_name_fault(name))}
    new = [name for name in names if name not in owner and name not in bad]
    old = [name for name in names if name in owner]
    if bad:
        where = [
            f"{json.dumps(name, ensure_ascii=not name.isprintable())} {fault}" for name, fault in bad.items()
        ]
        findings.append(
            Finding(
                "error", "class names", "", f"{counted(bad, 'class')} cannot have its name", where, "rename"
            )
        )
    if not new:
        if bad or not old:
            return None
        from_there = {key: task for key, task in known.items() if task.source == folder}
        if {name for task in from_there.values() for name in task.classes} >= {*old}:
            return Params.parse(text, origin=str(PARAMS)), {*from_there}
        key, _, _, with_it = next_task(source, kind="more")
        return Params.parse(with_it, origin=str(PARAMS)), {key}
    key, _, _, with_it = next_task(source, classes=new)
    if old:
        what = f"{counted(old, 'class')} of it learned already, left out here and by `sdlora add-task`"
        remedy = "give it --kind more if these are more images of them"
        findings.append(Finding("warning", "classes", key, what, [f"{n} ({owner[n]})" for n in old], remedy))
    return Params.parse(with_it, origin=str(PARAMS)), {key}
