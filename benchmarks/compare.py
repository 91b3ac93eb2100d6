"""Accuracy of the methods on the embedded benchmarks over seeds, by the library alone: no DVC, no Prefect.

A seed decides the class order (numpy's legacy permutation, as `sdlora plan` does), the initial factors and the order
of the images. With --validation, a fifth of every class's training images stands in for the test images, which are
then not read: choices are made on that. Every finished run is one line of a JSON-lines file; a run that is there
is not repeated, so the command can be interrupted and given again.
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from pipelines.fetch import KNOWN
from pipelines.files import natural_key
from pipelines.images import ImageRow, decode, read_images, write_images
from pipelines.params import Digits, Glyphs100
from sdlora.backbones import Backbone, create_backbone
from sdlora.classifier import Learned, merged_classifier
from sdlora.devices import best_device, set_deterministic
from sdlora.evaluation import predict_batches
from sdlora.formulations import FORMULATIONS
from sdlora.methods import METHODS
from sdlora.metrics import average_accuracy, forgetting, last_accuracy
from sdlora.training import Fit, Schedule, freeze

SCHEDULE = Schedule(
    optimizer="sgd",
    learning_rate=0.01,
    momentum=0.9,
    decay="constant",
    epochs=10,
    batch_size=32,
    crop_scale=1.0,
    flip=False,
    precision="fp32",
)
ENTRIES = {"digits": Digits(test_fraction=0.2, seed=0), "glyphs100": Glyphs100()}
TASKS = {"digits": 5, "glyphs100": 10}
VARIANTS = {
    "frozen": ("frozen", "continuous"),
    "finetune": ("finetune", "continuous"),
    "reference": ("sdlora", "reference"),
    "continuous": ("sdlora", "continuous"),
}


class Images:
    """All images of a data set as pixels for one backbone, by class and split."""

    def __init__(self, name: str, backbone: Backbone, folder: Path, *, validation: bool) -> None:
        config = backbone.description["pretrained_cfg"]
        channels, height, width = backbone.input_size
        rows = [
            ImageRow(id=str(path), label=0, image=data, sha256="", pixels="")
            for path, data in KNOWN[name](ENTRIES[name]).files
            if not (validation and path.parts[0] == "test")
        ]
        packed = folder / f"{name}.arrow"
        packed.parent.mkdir(parents=True, exist_ok=True)
        write_images(packed, rows)
        self.pixels = torch.from_numpy(
            decode(
                read_images(packed),
                channels=channels,
                size=(height, width),
                crop_pct=config["crop_pct"],
                interpolation=config["interpolation"],
            )
        )
        paths = [Path(row.id) for row in rows]
        self.classes = sorted({path.parts[1] for path in paths}, key=natural_key)
        self.of: dict[tuple[str, str], torch.Tensor] = {}
        for name_of_class in self.classes:
            for split in ("train", "test"):
                chosen = [i for i, p in enumerate(paths) if p.parts[:2] == (split, name_of_class)]
                self.of[split, name_of_class] = torch.tensor(chosen, dtype=torch.long)
            if validation:
                train = self.of["train", name_of_class]
                order = np.random.default_rng([0, len(train)]).permutation(len(train))
                held = max(1, len(train) // 5)
                self.of["test", name_of_class] = train[np.sort(order[:held])]
                self.of["train", name_of_class] = train[np.sort(order[held:])]

    def part(self, split: str, classes: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixels and labels (position in `classes`) of one split."""
        indices = [self.of[split, name] for name in classes]
        labels = torch.repeat_interleave(torch.arange(len(classes)), torch.tensor([len(i) for i in indices]))
        return self.pixels[torch.cat(indices)], labels


def run_chain(
    images: Images,
    backbone_name: str,
    *,
    tasks: int,
    variant: str,
    seed: int,
    rank: int,
    magnitude_start: float | None,
    schedule: Schedule,
) -> dict[str, Any]:
    """Learn a whole chain and evaluate after every step."""
    method, formulation = VARIANTS[variant]
    order = np.random.RandomState(seed).permutation(len(images.classes))
    names = [images.classes[i] for i in order]
    groups = [list(group) for group in np.array_split(names, tasks)]
    device = best_device()
    learned, trained, started = Learned(), 0, time.monotonic()
    accuracy = np.full((tasks, tasks), np.nan)
    samples = [0] * tasks
    for step, group in enumerate(groups):
        pixels, labels = images.part("train", group)
        backbone = create_backbone(backbone_name)
        config = backbone.description["pretrained_cfg"]
        fit = Fit(
            backbone.model,
            learned,
            task=f"t{step + 1:02}",
            images=pixels,
            labels=labels,
            mean=config["mean"],
            std=config["std"],
            method=METHODS[method],
            formulation=FORMULATIONS[formulation],
            rank=rank,
            magnitude_start=magnitude_start,
            schedule=schedule,
            seed=seed,
            device=device,
        )
        for _ in fit.run():
            pass
        trained = fit.trained_parameters
        learned = freeze(learned, fit.result(), method=METHODS[method], formulation=FORMULATIONS[formulation])
        model = merged_classifier(create_backbone(backbone_name).model, learned).to(device)
        offset = 0
        for past, classes in enumerate(groups[: step + 1]):
            pixels, labels = images.part("test", classes)
            batches = predict_batches(
                model, pixels, mean=config["mean"], std=config["std"], batch_size=256, device=device
            )
            predicted = torch.cat([batch.classes for batch in batches])
            accuracy[step, past] = (predicted == labels + offset).double().mean().item()
            samples[past] = len(labels)
            offset += len(classes)
    return {
        "last_accuracy": round(last_accuracy(accuracy), 6),
        "last_accuracy_per_sample": round(last_accuracy(accuracy, samples), 6),
        "average_accuracy": round(average_accuracy(accuracy), 6),
        "average_accuracy_per_sample": round(average_accuracy(accuracy, samples), 6),
        "forgetting": round(forgetting(accuracy), 6),
        "trained_parameters": trained,
        "seconds": round(time.monotonic() - started, 1),
    }


def wanted(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The runs that were asked for, as the keys under which their results are stored."""
    schedule = replace(
        SCHEDULE,
        learning_rate=arguments.learning_rate,
        epochs=arguments.epochs,
        optimizer=arguments.optimizer,
        decay=arguments.decay,
    )
    for seed in arguments.seeds:
        for data in arguments.data:
            for variant in arguments.variants:
                yield {
                    "data": data,
                    "validation": arguments.validation,
                    "tasks": TASKS[data],
                    "variant": variant,
                    "seed": seed,
                    "rank": arguments.rank,
                    "magnitude_start": arguments.magnitude_start,
                    "backbone": arguments.backbone,
                    "schedule": asdict(schedule),
                }


def stored(path: Path) -> list[dict[str, Any]]:
    """The results so far."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def show(results: list[dict[str, Any]], asked: list[dict[str, Any]]) -> None:
    """Print mean ± standard deviation over the seeds."""
    table = Table("data", "variant", "seeds", "last", "average", "forgetting", "trained", "seconds")
    for data in dict.fromkeys(run["data"] for run in asked):
        for variant in dict.fromkeys(run["variant"] for run in asked):
            found = [
                result
                for run in asked
                if (run["data"], run["variant"]) == (data, variant)
                for result in results
                if result["run"] == run
            ]
            if not found:
                continue
            cells = []
            for key in ("last_accuracy", "average_accuracy", "forgetting"):
                values = 100 * np.array([result["result"][key] for result in found])
                cells.append(f"{values.mean():.1f} ± {values.std(ddof=1 if len(values) > 1 else 0):.1f}")
            trained = f"{found[0]['result']['trained_parameters']:,}"
            seconds = f"{np.mean([result['result']['seconds'] for result in found]):.0f}"
            table.add_row(data, variant, str(len(found)), *cells, trained, seconds)
    Console(width=120).print(table)


def main() -> None:
    """Run what is asked for and not yet there, then print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1993, 1994, 1995, 1996, 1997])
    parser.add_argument("--validation", action="store_true", help="judge on held-out training images")
    parser.add_argument("--learning-rate", type=float, default=SCHEDULE.learning_rate)
    parser.add_argument("--epochs", type=int, default=SCHEDULE.epochs)
    parser.add_argument("--optimizer", choices=("sgd", "adam"), default=SCHEDULE.optimizer)
    parser.add_argument("--decay", choices=("constant", "cosine"), default=SCHEDULE.decay)
    parser.add_argument("--rank", type=int, default=10)
    parser.add_argument("--magnitude-start", type=float, default=None, help="default: the formulation's own")
    parser.add_argument("--backbone", default="glyph_vit")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/accuracy.jsonl"))
    parser.add_argument("--cache", type=Path, default=Path(".sdlora/benchmarks"))
    parser.add_argument("--show", action="store_true", help="only print what is there")
    arguments = parser.parse_args()
    set_deterministic(True)
    asked = list(wanted(arguments))
    images: dict[str, Images] = {}
    for run in [] if arguments.show else asked:
        if any(result["run"] == run for result in stored(arguments.results)):
            continue
        data = run["data"]
        if data not in images:
            backbone = create_backbone(arguments.backbone)
            images[data] = Images(data, backbone, arguments.cache, validation=arguments.validation)
        result = run_chain(
            images[data],
            arguments.backbone,
            tasks=run["tasks"],
            variant=run["variant"],
            seed=run["seed"],
            rank=run["rank"],
            magnitude_start=run["magnitude_start"],
            schedule=Schedule(**run["schedule"]),
        )
        arguments.results.parent.mkdir(parents=True, exist_ok=True)
        with arguments.results.open("a") as file:
            file.write(json.dumps({"run": run, "result": result}, sort_keys=True) + "\n")
        print(f"{data} {run['variant']} seed {run['seed']}: last {result['last_accuracy']:.4f}", flush=True)
    show(stored(arguments.results), asked)


if __name__ == "__main__":
    main()
