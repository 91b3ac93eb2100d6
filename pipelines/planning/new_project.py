"""`sdlora init`: a project of one's own, which holds data, parameters, locks and ledger, and none of this program."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Collection
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from pipelines.project.errors import InputError
from pipelines.project.files import write_whole
from pipelines.project.layout import CODE_STAGE, DVC, DVC_YAML, PARAMS, STAGES, refuse_braces
from pipelines.project.params import Params
from pipelines.project.params_text import with_value, yaml_nodes
from pipelines.project.yaml_text import read_text, read_yaml

_PACKAGED = resources.files("pipelines.planning") / "template"
_CHECKOUT = Path(__file__).resolve().parents[2]
"""In the tool's own repository, which is such a project itself, the files stand at the top."""
_FILES = (str(PARAMS), str(DVC_YAML), ".dvcignore", ".gitattributes", f"{DVC}/config")
_IGNORED = """\
# What the pipeline makes; dvc.lock, metrics.json and ledger/ are kept. So are files of DVC that stand for images:
# ?* for *, which DVC takes to mean the folder itself as well, and then finds no file in it.
/artifacts/
/data/raw/?*
!/data/raw/*.dvc
/.sdlora/
/.prefect/

# A write that was cut off.
*.partial
"""
_README = """\
# {name}

An image classifier that learns new classes task by task, with sdlora.

    sdlora doctor data/raw/NAME      # check images: data/raw/NAME/CLASS/*.png
    sdlora add-task data/raw/NAME    # or sdlora plan data/raw/NAME --tasks 5
    sdlora run                       # train, test, report: artifacts/report/report.html
    git add . && git commit -m "Learn NAME"

`params.yaml` has every choice, `dvc.yaml` the stages, `ledger/` what a run leaves beside DVC's outputs.
"""


def new_project(folder: Path, *, example: bool = False) -> list[str]:
    """Write a project into a folder, which is made where it is not there. Return lines to print.

    With `example`, its tasks are those of the handwritten digits; else it has none yet.

    Raises:
        InputError: a file of that name says something else, or DVC does not work there; then nothing is written.
    """
    refuse_braces(folder.resolve())
    files = project_files(folder.resolve().name, example=example)
    taken = [name for name, text in files.items() if _differs(folder / name, text)]
    if taken:
        raise InputError(
            f"{folder / taken[0]}: there already, and another file than a new project has"
            f"{f' (and {len(taken) - 1} more)' if len(taken) > 1 else ''}; choose another folder"
        )
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_whole(folder / name, text.encode())
    lines = [f"{folder}: a new project of {len(files)} files"]
    if not _in_git(folder):
        _start_git(folder)
        lines.append(f"{folder}: a new Git repository; nothing is committed")
    first = (
        "sdlora run"
        if example
        else "put images into data/raw/NAME/CLASS/, then sdlora add-task data/raw/NAME"
    )
    return [*lines, f"next: cd {folder} && {first}"]


def project_files(name: str, *, example: bool) -> dict[str, str]:
    """Return the files of a new project by their paths."""
    files = {path: _template(path) for path in _FILES}
    if not example:
        params = files[str(PARAMS)]
        params = re.sub(r"^fetch:\n(?:  .*\n)+", "fetch: {}\n", params, flags=re.MULTILINE)
        start = params.index("# These are two digits at a time")
        files[str(PARAMS)] = params[:start] + "tasks: {}\n"
    files[str(DVC_YAML)] = _stages(watched=False)
    plots = _PACKAGED / "plots" if _PACKAGED.is_dir() else _CHECKOUT / DVC / "plots"
    files |= {f"{DVC}/plots/{plot.name}": plot.read_text(encoding="utf-8") for plot in plots.iterdir()}
    return {**files, ".gitignore": _IGNORED, "README.md": _README.format(name=name)}


def _stages(*, watched: bool) -> str:
    """Return dvc.yaml of this version. DVC watches the sources of this program only where they are in the project."""
    text = _template(str(DVC_YAML))
    if watched:
        return text
    stages, count = re.subn(
        r"^(    cmd: sdlora code .*\n)    deps: .*\n",
        r"\1    always_changed: true # it looks at the installed program, half a second\n",
        text,
        flags=re.MULTILINE,
    )
    assert count == 1
    return stages


def other_calls() -> dict[str, list[str]]:
    """Return the stages that dvc.yaml has otherwise than this version, and in what.

    That are options of the call, and keys of params.yaml that the stage reads and DVC would not watch. A project may
    have DVC watch more.
    """
    mine, theirs = (_stages_of(text) for text in (_template(str(DVC_YAML)), read_text(DVC_YAML)))
    found = {
        kind: [
            *sorted(mine[kind].options ^ theirs[kind].options),
            *sorted(mine[kind].keys - theirs[kind].keys),
        ]
        for kind in mine.keys() & theirs.keys()
    }
    return {kind: others for kind, others in sorted(found.items()) if others}


def missing_keys() -> list[str]:
    """Return the keys that dvc.yaml watches and params.yaml lacks: it is of a version that did not know them."""
    there = yaml_nodes(read_text(PARAMS))
    keys = {key for stage in _stages_of(read_text(DVC_YAML)).values() for key in stage.keys if "$" not in key}
    return sorted(key for key in keys if tuple(key.split(".")) not in there)


def add_keys(keys: Collection[str]) -> None:
    """Write keys into params.yaml as null, which is as if they were not there."""
    text = read_text(PARAMS)
    for key in keys:
        text = with_value(text, tuple(key.split(".")), None)
    Params.parse(text, origin=f"{PARAMS} with {', '.join(keys)} (not written)")
    write_whole(PARAMS, text.encode())


def renew_stages() -> None:
    """Write dvc.yaml as this version has it. An `InputError` where Git has not the one that goes."""
    done = subprocess.run(
        ["git", "diff", "--quiet", "HEAD", "--", str(DVC_YAML)], capture_output=True, check=False
    )
    if done.returncode:
        raise InputError(
            f"{DVC_YAML}: it is of another version, and Git has not all of it; commit it, then run `sdlora keep` "
            "again: the one of this version takes its place, and `git diff` shows what of yours to put back"
        )
    watched = "deps" in read_yaml(read_text(DVC_YAML), origin=str(DVC_YAML))["stages"][CODE_STAGE]
    write_whole(DVC_YAML, _stages(watched=watched).encode())


class _Stage(NamedTuple):
    """What dvc.yaml says of a stage."""

    options: set[str]
    """with which it is called"""
    keys: set[str]
    """of params.yaml, which DVC watches"""


def _stages_of(text: str) -> dict[str, _Stage]:
    """Return the stages of a dvc.yaml that are this program's. Nothing of one that is damaged."""
    stages = read_yaml(text, origin=str(DVC_YAML)).get("stages")
    found = {}
    for kind, stage in stages.items() if isinstance(stages, dict) else ():
        called = stage.get("do", stage) if isinstance(stage, dict) else {}
        command, keys = (
            (called.get("cmd"), called.get("params")) if isinstance(called, dict) else (None, None)
        )
        if kind in STAGES and isinstance(command, str) and command.split()[:2] == ["sdlora", kind]:
            watched = {key for key in keys if isinstance(key, str)} if isinstance(keys, list) else set()
            found[kind] = _Stage(set(re.findall(r"(?<!\S)--[a-z-]+", command)), watched)
    return found


def _template(path: str) -> str:
    place = _PACKAGED / path.removeprefix(f"{DVC}/") if _PACKAGED.is_dir() else _CHECKOUT / path
    return place.read_text(encoding="utf-8")


def _differs(path: Path, text: str) -> bool:
    if path.is_symlink() or path.is_dir():
        return True
    return path.exists() and path.read_bytes() != text.encode()


def _in_git(folder: Path) -> bool:
    try:
        return not subprocess.run(
            ["git", "rev-parse", "--git-dir"], cwd=folder, capture_output=True, check=False
        ).returncode
    except FileNotFoundError:
        raise InputError("git is not installed, and a project is a Git repository; install it") from None


def _start_git(folder: Path) -> None:
    done = subprocess.run(["git", "init", "-q"], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(f"git init in {folder}: {' '.join(done.stderr.split())}")
