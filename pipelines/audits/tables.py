"""How audits show figures: plain tables of 80 columns, and JSON that is the same for the same inputs."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pipelines.reports.format import DASH, percent
from pipelines.runtime.console import printable

if TYPE_CHECKING:
    from rich.console import Console, Group

_WIDTH = 80
_SHORT = 10
"""A name of this width or less is never cut."""


def significant(value: Any) -> Any:  # noqa: ANN401 - whatever JSON can hold
    """Return the same with six significant digits, null for NaN and no negative zero."""
    if isinstance(value, Mapping):
        return {name: significant(item) for name, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [significant(item) for item in value]
    if isinstance(value, float):
        return None if math.isnan(value) else float(f"{value:.6g}") + 0.0
    return value


def print_json(value: Mapping[str, Any]) -> None:
    """Print one JSON object with sorted keys."""
    sys.stdout.write(json.dumps(significant(value), sort_keys=True, indent=2, ensure_ascii=False) + "\n")


def console() -> Console:
    """Return where tables are printed: as wide as the terminal, or 80 columns without one."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else _WIDTH)


def table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    texts: Collection[int] = (0,),
) -> Group:
    """Return a titled table whose columns `texts` hold names and the others numbers. Nothing in it is markup.

    A name that is too long for the width is cut.
    """
    from rich import box
    from rich.cells import cell_len
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    lines = [[printable(str(cell)) for cell in row] for row in rows]
    widths = [max(map(cell_len, column)) for column in zip(columns, *lines, strict=True)]
    long = [index for index in texts if widths[index] > _SHORT]
    # Left to itself, rich takes from all columns alike, and a number without its last digit is another number.
    room = console().width - sum(widths) - 2 * len(columns) + sum(widths[index] for index in long)
    made = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False)
    for index, name in enumerate(columns):
        made.add_column(
            Text(name),
            justify="left" if index in texts else "right",
            overflow="ellipsis",
            no_wrap=True,
            max_width=max(_SHORT, room // len(long)) if index in long else None,
        )
    for line in lines:
        made.add_row(*map(Text, line))
    return Group(Text(title, style="bold"), made)


def interval(score: Mapping[str, Any] | None) -> str:
    """Return an accuracy in per cent with its interval: `95.0 (89–98)`."""
    if score is None or not score["images"]:
        return DASH
    return f"{percent(score['accuracy'])} ({100 * score['low']:.0f}{DASH}{100 * score['high']:.0f})"


def plain(value: object) -> str:
    """Return a parameter as params.yaml has it: texts as they are, others as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
