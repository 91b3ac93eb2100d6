"""Backbones: timm vision transformers by name, the packaged one among them, and the folder a chain starts from."""

import copy
import json
import math
import re
from collections.abc import Callable, Collection, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, NamedTuple, NotRequired, TypedDict

import timm
import torch
from timm.models import (
    VisionTransformer,
    build_model_with_cfg,
    generate_default_cfgs,
    get_pretrained_cfg,
    register_model,
)
from torch import Tensor, nn

from sdlora.adapters import projection_norms
from sdlora.ledger import RECORD, file_sha256, read_record, record_bytes, require_files
from sdlora.records import FORMAT, Format, Name, Number, Rule, Sha256, WholeNumber, read_record_file, shown
from sdlora.tensor_checks import require_finite
from sdlora.tensors import mapped_tensors, write_tensors

WEIGHTS, _DESCRIPTION = "backbone.safetensors", "backbone.json"
_WRAPPERS = ("module.", "_orig_mod.", "model.", "backbone.")
"""What a program that holds a model within its own writes before the names of its tensors."""
_CLASSIFIERS = ("head", "head_dist", "fc", "classifier")
"""What a classifier may be called, beside the name that timm has for the model's own."""
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


_SIZES = ("img_size", "patch_size", "embed_dim", "depth", "num_heads")
_Side = Annotated[int, Rule(range(1, 8193).__contains__, "1 to 8192")]
_Positive = Annotated[float, Rule(lambda value: 1e-6 <= value <= 1e6, "a number from 1e-6 to 1e6")]
_Share = Annotated[float, Rule(lambda value: 0.1 <= value <= 10, "a number from 0.1 to 10")]


class _Pictures(TypedDict):
    """How the images are prepared. `Preprocessing.of` reads it."""

    input_size: Annotated[list[_Side], Rule(lambda sizes: len(sizes) == 3, "channels, height and width")]
    mean: list[Number]
    std: list[_Positive]
    interpolation: Name
    crop_pct: _Share
    crop_mode: Name


class _Described(TypedDict):
    """What backbone.json holds."""

    format: NotRequired[Format]
    name: Name
    features: WholeNumber
    # Nothing but sizes may reach timm: it takes names of files too, of kinds that can run code.
    model_args: dict[Annotated[str, Rule(_SIZES.__contains__, f"one of {', '.join(_SIZES)}")], _Side]
    pretrained_cfg: _Pictures
    sha256: Sha256


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
    say: Callable[[str], object] = lambda line: None,
) -> Backbone:
    """Return the timm model `name` without its classifier, with its own pre-trained weights or those of a local file.

    Args:
        name: `glyph_vit`, or a timm model with the tag of its weights (`vit_base_patch16_224.augreg2_in21k_ft_in1k`).
        weights: a .safetensors file of the model's state dict; None for the weights that timm knows by the name.
        image_size: side of the images in pixels where it is not the model's own; its position embedding is resampled.
        input_normalisation: `model` for the mean and standard deviation of the model's own configuration, `none` for
            pixels in [0, 1] as they are, which is what the papers' code feeds whatever the model expects.
        say: told in a line what was made of the names in the file, if anything.

    Raises:
        ValueError: timm has no such model or no weights for it, the tag is missing, the file is not the model's, or the
            model does not take images of that size.
        FileNotFoundError: the weights are missing, or cannot be fetched.
    """
    _require_pinned(name)
    source = _hub_source(name) if weights is None else _file_source(name, weights, say)
    arguments = {} if image_size is None else {"img_size": image_size}
    try:
        model = timm.create_model(
            name,
            pretrained=True,
            num_classes=0,
            pretrained_cfg_overlay=source,
            **arguments,
        )
    except OSError as error:
        fault = f"could not be fetched: {_first_line(error)}"
        # Without a network the hub's own error is a FileNotFoundError too.
        if isinstance(error, FileNotFoundError) and not source:
            fault = "are missing from the installation; install sdlora again"
        raise FileNotFoundError(f"the weights of {name} {fault}") from error
    except RuntimeError as error:
        raise ValueError(f"{weights or name}: no weights that fit {name}: {_misfit(error)}") from error
    except (TypeError, AssertionError) as error:
        if image_size is None:
            raise
        raise ValueError(
            f"backbone.image_size: {name} does not take images of {image_size}×{image_size} "
            f"({_first_line(error)}); write null or a multiple of its patch size"
        ) from error
    except (KeyError, IndexError, AttributeError, ValueError) as error:
        # timm knows foreign files by one of their names, and takes the others to be there.
        raise ValueError(f"{weights or name}: no weights that fit {name}: {_first_line(error)}") from error
    model.pretrained_cfg.pop("state_dict", None)  # a second copy of all weights
    return Backbone(
        model=model.eval(),
        description=_describe(name, model, arguments, normalised=input_normalisation == "model"),
    )


def backbone_of(model: nn.Module) -> Backbone:
    """Return a timm model that exists already as a backbone, without its classifier. The model itself is not changed.

    Raises:
        ValueError: it is no timm model, or another one than timm makes under its name.
    """
    config = getattr(model, "pretrained_cfg", None) or {}
    architecture, tag = config.get("architecture", ""), config.get("tag", "")
    if not timm.is_model(architecture):
        raise ValueError(
            f"a model of type {type(model).__name__} that timm has not made under a name; take timm.create_model's"
        )
    if (kind := next(model.parameters()).dtype) != torch.float32:
        raise ValueError(
            f"{architecture}: its weights are {kind}, expected torch.float32; call .float() on it"
        )
    name, own = f"{architecture}.{tag}" if tag else architecture, copy.deepcopy(model).cpu().eval()
    own.reset_classifier(0)  # type: ignore[operator]
    sides = getattr(getattr(own, "patch_embed", None), "img_size", None) or config["input_size"][1:]
    arguments = {} if [*sides] == [*config["input_size"][1:]] else {"img_size": sides[0]}
    description = _describe(name, own, arguments, normalised=True)
    try:
        again = timm.create_model(name, pretrained=False, num_classes=0, **arguments).eval()
        again.load_state_dict(own.state_dict())
        image = torch.linspace(-1, 1, math.prod(description["pretrained_cfg"]["input_size"]))
        with torch.inference_mode():
            found, expected = (
                each(image.view(1, *description["pretrained_cfg"]["input_size"])) for each in (again, own)
            )
        equal = torch.allclose(found, expected, rtol=1e-3, atol=1e-4)
    except (RuntimeError, TypeError, AssertionError) as error:
        raise ValueError(f"{name}: not as timm makes it: {_first_line(error)}") from error
    if not equal:
        raise ValueError(f"{name}: its features are others than those of timm's model with its weights")
    return Backbone(model=again, description=description)


def _file_source(name: str, weights: Path, say: Callable[[str], object]) -> dict[str, Any]:
    """Return the weights of a file so that timm takes all of them or raises, as for its own name of the model.

    The classifier is left out, and what a wrapper wrote before every other name.
    """
    if weights.suffix != ".safetensors":
        raise ValueError(f"{weights}: only .safetensors files are loaded (other formats can run code)")
    if not weights.is_file():
        raise FileNotFoundError(f"{weights}: no such weight file; correct backbone.weights or set it to null")
    tensors = mapped_tensors(weights)
    require_finite(weights, {key: value for key, value in tensors.items() if value.is_floating_point()})
    known = get_pretrained_cfg(name)
    own = (known and known.classifier) or ()
    classifiers = {*_CLASSIFIERS, *((own,) if isinstance(own, str) else own)}
    bare, prefix = _without_wrapper(tensors, classifiers)
    if prefix:
        say(f"{weights}: {shown(prefix)} stands before the names of its tensors; it was taken off")
    kept = {key: value for key, value in bare.items() if key.rpartition(".")[0] not in classifiers}
    if not kept:
        raise ValueError(f"{weights}: no weights that fit {name}: it holds nothing but a classifier")
    # With a classifier of no class on both sides timm leaves nothing out, and lets nothing be missing.
    return {"state_dict": kept, "num_classes": 0, "label_offset": 0, "custom_load": False}


def _without_wrapper(
    tensors: Mapping[str, Tensor], classifiers: Collection[str]
) -> tuple[dict[str, Tensor], str]:
    """Return the tensors without what a wrapper wrote before all names but a classifier's, and what that was."""
    bare, taken = dict(tensors), ""
    while True:
        others = [key for key in bare if key.rpartition(".")[0] not in classifiers]
        prefix = next((p for p in _WRAPPERS if others and all(key.startswith(p) for key in others)), None)
        if prefix is None:
            return bare, taken
        bare, taken = {key.removeprefix(prefix): value for key, value in bare.items()}, taken + prefix


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


def _hub_source(name: str) -> dict[str, Any]:
    """Return where timm takes its own weights: a .safetensors file or nothing, for every other format can run code."""
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
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return shown(lines[0].strip(), 120)


def _misfit(error: RuntimeError) -> str:
    """Return what torch or timm says of tensors that do not fit: three names of the first kind of fault, and how many
    there are of the others.
    """
    lines = [line.strip() for line in str(error).splitlines()]

    def quoted(start: str) -> list[str]:
        return re.findall(r'"([^"]*)"', " ".join(line for line in lines if line.startswith(start)))

    sizes = [line.split()[3].rstrip(":") for line in lines if line.startswith("size mismatch for ")]
    faults = {
        "it lacks": quoted("Missing key"),
        "the model has no": quoted("Unexpected key"),
        "another size has": sizes,
    }
    found = [(words, names) for words, names in faults.items() if names]
    if not found:
        return _first_line(error)
    (words, names), *others = found
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    rest = "".join(f"; {other} {len(its)}" for other, its in others)
    return f"{words} {', '.join(shown(name, 30) for name in names[:3])}{more}{rest}"


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
    described = {**backbone.description, "format": FORMAT, "sha256": digest}
    (folder / _DESCRIPTION).write_bytes(record_bytes(described))
    record: Mapping[str, Any] = {
        "format": FORMAT,
        "step": "t00",
        "previous": None,
        "classes": [],
        "tasks": [],
        "directions": [],
        "backbone": digest,
        "norms": projection_norms(backbone.model),
        "files": {name: file_sha256(folder / name) for name in (_DESCRIPTION, WEIGHTS)},
    }
    (folder / RECORD).write_bytes(record_bytes(record))
    return dict(record)


def read_description(folder: Path) -> dict[str, Any]:
    """Return what the folder of step t00 says of the backbone.

    Raises:
        FileNotFoundError: it is missing.
        ValueError: it is no such description, or of a model that timm does not have.
    """
    path = folder / _DESCRIPTION
    description: dict[str, Any] = read_record_file(path, _Described)
    pictures = description["pretrained_cfg"]
    if not len(pictures["mean"]) == len(pictures["std"]) == pictures["input_size"][0]:
        raise ValueError(
            f"{path}: input_size, mean and std are not of the same number of channels; restore the file"
        )
    if not timm.is_model(description["name"].partition(".")[0]):
        raise ValueError(f"{path}: timm {timm.__version__} has no model {shown(description['name'])}")
    return description


def read_backbone(folder: Path) -> Backbone:
    """Return the backbone of a chain, from its step t00.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is not the one that the record names, or does not hold what it must.
    """
    record = read_record(folder)
    require_files(folder, record, (_DESCRIPTION, WEIGHTS))
    description, path = read_description(folder), folder / WEIGHTS
    if not description["sha256"] == record["backbone"] == record["files"][WEIGHTS]:
        raise ValueError(f"{folder}: {_DESCRIPTION} and {RECORD} name different weights; restore the folder")
    tensors = mapped_tensors(path)
    require_finite(path, {key: value for key, value in tensors.items() if value.is_floating_point()})
    try:
        model = timm.create_model(
            description["name"], pretrained=False, num_classes=0, **description["model_args"]
        )
        model.load_state_dict(tensors)
    except (RuntimeError, TypeError, AssertionError, ValueError) as error:
        fault = _misfit(error) if isinstance(error, RuntimeError) else _first_line(error)
        raise ValueError(f"{path}: not the weights of {shown(description['name'])}: {fault}") from error
    if model.num_features != description["features"]:
        raise ValueError(
            f"{folder / _DESCRIPTION}: {description['features']} features, but {description['name']} has "
            f"{model.num_features}; restore the file"
        )
    return Backbone(model=model.eval(), description=description)
