"""Decoding: from encoded pictures to one array of pixels."""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import mmap
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from tempfile import TemporaryFile
from typing import TYPE_CHECKING

from pipelines.project.errors import InputError
from pipelines.project.files import naming
from pipelines.project.layout import SCRATCH
from pipelines.runtime.memory import ANY_SIZE

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from PIL.Image import Image

    from sdlora.preprocessing import Preprocessing


def decode(table: pa.Table, preprocessing: Preprocessing, *, room: int = ANY_SIZE) -> np.ndarray:
    """Return all images of a table as the backbone takes them, uint8 (images, channels, height, width).

    What takes more than `room` bytes is a nameless file of `SCRATCH` that is mapped into memory, gone with the array.
    """
    out = _array((len(table), *preprocessing.input_size), room)

    def fill(index: int) -> None:
        out[index] = decode_one(table, index, preprocessing)

    with strict_pictures(ANY_SIZE):  # `split` has refused what is above data.max_pixels
        for _ in in_parallel(fill, range(len(table))):
            pass
    return out


def _array(shape: tuple[int, ...], room: int) -> np.ndarray:
    import numpy as np

    size = math.prod(shape)
    if size <= room:
        return np.empty(shape, np.uint8)
    with naming(SCRATCH):
        SCRATCH.mkdir(exist_ok=True)
        with TemporaryFile(dir=SCRATCH) as file:
            os.truncate(file.fileno(), size)
            if hasattr(
                os, "posix_fallocate"
            ):  # not on macOS: a full disk is an error now, and not a signal later
                os.posix_fallocate(file.fileno(), 0, size)
            return np.ndarray(shape, np.uint8, mmap.mmap(file.fileno(), size))


def decode_one(table: pa.Table, index: int, preprocessing: Preprocessing) -> np.ndarray:
    """Return one image of a table as the backbone takes it, uint8 (channels, height, width)."""
    try:
        picture = open_picture(table["image"][index].as_buffer())
    except ValueError as error:
        raise InputError(f"{table['id'][index]}: {error}; replace the image") from None
    return preprocessing.pixels(picture)


_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""What is opened, of all that Pillow knows: for some of the others it starts programs of the machine (Ghostscript)."""
_LONGEST = 100
"""How many times its shorter side a picture may be long: scaled by the shorter one, a strip would fill the memory."""


def open_picture(data: bytes | memoryview | pa.Buffer) -> Image:
    """Decode a picture fully, upright, in sRGB, as 8-bit L, RGB or RGBA. A ValueError says why it cannot be.

    Of several frames or pages the first one is the picture. A colour profile that cannot be used is left out, as
    browsers do.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            image.load()
            upright = ImageOps.exif_transpose(image)
            profile = image.info.get("icc_profile")
    except Image.UnidentifiedImageError:
        raise ValueError("it is no image that Pillow knows") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ValueError(f"it has more than {Image.MAX_IMAGE_PIXELS:,} pixels") from None
    except Exception as error:  # Pillow raises a dozen types on broken bytes
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None
    if max(upright.size) > _LONGEST * min(upright.size):
        raise ValueError(
            f"it is {upright.width}×{upright.height}, one side more than {_LONGEST} times the other; cut it"
        )
    if upright.mode in ("I", "F"):
        raise ValueError(
            f"its pixels are 32-bit numbers without a range (mode {upright.mode}); save it with 8 bits"
        )
    if upright.mode.startswith("I;16"):
        # Pillow's own conversion to 8 bits clips at 255 instead of scaling.
        return upright.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    grey = upright.mode in ("1", "L", "LA", "La") and not upright.has_transparency_data
    mode = "RGBA" if upright.has_transparency_data else "L" if grey else "RGB"
    return (_in_srgb(upright, profile) if profile else upright).convert(mode)


def _in_srgb(picture: Image, profile: bytes) -> Image:
    """Return the picture with the colours that its profile means, in sRGB.

    As it is where the profile cannot be used.
    """
    from PIL import ImageCms

    if picture.mode in ("P", "PA", "1", "La", "RGBa"):
        picture = picture.convert("L" if picture.mode == "1" else "RGBA")
    try:
        its = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "sRGB" in ImageCms.getProfileDescription(its):
            return picture  # it says what is the case anyway, and a conversion would only round
        mode = "RGBA" if picture.mode == "RGBA" else "RGB"
        srgb = ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(picture, its, srgb, outputMode=mode)
    except (ImageCms.PyCMSError, OSError, ValueError):
        return picture
    return picture if converted is None else converted


def picture_hash(picture: Image) -> str:
    """Return the SHA-256 of size and pixels: equal for the same picture in grey, colour, palette or opaque RGBA."""
    same = picture.convert("RGBA")
    digest = hashlib.sha256(f"{same.mode} {same.width}x{same.height}\n".encode())
    digest.update(same.tobytes())
    return digest.hexdigest()


@contextlib.contextmanager
def strict_pictures(max_pixels: int | None = None) -> Iterator[None]:
    """While pictures are opened, let Pillow refuse one of more pixels and keep quiet about blemishes.

    None is Pillow's own limit.
    """
    from PIL import Image

    # Filters and the limit belong to the whole process, so they are set around all threads, not in each.
    usual = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        if max_pixels is not None:
            Image.MAX_IMAGE_PIXELS = max_pixels
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = usual


def in_parallel(work: Callable[[int], None], indices: Iterable[int]) -> Iterator[int]:
    """Call `work` with each index, in threads. Yield how many are done."""
    # Pillow decodes outside the interpreter's lock.
    with ThreadPoolExecutor(decoding_threads()) as pool:
        for done, _ in enumerate(pool.map(work, indices), start=1):
            yield done


def decoding_threads() -> int:
    """Return how many processors this process may use, or fewer where OMP_NUM_THREADS says so, as torch does."""
    # Not os.cpu_count(): a container or `taskset` leaves a process fewer than the machine has.
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return min(allowed, int(wanted)) if wanted.isdecimal() and int(wanted) else allowed
