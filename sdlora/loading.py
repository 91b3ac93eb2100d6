"""A step of a chain as a model to use: a plain timm module with its transform and its class names."""

import copy
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sdlora.adapters import AdaptedWeight, Factors
from sdlora.backbones import GLYPH_VIT, Backbone, read_backbone
from sdlora.calibration import temperature_of, tempered
from sdlora.classifier import IncrementalClassifier, ModelState, adapted_classifier, merged_classifier
from sdlora.devices import best_device
from sdlora.head import QuadraticBlock
from sdlora.heads import LINEAR_FALLBACK, linear_rows
from sdlora.ledger import RECORD, folders_beside, read_own_record
from sdlora.model_folder import read_model
from sdlora.preprocessing import Preprocessing

_STEP = re.compile(r"t[0-9]{2,9}")


class _Model(NamedTuple):
    """The model of a step, in evaluation mode: `module(transform(picture)[None])` are logits (1, classes)."""

    module: nn.Module
    """The plain timm model with merged weights and all rows of the head; float32 (n, c, h, w) → logits (n, classes).
    Where the head is no linear one, the merged model under the head of this library."""
    transform: Preprocessing
    """A Pillow picture → float32 (c, h, w); all that is known of the input stands in its fields."""
    classes: list[str]
    """Their names in the order of the logits."""
    tasks: list[str]
    """The tasks so far, in order of arrival."""
    scored: nn.Module | None
    """The same with a score for unknown images: float32 (n, c, h, w) → logits (n, classes), scores (n,). None where the
    step has no threshold."""
    threshold: float | None
    """An image whose score is above it is of none of the classes."""


class Step(NamedTuple):
    """A step as its files hold it, hashes checked."""

    backbone: Backbone
    learned: ModelState
    record: dict[str, Any]
    fallback: str | None = None
    """The head whose rows are in use in place of the record's; None for its own."""

    @property
    def linear(self) -> bool:
        """Whether the rows in use are linear."""
        return not any(isinstance(rows, QuadraticBlock) for rows in self.learned.rows.values())

    @property
    def classes(self) -> list[str]:
        """Names in the order of the logits."""
        return [entry["name"] for entry in self.record["classes"]]


def load(folder: Path | str, *, backbone: Path | str | None = None, device: str | None = None) -> _Model:
    """Return the model of the step in `folder` (artifacts/model/t05), or of a chain's newest step (artifacts/model).

    Args:
        backbone: the folder of step t00; None for the one beside `folder`.
        device: of torch; None for the accelerator where there is one.

    Raises:
        FileNotFoundError: a folder, or a file that a record names, is missing.
        ValueError: a file is not the one that its record names, or the step has no classes.
    """
    step = read_step(newest_step(Path(folder)), backbone=None if backbone is None else Path(backbone))
    chosen, rejection = torch.device(device) if device else best_device(), step.learned.rejection
    scored = scored_model(step) if rejection else None
    return _Model(
        # Rows that are not linear are under the same network either way.
        module=scored.model if scored and not step.linear else inference_model(step).to(chosen),
        transform=Preprocessing.of(step.backbone.description),
        classes=step.classes,
        tasks=list(step.record["tasks"]),
        scored=scored and scored.to(chosen),
        threshold=rejection and rejection.threshold,
    )


def newest_step(folder: Path) -> Path:
    """Return the folder of a step as it is. Of a chain, whose folder has one for each step, the newest step's.

    Raises:
        FileNotFoundError: it is neither.
    """
    if (folder / RECORD).is_file():
        return folder
    steps = [path.parent for path in folder.glob(f"t*/{RECORD}") if _STEP.fullmatch(path.parent.name)]
    if not steps:
        raise FileNotFoundError(
            f"{folder}: no {RECORD} of a step, and no folder such as t01 with one; correct the path"
        )
    return max(steps, key=lambda step: int(step.name[1:]))


def read_step(folder: Path, *, backbone: Path | None = None, linear: bool = False) -> Step:
    """Return what `folder` and its chain's backbone hold. Raises as `load` does.

    Args:
        linear: whether rows that are not linear are replaced by those of `LINEAR_FALLBACK`, of the same statistics
            and with the same temperature.
    """
    base_folder = backbone or folder.resolve().parent / "t00"
    if not (base_folder / RECORD).is_file():
        raise FileNotFoundError(
            f"{base_folder}: step t00, the backbone of the chain, is missing; get it too, beside {folder.name} "
            "(`dvc get REPO artifacts/model/t00`), or say where it is"
        )
    own, base = read_own_record(folder), read_backbone(base_folder)
    if base.description["sha256"] != own["backbone"]:
        raise ValueError(
            f"{folder}: it began from another backbone (sha256 {own['backbone'][:12]}) than the one in "
            f"{base_folder} ({base.description['sha256'][:12]}); say where its own is"
        )
    beside = folders_beside(folder)
    learned, record = read_model(
        folder, beside=lambda step: base_folder if step == "t00" else beside(step), statistics=linear
    )
    if not learned.rows:
        raise ValueError(f"{folder}: step {record['step']} knows no classes yet; choose a later one")
    step = Step(base, learned, record)
    if step.linear or not linear:
        return step
    settled = tempered(linear_rows(learned.head, learned.statistics_now()), temperature_of(record).value)
    return step._replace(learned=replace(learned, settled=settled), fallback=LINEAR_FALLBACK)


def inference_model(step: Step) -> nn.Module:
    """Return the step as `timm_classifier` does or, where its rows are not linear, as it is evaluated.

    The step's backbone is changed in place.
    """
    if step.linear:
        return timm_classifier(step)
    return merged_classifier(step.backbone.model, step.learned).requires_grad_(False)


class _ScoredModel(nn.Module):
    """A step for inference, with a score for unknown images."""

    def __init__(self, model: IncrementalClassifier) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (batch, classes) and scores (batch,)."""
        return self.model.scored(images)


def scored_model(step: Step) -> _ScoredModel:
    """Return the step as it is evaluated, with its score for unknown images. The step stays as it is."""
    model = merged_classifier(copy.deepcopy(step.backbone.model), step.learned)
    return _ScoredModel(model).eval().requires_grad_(False)


def timm_classifier(step: Step) -> nn.Module:
    """Return the step as timm itself builds it: merged weights, and the head's rows in timm's own classifier.

    The step's backbone is changed in place. Where timm has several classifiers whose mean it takes (distilled
    models), each of them gets the rows: the head reads the mean of what they read.

    Raises:
        ValueError: the model's classifier is no linear layer on its features, or the rows are not linear.
    """
    model = step.backbone.model
    merged_classifier(model, step.learned)
    head = head_rows(step.learned)
    model.reset_classifier(len(head["bias"]))  # type: ignore[operator]
    for name in classifier_names(model):
        model.get_submodule(name).load_state_dict(head)
    return model.eval().requires_grad_(False)


def head_rows(learned: ModelState) -> dict[str, Tensor]:
    """Return all rows of the head: `weight` (classes, d), `bias` (classes,)."""
    blocks = learned.rows.values()
    if any(isinstance(block, QuadraticBlock) for block in blocks):
        raise ValueError("the head is not linear; read the step with the rows of a linear one")
    return {
        "weight": torch.cat([block.weight for block in blocks]),
        "bias": torch.cat([block.bias for block in blocks]),
    }


def classifier_names(model: nn.Module) -> list[str]:
    """Return the names of a timm model's classifying layers. A ValueError where they are not linear on its features."""
    found = model.get_classifier()  # type: ignore[operator]
    layers = list(found) if isinstance(found, tuple | list) else [found]
    names = {id(module): name for name, module in model.named_modules()}
    for layer in layers:
        if not isinstance(layer, nn.Linear) or layer.in_features != model.num_features:
            raise ValueError(
                f"{type(model).__name__}: its classifier is a {type(layer).__name__}, expected a linear layer on its "
                f"{model.num_features} features; this backbone cannot carry the head"
            )
    return [names[id(layer)] for layer in layers]


def summed_directions(step: Step) -> dict[str, Factors]:
    """Layer name (`blocks.0.attn.qkv`) → all its directions as one B·A: SD-LoRA is a LoRA of the summed rank.

    `W = W₀ + Σ αₖBₖAₖ = W₀ + [α₁B₁ … αₙBₙ][A₁; …; Aₙ]`, with zeros in B where a layer holds rows of other targets.
    The step's backbone is changed in place.
    """
    model = adapted_classifier(step.backbone.model, step.learned).backbone
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and parametrize.is_parametrized(layer, "weight"):
            weight = layer.parametrizations.weight[0]  # type: ignore[union-attr, index]
            assert isinstance(weight, AdaptedWeight)
            factors = weight.summed(layer.out_features)
            if factors is not None:
                found[name] = factors
    return found


def timm_architecture(description: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the name of an architecture that timm ships, and its arguments, for a backbone's description
    (backbone.json).

    The packaged backbone is timm's own class at other sizes, so timm can build it under one of its own names.
    """
    name, _, _ = description["name"].partition(".")
    arguments = dict(description["model_args"])
    if name == "glyph_vit":
        return "vit_tiny_patch16_224", {**GLYPH_VIT["architecture"], **arguments}
    return name, arguments
