"""Folders of new images that an event names: only what lies in the inbox is ever looked at."""

import os
from pathlib import Path, PurePosixPath

from pipelines.data.sources import class_names
from pipelines.planning.tasks import add_task, inside_project
from pipelines.project.errors import InputError
from pipelines.project.layout import PARAMS
from pipelines.project.names import is_text
from pipelines.project.params import Params


def arrived(folder: str, inbox: Path) -> Path:
    """Return the folder of the inbox that an event names. An `InputError` for a name that could mean anything else.

    The inbox itself may be a link, to storage that all machines share. Below it nothing may lead out of it.
    """
    shown = repr(folder) if len(folder) <= 80 else f"{folder[:77]!r}..."
    parts = PurePosixPath(folder).parts
    if not parts:
        raise InputError(
            f"the event names no folder; its payload is a folder of {inbox}, as in folder: zebras"
        )
    if folder.startswith("/") or "\\" in folder or ".." in parts or not is_text(folder):
        raise InputError(f"{shown}: not the name of a folder in {inbox}; nothing else is looked at")
    if not inbox.is_dir():
        raise InputError(
            f"{inbox}: the inbox is missing on this machine; make it, or link to where images arrive"
        )
    found, root = inbox / folder, inbox.resolve()
    if not found.resolve().is_relative_to(root):
        raise InputError(f"{shown}: a link that leads out of {inbox}; copy the images into it")
    if not found.is_dir():
        raise InputError(
            f"{shown}: there is no such folder in {inbox}; put the images there, then send the event"
        )
    for place, folders, files in os.walk(found):
        for name in (*folders, *files):
            path = Path(place, name)
            if path.is_symlink() and not path.resolve().is_relative_to(root):
                raise InputError(
                    f"{shown}: {path.relative_to(found)} is a link that leads out of {inbox}; copy what it links to"
                )
    return found


def add_once(source: Path, path: Path = PARAMS) -> list[str]:
    """Append a task for the classes of a folder that none has from there yet, if any are left. Return lines to print.

    Where some of them are known from elsewhere it is of the kind `more`. The same event may come twice, and a run that
    was cut off starts again.
    """
    tasks = Params.load(path).tasks
    folder, manifest = inside_project(source, path)
    taken = {name for task in tasks.values() if task.source == folder for name in task.classes}
    left = [name for name in class_names(Path(folder), manifest=manifest, shown=folder) if name not in taken]
    if not left and taken:
        return [f"{path}: all classes of {folder} are there already"]
    known = {name for task in tasks.values() for name in task.classes}
    return add_task(source, classes=left, kind="classes" if known.isdisjoint(left) else "more", path=path)
