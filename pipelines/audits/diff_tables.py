"""The tables of `sdlora audit diff`, for the terminal and the page."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pipelines.audits.steps import Figures
from pipelines.audits.tables import console, interval, plain, table
from pipelines.reports.format import DASH, chance, count, number, p_equals, percent

if TYPE_CHECKING:
    from rich.console import Group

_ROWS = 12
"""Classes on the terminal; the page and JSON have all."""


def show(found: Figures) -> None:
    """Print the figures as tables."""
    from rich.text import Text

    out = console()
    for line in _heading(found):
        out.print(Text(line), soft_wrap=True)
    for made in _tables(found):
        out.print()
        out.print(made)
    for note in found["notes"]:
        out.print(Text(f"\nnot compared: {note}"), soft_wrap=True)


def _heading(found: Figures) -> Iterator[str]:
    """Yield which steps these are, and in a sentence or two what happened to the answers."""
    for side in ("then", "now"):
        step = found[side]
        yield (
            f"{side:4}  {step['shown']}  {count(step['classes'], 'class')} of {count(len(step['tasks']), 'task')}  "
            f"record {step['record'][:12]}"
        )
    yield found["relation"] + frozen_line(found)
    for parameter in found["parameters"]:
        yield f"parameter  {parameter['name']}: {plain(parameter['then'])} → {plain(parameter['now'])}"
    if found["accuracy"] is None:
        return
    images = found["images"]
    other = f"; {images['other_picture']} more have another picture" if images["other_picture"] else ""
    yield (
        f"compared on {count(images['compared'], 'image')} that both were tested on "
        f"(of {images['then']:,} then, {images['now']:,} now{other})"
    )
    if images["compared"]:
        row = found["accuracy"]["all"]
        yield f"{row['lost']} lost, {row['gained']} gained: {verdict(row)}"


def frozen_line(found: Figures) -> str:
    """Say whether what was frozen by then is the same now."""
    kept = found["kept"]
    if not kept["frozen"]:
        return ""
    if not kept["differing"]:
        return f": all {kept['frozen']} frozen files of {found['then']['shown']} are the same, byte for byte"
    return f": {len(kept['differing'])} of {kept['frozen']} frozen files of {found['then']['shown']} differ or are gone"


def verdict(row: Mapping[str, Any]) -> str:
    """Say whether the flips of all images are more than chance."""
    if not row["lost"] + row["gained"]:
        return "no image flipped"
    more = "more than chance" if row["p_value"] < 0.05 else "no more than chance would do"
    return f"{more} (McNemar, exact: {p_equals(row['p_value'])})"


def _tables(found: Figures) -> Iterator[Group]:
    """Yield all tables that have something to say."""
    if found["accuracy"] is not None:
        yield _task_table(found)
        if found["accuracy"]["all"]["lost"] or found["accuracy"]["all"]["gained"]:
            yield _class_table(found)
        if found["errors"]["lost"]:
            yield _error_table(found)
    if found["calibration"] is not None:
        yield _calibration_table(found)
    if found["features"] is not None:
        yield _feature_table(found["features"])
    weights = found["weights"]
    if weights is not None and weights["changes"]:
        yield _magnitude_table(weights["magnitudes"])
        yield _change_table(weights["changes"])
        if weights["overlaps"]:
            yield _overlap_table(weights["overlaps"])


def _score_cells(row: Mapping[str, Any], *, p: str) -> list[object]:
    """Accuracies and flips of one row."""
    lost, gained = (DASH if row[kind] is None else row[kind] for kind in ("lost", "gained"))
    images = row["images"] or sum(row[side]["images"] for side in ("then", "now") if row[side])
    return [images, interval(row["then"]), interval(row["now"]), lost, gained, chance(row[p])]


def _task_table(found: Figures) -> Group:
    """Accuracy by task. A task that one of the two does not know has no flips."""
    rows = [["all compared", *_score_cells(found["accuracy"]["all"], p="p_value")]]
    rows += [[row["task"], *_score_cells(row, p="p_holm")] for row in found["accuracy"]["tasks"]]
    return table(
        "Accuracy, % (Wilson 95 % interval), and flips (p of the tasks: after Holm)",
        ["task", "images", "then", "now", "lost", "gained", "p"],
        rows,
    )


def _class_table(found: Figures) -> Group:
    """Return the classes in which something flipped, the greatest loss first."""
    flipped = [row for row in found["accuracy"]["classes"] if row["lost"] or row["gained"]]
    flipped.sort(key=greatest_loss_first)
    more = f"; {len(flipped) - _ROWS} more in --json and --html" if len(flipped) > _ROWS else ""
    return table(
        f"Classes with flips (p of all classes, after Holm){more}",
        ["class", "task", "images", "then", "now", "lost", "gained", "p"],
        [[row["class"], row["task"], *_score_cells(row, p="p_holm")] for row in flipped[:_ROWS]],
        texts=range(2),
    )


def _error_table(found: Figures) -> Group:
    """Return what lost images are taken for."""
    errors = found["errors"]
    to = ", ".join(
        f"{row['task']}{' (new)' if row['new'] else ''} {row['images']}" for row in errors["tasks"]
    )
    return table(
        f"Where the {count(errors['lost'], 'lost image')} went, by task: {to}",
        ["class", "task", "lost", "taken for"],
        [
            [
                row["class"],
                row["task"],
                row["lost"],
                ", ".join(f"{to['class']} ({to['task']}) ×{to['images']}" for to in row["taken_for"][:3]),
            ]
            for row in errors["classes"][:_ROWS]
        ],
        texts=(0, 1, 3),
    )


def _calibration_table(found: Figures) -> Group:
    """Make a table of how sure the model was, then and now."""
    rows = [
        [side, *(percent(found["calibration"][side][key]) for key in ("error", "confidence", "accuracy"))]
        for side in ("then", "now")
    ]
    return table("Calibration, %", ["", "expected calibration error", "mean confidence", "accuracy"], rows)


def _feature_table(features: Figures) -> Group:
    """Alignment by task."""
    rows = [["all", features["images"], number(features["all"], ".4f")]]
    rows += [[row["task"], row["images"], number(row["alignment"], ".4f")] for row in features["tasks"]]
    return table(
        "Features then against now (linear CKA; 1 = the same but for rotation and scale)",
        ["task", "images", "alignment"],
        rows,
    )


def _magnitude_table(magnitudes: Sequence[Figures]) -> Group:
    """Magnitudes by task."""
    return table(
        "Magnitudes, mean (range) over the targets",
        ["direction", "then", "now", "change"],
        [
            [row["task"], ranged(row["then"]), ranged(row["now"]), number(row["change"], "+.3f")]
            for row in magnitudes
        ],
    )


def ranged(values: Mapping[str, float] | None, form: str = ".3f") -> str:
    """Return a mean with its range."""
    if values is None or values["mean"] is None:
        return DASH
    mean, lowest, highest = (format(values[key], form) for key in ("mean", "lowest", "highest"))
    return f"{mean} ({lowest} … {highest})"


def _change_table(changes: Mapping[str, float]) -> Group:
    """Size of the change of every block and target."""
    grid = block_grid(changes)
    return table(
        "Change of the weights, ‖ΔW now − ΔW then‖ / ‖W₀‖, %",
        ["block", *grid["targets"]],
        [[row["block"], *(percent(value, digits=2) for value in row["values"])] for row in grid["rows"]],
    )


def block_grid(changes: Mapping[str, float]) -> Figures:
    """Changes by target name as a table: one row for each block, a column for each target, None where there is none."""
    places = {name: _place_of(name) for name in changes}
    targets = list(dict.fromkeys(target for _, target in places.values()))
    blocks: dict[str, dict[str, float]] = {}
    for name, (block, target) in places.items():
        blocks.setdefault(block, {})[target] = changes[name]
    return {
        "targets": targets,
        "rows": [
            {"block": block, "values": [values.get(target) for target in targets]}
            for block, values in blocks.items()
        ],
    }


def _place_of(name: str) -> tuple[str, str]:
    """Return the block and the target of a layer: `blocks.0.attn.q` is `0` and `q`."""
    found = re.fullmatch(r"(?:blocks\.)?(.*\d)\.(.*\.)?([^.]+)", name)
    return (found[1], found[3]) if found else ("", name)


def _overlap_table(overlaps: Sequence[Figures]) -> Group:
    """Overlap of subspaces. The range is over the targets."""
    rows = []
    for row in overlaps:
        for side, meaning in (("rows", "input"), ("columns", "output")):
            at = row[side]
            rows.append(
                [
                    row["task"],
                    against_words(row),
                    meaning,
                    ranged(at["overlap"], ".2f"),
                    number(at["chance"], ".2f"),
                    ranged(at["angle"], ".0f"),
                ]
            )
    return table(
        "Overlap of directions: mean squared cosine (0 perpendicular … 1 within)",
        ["direction", "against", "space", "overlap", "by chance", "largest angle, °"],
        rows,
        texts=range(3),
    )


def against_words(row: Mapping[str, Any]) -> str:
    """Return what a direction is compared with."""
    first, last = row["against"][0], row["against"][-1]
    names = first if first == last else f"{first}{DASH}{last}"
    return {"now": f"{names} then", "then": f"{names} now", "both": f"{names} then"}[row["only"]]


def greatest_loss_first(row: Mapping[str, Any]) -> tuple[int, int]:
    """Return a sort key of classes by what they lost, less what they gained."""
    lost, gained = row["lost"] or 0, row["gained"] or 0
    return gained - lost, -lost
