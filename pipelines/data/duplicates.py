"""Pictures of a task before they are packed: read and decoded, all faults named. The same and nearly the same found.

A task may have a million of them. So they are compared in columns, by sorting, and never all with all.
"""

from __future__ import annotations

import contextlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from pipelines.data.decoding import in_parallel, opened_picture, strict_pictures
from pipelines.data.packed import SampleRow, read_images
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
_BANDS, _BITS = 8, 32
"""Parts that a perceptual hash is cut into, and the bits of each."""
_PAIRS = 2**20
"""Pairs of hashes that are compared at a time."""

_T = TypeVar("_T")


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


@dataclass(frozen=True)
class Prints:
    """The prints of many pictures, in columns (n,)."""

    shown: Callable[[int], str]
    """what the picture at a place is called"""
    parts: np.ndarray
    """places in `PARTS`"""
    labels: np.ndarray
    """whole numbers, or texts as objects"""
    pixels: np.ndarray
    """bytes"""
    perceptual: np.ndarray
    """bytes"""

    @classmethod
    def joined(cls, some: Sequence[Prints]) -> Prints:
        """Return all of them in a row."""
        import numpy as np

        starts = [0, *accumulate(len(prints) for prints in some)]

        def shown(place: int) -> str:
            owner = bisect_right(starts, place) - 1
            return some[owner].shown(place - starts[owner])

        if not some:
            return cls(shown, *(np.empty(0, kind) for kind in (np.uint8, np.int32, "S64", "S64")))
        columns = zip(*((its.parts, its.labels, its.pixels, its.perceptual) for its in some), strict=True)
        return cls(shown, *map(np.concatenate, columns))

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, place: int) -> Print:
        """Return the print at a place."""
        return Print(
            self.shown(place),
            PARTS[self.parts[place]],
            self.labels.item(place),
            self.pixels[place].decode(),
            self.perceptual[place].decode(),
        )

    def at(self, places: np.ndarray) -> list[Print]:
        """Return the prints at these places as objects. They should be few."""
        return [self[place] for place in places.tolist()]

    def take(self, places: np.ndarray) -> Prints:
        """Return the prints at these places, in columns."""
        columns = (self.parts, self.labels, self.pixels, self.perceptual)
        return Prints(lambda place: self.shown(int(places[place])), *(column[places] for column in columns))


def read_pictures(
    title: str,
    images: Sequence[Found],
    look: Callable[[int, bytes, Image], _T],
    *,
    max_pixels: int,
    keep: Callable[[int, _T], None] = lambda index, seen: None,
) -> dict[int, str]:
    """Read and decode every image, in threads, and hand its position, bytes and picture to `look`.

    What that returns is handed to `keep` with the position, in the order of the images, one at a time.

    Returns why an image cannot be read, by position; those are not handed on.
    """
    faults: dict[int, str] = {}

    def read(index: int) -> list[_T]:
        with contextlib.ExitStack() as held:
            try:
                data = images[index].read()
                picture = held.enter_context(opened_picture(data))
            except OSError as error:
                faults[index] = error.strerror or type(error).__name__
            except ValueError as error:
                faults[index] = str(error)
            else:
                return [look(index, data, picture)]
        return []

    with strict_pictures(max_pixels), progress(title, total=len(images), unit="images") as bar:
        for index, seen in enumerate(in_parallel(read, range(len(images)))):
            for one in seen:
                keep(index, one)
            bar.update(index + 1)
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
    if np.ptp(np.asarray(grey)) < 2:  # rounding alone would decide the bits of a picture of one grey
        return ""
    return np.packbits(imagehash.phash(grey, hash_size=_SIDE).hash).tobytes().hex()


def sample_prints(path: Path, owner: str, names: Mapping[int, str] | None = None) -> Prints:
    """Return what the samples of a task that was packed are compared by.

    Args:
        path: The file of samples.
        owner: What the task is called in messages.
        names: Label → what stands in its place.
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    table = read_images(path, *SampleRow._fields)
    labels = table["label"].to_numpy()
    if names is not None:
        labels = np.array([names[label] for label in labels.tolist()], object)
    hashes = (np.array(table[name].cast(pa.binary()).to_pylist(), "S64") for name in ("pixels", "perceptual"))
    parts = pc.index_in(table["split"], pa.array(PARTS)).to_numpy().astype(np.uint8)
    return Prints(lambda place: f"{table['id'][place].as_py()} of {owner}", parts, labels, *hashes)


def repeated(pictures: Prints, earlier: Prints) -> tuple[np.ndarray, np.ndarray]:
    """Return the places, among the pictures and among earlier ones, of those that stand more than once in both."""
    import numpy as np

    both = np.concatenate([pictures.pixels, earlier.pixels])
    _, value, count = np.unique(both, return_inverse=True, return_counts=True)
    places = np.flatnonzero(count[value] > 1)
    own = int(np.searchsorted(places, len(pictures)))
    return places[:own], places[own:] - len(pictures)


def same_pictures(pictures: Prints, earlier: Prints, *, tolerated: bool) -> Iterator[Fault]:
    """Yield what is wrong with equal pictures: one in two parts or, unless tolerated, in two tasks or classes."""
    mine, theirs = repeated(pictures, earlier)
    owners: dict[str, dict[tuple[str, int | str], Print]] = {}
    for known in earlier.at(theirs):
        owners.setdefault(known.pixels, {}).setdefault((known.part, known.label), known)
    before = {pixels: next(iter(others.values())) for pixels, others in owners.items()}
    for picture in pictures.at(mine):
        # The first of each part and class, so that many copies cost no more than few.
        others = owners.setdefault(picture.pixels, {})
        leak = next((other for other in others.values() if other.part != picture.part), None)
        conflict = next((other for other in others.values() if other.label != picture.label), None)
        conflict = conflict or before.get(picture.pixels)
        if leak is not None:
            first, second = sorted((leak.part, picture.part), key=PARTS.index)
            what = f"the same picture as {leak.shown}, in {first} and {second}"
            yield Fault(picture.shown, what, "remove one")
        elif conflict is not None and not tolerated:
            other = ", of another class" if conflict.label != picture.label else ""
            what = f"the same picture as {conflict.shown}{other}"
            remedy = "remove one, or set data.duplicates: allow or keep_first in params.yaml"
            yield Fault(picture.shown, what, remedy)
        others.setdefault((picture.part, picture.label), picture)


def _leaking_pictures(pictures: Prints, earlier: Prints, classes: Sequence[int | str]) -> list[int]:
    """Positions of the pictures without which none stands in two parts, of this task or an earlier one.

    What was packed for an earlier task stays; within a task the test keeps its picture and training loses it.
    """
    mine, theirs = repeated(pictures, earlier)
    places: dict[str, set[str]] = {}
    for known in earlier.at(theirs):
        places.setdefault(known.pixels, set()).add(known.part)
    ours = {index: pictures[index] for index in mine.tolist()}
    found = {index for index, one in ours.items() if places.get(one.pixels, {one.part}) != {one.part}}
    highest: dict[str, str] = {}
    for index, one in ours.items():
        if index not in found:
            highest[one.pixels] = max(one.part, highest.get(one.pixels, one.part), key=PARTS.index)
    found |= {index for index, one in ours.items() if index not in found and highest[one.pixels] != one.part}
    return sorted(found)


def _repeated_pictures(pictures: Prints, earlier: Prints, classes: Sequence[int | str]) -> list[int]:
    """Positions of the pictures that an earlier task, or an earlier one of these classes, has under another class."""
    mine, theirs = repeated(pictures, earlier)
    owner: dict[str, int | str] = {}
    for known in earlier.at(theirs):
        owner.setdefault(known.pixels, known.label)
    place = {label: index for index, label in enumerate(classes)}
    ours = {index: pictures[index] for index in mine.tolist()}
    for one in sorted(ours.values(), key=lambda one: place[one.label]):
        owner.setdefault(one.pixels, one.label)
    return [index for index, one in ours.items() if owner[one.pixels] != one.label]


LEAVE_OUT = {
    "leave_out": ("in another part", _leaking_pictures),
    "keep_first": ("under another class", _repeated_pictures),
}
"""Values of `data.duplicates` by which pictures are left out: where the others are that stay, and which ones go, of
the pictures of a task, those of earlier tasks, and the task's classes in their order."""


def near_pictures(left: Prints, right: Prints) -> list[tuple[Print, Print]]:
    """Return, for each picture of `left` that nearly is one of `right`, the first such. Equal pictures are left out.

    They are those that comparing all pairs would find. Two hashes that differ in at most `NEAR` bits agree in one of
    their bands but for one bit at most. So each band is looked up in the sorted bands of the others, as it is and with
    each of its bits turned, and only what stands there is compared. Copies are looked up once.
    """
    import numpy as np

    assert NEAR < 2 * _BANDS
    asked, of_copies = _distinct(left)
    known = np.sort(_distinct(right)[0])
    ours, theirs = left.take(asked), right.take(known)
    found = _first_near(ours, theirs)
    hashed = np.flatnonzero(of_copies >= 0)
    partner = found[of_copies[hashed]]
    near = partner < len(known)
    return list(zip(left.at(hashed[near]), right.at(known[partner[near]]), strict=True))


def _distinct(prints: Prints) -> tuple[np.ndarray, np.ndarray]:
    """Return the places of pictures with structure, one of each, and (n,) which of them each picture is, or −1."""
    import numpy as np

    place = np.full(len(prints), -1)
    hashed = np.flatnonzero(prints.perceptual != b"")
    both = np.char.add(prints.pixels[hashed], prints.perceptual[hashed])
    _, first, place[hashed] = np.unique(both, return_index=True, return_inverse=True)
    return hashed[first], place


def _first_near(ours: Prints, theirs: Prints) -> np.ndarray:
    """Return (n,) the place of the first of `theirs` that each of `ours` nearly is, or their number."""
    import numpy as np

    found = np.full(len(ours), len(theirs))
    if not len(ours) or not len(theirs):
        return found
    bits, others = _bands(ours), _bands(theirs)

    def near(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        close = np.bitwise_count(bits[one] ^ others[other]).sum(axis=1, dtype=np.uint16) <= NEAR
        close[close] = ours.pixels[one[close]] != theirs.pixels[other[close]]
        return close

    for band in range(_BANDS):
        order = np.argsort(others[:, band], kind="stable")
        keys = others[order, band]
        for turned in (0, *(1 << bit for bit in range(_BITS))):
            asked = bits[:, band] ^ np.uint32(turned)
            start = np.searchsorted(keys, asked)
            asking = np.flatnonzero(keys[np.minimum(start, len(keys) - 1)] == asked)
            end = np.searchsorted(keys, asked[asking], "right")
            _look_through(order, asking, start[asking], end, near, found)
    return found


def _look_through(
    order: np.ndarray,
    asking: np.ndarray,
    start: np.ndarray,
    end: np.ndarray,
    near: Callable[[np.ndarray, np.ndarray], np.ndarray],
    found: np.ndarray,
) -> None:
    """Lower `found` of each one that asks to the first near one of its stretch of `order`, which rises there."""
    import numpy as np

    width = 1
    while len(asking):
        stop = np.minimum(start + width, end)
        count = stop - start
        pair = np.repeat(np.arange(len(asking)), count)
        other = order[np.arange(len(pair)) + np.repeat(stop - np.cumsum(count), count)]
        hit = near(asking[pair], other)
        np.minimum.at(found, asking[pair[hit]], other[hit])
        # What comes later in a stretch than what was found is of no interest.
        more = np.flatnonzero(stop < end)
        more = more[order[stop[more]] < found[asking[more]]]
        asking, start, end = asking[more], stop[more], end[more]
        width = max(1, min(2 * width, _PAIRS // max(len(asking), 1)))


def _bands(prints: Prints) -> np.ndarray:
    """Return the perceptual hashes as (n, bands) uint32."""
    import numpy as np

    data = bytes.fromhex(b"".join(prints.perceptual.tolist()).decode())
    return np.frombuffer(data, ">u4").astype(np.uint32).reshape(len(prints), _BANDS)


def near_across_parts(pictures: Prints, earlier: Prints) -> list[tuple[Print, Print]]:
    """Pictures of train that nearly are pictures of validation or test, new ones against new and earlier ones.

    The first of a pair is always a new one.
    """
    import numpy as np

    train = PARTS.index("train")
    new, old = (
        [prints.take(np.flatnonzero((prints.parts == train) == own)) for own in (True, False)]
        for prints in (pictures, earlier)
    )
    # Once is enough for a pair of two new pictures.
    return near_pictures(new[0], old[1]) + near_pictures(new[1], Prints.joined([old[0], new[0]]))


def near_line(pairs: Sequence[tuple[Print, Print]]) -> str:
    """Return one sentence about pairs of nearly the same pictures."""
    first, second = pairs[0]
    count = "1 picture nearly stands" if len(pairs) == 1 else f"{len(pairs)} pictures nearly stand"
    return f"{count} in train and in test or validation, such as {first.shown} and {second.shown}"
