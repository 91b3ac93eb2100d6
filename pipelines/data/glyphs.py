"""The packaged characters, as they are (`glyphs100`) and in front of clutter (`glyphs100-scene`).

The scenes are the same bytes on every machine, because nothing in them is rounded by a processor or a library. Draws
are bytes of SHAKE-256, whose key is the number of the image, so no version of a random generator matters. Geometry and
blending are whole numbers with 8, 16 or 32 binary places, so neither the order of a sum nor a fused multiplication
does: sums of whole numbers are exact. PNG keeps pixels without loss.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterator
from functools import cache
from importlib import resources
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from pipelines.data.png import png
from pipelines.project.errors import InputError
from pipelines.project.names import class_name_fault
from pipelines.runtime.progress import progress

if TYPE_CHECKING:
    import numpy as np

_SIDE, _CELLS = 32, 6
"""Pixels of an image and cells of its background, in one direction."""
_ONE = 1 << 16
"""1 in whole numbers of 16 binary places, in which all that follows is counted where nothing else is said."""
_TURN, _SHIFT = round(0.35 * _ONE), round(0.175 * _ONE)
"""Largest angle in radians, and largest shift as a share of half the width."""
_SCALES = round(0.85 * _ONE), round(1.35 * _ONE)
"""Widths of the piece that is shown, as shares of the image's: above 1 the character is smaller."""
_SHARES = round(0.35 * _ONE), round(0.65 * _ONE)
"""Share of the character in a pixel; the background has the rest."""
_NOISE = 51, 640
"""0.08 · 255 grey levels over 256, which is the deviation of a sum of twelve bytes (to 0.001 %)."""
_HALVES = 12
"""Bytes in such a sum, whose mean is 1,530. Its distribution is nearly Gaussian (Irwin–Hall)."""


def glyphs() -> Iterator[tuple[PurePosixPath, bytes]]:
    """Yield the packaged characters, `{train,test}/<class>/<file>` and PNG.

    They are divided as they were made: test fonts are not among the train fonts.

    Raises:
        InputError: the packaged file is missing or is another one.
    """
    import pyarrow as pa

    packed = resources.files("pipelines.data") / "embedded" / "glyphs100" / "glyphs100.arrow"
    try:
        table = pa.ipc.open_file(pa.py_buffer(packed.read_bytes())).read_all()
    except FileNotFoundError:
        raise InputError(f"{packed}: the file is missing from the package; install it again") from None
    except pa.ArrowInvalid:
        raise InputError(f"{packed}: not an Arrow file; install the package again") from None
    columns = (table[name].to_pylist() for name in ("split", "label", "font", "image"))
    for index, (part, label, font, image) in enumerate(zip(*columns, strict=True)):
        class_name = str(label)
        if part not in ("train", "test") or class_name_fault(class_name):
            raise InputError(f"{packed}: row {index} has no class folder; install the package again")
        slug = re.sub(r"[^a-z0-9]+", "-", font.lower()).strip("-")
        yield PurePosixPath(part, class_name, f"{index:04d}-{slug}.png"), image


def scenes() -> Iterator[tuple[PurePosixPath, bytes]]:
    """Yield every packaged character in a scene of its own, under the same path.

    A test scene is made of a test character, so the division stays what it was.

    Raises:
        InputError: as `glyphs`.
    """
    import numpy as np
    from PIL import Image

    found = list(glyphs())
    with progress("draw scenes", total=len(found), unit="images") as bar:
        for index, (path, data) in enumerate(found):
            yield path, png(scene(np.asarray(Image.open(io.BytesIO(data))), index))
            bar.update(index + 1)


def scene(character: np.ndarray, index: int) -> np.ndarray:
    """Return a character, (32, 32) uint8 white on black, turned, scaled, shifted, and in front of clutter.

    y = a·x + (1 − a)·b + noise, clipped: x the moved character of either polarity, a its share, b the background. All
    are drawn from the image's own number.
    """
    import numpy as np

    pixels = _SIDE * _SIDE
    stream = hashlib.shake_256(f"glyphs100-scene {index}".encode()).digest(12 + _CELLS**2 + _HALVES * pixels)
    draws = np.frombuffer(stream, "<u2", count=6).tolist()
    angle, scale, right, down, share = (
        low + (high - low) * draw // 0xFFFF
        for (low, high), draw in zip(
            ((-_TURN, _TURN), _SCALES, (-_SHIFT, _SHIFT), (-_SHIFT, _SHIFT), _SHARES), draws[:5], strict=True
        )
    )
    moved = _moved(character, angle=angle, scale=scale, right=right, down=down)
    if draws[5] % 2:
        moved = (255 << 16) - moved
    cells = np.frombuffer(stream, np.uint8, count=_CELLS**2, offset=12).reshape(_CELLS, _CELLS)
    drawn = np.frombuffer(stream, np.uint8, offset=12 + _CELLS**2).reshape(_HALVES, _SIDE, _SIDE)
    level, of = _NOISE
    noise = ((drawn.sum(axis=0, dtype=np.int64) - 255 * _HALVES // 2) * level << 32) // of
    mixed = share * moved + (_ONE - share) * _enlarged(cells) + noise  # 32 binary places
    return ((mixed + (1 << 31)) >> 32).clip(0, 255).astype(np.uint8)


def _moved(character: np.ndarray, *, angle: int, scale: int, right: int, down: int) -> np.ndarray:
    """Return the character (32, 32) int64 seen through a turned, scaled, shifted window: bilinear, black outside."""
    import numpy as np

    cosine, sine = _cosine_and_sine(angle)
    axis = (2 * np.arange(_SIDE, dtype=np.int64) + 1 - _SIDE) * (_ONE // _SIDE)  # centres, −1 … 1
    across, along = axis[None, :], axis[:, None]
    columns = (scale * ((cosine * across - sine * along) >> 16) >> 16) + right
    rows = (scale * ((sine * across + cosine * along) >> 16) >> 16) + down
    # In pixels of 8 binary places, so that two weights have 16. A black rim stands for all that is outside.
    columns, rows = (((where + _ONE) * (_SIDE // 2) - _ONE // 2) >> 8 for where in (columns, rows))
    rim = np.pad(character.astype(np.int64), 1)
    left, upper = (((where >> 8) + 1) for where in (columns, rows))
    x, y = columns & 255, rows & 255
    result = np.zeros((_SIDE, _SIDE), dtype=np.int64)
    for dy, of_row in ((0, 256 - y), (1, y)):
        for dx, of_column in ((0, 256 - x), (1, x)):
            chosen = rim[(upper + dy).clip(0, _SIDE + 1), (left + dx).clip(0, _SIDE + 1)]
            result += of_row * of_column * chosen
    return result


def _cosine_and_sine(angle: int) -> tuple[int, int]:
    """Return both of an angle of at most 1, from twelve terms of their series."""
    sums, term = [0, 0, 0, 0], 1 << 32
    for k in range(12):
        sums[k % 4] += term
        term = term * angle // (_ONE * (k + 1))
    return (sums[0] - sums[2]) >> 16, (sums[1] - sums[3]) >> 16


def _enlarged(cells: np.ndarray) -> np.ndarray:
    """Return the cells (6, 6) uint8 as (32, 32) int64, bicubic, the edge repeated."""
    import numpy as np

    weights = _bicubic()
    return (weights @ cells.astype(np.int64) @ weights.T) >> 18


@cache
def _bicubic() -> np.ndarray:
    """Return what each cell counts in each pixel of a line, (32, 6) int64 of 17 binary places.

    Keys, 1981, with −3/4 for the free parameter, as torch has it. The weights are exact: a pixel's centre is at
    (pixel + ½)·6/32 − ½ = (6·pixel − 13)/32 cells.
    """
    import numpy as np

    weights = np.zeros((_SIDE, _CELLS), dtype=np.int64)
    for pixel in range(_SIDE):
        cell, part = divmod(6 * pixel - 13, 32)
        for nearest in range(cell - 1, cell + 3):
            m = abs(32 * (cell - nearest) + part)
            near = 5 * m**3 - 9 * 32 * m**2 + 4 * 32**3
            far = -3 * m**3 + 15 * 32 * m**2 - 24 * 32**2 * m + 12 * 32**3
            weights[pixel, min(max(nearest, 0), _CELLS - 1)] += near if m <= 32 else far
    return weights
