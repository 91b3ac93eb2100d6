"""A project to audit that nothing trained: random models, small pictures, and answers that a test decides."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa

from pipelines.data.decoding import open_picture, picture_hash
from pipelines.data.packed import ImageRow, SampleRow, read_images, write_images, write_rows, write_samples
from pipelines.project.files import read_json, write_json
from sdlora.ledger import record_bytes
from tests.support.chains import encoded, make_chain, picture
from tests.support.parameters import settings

EACH = 6
"""Test images of each class."""

Answer = tuple[str, float]
"""The class that an image is taken for, and how sure."""


def make_audited(
    root: Path, answers: Mapping[str, Mapping[str, Answer]], *, names: Mapping[int, str] | None = None
) -> Path:
    """Leave params.yaml, dvc.yaml, models, splits and evaluations of three steps of two classes each in `root`.

    Args:
        answers: step → image id → answer; an image that is not named is taken for what it is, at 0.9.
        names: label → name, where it is not `c0`, `c1`, …
    """
    called = {label: f"c{label}" for label in range(6)} | dict(names or {})
    make_chain(root, "glyph_vit", steps=3)
    rename_classes(root, called)
    (root / "dvc.yaml").write_text("stages: {}\n")
    steps = ["t01", "t02", "t03"]
    lines = [
        f"  {task}: {{after: t{index:02}, source: pictures, "
        f"classes: {json.dumps([called[2 * index], called[2 * index + 1]])}}}\n"
        for index, task in enumerate(steps)
    ]
    text = settings().split("tasks:\n")[0] + "tasks:\n" + "".join(lines)
    (root / "params.yaml").write_text(text, encoding="utf-8")
    rows: list[tuple[str, str, int]] = []
    for index, step in enumerate(steps):
        images = images_of(step, {label: called[label] for label in (2 * index, 2 * index + 1)})
        split = root / "artifacts/split" / step
        write_images(split / f"test/{step}.arrow", images)
        samples = [SampleRow(row.id, "test", row.label, row.sha256, row.pixels, "0" * 16) for row in images]
        trained = SampleRow(f"{step}/train/{called[2 * index]}/9.png", "train", 2 * index, "s", "p", "0" * 16)
        write_samples(split / f"samples/{step}.arrow", [trained, *samples])
        rows += [(row.id, step, row.label) for row in images]
        counts = {called[label]: {"train": 1, "test": EACH} for label in (2 * index, 2 * index + 1)}
        write_json(root / f"artifacts/split/{step}/split.json", {"counts": counts})
        write_predictions(root, step, rows, answers.get(step, {}), called)
    return root


def images_of(task: str, names: Mapping[int, str]) -> list[ImageRow]:
    """The test images of a task: noise, another one for every image."""
    rows = []
    for label, name in names.items():
        for index in range(EACH):
            data = encoded(picture(100 * label + index))
            rows.append(
                ImageRow(
                    f"{task}/test/{name}/{index}.png",
                    label,
                    data,
                    hashlib.sha256(data).hexdigest(),
                    picture_hash(open_picture(data)),
                )
            )
    return rows


def write_predictions(
    root: Path,
    step: str,
    rows: Sequence[tuple[str, str, int]],
    answers: Mapping[str, Answer],
    called: Mapping[int, str],
) -> None:
    """Write predictions.arrow as `evaluate` does."""
    labels = {name: label for label, name in called.items()}
    said = []
    for name, task, label in rows:
        guess, confidence = answers.get(name, (called[label], 0.9))
        said.append((name, task, label, labels[guess], confidence))
    types = {
        "id": pa.string(),
        "task": pa.string(),
        "label": pa.int32(),
        "prediction": pa.int32(),
        "confidence": pa.float32(),
    }
    write_rows(root / f"artifacts/evaluation/{step}/predictions.arrow", said, types)


def rename_classes(root: Path, called: Mapping[int, str]) -> None:
    """Give the classes in all records other names, and each record the hash of the one before as it is now."""
    from sdlora.ledger import record_hash

    for before, path in zip(["t00", "t01", "t02"], ["t01", "t02", "t03"], strict=True):
        folder = root / "artifacts/model" / path
        record = read_json(folder / "step.json")
        for entry in record["classes"]:
            entry["name"] = called[entry["label"]]
        record["previous"] = record_hash(root / "artifacts/model" / before)
        (folder / "step.json").write_bytes(record_bytes(record))


def replace_picture(root: Path, image: str) -> None:
    """Say in the samples of its task that an image shows something else."""
    task = image.partition("/")[0]
    path = root / f"artifacts/split/{task}/samples/{task}.arrow"
    rows = [SampleRow(**row) for row in read_images(path).to_pylist()]
    path.unlink()  # the table of before may still be mapped
    write_samples(path, [row._replace(pixels="another") if row.id == image else row for row in rows])
