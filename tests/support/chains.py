"""Chains of model folders without any training: random directions, magnitudes and rows on a tiny backbone."""

import io
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pipelines.data.packed import ImageRow, write_images
from sdlora.adapters import Factors, inject_adapters
from sdlora.backbones import create_backbone, write_backbone
from sdlora.classifier import ModelState
from sdlora.drift import DriftMap, carried
from sdlora.head import HeadBlock
from sdlora.heads import HEADS, distance_form
from sdlora.ledger import record_hash
from sdlora.model_folder import write_model
from sdlora.preprocessing import Preprocessing
from sdlora.statistics import ClassStatistics, class_statistics
from sdlora.tensors import write_tensors
from sdlora.unknown import DISTANCES, Rejection
from tests.support.families import FAMILIES


def make_chain(
    root: Path,
    name: str,
    *,
    steps: int = 2,
    directions: bool = True,
    head: str = "linear",
    unknown: str | None = None,
) -> Path:
    """Leave artifacts/model/t00 … and the test images of every step under `root`; returns artifacts/model.

    A task has two classes, called as no file could be; ranks differ from task to task and from target to target.

    Args:
        unknown: the score by which an image is of none of the classes. Its threshold is 0.
    """
    models = root / "artifacts/model"
    (models / "t00").mkdir(parents=True)
    weights = None
    if name in FAMILIES:
        weights = root / "random.safetensors"
        write_tensors(weights, FAMILIES[name]().state_dict())
    write_backbone(models / "t00", create_backbone(name, weights=weights))
    found, learned = inject_adapters(create_backbone(name, weights=weights).model), ModelState()
    features = create_backbone(name, weights=weights).description["features"]
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return 0.1 * torch.randn(*shape, generator=generator)

    for index in range(1, steps + 1):
        task, before = f"t{index:02}", f"t{index - 1:02}"
        ranks = {target: 1 + (index + place) % 3 for place, target in enumerate(found)}
        direction = {
            target: Factors(draw(at.rows, ranks[target]), draw(ranks[target], at.columns))
            for target, at in found.items()
        }
        earlier = learned
        learned = ModelState(
            directions={**learned.directions, task: direction} if directions else {},
            magnitudes={**learned.magnitudes, task: 1 + draw(len(found))} if directions else {},
            head={**learned.head, task: HeadBlock(draw(2, features), draw(2))},
        )
        if settle := HEADS[head].settle:
            drawn = class_statistics(10 * draw(40, features), torch.arange(40) % 2, rank=3)
            statistics = {**earlier.statistics, task: drawn}
            drift = {
                **earlier.drift,
                **({task: DriftMap(draw(features, features), draw(features))} if index > 1 else {}),
            }
            now = carried(statistics, drift, tasks=list(statistics))
            settled = settle(learned.head, now, generator=generator)
            learned = replace(learned, settled=settled, statistics=statistics, drift=drift)
            if unknown:
                learned = replace(learned, rejection=rejection_at_zero(unknown, head, now))
        (models / task).mkdir()
        record = {
            "step": task,
            "previous": record_hash(models / before),
            "backbone": _backbone_hash(models),
            "after": before,
            "classes": [
                {"label": label, "name": f"class {label} | ä", "task": task}
                for label in (2 * index - 2, 2 * index - 1)
            ],
            "directions": list(learned.directions),
            "targets": list(found) if directions else [],
            "method": "sdlora" if directions else "frozen",
            "head": head,
            **({"freezing": {"unknown": unknown, "unknown_threshold": 0.0}} if unknown else {}),
        }
        write_model(models / task, learned, record, before=earlier)
        pack(root / f"artifacts/split/{task}/test/{task}.arrow", seed=index)
    return models


def rejection_at_zero(score: str, head: str, statistics: Mapping[str, ClassStatistics]) -> Rejection:
    """What calls an image unknown whose score is above 0."""
    shared = HEADS[head].shared
    if score not in DISTANCES or shared is None:
        return Rejection(score, 0.0)
    form = distance_form(shared, statistics, relative=score == "relative")
    return Rejection(score, 0.0, form.divided(1))


def _backbone_hash(models: Path) -> str:
    from sdlora.ledger import read_record

    return read_record(models / "t00")["backbone"]


TINY_PREPROCESSING = Preprocessing(
    input_size=(3, 8, 8),
    mean=(0.5,) * 3,
    std=(0.5,) * 3,
    interpolation="bicubic",
    crop_pct=1.0,
    crop_mode="center",
)
"""For images of 8×8 pixels."""


def picture(seed: int, *, mode: str = "RGB") -> Image.Image:
    """Noise of some odd size."""
    random = np.random.default_rng(seed)
    width, height = random.integers(12, 60, 2)
    return Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)


def encoded(image: Image.Image) -> bytes:
    """The bytes of a PNG."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def pack(path: Path, *, seed: int, count: int = 5) -> None:
    """Write test images of one task."""
    images = [encoded(picture(100 * seed + index)) for index in range(count)]
    write_images(
        path, [ImageRow(f"{path.stem}/test/a/{i}.png", 0, image, "s", "p") for i, image in enumerate(images)]
    )
