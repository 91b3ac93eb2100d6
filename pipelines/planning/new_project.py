"""`sdlora init`: a project of one's own, which holds data, parameters, locks and ledger, and none of this program."""

from __future__ import annotations

import re
import subprocess
from importlib import resources
from pathlib import Path

from pipelines.project.errors import InputError
from pipelines.project.files import write_whole
from pipelines.project.layout import CODE_STAGE, DVC, DVC_YAML, PARAMS, STAGES, refuse_braces
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
    """Return the stages that dvc.yaml calls with other options than this version has, and these options."""
    mine = _calls(_template(str(DVC_YAML)))
    theirs = _calls(read_text(DVC_YAML))
    found = {kind: sorted(mine[kind] ^ theirs[kind]) for kind in mine.keys() & theirs.keys()}
    return {kind: options for kind, options in sorted(found.items()) if options}


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


def _calls(text: str) -> dict[str, set[str]]:
    """Return the options with which the stages of a dvc.yaml are called. Nothing of one that is damaged."""
    stages = read_yaml(text, origin=str(DVC_YAML)).get("stages")
    found = {}
    for kind, stage in stages.items() if isinstance(stages, dict) else ():
        called = stage.get("do", stage) if isinstance(stage, dict) else {}
        command = called.get("cmd") if isinstance(called, dict) else None
        if kind in STAGES and isinstance(command, str) and command.split()[:2] == ["sdlora", kind]:
            found[kind] = set(re.findall(r"(?<!\S)--[a-z-]+", command))
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
