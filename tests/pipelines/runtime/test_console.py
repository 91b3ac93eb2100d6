"""What is printed for people never stops the work."""

from __future__ import annotations

import os
import sys

import pytest

from pipelines.runtime.console import log_line


def test_work_goes_on_where_nobody_reads_its_lines_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its reader was killed; the signal that ends a fit in order is on its way, and comes after the next line."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        log_line("fit t01: 12/60 images")
        with pytest.raises(BrokenPipeError):
            stderr.flush()
        monkeypatch.undo()
        os.dup2(os.open(os.devnull, os.O_WRONLY), stderr.fileno())
