"""Stage `report`: from all steps to numbers for DVC (`metrics.json`, `plots/*.csv`) and a page for people."""

from __future__ import annotations

import csv
import io
import re
from base64 import b64encode
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.errors import InputError
from pipelines.files import read_json, sha256_of, whole_folder, write_json
from pipelines.params import Params
from pipelines.stage import stage
from sdlora import metrics as measure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TEMPLATES = Path(__file__).parent / "templates"

MANY_TASKS = 20
"""Above this number of tasks the cells of the accuracy matrix hold no numbers."""

PALETTE = 10
"""Up to this number of tasks each has its own colour, marker and label; above it colour tells the order."""

IMAGES_ON_THE_PAGE = 160
THUMBNAIL = 128
"""Longer side of a sample image on the page, at most, in pixels."""

Record = dict[str, Any]
Row = dict[str, str | int | float]


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """What the model of the last step says of every test image, in the order of the test files."""

    id: list[str]
    task: list[str]
    label: list[int]
    prediction: list[int]
    confidence: list[float]


@dataclass(frozen=True, kw_only=True)
class History:
    """All that the report shows, read once; lists run over the steps, in the order of params.yaml."""

    tasks: list[str]
    classes: list[Record]
    """All classes so far, each its `label`, `name` and `task`; the index is the label."""
    accuracy: np.ndarray
    """(tasks, tasks): after step i on task j, NaN where j > i."""
    samples: list[int]
    """Test images per task."""
    validation: float | None
    """Share of all validation images that the last step names right; None without such images."""
    training: list[int]
    """Training images per task."""
    magnitudes: list[dict[str, np.ndarray]]
    """Of each step: task → (targets,); empty for a method without directions."""
    curves: list[list[dict[str, float]]]
    """Of each step: one record per epoch."""
    records: list[Record]
    """Of each step: its step.json."""
    hashes: list[str]
    """Of each step: the SHA-256 of its step.json."""
    backbone: str
    predictions: Predictions


@stage
def report(*, artifacts: Path, out: Path, metrics: Path) -> list[Row]:
    """Write the metrics to `metrics`, the plot data and the page to `out`; return the headline numbers."""
    history = read_history(artifacts, list(Params.load().tasks))
    numbers = headline(history)
    with whole_folder(out) as folder:
        write_plots(folder / "plots", history)
        page = render_page(history, sample_images(artifacts, history))
        (folder / "report.html").write_text(page, encoding="utf-8", newline="\n")
    write_json(metrics, numbers)
    return [
        {
            "metric": name.replace("_", " "),
            "per sample": shown(numbers[name]),
            "per task": shown(numbers[f"{name}_per_task"]),
        }
        for name in ("last_accuracy", "average_accuracy", "forgetting", "backward_transfer")
    ]


# ---- reading


def read_history(artifacts: Path, tasks: list[str]) -> History:
    """Read the steps of `tasks` and no others: a folder that a removed task has left does not count."""
    evaluations = [
        read_evaluation(artifacts / "evaluation" / task, tasks[: i + 1]) for i, task in enumerate(tasks)
    ]
    rows = [[right / of for right, of in zip(e["correct"], e["samples"], strict=True)] for e in evaluations]
    steps = [needed(artifacts / "model" / task / "step.json") for task in tasks]
    counts = [read_json(needed(artifacts / "split" / task / "split.json"))["counts"] for task in tasks]
    last = tasks[-1]
    return History(
        tasks=tasks,
        classes=sorted(
            read_json(needed(artifacts / "split" / last / "classes.json"))["classes"],
            key=lambda entry: entry["label"],
        ),
        accuracy=measure.accuracy_matrix(rows),
        samples=evaluations[-1]["samples"],
        validation=validation_accuracy(evaluations[-1]),
        training=[sum(count["train"] for count in classes.values()) for classes in counts],
        magnitudes=[read_magnitudes(artifacts / "model" / task / "magnitudes.safetensors") for task in tasks],
        curves=[read_curve(needed(artifacts / "fit" / task / "curve.csv")) for task in tasks],
        records=[read_json(step) for step in steps],
        hashes=[sha256_of(step) for step in steps],
        backbone=read_json(needed(artifacts / "model" / "t00" / "backbone.json"))["name"],
        predictions=read_predictions(needed(artifacts / "evaluation" / last / "predictions.arrow")),
    )


def needed(path: Path) -> Path:
    """Return the path, or raise InputError if an earlier stage has not left it."""
    if not path.exists():
        raise InputError(
            f"{path} is missing: the report needs every task of params.yaml; run `sdlora run` first"
        )
    return path


def read_evaluation(folder: Path, tasks: list[str]) -> Record:
    """Read one evaluation, which must be of just these tasks, in this order."""
    path = needed(folder / "metrics.json")
    evaluation = read_json(path)
    if evaluation["tasks"] != tasks:
        raise InputError(
            f"{path} is of the tasks {', '.join(evaluation['tasks'])},"
            f" params.yaml has {', '.join(tasks)} by then; run `sdlora run` first"
        )
    return evaluation


def validation_accuracy(evaluation: Record) -> float | None:
    """The accuracy on all validation images of an evaluation, which has none unless `data.validation` asks for them."""
    images = sum(evaluation.get("validation_samples", []))
    return sum(evaluation["validation_correct"]) / images if images else None


def read_magnitudes(path: Path) -> dict[str, np.ndarray]:
    """Read task → magnitudes (targets,); a method without directions has none, or no file."""
    from safetensors.numpy import load_file

    return (
        {task: values.astype(np.float64).ravel() for task, values in load_file(path).items()}
        if path.exists()
        else {}
    )


def read_curve(path: Path) -> list[dict[str, float]]:
    """Read the training curve, one record per epoch."""
    with path.open(encoding="utf-8", newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def read_predictions(path: Path) -> Predictions:
    """Read all predictions of one evaluation."""
    from pipelines.images import read_images

    table = read_images(path)
    columns = {
        name: table.column(name).to_pylist() for name in ("id", "task", "label", "prediction", "confidence")
    }
    return Predictions(**columns)


# ---- numbers


def headline(history: History) -> Record:
    """The content of metrics.json: fractions, rounded; null where there is no old task to speak of.

    Only with validation images it has their accuracy, the one number that may be selected on.
    """
    numbers: Record = {"steps": len(history.tasks), "classes": len(history.classes)}
    for suffix, samples in (("", history.samples), ("_per_task", None)):
        numbers |= {
            f"last_accuracy{suffix}": rounded(measure.last_accuracy(history.accuracy, samples)),
            f"average_accuracy{suffix}": rounded(measure.average_accuracy(history.accuracy, samples)),
            f"forgetting{suffix}": rounded(measure.forgetting(history.accuracy, samples)),
            f"backward_transfer{suffix}": rounded(measure.backward_transfer(history.accuracy, samples)),
        }
    if history.validation is not None:
        numbers["validation_accuracy"] = rounded(history.validation)
    numbers["accuracy"] = dict(zip(history.tasks, map(rounded, history.accuracy[-1]), strict=True))
    return numbers


def curves_over_steps(history: History) -> dict[str, list[float | None]]:
    """Each metric after every step, per sample and per task."""
    curves = {}
    for suffix, samples in (("", history.samples), ("_per_task", None)):
        curves[f"accuracy{suffix}"] = measure.accuracy_curve(history.accuracy, samples)
        curves[f"average{suffix}"] = measure.average_accuracy_curve(history.accuracy, samples)
        curves[f"forgetting{suffix}"] = measure.forgetting_curve(history.accuracy, samples)
        curves[f"backward_transfer{suffix}"] = measure.backward_transfer_curve(history.accuracy, samples)
    return {name: [rounded(value) for value in curve] for name, curve in curves.items()}


def rounded(value: float) -> float | None:
    """Six decimals, None for NaN, and no negative zero."""
    return None if np.isnan(value) else round(float(value), 6) + 0.0


def shown(value: float | None) -> str | float:
    """A number for a table, in which nothing is a dash."""
    return "-" if value is None else value


# ---- data for DVC's plots


def write_plots(folder: Path, history: History) -> None:
    """Write one CSV per plot: long form, fractions, tasks and steps by their ids."""
    folder.mkdir()
    over_steps = curves_over_steps(history)
    write_csv(
        folder / "accuracy.csv",
        ["after", "task", "accuracy"],
        (
            [after, task, rounded(history.accuracy[i, j])]
            for i, after in enumerate(history.tasks)
            for j, task in enumerate(history.tasks[: i + 1])
        ),
    )
    write_csv(
        folder / "steps.csv", ["step", *over_steps], zip(history.tasks, *over_steps.values(), strict=True)
    )
    write_csv(
        folder / "magnitudes.csv",
        ["step", "task", "mean", "lowest", "highest"],
        (
            [step, task, *map(rounded, (values[task].mean(), values[task].min(), values[task].max()))]
            for step, values in zip(history.tasks, history.magnitudes, strict=True)
            for task in sorted(values)
        ),
    )
    write_csv(
        folder / "training.csv",
        ["task", "epoch", "loss", "accuracy"],
        (
            [task, int(row["epoch"]), rounded(row["loss"]), rounded(row["accuracy"])]
            for task, curve in zip(history.tasks, history.curves, strict=True)
            for row in curve
        ),
    )
    names = [entry["name"] for entry in history.classes]
    pairs = zip(history.predictions.label, history.predictions.prediction, strict=True)
    write_csv(folder / "confusion.csv", ["actual", "predicted"], ([names[a], names[b]] for a, b in pairs))


def write_csv(path: Path, header: list[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a CSV file that is the same on every machine; None is an empty cell."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


# ---- sample images


def sample_images(artifacts: Path, history: History) -> list[Record]:
    """Choose for each task some test images that the last model names right, and its surest mistakes."""
    from pipelines.images import read_images

    each = max(1, min(6, IMAGES_ON_THE_PAGE // (2 * len(history.tasks))))
    found = history.predictions
    chosen = []
    for task in history.tasks:
        mine = sorted(
            (i for i, its in enumerate(found.task) if its == task),
            key=lambda i: (-found.confidence[i], found.id[i]),
        )
        right = [i for i in mine if found.prediction[i] == found.label[i]]
        wrong = [i for i in mine if found.prediction[i] != found.label[i]]
        table = read_images(needed(artifacts / "split" / history.tasks[-1] / "test" / f"{task}.arrow"))
        row_of = {name: row for row, name in enumerate(table.column("id").to_pylist())}

        def pictures(rows: list[int], table: Any = table, row_of: dict[str, int] = row_of) -> list[Record]:  # noqa: ANN401
            return [
                {
                    "id": found.id[i],
                    "uri": data_uri(table.column("image")[row_of[found.id[i]]].as_py()),
                    "actual": history.classes[found.label[i]]["name"],
                    "predicted": history.classes[found.prediction[i]]["name"],
                    "predicted_task": history.classes[found.prediction[i]]["task"],
                    "confidence": found.confidence[i],
                }
                for i in rows
            ]

        chosen.append(
            {
                "task": task,
                "right": pictures(one_of_each(right, found.label)[:each]),
                "wrong": pictures(wrong[:each]),
                "right_count": len(right),
                "wrong_count": len(wrong),
            }
        )
    return chosen


def one_of_each(rows: list[int], label: list[int]) -> list[int]:
    """Reorder rows so that every class comes once before any comes twice; the order is kept otherwise."""
    seen: Counter[int] = Counter()
    turns = []
    for row in rows:
        turns.append((seen[label[row]], row))
        seen[label[row]] += 1
    return [row for _, row in sorted(turns, key=lambda turn: turn[0])]


def data_uri(image: bytes) -> str:
    """Encode a small copy of an image, whatever its format, as one that every browser shows."""
    from PIL import Image

    from pipelines.images import ANY_SIZE, open_picture, strict_pictures

    with strict_pictures(ANY_SIZE):
        picture = open_picture(image)
    if picture.mode == "RGBA":  # white shows through, as it does for the model
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    encoded = io.BytesIO()
    if max(picture.size) <= THUMBNAIL // 2:  # pixels that one can count must not be blurred
        kind = "png"
        picture.save(encoded, "PNG")
    else:
        kind = "jpeg"
        picture.save(encoded, "JPEG", quality=85)
    return f"data:image/{kind};base64,{b64encode(encoded.getvalue()).decode()}"


# ---- figures
#
# matplotlib knows nothing of the reader's light or dark page. So figures are drawn in colours that stand for
# roles, and the SVG gets the page's CSS variables in their place.

INK, MUTED, GRID = "#fe0001", "#fe0002", "#fe0003"
MARKERS = "os^DvPX<>p"
FIGURE_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 10.5,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.unicode_minus": False,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "lines.solid_capstyle": "round",
}


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a chart; `low` and `high` give it a band."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str
    marker: str
    dashed: bool = False
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


def task_colour(index: int, count: int) -> str:
    """A colour that stands for a task: one of ten, or its place between the first and the last of many."""
    return f"#fe00{0x10 + index:02x}" if count <= PALETTE else f"#fd00{round(100 * index / (count - 1)):02x}"


def css_colour(sentinel: re.Match[str]) -> str:
    """The page's colour for a colour that stands for a role."""
    value = int(sentinel[2], 16)
    if sentinel[1] == "d":
        return f"color-mix(in oklab, var(--late) {value}%, var(--early))"
    return {1: "var(--ink)", 2: "var(--muted)", 3: "var(--grid)"}.get(value) or f"var(--c{value - 0x10})"


def task_lines(
    history: History,
    y: Mapping[str, Sequence[float]],
    *,
    low: Mapping[str, Sequence[float]] | None = None,
    high: Mapping[str, Sequence[float]] | None = None,
) -> list[Line]:
    """One line per task, each from its own step to the last."""
    count = len(history.tasks)
    return [
        Line(
            label=task,
            x=range(count - len(y[task]) + 1, count + 1),
            y=y[task],
            colour=task_colour(i, count),
            marker=MARKERS[i] if count <= PALETTE else "",
            low=low[task] if low else None,
            high=high[task] if high else None,
        )
        for i, task in enumerate(history.tasks)
        if task in y
    ]


def draw_lines(
    lines: list[Line],
    *,
    alt: str,
    x_label: str,
    y_label: str,
    steps: list[str] | None = None,
    percent: bool = False,
) -> str:
    """Draw lines that are labelled at their ends, as SVG; with `steps`, x runs over the steps."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(FIGURE_STYLE | {"svg.hashsalt": alt})
        figure = Figure(figsize=(5.2, 3.3))
        longest = max(len(line.label) for line in lines)
        axes = figure.add_axes((0.125, 0.16, 0.83 - 0.019 * longest, 0.8))
        for line in lines:
            add_line(axes, line)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.margins(x=0.03, y=0.06)
        if percent:
            low = min(min(line.y) for line in lines)
            axes.set_ylim(max(-2.0, 10 * np.floor((low - 1) / 10)), 102)
        if steps:
            stride = -(-len(steps) // 8) if len(steps) > PALETTE else 1
            axes.set_xticks(range(1, len(steps) + 1, stride), steps[::stride])
            axes.set_xlim(0.8, len(steps) + 0.2 if len(steps) > 1 else 1.2)
        else:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        label_ends(axes, lines)
        return to_svg(figure, alt)


def add_line(axes: Axes, line: Line) -> None:
    """Draw one line, and its band if it has one."""
    few = len(line.x) <= MANY_TASKS
    if line.low is not None and line.high is not None:
        if len(line.x) > 1:
            axes.fill_between(line.x, line.low, line.high, color=line.colour, alpha=0.13, linewidth=0)
        else:
            axes.vlines(line.x, line.low, line.high, color=line.colour, alpha=0.35, linewidth=3)
    axes.plot(
        line.x,
        line.y,
        color=line.colour,
        linewidth=1.8 if line.marker else 0.9,
        linestyle=(0, (4, 2)) if line.dashed else "-",
        marker=line.marker if few else "",
        markersize=5 if len(line.x) > 1 else 7,
        markeredgewidth=0,
    )


def label_ends(axes: Axes, lines: list[Line]) -> None:
    """Write each line's label beside its end, pushed apart where they would lie on each other."""
    labelled = lines if len(lines) <= PALETTE else [lines[0], lines[-1]]
    bottom, top = axes.get_ylim()
    ends = sorted(((line.y[-1] - bottom) / (top - bottom), line.label, line.colour) for line in labelled)
    gap = 0.075
    places: list[float] = []
    for end, _, _ in ends:
        places.append(max(end, places[-1] + gap) if places else end)
    limit = 1.0
    for i in reversed(range(len(places))):
        places[i] = min(places[i], limit)
        limit = places[i] - gap
    for place, (_, label, colour) in zip(places, ends, strict=True):
        axes.text(1.015, place, label, color=colour, va="center", fontsize=10, transform=axes.transAxes)


def to_svg(figure: Figure, alt: str) -> str:
    """The figure as an SVG element that scales, follows the page's colours and says what it shows."""
    from markupsafe import escape

    buffer = io.StringIO()
    figure.savefig(
        buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
    )
    body = buffer.getvalue()
    width, height = 72 * figure.get_size_inches()
    body = body[body.index(">", body.index("<svg")) + 1 : body.rindex("</svg>")]
    body = re.sub(r'<g id="[^"]*"', "<g", body)  # names such as axes_1, the same in every figure
    body = re.sub(r"#f([ed])00([0-9a-f]{2})", css_colour, body)
    viewbox = f"0 0 {width:g} {height:g}"
    return f'<svg class="plot" viewBox="{viewbox}" role="img" aria-label="{escape(alt)}">{body}</svg>'


def accuracy_figures(history: History) -> dict[str, str]:
    """Accuracy over steps: of all classes so far, and of each task."""
    steps, count = history.tasks, len(history.tasks)
    percent = 100 * history.accuracy
    over = {
        "now": (100 * measure.accuracy_curve(history.accuracy, history.samples)).tolist(),
        "average": (100 * measure.average_accuracy_curve(history.accuracy, history.samples)).tolist(),
    }
    x = range(1, count + 1)
    together = [
        Line(label="now", x=x, y=over["now"], colour=task_colour(0, 1), marker="o"),
        Line(label="average", x=x, y=over["average"], colour=task_colour(1, 2), marker="s", dashed=True),
    ]
    draw = partial(draw_lines, steps=steps, percent=True, x_label="after step", y_label="accuracy, %")
    return {
        "together": draw(
            together,
            alt=f"Accuracy on all classes so far after each step: {percents(over['now'])}",
        ),
        "by_task": draw(
            task_lines(history, {task: percent[i:, i].tolist() for i, task in enumerate(steps)}),
            alt=f"Accuracy of each task after each step; after the last: {percents(percent[-1])}",
        ),
    }


def magnitude_figure(history: History) -> str | None:
    """Magnitudes over steps, or nothing where no step holds the magnitude of an earlier task."""
    if not any(len(values) > 1 for values in history.magnitudes) and len(history.tasks) > 1:
        return None
    if not history.magnitudes[-1]:
        return None
    kept = [
        task
        for i, task in enumerate(history.tasks)
        if all(task in values for values in history.magnitudes[i:])  # an absorbed direction has no line
    ]
    of = {task: [values[task] for values in history.magnitudes[history.tasks.index(task) :]] for task in kept}
    lines = task_lines(
        history,
        {task: [values.mean() for values in steps] for task, steps in of.items()},
        low={task: [values.min() for values in steps] for task, steps in of.items()},
        high={task: [values.max() for values in steps] for task, steps in of.items()},
    )
    return draw_lines(
        lines,
        alt="Mean magnitude of each task's direction after each step; after the last: "
        + ", ".join(f"{line.label} {line.y[-1]:.3g}" for line in lines),
        x_label="after step",
        y_label="magnitude",
        steps=history.tasks,
    )


def training_figures(history: History) -> dict[str, str]:
    """Loss and accuracy over the epochs of every fit."""
    count = len(history.tasks)

    def lines(name: str, scale: float) -> list[Line]:
        return [
            Line(
                label=task,
                x=[row["epoch"] for row in curve],
                y=[scale * row[name] for row in curve],
                colour=task_colour(i, count),
                marker=MARKERS[i] if count <= PALETTE else "",
            )
            for i, (task, curve) in enumerate(zip(history.tasks, history.curves, strict=True))
            if curve
        ]

    loss, accuracy = lines("loss", 1), lines("accuracy", 100)
    if not loss:
        return {}
    ends = ", ".join(f"{line.label} {line.y[-1]:.3g}" for line in loss)
    return {
        "loss": draw_lines(
            loss,
            alt=f"Training loss over epochs; at the end: {ends}",
            x_label="epoch",
            y_label="training loss",
        ),
        "accuracy": draw_lines(
            accuracy,
            alt=f"Training accuracy over epochs; at the end: {percents([line.y[-1] for line in accuracy])}",
            x_label="epoch",
            y_label="training accuracy, %",
            percent=True,
        ),
    }


def percents(values: Iterable[float]) -> str:
    """Numbers in percent as a text."""
    return ", ".join(f"{value:.1f}\N{NO-BREAK SPACE}%" for value in values)


# ---- the page


def render_page(history: History, samples: list[Record]) -> str:
    """Fill the template; everything that a user could have named is escaped there."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES, encoding="utf-8"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["percent"] = lambda value: typeset(value, "{:.1f}\N{NO-BREAK SPACE}%")
    environment.filters["count"] = "{:,}".format
    environment.filters["points"] = lambda value: typeset(value, "{:+.1f}")
    magnitudes = magnitude_figure(history)
    return environment.get_template("report.html.j2").render(
        history=history,
        numbers=headline(history),
        record=history.records[-1],
        parameters=flattened(history.records[-1].get("parameters", {})),
        matrix=matrix_rows(history),
        floor=heat_floor(history),
        many=len(history.tasks) > MANY_TASKS,
        ordered=len(history.tasks) > PALETTE,
        accuracy={name: Markup(svg) for name, svg in accuracy_figures(history).items()},
        magnitudes=Markup(magnitudes) if magnitudes else None,
        training={name: Markup(svg) for name, svg in training_figures(history).items()},
        bias=prediction_shares(history),
        confusions=worst_confusions(history),
        samples=samples,
        steps=step_rows(history),
    )


def typeset(value: float | None, form: str) -> str:
    """A fraction as a text in hundredths, with a true minus; nothing is a dash."""
    return "\N{EN DASH}" if value is None else form.format(100 * value).replace("-", "\N{MINUS SIGN}")


def heat_floor(history: History) -> float:
    """Where the colours of the matrix begin: the lowest accuracy, rounded down to a tenth."""
    return min(0.9, float(np.floor(10 * np.nanmin(history.accuracy)) / 10))


def matrix_rows(history: History) -> list[Record]:
    """One record per step: its accuracies on the tasks so far, each with its place on the colour scale."""
    floor = heat_floor(history)
    pooled = measure.accuracy_curve(history.accuracy, history.samples)
    return [
        {
            "step": step,
            "cells": [
                {
                    "task": task,
                    "value": value,
                    "heat": round(100 * (value - floor) / (1 - floor)),
                    "images": images,
                }
                for task, value, images in zip(
                    history.tasks, history.accuracy[i, : i + 1].tolist(), history.samples, strict=False
                )
            ],
            "all": float(pooled[i]),
        }
        for i, step in enumerate(history.tasks)
    ]


def prediction_shares(history: History) -> list[Record]:
    """Of each task: its share of the test images, and of the predictions of the last step."""
    total = len(history.predictions.id)
    predicted = Counter(history.classes[label]["task"] for label in history.predictions.prediction)
    return [
        {"task": task, "actual": images / total, "predicted": predicted[task] / total}
        for task, images in zip(history.tasks, history.samples, strict=True)
    ]


def worst_confusions(history: History, *, rows: int = 10) -> list[Record]:
    """The pairs of classes that the last step confuses most often."""
    images = Counter(history.predictions.label)
    pairs = Counter(zip(history.predictions.label, history.predictions.prediction, strict=True))
    wrong = sorted(((-count, a, b) for (a, b), count in pairs.items() if a != b))[:rows]
    return [
        {"actual": history.classes[a], "predicted": history.classes[b], "count": -count, "of": images[a]}
        for count, a, b in wrong
    ]


def step_rows(history: History) -> list[Record]:
    """One record per step for the ledger's table."""
    over = curves_over_steps(history)
    return [
        {
            "step": step,
            "classes": [entry["name"] for entry in history.classes if entry["task"] == step],
            "training": history.training[i],
            "test": history.samples[i],
            "new": float(history.accuracy[i, i]),
            "all": over["accuracy"][i],
            "forgetting": over["forgetting"][i],
            "hash": history.hashes[i],
        }
        for i, step in enumerate(history.tasks)
    ]


def flattened(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested parameters as (dotted name, text) pairs, sorted."""
    pairs = []
    for name in sorted(tree):
        value = tree[name]
        if isinstance(value, Mapping):
            pairs += flattened(value, f"{prefix}{name}.")
        else:
            pairs.append((f"{prefix}{name}", "null" if value is None else str(value)))
    return pairs
