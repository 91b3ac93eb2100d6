"""`sdlora audit show`: one class, one image or one task through all steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.audits.steps import (
    Answers,
    Project,
    Record,
    Step,
    classifier_of,
    correct_for_looks,
    flip_facts,
    near,
    opened_project,
    read_answers,
    read_base,
    rows_of,
    same_images,
    samples_of,
    score,
    spread,
    taken_for,
    test_pictures,
)
from pipelines.audits.tables import console, interval, plain, print_json, significant, table
from pipelines.data.decoding import open_picture, picture_hash, strict_pictures
from pipelines.data.packed import read_images
from pipelines.data.sources import read_source
from pipelines.project.errors import InputError
from pipelines.project.files import natural_key, read_json, sha256_of
from pipelines.project.layout import SPLITS
from pipelines.reports.format import DASH, chance, count, flattened, number, p_equals, percent
from pipelines.runtime.console import printable
from pipelines.runtime.devices import choose_bf16, choose_device
from pipelines.runtime.progress import progress

WORST = 10
"""Mistakes on the terminal; JSON has all."""
TOP = 3
"""Guesses of an image, and classes that another one is taken for."""


# ---- a class


def show_class(name: str, *, as_json: bool) -> None:
    """Print a class through all steps since it arrived."""
    with opened_project() as project:
        found = significant(class_history(project, name))
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
        all_of_them = f" (of {len(found['mistakes'])})" if len(found["mistakes"]) > WORST else ""
        out.print(f"\n[bold]Surest mistakes of {found['steps'][-1]['step']}{all_of_them}[/]")
        for row in found["mistakes"][:WORST]:
            where = row["file"] or f"packed in {row['packed']}"
            guess = f"{percent(row['confidence']):>5} % {row['taken_for']} ({row['task']})"
            out.print(printable(f"{guess}  {row['id']}  {where}"), markup=False, soft_wrap=True)


def class_history(project: Project, name: str) -> Record:
    """The figures of a class: accuracy and confusions at each step, flips between steps, mistakes of the last one.

    `hurt` is the step that lost most of its images, those that it gained taken off; None if none did.
    """
    evaluated = project.evaluated()
    last = project.step(evaluated[-1])
    owners = {entry["name"]: entry["task"] for entry in last.classes}
    if name not in owners:
        raise InputError(f"{last.name} knows no class {name!r}{near(name, list(owners))}")
    rows: list[Record] = []
    before: tuple[Answers, Mapping[str, str]] | None = None
    for task in evaluated[evaluated.index(owners[name]) :] if owners[name] in evaluated else evaluated:
        step = project.step(task)
        if name not in {entry["name"] for entry in step.classes}:
            continue
        answers, pictures = known_answers(step), test_pictures(step)
        mine = answers.take(answers.truths == name)
        flips: Record = {"before": None, "lost": None, "gained": None, "p_value": None}
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
        "mistakes": mistakes(project, last, name, owners),
    }


def known_answers(step: Step) -> Answers:
    """The answers of a step that was evaluated."""
    answers = read_answers(step)
    assert answers is not None
    return answers


def mistakes(project: Project, step: Step, name: str, owners: Mapping[str, str]) -> list[Record]:
    """The images of a class that a step names wrong, the surest first, and where they are."""
    answers = known_answers(step)
    wrong = answers.take((answers.truths == name) & ~answers.right)
    order = sorted(
        range(len(wrong.ids)), key=lambda row: (-wrong.confidences[row], natural_key(str(wrong.ids[row])))
    )
    hashes = {row["id"]: row["sha256"] for row in samples_of(step)}
    files = source_files(project, owners[name], name) if order else {}
    found = []
    for row in order:
        key = wrong.ids[row]
        file = files.get(key)
        same = file is not None and file.is_file() and sha256_of(file) == hashes[key]
        found.append(
            {
                "id": key,
                "taken_for": wrong.guesses[row],
                "task": owners[wrong.guesses[row]],
                "confidence": float(wrong.confidences[row]),
                "file": str(file) if same else None,
                "packed": (SPLITS / step.name / "test" / f"{wrong.tasks[row]}.arrow").as_posix(),
            }
        )
    return found


def source_files(project: Project, task: str, name: str) -> dict[str, Path]:
    """Test image → the file that it was packed from, as far as the task's source still lists it."""
    entry = project.params.tasks.get(task)
    if entry is None or not Path(entry.source).is_dir():
        return {}
    try:
        listed = read_source(Path(entry.source), [name], manifest=entry.manifest).images
    except InputError:  # the source may have changed since, which is no fault of this question
        return {}
    return {
        f"{task}/test/{name}/{found.file}": found.path for found in listed if found.part in (None, "test")
    }


# ---- an image


def show_image(which: str, *, as_json: bool) -> None:
    """Print what every step's model says of an image."""
    with opened_project() as project:
        found = significant(image_history(project, which))
    if as_json:
        print_json(found)
        return
    out = console()
    if found["known"]:
        known = found["known"][0]
        more = f", and {len(found['known']) - 1} more times" if len(found["known"]) > 1 else ""
        what = "" if known["id"] == which else f"the same picture as {known['id']}{more}: "
        out.print(
            printable(
                f"{which}: {what}a {known['part']} image of class {known['class']}, of {known['task']}"
            ),
            markup=False,
            soft_wrap=True,
        )
    else:
        out.print(printable(f"{which}: no image of any task is this picture"), markup=False, soft_wrap=True)
    rows = []
    for row in found["steps"]:
        guesses = [f"{guess['class']} {percent(guess['probability'])}" for guess in row["guesses"]]
        verdict = {True: "right", False: "wrong", None: ""}[row["right"]]
        if row["right"] is None and found["known"]:
            verdict = "class unknown yet"
        rows.append([row["step"], *(guesses + [""] * TOP)[:TOP], verdict])
    out.print()
    out.print(
        table("Best guesses of each step, %", ["step", "first", "second", "third", ""], rows, texts=range(5))
    )


def image_history(project: Project, which: str) -> Record:
    """The best guesses of every step for a file, or for a test image by its id; whether the first one is right.

    `known` are the images of the chain that show the very same picture, whatever file it is in.
    """
    import torch

    from sdlora.devices import set_deterministic
    from sdlora.prediction import best_guesses
    from sdlora.preprocessing import Preprocessing

    names = project.evaluated()
    last = project.step(names[-1])
    data = image_bytes(last, which)
    with strict_pictures():
        try:
            picture = open_picture(data)
        except ValueError as error:
            raise InputError(f"{printable(which)}: {error}") from None
    known = known_as(last, picture_hash(picture))
    truths = {entry["class"] for entry in known}
    set_deterministic(True)
    device: torch.device = choose_device("auto")
    base = read_base(last)
    preprocessing = Preprocessing.of(base.description)
    pixels = preprocessing.pixels(picture)
    rows = []
    with progress("image", total=len(names)) as bar:
        for done, name in enumerate(names, start=1):
            step = project.step(name)
            classes = [entry["name"] for entry in step.classes]
            model = classifier_of(step, base)
            bf16 = choose_bf16("auto", device)
            guesses = best_guesses(
                model, [pixels], preprocessing, classes, top=min(TOP, len(classes)), bf16=bf16
            )
            right = guesses[0][0].name in truths if truths & set(classes) else None
            rows.append(
                {
                    "step": name,
                    "guesses": [
                        {
                            "class": guess.name,
                            "task": step.classes[guess.label]["task"],
                            "probability": guess.probability,
                        }
                        for guess in guesses[0]
                    ],
                    "right": right,
                }
            )
            bar.update(done)
    return {"image": which, "known": known, "steps": rows}


def image_bytes(last: Step, which: str) -> bytes:
    """The bytes of a file, or of the test image of that id; an `InputError` says that it is neither."""
    if Path(which).is_file():
        return Path(which).read_bytes()
    task = which.partition("/")[0]
    if task in last.tasks and (path := last.test_images(task)) is not None:
        images = read_images(path)
        ids = images["id"].to_pylist()
        if which in ids:
            return images["image"][ids.index(which)].as_py()
    known = [row["id"] for row in samples_of(last) if row["split"] == "test"]
    if which in known:
        raise InputError(f"{printable(which)}: the test images of {task} are gone; name a file of it instead")
    raise InputError(f"{printable(which)}: no such file, and no test image of this id{near(which, known)}")


def known_as(step: Step, picture: str) -> list[Record]:
    """The images of the chain that show a picture, by its `picture_hash`."""
    found = []
    for row in samples_of(step):
        if row["pixels"] == picture:
            owner = step.classes[row["label"]]
            found.append(
                {"id": row["id"], "part": row["split"], "class": owner["name"], "task": owner["task"]}
            )
    return found


# ---- a task


def show_task(which: str, *, as_json: bool) -> None:
    """Print what a task's step was, and what became of it."""
    with opened_project() as project:
        found = significant(task_history(project, which))
    if as_json:
        print_json(found)
        return
    out = console()
    for line in task_lines(found):
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
            "Its test images, and its share of all predictions, through the steps, %",
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


def task_lines(found: Mapping[str, Any]) -> Iterator[str]:
    """A task in sentences."""
    yield f"{found['task']}: {count(len(found['classes']), 'class')}, learned after {found['after']}"
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


def task_history(project: Project, which: str) -> Record:
    """What a task's step was, and its accuracy, magnitudes and share of the predictions at each step since."""
    from sdlora.change import read_update

    step = project.step(which)
    if step.name == "t00" or step.name not in project.params.tasks or step.shown != step.name:
        raise InputError(
            f"--task {which}: not a task of params.yaml; there are {', '.join(project.params.tasks)}"
        )
    assert step.split is not None
    task, counts = step.name, read_json(step.split / "split.json")["counts"]
    rows = []
    for name in project.evaluated():
        later = project.step(name)
        if task not in later.tasks:
            continue
        answers, magnitudes = known_answers(later), read_update(later.model).magnitudes
        owners = {entry["name"]: entry["task"] for entry in later.classes}
        actual = float(np.mean(answers.tasks == task))
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
    own = read_update(step.model).magnitudes.get(task)
    return {
        "task": task,
        "after": project.params.tasks[task].after,
        "classes": [{"class": name, **parts} for name, parts in counts.items()],
        **{key: record.get(key) for key in ("method", "formulation", "head", "rank", "previous")},
        "record": step.hash,
        "targets": len(record.get("targets", [])),
        "direction": None if own is None else spread(own),
        "parameters": flattened(record.get("parameters", {})),
        "steps": rows,
    }
