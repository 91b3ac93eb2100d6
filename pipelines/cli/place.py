"""Where a command is called, and where it works: called anywhere in a project, it works for the whole of it."""

from __future__ import annotations

import os
from pathlib import Path

from pipelines.project.layout import project_root, refuse_braces, require_project
from pipelines.runtime.surroundings import prepare_libraries


class Caller:
    """Whoever called: what they name is meant from where they stand."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, given: Path) -> Path:
        """Return a path as the project's folder has it."""
        if self._folder == Path.cwd() or given.is_absolute():
            return given
        return Path(os.path.relpath(self._folder / given))

    def optional(self, given: Path | None) -> Path | None:
        """Return a path as the project's folder has it, if one was given."""
        return None if given is None else self.path(given)

    def path_or_name(self, given: str) -> str:
        """Return what may be a path: one if there is such a file or folder, else what it is."""
        return str(self.path(Path(given))) if given and (self._folder / given).exists() else given


def enter_project(*, above: bool = True) -> Caller:
    """Go to the folder of the project that this one is in. An `InputError` where it is in none.

    Without `above` this folder has to be the project's.
    """
    caller = Caller(Path.cwd())
    root = project_root(Path.cwd()) if above else None
    if root is None:
        require_project()
    else:
        os.chdir(root)
    refuse_braces(Path.cwd())
    prepare_libraries()
    return caller
