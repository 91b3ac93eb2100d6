"""The page of `sdlora audit diff --html`: what changed between two steps, with pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from pipelines.audits.diff_tables import (
    against_words,
    block_grid,
    frozen_line,
    greatest_loss_first,
    ranged,
    verdict,
)
from pipelines.audits.steps import AuditedStep, Figures
from pipelines.audits.tables import plain
from pipelines.data.packed import read_images
from pipelines.data.thumbnails import data_uri
from pipelines.project.errors import InputError
from pipelines.reports.format import chance, count, number, p_equals, page_templates, percent

_TEMPLATES = Path(__file__).parent / "templates"
_MARK = b'<meta name="generator" content="sdlora audit diff">'
"""What tells a page of this command from other files."""
_PICTURES = {"lost": 96, "gained": 48}
"""Flipped images on the page, at most."""


def refuse_other_files(page: Path) -> None:
    """Refuse to write over a file that is no page of this command."""
    if page.is_dir():
        raise InputError(f"{page}: a folder; give the name of a file to write")
    if page.exists():
        with page.open("rb") as file:
            if _MARK not in file.read(2000):
                raise InputError(
                    f"{page}: it exists and is no page of `sdlora audit diff`; delete it or choose another name"
                )


def flipped_pictures(found: Figures, then: AuditedStep, now: AuditedStep) -> Figures:
    """Lost and gained images with their pictures, so many of each class that all classes get some of the room."""
    if found["flips"] is None:
        return {"lost": [], "gained": []}
    chosen = {kind: share_out(found["flips"][kind], _PICTURES[kind]) for kind in _PICTURES}
    wanted = {fact["id"] for facts in chosen.values() for fact in facts}
    uris = {}
    for task in dict.fromkeys(fact["task"] for facts in chosen.values() for fact in facts):
        path = now.test_images(task) or then.test_images(task)
        if path is not None:
            images = read_images(path)
            for row, name in enumerate(images["id"].to_pylist()):
                if name in wanted:
                    uris[name] = data_uri(images["image"][row].as_py())
    return {kind: [{**fact, "uri": uris.get(fact["id"])} for fact in facts] for kind, facts in chosen.items()}


def share_out(facts: Sequence[Figures], room: int) -> list[Figures]:
    """At most so many of the images, in their order. Each class gets one before any gets two."""
    seen: dict[str, int] = {}
    turns = []
    for index, fact in enumerate(facts):
        turn = seen[fact["class"]] = seen.get(fact["class"], 0) + 1
        turns.append((turn, index))
    return [facts[index] for index in sorted(index for _, index in sorted(turns)[:room])]


def render_diff(found: Figures, pictures: Figures) -> str:
    """Fill the template. Everything that a user could have named is escaped there."""
    environment = page_templates(_TEMPLATES)
    environment.filters |= {
        "percent": percent,
        "chance": chance,
        "p_equals": p_equals,
        "number": number,
        "plain": plain,
        "ranged": ranged,
        "against": against_words,
        "count": "{:,}".format,
    }
    weights, accuracy = found["weights"], found["accuracy"]
    grid = block_grid(weights["changes"]) if weights and weights["changes"] else None
    floor = _axis_floor(accuracy)
    return environment.get_template("audit_diff.html.j2").render(
        found=found,
        title=_heading_of(found),
        pictures=pictures,
        classes=sorted(accuracy["classes"], key=greatest_loss_first) if accuracy else [],
        floor=floor,
        place=lambda share: round(100 * (share - floor) / (1 - floor), 1),
        grid=grid,
        largest=max(weights["changes"].values()) if grid else None,
        verdict=verdict(accuracy["all"]) if accuracy and found["images"]["compared"] else None,
        frozen=frozen_line(found).removeprefix(": "),
        things=count,
    )


def _heading_of(found: Figures) -> str:
    """Return what is compared, in a few words. A path would fill the line."""
    then, now = found["then"]["step"], found["now"]["step"]
    return f"Two runs of {now}" if then == now else f"{then} → {now}"


def _axis_floor(accuracy: Figures | None) -> float:
    """Return where the bars of accuracies begin: the lowest bound of any interval, rounded down to a tenth."""
    rows = [*accuracy["tasks"], *accuracy["classes"]] if accuracy else []
    lows = [row[side]["low"] for row in rows for side in ("then", "now") if row[side]]
    return min(0.9, math.floor(10 * min(lows, default=0.0)) / 10)
