"""Export `peft`: an adapter that Hugging Face PEFT puts onto the same base, one LoRA of the summed rank."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.project.errors import InputError
from pipelines.project.files import write_json, write_whole
from pipelines.serving.exports.subject import Subject, batches, head_note

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor, nn

    from sdlora.adapters import Factors
    from sdlora.loading import Step

_PREFIX = "base_model.model."
"""Of every name in a file of PEFT's."""


def write(folder: Path, subject: Subject) -> None:
    """Leave adapter_model.safetensors and adapter_config.json, a README, and what every export carries."""
    from sdlora.loading import classifier_names, head_rows, summed_directions, timm_classifier
    from sdlora.tensors import write_tensors

    step = subject.linear_step()
    layers = summed_directions(step)
    if not layers:
        raise InputError(
            f"{subject.model}: this step has no direction that an adapter could hold "
            f"(method {step.record.get('method')}); export it as timm, onnx or hub"
        )
    heads = classifier_names(timm_classifier(subject.linear_step()))
    tensors = {}
    for name, factors in layers.items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = factors.down
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = factors.up
    for name in heads:
        for part, value in head_rows(step.learned).items():
            tensors[f"{_PREFIX}{name}.{part}"] = value.clone()
    write_tensors(folder / "adapter_model.safetensors", tensors)
    write_json(folder / "adapter_config.json", _config(step, layers, heads))
    write_whole(folder / "README.md", _readme(step, layers).encode())
    subject.carry(folder, step)


def _config(step: Step, layers: dict[str, Factors], heads: list[str]) -> dict[str, Any]:
    """PEFT's description of a LoRA. The magnitudes are within B, so every scale alpha / r is 1."""
    ranks = {name: factors.down.shape[0] for name, factors in layers.items()}
    most = max(ranks.values())
    differing = {name: rank for name, rank in ranks.items() if rank != most}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": step.backbone.description["name"],
        "inference_mode": True,
        "r": most,
        "lora_alpha": most,
        "rank_pattern": differing,
        "alpha_pattern": differing,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": list(ranks),
        "modules_to_save": heads,
    }


def _base_model(subject: Subject) -> nn.Module:
    """Return the base as timm builds it, with the chain's own weights and a new classifier."""
    import timm

    from sdlora.backbones import WEIGHTS
    from sdlora.loading import timm_architecture
    from sdlora.tensors import read_tensors

    step = subject.step()
    architecture, arguments = timm_architecture(step.backbone.description)
    base = timm.create_model(architecture, num_classes=len(step.classes), **arguments)
    base.load_state_dict(read_tensors(subject.backbone / WEIGHTS), strict=False)
    return base


def logits(folder: Path, subject: Subject, pictures: Sequence[Image]) -> Tensor:
    """Logits (n, classes) of the adapter as PEFT loads it, merged into the base."""
    import torch
    from peft import PeftModel

    adapted = PeftModel.from_pretrained(_base_model(subject), str(folder)).eval()
    # Some attention of timm's reads the weight of a layer instead of calling it, which goes past an adapter.
    model = adapted.merge_and_unload()
    transform = subject.preprocessing
    with torch.inference_mode():
        return torch.cat(
            [model(torch.stack([transform(picture) for picture in some])) for some in batches(pictures)]
        )


def usage(out: Path, subject: Subject) -> str:
    """Return how the export is loaded, in one line."""
    return f'peft.PeftModel.from_pretrained(base, "{out}").merge_and_unload(); {out}/README.md makes the base'


def _readme(step: Step, layers: dict[str, Factors]) -> str:
    """Return how the adapter is loaded, and onto what."""
    from sdlora.loading import timm_architecture

    name = step.backbone.description["name"]
    architecture, arguments = timm_architecture(step.backbone.description)
    given = "".join(f", {key}={value!r}" for key, value in sorted(arguments.items()))
    ranks = sorted({factors.down.shape[0] for factors in layers.values()})
    tasks = ", ".join(step.record["directions"])
    own = (
        ""
        if arguments
        else f"""
Where the chain began with timm's own weights of `{name}`, `pretrained=True` in the first line replaces the second.
"""
    )
    return f"""# SD-LoRA, step {step.record["step"]}, as one LoRA

The directions of {tasks} at {len(layers)} layers, summed up exactly: rank {", ".join(map(str, ranks))},
magnitudes within B, scale alpha / r = 1. `classes.json` names the {len(step.classes)} logits, `preprocessing.json` says
what the images look like, `ledger.json` which step this is.

```python
import timm
from peft import PeftModel
from safetensors.torch import load_file

base = timm.create_model("{architecture}", num_classes={len(step.classes)}{given})
base.load_state_dict(load_file("backbone.safetensors"), strict=False)  # only the classifier is missing
model = PeftModel.from_pretrained(base, ".").merge_and_unload().eval()
```

`backbone.safetensors` is the file of step t00 (`artifacts/model/t00`), sha256
`{step.backbone.description["sha256"]}`.
{own}{head_note(step)}
Without `merge_and_unload` the adapter works only where the backbone calls its projections; BEiT and some EVA models
read their weights.
"""
