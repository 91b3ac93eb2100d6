"""Export `hub`: the timm folder with a model card from the ledger, ready for a model hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.project.files import read_json, sha256_of, write_whole
from pipelines.serving.exports import timm_folder
from pipelines.serving.exports.subject import Subject, head_note
from sdlora.ledger import classes_of_step

if TYPE_CHECKING:
    from sdlora.loading import Step

_SHOWN = 12
"""Classes of a task that the card names; classes.json has all of them."""

logits = timm_folder.logits


def write(folder: Path, subject: Subject) -> None:
    """Leave what the timm export leaves, and README.md."""
    timm_folder.write(folder, subject)
    text = _card(folder, subject, subject.linear_step(), _evaluations(subject))
    write_whole(folder / "README.md", text.encode())


def _evaluations(subject: Subject) -> dict[str, dict[str, Any]]:
    """Step → its metrics.json, of the steps up to this one whose evaluations lie beside the models."""
    home = subject.model.resolve().parent.parent / "evaluation"
    steps = [link.step for link in reversed(subject.chain())]
    paths = {step: home / step / "metrics.json" for step in steps}
    return {step: read_json(path) for step, path in paths.items() if path.is_file()}


def _card(folder: Path, subject: Subject, step: Step, metrics: dict[str, dict[str, Any]]) -> str:
    """Return the model card: front matter for the hub, then what the model is, how well it does, how to check it."""
    record, description = step.record, step.backbone.description
    own: dict[str, Any] = step.backbone.model.pretrained_cfg  # type: ignore[assignment]
    licence = own.get("license")
    head, *earlier = subject.chain()
    chain = "\n".join(f"| {link.step} | `{link.sha256}` |" for link in (head, *earlier))
    return f"""---
{_front_matter(record, licence, None if step.fallback else metrics.get(record["step"]))}
---

# {len(step.classes)} classes in {len(record["tasks"])} tasks, step {record["step"]}

An image classifier that learned its classes task by task with SD-LoRA (Wu et al., ICLR 2025) on the frozen backbone
`{description["name"]}`. The weights are merged: it is a plain timm model.

```python
import timm, torch
from PIL import Image

model = timm.create_model("local-dir:.", pretrained=True).eval()  # or hf-hub:OWNER/NAME
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
image = transform(Image.open("image.png").convert("{"L" if subject.preprocessing.input_size[0] == 1 else "RGB"}"))
probabilities = model(image[None]).softmax(dim=1)  # in the order of classes.json
```

## Classes and accuracy

{_accuracy_table(record, metrics)}

Share of right answers on each task's test images (rows) after each step (columns), among all classes up to that step.
{head_note(step)}

## How it was made

| | |
| --- | --- |
| method | `{record.get("method")}`, formulation `{record.get("formulation")}`, head `{record.get("head")}` |
| adapted | {_adapted(record)} |
| directions | {", ".join(record.get("directions", [])) or "none"} |
| needs old images | {"yes" if record.get("needs_old_images") else "no"} |
| backbone's weights | sha256 `{record["backbone"]}` |
| licence of the backbone | {licence or "not known to timm"} |

```json
{json.dumps(record.get("parameters", {}), sort_keys=True, indent=2, ensure_ascii=False)}
```

## How to verify it

`model.safetensors` has the sha256 `{sha256_of(folder / "model.safetensors")}`. It was made from the step whose record
(`step.json` of its model folder) has the first of these hashes; every record names the hash of the one before:

| step | sha256 of its record |
| --- | --- |
{chain}

`ledger.json` holds this list and the record itself.
"""


def _front_matter(record: dict[str, Any], licence: str | None, metrics: dict[str, Any] | None) -> str:
    """YAML, with strings as JSON writes them, which is YAML too."""
    lines = ["library_name: timm", "pipeline_tag: image-classification"]
    lines += [
        "tags:",
        *(f"- {tag}" for tag in ("timm", "image-classification", "sd-lora", "class-incremental")),
    ]
    if licence:
        lines += [f"license: {json.dumps(licence)}"]
    lines += ["metrics:", "- accuracy"]
    if metrics:
        accuracy = sum(metrics["correct"]) / sum(metrics["samples"])
        lines += [
            "model-index:",
            f"- name: {json.dumps('sdlora-' + record['step'])}",
            "  results:",
            "  - task: {type: image-classification}",
            f"    dataset: {{name: {json.dumps('test images of ' + ', '.join(record['tasks']))}, type: custom}}",
            f"    metrics: [{{type: accuracy, value: {accuracy:.4f}}}]",
        ]
    return "\n".join(lines)


def _accuracy_table(record: dict[str, Any], metrics: dict[str, dict[str, Any]]) -> str:
    """Return a row for each task: its classes, and its accuracy after each step that was evaluated."""
    lines = ["| task | classes | " + "".join(f"{step} | " for step in metrics)]
    lines += ["| --- | --- | " + "--- | " * len(metrics)]
    for task in record["tasks"]:
        names = [_cell(entry["name"]) for entry in classes_of_step(record, task)]
        more = f", … ({len(names)})" if len(names) > _SHOWN else ""
        cells = []
        for found in metrics.values():
            of = dict(zip(found["tasks"], found["accuracy"], strict=True))
            cells.append(f"{100 * of[task]:.1f} % | " if task in of else " | ")
        lines.append(f"| {task} | {', '.join(names[:_SHOWN])}{more} | " + "".join(cells))
    return "\n".join(line.rstrip() for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _adapted(record: dict[str, Any]) -> str:
    letters = dict.fromkeys(name.rpartition(".")[2] for name in record.get("targets", []))
    return (
        f"{', '.join(letters)} of every block, rank {record.get('rank')} in this step"
        if letters
        else "nothing"
    )


def usage(out: Path, subject: Subject) -> str:
    """Return how the export is loaded, in one line."""
    return timm_folder.usage(out, subject)
