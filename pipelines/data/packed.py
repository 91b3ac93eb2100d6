"""Packed images: Arrow files of encoded pictures, and the way from there to one array of pixels."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import mmap
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, NamedTuple

from pipelines.project.environment import IMAGES_GIB
from pipelines.project.errors import InputError
from pipelines.project.files import naming, read_json, sha256_of
from pipelines.project.layout import SCRATCH

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from PIL.Image import Image

    from sdlora.preprocessing import Preprocessing


TRAINING = "train.json"
"""What describes the training images of a task."""

PACKED = "train.arrow"
"""The training images of a task, in a folder of their own: whoever needs the description need not fetch them."""

ANY_SIZE = sys.maxsize // 2
"""A number of pixels that no picture has."""


class ImageRow(NamedTuple):
    """One row of a file of images."""

    id: str
    """`t01/train/<class>/<file>`, unique"""
    label: int
    """global class index in order of arrival"""
    image: bytes
    """the file's bytes, unchanged"""
    sha256: str
    """of these bytes"""
    pixels: str
    """`picture_hash` of what they show: the same in every encoding without loss"""


class SampleRow(NamedTuple):
    """One row of a file of samples: what later tasks are checked against."""

    id: str
    split: str
    """train, validation or test"""
    label: int
    sha256: str
    pixels: str
    perceptual: str
    """`perceptual_hash`: nearly the same for nearly the same picture"""


def write_images(path: Path, rows: Sequence[ImageRow]) -> None:
    """Write images as an Arrow IPC file: one batch, no compression, the same bytes for the same rows."""
    import pyarrow as pa

    # Offsets of 64 bits: the images of one task may exceed 2 GiB.
    write_rows(path, rows, {"id": pa.string(), "label": pa.int32(), "image": pa.large_binary(), **_hashes()})


def write_samples(path: Path, rows: Sequence[SampleRow]) -> None:
    """Write samples, which are images without their bytes, in the same way."""
    import pyarrow as pa

    types = {"id": pa.string(), "split": pa.string(), "label": pa.int32(), **_hashes()}
    write_rows(path, rows, {**types, "perceptual": pa.string()})


def digest_of(samples: Iterable[SampleRow]) -> str:
    """One hash for all samples in order."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(json.dumps(sample, ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()


def read_images(path: Path) -> pa.Table:
    """Open a file of images or samples, memory-mapped; an `InputError` names a missing or damaged one."""
    import pyarrow as pa

    try:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        table.validate(full=True)
        return table
    except FileNotFoundError:
        raise InputError(f"{path}: the file is missing; run `sdlora run`, which makes it") from None
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        fault = " ".join(str(error).split())
        raise InputError(f"{path}: not an Arrow file ({fault}); delete it and run `sdlora run`") from None


def training_images(described: Path, images: Path) -> Path:
    """The training images that a `train.json` describes; an `InputError` where they are missing or others.

    Stages depend on the description, which holds the hash of the images, and not on the images: so a step whose images
    were deleted afterwards is as up to date as it was, and no step can be made of other images than it says.

    Args:
        described: The `train.json` of a task.
        images: The folder that has a folder of training images for each task.
    """
    description = read_json(described)
    folder = images / description["task"]
    path = folder / PACKED
    if not path.is_file():
        raise InputError(
            f"{path}: the training images of {folder.name} are missing; restore them with `dvc checkout {folder}` or "
            f"`dvc pull {folder}`"
        )
    if sha256_of(path) != description["images"]:
        raise InputError(
            f"{path}: not the images that {described} describes; restore both with "
            f"`dvc checkout {folder} {described.parent}`"
        )
    return path


def decode(table: pa.Table, preprocessing: Preprocessing, *, room: int = ANY_SIZE) -> np.ndarray:
    """All images of a table as the backbone takes them, uint8 (images, channels, height, width).

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


def device_room() -> int | None:
    """Bytes that decoded images may take on the device; None where `IMAGES_GIB` is not set."""
    text = os.environ.get(IMAGES_GIB, "").strip()
    return gibibytes(text, f"{IMAGES_GIB}: {text!r} is no number of GiB; set one, or none") if text else None


def memory_room() -> int:
    """Bytes that decoded images may take in main memory."""
    room = device_room()
    return free_memory() // 2 if room is None else room


def free_memory() -> int:
    """Main memory that this process may still take, in bytes; without limit where the system does not say."""
    found = [ANY_SIZE]
    with contextlib.suppress(OSError):
        known = re.findall(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())
        found += [int(kib) * 1024 for kib in known]
    with contextlib.suppress(OSError, ValueError):  # of a container
        limit, used = (int((CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        # What it holds of files is counted as used, and given up where memory is wanted.
        files = re.findall(r"^(?:in)?active_file (\d+)$", (CGROUP / "memory.stat").read_text(), re.MULTILINE)
        found.append(max(limit - used + sum(map(int, files)), 0))
    return min(found)


CGROUP = Path("/sys/fs/cgroup")


def gibibytes(text: str, complaint: str) -> int:
    """A number of GiB in bytes; what is none is an `InputError` of these words."""
    try:
        return max(int(float(text) * 2**30), 0)
    except (ValueError, OverflowError):
        raise InputError(complaint) from None


def decode_one(table: pa.Table, index: int, preprocessing: Preprocessing) -> np.ndarray:
    """One image of a table as the backbone takes it, uint8 (channels, height, width)."""
    try:
        picture = open_picture(table["image"][index].as_buffer())
    except ValueError as error:
        raise InputError(f"{table['id'][index]}: {error}; replace the image") from None
    return preprocessing.pixels(picture)


FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""What is opened, of all that Pillow knows: for some of the others it starts programs of the machine (Ghostscript)."""
LONGEST = 100
"""How many times its shorter side a picture may be long: scaled by the shorter one, a strip would fill the memory."""


def open_picture(data: bytes | memoryview | pa.Buffer) -> Image:
    """Decode a picture fully, upright, in sRGB, as 8-bit L, RGB or RGBA; a ValueError says why it cannot be.

    Of several frames or pages the first one is the picture. A colour profile that cannot be used is left out, as
    browsers do.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            image.load()
            upright = ImageOps.exif_transpose(image)
            profile = image.info.get("icc_profile")
    except Image.UnidentifiedImageError:
        raise ValueError("it is no image that Pillow knows") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ValueError(f"it has more than {Image.MAX_IMAGE_PIXELS:,} pixels") from None
    except Exception as error:  # Pillow raises a dozen types on broken bytes
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None
    if max(upright.size) > LONGEST * min(upright.size):
        raise ValueError(
            f"it is {upright.width}×{upright.height}, one side more than {LONGEST} times the other; cut it"
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
    """The picture with the colours that its profile means, in sRGB; as it is where the profile cannot be used."""
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
    """The SHA-256 of size and pixels: equal for the same picture in grey, colour, palette or opaque RGBA."""
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
    """Call `work` with each index, in threads; yield how many are done."""
    # Pillow decodes outside the interpreter's lock.
    with ThreadPoolExecutor(decoding_threads()) as pool:
        for done, _ in enumerate(pool.map(work, indices), start=1):
            yield done


def decoding_threads() -> int:
    """The processors that this process may use, or fewer where OMP_NUM_THREADS says so, as torch does."""
    # Not os.cpu_count(): a container or `taskset` leaves a process fewer than the machine has.
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return min(allowed, int(wanted)) if wanted.isdecimal() and int(wanted) else allowed


def _hashes() -> dict[str, pa.DataType]:
    import pyarrow as pa

    return {"sha256": pa.string(), "pixels": pa.string()}


def write_rows(path: Path, rows: Sequence[tuple[object, ...]], types: dict[str, pa.DataType]) -> None:
    """Write rows as an Arrow IPC file with columns of these names and types: one batch, no compression."""
    import pyarrow as pa

    schema = pa.schema([pa.field(name, kind, nullable=False) for name, kind in types.items()])
    columns = zip(*rows, strict=True) if rows else [()] * len(schema)
    arrays = [pa.array(column, kind) for column, kind in zip(columns, types.values(), strict=True)]
    options = pa.ipc.IpcWriteOptions(compression=None, use_threads=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        naming(path),
        pa.OSFile(str(path), "wb") as sink,
        pa.ipc.new_file(sink, schema, options=options) as file,
    ):
        file.write_batch(pa.record_batch(arrays, schema=schema))
