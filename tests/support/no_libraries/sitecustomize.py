"""What Python loads at its start where this folder is in PYTHONPATH: the fork server of stages finds no libraries.

A library that is not there is not preloaded, and stages that are shell scripts need none. What is forked finds all.
"""

from __future__ import annotations

import os
import sys

_LIBRARIES = {
    "imagehash",
    "PIL",
    "prefect",
    "pyarrow",
    "pydantic",
    "ruamel",
    "safetensors",
    "timm",
    "torch",
    "typer",
}


class _NoLibraries:
    """Finds none of these libraries for the process that it was made in."""

    def __init__(self) -> None:
        self._process = os.getpid()

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] in _LIBRARIES and os.getpid() == self._process:
            raise ModuleNotFoundError(name)


if "pipelines.cli.preloaded" in sys.orig_argv:
    sys.meta_path.insert(0, _NoLibraries())  # type: ignore[arg-type]
