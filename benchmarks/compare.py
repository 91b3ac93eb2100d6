"""Compare the methods on the embedded benchmarks over seeds, by the library alone: no DVC, no Prefect.

A seed decides the class order (numpy's legacy permutation, as `sdlora plan` does), the initial factors and the order
of the images. The heads do not touch the training, so one chain gives the result of every head. With --validation, a
fifth of every class's training images stands in for the test images, which are then not read: choices are made on that.

Each suite begins with its headroom: joint training on all images, minus frozen features. The rate of the joint training
and the head of both are chosen on held-out training images of the first seed, whatever --methods says.

Every finished chain is one line of a JSON-lines file; a chain that is there is not repeated, so the command can be
interrupted and given again. A chain is named by its settings and not by the code: after a change of a method or a
head, delete its lines. Its fits stay in --cache, named by the code too, so that another head costs no fit. --write puts
all that is there into docs/reference/comparison.md.
"""

import argparse
import hashlib
import json
import math
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipelines.data.decoding import decode
from pipelines.data.packed import ImageRow, read_images, write_images
from pipelines.project.files import natural_key
from pipelines.project.fingerprints import fingerprint
from pipelines.project.param_checks import HEADS_OF
from pipelines.project.settings import Digits, EmbeddedGlyphs
from pipelines.stages.fetch import KNOWN
from sdlora.backbones import Backbone, create_backbone
from sdlora.classifier import ModelState, merged_classifier
from sdlora.comparison import flips, holm
from sdlora.devices import best_device, set_deterministic
from sdlora.evaluation import feature_batches
from sdlora.fit_folder import read_fit, write_fit
from sdlora.formulations import FORMULATIONS
from sdlora.freezing import freeze, measured, recompute_head
from sdlora.head import block_logits
from sdlora.heads import HEADS
from sdlora.methods import METHODS, FitResult, Settings
from sdlora.metrics import average_accuracy, forgetting
from sdlora.preprocessing import Preprocessing
from sdlora.seeding import generator_for
from sdlora.statistics import class_statistics
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
ENTRIES = {
    "digits": Digits(test_fraction=0.2, seed=0),
    "glyphs100": EmbeddedGlyphs(),
    "glyphs100-scene": EmbeddedGlyphs(),
}
_LEAST_ROOM = 0.02
"""Headroom below which a set is too near to the backbone's pre-training to tell how methods learn."""
RANKS = {"t01": 10, "t04": 8, "t08": 6}
COVARIANCE_RANK = 16


@dataclass(frozen=True)
class Recipe:
    """How a row is trained, and what of the backbone is adapted."""

    schedule: Schedule = SCHEDULE
    targets: tuple[str, ...] | None = None
    """None for the method's own."""


def adam(rate: float) -> Recipe:
    """The recipe of papers on pre-trained transformers: Adam, a cosine, every projection."""
    schedule = replace(
        SCHEDULE, optimizer="adam", learning_rate=rate, decay="cosine", epochs=8, batch_size=64
    )
    return Recipe(schedule, ("q", "k", "v", "proj", "fc1", "fc2"))


def calm(recipe: Recipe) -> Recipe:
    """A recipe whose head starts with small rows and learns at a rate of its own."""
    return replace(recipe, schedule=replace(recipe.schedule, head_rate=0.01, head_start="small"))


def cropped(recipe: Recipe) -> Recipe:
    """A recipe with random crops of at least half the area."""
    return replace(recipe, schedule=replace(recipe.schedule, crop_scale=0.5))


def distilled(recipe: Recipe) -> Recipe:
    """A calm recipe with crops, whose features stay near those before the step."""
    quiet = calm(cropped(recipe))
    return replace(quiet, schedule=replace(quiet.schedule, feature_distillation=2.0))


_RATES = {f"Adam {rate}": adam(rate) for rate in (0.0003, 0.001, 0.003)}
_RATES["Adam 0.001, crops"] = cropped(adam(0.001))
RECIPES = {
    "SGD 0.01": Recipe(),
    **_RATES,
    "Adam 0.001, small rows": calm(adam(0.001)),
    "Adam 0.002, distilled": distilled(adam(0.002)),
}


@dataclass(frozen=True)
class Variant:
    """A row of the comparison: a method with its settings."""

    method: str
    formulation: str = "continuous"
    tolerance: float = 0.0
    compress: float | None = None
    recipe: str = "SGD 0.01"
    once: bool = False
    """Whether all images are learned at once and only then, which has no steps and leaves true statistics."""

    @property
    def heads(self) -> list[str]:
        """The heads that go with the method."""
        return [name for name in HEADS if self.once or name in HEADS_OF.get(self.method, HEADS)]

    @property
    def key(self) -> dict[str, Any]:
        """What of it names a run. The last two came later, and stand only where they say something."""
        recipe = RECIPES[self.recipe]
        return {
            "method": self.method,
            "formulation": self.formulation,
            "tolerance": self.tolerance,
            "compress": self.compress,
            "schedule": asdict(recipe.schedule),
            **({"targets": list(recipe.targets)} if recipe.targets else {}),
            **({"once": True} if self.once else {}),
        }


VARIANTS = {
    "ncm": Variant("ncm"),
    "frozen": Variant("frozen"),
    "finetune": Variant("finetune"),
    "finetune, Adam 0.001": Variant("finetune", recipe="Adam 0.001"),
    "sdlora continuous": Variant("sdlora"),
    "sdlora continuous, Adam 0.001": Variant("sdlora", recipe="Adam 0.001"),
    "sdlora continuous, Adam 0.001, small rows": Variant("sdlora", recipe="Adam 0.001, small rows"),
    "sdlora continuous, Adam 0.002, distilled": Variant("sdlora", recipe="Adam 0.002, distilled"),
    "sdlora reference": Variant("sdlora", "reference"),
    "sdlora paper": Variant("sdlora", "paper"),
    "sdlora-rr continuous": Variant("sdlora-rr"),
    "sdlora-kd continuous 0.5": Variant("sdlora-kd", tolerance=0.5),
    "olora": Variant("olora"),
    "nlora": Variant("nlora"),
    "inflora": Variant("inflora"),
    "clora": Variant("clora"),
    "joint": Variant("joint"),
    **{f"joint at once, {name}": Variant("joint", recipe=name, once=True) for name in _RATES},
}
AT_ONCE = [label for label, variant in VARIANTS.items() if variant.once]
"""The rows among which the headroom's upper end is chosen."""
_DISTILLED = "sdlora continuous, Adam 0.002, distilled"
_AT_ONE_RATE = [label for label, variant in VARIANTS.items() if variant.recipe == "SGD 0.01"] + [_DISTILLED]
_FEW = [
    "frozen",
    "sdlora continuous",
    "sdlora continuous, Adam 0.001",
    "sdlora continuous, Adam 0.001, small rows",
    _DISTILLED,
    "finetune, Adam 0.001",
]
_FIVE_SEEDS = [1993, 1994, 1995, 1996, 1997]


class Suite(NamedTuple):
    """A table of the page."""

    data: str
    tasks: int
    title: str
    seeds: list[int]
    methods: list[str]
    """The rows that are run where --methods says nothing."""


SUITES = {
    "scene": Suite("glyphs100-scene", 10, "glyphs100-scene, ten tasks of ten classes", _FIVE_SEEDS, _FEW),
    "scene-20": Suite(
        "glyphs100-scene", 20, "glyphs100-scene, twenty tasks of five classes", _FIVE_SEEDS, _FEW
    ),
    "glyphs100-10": Suite(
        "glyphs100",
        10,
        "glyphs100, ten tasks of ten classes",
        _FIVE_SEEDS,
        _AT_ONE_RATE,
    ),
    "glyphs100-20": Suite(
        "glyphs100", 20, "glyphs100, twenty tasks of five classes", [1993, 1994, 1995], _AT_ONE_RATE
    ),
    "digits-5": Suite("digits", 5, "digits, five tasks of two classes", _FIVE_SEEDS, _AT_ONE_RATE),
}


class Images:
    """All images of a data set as pixels for one backbone, by class and split."""

    def __init__(self, name: str, backbone: Backbone, folder: Path, *, validation: bool) -> None:
        rows = [
            ImageRow(id=str(path), label=0, image=data, sha256="", pixels="")
            for path, data in KNOWN[name](ENTRIES[name]).files
            if not (validation and path.parts[0] == "test")
        ]
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder) as own:  # another comparison may run at the same time
            packed = Path(own) / "images.arrow"
            write_images(packed, rows)
            self.pixels = torch.from_numpy(
                decode(read_images(packed), Preprocessing.of(backbone.description))
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

    def part(self, split: str, classes: list[str]) -> TaskImages:
        """Pixels and labels (position in `classes`) of one split."""
        indices = [self.of[split, name] for name in classes]
        labels = torch.repeat_interleave(torch.arange(len(classes)), torch.tensor([len(i) for i in indices]))
        return TaskImages(self.pixels[torch.cat(indices)], labels)


def groups_of(images: Images, run: Mapping[str, Any]) -> list[list[str]]:
    """The classes of each task, in the order of the run's seed."""
    order = np.random.RandomState(run["seed"]).permutation(len(images.classes))
    names = [images.classes[i] for i in order]
    return [list(group) for group in np.array_split(names, run["tasks"])]


def settings_of(run: Mapping[str, Any]) -> Settings:
    """The settings of a run's method."""
    return Settings(
        formulation=replace(FORMULATIONS[run["formulation"]], **run["formulation_choices"]),
        rank=run["rank"],
        rank_schedule=run.get("rank_schedule", RANKS),
        tolerance=run["tolerance"],
        compress=run["compress"],
        penalty=run["penalty"],
    )


class Fitted(NamedTuple):
    """A finished fit."""

    result: FitResult
    trained_parameters: int
    seconds: float


def fitted(
    images: Images, run: Mapping[str, Any], tasks: Mapping[str, list[str]], before: ModelState
) -> Fitted:
    """The finished fit of some tasks (id → classes), made once by the same code."""
    key = json.dumps([run, tasks, fingerprint("sdlora.training", "Fit").text], sort_keys=True)
    folder = images.folder / "fits" / hashlib.sha256(key.encode()).hexdigest()
    if not folder.is_dir():
        started = time.monotonic()
        fit = fit_of(images, run, tasks, before)
        description = {
            "task": fit.task,
            "classes": tasks[fit.task],
            "trained_parameters": fit.trained_parameters,
            "seconds": round(time.monotonic() - started, 1),
        }
        folder.parent.mkdir(exist_ok=True)
        with TemporaryDirectory(dir=images.folder) as unfinished:
            whole = Path(unfinished) / "fit"
            whole.mkdir()
            write_fit(whole, fit.result(), curve=fit.curve, description=description)
            whole.rename(folder)
    described = json.loads((folder / "fit.json").read_text())
    result = read_fit(folder, described, tasks=[*before.head, *tasks])
    return Fitted(result, described["trained_parameters"], described["seconds"])


def fit_of(images: Images, run: Mapping[str, Any], tasks: Mapping[str, list[str]], before: ModelState) -> Fit:
    """The fit of some tasks (id → classes), run to its end."""
    config = create_backbone(run["backbone"]).description["pretrained_cfg"]
    fit = Fit(
        create_backbone(run["backbone"]).model,
        before,
        tasks={task: images.part("train", classes) for task, classes in tasks.items()},
        mean=config["mean"],
        std=config["std"],
        method=METHODS[run["method"]],
        settings=settings_of(run),
        schedule=Schedule(**run["schedule"]),
        seed=run["seed"],
        device=best_device(),
        targets=run.get("targets"),
    )
    for _ in fit.run():
        pass
    return fit


def answers(
    images: Images, run: Mapping[str, Any], groups: list[list[str]], heads: Mapping[str, ModelState]
) -> dict[str, list[np.ndarray]]:
    """Head → for each task, which of its test images (n,) it names right. The heads share the network."""
    base = create_backbone(run["backbone"])
    right: dict[str, list[np.ndarray]] = {name: [] for name in heads}
    offset = 0
    for classes in groups:
        pixels, labels = images.part("test", classes)
        found = features(base, run["backbone"], next(iter(heads.values())), pixels)
        for name, settled in heads.items():
            named = block_logits(settled.rows.values(), found).argmax(dim=1) == labels + offset
            right[name].append(named.numpy())
        offset += len(classes)
    return right


def summary(right: list[np.ndarray]) -> dict[str, Any]:
    """What is kept of the answers after the last task. `right` has a bit for each image, task by task."""
    return {
        "last": round(float(np.mean([one.mean() for one in right])), 6),
        "last_per_sample": round(float(np.concatenate(right).mean()), 6),
        "right": np.packbits(np.concatenate(right)).tobytes().hex(),
    }


def with_true_statistics(
    images: Images, run: Mapping[str, Any], tasks: Mapping[str, list[str]], heads: Mapping[str, ModelState]
) -> dict[str, ModelState]:
    """The same models, head → model, with the statistics of all training images in place of what a chain has of them.

    The heads share the network.
    """
    base, learned = create_backbone(run["backbone"]), next(iter(heads.values()))
    statistics = {}
    for task, classes in tasks.items():
        pixels, labels = images.part("train", classes)
        found = features(base, run["backbone"], learned, pixels)
        statistics[task] = class_statistics(found, labels, rank=COVARIANCE_RANK)
    settled = {}
    for name, own in heads.items():
        settle, generator = HEADS[name].settle, generator_for(run["seed"], "settle", list(tasks)[-1])
        rows = settle({**own.head, **own.settled}, statistics, generator=generator) if settle else {}
        settled[name] = replace(own, settled=rows)
    return settled


def run_at_once(images: Images, run: Mapping[str, Any], heads: Sequence[str]) -> dict[str, Any]:
    """Learn all classes together, and evaluate every head of the statistics of all training images."""
    groups = groups_of(images, run)
    tasks = {f"t{i + 1:02}": group for i, group in enumerate(groups)}
    fit = fitted(images, run, tasks, ModelState())
    learned = freeze(
        ModelState(), fit.result, method=METHODS[run["method"]], settings=settings_of(run)
    ).learned
    settled = with_true_statistics(images, run, tasks, dict.fromkeys(heads, learned))
    right = answers(images, run, groups, settled)
    return {
        "trained_parameters": fit.trained_parameters,
        "heads": {
            name: {
                **summary(right[name]),
                "stored_numbers": stored_numbers(settled[name]),
                "seconds": fit.seconds,
            }
            for name in heads
        },
    }


def run_chain(images: Images, run: Mapping[str, Any], heads: Sequence[str]) -> dict[str, Any]:
    """Learn a whole chain and evaluate every head after every step."""
    groups = groups_of(images, run)
    method, settings = METHODS[run["method"]], settings_of(run)
    base = create_backbone(run["backbone"])
    learned = ModelState()
    settled = dict.fromkeys(heads, learned)
    accuracy = {head: np.full((run["tasks"], run["tasks"]), np.nan) for head in heads}
    facts, trained, seconds = [], 0, defaultdict(float)
    right: dict[str, list[np.ndarray]] = {}
    for step, group in enumerate(groups):
        task = f"t{step + 1:02}"
        first = 0 if method.joint else step
        fit = fitted(images, run, {f"t{i + 1:02}": groups[i] for i in range(first, step + 1)}, learned)
        trained = fit.trained_parameters
        frozen = freeze(learned, fit.result, method=method, settings=settings)
        seconds["fit"] += fit.seconds
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
        if any(HEADS[name].settle for name in heads):
            training_features(learned)
            training_features(frozen.learned)
        seconds["features"] += time.monotonic() - started
        for name in heads:
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
        right = answers(images, run, groups[: step + 1], settled)
        for name in heads:
            accuracy[name][step, : step + 1] = [one.mean() for one in right[name]]
    tasks = {f"t{i + 1:02}": group for i, group in enumerate(groups)}
    undrifted = answers(images, run, groups, with_true_statistics(images, run, tasks, settled))
    return {
        "trained_parameters": trained,
        "facts": facts,
        "directions": len(learned.directions),
        "heads": {
            name: {
                "accuracy": [
                    [round(v, 6) for v in row[: i + 1]] for i, row in enumerate(accuracy[name].tolist())
                ],
                **summary(right[name]),
                "last_true": summary(undrifted[name])["last"],
                "average": round(average_accuracy(accuracy[name]), 6),
                "forgetting": round(forgetting(accuracy[name]), 6),
                "stored_numbers": stored_numbers(settled[name]),
                "seconds": round(
                    seconds["fit"] + seconds[name] + (seconds["features"] if HEADS[name].settle else 0), 1
                ),
            }
            for name in heads
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


def key_of(
    label: str, suite: Suite, seed: int, arguments: argparse.Namespace, *, validation: bool
) -> dict[str, Any]:
    """The key under which a chain's result is stored: all that decides it."""
    choices = {key: getattr(arguments, key) for key in ("magnitude_start", "carried", "initial_up")}
    key = {
        "data": suite.data,
        "tasks": suite.tasks,
        "seed": seed,
        "validation": validation,
        **VARIANTS[label].key,
        "covariance_rank": COVARIANCE_RANK,
        "rank": arguments.rank,
        "penalty": arguments.penalty,
        "formulation_choices": {k: v for k, v in choices.items() if v is not None},
        "backbone": arguments.backbone,
    }
    given = {"learning_rate": arguments.learning_rate, "epochs": arguments.epochs}
    key["schedule"] = key["schedule"] | {k: v for k, v in given.items() if v is not None}
    if arguments.tolerance is not None or arguments.compress is not None:
        key |= {"tolerance": arguments.tolerance or 0.0, "compress": arguments.compress}
    return key


def wanted(arguments: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """The chains that were asked for, one after the other: label, and key. Each may decide which comes next."""
    for name in arguments.suite:
        suite = SUITES[name]
        seeds = arguments.seeds or suite.seeds
        for label in ["frozen", *AT_ONCE] if arguments.headroom else []:
            yield label, key_of(label, suite, suite.seeds[0], arguments, validation=True)
        for seed in seeds:
            labels = arguments.methods or suite.methods
            if arguments.headroom:
                ends = ends_of(stored(arguments.results), suite)
                labels = list(dict.fromkeys([*(label for label, _ in ends), *labels]))
            for label in labels:
                yield label, key_of(label, suite, seed, arguments, validation=arguments.validation)


def ends_of(results: list[dict[str, Any]], suite: Suite) -> list[tuple[str, str]]:
    """Where the headroom begins and ends, label and head: frozen features, and joint training at its own rate.

    Empty where they were not measured yet.
    """
    chosen = held_out(results, suite)
    ends = []
    for labels in (["frozen"], AT_ONCE):
        scores = {key: score for key, score in chosen.items() if key[0] in labels}
        if scores:
            ends.append(max(scores, key=scores.__getitem__))
    return ends if len(ends) == 2 else []


def held_out(results: list[dict[str, Any]], suite: Suite) -> dict[tuple[str, str], float]:
    """Last accuracy on held-out training images of the suite's first seed, by label and head."""
    return {
        (label, head): of["last"]
        for label in ["frozen", *AT_ONCE]
        for found in rows_of(results, suite, label, validation=True)
        if found["run"]["seed"] == suite.seeds[0]
        for head, of in found["heads"].items()
    }


def rows_of(
    results: list[dict[str, Any]], suite: Suite, label: str, *, validation: bool = False
) -> list[dict[str, Any]]:
    """The results of one row, one for each seed, of runs that changed nothing else."""
    wanted_key = VARIANTS[label].key
    return [
        result
        for result in results
        if is_plain(result["run"])
        and result["run"]["validation"] == validation
        and (result["run"]["data"], result["run"]["tasks"]) == (suite.data, suite.tasks)
        and {k: result["run"].get(k) for k in (*wanted_key, "targets", "once")}
        == {"targets": None, "once": None, **wanted_key}
    ]


_ONCE_FIXED = {
    "compile": False,
    "head_rate": None,
    "magnitude_rate": None,
    "head_start": "random",
    "feature_distillation": 0.0,
}
"""Keys of a schedule that were added later, and what was fixed before."""


def stored(path: Path) -> list[dict[str, Any]]:
    """The results so far; of a run that two processes made at once, the first."""
    lines = path.read_text().splitlines() if path.is_file() else []
    results: dict[str, dict[str, Any]] = {}
    for result in map(json.loads, lines):
        # Chains without one of these keys were measured when there was no choice.
        result["run"]["schedule"] = {**_ONCE_FIXED, **result["run"]["schedule"]}
        results.setdefault(json.dumps(result["run"], sort_keys=True), result)
    return list(results.values())


def is_plain(run: Mapping[str, Any]) -> bool:
    """Whether a run is of the comparison, and not one that tried another setting."""
    return (
        run["penalty"] is None
        and not run["formulation_choices"]
        and run["rank"] == 10
        and run["backbone"] == "glyph_vit"
    )


def spread(values: list[float]) -> str:
    """Mean ± standard deviation in per cent."""
    array = 100 * np.array(values)
    deviation = f" ± {array.std(ddof=1):.1f}" if len(array) > 1 else ""
    return f"{array.mean():.1f}{deviation}"


class Row(NamedTuple):
    """A line of a table: what one head makes of the chains of one method, seed by seed."""

    label: str
    head: str
    found: dict[int, dict[str, Any]]
    """seed → result"""

    def values(self, key: str, seeds: Iterable[int] | None = None) -> list[float]:
        """A figure of each seed; nothing where it has none, as learning at once has no forgetting."""
        of = [self.found[seed]["heads"][self.head] for seed in (self.found if seeds is None else seeds)]
        return [result[key] for result in of if key in result]

    @property
    def joint(self) -> bool:
        """Whether it sees old images."""
        return METHODS[VARIANTS[self.label].method].joint


def table_rows(results: list[dict[str, Any]], suite: Suite) -> dict[tuple[str, str], Row]:
    """The rows of one table that were run, by label and head. A chain has the heads that there were at its time."""
    rows = {}
    for label, variant in VARIANTS.items():
        found = rows_of(results, suite, label)
        for head in variant.heads:
            of_seed = {result["run"]["seed"]: result for result in found if head in result["heads"]}
            if of_seed:
                rows[label, head] = Row(label, head, of_seed)
    return rows


def gains(row: Row, start: Row) -> tuple[list[int], float]:
    """The seeds that both rows have, and by how much the first is better on their mean."""
    seeds = sorted(row.found.keys() & start.found.keys())
    pairs = zip(row.values("last", seeds), start.values("last", seeds), strict=True)
    return seeds, float(np.mean([one - other for one, other in pairs])) if seeds else math.nan


def headroom(results: list[dict[str, Any]], suite: Suite) -> tuple[Row, Row] | None:
    """The two rows between which the headroom lies, where both were measured on a common seed."""
    rows = table_rows(results, suite)
    ends = [rows[end] for end in ends_of(results, suite) if end in rows]
    return (ends[0], ends[1]) if len(ends) == 2 and gains(ends[1], ends[0])[0] else None


def headroom_text(results: list[dict[str, Any]], suite: Suite) -> list[str]:
    """What stands above a table: how much there is to gain at all, and how its ends were chosen."""
    ends = headroom(results, suite)
    if ends is None:
        return ["**Headroom: not measured yet.**"]
    start, end = ends
    seeds, room = gains(end, start)
    names = ", ".join(str(seed) for seed in seeds)
    few = (
        [f"Under {100 * _LEAST_ROOM:.0f} points: this set tells methods apart only by their classifier."]
        if room < _LEAST_ROOM
        else []
    )
    judged: dict[str, list[str]] = {}
    for (label, head), score in held_out(results, suite).items():
        judged.setdefault(label, []).append(f"`{head}` {100 * score:.1f}")
    return [
        f"**Headroom: {100 * room:.1f} points** (seed{'s' if len(seeds) > 1 else ''} {names}).",
        f"{start.label} with `{start.head}` has {spread(start.values('last', seeds))},",
        f"{end.label} with `{end.head}` {spread(end.values('last', seeds))}.",
        *few,
        f"Both were chosen on held-out training images, seed {suite.seeds[0]}:",
        "",
        *(f"- {label}: {', '.join(scores)}" for label, scores in judged.items()),
    ]


def against(rows: Mapping[tuple[str, str], Row], best: Row) -> dict[tuple[str, str], str]:
    """For every other row that answered the same images: what it lost and gained, and the adjusted p-value."""
    found = {}
    for key, row in rows.items():
        seeds = [seed for seed in best.found if "right" in best.found[seed]["heads"][best.head]]
        if row is best or not seeds or len(row.values("right", row.found.keys() & set(seeds))) < len(seeds):
            continue
        both = [
            np.unpackbits(
                np.frombuffer(bytes.fromhex("".join(map(str, each.values("right", seeds)))), np.uint8)
            )
            for each in (best, row)
        ]
        found[key] = flips(*both)
    adjusted = holm([one.p_value for one in found.values()])
    return {
        key: f"−{one.lost} +{one.gained}, {'< 1e-6' if p < 1e-6 else f'{p:.2g}'}"
        for (key, one), p in zip(found.items(), adjusted, strict=True)
    }


def table(results: list[dict[str, Any]], suite: Suite) -> list[str]:
    """One table: best last accuracy in bold, ties within its own spread marked."""
    rows = table_rows(results, suite)
    if not rows:
        return ["Not run yet."]
    # While the table grows, a row of fewer seeds may just have had the easier ones.
    most = max(len(row.found) for row in rows.values() if not row.joint)
    rivals = [row for row in rows.values() if not row.joint and len(row.found) == most]
    best = max(rivals, key=lambda row: np.mean(row.values("last")))
    margin = np.std(best.values("last"), ddof=1) if most > 1 else 0.0
    ends = headroom(results, suite)
    pairs = against(rows, best)
    lines = [
        "| method | head | seeds | last | share | against the best | undrifted "
        "| average | forgetting | trained | stored | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for key, row in rows.items():
        shown = spread(row.values("last"))
        if row is best:
            shown = f"**{shown}**"
        elif row in rivals and np.mean(best.values("last")) - np.mean(row.values("last")) <= margin:
            shown = f"{shown} ="
        several = [
            spread(of) if (of := row.values(name)) else "–" for name in ("last_true", "average", "forgetting")
        ]
        lines.append(
            f"| {row.label} | {row.head} | {len(row.found)} | {shown} | {share(row, ends)} | {pairs.get(key, '–')} "
            f"| {' | '.join(several)} | {next(iter(row.found.values()))['trained_parameters']:,} "
            f"| {row.values('stored_numbers')[0]:,} | {np.mean(row.values('seconds')):.0f} |"
        )
    return lines


def share(row: Row, ends: tuple[Row, Row] | None) -> str:
    """Which part of the headroom a row recovers, in per cent, on the seeds that all three have."""
    if ends is None:
        return "–"
    start, end = ends
    seeds = row.found.keys() & start.found.keys() & end.found.keys()
    if not seeds or gains(end, start)[1] < _LEAST_ROOM:
        return "–"
    own, low, high = (np.mean(each.values("last", seeds)) for each in (row, start, end))
    return f"{100 * (own - low) / (high - low):.0f} %"


def page(results: list[dict[str, Any]]) -> str:
    """docs/reference/comparison.md."""
    lines = [
        "# Comparison",
        "",
        "Written by `make compare`: do not edit. Accuracy in %, mean ± standard deviation over the seeds. Every class",
        "seen so far is a candidate.",
        "",
        "**Headroom** is what there is to gain on a set: joint training on all images, minus frozen features, both",
        "under their best head. The joint training is done once, at the end, at the rate that is best for it, and its",
        "heads are made of the statistics of all training images. Rate and heads are chosen on a fifth of the",
        "training images, which is held out for that.",
        "",
        "Among the rows that have all seeds so far, the best *last* accuracy without old images is bold. `=` marks",
        "those within the best one's own spread.",
        "",
        "- *last*: after the last task, mean over the tasks. *average*: its mean over the steps.",
        "- *share*: the part of the headroom that a row recovers. A negative one is behind the frozen features.",
        "- *against the best*: test images that the best row has right and this one wrong (−), and the other way (+),",
        "  over all seeds. Then McNemar's exact p-value, adjusted by Holm for the rows of the table. A test image",
        "  counts once for each seed. Rows of older runs did not keep their answers.",
        "- *undrifted*: the *last* of the same network under a head made of the statistics of all training images.",
        "  What *last* is behind it is what drift costs. Rows of older runs did not keep it.",
        "- *trained*: parameters of the last step.",
        "- *stored*: numbers that the chain keeps at its end (directions, magnitudes, head, statistics, memory), the",
        "  backbone aside.",
        "- *seconds*: fits and the head's own training of one chain, on one thread of a shared x86-64 machine with",
        "  other programs running. Only their order says something.",
        "",
        "On glyphs100 and digits, heads of rows without *undrifted* were measured with a shift of means in place of",
        "the drift maps of today, which [differ by less than a point](../explanation/method.md#drift).",
        "",
        "All methods have the backbone `glyph_vit` and rank 10. Where a row says nothing else, they are trained by SGD",
        "with momentum 0.9, rate 0.01, 10 epochs and batch 32. *Adam* is Adam at that rate with a cosine, 8 epochs,",
        "batch 64, and all six projections adapted. With *small rows* the head's rows start with deviation 0.01 and",
        "learn at a rate of 0.01 of their own ([why](../explanation/method.md#a-real-rate)). *Crops* are random crops",
        "of at least half the area. *Distilled* is with small rows, crops, and [feature",
        "distillation](../explanation/method.md#a-real-rate) of weight 2: the schedule of the shipped `params.yaml`.",
        "[Methods](methods.md) says what each method and head is, and [Adapted and frozen",
        "features](../explanation/adapted-features.md) what the table means.",
    ]
    for suite in SUITES.values():
        lines += ["", f"## {suite.title}", "", *headroom_text(results, suite), "", *table(results, suite)]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what is asked for and not yet there; then write the page, if asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", nargs="+", choices=SUITES, default=list(SUITES))
    parser.add_argument("--methods", nargs="+", choices=VARIANTS, help="default: those of the suite")
    parser.add_argument(
        "--headroom",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="run first what it is measured by; leave it out where other settings are tried",
    )
    parser.add_argument("--seeds", nargs="+", type=int, help="default: those of the suite")
    parser.add_argument("--validation", action="store_true", help="judge on held-out training images")
    parser.add_argument("--learning-rate", type=float, help="default: the recipe's")
    parser.add_argument("--epochs", type=int, help="default: the recipe's")
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
    images: dict[tuple[str, bool], Images] = {}
    for label, run in () if arguments.show else wanted(arguments):
        if any(result["run"] == run for result in stored(arguments.results)):
            continue
        which = run["data"], run["validation"]
        if which not in images:
            backbone = create_backbone(arguments.backbone)
            images[which] = Images(run["data"], backbone, arguments.cache, validation=run["validation"])
        learn = run_at_once if VARIANTS[label].once else run_chain
        result = learn(images[which], run, VARIANTS[label].heads)
        arguments.results.parent.mkdir(parents=True, exist_ok=True)
        with arguments.results.open("a") as file:
            file.write(json.dumps({"run": run, **result}, sort_keys=True) + "\n")
        lasts = "  ".join(f"{head} {found['last']:.4f}" for head, found in result["heads"].items())
        judged = "held-out" if run["validation"] else "test"
        print(
            f"{run['data']} in {run['tasks']}, seed {run['seed']}, {judged} images, {label}: last {lasts}",
            flush=True,
        )
    if arguments.write:
        PAGE.write_text(page(stored(arguments.results)), encoding="utf-8")


if __name__ == "__main__":
    main()
