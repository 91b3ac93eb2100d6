"""The model folder that a command is given: by its path, or by its step."""

import re
from pathlib import Path

from pipelines.project.errors import InputError
from pipelines.project.files import natural_key
from pipelines.project.layout import MODELS, PARAMS
from pipelines.project.leftovers import leftovers
from pipelines.project.params import Params


def find_model(which: str | None) -> Path:
    """Return a model folder by its path, or by its step's name or number (t03, 3). None for the latest step.

    The latest is one that params.yaml names, where there is one: not what a removed task has left.
    """
    steps = sorted(path for path in MODELS.glob("t*") if re.fullmatch(r"t[0-9]+", path.name))
    known = [path.name for path in steps if path.name != "t00"]
    if which is None:
        removed = leftovers(Params.load().tasks) if PARAMS.is_file() else []
        known = [name for name in known if MODELS / name not in removed]
        if not known:
            raise InputError(f"{MODELS}: no step there yet; run `sdlora run`, or name a model folder")
        return MODELS / max(known, key=natural_key)
    if not re.fullmatch(r"t?[0-9]+", which) or Path(which).is_dir():
        if not (Path(which) / "step.json").is_file():
            raise InputError(
                f"{which}: no model folder (no step.json in it); name one, or a step such as t03"
            )
        return Path(which)
    name = f"t{int(which.removeprefix('t')):02}"
    if name not in known:
        there = f"there are {', '.join(known)}" if known else "there are none"
        raise InputError(
            f"{MODELS}: no step {name} with classes ({there}); `dvc checkout` or `sdlora run` makes it"
        )
    return MODELS / name
