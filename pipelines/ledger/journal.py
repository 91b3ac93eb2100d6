"""What a stage cost, when and where: beside the ledger and outside its hashes, because it differs from run to run."""

from __future__ import annotations

import contextlib
import platform
import resource
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipelines.project.files import sha256_of, write_json
from pipelines.project.layout import JOURNAL
from pipelines.runtime.console import log_line
from pipelines.runtime.stage import StageResult

RECORDS = ("step.json", "verdict.json", "fit.json", "metrics.json", "split.json")
"""The one file of a stage's output that stands for all of it."""


def keep_cost(
    label: str, arguments: Mapping[str, str | Path], result: StageResult, *, seconds: float
) -> None:
    """Write `ledger/journal/LABEL.json` for a stage that has just ended. A stage never fails for it.

    It tells of the last time that the stage was computed here: what came from a cache was computed elsewhere, and a
    stage that restored its output computed nothing.
    """
    if result.restored:
        return
    out = Path(arguments["out"])
    try:
        write_json(
            JOURNAL / f"{label}.json",
            {
                "stage": label,
                "ended": datetime.now(UTC).isoformat(timespec="seconds"),
                "seconds": round(seconds, 2),
                "images": sum(int(row["images"]) for row in result.rows if "images" in row),
                "host": platform.node(),
                "machine": platform.machine(),
                "commit": current_commit(),
                "output": {name: sha256_of(out / name) for name in RECORDS if (out / name).is_file()},
                **_memory(),
            },
        )
    except OSError as error:
        log_line(
            f"warning: {label} is done, but its cost could not be written to {JOURNAL} ({error.strerror})"
        )


def current_commit() -> str | None:
    """Return the commit that is checked out, with a + where tracked files differ from it. None outside of git."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"],
            capture_output=True,
            text=True,
            timeout=20,
        )
        return done.stdout.strip() or None
    return None


def _memory() -> dict[str, Any]:
    """Return the device and the peak of memory so far, in bytes, of this process and of its accelerator."""
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found: dict[str, Any] = {"device": "cpu", "peak_memory": kib * (1 if sys.platform == "darwin" else 1024)}
    torch = sys.modules.get("torch")  # a stage that did not need it has used no accelerator
    if torch is not None and torch.cuda.is_available():
        found |= {
            "device": torch.cuda.get_device_name(),
            "peak_device_memory": torch.cuda.max_memory_allocated(),
        }
    return found
