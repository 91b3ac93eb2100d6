"""What changed in the answers between two steps: accuracies, flips, confusions, calibration."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from pipelines.audits.steps import (
    Answers,
    AuditedStep,
    Figures,
    correct_for_looks,
    flip_facts,
    read_answers,
    rows_of,
    score,
    taken_for,
)
from pipelines.project.errors import InputError


def compared_answers(then: AuditedStep, now: AuditedStep, same: Sequence[str], notes: list[str]) -> Figures:
    """Accuracy, flips, where errors went, and calibration. On the images of `same` wherever both are compared."""
    before, after = read_answers(then), read_answers(now)
    for step, answers in ((then, before), (now, after)):
        if answers is None:
            why = "it knows no class" if step.name == "t00" else "there is no evaluation beside it"
            notes.append(f"{step.shown}: {why}, so answers are not compared")
    if before is None or after is None:
        return dict.fromkeys(("accuracy", "flips", "errors", "calibration"))
    if not same:
        notes.append("no image was tested by both, so answers are not compared")
    for step, answers in ((then, before), (now, after)):
        if unknown := set(same) - set(answers.ids):
            raise InputError(
                f"{step.evaluation}: it has no prediction of {min(unknown)}; run `sdlora run` to bring it up to date"
            )
    old, new = rows_of(before, same), rows_of(after, same)
    owners = {entry["name"]: entry["task"] for step in (then, now) for entry in step.classes}
    return {
        "accuracy": _accuracies(old, new, before, after, owners),
        "flips": {kind: _flipped(old, new, kind, list(owners)) for kind in ("lost", "gained")},
        "errors": _lost_to(old, new, owners, {entry["name"] for entry in then.classes}),
        "calibration": {"then": _calibration(old), "now": _calibration(new)} if same else None,
    }


def _accuracies(
    old: Answers, new: Answers, before: Answers, after: Answers, owners: Mapping[str, str]
) -> Figures:
    """Accuracies then and now with the flips between, of all images, by task and by class.

    Of the images that both were tested on; a task or class without any has the accuracy of the one that knows it, on
    its own images.

    Args:
        old: what `then` said of the images that both were tested on; `new` is what `now` said, row by row.
        before: what `then` said of all its images; `after` the same of `now`.
        owners: class → task.
    """

    def row(column: str, value: str) -> Figures:
        sides = (old, new, before, after)
        return _compared_row(*(answers.right[getattr(answers, column) == value] for answers in sides))

    tasks = [{"task": task, **row("tasks", task)} for task in dict.fromkeys([*before.tasks, *after.tasks])]
    classes = [{"class": name, "task": task, **row("truths", name)} for name, task in owners.items()]
    correct_for_looks(tasks)
    correct_for_looks(classes)
    return {
        "all": _compared_row(old.right, new.right, old.right, new.right),
        "tasks": tasks,
        "classes": classes,
    }


def _compared_row(old: np.ndarray, new: np.ndarray, before: np.ndarray, after: np.ndarray) -> Figures:
    """Accuracy then and now with the flips between. The arguments are those of `_accuracies`, as (n,) booleans."""
    if len(new):
        return {"images": len(new), "then": score(old), "now": score(new), **flip_facts(old, new)}
    alone = {"then": before, "now": after}
    scores = {side: score(right) if len(right) else None for side, right in alone.items()}
    return {"images": 0, **scores, "lost": None, "gained": None, "p_value": None}


def _flipped(old: Answers, new: Answers, kind: str, classes: Sequence[str]) -> list[Figures]:
    """Return the images that were lost or gained: in the order of `classes`, the surest wrong answer first."""
    lost = kind == "lost"
    rows = np.flatnonzero(old.right & ~new.right if lost else ~old.right & new.right)
    wrong = new if lost else old
    facts = [
        {
            "id": new.ids[row],
            "class": new.truths[row],
            "task": new.tasks[row],
            "then": old.guesses[row],
            "confidence_then": float(old.confidences[row]),
            "now": new.guesses[row],
            "confidence_now": float(new.confidences[row]),
            "sure": float(wrong.confidences[row]),
        }
        for row in rows
    ]
    facts.sort(key=lambda fact: (classes.index(fact["class"]), -fact.pop("sure"), fact["id"]))
    return facts


def _lost_to(old: Answers, new: Answers, owners: Mapping[str, str], known: set[str]) -> Figures:
    """Return what the images that were lost are taken for now: by the task of that class, and class by class.

    Args:
        owners: class → task.
        known: the classes that `then` knew; others are new.
    """
    lost = new.take(old.right & ~new.right)
    to_tasks = Counter((owners[guess], guess not in known) for guess in lost.guesses)
    classes = [
        {
            "class": name,
            "task": owners[name],
            "lost": int((lost.truths == name).sum()),
            "taken_for": taken_for(lost.guesses[lost.truths == name], owners),
        }
        for name in sorted(set(lost.truths))
    ]
    classes.sort(key=lambda row: (-row["lost"], row["class"]))
    return {
        "lost": len(lost.ids),
        "tasks": [
            {"task": task, "new": new_class, "images": images}
            for (task, new_class), images in sorted(to_tasks.items(), key=lambda item: (-item[1], item[0]))
        ],
        "classes": classes,
    }


def _calibration(answers: Answers) -> Figures:
    """Return how sure a model is, against how often it is right."""
    from sdlora.comparison import calibration_error

    return {
        "error": calibration_error(answers.confidences, answers.right),
        "confidence": float(answers.confidences.mean()),
        "accuracy": float(answers.right.mean()),
    }
