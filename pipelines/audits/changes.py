"""What changed between two steps: answers, weights, features, each figure from their files."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from pipelines.audits.steps import (
    BATCH,
    Answers,
    Record,
    Step,
    ancestors,
    classifier_of,
    correct_for_looks,
    flip_facts,
    read_answers,
    read_base,
    rows_of,
    same_images,
    score,
    spread,
    taken_for,
    test_pictures,
)
from pipelines.data.decoding import decode
from pipelines.data.packed import read_images
from pipelines.project.errors import InputError
from pipelines.reports.format import flattened
from pipelines.runtime.progress import progress

if TYPE_CHECKING:
    from torch import nn

    from sdlora.change import Pair, Update
    from sdlora.preprocessing import Preprocessing


def compare(then: Step, now: Step, *, features: bool) -> Record:
    """All figures, as JSON can hold them (but for NaN): what is null could not be known, and `notes` says why."""
    notes: list[str] = []
    pictures = test_pictures(then), test_pictures(now)
    same = same_images(*pictures)
    return {
        "then": facts_of(then),
        "now": facts_of(now),
        "relation": relation(then, now),
        "kept": kept_files(then, now),
        "parameters": changed_parameters(then, now),
        "images": {
            "compared": len(same),
            "then": len(pictures[0]),
            "now": len(pictures[1]),
            "other_picture": len(pictures[0].keys() & pictures[1].keys()) - len(same),
        },
        **compared_answers(then, now, same, notes),
        "weights": compared_weights(then, now, notes),
        "features": compared_features(then, now, pictures, notes) if features else None,
        "notes": notes,
    }


def facts_of(step: Step) -> Record:
    """Which step this is."""
    return {
        "step": step.name,
        "shown": step.shown,
        "record": step.hash,
        "tasks": step.tasks,
        "classes": len(step.classes),
        **{key: step.record.get(key) for key in ("method", "formulation", "head")},
    }


def relation(then: Step, now: Step) -> str:
    """What the ledger says of two steps."""
    if then.hash == now.hash:
        return "the same step"
    if then.hash in ancestors(now):
        return f"{now.shown} continues {then.shown}"
    if now.hash in ancestors(then):
        return f"{then.shown} continues {now.shown}"
    return f"two runs of {now.name}" if then.name == now.name else "steps of two chains"


def kept_files(then: Step, now: Step) -> Record:
    """The frozen files of `then` (directions, trained head rows): their number, and those that `now` has otherwise."""
    frozen = {
        name: digest
        for name, digest in then.record["files"].items()
        if name.startswith(("directions/", "head/"))
    }
    differing = [name for name in sorted(frozen) if now.record["files"].get(name) != frozen[name]]
    return {"frozen": len(frozen), "differing": differing}


def changed_parameters(then: Step, now: Step) -> list[Record]:
    """The parameters in which two records differ."""
    before, after = (flattened(step.record.get("parameters", {})) for step in (then, now))
    if then.name == "t00" or now.name == "t00":
        return []
    return [
        {"name": name, "then": before.get(name), "now": after.get(name)}
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]


# ---- answers


def compared_answers(then: Step, now: Step, same: Sequence[str], notes: list[str]) -> Record:
    """Accuracy, flips, where errors went, and calibration; on the images of `same` wherever both are compared."""
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
        "accuracy": accuracies(old, new, before, after, owners),
        "flips": {kind: flipped(old, new, kind, list(owners)) for kind in ("lost", "gained")},
        "errors": lost_to(old, new, owners, {entry["name"] for entry in then.classes}),
        "calibration": {"then": calibration(old), "now": calibration(new)} if same else None,
    }


def accuracies(
    old: Answers, new: Answers, before: Answers, after: Answers, owners: Mapping[str, str]
) -> Record:
    """Accuracies then and now with the flips between, of all images, by task and by class.

    Of the images that both were tested on; a task or class without any has the accuracy of the one that knows it, on
    its own images.

    Args:
        old: what `then` said of the images that both were tested on; `new` is what `now` said, row by row.
        before: what `then` said of all its images; `after` the same of `now`.
        owners: class → task.
    """

    def row(column: str, value: str) -> Record:
        sides = (old, new, before, after)
        return compared_row(*(answers.right[getattr(answers, column) == value] for answers in sides))

    tasks = [{"task": task, **row("tasks", task)} for task in dict.fromkeys([*before.tasks, *after.tasks])]
    classes = [{"class": name, "task": task, **row("truths", name)} for name, task in owners.items()]
    correct_for_looks(tasks)
    correct_for_looks(classes)
    return {
        "all": compared_row(old.right, new.right, old.right, new.right),
        "tasks": tasks,
        "classes": classes,
    }


def compared_row(old: np.ndarray, new: np.ndarray, before: np.ndarray, after: np.ndarray) -> Record:
    """Accuracy then and now with the flips between; the arguments are those of `accuracies`, as (n,) booleans."""
    if len(new):
        return {"images": len(new), "then": score(old), "now": score(new), **flip_facts(old, new)}
    alone = {"then": before, "now": after}
    scores = {side: score(right) if len(right) else None for side, right in alone.items()}
    return {"images": 0, **scores, "lost": None, "gained": None, "p_value": None}


def flipped(old: Answers, new: Answers, kind: str, classes: Sequence[str]) -> list[Record]:
    """The images that were lost or gained: in the order of `classes`, the surest wrong answer first."""
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


def lost_to(old: Answers, new: Answers, owners: Mapping[str, str], known: set[str]) -> Record:
    """What the images that were lost are taken for now: by the task of that class, and class by class.

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


def calibration(answers: Answers) -> Record:
    """How sure a model is, against how often it is right."""
    from sdlora.comparison import calibration_error

    return {
        "error": calibration_error(answers.confidences, answers.right),
        "confidence": float(answers.confidences.mean()),
        "accuracy": float(answers.right.mean()),
    }


# ---- weights


def compared_weights(then: Step, now: Step, notes: list[str]) -> Record | None:
    """Magnitudes, sizes of changes, overlaps of directions; None where the weights cannot be compared."""
    from sdlora.change import read_update, relative_changes
    from sdlora.ledger import read_record

    if then.record["backbone"] != now.record["backbone"]:
        notes.append("the two began from different backbones, so their weights are not compared")
        return None
    before, after = read_update(then.model), read_update(now.model)
    base = read_record(now.beside("t00"))
    targets = dict.fromkeys([*before.targets, *after.targets])
    if missing := [target for target in targets if target not in base.get("norms", {})]:
        raise InputError(
            f"{now.beside('t00')}/step.json: it has no norm of {missing[0]}; run `sdlora run` to make t00 anew"
        )
    return {
        "magnitudes": compared_magnitudes(before, after),
        "changes": relative_changes(after, before, base["norms"]),
        "overlaps": overlaps(before, after),
    }


def compared_magnitudes(before: Update, after: Update) -> list[Record]:
    """Of each task's direction: mean and range of its magnitudes over the targets, then and now."""
    rows = []
    for task in dict.fromkeys([*before.magnitudes, *after.magnitudes]):
        sides = {
            side: spread(update.magnitudes[task]) if task in update.magnitudes else None
            for side, update in (("then", before), ("now", after))
        }
        both = sides["then"] is not None and sides["now"] is not None
        change = sides["now"]["mean"] - sides["then"]["mean"] if both else None  # type: ignore[index]
        rows.append({"task": task, **sides, "change": change})
    return rows


def overlaps(before: Update, after: Update) -> list[Record]:
    """How far the directions that only one of the two has lie in the space of all that the other has.

    A direction that both have under one name, but not the same one (two runs of a step), is compared with its
    namesake. `rows` is the row space (of `down`, in the layer's input), `columns` the column space (of `up`, in its
    output); `overlap` is the mean squared cosine of the principal angles, `angle` the largest of them in degrees,
    `chance` the overlap that random spaces of these sizes have on average.
    """
    found = []
    for task in dict.fromkeys([*before.directions, *after.directions]):
        mine, other = after.directions.get(task), before.directions.get(task)
        left: Mapping[str, Mapping[str, Pair]]
        if mine is not None and other is not None:
            if same_direction(mine, other):
                continue
            kind, against, left, right = "both", [task], {task: other}, mine
        elif mine is not None:
            kind, against, left, right = "now", list(before.directions), before.directions, mine
        else:
            assert other is not None
            kind, against, left, right = "then", list(after.directions), after.directions, other
        common = [name for name in right if all(name in pairs for pairs in left.values())]
        if not left or not common:
            continue
        targets = {
            name: {
                side: overlap_of([matrix(pairs[name]) for pairs in left.values()], matrix(right[name]))
                for side, matrix in (("rows", row_space), ("columns", column_space))
            }
            for name in common
        }
        found.append(
            {
                "task": task,
                "only": kind,
                "against": against,
                "rank": int(right[common[0]].down.shape[0]),
                **{side: over_targets([at[side] for at in targets.values()]) for side in ("rows", "columns")},
                "targets": targets,
            }
        )
    return found


def same_direction(left: Mapping[str, Pair], right: Mapping[str, Pair]) -> bool:
    """Whether two directions are the same to the bit."""
    return left.keys() == right.keys() and all(
        np.array_equal(a, b) for name in left for a, b in zip(left[name], right[name], strict=True)
    )


def row_space(pair: Pair) -> np.ndarray:
    """(columns, r): what a direction reads."""
    return pair.down.T


def column_space(pair: Pair) -> np.ndarray:
    """(rows, r): what a direction writes."""
    return pair.up


def overlap_of(spaces: Sequence[np.ndarray], space: np.ndarray) -> Record:
    """Overlap, largest angle in degrees and chance level of a space (d, r) with the sum of some others (d, s)."""
    from sdlora.change import principal_cosines

    whole = np.concatenate(spaces, axis=1)
    cosines = principal_cosines(whole, space)
    size = whole.shape[0]
    known = bool(cosines.size)
    return {
        "overlap": float(np.square(cosines).mean()) if known else math.nan,
        "angle": math.degrees(math.acos(cosines.min())) if known else math.nan,
        "chance": min(1.0, max(whole.shape[1], space.shape[1]) / size),
    }


def over_targets(at: Sequence[Record]) -> Record:
    """Mean and range over the targets, of overlaps and angles; the mean of the chance levels."""
    return {
        "overlap": spread(each["overlap"] for each in at),
        "angle": spread(each["angle"] for each in at),
        "chance": float(np.mean([each["chance"] for each in at])),
    }


# ---- features


def compared_features(
    then: Step, now: Step, pictures: tuple[Mapping[str, str], Mapping[str, str]], notes: list[str]
) -> Record | None:
    """Linear CKA of the features of test images, by task and of all together.

    On the images that both were tested on; where one is the backbone, on those of the other.
    """
    from sdlora.change import linear_cka
    from sdlora.devices import set_deterministic
    from sdlora.preprocessing import Preprocessing

    holder = then if now.name == "t00" else now
    mine = pictures[0] if holder is then else pictures[1]
    chosen = set(mine if "t00" in (then.name, now.name) else same_images(*pictures))
    tables = {}
    for task in holder.tasks:
        if (path := holder.test_images(task)) is None:
            notes.append(
                f"{holder.shown}: the test images of {task} are gone, so its features are not compared"
            )
            continue
        images = read_images(path)
        rows = [row for row, name in enumerate(images["id"].to_pylist()) if name in chosen]
        if rows:
            tables[task] = images.take(rows)
    if not tables:
        notes.append("there is no test image of both, so features are not compared")
        return None
    set_deterministic(True)
    bases = [read_base(step) for step in (then, now)]
    ways = [Preprocessing.of(base.description) for base in bases]
    models = [classifier_of(step, base) for step, base in zip((then, now), bases, strict=True)]
    features: list[list[np.ndarray]] = [[], []]
    done = 0
    with progress("features", total=2 * sum(map(len, tables.values())), unit="images") as bar:
        for task, images in tables.items():
            pixels = decode(images, ways[0])
            for side, (model, way) in enumerate(zip(models, ways, strict=True)):
                if way != ways[0]:
                    pixels = decode(images, way)
                features[side].append(features_of(model, pixels, way))
                done += len(images)
                bar.update(done, task=task)
    alone = zip(tables, *features, strict=True)
    return {
        "images": done // 2,
        "all": linear_cka(*(np.concatenate(of) for of in features)),
        "tasks": [
            {"task": task, "images": len(left), "alignment": linear_cka(left, right)}
            for task, left, right in alone
        ],
    }


def features_of(model: nn.Module, pixels: np.ndarray, way: Preprocessing) -> np.ndarray:
    """Features (n, d) of uint8 images (n, channels, height, width) under a merged classifier."""
    import torch

    from sdlora.evaluation import feature_batches

    batches = feature_batches(
        model,
        torch.from_numpy(pixels),
        mean=way.mean,
        std=way.std,
        batch_size=BATCH,
        device=next(model.parameters()).device,
    )
    return torch.cat(list(batches)).numpy()
