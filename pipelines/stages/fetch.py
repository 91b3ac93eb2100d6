"""The stage `fetch`: bring a known data set as image files, `train/<class>/` and `test/<class>/`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

from pipelines.data.catalog import LAYOUTS, images
from pipelines.data.glyphs import glyphs
from pipelines.data.png import png
from pipelines.project.errors import InputError
from pipelines.project.files import naming, whole_folder
from pipelines.project.names import class_name_fault
from pipelines.project.params import read_params
from pipelines.project.settings import Digits, EmbeddedGlyphs, Fetch, Section
from pipelines.runtime.stage import StageResult, stage

if TYPE_CHECKING:
    import numpy as np


class _DataSet(NamedTuple):
    """The files of a data set: `{train,test}/<class>/<file>` and bytes."""

    files: Iterable[tuple[PurePosixPath, bytes]]
    left_out: int = 0
    """images that are not among the files because others are the same"""


@stage
def fetch(name: str, *, out: Path) -> StageResult:
    """Write a known data set as image files.

    They are the same, byte for byte, every time. Its archives are kept in .sdlora/downloads/NAME. A download that was
    cut off goes on where it was. Without a network put the archives there yourself.

    Args:
        name: Data set of params.yaml `fetch`, such as digits or cifar100.
        out: Folder to leave; data/raw/NAME if not given.
    """
    if name not in KNOWN:
        raise InputError(
            f"fetch: {name!r} is not a data set that can be fetched; known are {', '.join(KNOWN)}"
        )
    options = read_params("fetch", Fetch).entry(name)
    if options is None:
        raise InputError(f"params.yaml: fetch: there is no entry {name!r}; add one (see its comment)")
    data_set = KNOWN[name](options)
    written: list[PurePosixPath] = []
    with whole_folder(out) as folder:
        for path, data in data_set.files:
            _write_image(folder, path, data)
            written.append(path)
    return StageResult(_summarise(written, data_set.left_out))


def _write_image(folder: Path, path: PurePosixPath, data: bytes) -> None:
    """Write one image at its place in the folder, which nothing may have taken."""
    part, class_name, name = path.parts
    if part not in ("train", "test") or class_name_fault(class_name) or name.startswith("."):
        raise InputError(f"{path}: not the path of an image, {{train,test}}/<class>/<file>")
    (folder / path.parent).mkdir(parents=True, exist_ok=True)
    try:
        with naming(folder / path), (folder / path).open("xb") as file:
            file.write(data)
    except FileExistsError:
        raise InputError(f"{path}: the data set has this file twice; report it with this line") from None


def _summarise(paths: list[PurePosixPath], left_out: int) -> list[dict[str, str | int | float]]:
    """Return one row for train, one for test, and one for what was left out, if anything was."""
    summary: list[dict[str, str | int | float]] = []
    for part in ("train", "test"):
        classes = [path.parts[1] for path in paths if path.parts[0] == part]
        summary.append({"split": part, "classes": len(set(classes)), "images": len(classes)})
    if left_out:
        summary.append({"split": "left out: copies", "classes": 0, "images": left_out})
    return summary


def digits(options: Digits) -> _DataSet:
    """scikit-learn's handwritten digits, 8x8 in 16 grey levels, white ink. Numbered as in the data set.

    Each class is divided by itself: a seeded permutation, at least one image on either side.
    """
    import numpy as np
    from sklearn.datasets import load_digits

    data = load_digits()
    images = np.rint(data.images * (255 / 16)).astype(np.uint8)
    labels = data.target
    kept = distinct_images(images, labels)
    files = []
    for label in np.unique(labels):
        members = kept[labels[kept] == label]
        tests = max(1, min(len(members) - 1, round(len(members) * options.test_fraction)))
        order = np.random.default_rng([options.seed, int(label)]).permutation(len(members))
        test = set(members[order[:tests]].tolist())
        for index in members.tolist():
            part = "test" if index in test else "train"
            files.append((PurePosixPath(part, str(label), f"{index:04d}.png"), png(images[index])))
    return _DataSet(files, left_out=len(images) - len(kept))


def distinct_images(images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Indices that keep each image once: the first of its copies where all have one label, else none."""
    import numpy as np

    copies: dict[bytes, list[int]] = {}
    for index, image in enumerate(images):
        copies.setdefault(image.tobytes(), []).append(index)
    return np.array(
        [indices[0] for indices in copies.values() if len({int(labels[i]) for i in indices}) == 1],
        dtype=np.int64,
    )


def _glyphs100(options: EmbeddedGlyphs) -> _DataSet:
    """Return the embedded benchmark, divided as it was made."""
    return _DataSet(list(glyphs()))


def _published(name: str, options: Section) -> _DataSet:
    """Return a data set of the catalog, downloaded where it is not here yet, its images as its authors made them."""
    chosen = options.model_dump()
    archive = Path(chosen["archive"]) if chosen.get("archive") else None
    return _DataSet(images(name, chosen.get("split", "official"), archive, chosen.get("sha256")))


KNOWN: dict[str, Callable[[Any], _DataSet]] = {
    "digits": digits,
    "glyphs100": _glyphs100,
    **{name: partial(_published, name) for name in LAYOUTS},
}
"""The data sets by name; each has an entry of the same name, its settings, in `params.Fetch`."""
