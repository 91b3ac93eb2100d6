"""Findings about what the backbone sees: sizes, brightness, and classes that look alike to it."""

from __future__ import annotations

import hashlib
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from pipelines.data.division import divide
from pipelines.data.packed import PACKED, read_images
from pipelines.data.source_files import Found
from pipelines.data.sources import read_source
from pipelines.planning.doctor.files import Seen, packed_names
from pipelines.planning.doctor.findings import Finding, counted
from pipelines.project.errors import InputError
from pipelines.project.layout import TRAINED
from pipelines.project.settings import Data, Task
from pipelines.runtime.progress import progress

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from sdlora.backbones import Backbone

_SMALL = 2
"""Enlargement of the typical image above which its size is called small."""
_FAR_MEAN, _LOW_SPREAD, _HIGH_SPREAD = 1.0, 0.25, 2.0
"""Mean and standard deviation of normalised pixels beyond which they are called unusual (expected: 0 and 1).

scikit-learn's digits and glyphs100 on the packaged backbone have −0.4 and −0.6, 0.7 both; photographs under timm's two
usual normalisations have means about 0 and deviations from 0.5 to 1.
"""
_ALIKE = 0.7
"""Distance of two classes' means ÷ typical distance of an image from its class's mean, below which they look alike.

On the packaged backbone, 30 images of a class: of the 4,950 pairs of glyphs100, 13 are below; their images are nearer
to the other mean in 12 % of cases (0.7 to 1: 8 %, above: 1 %). No pair of digits is (the nearest: 1.0); one class under
two names always was (0.34 and less).
"""
_ROUNDING = 1e-12
"""Share of two means' squares below which their squared distance is rounding, and they are the same."""
_ENOUGH = 10
"""Images of a class below which its mean says too little for that: of 3, every second glyph would look like another."""
_SAMPLE, _PER_CLASS = 3000, 30
"""Images that go through the backbone: at most so many of a class, and about so many of a task."""


class Features(NamedTuple):
    """What the frozen backbone makes of some training images of a class."""

    task: str
    mean: np.ndarray
    """(features,)"""
    variance: float
    """mean squared distance of an image from the mean of all that there are, estimated without bias; NaN of one"""
    images: int
    pixels: tuple[float, float]
    """mean and mean square of its normalised pixels"""


def backbone_findings(
    tasks: Mapping[str, Task], seen: Mapping[str, Seen], base: Backbone, data: Data
) -> Iterator[Finding]:
    """Sizes, brightness and contrast against what the backbone expects. Classes that look alike to it."""
    _, height, width = base.input_size
    for key, its in seen.items():
        if its.sides and min(height, width) > _SMALL * statistics.median(its.sides):
            side = statistics.median(its.sides)
            what = f"the typical image is {side:g} pixels on its shorter side, the backbone sees {height}×{width}"
            yield Finding(
                "warning", "sizes", key, what, [], "take larger originals, or a backbone for small images"
            )
    last = max((position for position, key in enumerate(tasks) if key in seen), default=-1)
    chosen = {
        key: _sample_of(key, task, seen.get(key), data) for key, task in list(tasks.items())[: last + 1]
    }
    features = _features_of(chosen, base)
    config = base.description["pretrained_cfg"]
    normalised = any(config["mean"])  # with backbone.input_normalisation: none, nothing is expected of pixels
    for key in seen:
        own = [its.pixels for its in features.values() if its.task == key]
        if own and normalised:
            yield from pixel_findings(key, own)
    yield from alike_findings(features, set(seen))


def pixel_findings(key: str, pixels: Sequence[tuple[float, float]]) -> Iterator[Finding]:
    """Warn where normalised pixels are far from where the backbone's normalisation is meant to put them."""
    mean = statistics.fmean(its[0] for its in pixels)
    spread = max(statistics.fmean(its[1] for its in pixels) - mean**2, 0.0) ** 0.5
    if abs(mean) > _FAR_MEAN or not _LOW_SPREAD <= spread <= _HIGH_SPREAD:
        what = f"normalised pixels have mean {mean:.2f} and standard deviation {spread:.2f}, expected 0 and 1"
        remedy = "look at some: too dark, too light, inverted, or of another kind than the backbone's"
        yield Finding("warning", "brightness", key, what, [], remedy)


def alike_findings(features: Mapping[str, Features], checked: set[str]) -> Iterator[Finding]:
    """Classes whose means are much closer to that of a class before them than images are to their own mean."""
    import numpy as np

    features = {name: its for name, its in features.items() if its.images >= _ENOUGH}
    if len(features) < 2:
        return
    names = list(features)
    means = np.stack([its.mean for its in features.values()])
    spread = np.array([its.variance for its in features.values()])
    noise = spread / np.array([its.images for its in features.values()])
    found: dict[str, list[tuple[float, str]]] = defaultdict(list)
    squares = (means**2).sum(axis=1)
    for index in range(1, len(names)):
        name = names[index]
        if features[name].task not in checked:
            continue
        both = squares[:index] + squares[index]
        apart = both - 2 * (means[:index] @ means[index])
        apart[apart < _ROUNDING * both] = 0
        # Means are apart by chance alone, the fewer the images the more; what is left is the distance of the classes.
        apart -= noise[:index] + noise[index]
        least = np.maximum(np.minimum(spread[:index], spread[index]), np.finfo(float).tiny)
        ratio = np.sqrt(np.maximum(apart, 0) / least)
        nearest = int(ratio.argmin())
        if ratio[nearest] < _ALIKE:
            other = names[nearest]
            text = f"{name} ~ {other} of {features[other].task} ({ratio[nearest]:.2f})"
            found[features[name].task].append((float(ratio[nearest]), text))
    for key, texts in found.items():
        what = f"{counted(texts, 'class')} that look like one before (distance ÷ spread below {_ALIKE})"
        remedy = "one class under two names? else expect confusions, or a backbone that tells them apart"
        yield Finding("warning", "similar classes", key, what, [text for _, text in sorted(texts)], remedy)


_Loader = Callable[[], bytes]
_T = TypeVar("_T")


def _sample_of(key: str, task: Task, seen: Seen | None, data: Data) -> dict[str, list[_Loader]]:
    """Some training images of each class, chosen by their names: readers of their bytes."""
    each = max(_ENOUGH, min(_PER_CLASS, _SAMPLE // max(len(task.classes), 1)))
    packed = TRAINED / key / PACKED
    if seen is None and packed.is_file():
        table = read_images(packed)
        names = packed_names(key)
        rows: dict[str, list[int]] = defaultdict(list)
        for row, label in enumerate(table["label"].to_pylist()):
            rows[names[label]].append(row)
        return {
            name: [
                partial(_packed_image, table, row)
                for row in _drawn(its, each, lambda row: table["id"][row].as_py())
            ]
            for name, its in rows.items()
        }
    images: dict[str, list[Found]] = defaultdict(list)
    for found in seen.images if seen else _known_images(task, data):
        if found.part == "train":
            images[found.name].append(found)
    return {
        name: [found.read for found in _drawn(its, each, lambda found: found.file)]
        for name, its in images.items()
    }


def _drawn(some: Sequence[_T], number: int, name: Callable[[_T], str]) -> list[_T]:
    """Return so many, chosen by their names."""
    return sorted(some, key=lambda one: _lot(name(one)))[:number]


def _packed_image(table: pa.Table, row: int) -> bytes:
    """Return the bytes of a packed image."""
    return table["image"][row].as_py()


def _known_images(task: Task, data: Data) -> list[Found]:
    """Return the images of a task that is not examined, as far as its source has them."""
    try:
        return divide(
            read_source(Path(task.source), task.classes, manifest=task.manifest).images, data
        ).images
    except InputError:
        return []


def _lot(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def _features_of(
    chosen: Mapping[str, Mapping[str, Sequence[_Loader]]], base: Backbone
) -> dict[str, Features]:
    """Features of the chosen images of every class, tasks in order."""
    import numpy as np
    import pyarrow as pa
    import torch

    from pipelines.data.decoding import decode
    from sdlora.devices import best_device
    from sdlora.preprocessing import Preprocessing, normalise

    device = best_device()
    model = base.model.to(device)
    preprocessing = Preprocessing.of(base.description)
    total = sum(len(readers) for classes in chosen.values() for readers in classes.values())
    found: dict[str, Features] = {}
    done = 0
    with progress("look at images", total=total, unit="images") as bar, torch.inference_mode():
        for key, classes in chosen.items():
            for name, readers in classes.items():
                images = pa.array([reader() for reader in readers], pa.large_binary())
                table = pa.table({"id": [name] * len(images), "image": images})
                pixels = torch.from_numpy(decode(table, preprocessing)).to(device)
                normal = normalise(pixels, mean=preprocessing.mean, std=preprocessing.std)
                values = model(normal).double().cpu().numpy()
                variance = values.var(axis=0, ddof=1).sum() if len(values) > 1 else np.nan
                facts = (normal.mean().item(), normal.square().mean().item())
                found[name] = Features(key, values.mean(axis=0), float(variance), len(values), facts)
                done += len(values)
                bar.update(done)
    return found
