"""`sdlora audit diff`: what changed between two steps, or two runs of one, and whether it is more than chance."""

from __future__ import annotations

import sys
from pathlib import Path

from pipelines.audits.changes import compare
from pipelines.audits.diff_page import flipped_pictures, refuse_other_files, render_diff
from pipelines.audits.diff_tables import show
from pipelines.audits.steps import opened_project
from pipelines.audits.tables import print_json, significant
from pipelines.project.files import write_whole


def diff(then: str, now: str, *, features: bool, as_json: bool, page: Path | None) -> None:
    """Print what changed from the step `then` to the step `now`, and write it to `page`."""
    if page is not None:
        refuse_other_files(page)
    with opened_project() as project:
        before, after = project.step(then), project.step(now)
        found = significant(compare(before, after, features=features))
        if page is not None:
            write_whole(page, render_diff(found, flipped_pictures(found, before, after)).encode())
    if as_json:
        print_json(found)
        return
    show(found)
    if page is not None:
        sys.stdout.write(f"\npage  {page}\n")
