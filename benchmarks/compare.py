"""Compare the methods on the embedded benchmarks over seeds, by the library alone: no DVC, no Prefect.

A seed decides the class order (numpy's legacy permutation, as `sdlora plan` does), the initial factors and the order
of the images. The heads do not touch the training, so one chain gives the result of every head. With --validation, a
fifth of every class's training images stands in for the test images, which are then not read: choices are made on that.

Every finished chain is one line of a JSON-lines file; a chain that is there is not repeated, so the command can be
interrupted and given again. A chain is named by its settings and not by the code: after a change of a method or a
head, delete its lines. --write puts all that is there into docs/reference/comparison.md.
"""

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines.data.decoding import decode
from pipelines.data.packed import ImageRow, read_images, write_images
from pipelines.project.files import natural_key
from pipelines.project.param_checks import HEADS_OF
from pipelines.project.settings import Digits, EmbeddedGlyphs
from pipelines.stages.fetch import KNOWN
from sdlora.backbones import Backbone, create_backbone
from sdlora.classifier import ModelState, merged_classifier
from sdlora.devices import best_device, set_deterministic
from sdlora.evaluation import feature_batches
from sdlora.formulations import FORMULATIONS
from sdlora.freezing import freeze, measured, recompute_head
from sdlora.heads import HEADS
from sdlora.methods import METHODS, Settings
from sdlora.metrics import average_accuracy, forgetting, last_accuracy
from sdlora.preprocessing import Preprocessing
from sdlora.seeding import generator_for
from sdlora.training import Fit, Schedule, TaskImages

RESULTS = Path("benchmarks/results/compare.jsonl")
PAGE = Path("docs/reference/comparison.md")
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
    compile=False,
)
ENTRIES = {"digits": Digits(test_fraction=0.2, seed=0), "glyphs100": EmbeddedGlyphs()}
RANKS = {"t01": 10, "t04": 8, "t08": 6}
SUITES = {
    "glyphs100-10": ("glyphs100", 10, [1993, 1994, 1995, 1996, 1997]),
    "digits-5": ("digits", 5, [1993, 1994, 1995, 1996, 1997]),
    "glyphs100-20": ("glyphs100", 20, [1993, 1994, 1995]),
}
"""Name → data set, number of tasks, seeds."""
COVARIANCE_RANK = 16


@dataclass(frozen=True)
class Variant:
    """A row of the comparison: a method with its settings."""

    method: str
    formulation: str = "continuous"
    tolerance: float = 0.0
    compress: float | None = None

    @property
    def heads(self) -> list[str]:
        """The heads that go with the method."""
        return [name for name in HEADS if name in HEADS_OF.get(self.method, HEADS)]


VARIANTS = {
    "ncm": Variant("ncm"),
    "frozen": Variant("frozen"),
    "finetune": Variant("finetune"),
    "sdlora continuous": Variant("sdlora"),
    "sdlora reference": Variant("sdlora", "reference"),
    "sdlora paper": Variant("sdlora", "paper"),
    "sdlora-rr continuous": Variant("sdlora-rr"),
    "sdlora-kd continuous 0.5": Variant("sdlora-kd", tolerance=0.5),
    "olora": Variant("olora"),
    "nlora": Variant("nlora"),
    "inflora": Variant("inflora"),
    "clora": Variant("clora"),
    "joint": Variant("joint"),
}


class Images:
    """All images of a data set as pixels for one backbone, by class and split."""

    def __init__(self, name: str, backbone: Backbone, folder: Path, *, validation: bool) -> None:
        rows = [
            ImageRow(id=str(path), label=0, image=data, sha256="", pixels="")
            for path, data in KNOWN[name](ENTRIES[name]).files
            if not (validation and path.parts[0] == "test")
        ]
        packed = folder / f"{name}.arrow"
        packed.parent.mkdir(parents=True, exist_ok=True)
        write_images(packed, rows)
        self.pixels = torch.from_numpy(decode(read_images(packed), Preprocessing.of(backbone.description)))
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

    def part(self, split: str, classes: list[str]) -> TaskImages:
        """Pixels and labels (position in `classes`) of one split."""
        indices = [self.of[split, name] for name in classes]
        labels = torch.repeat_interleave(torch.arange(len(classes)), torch.tensor([len(i) for i in indices]))
        return TaskImages(self.pixels[torch.cat(indices)], labels)


def run_chain(images: Images, run: Mapping[str, Any], variant: Variant) -> dict[str, Any]:
    """Learn a whole chain and evaluate every head after every step."""
    order = np.random.RandomState(run["seed"]).permutation(len(images.classes))
    names = [images.classes[i] for i in order]
    groups = [list(group) for group in np.array_split(names, run["tasks"])]
    method = METHODS[variant.method]
    formulation = replace(FORMULATIONS[variant.formulation], **run["formulation_choices"])
    settings = Settings(
        formulation=formulation,
        rank=run["rank"],
        rank_schedule=RANKS,
        tolerance=variant.tolerance,
        compress=variant.compress,
        penalty=run["penalty"],
    )
    base = create_backbone(run["backbone"])
    learned = ModelState()
    settled = dict.fromkeys(variant.heads, learned)
    accuracy = {head: np.full((run["tasks"], run["tasks"]), np.nan) for head in variant.heads}
    samples, facts, trained, seconds = [0] * run["tasks"], [], 0, defaultdict(float)
    for step, group in enumerate(groups):
        task = f"t{step + 1:02}"
        first = 0 if method.joint else step
        started = time.monotonic()
        fit = Fit(
            create_backbone(run["backbone"]).model,
            learned,
            tasks={f"t{i + 1:02}": images.part("train", groups[i]) for i in range(first, step + 1)},
            mean=base.description["pretrained_cfg"]["mean"],
            std=base.description["pretrained_cfg"]["std"],
            method=method,
            settings=settings,
            schedule=Schedule(**run["schedule"]),
            seed=run["seed"],
            device=best_device(),
        )
        for _ in fit.run():
            pass
        trained = fit.trained_parameters
        result = fit.result()
        frozen = freeze(learned, result, method=method, settings=settings)
        seconds["fit"] += time.monotonic() - started
        pixels, labels = images.part("train", group)
        known: dict[int, Tensor] = {}
        training = {id(learned): learned, id(frozen.learned): frozen.learned}

        def training_features(
            which: ModelState,
            pixels: Tensor = pixels,
            known: dict[int, Tensor] = known,
            all_: dict = training,
        ) -> Tensor:
            # The heads share the network: what differs between them is not in the features.
            key = next(k for k, held in all_.items() if held.magnitudes is which.magnitudes)
            if key not in known:
                known[key] = features(base, run["backbone"], all_[key], pixels)
            return known[key]

        if frozen.changed:
            training[id(frozen.trained)] = frozen.trained
            frozen = measured(frozen, features=training_features)
        facts.append(dict(frozen.facts))
        started = time.monotonic()
        if any(HEADS[name].settle for name in variant.heads):
            training_features(learned)
            training_features(frozen.learned)
        seconds["features"] += time.monotonic() - started
        for name in variant.heads:
            started = time.monotonic()
            before = settled[name]
            settled[name] = recompute_head(
                before,
                frozen.learned,
                task=task,
                labels=labels,
                features=training_features,
                head=HEADS[name],
                covariance_rank=COVARIANCE_RANK,
                generator=generator_for(run["seed"], "settle", task),
            )
            seconds[name] += time.monotonic() - started
        learned = frozen.learned
        offset = 0
        for past, classes in enumerate(groups[: step + 1]):
            pixels, labels = images.part("test", classes)
            found = features(base, run["backbone"], learned, pixels)
            for name in variant.heads:
                weight = torch.cat([block.weight for block in settled[name].rows.values()])
                bias = torch.cat([block.bias for block in settled[name].rows.values()])
                right = (found @ weight.T + bias).argmax(dim=1) == labels + offset
                accuracy[name][step, past] = right.double().mean().item()
            samples[past] = len(labels)
            offset += len(classes)
    return {
        "trained_parameters": trained,
        "facts": facts,
        "directions": len(learned.directions),
        "heads": {
            name: {
                "accuracy": [
                    [round(v, 6) for v in row[: i + 1]] for i, row in enumerate(accuracy[name].tolist())
                ],
                "last": round(last_accuracy(accuracy[name]), 6),
                "last_per_sample": round(last_accuracy(accuracy[name], samples), 6),
                "average": round(average_accuracy(accuracy[name]), 6),
                "forgetting": round(forgetting(accuracy[name]), 6),
                "stored_numbers": stored_numbers(settled[name]),
                "seconds": round(
                    seconds["fit"] + seconds[name] + (seconds["features"] if HEADS[name].settle else 0), 1
                ),
            }
            for name in variant.heads
        },
    }


def features(base: Backbone, name: str, learned: ModelState, pixels: Tensor) -> Tensor:
    """Features (n, d) of images under the model of what has been learned."""
    device = best_device()
    model = merged_classifier(create_backbone(name).model, learned).to(device)
    config = base.description["pretrained_cfg"]
    batches = feature_batches(
        model, pixels, mean=config["mean"], std=config["std"], batch_size=256, device=device
    )
    return torch.cat(list(batches))


def stored_numbers(learned: ModelState) -> int:
    """How many numbers a chain has to keep to go on: directions, magnitudes, head, statistics, memory."""
    tensors = [part for d in learned.directions.values() for pair in d.values() for part in pair]
    tensors += [part for rows in (learned.head, learned.settled) for block in rows.values() for part in block]
    tensors += [part for held in (learned.statistics, learned.drift) for one in held.values() for part in one]
    return sum(
        tensor.numel() for tensor in [*tensors, *learned.magnitudes.values(), *learned.memory.values()]
    )


def wanted(arguments: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """The chains that were asked for: variant, and the key under which the result is stored."""
    schedule = replace(SCHEDULE, learning_rate=arguments.learning_rate, epochs=arguments.epochs)
    choices = {key: getattr(arguments, key) for key in ("magnitude_start", "carried", "initial_up")}
    for suite in arguments.suites:
        data, tasks, seeds = SUITES[suite]
        for seed in arguments.seeds or seeds:
            for name in arguments.variants:
                variant = VARIANTS[name]
                if arguments.tolerance is not None or arguments.compress is not None:
                    variant = replace(
                        variant, tolerance=arguments.tolerance or 0.0, compress=arguments.compress
                    )
                yield (
                    name,
                    {
                        "data": data,
                        "tasks": tasks,
                        "seed": seed,
                        "validation": arguments.validation,
                        **asdict(variant),
                        "covariance_rank": COVARIANCE_RANK,
                        "rank": arguments.rank,
                        "penalty": arguments.penalty,
                        "formulation_choices": {k: v for k, v in choices.items() if v is not None},
                        "backbone": arguments.backbone,
                        "schedule": asdict(schedule),
                    },
                )


def stored(path: Path) -> list[dict[str, Any]]:
    """The results so far; of a run that two processes made at once, the first."""
    lines = path.read_text().splitlines() if path.is_file() else []
    results: dict[str, dict[str, Any]] = {}
    for result in map(json.loads, lines):
        # Chains without this key were measured when nothing could be compiled.
        result["run"]["schedule"].setdefault("compile", False)
        results.setdefault(json.dumps(result["run"], sort_keys=True), result)
    return list(results.values())


def is_default(run: Mapping[str, Any]) -> bool:
    """Whether a run is of the comparison, and not one that tried another setting."""
    return (
        not run["validation"]
        and run["penalty"] is None
        and not run["formulation_choices"]
        and run["rank"] == 10
        and run["backbone"] == "glyph_vit"
        and run["schedule"] == asdict(SCHEDULE)
    )


def spread(values: list[float]) -> str:
    """Mean ± standard deviation in per cent."""
    array = 100 * np.array(values)
    deviation = f" ± {array.std(ddof=1):.1f}" if len(array) > 1 else ""
    return f"{array.mean():.1f}{deviation}"


def table(results: list[dict[str, Any]], data: str, tasks: int) -> list[str]:
    """The rows of one benchmark, best last accuracy in bold, ties within its own spread marked."""
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for label, variant in VARIANTS.items():
        for head in variant.heads:
            found = [
                result
                for result in results
                if is_default(result["run"])
                and (result["run"]["data"], result["run"]["tasks"]) == (data, tasks)
                and Variant(*(result["run"][key] for key in asdict(variant))) == variant
            ]
            if found:
                rows[label, head] = found
    if not rows:
        return ["Not run yet."]
    last = {key: np.array([r["heads"][key[1]]["last"] for r in found]) for key, found in rows.items()}
    # While the table grows, a row of fewer seeds may just have had the easier ones.
    most = max(len(values) for values in last.values())
    rivals = {key: values for key, values in last.items() if key[0] != "joint" and len(values) == most}
    best = max(rivals, key=lambda key: rivals[key].mean())
    margin = rivals[best].std(ddof=1) if len(rivals[best]) > 1 else 0.0
    lines = [
        "| method | head | seeds | last | average | forgetting | trained | stored | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (label, head), found in rows.items():
        of = [result["heads"][head] for result in found]
        shown = spread([r["last"] for r in of])
        if (label, head) == best:
            shown = f"**{shown}**"
        elif (label, head) in rivals and rivals[best].mean() - last[label, head].mean() <= margin:
            shown = f"{shown} ="
        lines.append(
            f"| {label} | {head} | {len(found)} | {shown} | {spread([r['average'] for r in of])} "
            f"| {spread([r['forgetting'] for r in of])} | {found[0]['trained_parameters']:,} "
            f"| {of[0]['stored_numbers']:,} | {np.mean([r['seconds'] for r in of]):.0f} |"
        )
    return lines


def page(results: list[dict[str, Any]]) -> str:
    """docs/reference/comparison.md."""
    titles = {
        "glyphs100-10": "glyphs100, ten tasks of ten classes",
        "glyphs100-20": "glyphs100, twenty tasks of five classes",
        "digits-5": "digits, five tasks of two classes",
    }
    lines = [
        "# Comparison",
        "",
        "Written by `make compare`: do not edit. Accuracy in %, mean ± standard deviation over the seeds. Every class",
        "seen so far is a candidate.",
        "",
        "Among the rows that have all seeds so far, the best *last* accuracy without old images is bold. `=` marks",
        "those within the best one's own spread.",
        "",
        "- *last*: after the last task, mean over the tasks. *average*: its mean over the steps.",
        "- *trained*: parameters of the last step.",
        "- *stored*: numbers that the chain keeps at its end (directions, magnitudes, head, statistics, memory), the",
        "  backbone aside.",
        "- *seconds*: fits and the head's own training of one chain, on one thread of a shared x86-64 machine with",
        "  other programs running. Only their order says something.",
        "",
        "Heads made of statistics were measured with a shift of means in place of the drift maps of today,",
        "which [differ by less than a point](../explanation/method.md#drift).",
        "",
        "All methods have the backbone `glyph_vit`, rank 10, SGD with momentum 0.9, rate 0.01, 10 epochs and batch 32.",
        "[Methods](methods.md) says what each method and head is, and",
        "[Adapted and frozen features](../explanation/adapted-features.md) what the table means.",
    ]
    for suite, title in titles.items():
        data, tasks, _ = SUITES[suite]
        lines += ["", f"## {title}", "", *table(results, data, tasks)]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what is asked for and not yet there; then write the page, if asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suites", nargs="+", choices=SUITES, default=list(SUITES))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", nargs="+", type=int, help="default: those of the suite")
    parser.add_argument("--validation", action="store_true", help="judge on held-out training images")
    parser.add_argument("--learning-rate", type=float, default=SCHEDULE.learning_rate)
    parser.add_argument("--epochs", type=int, default=SCHEDULE.epochs)
    parser.add_argument("--rank", type=int, default=10)
    parser.add_argument("--penalty", type=float, help="default: the method's own")
    parser.add_argument("--magnitude-start", type=float, help="default: the formulation's own")
    parser.add_argument(
        "--carried", action=argparse.BooleanOptionalAction, help="default: the formulation's own"
    )
    parser.add_argument("--initial-up", choices=("zero", "uniform"), help="default: the formulation's own")
    parser.add_argument("--tolerance", type=float, help="of sdlora-kd")
    parser.add_argument("--compress", type=float, help="share of a direction's energy that is kept")
    parser.add_argument("--backbone", default="glyph_vit")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--cache", type=Path, default=Path(".sdlora/benchmarks"))
    parser.add_argument("--write", action="store_true", help=f"write {PAGE} at the end")
    parser.add_argument("--show", action="store_true", help="run nothing")
    arguments = parser.parse_args()
    set_deterministic(True)
    images: dict[str, Images] = {}
    for name, run in [] if arguments.show else list(wanted(arguments)):
        if any(result["run"] == run for result in stored(arguments.results)):
            continue
        data = run["data"]
        if data not in images:
            backbone = create_backbone(arguments.backbone)
            images[data] = Images(data, backbone, arguments.cache, validation=arguments.validation)
        variant = Variant(*(run[key] for key in asdict(VARIANTS[name])))
        result = run_chain(images[data], run, variant)
        arguments.results.parent.mkdir(parents=True, exist_ok=True)
        with arguments.results.open("a") as file:
            file.write(json.dumps({"run": run, **result}, sort_keys=True) + "\n")
        lasts = "  ".join(f"{head} {found['last']:.4f}" for head, found in result["heads"].items())
        print(f"{data} in {run['tasks']}, seed {run['seed']}, {name}: last {lasts}", flush=True)
    if arguments.write:
        PAGE.write_text(page(stored(arguments.results)), encoding="utf-8")


if __name__ == "__main__":
    main()
