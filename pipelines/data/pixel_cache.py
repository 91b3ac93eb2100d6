"""Test images as the backbone takes them, decoded once and not at every step: kept beside the project's outputs.

A step is tested on the images of every task so far, and those of earlier tasks were decoded for the step before. What
is kept is found by the hash of all that decides the pixels: the packed file, the preprocessing, the code, the decoder.
It is no output and no input of a stage, may be deleted at any time, and is never trusted: each picture has a checksum.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import time
import uuid
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.data.decoding import decode_one, decoding_threads, strict_pictures
from pipelines.data.packed import read_images
from pipelines.project.environment import DECODED_GIB
from pipelines.project.error_text import one_line
from pipelines.project.files import sha256_of
from pipelines.project.fingerprints import fingerprint_of
from pipelines.project.layout import DECODED
from pipelines.runtime.console import log_line
from pipelines.runtime.memory import ANY_SIZE, gibibytes

if TYPE_CHECKING:
    import numpy as np
    import torch

    from sdlora.preprocessing import Preprocessing

_BUDGET_GIB = 16.0
"""What is kept at most where it is not set: 100,000 colour images of 224×224."""
_FORGOTTEN_AFTER_DAYS = 30
"""What nothing has used for so long is removed."""
_ABANDONED_AFTER_SECONDS = 3600
"""A half-written file that has not grown for so long is what a killed process has left."""
_AHEAD = 2
"""Batches that are decoded while a GPU is at one; a CPU has its hands full with that one."""
_TOGETHER = 8
"""Images that a thread takes at a time: an image that is kept costs less than handing it to a thread."""

_NAME = re.compile(r"[0-9a-f]{32}\.pixels")
_PARTIAL = re.compile(_NAME.pattern + r"\.[0-9a-f]{32}\.partial")
_DIGEST = hashlib.sha256().digest_size


def pixel_batches(
    files: Sequence[PackedImages], *, batch_size: int, device: torch.device
) -> Iterator[torch.Tensor]:
    """Yield the images of all files in order, uint8 (at most batch_size, channels, height, width), decoded in threads.

    No batch has images of two files. The last bits of a prediction depend on the batch that it is made in, and those
    of an old task's images must not change with the number of images of the tasks before it. For a GPU the batches are
    in pinned memory, so that they are copied while it computes.
    """
    import torch

    pinned = device.type == "cuda"
    spans = (
        (images, start, min(start + batch_size, len(images)))
        for images in files
        for start in range(0, len(images), batch_size)
    )
    waiting: deque[tuple[torch.Tensor, list[Future[None]], PackedImages, bool]] = deque()
    with contextlib.ExitStack() as stack:
        stack.enter_context(strict_pictures(ANY_SIZE))  # `split` has refused what is above data.max_pixels
        for images in files:
            stack.callback(images.close)
        pool = stack.enter_context(ThreadPoolExecutor(decoding_threads()))
        stack.callback(pool.shutdown, cancel_futures=True)
        _find_kept(files, pool)
        while True:
            while len(waiting) <= (_AHEAD if pinned else 0) and (span := next(spans, None)):
                images, start, stop = span
                batch = torch.empty((stop - start, *images.shape), dtype=torch.uint8, pin_memory=pinned)
                rows = batch.numpy()
                futures = [
                    pool.submit(images.read, first, rows[first - start : first - start + _TOGETHER])
                    for first in range(start, stop, _TOGETHER)
                ]
                waiting.append((batch, futures, images, stop == len(images)))
            if not waiting:
                return
            batch, futures, images, last = waiting.popleft()
            for future in futures:
                future.result()
            if last:
                images.finish()
            yield batch


class PackedImages:
    """The images of one packed file as the backbone takes them: from what is kept of them, else decoded."""

    def __init__(self, path: Path, preprocessing: Preprocessing) -> None:
        self.table = read_images(path)
        self.shape = preprocessing.input_size
        self.kept: _Kept | None = None
        """Where they are read from."""
        self.new: _Kept | None = None
        """Where they are written to."""
        self._path, self._preprocessing = path, preprocessing
        self._fault: OSError | None = None

    def __len__(self) -> int:
        return len(self.table)

    def place(self) -> _Kept:
        """Return the file for these images, which may not exist. Its name is the hash of what decides them."""
        decisive = {
            "images": sha256_of(self._path),
            "preprocessing": asdict(self._preprocessing),
            "decoder": decoder(),
        }
        key = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:32]
        channels, height, width = self.shape
        return _Kept(DECODED / f"{key}.pixels", count=len(self), size=channels * height * width)

    def read(self, first: int, out: np.ndarray) -> None:
        """Put the images from `first` on into `out`, uint8 (n, channels, height, width). May be called in threads."""
        for index, row in enumerate(out, start=first):
            if self.kept is not None and self.kept.read(index, row):
                continue
            row[:] = decode_one(self.table, index, self._preprocessing)
            if self.new is not None and self._fault is None:
                try:
                    self.new.write(index, row)
                except OSError as error:  # the file stays open for the other threads
                    self._fault = error

    def finish(self) -> None:
        """Every image was read: what was written is whole, what was found damaged goes."""
        try:
            if self.kept is not None and self.kept.damaged:
                log_line(
                    f"warning: {self.kept.path} is damaged: its images were decoded again, and it was removed"
                )
                self.kept.path.unlink(missing_ok=True)
            if self._fault is not None:
                raise self._fault
            if self.new is not None:
                self.new.finish()
        except OSError as error:
            _not_kept(error)
        self.close()

    def close(self) -> None:
        """Let go of the files. What was begun and is not whole is removed."""
        for file in (self.kept, self.new):
            if file is not None:
                file.close()
        self.kept = self.new = None


class _Kept:
    """One file: the pixels of `count` images of `size` bytes each, then a checksum of each, which holds its place."""

    def __init__(self, path: Path, *, count: int, size: int) -> None:
        self.path, self._count, self._size = path, count, size
        self.bytes = count * (size + _DIGEST)
        self.damaged = False
        self._partial: Path | None = None
        self._descriptor: int | None = None

    def open(self) -> bool:
        """Open what is there, and note that it is used. False where there is nothing of this length."""
        try:
            self._descriptor = os.open(self.path, os.O_RDONLY)
        except FileNotFoundError:
            return False
        if os.fstat(self._descriptor).st_size == self.bytes:
            now = time.time()
            os.utime(self.path, (now, now))
            return True
        self.close()
        self.path.unlink(missing_ok=True)
        return False

    def create(self) -> None:
        """Begin the file, under a name that is this process's alone until it is whole."""
        self._partial = self.path.with_name(f"{self.path.name}.{uuid.uuid4().hex}.partial")
        self._descriptor = os.open(self._partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            os.ftruncate(self._descriptor, self.bytes)  # others see from now on how much room it takes
        except OSError:
            self.close()
            raise

    def read(self, index: int, row: np.ndarray) -> bool:
        """Put an image into `row`. Where it is not the one that was written, False, and `row` is worth nothing."""
        assert self._descriptor is not None
        try:
            os.preadv(self._descriptor, [row.reshape(-1).data], index * self._size)
            found = os.pread(self._descriptor, _DIGEST, self._count * self._size + index * _DIGEST)
        except OSError:
            found = b""
        if found == self._checksum(index, row):
            return True
        self.damaged = True
        return False

    def write(self, index: int, row: np.ndarray) -> None:
        """Write one image and its checksum."""
        assert self._descriptor is not None
        _write(self._descriptor, row.reshape(-1).data, index * self._size)
        checksum = self._checksum(index, row)
        _write(self._descriptor, memoryview(checksum), self._count * self._size + index * _DIGEST)

    def finish(self) -> None:
        """Give the whole file its name. Another process may have made the same. Either will do."""
        assert self._partial is not None
        os.replace(self._partial, self.path)
        self._partial = None

    def close(self) -> None:
        """Close the file. Remove it where it was begun and is not whole."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)
        if self._partial is not None:
            with contextlib.suppress(OSError):
                self._partial.unlink(missing_ok=True)
            self._partial = None

    def _checksum(self, index: int, row: np.ndarray) -> bytes:
        digest = hashlib.sha256(f"{self.path.name} {index}\n".encode())
        digest.update(row.reshape(-1).data)
        return digest.digest()


def _find_kept(files: Sequence[PackedImages], pool: ThreadPoolExecutor) -> None:
    """Open what is kept of each file's images, and begin to keep the others as far as there is room."""
    room = _budget()
    if not room:
        return
    started, new = time.time(), []
    try:
        DECODED.mkdir(parents=True, exist_ok=True)
        for images, kept in zip(files, pool.map(PackedImages.place, files), strict=True):
            if kept.open():
                images.kept = kept
            elif kept.bytes:
                new.append((images, kept))
        for (images, kept), fits in zip(
            new, _make_room([kept for _, kept in new], room, started), strict=True
        ):
            if fits:
                kept.create()
                images.new = kept
    except OSError as error:
        _not_kept(error)


def _make_room(wanted: Iterable[_Kept], room: int, started: float) -> Iterator[bool]:
    """Remove what is old, then the longest unused, until the next file fits. Yields whether each one does.

    What was used since `started` stays: were it removed for what comes after it, an evaluation of more than there is
    room for would never find anything.
    """
    held: list[tuple[float, int, Path]] = []
    for path in sorted(DECODED.iterdir()):
        partial = _PARTIAL.fullmatch(path.name)
        if partial or _NAME.fullmatch(path.name):
            with contextlib.suppress(FileNotFoundError):  # another process may be at the same
                facts = path.stat()
                limit = _ABANDONED_AFTER_SECONDS if partial else _FORGOTTEN_AFTER_DAYS * 86400
                if facts.st_mtime < started - limit:
                    path.unlink()
                else:
                    held.append((facts.st_mtime, facts.st_size, path))
    total = sum(size for _, size, _ in held)
    # Half of what is free stays free: a full disk would cost outputs, not time.
    room = min(room, total + shutil.disk_usage(DECODED).free // 2)
    unused = deque(sorted(one for one in held if one[0] < started and _NAME.fullmatch(one[2].name)))
    for file in wanted:
        if total - sum(size for _, size, _ in unused) + file.bytes <= room:
            while total + file.bytes > room:
                _, size, path = unused.popleft()
                path.unlink(missing_ok=True)
                total -= size
        fits = total + file.bytes <= room
        total += file.bytes if fits else 0
        yield fits


def _budget() -> int:
    """Return how many bytes may be kept.

    Raises:
        InputError: the environment variable holds no such number.
    """
    text = os.environ.get(DECODED_GIB, "").strip()
    complaint = f"{DECODED_GIB}: {text!r} is no number of GiB; set one, or 0 to keep nothing"
    return gibibytes(text or str(_BUDGET_GIB), complaint)


def decoder() -> dict[str, object]:
    """Return what makes pixels of bytes: the code, Pillow, and the libraries that come with it."""
    import PIL
    from PIL import features

    from sdlora.preprocessing import Preprocessing

    libraries = ("jpg", "libjpeg_turbo", "zlib", "libtiff", "webp", "littlecms2")
    return {
        "code": [fingerprint_of(part).sha256 for part in (PackedImages, Preprocessing)],
        "machine": platform.machine(),
        "pillow": PIL.__version__,
        **{name: features.version(name) for name in libraries},
    }


def _not_kept(error: OSError) -> None:
    """Go on without: nothing but time depends on what is kept."""
    log_line(f"warning: decoded images are not kept in {DECODED} ({one_line(error)})")


def _write(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written
