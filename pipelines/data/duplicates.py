"""Pictures of a task before they are packed: read and decoded, all faults named. The same and nearly the same found."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from pipelines.data.decoding import in_parallel, opened_picture, strict_pictures
from pipelines.data.source_files import PARTS, Fault, Found
from pipelines.project.display import MESSAGE, as_line
from pipelines.project.errors import InputError
from pipelines.project.files import write_whole
from pipelines.project.layout import UNREADABLE
from pipelines.runtime.progress import progress

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

NEAR = 15
"""Bits of 256 in which the perceptual hashes of nearly the same picture differ at most.

Of 120 pieces of photographs 96 to 100 % stay within it when saved as JPEG of quality 40, scaled by 1/4 to 2, made
brighter by a fifth or richer in contrast by a third, and none of two different ones does (the nearest pair: 50).
Pieces cut off the border (2 %) and mirror images are not found. docs/reference/data.md has what it says
of digits and glyphs.
"""
_SIDE = 16
_CHUNKS = 16


class Print(NamedTuple):
    """What tells a picture from others, without its bytes."""

    shown: str
    """what it is called when something is said of it"""
    part: str
    label: int | str
    pixels: str
    """`picture_hash`: the same for the same picture"""
    perceptual: str
    """`perceptual_hash`: nearly the same for nearly the same picture; empty for one without structure"""


def read_pictures(
    title: str, images: Sequence[Found], look: Callable[[int, bytes, Image], None], *, max_pixels: int
) -> dict[int, str]:
    """Read and decode every image, in threads, and hand its position, bytes and picture to `look`.

    Returns why an image cannot be read, by position; those are not handed on.
    """
    faults: dict[int, str] = {}

    def read(index: int) -> None:
        with contextlib.ExitStack() as held:
            try:
                data = images[index].read()
                picture = held.enter_context(opened_picture(data))
            except OSError as error:
                faults[index] = error.strerror or type(error).__name__
            except ValueError as error:
                faults[index] = str(error)
            else:
                look(index, data, picture)

    with strict_pictures(max_pixels), progress(title, total=len(images), unit="images") as bar:
        for done in in_parallel(read, range(len(images))):
            bar.update(done)
    return dict(sorted(faults.items()))


def refuse_unreadable(task: str, images: Sequence[Found], faults: dict[int, str]) -> None:
    """Refuse a task of which images cannot be read: up to three in the error, all in a file where there are more."""
    path = UNREADABLE / f"{task}.txt"
    path.unlink(missing_ok=True)
    if faults:
        lines = [as_line(f"{images[index].shown} ({fault})") for index, fault in faults.items()]
        for shown in (3, 2, 1):
            rest = f" and {len(lines) - shown} more, all of them in {path}" if len(lines) > shown else ""
            line = f"cannot read {', '.join(lines[:shown])}{rest}; replace or remove what is broken"
            if len(line) <= MESSAGE:
                break
        if rest:
            write_whole(path, ("\n".join(lines) + "\n").encode())
        raise InputError(as_line(line))


def perceptual_hash(picture: Image) -> str:
    """Return 256 bits of a picture's coarse structure in grey, in hexadecimal. None for a flat picture."""
    import imagehash
    import numpy as np
    from PIL import Image

    small = picture.resize((4 * _SIDE, 4 * _SIDE), Image.Resampling.LANCZOS, reducing_gap=3.0)
    grey = small.convert("L")
    # Rounding alone would decide the bits of a picture of one grey.
    return "" if np.ptp(np.asarray(grey)) < 2 else str(imagehash.phash(grey, hash_size=_SIDE))


def same_pictures(pictures: Iterable[Print], earlier: Iterable[Print], *, tolerated: bool) -> Iterator[Fault]:
    """Yield what is wrong with equal pictures: one in two parts or, unless tolerated, in two tasks or classes."""
    owners: dict[str, dict[tuple[str, int | str], Print]] = {}
    for known in earlier:
        owners.setdefault(known.pixels, {}).setdefault((known.part, known.label), known)
    for picture in pictures:
        # The first of each part and class, so that many copies cost no more than few.
        others = owners.setdefault(picture.pixels, {})
        leak = next((other for other in others.values() if other.part != picture.part), None)
        conflict = next((other for other in others.values() if other.label != picture.label), None)
        if leak is not None:
            first, second = sorted((leak.part, picture.part), key=PARTS.index)
            what = f"the same picture as {leak.shown}, in {first} and {second}"
            yield Fault(picture.shown, what, "remove one")
        elif conflict is not None and not tolerated:
            what = f"the same picture as {conflict.shown}, of another class"
            remedy = "remove one, or set data.duplicates: allow or keep_first in params.yaml"
            yield Fault(picture.shown, what, remedy)
        others.setdefault((picture.part, picture.label), picture)


def _leaking_pictures(
    pictures: Sequence[Print], earlier: Iterable[Print], classes: Sequence[int | str]
) -> list[int]:
    """Positions of the pictures without which none stands in two parts, of this task or an earlier one.

    What was packed for an earlier task stays; within a task the test keeps its picture and training loses it.
    """
    places: dict[str, set[str]] = {}
    for known in earlier:
        places.setdefault(known.pixels, set()).add(known.part)
    found = {index for index, one in enumerate(pictures) if places.get(one.pixels, {one.part}) != {one.part}}
    highest: dict[str, str] = {}
    for index, one in enumerate(pictures):
        if index not in found:
            highest[one.pixels] = max(one.part, highest.get(one.pixels, one.part), key=PARTS.index)
    found |= {
        index for index, one in enumerate(pictures) if index not in found and highest[one.pixels] != one.part
    }
    return sorted(found)


def _repeated_pictures(
    pictures: Sequence[Print], earlier: Iterable[Print], classes: Sequence[int | str]
) -> list[int]:
    """Positions of the pictures that an earlier task, or an earlier one of these classes, has under another class."""
    owner: dict[str, int | str] = {}
    for known in earlier:
        owner.setdefault(known.pixels, known.label)
    place = {label: index for index, label in enumerate(classes)}
    for one in sorted(pictures, key=lambda one: place[one.label]):
        owner.setdefault(one.pixels, one.label)
    return [index for index, one in enumerate(pictures) if owner[one.pixels] != one.label]


LEAVE_OUT = {
    "leave_out": ("in another part", _leaking_pictures),
    "keep_first": ("under another class", _repeated_pictures),
}
"""Values of `data.duplicates` by which pictures are left out: where the others are that stay, and which ones go, of
the pictures of a task, those of earlier tasks, and the task's classes in their order."""


def near_pictures(left: Sequence[Print], right: Sequence[Print]) -> list[tuple[Print, Print]]:
    """Return, for each picture of `left` that nearly is one of `right`, one such. Equal pictures are left out.

    Hashes that differ in fewer bits than there are chunks agree in one chunk at least, so only those that do are
    compared, until one is found: the time grows with the number of pictures that share one of 65,536 values, not with
    the number of all pairs.
    """
    import numpy as np

    assert NEAR < _CHUNKS
    left = [picture for picture in left if picture.perceptual]
    right = [picture for picture in right if picture.perceptual]
    if not left or not right:
        return []
    ours, theirs = _bits(left), _bits(right)
    found = np.full(len(left), -1)
    numbers: dict[str, int] = {}
    pixels = np.array([numbers.setdefault(one.pixels, len(numbers)) for one in (*left, *right)])
    our_pixels, their_pixels = pixels[: len(left)], pixels[len(left) :]
    for chunk in range(_CHUNKS):
        keys = theirs[:, chunk]
        order = np.argsort(keys, kind="stable")
        waiting = np.flatnonzero(found < 0)
        starts = np.searchsorted(keys[order], ours[waiting, chunk], "left")
        ends = np.searchsorted(keys[order], ours[waiting, chunk], "right")
        for one, start, end in zip(waiting, starts, ends, strict=True):
            if start < end:
                candidates = order[start:end]
                bits = np.bitwise_count(theirs[candidates] ^ ours[one]).sum(axis=1)
                near = candidates[(bits <= NEAR) & (their_pixels[candidates] != our_pixels[one])]
                if len(near):
                    found[one] = near[0]
    return [(left[one], right[found[one]]) for one in np.flatnonzero(found >= 0).tolist()]


def _bits(pictures: Sequence[Print]) -> np.ndarray:
    """Hashes as (pictures, chunks) uint16."""
    import numpy as np

    data = bytes.fromhex("".join(picture.perceptual for picture in pictures))
    return np.frombuffer(data, ">u2").reshape(len(pictures), _CHUNKS)


def near_across_parts(pictures: Sequence[Print], earlier: Sequence[Print]) -> list[tuple[Print, Print]]:
    """Pictures of train that nearly are pictures of validation or test, new ones against new and earlier ones.

    The first of a pair is always a new one.
    """
    pairs = []
    for own, other in ((True, False), (False, True)):
        mine = [picture for picture in pictures if (picture.part == "train") == own]
        theirs = [picture for picture in earlier if (picture.part == "train") == other]
        if not own:  # once is enough for a pair of two new pictures
            theirs += [picture for picture in pictures if picture.part == "train"]
        pairs += near_pictures(mine, theirs)
    return pairs


def near_line(pairs: Sequence[tuple[Print, Print]]) -> str:
    """Return one sentence about pairs of nearly the same pictures."""
    first, second = pairs[0]
    count = "1 picture nearly stands" if len(pairs) == 1 else f"{len(pairs)} pictures nearly stand"
    return f"{count} in train and in test or validation, such as {first.shown} and {second.shown}"
