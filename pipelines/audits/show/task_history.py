"""`sdlora audit show --task`: one task through all steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from pipelines.audits.show.class_history import known_answers
from pipelines.audits.steps import AuditedProject, Figures, opened_project, score, spread
from pipelines.audits.tables import console, interval, plain, print_json, significant, table
from pipelines.project.errors import InputError
from pipelines.project.files import read_json
from pipelines.project.schemas import SampleCounts
from pipelines.reports.format import DASH, count, flattened, number, percent
from pipelines.runtime.console import printable
from sdlora.ledger import classes_of_step


def show_task(which: str, *, as_json: bool) -> None:
    """Print what a task's step was, and what became of it."""
    with opened_project() as project:
        found = significant(_task_history(project, which))
    if as_json:
        print_json(found)
        return
    out = console()
    for line in _task_lines(found):
        out.print(printable(line), markup=False, soft_wrap=True)
    parts = [part for part in ("train", "validation", "test") if any(part in row for row in found["classes"])]
    out.print()
    out.print(
        table(
            "Images",
            ["class", *parts],
            [[row["class"], *(row.get(part, 0) for part in parts)] for row in found["classes"]],
        )
    )
    out.print()
    out.print(
        table(
            "Its test images, and the share of classes that arrived with it, through the steps, %",
            ["step", "accuracy", "share of images", "of predictions", "bias", "magnitude"],
            [
                [
                    row["step"],
                    interval(row["score"]),
                    percent(row["images_share"]),
                    percent(row["predictions_share"]),
                    number(100 * row["bias"], "+.1f"),
                    DASH if row["magnitudes"] is None else number(row["magnitudes"]["mean"]),
                ]
                for row in found["steps"]
            ],
        )
    )
    out.print()
    parameters = [[name, plain(value)] for name, value in found["parameters"].items()]
    out.print(table("Parameters", ["name", "value"], parameters, texts=range(2)))


def _task_lines(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield a task in sentences."""
    known = f", {len(found['known'])} of them known" if found["known"] else ""
    yield f"{found['task']}: {count(len(found['classes']), 'class')}{known}, learned after {found['after']}"
    rank = f", rank {found['rank']}" if found["rank"] else ""
    yield f"method {found['method']}, formulation {found['formulation']}, head {found['head']}{rank}"
    yield f"record {found['record']}"
    yield f"previous {found['previous']}"
    if found["direction"] is None:
        yield "it left no direction of its own"
    else:
        first = found["direction"]
        yield (
            f"its magnitudes on arrival: mean {number(first['mean'])}, "
            f"{number(first['lowest'])} … {number(first['highest'])} over {count(found['targets'], 'target')}"
        )


def _task_history(project: AuditedProject, which: str) -> Figures:
    """Return what a task's step was, and its accuracy, magnitudes and share of the predictions at each step since."""
    from sdlora.change import read_magnitudes

    step = project.step(which)
    if step.name == "t00" or step.name not in project.params.tasks or step.shown != step.name:
        raise InputError(
            f"--task {which}: not a task of params.yaml; there are {', '.join(project.params.tasks)}"
        )
    assert step.split is not None
    task, counts = step.name, read_json(step.split / "split.json", SampleCounts)["counts"]
    rows = []
    for name in project.evaluated():
        later = project.step(name)
        if task not in later.tasks:
            continue
        answers, magnitudes = known_answers(later), read_magnitudes(later.model, later.record)
        owners = {entry["name"]: entry["task"] for entry in later.classes}
        actual = float(np.mean([owners[truth] == task for truth in answers.truths]))
        predicted = float(np.mean([owners[guess] == task for guess in answers.guesses]))
        rows.append(
            {
                "step": name,
                "score": score(answers.right[answers.tasks == task]),
                "images_share": actual,
                "predictions_share": predicted,
                "bias": predicted - actual,
                "magnitudes": spread(magnitudes[task]) if task in magnitudes else None,
            }
        )
    record = step.record
    own = read_magnitudes(step.model, step.record).get(task)
    return {
        "task": task,
        "after": project.params.tasks[task].after,
        "classes": [{"class": name, **parts} for name, parts in counts.items()],
        "known": [entry["name"] for entry in classes_of_step(step.record, task) if entry["task"] != task],
        **{key: record.get(key) for key in ("method", "formulation", "head", "rank", "previous")},
        "record": step.hash,
        "targets": len(record.get("targets", [])),
        "direction": None if own is None else spread(own),
        "parameters": flattened(record.get("parameters", {})),
        "steps": rows,
    }
