"""Backbones: timm vision transformers by name, the packaged one among them, and the folder a chain starts from."""

import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import timm
from timm.models import (
    VisionTransformer,
    build_model_with_cfg,
    generate_default_cfgs,
    get_pretrained_cfg,
    register_model,
)
from torch import nn

from sdlora.adapters import projection_norms
from sdlora.ledger import RECORD, record_bytes
from sdlora.tensors import file_sha256, mapped_tensors, write_tensors

WEIGHTS, DESCRIPTION = "backbone.safetensors", "backbone.json"
PREPROCESSING = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")

_packaged = resources.files("sdlora") / "weights"
GLYPH_VIT = json.loads((_packaged / "glyph_vit.json").read_bytes())
default_cfgs = generate_default_cfgs(
    {"glyph_vit.fonts": {**GLYPH_VIT["pretrained_cfg"], "file": str(_packaged / "glyph_vit.safetensors")}}
)


@register_model
def glyph_vit(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:  # noqa: ANN401 - timm's own protocol
    """Return the packaged 32×32 vision transformer, pre-trained on characters of fonts (recipes/glyph_backbone)."""
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


def create_backbone(
    name: str,
    *,
    weights: Path | None = None,
    image_size: int | None = None,
    input_normalisation: str = "model",
) -> Backbone:
    """Return the timm model `name` without its classifier, with its own pre-trained weights or those of a local file.

    Args:
        name: `glyph_vit`, or a timm model with the tag of its weights (`vit_base_patch16_224.augreg2_in21k_ft_in1k`).
        weights: a .safetensors file of the model's state dict; None for the weights that timm knows by the name.
        image_size: side of the images in pixels where it is not the model's own; its position embedding is resampled.
        input_normalisation: `model` for the mean and standard deviation of the model's own configuration, `none` for
            pixels in [0, 1] as they are, which is what the papers' code feeds whatever the model expects.

    Raises:
        ValueError: timm has no such model or no weights for it, the tag is missing, the file is not the model's, or the
            model does not take images of that size.
        FileNotFoundError: the weights are missing, or cannot be fetched.
    """
    _require_pinned(name)
    if weights is not None:
        _require_weights(weights)
    arguments = {} if image_size is None else {"img_size": image_size}
    try:
        model = timm.create_model(
            name,
            pretrained=True,
            num_classes=0,
            pretrained_cfg_overlay=_safe_source(name, weights),
            **arguments,
        )
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
    except (TypeError, AssertionError) as error:
        if image_size is None:
            raise
        raise ValueError(
            f"backbone.image_size: {name} does not take images of {image_size}×{image_size} "
            f"({_first_line(error)}); write null or a multiple of its patch size"
        ) from error
    return Backbone(
        model=model.eval(),
        description=_describe(name, model, arguments, normalised=input_normalisation == "model"),
    )


def _require_weights(weights: Path) -> None:
    """Refuse a file of weights that is missing, not whole, or of a format that can run code."""
    if weights.suffix != ".safetensors":
        raise ValueError(f"{weights}: only .safetensors files are loaded (other formats can run code)")
    if not weights.is_file():
        raise FileNotFoundError(f"{weights}: no such weight file; correct backbone.weights or set it to null")
    mapped_tensors(weights)  # a ValueError where it is not whole


def _require_pinned(name: str) -> None:
    """Refuse a name that timm does not have, or that leaves the choice of the weights to timm's version."""
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        near = timm.list_models(f"*{architecture}*")[:3]
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise ValueError(f"timm {timm.__version__} has no model {name!r}{hint}")
    tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{architecture}.*")]
    if tags and tag not in tags and name != "glyph_vit":  # the packaged weights change with this package only
        fault = f"timm {timm.__version__} has no weights {tag!r} for it"
        if not tag:
            fault = "no tag says which weights, and two versions of timm take two of them for the bare name"
        raise ValueError(
            f"backbone.name: {name}: {fault}; write {architecture}.TAG with one of {', '.join(tags)}"
        )


def _safe_source(name: str, weights: Path | None) -> dict[str, Any]:
    """Return where timm takes the weights from: a .safetensors file or nothing, for every other format can run code."""
    if weights is not None:
        return {"file": str(weights), "custom_load": False}
    config = get_pretrained_cfg(name, allow_unregistered=False)
    if config is None or config.file:
        return {}
    if not config.hf_hub_id:
        raise ValueError(
            f"backbone.name: {name}: timm has no .safetensors file for it (other formats can run code); convert "
            "its weights and name the file as backbone.weights"
        )
    # Without the file's name timm falls back to a pickle where the hub has no other.
    return {"hf_hub_filename": "model.safetensors", "url": ""}


def _first_line(error: Exception) -> str:
    """Return what went wrong. Of a state dict that does not fit, the heading and the first fault."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(line.strip() for line in lines[: 2 if lines[0].endswith(":") else 1])


def _describe(
    name: str, model: nn.Module, arguments: Mapping[str, int], *, normalised: bool
) -> dict[str, Any]:
    config = timm.data.resolve_model_data_config(model)
    channels, height, width = config["input_size"]
    if "img_size" in arguments:
        height = width = arguments["img_size"]
    config["input_size"] = (channels, height, width)
    if not normalised:
        config |= {"mean": (0.0,) * channels, "std": (1.0,) * channels}
    return {
        "name": name,
        "features": model.num_features,
        "model_args": dict(arguments),
        "pretrained_cfg": {key: config[key] for key in PREPROCESSING},
    }


def spell_out_attention(model: nn.Module) -> None:
    """Have attention computed by its formula in place of torch's fused kernel, within rounding the same.

    For bfloat16 on the CPU, where the fused kernel is the slower one, three times in forward and backward (measured on
    an EPYC with avx512_bf16, docs/explanation/performance.md). It keeps an attention matrix for each block and head.
    """
    for module in model.modules():
        if getattr(module, "fused_attn", False):
            module.fused_attn = False  # type: ignore[assignment]


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
        "norms": projection_norms(backbone.model),
        "files": {name: file_sha256(folder / name) for name in (DESCRIPTION, WEIGHTS)},
    }
    (folder / RECORD).write_bytes(record_bytes(record))
    return dict(record)


def read_backbone(folder: Path) -> Backbone:
    """Return the backbone of a chain, from its step t00.

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
    model = timm.create_model(
        description["name"], pretrained=False, num_classes=0, **description["model_args"]
    )
    model.load_state_dict(mapped_tensors(path))
    return Backbone(model=model.eval(), description=description)
