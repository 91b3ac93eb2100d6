"""What changed in the features between two steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from pipelines.audits.steps import BATCH, AuditedStep, Figures, classifier_of, read_base, same_images
from pipelines.data.decoding import decode
from pipelines.data.packed import read_images
from pipelines.runtime.progress import progress

if TYPE_CHECKING:
    from torch import nn

    from sdlora.preprocessing import Preprocessing


def compared_features(
    then: AuditedStep,
    now: AuditedStep,
    pictures: tuple[Mapping[str, str], Mapping[str, str]],
    notes: list[str],
) -> Figures | None:
    """Linear CKA of the features of test images, by task and of all together.

    On the images that both were tested on; where one is the backbone, on those of the other.
    """
    from sdlora.change import linear_cka
    from sdlora.devices import set_deterministic
    from sdlora.preprocessing import Preprocessing

    holder = then if now.name == "t00" else now
    mine = pictures[0] if holder is then else pictures[1]
    chosen = set(mine if "t00" in (then.name, now.name) else same_images(*pictures))
    tables = {}
    for task in holder.tasks:
        if (path := holder.test_images(task)) is None:
            notes.append(
                f"{holder.shown}: the test images of {task} are gone, so its features are not compared"
            )
            continue
        images = read_images(path)
        rows = [row for row, name in enumerate(images["id"].to_pylist()) if name in chosen]
        if rows:
            tables[task] = images.take(rows)
    if not tables:
        notes.append("there is no test image of both, so features are not compared")
        return None
    set_deterministic(True)
    bases = [read_base(step) for step in (then, now)]
    ways = [Preprocessing.of(base.description) for base in bases]
    models = [classifier_of(step, base) for step, base in zip((then, now), bases, strict=True)]
    features: list[list[np.ndarray]] = [[], []]
    done = 0
    with progress("features", total=2 * sum(map(len, tables.values())), unit="images") as bar:
        for task, images in tables.items():
            pixels = decode(images, ways[0])
            for side, (model, way) in enumerate(zip(models, ways, strict=True)):
                if way != ways[0]:
                    pixels = decode(images, way)
                features[side].append(_features_of(model, pixels, way))
                done += len(images)
                bar.update(done, task=task)
    alone = zip(tables, *features, strict=True)
    return {
        "images": done // 2,
        "all": linear_cka(*(np.concatenate(of) for of in features)),
        "tasks": [
            {"task": task, "images": len(left), "alignment": linear_cka(left, right)}
            for task, left, right in alone
        ],
    }


def _features_of(model: nn.Module, pixels: np.ndarray, way: Preprocessing) -> np.ndarray:
    """Features (n, d) of uint8 images (n, channels, height, width) under a merged classifier."""
    import torch

    from sdlora.evaluation import feature_batches

    batches = feature_batches(
        model,
        torch.from_numpy(pixels),
        mean=way.mean,
        std=way.std,
        batch_size=BATCH,
        device=next(model.parameters()).device,
    )
    return torch.cat(list(batches)).numpy()
