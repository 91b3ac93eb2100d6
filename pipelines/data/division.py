"""The division of a class's images into train, validation and test."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence

from pipelines.data.source_files import PARTS, Fault, Found, Source
from pipelines.project.files import natural_key
from pipelines.project.settings import Data


def divide(images: Sequence[Found], data: Data) -> Source:
    """Give every image its part, and check that every class has at least one in train and one in test.

    Where the source does not say, `data.test_fraction` of a class become test images, at least one and never all;
    where `data.validation` is set and the source has none for a class, that share of its training images, at least
    one of several, become validation images. Which ones depends on `data.seed`, on the name of the class and on the
    names of its files alone: a class more, or another order on the disk, changes nothing for the others.
    """
    classes: dict[str, list[Found]] = defaultdict(list)
    for found in images:
        classes[found.name].append(found)
    divided, faults = [], []
    for name, members in classes.items():
        if all(found.part is None for found in members):
            if len(members) == 1:
                what = f"class {name!r} has one image, and needs one to learn and one to test"
                faults.append(Fault(members[0].shown, what, "add images, or leave the class out"))
                continue
            members = _drawn(members, "test", data.test_fraction, data.seed)
        given = [found for found in members if found.part == "validation"]
        if given and data.validation is None:
            what = f"class {name!r} has {len(given)} validation images, but data.validation is null"
            faults.append(Fault(given[0].shown, what, "set it to a share in params.yaml, or remove them"))
        train = [found for found in members if found.part == "train"]
        if data.validation is not None and not given and len(train) > 1:
            others = [found for found in members if found.part != "train"]
            members = [*_drawn(train, "validation", data.validation, data.seed), *others]
        for part in ("train", "test"):
            if not any(found.part == part for found in members):
                what = f"class {name!r} has no {part} image"
                faults.append(Fault(members[0].shown, what, f"add one to {part}, or leave the class out"))
        divided += members
    position = {name: index for index, name in enumerate(classes)}
    divided.sort(
        key=lambda found: (PARTS.index(found.part or ""), position[found.name], natural_key(found.file))
    )
    return Source(divided, faults)


def _drawn(members: Sequence[Found], part: str, share: float, seed: int) -> list[Found]:
    """Return the images of a class, a share of them in `part`, at least one and never all, and the others in train."""
    order = sorted(members, key=lambda found: _lot(part, seed, found))
    number = max(1, min(len(members) - 1, round(len(members) * share)))
    chosen = {found.file for found in order[:number]}
    return [found._replace(part=part if found.file in chosen else "train") for found in members]


def _lot(purpose: str, seed: int, found: Found) -> bytes:
    return hashlib.sha256("\0".join((purpose, str(seed), found.name, found.file)).encode()).digest()
