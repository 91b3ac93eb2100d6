"""The model folder that a command is given: by its path, or by its step."""

import os
import re
from pathlib import Path

from pipelines.project.errors import InputError
from pipelines.project.files import natural_key
from pipelines.project.layout import MODELS, PARAMS, project_root
from pipelines.project.params import Params


def find_model(which: str | None) -> Path:
    """Return a model folder by its path, or by its step's name or number (t03, 3). None for the latest step.

    Steps are those of the project that this folder is in. The latest is one that its params.yaml names: not what a
    removed task has left.
    """
    root = Path(os.path.relpath(project_root(Path.cwd()) or "."))
    models = root / MODELS
    steps = sorted(path for path in models.glob("t*") if re.fullmatch(r"t[0-9]+", path.name))
    known = [path.name for path in steps if path.name != "t00"]
    if which is None:
        if (root / PARAMS).is_file():
            tasks = Params.load(root / PARAMS).tasks
            known = [name for name in known if name in tasks]
        if not known:
            raise InputError(f"{models}: no step there yet; run `sdlora run`, or name a model folder")
        return models / max(known, key=natural_key)
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
            f"{models}: no step {name} with classes ({there}); `dvc checkout` or `sdlora run` makes it"
        )
    return models / name
