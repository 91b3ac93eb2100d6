"""The page: one file that needs nothing else, whoever opens it, wherever."""

from __future__ import annotations

from pathlib import Path

from pipelines.reports.figures import (
    MANY_TASKS,
    PALETTE,
    accuracy_figures,
    magnitude_figure,
    training_figures,
)
from pipelines.reports.history import History, Record
from pipelines.reports.numbers import (
    flattened,
    headline,
    heat_floor,
    matrix_rows,
    prediction_shares,
    step_rows,
    worst_confusions,
)

TEMPLATES = Path(__file__).parents[1] / "templates"


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
