"""The figures of the report as texts that Prefect shows beside a run."""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Iterable, Sequence
from importlib import resources

from pipelines.reports.drawing import MANY_TASKS, draw_heat
from pipelines.reports.figures import (
    accuracy_figures,
    accuracy_heat,
    bias_figure,
    calibration_figures,
    change_heat,
    flip_figure,
    magnitude_figure,
    overlap_heat,
)
from pipelines.reports.history import History, head_of, of_shown
from pipelines.reports.statistics import flip_rows, prediction_shares
from pipelines.reports.weights import Movement

_COLOURS = resources.files("pipelines.reports") / "templates" / "report.css"


def make_exhibits(history: History, movement: Movement | None) -> dict[str, str]:
    """Key → Markdown: figures as images in the text itself, numbers as tables where they are not too many."""
    pages: dict[str, list[str | None]] = {
        "report-accuracy": [
            "# Accuracy",
            *map(_picture, accuracy_figures(history).values()),
            _accuracy_table(history),
            f"Head of the ledger: `{head_of(history)}`",
        ],
        "report-bias": ["# Head bias", _picture(bias_figure(history)), _bias_table(history)],
        "report-flips": ["# Flips", _picture(flip_figure(history)), _flips_table(history)],
        "report-calibration": ["# Calibration", *map(_picture, calibration_figures(history).values())],
        "report-weights": [
            "# Weights",
            _picture(magnitude_figure(history)),
            *_weight_maps(history, movement),
        ],
    }
    return {key: "\n\n".join(filter(None, parts)) + "\n" for key, parts in pages.items()}


def _weight_maps(history: History, movement: Movement | None) -> list[str | None]:
    """Return the maps of what changed."""
    if movement is None:
        return ["No weight of the backbone was changed."]
    changes = change_heat(history, movement)
    maps = [(changes, "Change of the weights of each block at each step")] if changes else []
    for spaces, values in (("column", movement.columns), ("row", movement.rows)):
        maps.append((overlap_heat(movement, values), f"Overlap of the {spaces} spaces of every two tasks"))
    return [part for heat, title in maps for part in (f"## {title}", _picture(draw_heat(heat, alt=title)))]


def _accuracy_table(history: History) -> str | None:
    """Return the accuracy matrix in percent. As a picture where there are many tasks."""
    if len(history.tasks) > MANY_TASKS:
        return _picture(draw_heat(accuracy_heat(history), alt="Accuracy of each task after each step"))
    rows = (
        [step, *(f"{100 * value:.1f}" for value in row[: i + 1]), *[""] * (len(row) - i - 1)]
        for i, (step, row) in enumerate(zip(history.tasks, history.accuracy, strict=True))
    )
    return _markdown_table(["after", *history.tasks], rows)


def _bias_table(history: History) -> str:
    """Shares of the last step."""
    shares = prediction_shares(history)
    rows = (
        [history.tasks[i], f"{100 * shares.actual[-1, i]:.1f} %", f"{100 * shares.predicted[-1, i]:.1f} %"]
        for i in history.shown
    )
    return _markdown_table(["task", "images", "predictions"], rows)


def _flips_table(history: History) -> str:
    """Losses and gains of every step."""
    if len(history.tasks) == 1:
        return "There is no step before the first to compare with."
    rows = (
        [row["step"], row["images"], row["lost"], row["gained"], f"{row['p']:.3g}"]
        for row in of_shown(flip_rows(history))
    )
    return _markdown_table(["step", "images", "lost", "gained", "p"], rows)


def _markdown_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table of numbers, its first column of names."""
    lines = [header, ["---", *["--:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _picture(svg: str | None) -> str | None:
    """Return a figure of the page as an image that stands alone: on white, in the colours of the light page."""
    if svg is None:
        return None
    css = _COLOURS.read_text(encoding="utf-8")
    light = dict(reversed(re.findall(r"--(\w+): (#[0-9a-f]{6})", css)))
    svg = re.sub(r"var\(--(\w+)\)", lambda found: light[found[1]], svg)
    width, height = re.findall(r'viewBox="0 0 (\S+) (\S+)"', svg)[0]
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    svg = svg.replace("<svg ", f'<svg {names} width="{width}" height="{height}" style="background:#fff" ', 1)
    alt = re.findall(r'aria-label="([^":;]*)', svg)[0]
    return f"![{alt}](data:image/svg+xml;base64,{b64encode(svg.encode()).decode()})"
