"""A project for the report that nothing trained: every file that the stage reads."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import safetensors.numpy
from PIL import Image, ImageDraw

from pipelines.stages.report import report

CLASSES = {"t01": ["3", "7"], "t02": ["0", "9", "1"], "t03": ["4", "8"]}

SIZE = 8
TARGETS = [f"blocks.{block}.attn.{name}" for block in range(6) for name in ("q", "v")]
NORMS = {target: 2.0 + place for place, target in enumerate(TARGETS)}

PARAMS = """\
seed: 1993
fetch: {digits: {test_fraction: 0.2, seed: 0}}
data: {duplicates: refuse, test_fraction: 0.2, seed: 0, validation: null, max_pixels: 1000}
backbone: {name: glyph_vit, weights: null, sha256: null, image_size: null, input_normalisation: model}
adapter: {method: sdlora, head: linear, formulation: continuous, targets: null, rank: 10, rank_schedule: {t01: 10},
  magnitude_start: null, magnitudes: null, initial_up: null, tolerance: 0.5, compress: null, penalty: null,
  covariance_rank: 8}
training: {optimizer: sgd, learning_rate: 0.01, momentum: 0.9, schedule: constant, epochs: 4, batch_size: 32,
  crop_scale: 1.0, flip: false, precision: fp32, compile: false, devices: 1, deterministic: true,
  checkpoint_seconds: 30, checkpoint_store: null}
evaluation: {batch_size: 256, precision: fp32}
gate: {fall: null, negative_flips: null, calibration_error: null, new_task: null}
approvals: {}
workers: {pool: gpu, schedule: null, inbox: data/inbox, branch: null, push: null, heartbeat_seconds: 30,
  dead_after_seconds: 90, attempts: 3}
tasks:
"""


def write_project(
    folder: Path,
    classes: dict[str, list[str]] = CLASSES,
    *,
    method: str = "sdlora",
    images: int = 10,
    accuracy: float = 0.8,
) -> Path:
    """Write params.yaml and all that the stages before the report leave, as if from a real run."""
    rng = np.random.default_rng(1)
    tasks = list(classes)
    lines = [
        f"  {task}: {{after: {after}, source: data/raw/digits, classes: {json.dumps(classes[task])}}}\n"
        for after, task in zip(["t00", *tasks], tasks, strict=False)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.yaml").write_text(PARAMS + "".join(lines), encoding="utf-8")
    artifacts = folder / "artifacts"
    known: list[dict[str, object]] = []
    tests: dict[str, pa.Table] = {}
    magnitudes: dict[str, np.ndarray] = {}
    dump(artifacts / "model/t00/backbone.json", {"name": "glyph_vit"})
    dump(
        artifacts / "model/t00/step.json",
        {
            "step": "t00",
            "previous": None,
            "backbone": "0" * 64,
            "norms": NORMS,
            "files": {},
            "tasks": [],
            "classes": [],
            "directions": [],
        },
    )
    previous = sha256(artifacts / "model/t00/step.json")
    dump(artifacts / "gate/t00/verdict.json", {"step": "t00", "previous": None})
    directions: list[str] = []
    for i, task in enumerate(tasks):
        mine = [{"label": len(known) + j, "name": name, "task": task} for j, name in enumerate(classes[task])]
        known += mine
        dump(artifacts / f"split/{task}/classes.json", {"classes": known, "tasks": tasks[: i + 1]})
        counts = {entry["name"]: {"train": 4 * images, "test": images} for entry in mine}
        dump(artifacts / f"split/{task}/split.json", {"task": task, "counts": counts, "digest": "0" * 64})
        tests[task] = test_table(task, mine, images)
        write_arrow(artifacts / f"split/{task}/test/{task}.arrow", tests[task])
        write_evaluation(artifacts / f"evaluation/{task}", task, tests, len(known), accuracy, rng)
        model = artifacts / f"model/{task}"
        if method == "sdlora":
            magnitudes = {
                name: (values + rng.normal(0, 0.04, 12)).astype(np.float32)
                for name, values in magnitudes.items()
            }
            magnitudes[task] = rng.uniform(0.8, 1.3, 12).astype(np.float32)
            model.mkdir(parents=True)
            safetensors.numpy.save_file(magnitudes, model / "magnitudes.safetensors")
            (model / "directions").mkdir()
            safetensors.numpy.save_file(
                a_direction(rng, rank=2 + i % 2), model / f"directions/{task}.safetensors"
            )
            directions.append(task)
        record = {
            "step": task,
            "previous": previous,
            "backbone": "0" * 64,
            "format": 2,
            "after": f"t{i:02d}",
            "classes": mine,
            "method": method,
            "formulation": "continuous",
            "head": "aligned",
            "needs_old_images": False,
            "rank": 10,
            "targets": TARGETS if directions else [],
            "directions": list(directions),
            "files": {
                file.relative_to(model).as_posix(): sha256(file) for file in model.rglob("*.safetensors")
            },
            "parameters": {
                "training": {"epochs": 4 if i else 8, "learning_rate": 0.01},
                "backbone": {"weights": None},
            },
            "versions": {"torch": "2.9.0", "timm": "1.0.22"},
            "code": {
                "fit": hashlib.sha256(b"fit").hexdigest(),
                "freeze": hashlib.sha256(b"freeze").hexdigest(),
            },
            "split": {"counts": {}, "digest": hashlib.sha256(task.encode()).hexdigest(), "train": "0" * 64},
            "metrics": {"loss": 0.01, "training_accuracy": 0.75},
            "determinism": "bitwise on one machine",
        }
        dump(model / "step.json", record)
        previous = sha256(model / "step.json")
        dump(artifacts / f"gate/{task}/verdict.json", a_verdict(artifacts, task, f"t{i:02d}"))
        curve = [
            f"{10 * epoch},{epoch},{1.2 * left + 0.02 * i:.6f},{1 - 0.6 * left - 0.01 * i:.6f},0.01\n"
            for epoch, left in ((epoch, 0.5**epoch) for epoch in range(1, 5))
        ]
        fit = artifacts / f"fit/{task}"
        fit.mkdir(parents=True)
        (fit / "curve.csv").write_text("step,epoch,loss,accuracy,learning_rate\n" + "".join(curve))
    return folder


def a_direction(rng: np.random.Generator, *, rank: int) -> dict[str, np.ndarray]:
    """Random factors of every target."""
    shapes = {"up": (SIZE, rank), "down": (rank, SIZE)}
    return {
        f"{target}.{side}": rng.normal(0, 0.1, shape).astype(np.float32)
        for target in TARGETS
        for side, shape in shapes.items()
    }


def sha256(path: Path) -> str:
    """The hash of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def a_verdict(artifacts: Path, task: str, before: str) -> dict[str, object]:
    """A verdict that lets the second step through although it broke a limit."""
    late = task == "t02"
    return {
        "step": task,
        "previous": sha256(artifacts / f"gate/{before}/verdict.json"),
        "record": sha256(artifacts / f"model/{task}/step.json"),
        "measured": {
            "fall": 0.125 if late else None,
            "negative_flips": 0.0,
            "calibration_error": 0.034,
            "new_task": 0.9,
        },
        "limits": {"fall": 0.1, "negative_flips": None, "calibration_error": None, "new_task": None},
        "broken": ["made an old task fall"] if late else [],
        "approved": {"by": "Ana <b>", "why": "a new camera"} if late else None,
    }


def write_evaluation(
    folder: Path,
    step: str,
    tests: dict[str, pa.Table],
    classes: int,
    accuracy: float,
    rng: np.random.Generator,
) -> None:
    """Write predictions that are right with the given probability, and what follows from them."""
    rows = []
    for task, table in tests.items():
        for name, label in zip(table["id"].to_pylist(), table["label"].to_pylist(), strict=True):
            guess = label if rng.random() < accuracy else int(rng.integers(classes))
            rows.append(
                {
                    "id": name,
                    "task": task,
                    "label": label,
                    "prediction": guess,
                    "confidence": rng.uniform(0.3, 1),
                }
            )
    fields = [("id", pa.string()), ("task", pa.string()), ("label", pa.int32()), ("prediction", pa.int32())]
    table = pa.Table.from_pylist(rows, pa.schema([*fields, ("confidence", pa.float32())]))
    write_arrow(folder / "predictions.arrow", table)
    samples = [tests[task].num_rows for task in tests]
    right = Counter(row["task"] for row in rows if row["label"] == row["prediction"])
    correct = [right[task] for task in tests]
    ratios = [round(right / of, 6) for right, of in zip(correct, samples, strict=True)]
    dump(
        folder / "metrics.json",
        {"step": step, "tasks": list(tests), "accuracy": ratios, "samples": samples, "correct": correct},
    )


def test_table(task: str, classes: list[dict[str, object]], images: int) -> pa.Table:
    """Test images that show their label."""
    rows = []
    for entry in classes:
        for number in range(images):
            picture = Image.new("L", (32, 32), 12 * (number % 6))
            ImageDraw.Draw(picture).text((6 + number % 5, 4), str(entry["label"]), fill=255, font_size=20)
            buffer = io.BytesIO()
            picture.save(buffer, "PNG")
            content = buffer.getvalue()
            digest = hashlib.sha256(content).hexdigest()
            name = f"{task}/test/{entry['name']}/{number:03d}.png"
            rows.append(
                {"id": name, "label": entry["label"], "image": content, "sha256": digest, "pixels": digest}
            )
    fields = [("id", pa.string()), ("label", pa.int32()), ("image", pa.binary())]
    return pa.Table.from_pylist(rows, pa.schema([*fields, ("sha256", pa.string()), ("pixels", pa.string())]))


test_table.__test__ = False


def write_arrow(path: Path, table: pa.Table) -> None:
    """Write one Arrow IPC file of one batch."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())


def read_arrow(path: Path) -> pa.Table:
    """Read one Arrow IPC file into memory, so that it can be written again."""
    return pa.ipc.open_file(pa.BufferReader(path.read_bytes())).read_all()


def dump(path: Path, value: object) -> None:
    """Write JSON as the stages do."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def run_report(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str | int | float]]:
    """Run the stage in a project's folder, as DVC does."""
    monkeypatch.chdir(folder)
    return report(
        artifacts=Path("artifacts"), out=Path("artifacts/report"), metrics=Path("metrics.json")
    ).rows


def read_csv(folder: Path, name: str) -> list[dict[str, str]]:
    """The rows of one file of plot data."""
    with (folder / "artifacts/report/plots" / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
