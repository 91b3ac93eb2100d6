"""`sdlora audit show --image`: one image through all steps."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from pipelines.audits.show.class_history import TOP
from pipelines.audits.show.lineage import Lineage
from pipelines.audits.steps import (
    AuditedProject,
    AuditedStep,
    Figures,
    classifier_of,
    near,
    opened_project,
    read_base,
    samples_of,
)
from pipelines.audits.tables import console, print_json, significant, table
from pipelines.data.decoding import open_picture, picture_hash, strict_pictures
from pipelines.data.packed import read_images
from pipelines.data.source_files import image_bytes
from pipelines.project.errors import InputError
from pipelines.reports.format import percent
from pipelines.runtime.console import printable
from pipelines.runtime.devices import choose_bf16, choose_device
from pipelines.runtime.progress import progress


def show_image(which: str, *, as_json: bool) -> None:
    """Print what every step's model says of an image."""
    with opened_project() as project:
        found = significant(_image_history(project, which))
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
    for line in _lineage_lines(found):
        out.print(printable(line), markup=False, soft_wrap=True)
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


def _lineage_lines(found: Figures) -> Iterator[str]:
    """Yield what the image went into, in sentences."""
    for image in found["known"]:
        for step in image["went_into"]:
            for name, files in (
                ("was trained on it", step["files"] if step["trained_on_it"] else []),
                ("holds what was made of it", step["as_they_were"]),
                ("carries on what was made of it", _carried(step)),
            ):
                if files:
                    yield f"{step['step']} {name}: {', '.join(files)}"
        if image["tested_in"]:
            yield f"{image['part']} image of {', '.join(image['tested_in'])}"
    yield "it is in test" if found["in_test"] else "it is in no test"


def _carried(step: Figures) -> list[str]:
    """Return the files that a step has made of those of an image that it was not trained on."""
    return (
        [] if step["trained_on_it"] else [name for name in step["files"] if name not in step["as_they_were"]]
    )


def _image_history(project: AuditedProject, which: str) -> Figures:
    """Return the best guesses of every step for a file, or for a test image by its id. Whether the first one is right.

    `known` are the images of the chain that show the very same picture, in whatever file, and what they went into.
    """
    import torch

    from sdlora.devices import set_deterministic
    from sdlora.prediction import best_guesses
    from sdlora.preprocessing import Preprocessing

    names = project.evaluated()
    last = project.step(names[-1])
    data = _image_bytes(last, which)
    with strict_pictures():
        try:
            picture = open_picture(data)
        except ValueError as error:
            raise InputError(f"{printable(which)}: {error}") from None
    found = Lineage(project).of(hashlib.sha256(data).hexdigest(), picture_hash(picture))
    truths = {entry["class"] for entry in found["known"]}
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
    return {"image": which, **found, "steps": rows}


def _image_bytes(last: AuditedStep, which: str) -> bytes:
    """Return the bytes of a file, or of the test image of that id. An `InputError` says that it is neither."""
    if Path(which).exists():
        try:
            return image_bytes(Path(which))
        except ValueError as error:
            raise InputError(f"{printable(which)}: {error}; name a picture") from None
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
