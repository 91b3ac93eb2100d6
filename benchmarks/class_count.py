"""What more classes cost: the classifier that a step settles, its statistics, and the class map of its split.

Random statistics in the size of ViT-B/16 (768 features, 16 principal directions), 100 classes a task. Seconds of the
clock of each head, of taking the statistics of one class, and of reading a class map; bytes of each file. The head
`aligned` trains a number of steps that hardly depends on the classes, so it is timed whole.

    python benchmarks/class_count.py --classes 100 1000 10000
"""

import argparse
import json
import os
import platform
import resource
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from pipelines.project.files import read_json, write_json
from pipelines.project.schemas import ClassMap
from sdlora.head import initial_block
from sdlora.heads import HEADS
from sdlora.statistics import ClassStatistics, class_statistics

RESULTS = Path(__file__).parent / "results/class_count.jsonl"
FEATURES, RANK, A_TASK = 768, 16, 100
IMAGES = 100
"""Of the class whose statistics are taken."""


def measure(classes: int, heads: list[str], folder: Path) -> Iterator[dict[str, Any]]:
    """Measure a number of classes."""
    generator = torch.Generator().manual_seed(0)
    tasks = [f"t{index:04d}" for index in range(1, classes // A_TASK + 1)]
    statistics = {
        task: ClassStatistics(
            images=torch.full((A_TASK,), IMAGES),
            mean=torch.randn(A_TASK, FEATURES, generator=generator),
            factors=torch.randn(A_TASK, FEATURES, RANK, generator=generator) / RANK,
            spread=torch.ones(A_TASK),
        )
        for task in tasks
    }
    rows = {task: initial_block(A_TASK, FEATURES, generator=generator) for task in tasks}
    of_statistics = sum(part.nbytes for known in statistics.values() for part in known)
    yield {"what": "bytes of the statistics, all steps", "bytes": of_statistics}
    yield {
        "what": "bytes of the rows in use",
        "bytes": sum(part.nbytes for row in rows.values() for part in row),
    }
    for head in heads:
        settle = HEADS[head].settle
        if settle is None:
            continue
        begun = time.monotonic()
        settle(rows, statistics, generator=generator)
        yield {"what": f"settling {head}", "seconds": round(time.monotonic() - begun, 2)}
    entries = [
        {"label": label, "name": f"class-{label:06d}", "task": tasks[label // A_TASK]}
        for label in range(classes)
    ]
    path = folder / "classes.json"
    write_json(path, {"classes": entries, "tasks": tasks})
    begun = time.monotonic()
    read_json(path, ClassMap)
    yield {
        "what": "class map of one split",
        "bytes": path.stat().st_size,
        "seconds": round(time.monotonic() - begun, 2),
    }


def one_class() -> dict[str, Any]:
    """Measure taking the statistics of a class."""
    features = torch.randn(10 * IMAGES, FEATURES)
    labels = torch.arange(10).repeat_interleave(IMAGES)
    begun = time.monotonic()
    class_statistics(features, labels, rank=RANK)
    return {
        "what": f"statistics of a class of {IMAGES} images",
        "seconds": round((time.monotonic() - begun) / 10, 4),
    }


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--classes", type=int, nargs="+", default=[100, 1000, 10000], help="multiples of 100")
    parser.add_argument("--heads", nargs="*", default=["ncm", "lda", "aligned"], help="which are timed")
    parser.add_argument("--results", type=Path, default=RESULTS, help="gets a line for each number")
    arguments = parser.parse_args()
    machine = {"machine": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    with TemporaryDirectory() as folder, arguments.results.open("a", encoding="utf-8") as file:
        for classes in arguments.classes:
            for row in (*measure(classes, arguments.heads, Path(folder)), one_class()):
                about = {**machine, "day": datetime.now(UTC).date().isoformat(), "classes": classes}
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
                row = {
                    **about,
                    **row,
                    "peak MiB so far": peak,
                    "load": [round(each, 1) for each in os.getloadavg()],
                }
                print(json.dumps(row), flush=True)
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
