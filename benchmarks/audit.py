"""How long `sdlora audit verify` takes on a long chain at full size: steps of ViT-B/16, ten classes each.

Nothing is trained or tested: backbone, directions and predictions are random. Everything else is what the stages
leave, by the stages themselves where they need no model (split, freeze, gate), and dvc.lock is DVC's own.

The time stands beside that of reading the same bytes and computing the two hashes of them once, which no
verification can do without.

    python benchmarks/audit.py --steps 20 200 1000
"""

import argparse
import contextlib
import copy
import functools
import hashlib
import json
import os
import platform
import resource
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
RESULTS = REPOSITORY / "benchmarks/results/audit.jsonl"
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
    for old, new in (
        ("  digits: {test_fraction: 0.2, seed: 0}", "  {}"),
        ("head: rgda", "head: linear"),
        ("temperature: auto", "temperature: null"),
        ("unknown: relative", "unknown: null"),
    ):
        text = text.replace(old, new)
    Path("params.yaml").write_text(text + "\ntasks:\n" + "\n".join(lines) + "\n", encoding="utf-8")


def step(seen: list[str], targets: dict[str, tuple[int, int]], generator: torch.Generator) -> None:
    """All outputs of the last of some steps."""
    before, task = ["t00", *seen][-2:]
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


@functools.cache
def answers(task: str) -> list[tuple[str, str, int, int, float]]:
    """What every step says of the test images of a task: one of ten is named wrong."""
    table = read_images(ARTIFACTS / "split" / task / "test" / f"{task}.arrow")
    named = zip(table["id"].to_pylist(), table["label"].to_pylist(), strict=True)
    return [
        (sample, task, label, label if index % 10 else 0 if label else 1, 0.5)
        for index, (sample, label) in enumerate(named)
    ]


def predict(folder: Path, tasks: list[str]) -> None:
    """An evaluation on all tasks so far."""
    rows = [row for task in tasks for row in answers(task)]
    types = {"id": pa.string(), "task": pa.string(), "label": pa.int32(), "prediction": pa.int32()}
    folder.mkdir(parents=True)
    write_rows(folder / "predictions.arrow", rows, {**types, "confidence": pa.float32()})
    correct = [sum(row[2] == row[3] for row in answers(task)) for task in tasks]
    counts = [len(answers(task)) for task in tasks]
    accuracy = [round(right / count, 6) for right, count in zip(correct, counts, strict=True)]
    metrics = {"step": tasks[-1], "tasks": tasks, "accuracy": accuracy, "samples": counts, "correct": correct}
    write_json(folder / "metrics.json", metrics)


def chain(folder: Path, steps: int) -> None:
    """Make a chain of so many steps in a folder, which becomes the working directory."""
    from dvc.repo import Repo, lock_repo

    from pipelines.versioning.patches import apply_patches

    apply_patches()  # else DVC parses params.yaml for each stage, which takes hours of 1,000 steps
    tasks = [f"t{index:02}" for index in range(1, steps + 1)]
    project(folder, tasks)
    start(out=ARTIFACTS / "split/t00", evaluation=ARTIFACTS / "evaluation/t00", gate=ARTIFACTS / "gate/t00")
    torch.manual_seed(0)
    model = timm.create_model(MODEL, num_classes=0).eval()
    (ARTIFACTS / "model/t00").mkdir(parents=True)
    write_backbone(ARTIFACTS / "model/t00", Backbone(model=model, description={"name": MODEL}))
    targets = {name: (d.rows, d.columns) for name, d in inject_adapters(model).items()}
    generator = torch.Generator().manual_seed(0)
    for number in range(1, steps + 1):
        step(tasks[:number], targets, generator)
    code(out=ARTIFACTS / "code")
    report(artifacts=ARTIFACTS, out=ARTIFACTS / "report", metrics=Path("metrics.json"))
    with contextlib.closing(Repo()) as repo, lock_repo(repo):
        stages = repo.stage.load_all("dvc.yaml")
        for each in stages:
            each.save(run_cache=False)
            for dependency in each.deps:  # stages share what was parsed, which dvc.lock would have as anchors
                dependency.hash_info = copy.deepcopy(dependency.hash_info)
        stages[0].dvcfile.dump_stages(stages, update_pipeline=False)  # at once: DVC writes all for each


def measure(steps: int, times: int) -> dict[str, float]:
    """Verify the chain in the working directory a few times. Medians, in seconds, of the clock and of the CPUs."""
    files = [path for path in ARTIFACTS.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    verified, worked, hashed = [], [], []
    for _ in range(times):
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "pipelines", "audit", "verify"], check=True, stdout=subprocess.DEVNULL
        )
        verified.append(time.perf_counter() - began)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        worked.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        began = time.perf_counter()
        for path in files:
            data = path.read_bytes()
            hashlib.sha256(data).digest()
            hashlib.md5(data, usedforsecurity=False).digest()
        hashed.append(time.perf_counter() - began)
    seconds = {"verified": verified, "verified, CPU": worked, "the hashes alone": hashed}
    return {
        "steps": steps,
        "files": len(files),
        "MiB": round(size / 2**20),
        **{name: round(sorted(found)[len(found) // 2], 1) for name, found in seconds.items()},
        "peak memory, MiB": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024),
    }


def main() -> None:
    """Build chains, verify each a few times, print the figures and note them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", nargs="+", type=int, default=[20])
    parser.add_argument("--times", type=int, default=3, help="how often to verify; the median counts")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    results = arguments.results.absolute()
    for steps in arguments.steps:
        with TemporaryDirectory(prefix="sdlora-audit-") as folder:
            chain(Path(folder), steps)
            found = measure(steps, arguments.times)
            os.chdir(REPOSITORY)
        sys.stdout.write("  ".join(f"{name} {value}" for name, value in found.items()) + "\n")
        sys.stdout.flush()
        results.parent.mkdir(parents=True, exist_ok=True)
        with results.open("a") as file:
            row = {"machine": platform.machine(), "cores": os.cpu_count(), "model": MODEL, **found}
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
