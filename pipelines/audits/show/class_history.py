"""`sdlora audit show --class`: one class through all steps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pipelines.audits.steps import (
    Answers,
    AuditedProject,
    AuditedStep,
    Figures,
    correct_for_looks,
    flip_facts,
    near,
    opened_project,
    read_answers,
    rows_of,
    same_images,
    samples_of,
    score,
    taken_for,
    test_pictures,
)
from pipelines.audits.tables import console, interval, print_json, significant, table
from pipelines.data.source_files import Found
from pipelines.data.sources import read_source
from pipelines.data.split_chain import TEST, part_file
from pipelines.project.errors import InputError
from pipelines.project.files import natural_key
from pipelines.project.layout import SPLITS
from pipelines.reports.format import DASH, chance, count, p_equals, percent
from pipelines.runtime.console import printable

_WORST = 10
"""Mistakes on the terminal; JSON has all."""
TOP = 3
"""Guesses of an image, and classes that another one is taken for."""


def show_class(name: str, *, as_json: bool) -> None:
    """Print a class through all steps since it arrived."""
    with opened_project() as project:
        found = significant(_class_history(project, name))
    if as_json:
        print_json(found)
        return
    out = console()
    out.print(
        f"class {printable(name)}, of {found['task']}: {count(found['images'], 'test image')}", markup=False
    )
    rows = [
        [
            row["step"],
            interval(row),
            *(DASH if row[kind] is None else row[kind] for kind in ("lost", "gained")),
            chance(row["p_holm"]),
            ", ".join(f"{to['class']} ({to['task']}) ×{to['images']}" for to in row["taken_for"][:TOP]),
        ]
        for row in found["steps"]
    ]
    out.print()
    out.print(
        table(
            "Accuracy, % (Wilson 95 % interval), flips since the step before",
            ["step", "accuracy", "lost", "gained", "p, Holm", "taken for"],
            rows,
            texts=(0, 5),
        )
    )
    out.print()
    hurt = found["hurt"]
    if hurt is None:
        out.print("no step hurt it: none lost more of its images than it gained")
    else:
        out.print(
            f"hurt most at {hurt['step']}: {hurt['lost']} lost, {hurt['gained']} gained, "
            f"{p_equals(hurt['p_value'])}; {p_equals(hurt['p_holm'])} for having looked at all steps (Holm)\n"
            f"what changed there: sdlora audit diff {hurt['before']} {hurt['step']}",
            soft_wrap=True,
        )
    if found["mistakes"]:
        all_of_them = f" (of {len(found['mistakes'])})" if len(found["mistakes"]) > _WORST else ""
        out.print(f"\n[bold]Surest mistakes of {found['steps'][-1]['step']}{all_of_them}[/]")
        for row in found["mistakes"][:_WORST]:
            where = row["file"] or f"packed in {row['packed']}"
            guess = f"{percent(row['confidence']):>5} % {row['taken_for']} ({row['task']})"
            out.print(printable(f"{guess}  {row['id']}  {where}"), markup=False, soft_wrap=True)


def _class_history(project: AuditedProject, name: str) -> Figures:
    """Return the figures of a class: accuracy and confusions at each step, flips between steps, mistakes of the last
    one.

    `hurt` is the step that lost most of its images, those that it gained taken off; None if none did.
    """
    evaluated = project.evaluated()
    last = project.step(evaluated[-1])
    owners = {entry["name"]: entry["task"] for entry in last.classes}
    if name not in owners:
        raise InputError(f"{last.name} knows no class {name!r}{near(name, list(owners))}")
    rows: list[Figures] = []
    before: tuple[Answers, Mapping[str, str]] | None = None
    for task in evaluated[evaluated.index(owners[name]) :] if owners[name] in evaluated else evaluated:
        step = project.step(task)
        if name not in {entry["name"] for entry in step.classes}:
            continue
        answers = known_answers(step)
        mine = answers.take(answers.truths == name)
        pictures = test_pictures(step, of=dict.fromkeys(mine.tasks))
        flips: Figures = {"before": None, "lost": None, "gained": None, "p_value": None}
        if before is not None:
            own = {image: pictures[image] for image in mine.ids}
            both = same_images(before[1], own)
            old, new = rows_of(before[0], both), rows_of(mine, both)
            flips = {"before": rows[-1]["step"], **flip_facts(old.right, new.right)}
        wrong = mine.guesses[~mine.right]
        rows.append({"step": task, **score(mine.right), **flips, "taken_for": taken_for(wrong, owners)})
        before = answers, pictures
    correct_for_looks(rows)
    hurting = [row for row in rows if row["lost"] is not None and row["lost"] > row["gained"]]
    worst = max(hurting, key=lambda row: row["lost"] - row["gained"], default=None)
    keys = ("step", "before", "lost", "gained", "p_value", "p_holm")
    return {
        "class": name,
        "task": owners[name],
        "images": rows[-1]["images"],
        "steps": rows,
        "hurt": None if worst is None else {key: worst[key] for key in keys},
        "mistakes": _mistakes(project, last, name, owners),
    }


def known_answers(step: AuditedStep) -> Answers:
    """Return the answers of a step that was evaluated."""
    answers = read_answers(step)
    assert answers is not None
    return answers


def _mistakes(
    project: AuditedProject, step: AuditedStep, name: str, owners: Mapping[str, str]
) -> list[Figures]:
    """Return the images of a class that a step names wrong, the surest first, and where they are."""
    answers = known_answers(step)
    wrong = answers.take((answers.truths == name) & ~answers.right)
    order = sorted(
        range(len(wrong.ids)), key=lambda row: (-wrong.confidences[row], natural_key(str(wrong.ids[row])))
    )
    hashes = {row["id"]: row["sha256"] for row in samples_of(step)}
    files = {key: file for task in {*wrong.tasks} for key, file in _source_files(project, task, name).items()}
    found = []
    for row in order:
        key = wrong.ids[row]
        file = files.get(key)
        same = file is not None and file.is_of(hashes[key])
        found.append(
            {
                "id": key,
                "taken_for": wrong.guesses[row],
                "task": owners[wrong.guesses[row]],
                "confidence": float(wrong.confidences[row]),
                "file": file.shown if file is not None and same else None,
                "packed": (SPLITS / wrong.tasks[row] / part_file(TEST, wrong.tasks[row])).as_posix(),
            }
        )
    return found


def _source_files(project: AuditedProject, task: str, name: str) -> dict[str, Found]:
    """Test image → the one that it was packed from, as far as the task's source still lists it."""
    entry = project.params.tasks.get(task)
    if entry is None or not Path(entry.source).is_dir():
        return {}
    try:
        listed = read_source(Path(entry.source), [name], manifest=entry.manifest).images
    except InputError:  # the source may have changed since, which is no fault of this question
        return {}
    return {f"{task}/test/{name}/{found.file}": found for found in listed if found.part in (None, "test")}
