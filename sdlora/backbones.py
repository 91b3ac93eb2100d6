"""Backbones: timm vision transformers by name, the packaged one among them, and the folder a chain starts from."""

import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import timm
from timm.models import VisionTransformer, build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from sdlora.ledger import RECORD, record_bytes
from sdlora.tensors import file_sha256, read_tensors, write_tensors

WEIGHTS, DESCRIPTION = "backbone.safetensors", "backbone.json"
PREPROCESSING = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")

_packaged = resources.files("sdlora") / "weights"
GLYPH_VIT = json.loads((_packaged / "glyph_vit.json").read_bytes())
default_cfgs = generate_default_cfgs(
    {"glyph_vit.fonts": {**GLYPH_VIT["pretrained_cfg"], "file": str(_packaged / "glyph_vit.safetensors")}}
)


@register_model
def glyph_vit(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:  # noqa: ANN401 - timm's own protocol
    """The packaged 32×32 vision transformer, pre-trained on characters of open fonts (recipes/glyph_backbone)."""
    return build_model_with_cfg(
        VisionTransformer, "glyph_vit", pretrained, **{**GLYPH_VIT["architecture"], **kwargs}
    )


class Backbone(NamedTuple):
    """A frozen feature extractor and what its images must look like."""

    model: nn.Module
    description: dict[str, Any]

    @property
    def input_size(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        channels, height, width = self.description["pretrained_cfg"]["input_size"]
        return channels, height, width


def create_backbone(name: str, *, weights: Path | None = None) -> Backbone:
    """The timm model `name` without its classifier, with its own pre-trained weights or those of a local file.

    Args:
        weights: a .safetensors file of the model's state dict; None for the weights that timm knows by the name.

    Raises:
        ValueError: timm has no such model or no weights for it, or the file is not the model's.
        FileNotFoundError: the weights are missing, or cannot be fetched.
    """
    if not timm.is_model(name):
        near = timm.list_models(f"*{name.split('.')[0]}*")[:3]
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise ValueError(f"timm {timm.__version__} has no model {name!r}{hint}")
    overlay = None
    if weights is not None:
        if weights.suffix != ".safetensors":
            raise ValueError(f"{weights}: only .safetensors files are loaded (other formats can run code)")
        if not weights.is_file():
            raise FileNotFoundError(
                f"{weights}: no such weight file; correct backbone.weights or set it to null"
            )
        read_tensors(weights)
        overlay = {"file": str(weights)}
    try:
        model = timm.create_model(name, pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"the weights of {name} are missing from the installation; install sdlora again"
        ) from error
    except OSError as error:
        raise FileNotFoundError(
            f"the weights of {name} could not be fetched: {_first_line(error)}"
        ) from error
    except RuntimeError as error:
        source = weights or name
        raise ValueError(f"{source}: no weights that fit {name}: {_first_line(error)}") from error
    return Backbone(model=model.eval(), description=_describe(name, model))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _describe(name: str, model: nn.Module) -> dict[str, Any]:
    config = timm.data.resolve_model_data_config(model)
    return {
        "name": name,
        "features": model.num_features,
        "pretrained_cfg": {key: config[key] for key in PREPROCESSING},
    }


def write_backbone(folder: Path, backbone: Backbone) -> dict[str, Any]:
    """Write the frozen base of a chain, step t00: weights, description and ledger record, into `folder`."""
    write_tensors(folder / WEIGHTS, backbone.model.state_dict())
    digest = file_sha256(folder / WEIGHTS)
    (folder / DESCRIPTION).write_bytes(record_bytes({**backbone.description, "sha256": digest}))
    record: Mapping[str, Any] = {
        "step": "t00",
        "previous": None,
        "classes": [],
        "tasks": [],
        "directions": [],
        "backbone": digest,
        "files": {name: file_sha256(folder / name) for name in (DESCRIPTION, WEIGHTS)},
    }
    (folder / RECORD).write_bytes(record_bytes(record))
    return dict(record)


def read_backbone(folder: Path) -> Backbone:
    """The backbone of a chain, from its step t00.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the weights are not those that the description names.
    """
    description = json.loads((folder / DESCRIPTION).read_bytes())
    path = folder / WEIGHTS
    found = file_sha256(path)
    if found != description["sha256"]:
        raise ValueError(
            f"{path}: changed since the chain began (sha256 {found[:12]}, expected {description['sha256'][:12]}); "
            "restore it with `dvc checkout`"
        )
    model = timm.create_model(description["name"], pretrained=False, num_classes=0)
    model.load_state_dict(read_tensors(path))
    return Backbone(model=model.eval(), description=description)
