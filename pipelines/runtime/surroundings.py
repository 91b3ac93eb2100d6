"""What a process finds around it, made such that libraries work with it: streams, a user, a home."""

from __future__ import annotations

import logging
import os
import pwd
import sys
from pathlib import Path

from pipelines.project.layout import PREFECT, SCRATCH

_ESCAPE = "backslashreplace"
"""What becomes of characters that a stream cannot show."""


def settle() -> None:
    """Prepare this process, and all that it starts, for streams that are closed or narrow and a user without a name.

    Called first of all: a file that is opened while a standard stream is closed would take its place.
    """
    _open_streams()
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        # DVC asks who the user is, and Prefect where they are at home. This is what containers say.
        os.environ.setdefault("USER", f"uid-{os.getuid()}")
        os.environ.setdefault("HOME", "/")


def prepare_libraries() -> None:
    """Have libraries keep in this project's folder what they keep in the user's home, where that cannot be written.

    And have them say nothing of caches, of which nobody has asked.
    """
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    home = Path(os.path.expanduser("~"))
    places = {
        "XDG_CACHE_HOME": (home / ".cache", SCRATCH / "cache"),
        "MPLCONFIGDIR": (home / ".config" / "matplotlib", SCRATCH / "matplotlib"),
        "PREFECT_HOME": (home / PREFECT.name, PREFECT),
        "DVC_SITE_CACHE_DIR": (Path("/var/tmp/dvc"), SCRATCH / "dvc"),
    }
    for variable, (usual, own) in places.items():
        if variable not in os.environ and not _can_be_written(usual):
            os.environ[variable] = str(own.resolve())


def _open_streams() -> None:
    """Give each standard stream that is closed the null device. Have the others escape what they cannot show."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", encoding="utf-8", closefd=False))  # noqa: SIM115
        if number:
            getattr(sys, name).reconfigure(errors=_ESCAPE)
    os.environ["PYTHONIOENCODING"] = f"{sys.stdout.encoding}:{_ESCAPE}"


def _can_be_written(path: Path) -> bool:
    """Return whether a folder is there and can be written to, or can be made."""
    there = next(place for place in (path, *path.parents) if place.exists() or place == place.parent)
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)
