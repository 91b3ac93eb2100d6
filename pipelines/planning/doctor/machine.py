"""What a run needs of the machine: packages, a device, git, a DVC project and the backbone."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.planning.doctor.findings import Finding
from pipelines.project.errors import InputError
from pipelines.project.layout import BACKBONE, DVC
from pipelines.project.params import Params

if TYPE_CHECKING:
    from sdlora.backbones import Backbone


def machine_findings(params: Params) -> Iterator[Finding]:
    """Yield what a run needs of the machine: packages, a device, git, a DVC project."""
    import torch

    from sdlora.devices import best_device

    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "timm", "dvc", "prefect", "pillow"))
    yield Finding("ok", "packages", "", f"Python {platform.python_version()}, {packages}", [], "")
    device = best_device()
    name = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    )
    yield Finding("ok", "device", "", f"{device.type} ({name})", [], "")
    if shutil.which("git") is None:
        yield Finding("error", "git", "", "there is no git on the PATH", [], "install it: DVC needs it")
    elif not any((folder / ".git").exists() for folder in (Path.cwd(), *Path.cwd().parents)):
        yield Finding("error", "git", "", "the project is no git repository", [], "run `git init`")
    if not DVC.is_dir():
        yield Finding("error", "dvc", "", "the project is no DVC project", [], "run `dvc init`")


def load_backbone(params: Params, findings: list[Finding]) -> Backbone | None:
    """Return the frozen base of the chain if there is one, else the one that params.yaml names. None if neither is
    here.
    """
    from sdlora.backbones import create_backbone, read_backbone

    choice = params.backbone
    try:
        base = read_backbone(BACKBONE) if BACKBONE.is_dir() else None
        if base is None or base.description["name"] != choice.name:
            base = create_backbone(
                choice.name,
                weights=Path(choice.weights) if choice.weights else None,
                image_size=choice.image_size,
                input_normalisation=choice.input_normalisation,
            )
    except (OSError, ValueError, InputError) as error:
        what = f"{choice.name} cannot be loaded: {' '.join(str(error).split())}"
        findings.append(Finding("error", "backbone", "", what, [], "correct backbone in params.yaml"))
        return None
    channels, height, width = base.input_size
    what = f"{choice.name}, images of {channels}×{height}×{width}"
    findings.append(Finding("ok", "backbone", "", what, [], ""))
    return base
