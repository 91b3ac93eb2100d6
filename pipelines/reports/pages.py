"""The page: one file that needs nothing else, whoever opens it, wherever."""

from __future__ import annotations

import hashlib
from base64 import b64encode
from collections.abc import Callable
from importlib import resources
from typing import NamedTuple

import numpy as np

from pipelines.reports.drawing import MANY_TASKS, PALETTE, Heat, draw_heat
from pipelines.reports.figures import (
    accuracy_figures,
    accuracy_heat,
    bias_figure,
    bias_heat,
    calibration_figures,
    change_heat,
    flip_figure,
    magnitude_figure,
    magnitude_heat,
    overlap_heat,
    training_figures,
)
from pipelines.reports.format import chance, p_equals, page_templates
from pipelines.reports.history import History, Record, head_of, of_shown
from pipelines.reports.statistics import (
    calibration_errors,
    first_drifted,
    flip_rows,
    gate_rows,
    headline,
    ledger_rows,
    parameter_spans,
    share_rows,
    step_rows,
    task_rows,
    version_spans,
    worst_confusions,
)
from pipelines.reports.weights import Movement
from sdlora import metrics as measure

_TEMPLATES = resources.files("pipelines.reports") / "templates"


class Pictures(NamedTuple):
    """The test images that the page shows."""

    samples: list[Record]
    """One record per task."""
    flips: dict[str, list[Record]]
    """Step → its surest negative flips."""


def render_page(history: History, movement: Movement | None, pictures: Pictures) -> str:
    """Fill the template. Everything that a user could have named is escaped there."""
    from markupsafe import Markup

    environment = page_templates(str(_TEMPLATES))
    environment.filters["percent"] = lambda value: _typeset(value, "{:.1f}\N{NO-BREAK SPACE}%")
    environment.filters["count"] = "{:,}".format
    environment.filters["points"] = lambda value: _typeset(value, "{:+z.1f}").replace("+0.0", "0.0")
    environment.filters |= {"chance": chance, "p_equals": p_equals}
    script = (_TEMPLATES / "sort.js").read_text(encoding="utf-8")
    many = len(history.tasks) > MANY_TASKS
    magnitudes, flips, bias = magnitude_figure(history), flip_figure(history), bias_figure(history)
    return environment.get_template("report.html.j2").render(
        history=history,
        numbers=headline(history),
        record=history.records[-1],
        many=many,
        ordered=len(history.tasks) > PALETTE,
        script=Markup(script),
        script_hash=b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        matrix=_accuracy_map(history, many),
        accuracy={name: Markup(svg) for name, svg in accuracy_figures(history).items()},
        tasks_table=of_shown(task_rows(history)),
        bias=share_rows(history),
        bias_figure=Markup(bias) if bias else None,
        bias_most=bias_heat(history).high,
        confusions=worst_confusions(history),
        flips=flip_rows(history),
        of_shown=of_shown,
        flip_figure=Markup(flips) if flips else None,
        flipped=pictures.flips,
        earlier_flips={step: shown for step, shown in list(pictures.flips.items())[1:] if shown},
        calibration={name: Markup(svg) for name, svg in calibration_figures(history).items()},
        calibration_error=calibration_errors(history)[-1],
        temperature=history.records[-1].get("freezing", {}).get("temperature"),
        left_out=history.records[-1].get("freezing", {}),
        unknown=[(step, history.unknown[step]) for step in history.shown_tasks if step in history.unknown],
        some=len(history.shown) < len(history.tasks),
        samples=pictures.samples,
        magnitudes=Markup(magnitudes) if magnitudes else None,
        magnitude_scale=magnitude_heat(history) if magnitudes and many else None,
        movement=movement,
        changes=movement and _change_map(history, movement, many),
        targets=_target_rows(history, movement) if movement else [],
        overlaps=_overlap_maps(movement) if movement and len(movement.tasks) > 1 else [],
        training={name: Markup(svg) for name, svg in training_figures(history).items()},
        steps=step_rows(history),
        ledger=ledger_rows(history),
        gate=gate_rows(history),
        drifted=first_drifted(history),
        head=head_of(history),
        parameters=parameter_spans(history),
        versions=version_spans(history),
    )


def _typeset(value: float | None, form: str) -> str:
    """Return a fraction as a text in hundredths, with a true minus. Nothing is a dash."""
    return "\N{EN DASH}" if value is None else form.format(100 * value).replace("-", "\N{MINUS SIGN}")


def _accuracy_map(history: History, many: bool) -> Record:
    """Return the accuracy matrix, with the accuracy on all tasks so far beside it."""
    pooled = measure.accuracy_curve(history.accuracy, history.samples)
    alt = "Accuracy of each task after each step"
    table = _heat_map(accuracy_heat(history), many, text="{:.1f}".format, scale="{:.0f} %".format, alt=alt)
    return table | {"totals": [f"{100 * value:.1f}" for value in pooled]}


def _change_map(history: History, movement: Movement, many: bool) -> Record | None:
    """Return the change of the weights by block and step."""
    heat = change_heat(history, movement)
    if heat is None:
        return None
    alt = "Change of the weights of each block at each step"
    return _heat_map(heat, many, text="{:.2f}".format, scale="{:.2f} %".format, alt=alt)


def _overlap_maps(movement: Movement) -> list[Record]:
    """Return the overlap of tasks: of what their directions write, and of what they read."""
    sides = (
        ("column spaces", "What directions write", movement.columns, movement.chance_columns),
        ("row spaces", "What directions read", movement.rows, movement.chance_rows),
    )
    return [
        _heat_map(
            overlap_heat(movement, values),
            len(movement.tasks) > MANY_TASKS,
            text="{:.0f}".format,
            scale="{:.0f} %".format,
            alt=f"Overlap of the {spaces} of every two tasks",
        )
        | {"title": title, "spaces": spaces, "chance": by_chance}
        for spaces, title, values, by_chance in sides
    ]


def _heat_map(
    heat: Heat, many: bool, *, text: Callable[[float], str], scale: Callable[[float], str], alt: str
) -> Record:
    """Return a map of fractions as cells with their numbers in percent, or, where there are too many cells, as a
    figure.
    """
    from markupsafe import Markup

    found: Record = {"low": scale(100 * heat.low), "high": scale(100 * heat.high), "totals": None}
    if many:
        return found | {"figure": Markup(draw_heat(heat, alt=alt))}
    cells = [
        [
            None
            if np.isnan(value)
            else {"heat": round(100 * depth), "text": text(100 * value), "new": row == column}
            for column, value, depth in zip(heat.columns, values.tolist(), depths.tolist(), strict=True)
        ]
        for row, values, depths in zip(heat.rows, heat.values, heat.depth, strict=True)
    ]
    return found | {
        "figure": None,
        "rows": list(zip(heat.rows, cells, strict=True)),
        "columns": heat.columns,
        "alt": alt,
    }


def _target_rows(history: History, movement: Movement) -> list[Record]:
    """Return for each target its change at the last step, at the step that changed it most, and by all steps."""
    if movement.steps is None or movement.total is None:
        return []
    return [
        {
            "target": target,
            "last": float(movement.steps[-1, i]),
            "most": float(movement.steps[:, i].max()),
            "step": history.tasks[int(movement.steps[:, i].argmax())],
            "total": float(movement.total[i]),
        }
        for i, target in enumerate(movement.targets)
    ]
