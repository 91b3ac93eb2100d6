"""How long `sdlora audit verify` takes on a long chain at full size: 20 steps of ViT-B/16, ten classes each.

Nothing is trained or tested: backbone, directions and predictions are random. Everything else is what the stages
leave, by the stages themselves where they need no model (split, freeze, gate), and dvc.lock is DVC's own.

The time stands beside that of reading the same bytes and computing the two hashes of them once, which no
verification can do without.
"""

import argparse
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import timm
import torch
from PIL import Image

from pipelines.data.packed import TRAINING, read_images, write_rows
from pipelines.project.files import read_json, write_json
from pipelines.project.params import Params
from pipelines.project.provenance import code_hash, library_versions
from pipelines.stages.code import code
from pipelines.stages.fit import fit
from pipelines.stages.freeze import freeze
from pipelines.stages.gate import gate
from pipelines.stages.report import report
from pipelines.stages.split import split
from pipelines.stages.start import start
from sdlora.adapters import Factors, inject_adapters
from sdlora.backbones import Backbone, write_backbone
from sdlora.fit_folder import EpochRecord, write_fit
from sdlora.head import HeadBlock
from sdlora.methods import FitResult

REPOSITORY = Path(__file__).resolve().parents[1]
MODEL, CLASSES, TRAIN, TEST, SIDE = "vit_base_patch16_224", 10, 25, 5, 224
ARTIFACTS = Path("artifacts")


def project(folder: Path, tasks: list[str]) -> None:
    """The code, the parameters and the pictures of a project with these tasks, as the working directory."""
    for name in ("pipelines", "sdlora"):
        shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (".dvc/config", ".dvcignore", ".gitignore", "dvc.yaml"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(REPOSITORY / name, folder / name)
    os.chdir(folder)
    subprocess.run(["git", "init", "-q"], check=True)
    random = np.random.default_rng(0)
    lines = []
    for before, task in zip(["t00", *tasks], tasks, strict=False):
        names = [f"{task}-{index}" for index in range(CLASSES)]
        lines.append(
            f"  {task}: {{after: {before}, source: data/raw/{task}, classes: {names}}}".replace("'", '"')
        )
        for name in names:
            for part, count in (("train", TRAIN), ("test", TEST)):
                place = Path("data/raw") / task / part / name
                place.mkdir(parents=True)
                for index in range(count):
                    noise = random.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
                    Image.fromarray(noise).save(place / f"{index}.jpg", quality=70)
    text = (REPOSITORY / "params.yaml").read_text(encoding="utf-8").split("\ntasks:\n")[0]
    text = text.replace("  digits: {test_fraction: 0.2, seed: 0}", "  {}").replace(
        "head: aligned", "head: linear"
    )
    Path("params.yaml").write_text(text + "\ntasks:\n" + "\n".join(lines) + "\n", encoding="utf-8")


def step(task: str, before: str, targets: dict[str, tuple[int, int]], generator: torch.Generator) -> None:
    """All outputs of one step."""
    place = {
        kind: ARTIFACTS / kind / task for kind in ("split", "train", "fit", "model", "evaluation", "gate")
    }
    split(
        task,
        source=Path("data/raw") / task,
        before=ARTIFACTS / "split" / before,
        out=place["split"],
        images=place["train"],
    )
    params = Params.load()
    place["fit"].mkdir(parents=True)
    seen = [name for name in params.tasks if name <= task]

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    write_fit(
        place["fit"],
        FitResult(
            task=task,
            factors={
                name: Factors(draw(rows, 10), draw(10, columns)) for name, (rows, columns) in targets.items()
            },
            magnitudes={name: torch.ones(len(targets)) for name in seen},
            head={task: HeadBlock(draw(CLASSES, 768), draw(CLASSES))},
        ),
        curve=[EpochRecord(1, 1, 1.0, 0.5, 0.01)],
        description={
            "task": task,
            "classes": [
                c for c in read_json(place["split"] / "classes.json")["classes"] if c["task"] == task
            ],
            "adapter": params.adapter.of_the_fit,
            "split": read_json(place["split"] / TRAINING),
            "code": code_hash(fit.fn),
            "versions": library_versions(),
            "training": params.training.model_dump(exclude={"checkpoint_seconds", "checkpoint_store"}),
            "seed": params.seed,
        },
    )
    models = ARTIFACTS / "model"
    freeze(
        task,
        fit=place["fit"],
        train=place["split"] / TRAINING,
        images=ARTIFACTS / "train",
        before=models / before,
        backbone=models / "t00",
        out=place["model"],
    )
    predict(place["evaluation"], seen)
    gate(
        task,
        model=place["model"],
        split=place["split"] / "split.json",
        evaluation=place["evaluation"],
        evaluation_before=ARTIFACTS / "evaluation" / before,
        before=ARTIFACTS / "gate" / before,
        out=place["gate"],
    )


def predict(folder: Path, tasks: list[str]) -> None:
    """An evaluation in which one image of ten is named wrong."""
    rows = []
    for task in tasks:
        table = read_images(ARTIFACTS / "split" / task / "test" / f"{task}.arrow")
        for index, (sample, label) in enumerate(
            zip(table["id"].to_pylist(), table["label"].to_pylist(), strict=True)
        ):
            rows.append((sample, task, label, label if index % 10 else 0 if label else 1, 0.5))
    types = {"id": pa.string(), "task": pa.string(), "label": pa.int32(), "prediction": pa.int32()}
    folder.mkdir(parents=True)
    write_rows(folder / "predictions.arrow", rows, {**types, "confidence": pa.float32()})
    correct = [sum(row[2] == row[3] for row in rows if row[1] == task) for task in tasks]
    counts = [sum(row[1] == task for row in rows) for task in tasks]
    accuracy = [round(right / count, 6) for right, count in zip(correct, counts, strict=True)]
    metrics = {"step": tasks[-1], "tasks": tasks, "accuracy": accuracy, "samples": counts, "correct": correct}
    write_json(folder / "metrics.json", metrics)


def main() -> None:
    """Build the chain, verify it a few times, print the seconds."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--times", type=int, default=3, help="how often to verify; the median counts")
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        tasks = [f"t{index:02}" for index in range(1, arguments.steps + 1)]
        project(Path(folder), tasks)
        start(
            out=ARTIFACTS / "split/t00", evaluation=ARTIFACTS / "evaluation/t00", gate=ARTIFACTS / "gate/t00"
        )
        torch.manual_seed(0)
        model = timm.create_model(MODEL, num_classes=0).eval()
        (ARTIFACTS / "model/t00").mkdir(parents=True)
        write_backbone(ARTIFACTS / "model/t00", Backbone(model=model, description={"name": MODEL}))
        targets = {name: (d.rows, d.columns) for name, d in inject_adapters(model).items()}
        generator = torch.Generator().manual_seed(0)
        for before, task in zip(["t00", *tasks], tasks, strict=False):
            step(task, before, targets, generator)
        code(out=ARTIFACTS / "code")
        report(artifacts=ARTIFACTS, out=ARTIFACTS / "report", metrics=Path("metrics.json"))
        subprocess.run([sys.executable, "-m", "dvc", "commit", "-q", "-f"], check=True)
        files = [path for path in ARTIFACTS.rglob("*") if path.is_file()]
        size = sum(path.stat().st_size for path in files)
        verified, hashed = [], []
        for _ in range(arguments.times):
            began = time.perf_counter()
            subprocess.run(
                [sys.executable, "-m", "pipelines", "audit", "verify"], check=True, stdout=subprocess.DEVNULL
            )
            verified.append(time.perf_counter() - began)
            began = time.perf_counter()
            for path in files:
                data = path.read_bytes()
                hashlib.sha256(data).digest()
                hashlib.md5(data, usedforsecurity=False).digest()
            hashed.append(time.perf_counter() - began)
        os.chdir(REPOSITORY)
    found, floor = sorted(verified)[len(verified) // 2], sorted(hashed)[len(hashed) // 2]
    sys.stdout.write(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores: {arguments.steps} steps of {MODEL}, "
        f"{len(files)} files, {size / 2**20:.0f} MiB: verified in {found:.1f} s; the hashes alone {floor:.1f} s\n"
    )


if __name__ == "__main__":
    main()
