"""What came of the chains of a sweep, as one table: printed, as CSV and as JSON."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.project.files import read_json, write_json, write_whole
from pipelines.project.params_text import flow
from pipelines.reports.format import percent
from pipelines.sweeps.grid import Chain

if TYPE_CHECKING:
    from rich.table import Table

_NUMBERS = ("last_accuracy", "average_accuracy", "forgetting")
_DECIMALS = 6
RESULT = "sweep-result"
"""Key of the table in which a worker leaves the numbers of a chain."""


@dataclass(frozen=True)
class Result:
    """What came of one chain: its numbers, or why it has none."""

    numbers: Mapping[str, float | None] | None = None
    """last_accuracy, average_accuracy and forgetting (None where there is one task), as in metrics.json."""
    error: str | None = None

    @property
    def line(self) -> str:
        """Return it in a few words."""
        if self.numbers is None:
            return f"failed: {self.error}"
        return f"last accuracy {percent(self.numbers['last_accuracy'], unit=' %')}"


def read_result(folder: Path) -> Result:
    """Return the numbers of a finished chain, from the metrics.json of its folder."""
    metrics = read_json(folder / "metrics.json")
    return Result(numbers={key: metrics[key] for key in _NUMBERS})


def as_json(
    axes: Mapping[str, Sequence[Any]], chains: Sequence[Chain], results: Sequence[Result]
) -> dict[str, Any]:
    """Return the whole table: the axes, a row for each chain, and one for each combination over its seeds."""
    rows = [
        {
            "values": dict(chain.values),
            **{key: _rounded((result.numbers or {}).get(key)) for key in _NUMBERS},
            "error": result.error,
        }
        for chain, result in zip(chains, results, strict=True)
    ]
    table = {"axes": {key: list(values) for key, values in axes.items()}, "chains": rows}
    return {**table, "over_seeds": _over_seeds(rows)} if "seed" in axes else table


def _over_seeds(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the mean and the sample deviation over the seeds that ended well, for each combination of other values.

    The deviation is null where there are fewer than two of them.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(repr(_without_seed(row)), []).append(row)
    found = []
    for group in groups.values():
        good = [row for row in group if row["error"] is None]
        summary: dict[str, Any] = {"values": _without_seed(group[0]), "seeds": len(good), "of": len(group)}
        for key in _NUMBERS:
            numbers = [row[key] for row in good if row[key] is not None]
            summary[key] = {
                "mean": _rounded(statistics.fmean(numbers)) if numbers else None,
                "deviation": _rounded(statistics.stdev(numbers)) if len(numbers) > 1 else None,
            }
        found.append(summary)
    return found


def write_table(out: Path, table: Mapping[str, Any]) -> None:
    """Leave `table.json`, and the rows of its chains as `table.csv`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*table["axes"], *_NUMBERS, "error"])
    for row in table["chains"]:
        numbers = ["" if row[key] is None else row[key] for key in _NUMBERS]
        writer.writerow([*map(flow, row["values"].values()), *numbers, row["error"] or ""])
    write_whole(out / "table.csv", text.getvalue().encode())
    write_json(out / "table.json", table)


def result_table(table: Mapping[str, Any]) -> Table:
    """Return the table to print: over seeds if there are several, and every chain that failed."""
    from rich.table import Table

    rows, summaries = table["chains"], table.get("over_seeds")
    axes = [key for key in table["axes"] if summaries is None or key != "seed"]
    failed = [row for row in rows if row["error"] is not None]
    found = Table(
        title="in %" + (", mean ± standard deviation over seeds" if summaries else ""), title_justify="left"
    )
    for key in (*axes, *(["seed"] if summaries else []), *(key.replace("_", " ") for key in _NUMBERS)):
        found.add_column(key, justify="right")
    if failed:
        found.add_column("error", overflow="fold")
    for row in summaries or rows:
        values = [flow(value) for value in row["values"].values()]
        if summaries:
            values.append(f"{row['seeds']} of {row['of']}" if row["seeds"] < row["of"] else str(row["of"]))
        if summaries or row["error"] is None:
            found.add_row(*values, *(_cell(row[key]) for key in _NUMBERS))
    for row in failed:
        values = [flow(row["values"][key]) for key in (*axes, *(["seed"] if summaries else []))]
        found.add_row(*values, *["failed", "", ""], row["error"])
    return found


def _cell(number: float | Mapping[str, float | None] | None) -> str:
    if not isinstance(number, Mapping):
        return "–" if number is None else f"{100 * number:.1f}"
    deviation = number["deviation"]
    return _cell(number["mean"]) + ("" if deviation is None else f" ± {100 * deviation:.1f}")


def _without_seed(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row["values"].items() if key != "seed"}


def _rounded(number: float | None) -> float | None:
    return None if number is None else round(number, _DECIMALS)
