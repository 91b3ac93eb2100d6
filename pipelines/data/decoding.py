"""Decoding: from encoded pictures to one array of pixels."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import io
import itertools
import logging
import os
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from pipelines.data.metadata import in_one_plane, unknown_kind, without_metadata
from pipelines.data.scratch_files import scratch_array
from pipelines.project.error_text import one_line
from pipelines.project.errors import InputError
from pipelines.runtime.memory import ANY_SIZE
from pipelines.runtime.progress import progress

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from PIL.Image import Image
    from PIL.ImageFile import ImageFile

    from sdlora.preprocessing import Preprocessing

_Encoded: TypeAlias = "bytes | memoryview | pa.Buffer"
"""The bytes of an image file."""
_T = TypeVar("_T")
_TOGETHER = 8
"""Pictures that a thread takes at a time: a small one costs less than handing it to a thread."""
_AHEAD = 2
"""Times that a thread may have been given some before the first of them is taken."""
_LONGEST_FAULT = 120
"""Characters of what Pillow says of a picture that cannot be decoded."""


def decode(
    table: pa.Table, preprocessing: Preprocessing, *, room: int = ANY_SIZE, title: str = ""
) -> np.ndarray:
    """Return all images of a table as the backbone takes them, uint8 (images, channels, height, width).

    What takes more than `room` bytes is a nameless file of `SCRATCH` that is mapped into memory, gone with the array.
    The progress is shown under a title.
    """
    import numpy as np

    out = scratch_array((len(table), *preprocessing.input_size), np.uint8, room=room)

    def fill(index: int) -> None:
        out[index] = decode_one(table, index, preprocessing)

    # `split` has refused what is above data.max_pixels.
    with contextlib.ExitStack() as stack:
        stack.enter_context(strict_pictures(ANY_SIZE))
        bar = stack.enter_context(progress(title, total=len(table), unit="images")) if title else None
        for done, _ in enumerate(in_parallel(fill, range(len(table))), start=1):
            if bar is not None:
                bar.update(done)
    return out


def decode_one(table: pa.Table, index: int, preprocessing: Preprocessing) -> np.ndarray:
    """Return one image of a table as the backbone takes it, uint8 (channels, height, width)."""
    try:
        return picture_pixels(table["image"][index].as_buffer(), preprocessing)
    except ValueError as error:
        raise InputError(f"{table['id'][index]}: {error}; replace the image") from None


def picture_pixels(data: _Encoded, preprocessing: Preprocessing) -> np.ndarray:
    """Return an encoded picture as the backbone takes it, uint8 (channels, height, width).

    The one way for stages, `sdlora predict` and a server. To be called within `strict_pictures`.

    Raises:
        ValueError: one line says why it cannot be.
    """
    with opened_picture(data) as picture:
        return preprocessing.pixels(picture)


_MAX_PIXELS = 178_956_970
"""Width × height of the largest picture that is opened where no parameter says another, and of all that are open
in threads at a time: a picture takes 4 bytes for each of its pixels, and as much again while it is converted."""
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""What is opened, of all that Pillow knows: for some of the others it starts programs of the machine (Ghostscript)."""
_LONGEST = 100
"""How many times its shorter side a picture may be long: scaled by the shorter one, a strip would fill the memory."""
_STRIP_PIXELS = 2**20
"""What is copied of a large picture at a time."""
_ORIENTATION = 0x0112
"""The EXIF tag that says how a camera was held."""
_TRANSPOSITIONS = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}
"""Its values → Pillow's `Image.Transpose`; 1 is upright."""


class _Room:
    """What pictures that are open at the same time may take together. A larger one is opened alone."""

    def __init__(self, pixels: int) -> None:
        self._all = self._free = pixels
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def take(self, pixels: int) -> Iterator[None]:
        pixels = min(pixels, self._all)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= pixels)
            self._free -= pixels
        try:
            yield
        finally:
            with self._changed:
                self._free += pixels
                self._changed.notify_all()


_ROOM = _Room(_MAX_PIXELS)


@contextlib.contextmanager
def opened_picture(data: _Encoded) -> Iterator[Image]:
    """Open a picture, as `open_picture` does, for as long as it is looked at.

    It waits until there is room beside those that other threads look at, so that all of them together take no more
    memory than the largest one alone.
    """
    with contextlib.ExitStack() as room:
        yield _opened(data, room)


def open_picture(data: _Encoded) -> Image:
    """Decode a picture fully, as the model sees it: upright, in sRGB, on white, 8-bit L or RGB.

    Of several frames or pages the first one is the picture. Metadata that cannot be read is left out, a colour
    profile too, as browsers do.

    Raises:
        ValueError: the text says why it cannot be decoded.
    """
    with contextlib.ExitStack() as room:
        return _opened(data, room)


def _opened(data: _Encoded, room: contextlib.ExitStack) -> Image:
    try:
        return _decoded(data, room)
    except ValueError:
        bare = without_metadata(data)
        if bare is None:
            raise
        room.close()
        with contextlib.suppress(ValueError):
            return _decoded(bare, room)
        raise


def _decoded(data: _Encoded, room: contextlib.ExitStack) -> Image:
    with _begun(data) as image:
        room.enter_context(_ROOM.take(image.width * image.height))
        try:
            image.load()
            picture = _with_8_bits(image, data)
            profile = image.info.get("icc_profile")
            if profile:
                picture = _in_srgb(picture, profile)
            if picture.has_transparency_data:
                picture = _on_white(_as(picture, "RGBA"))
            return _upright(_as(picture, "L" if picture.mode in ("1", "L") else "RGB"), image)
        except Exception as error:  # Pillow raises a dozen types on broken bytes
            raise ValueError(_fault(error)) from None


@contextlib.contextmanager
def _begun(data: _Encoded) -> Iterator[ImageFile]:
    """Open a picture without its pixels: format and size are known."""
    from PIL import Image

    _quieten_libraries()
    try:
        image = _with_planes(Image.open(io.BytesIO(data), formats=_FORMATS), data)
    except Image.UnidentifiedImageError:
        raise ValueError(unknown_kind(data)) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ValueError(f"it has more than {Image.MAX_IMAGE_PIXELS:,} pixels") from None
    except Exception as error:
        raise ValueError(_fault(error)) from None
    with image:
        if max(image.size) > _LONGEST * min(image.size):
            raise ValueError(
                f"it is {image.width}×{image.height}, one side more than {_LONGEST} times the other; cut it"
            )
        yield image


def _with_planes(image: ImageFile, data: _Encoded) -> ImageFile:
    """Return an opened picture. Of a TIFF whose channels stand in planes Pillow would read some bits and not others."""
    from PIL import Image, TiffImagePlugin

    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return image
    tags = image.tag_v2
    if tags.get(TiffImagePlugin.PLANAR_CONFIGURATION) != 2:
        return image
    if tags.get(TiffImagePlugin.SAMPLESPERPIXEL, 1) == 1:
        return Image.open(io.BytesIO(in_one_plane(data)), formats=("TIFF",))
    if set(tags.get(TiffImagePlugin.BITSPERSAMPLE, ())) == {16}:
        order = "L" if bytes(data[:2]) == b"II" else "B"
        image.tile = [
            tile._replace(args=(f"{tile.args[0]};16{order}", *tile.args[1:]))
            if tile.codec_name == "raw" and isinstance(tile.args, tuple)
            else tile
            for tile in image.tile
        ]
    return image


def _fault(error: Exception) -> str:
    """Return what Pillow says, as part of a line."""
    if isinstance(error, MemoryError):
        return "there is not enough memory for it"
    text = one_line(error)
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= _LONGEST_FAULT else f"{text[:_LONGEST_FAULT]}…"


def _with_8_bits(image: ImageFile, data: _Encoded) -> Image:
    """Return decoded pixels with 8 bits a channel, and with what is transparent as a channel of its own."""
    import numpy as np
    from PIL import Image

    clear = image.info.get("transparency")
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        # Pillow's own conversion to 8 bits clips at 255 instead of scaling, and forgets the transparent value.
        values = np.asarray(image)
        grey = Image.fromarray((values >> 8).astype(np.uint8))
        if clear is not None:
            grey.putalpha(_opaque(values != clear))
        return grey
    if image.mode in _UNREAD:
        raise ValueError(f"{_UNREAD[image.mode]} (mode {image.mode}); save it with 8 bits, as grey or RGB")
    if image.format == "PNG" and clear is not None and image.mode in ("L", "RGB") and data[24] != 8:
        # What is transparent is named in the bits of the file, and Pillow compares it with what it made 8 of.
        opaque = _opaque(_differs_from(clear, image, data))
        picture = image.copy()
        del picture.info["transparency"]
        picture.putalpha(opaque)
        return picture
    return image


_UNREAD = {
    "I": "its pixels are whole numbers without a range",
    "F": "its pixels are floating-point numbers without a range",
    "LAB": "its colours are L*a*b*",
}
"""Modes that are not read: why."""


def _differs_from(clear: int | tuple[int, ...], image: ImageFile, data: _Encoded) -> np.ndarray:
    """Return which pixels of a PNG are not of the value that it calls transparent."""
    import numpy as np

    values = np.asarray(image)
    if isinstance(clear, int):
        highest = (1 << data[24]) - 1  # the bits stand in IHDR, which is first
        return values != (clear & highest) * 255 // highest
    with _begun(data) as again:
        # Read in the other order of bytes, the upper 8 bits of 16 are the lower ones.
        again.tile = [again.tile[0]._replace(args="RGB;16L")]
        lower = np.asarray(again)
    return (values != np.array(clear) >> 8).any(axis=2) | (lower != np.array(clear) % 256).any(axis=2)


def _opaque(where: np.ndarray) -> Image:
    import numpy as np
    from PIL import Image

    return Image.fromarray(np.where(where, 255, 0).astype(np.uint8))


def _upright(picture: Image, image: ImageFile) -> Image:
    """Return the picture as it was seen, whichever way the camera was held."""
    from PIL import Image

    try:
        method = _TRANSPOSITIONS.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # what a broken EXIF block raises is no fault of the pixels
        return picture
    if method is None:
        return picture
    turned = picture.transpose(Image.Transpose(method))
    turned.info = {}  # where it says how the camera was held
    return turned


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
        alpha = picture.getchannel("A") if picture.mode == "LA" else None
        colours = picture.convert("L") if alpha else picture
        converted = ImageCms.profileToProfile(colours, its, srgb, outputMode=mode)
    except Exception:  # of Pillow and of what a profile is made of; it is no fault of the pixels
        return picture
    if converted is None:
        return picture
    if alpha is not None:
        converted.putalpha(alpha)
    return converted


def _as(picture: Image, mode: str) -> Image:
    """Return the picture in a mode. It is not copied where it is in it."""
    return picture if picture.mode == mode else picture.convert(mode)


def _on_white(picture: Image) -> Image:
    """Return an RGBA picture on white, as the model sees it: its hidden colours, often black, are not part of it."""
    from PIL import Image

    white = Image.new("RGB", picture.size, "white")
    for box, part in _strips(picture):
        white.paste(Image.alpha_composite(Image.new("RGBA", part.size, "white"), part).convert("RGB"), box)
    return white


def _strips(picture: Image) -> Iterator[tuple[tuple[int, int, int, int], Image]]:
    """Yield a picture's rows, some at a time, and where they are: what is made of all would take its memory again."""
    height = max(1, _STRIP_PIXELS // picture.width)
    for top in range(0, picture.height, height):
        box = 0, top, picture.width, min(top + height, picture.height)
        yield box, picture if height >= picture.height else picture.crop(box)


def picture_hash(picture: Image) -> str:
    """Return the SHA-256 of size and pixels of an opened picture: equal for what the model sees as the same.

    Grey, colour and palette, opaque and transparent alike: only what shows on white counts.
    """
    digest = hashlib.sha256(f"RGBA {picture.width}x{picture.height}\n".encode())
    for _, part in _strips(picture):
        digest.update(part.convert("RGBA").tobytes())
    return digest.hexdigest()


@functools.cache
def _quieten_libraries() -> None:
    """Have what is wrong with a picture said by us alone: libtiff and Pillow's log write to standard error, too."""
    from PIL import _imaging

    logging.getLogger("PIL").addHandler(logging.NullHandler())
    # Documented by libtiff, and found where Pillow's own module finds it; where it is linked otherwise its lines
    # stand before ours.
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(_imaging.__file__).TIFFSetErrorHandler(None)


@contextlib.contextmanager
def strict_pictures(max_pixels: int = _MAX_PIXELS) -> Iterator[None]:
    """While pictures are opened, let Pillow refuse one of more pixels and keep quiet about blemishes."""
    from PIL import Image

    # Filters and the limit belong to the whole process, so they are set around all threads, not in each.
    usual = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        Image.MAX_IMAGE_PIXELS = max_pixels
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = usual


def in_parallel(work: Callable[[int], _T], indices: Iterable[int]) -> Iterator[_T]:
    """Call `work` with each index, in threads. Yield what it returns, in order.

    What is done before it is asked for is bounded, so a million results never wait for whoever takes them.
    """

    def several(some: list[int]) -> list[_T]:
        return [work(index) for index in some]

    # Pillow decodes outside the interpreter's lock.
    threads = decoding_threads()
    left = iter(indices)
    waiting: deque[Future[list[_T]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            while some := list(itertools.islice(left, _TOGETHER)):
                waiting.append(pool.submit(several, some))
                if len(waiting) > _AHEAD * threads:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def decoding_threads() -> int:
    """Return how many processors this process may use, or fewer where OMP_NUM_THREADS says so, as torch does."""
    # Not os.cpu_count(): a container or `taskset` leaves a process fewer than the machine has.
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return min(allowed, int(wanted)) if wanted.isdecimal() and int(wanted) else allowed
