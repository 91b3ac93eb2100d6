"""Export `timm`: a folder that `timm.create_model("local-dir:FOLDER", pretrained=True)` loads, without this package."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.project.files import write_json
from pipelines.serving.exports.subject import Subject, batches

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from sdlora.loading import Step

_KEPT = ("classifier", "first_conv", "fixed_input_size", "license", "origin_url", "pool_size")
"""What timm's own configuration says of a model and stays true of it; the rest is of the weights it came with."""


def write(folder: Path, subject: Subject) -> None:
    """Leave the merged weights, timm's config.json, and what every export carries."""
    from sdlora.loading import timm_classifier
    from sdlora.tensors import write_tensors

    step = subject.linear_step()
    model = timm_classifier(step)
    write_tensors(folder / "model.safetensors", model.state_dict())
    write_json(folder / "config.json", _config(step))
    subject.carry(folder, step)


def _config(step: Step) -> dict[str, Any]:
    """timm's description of a model in a folder (`timm.models.save_for_hf` writes the same keys)."""
    from sdlora.loading import timm_architecture

    description, classes = step.backbone.description, step.classes
    architecture, arguments = timm_architecture(description)
    own: dict[str, Any] = step.backbone.model.pretrained_cfg  # type: ignore[assignment]
    return {
        "architecture": architecture,
        "num_classes": len(classes),
        "num_features": description["features"],
        "label_names": classes,
        "model_args": arguments,
        "pretrained_cfg": {
            **{key: own[key] for key in _KEPT if own.get(key) is not None},
            **description["pretrained_cfg"],
            "num_classes": len(classes),
            "custom_load": False,
            "tag": f"sdlora_{step.record['step']}",
        },
    }


def logits(folder: Path, subject: Subject, pictures: Sequence[Image]) -> Tensor:
    """Logits (n, classes) of the folder as timm loads it, through timm's own transform."""
    import timm
    import torch

    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    with torch.inference_mode():
        return torch.cat(
            [model(torch.stack([transform(picture) for picture in some])) for some in batches(pictures)]
        )


def usage(out: Path, subject: Subject) -> str:
    """Return how the export is loaded, in one line."""
    return f'timm.create_model("local-dir:{out}", pretrained=True)'
