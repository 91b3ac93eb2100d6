"""Measure on the embedded benchmarks what SD-LoRA's paper says of itself: its Table 4, and its Fig. 2 and 3.

A *way* is how all rows of a table are trained: as the paper says (its formulation, its rate, the rows of the head as
trained), or by this project's recipe. A *row* says which magnitudes and directions a step trains. Chains are those of
`benchmarks/compare.py`, one JSON line each, and what is there is not repeated. So is what is measured of the weights
of a chain. --write puts the tables and the picture into docs/explanation/paper-evidence.md.
"""

import argparse
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from torch.nn.functional import cross_entropy

from benchmarks import compare
from sdlora.backbones import create_backbone
from sdlora.change import Pair, Update, inner_products, overlaps
from sdlora.classifier import ModelState
from sdlora.comparison import flips, holm
from sdlora.devices import set_deterministic
from sdlora.freezing import freeze
from sdlora.head import block_logits
from sdlora.methods import METHODS
from sdlora.methods.sdlora_kd import own_coefficients, products, relative_residual

RESULTS = Path("benchmarks/results/paper_evidence.jsonl")
PAGE = Path("docs/explanation/paper-evidence.md")
HEADS = ("linear", "rgda")


class Way(NamedTuple):
    """How all rows of a table are trained."""

    formulation: str
    recipe: compare.Recipe
    head: str
    """The one that its table shows."""


_ADAM = replace(compare.SCHEDULE, optimizer="adam", learning_rate=0.008, epochs=20, batch_size=128)
WAYS = {
    "paper": Way("paper", compare.Recipe(), "linear"),
    "paper, Adam 0.008": Way("paper", compare.Recipe(_ADAM), "linear"),
    "recipe": Way("continuous", compare.RECIPES["Adam 0.002, distilled"], "rgda"),
}
ALL, _FIRST, ONE = "all magnitudes", "the first direction alone", "one direction, on and on"
ROWS: dict[str, dict[str, Any]] = {
    ALL: {"method": "sdlora"},
    "the new magnitude": {"method": "sdlora", "carried": True, "trains_earlier": False},
    "the new magnitude, earlier ones 1": {"method": "sdlora", "carried": False, "trains_earlier": False},
    "no magnitude": {"method": "sdlora", "magnitude_rate": 0.0},
    _FIRST: {"method": "sdlora-rr", "rank_schedule": {"t01": 10, "t02": 0}},
    ONE: {"method": "finetune"},
}
TASKS = {"digits": 5, "glyphs100": 10, "glyphs100-scene": 10}


def run_of(way: str, row: str, data: str, seed: int, *, validation: bool) -> dict[str, Any]:
    """The settings of a chain, as `benchmarks/compare.py` has them."""
    formulation, recipe, _ = WAYS[way]
    changes = dict(ROWS[row])
    method, ranks = changes.pop("method"), changes.pop("rank_schedule", None)
    schedule = {name: changes.pop(name) for name in ("magnitude_rate",) if name in changes}
    return {
        "data": data,
        "tasks": TASKS[data],
        "seed": seed,
        "validation": validation,
        **compare.Variant(method, formulation).key,
        "schedule": asdict(recipe.schedule) | schedule,
        **({"targets": list(recipe.targets)} if recipe.targets else {}),
        **({"rank_schedule": ranks} if ranks else {}),
        "covariance_rank": compare.COVARIANCE_RANK,
        "rank": 10,
        "penalty": None,
        "formulation_choices": changes,
        "backbone": "glyph_vit",
    }


# ---- what the weights of a chain say


def states(images: compare.Images, run: Mapping[str, Any]) -> list[ModelState]:
    """What a chain has learned after each step."""
    found = [ModelState()]
    for step, group in enumerate(compare.groups_of(images, run)):
        fit = compare.fitted(images, run, {f"t{step + 1:02}": group}, found[-1])
        found.append(
            freeze(
                found[-1], fit.result, method=METHODS[run["method"]], settings=compare.settings_of(run)
            ).learned
        )
    return found[1:]


def between(before: ModelState, after: ModelState, share: float) -> ModelState:
    """The model whose weights lie between those of two steps, with the trained rows of the later one."""
    parts = [
        (f"{side}{task}", (1 - share) if side == "a" else share, of, task)
        for side, of in (("a", before), ("b", after))
        for task in of.directions
    ]
    return ModelState(
        directions={name: of.directions[task] for name, _, of, task in parts},
        magnitudes={name: scale * of.magnitudes[task] for name, scale, of, task in parts},
        head=after.head,
    )


def losses(images: compare.Images, run: Mapping[str, Any], learned: ModelState) -> list[tuple[float, float]]:
    """For each task so far the loss that it was trained with and the accuracy, of its test images among its own
    classes, by its own rows.
    """
    base, found = create_backbone(run["backbone"]), []
    for (_, rows), group in zip(learned.head.items(), compare.groups_of(images, run), strict=False):
        pixels, labels = images.part("test", group)
        logits = block_logits([rows], compare.features(base, run["backbone"], learned, pixels))
        right = (logits.argmax(dim=1) == labels).double().mean()
        found.append((round(float(cross_entropy(logits, labels)), 5), round(float(right), 5)))
    return found


def path(images: compare.Images, run: Mapping[str, Any], chain: Sequence[ModelState]) -> list[dict[str, Any]]:
    """Losses on the straight lines from step to step: at their ends and in the middle."""
    points = []
    for step, (before, after) in enumerate(zip([ModelState(), *chain[:-1]], chain, strict=True)):
        for share in (0.0, 0.5, 1.0)[0 if step == 0 else 1 :]:
            of = losses(images, run, between(before, after, share))
            points.append({"at": step + share, "tasks": of})
    return points


def update_of(learned: ModelState) -> Update:
    """The same as plain arrays."""

    def array(tensor: torch.Tensor) -> np.ndarray:
        return tensor.double().numpy()

    return Update(
        targets=tuple(next(iter(learned.directions.values()))),
        directions={
            task: {target: Pair(array(f.up), array(f.down)) for target, f in direction.items()}
            for task, direction in learned.directions.items()
        },
        magnitudes={task: array(alpha) for task, alpha in learned.magnitudes.items()},
    )


def distances(solutions: Sequence[Update]) -> dict[str, float]:
    """How far some solutions are from each other and from W₀: ‖ΔWᵢ − ΔWⱼ‖ over the mean of ‖ΔWᵢ‖ and ‖ΔWⱼ‖, and the
    cosine of ΔWᵢ and ΔWⱼ, over all targets together; means over the pairs.
    """
    targets = solutions[0].targets
    gram = sum(inner_products([one.at(target) for one in solutions]) for target in targets)
    length = np.sqrt(np.diag(gram))
    pairs = list(combinations(range(len(solutions)), 2))
    relative = [
        np.sqrt(max(gram[i, i] + gram[j, j] - 2 * gram[i, j], 0)) / (length[i] + length[j]) * 2
        for i, j in pairs
    ]
    cosines = [gram[i, j] / length[i] / length[j] for i, j in pairs]
    return {
        "relative_distance": round(float(np.mean(relative)), 4),
        "relative_distance_least": round(float(np.min(relative)), 4),
        "cosine": round(float(np.mean(cosines)), 4),
        "length": round(float(np.mean(length)), 4),
    }


def angles(chain: Sequence[ModelState]) -> dict[str, Any]:
    """How the directions of a chain lie to each other: cosines, shared spaces, and what of each the earlier explain."""
    last = update_of(chain[-1])
    cosines, spaces = [], {"up": [], "down": []}
    for target in last.targets:
        pairs = [direction[target] for direction in last.directions.values()]
        gram = inner_products(pairs)
        above = np.triu_indices(len(pairs), 1)
        cosines.append((gram / np.sqrt(np.outer(np.diag(gram), np.diag(gram))))[above])
        spaces["up"].append(overlaps([pair.up for pair in pairs])[above])
        spaces["down"].append(overlaps([pair.down.T for pair in pairs])[above])
    residuals = []
    for before, after in pairwise(chain):
        (task,) = after.directions.keys() - before.directions.keys()
        found = products(before.directions, after.directions[task], after.magnitudes[task])
        residuals.append(round(relative_residual(found, own_coefficients(found)), 5))
    return {
        "cosine_mean_absolute": round(float(np.mean(np.abs(cosines))), 5),
        "cosine_largest": round(float(np.max(np.abs(cosines))), 5),
        **{f"overlap_{side}": round(float(np.mean(found)), 5) for side, found in spaces.items()},
        "residuals": residuals,
    }


def alone(images: compare.Images, run: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """How far the solutions of the first five tasks, each learned alone, are from each other.

    With `one start` all of them begin with the same factors, otherwise each with its own.
    """
    found = {}
    for start in ("own start", "one start"):
        solutions = []
        for step, group in enumerate(compare.groups_of(images, run)[:5]):
            task = "t01" if start == "one start" else f"t{step + 1:02}"
            fit = compare.fitted(images, run, {task: group}, ModelState())
            learned = freeze(
                ModelState(), fit.result, method=METHODS[run["method"]], settings=compare.settings_of(run)
            ).learned
            solutions.append(update_of(learned))
        found[start] = distances(solutions)
    return found


def measured(images: compare.Images, run: Mapping[str, Any]) -> dict[str, Any]:
    """All that the figures of the paper are about, of one chain."""
    chain = states(images, run)
    found: dict[str, Any] = {"path": path(images, run, chain)}
    if run["method"] != "sdlora":
        return found
    found["magnitudes"] = [
        {task: round(float(alpha.mean()), 5) for task, alpha in learned.magnitudes.items()}
        for learned in chain
    ]
    found["solutions"] = distances([update_of(learned) for learned in chain])
    found["angles"] = angles(chain)
    return found


# ---- what is run


class Asked(NamedTuple):
    """Some chains."""

    way: str
    data: str
    seeds: tuple[int, ...]
    rows: tuple[str, ...]
    validation: bool = False
    kind: str = "heads"
    """What is measured: `heads`, accuracy; `weights`, of steps and between them; or `alone`, of tasks by themselves."""


_THREE = (1993, 1994, 1995)
_PAPER = (ALL, "the new magnitude, earlier ones 1", "no magnitude", _FIRST)
_RECIPE = (ALL, "the new magnitude", _FIRST, ONE)
_SCENE = "glyphs100-scene"
PLAN = (
    Asked("paper, Adam 0.008", "digits", (1993,), (ALL,), validation=True),
    Asked("paper", "digits", (1993,), (ALL,), validation=True),
    Asked("recipe", _SCENE, (1993,), (ALL,), kind="weights"),
    Asked("recipe", _SCENE, (1993,), ("the new magnitude", _FIRST)),
    Asked("paper", "digits", (1993,), _PAPER),
    Asked("recipe", _SCENE, (1993,), (ONE,)),
    Asked("recipe", _SCENE, (1993,), (ONE,), kind="weights"),
    Asked("recipe", "digits", (1993,), (ALL,), kind="alone"),
)
_SEEDS = (1993, 1994, 1995, 1996, 1997)
TABLES = {
    "paper-digits": ("paper", "digits", _PAPER),
    "recipe-scene": ("recipe", _SCENE, _RECIPE),
}
"""Name in the page → way, data, rows."""


def stored(path: Path) -> list[dict[str, Any]]:
    """The results so far, and those of the comparison that are the same chains."""
    lines = path.read_text().splitlines() if path.is_file() else []
    return [*map(json.loads, lines), *compare.stored(compare.RESULTS)]


def has(found: Mapping[str, Any], kind: str) -> bool:
    """Whether a result is of a kind. Chains of older runs did not keep which images they name right."""
    return kind in found and (kind != "heads" or "right" in found[kind]["linear"])


def wanted(results: list[dict[str, Any]], data: Sequence[str]) -> Iterator[tuple[Asked, dict[str, Any], str]]:
    """What is planned and not there: the chain's settings, and what is made of it."""
    for asked in PLAN:
        for seed in asked.seeds:
            for row in asked.rows:
                run = run_of(asked.way, row, asked.data, seed, validation=asked.validation)
                there = any(found["run"] == run and has(found, asked.kind) for found in results)
                if asked.data in data and not there:
                    yield asked, run, row


# ---- what the page shows


def of_row(
    results: list[dict[str, Any]], way: str, row: str, data: str, kind: str = "heads"
) -> dict[int, dict[str, Any]]:
    """Seed → what was measured of a row on test images."""
    runs = {seed: run_of(way, row, data, seed, validation=False) for seed in _SEEDS}
    return {
        seed: found[kind]
        for found in results
        for seed, run in runs.items()
        if found["run"] == run and has(found, kind)
    }


def table(results: list[dict[str, Any]], way: str, data: str, rows: Sequence[str]) -> list[str]:
    """Accuracy of the rows that were run, on the seeds that they all have, and how the answers of each differ from
    those of the first.
    """
    head = WAYS[way].head
    found = {row: of for row in rows if (of := of_row(results, way, row, data))}
    seeds = sorted(set.intersection(*(set(of) for of in found.values()))) if found else []
    if not seeds:
        return ["Not run yet."]
    right = {
        row: np.concatenate([_bits(of[seed][head]["right"]) for seed in seeds]) for row, of in found.items()
    }
    first, *others = found
    pairs = {row: flips(right[first], right[row]) for row in others}
    adjusted = dict(zip(others, holm([pair.p_value for pair in pairs.values()]), strict=True))
    lines = [
        f"| trained (seeds {', '.join(map(str, seeds))}) | last | average | against the first row |",
        "| --- | --- | --- | --- |",
    ]
    for row, of in found.items():
        last, average = (
            compare.spread([of[seed][head][key] for seed in seeds]) for key in ("last", "average")
        )
        against = "–"
        if row in pairs:
            against = f"−{pairs[row].lost} +{pairs[row].gained}, p {_p_value(adjusted[row])}"
        lines.append(f"| {row} | {last} | {average} | {against} |")
    return lines


def _bits(text: str) -> np.ndarray:
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8))


def _p_value(value: float) -> str:
    return "< 1e-6" if value < 1e-6 else f"= {value:.2g}"


def rise(points: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[float]]:
    """Places on a path after the first step, and by how much the loss of the tasks before lies there above what it was
    right after their own steps: the mean over these tasks.
    """
    own = {point["at"]: point["tasks"][-1][0] for point in points if point["at"] == len(point["tasks"])}
    places = [point["at"] for point in points if point["at"] > 1]
    losses = {point["at"]: [loss for loss, _ in point["tasks"]] for point in points}
    return places, [
        float(np.mean([losses[at][k] - own[k + 1] for k in range(math.ceil(at) - 1)])) for at in places
    ]


def draw(results: list[dict[str, Any]]) -> None:
    """Write the picture of the page: the magnitudes over the steps, and the losses between them."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for of in of_row(results, "recipe", ALL, _SCENE, "weights").values():
        courses = of["magnitudes"]
        for index, task in enumerate(courses[-1]):
            own = [(step + 1, now[task]) for step, now in enumerate(courses) if task in now]
            left.plot(*zip(*own, strict=True), marker=".", color="#3949ab", alpha=1 - 0.08 * index)
    left.set(title="magnitude of each direction", xlabel="step", ylabel="mean over the targets")
    for row, colour in ((ALL, "#3949ab"), (ONE, "#e65100")):
        for of in of_row(results, "recipe", row, _SCENE, "weights").values():
            right.plot(*rise(of["path"]), color=colour, label=row, marker=".")
    right.axhline(0, color="#888888", linewidth=0.8)
    right.set(title="the tasks before, on the way", xlabel="step", ylabel="loss since their own steps")
    right.set_ylim(top=0.02)
    right.legend(frameon=False)
    figure.savefig(PAGE.with_suffix(".png"), dpi=110)


def write_page(results: list[dict[str, Any]]) -> None:
    """Put the tables into the page, each between the two comments that name it, and draw the picture."""
    text = PAGE.read_text(encoding="utf-8")
    for name, (way, data, rows) in TABLES.items():
        block = "\n".join(["", "", *table(results, way, data, rows), "", ""])
        text, found = re.subn(
            rf"(?<=<!-- {name} -->).*?(?=<!-- end of {name} -->)", lambda _, b=block: b, text, flags=re.DOTALL
        )
        if not found:
            raise ValueError(f"{PAGE}: no place for the table {name}")
    PAGE.write_text(text, encoding="utf-8")
    draw(results)


def main() -> None:
    """Run what is planned and not yet there; then write the page, if asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--cache", type=Path, default=Path(".sdlora/benchmarks"))
    parser.add_argument("--write", action="store_true", help=f"write {PAGE} at the end")
    parser.add_argument("--show", action="store_true", help="run nothing")
    arguments = parser.parse_args()
    set_deterministic(True)
    images: dict[tuple[str, bool], compare.Images] = {}
    for asked, run, row in () if arguments.show else wanted(stored(arguments.results), arguments.data):
        which = asked.data, asked.validation
        if which not in images:
            backbone = create_backbone("glyph_vit")
            images[which] = compare.Images(asked.data, backbone, arguments.cache, validation=asked.validation)
        if asked.kind == "heads":
            found = compare.run_chain(images[which], run, HEADS)
        else:
            found = {asked.kind: {"weights": measured, "alone": alone}[asked.kind](images[which], run)}
        line = {"way": asked.way, "row": row, "run": run, **found}
        with arguments.results.open("a") as file:
            file.write(json.dumps(line, sort_keys=True) + "\n")
        lasts = {head: of["last"] for head, of in found.get("heads", {}).items()}
        judged = "held-out" if asked.validation else "test"
        print(f"{asked.way}, {row}, {asked.data}, seed {run['seed']}, {judged} images: {lasts}", flush=True)
    if arguments.write:
        write_page(stored(arguments.results))


if __name__ == "__main__":
    main()
