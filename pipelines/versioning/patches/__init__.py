"""What this program replaces in DVC, process-wide: it saves time and changes no result."""

from __future__ import annotations

import functools
import importlib
import os
import sys

from pipelines.project.environment import PATCHES_SAID, PLAIN_DVC


def plain_dvc() -> bool:
    """Return whether DVC is to work without this program's patches and fork server."""
    return os.environ.get(PLAIN_DVC) == "1"


@functools.cache
def apply_patches() -> frozenset[str]:
    """Change DVC in this process. Return the names of the patches that are in place.

    A patch stays away where DVC has another version than those that it was tested with, or where something that it
    replaces or relies on is not as it was there (`known.py`). Then one line says so, once in a command, and DVC does
    that part of its work itself.
    """
    if plain_dvc():
        return frozenset()
    from pipelines.versioning.patches.known import PATCHES, unknown_of, unknown_version

    version = unknown_version()
    missing = {name: [version] if version else unknown_of(names) for name, names in PATCHES.items()}
    applied = frozenset(name for name, unknown in missing.items() if not unknown)
    for name in applied:
        importlib.import_module(f"pipelines.versioning.patches.{name}").use()
    if len(applied) < len(PATCHES) and PATCHES_SAID not in os.environ:
        import dvc

        unknown = dict.fromkeys(text for texts in missing.values() for text in texts)
        what = "this version" if version else ", ".join(unknown)
        is_not = "is not" if len(unknown) == 1 else "are not"
        sys.stderr.write(
            f"DVC {dvc.__version__}: {what} {is_not} known here; DVC's own code is used, slower\n"
        )
        os.environ[PATCHES_SAID] = "1"
    return applied
