"""Main memory: what this process may still take, and what decoded images may take of it."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from pathlib import Path

from pipelines.project.environment import IMAGES_GIB
from pipelines.project.errors import InputError

ANY_SIZE = sys.maxsize // 2
"""A number of pixels that no picture has."""


def device_room() -> int | None:
    """Bytes that decoded images may take on the device. None where `IMAGES_GIB` is not set."""
    text = os.environ.get(IMAGES_GIB, "").strip()
    return gibibytes(text, f"{IMAGES_GIB}: {text!r} is no number of GiB; set one, or none") if text else None


def memory_room() -> int:
    """Bytes that decoded images may take in main memory."""
    room = device_room()
    return free_memory() // 2 if room is None else room


def free_memory() -> int:
    """Main memory that this process may still take, in bytes. Without limit where the system does not say."""
    found = [ANY_SIZE]
    with contextlib.suppress(OSError):
        known = re.findall(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())
        found += [int(kib) * 1024 for kib in known]
    with contextlib.suppress(OSError, ValueError):  # of a container
        limit, used = (int((CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        # What it holds of files is counted as used, and given up where memory is wanted.
        files = re.findall(r"^(?:in)?active_file (\d+)$", (CGROUP / "memory.stat").read_text(), re.MULTILINE)
        found.append(max(limit - used + sum(map(int, files)), 0))
    return min(found)


CGROUP = Path("/sys/fs/cgroup")


def gibibytes(text: str, complaint: str) -> int:
    """Return a number of GiB in bytes. What is none is an `InputError` of these words."""
    try:
        return max(int(float(text) * 2**30), 0)
    except (ValueError, OverflowError):
        raise InputError(complaint) from None
