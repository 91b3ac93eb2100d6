"""The output of `sdlora predict`: JSON lines, CSV or a table."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TextIO

from pipelines.project.files import naming
from pipelines.runtime.console import printable

if TYPE_CHECKING:
    from sdlora.prediction import Guess


class Row(NamedTuple):
    """What is known of an image: the best guesses first, or why it could not be read."""

    image: str
    guesses: list[Guess]
    score: float | None = None
    """How much it looks like none of the classes, where that is asked."""
    unknown: bool = False
    """Whether that is more than the step's threshold."""
    error: str | None = None


_Write = Callable[[Row], None]


def _jsonl(sink: TextIO, top: int, classes: Sequence[str], scored: bool) -> _Write:
    def write(row: Row) -> None:
        value: dict[str, object] = {"image": row.image}
        if row.error is None:
            value["predictions"] = [
                {"class": guess.name, "label": guess.label, "probability": guess.probability}
                for guess in row.guesses
            ]
            if scored:
                value |= {"unknown": row.unknown, "score": row.score}
        else:
            value["error"] = row.error
        sink.write(json.dumps(value) + "\n")

    return write


def _csv(sink: TextIO, top: int, classes: Sequence[str], scored: bool) -> _Write:
    writer = csv.writer(sink, lineterminator="\n")
    ranks = [f"{what}_{rank}" for rank in range(1, top + 1) for what in ("class", "probability")]
    judged = ["unknown", "score"] if scored else []
    writer.writerow(["image", *ranks, *judged, "error"])

    def write(row: Row) -> None:
        cells = [cell for guess in row.guesses for cell in (guess.name, f"{guess.probability:.6f}")]
        if scored and cells:
            cells += ["yes" if row.unknown else "no", f"{row.score:.4f}"]
        writer.writerow([row.image, *(cells or [""] * len([*ranks, *judged])), row.error or ""])

    return write


def _table(sink: TextIO, top: int, classes: Sequence[str], scored: bool) -> _Write:
    width = max(len(printable(name)) for name in classes)

    def write(row: Row) -> None:
        cells = [f"{printable(guess.name):{width}} {guess.probability:6.1%}" for guess in row.guesses]
        if scored and cells:
            cells.insert(0, "unknown" if row.unknown else "known  ")
        sink.write("   ".join([*(cells or [f"not read: {row.error}"]), printable(row.image)]) + "\n")

    return write


WRITERS: dict[str, Callable[[TextIO, int, Sequence[str], bool], _Write]] = {
    "table": _table,
    "jsonl": _jsonl,
    "csv": _csv,
}
"""The formats by name."""


@contextmanager
def opened(path: Path | None) -> Iterator[TextIO]:
    """Open a text file that is whole or absent, or standard output. A name that is no text keeps its bytes."""
    if path is None:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="surrogateescape")
        yield sys.stdout
        return
    partial = path.parent / f".{path.name}.partial"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with naming(path), partial.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            yield file
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
