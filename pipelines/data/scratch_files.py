"""Files without a name that hold what may have no room in memory. They are gone when nothing uses them any more."""

from __future__ import annotations

import math
import mmap
import os
from array import array
from contextlib import AbstractContextManager
from tempfile import TemporaryFile
from typing import TYPE_CHECKING

from pipelines.project.files import naming
from pipelines.project.layout import SCRATCH

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    import torch
    from numpy.typing import DTypeLike


def scratch_array(shape: tuple[int, ...], dtype: DTypeLike, *, room: int) -> np.ndarray:
    """Return an array to be filled. What takes more than `room` bytes is a file that is mapped into memory.

    Raises:
        OSError: the disk is full.
    """
    import numpy as np

    size = math.prod(shape) * np.dtype(dtype).itemsize
    if size <= room:
        return np.empty(shape, dtype)
    with naming(SCRATCH):
        SCRATCH.mkdir(exist_ok=True)
        with TemporaryFile(dir=SCRATCH) as file:
            os.truncate(file.fileno(), size)
            if hasattr(
                os, "posix_fallocate"
            ):  # not on macOS: a full disk is an error now, and not a signal later
                os.posix_fallocate(file.fileno(), 0, size)
            return np.ndarray(shape, dtype, mmap.mmap(file.fileno(), size))


def scratch_tensor(shape: tuple[int, ...], dtype: torch.dtype, *, room: int) -> torch.Tensor:
    """Return a tensor on the CPU to be filled, in the same way."""
    import torch

    data = scratch_array((math.prod(shape) * dtype.itemsize,), "u1", room=room)
    return torch.from_numpy(data).view(dtype).view(shape)


class ByteStore(AbstractContextManager["ByteStore"]):
    """Byte strings in a file, in the order in which they came. Columns of them outlive it."""

    def __init__(self) -> None:
        with naming(SCRATCH):
            SCRATCH.mkdir(exist_ok=True)
            self._file = TemporaryFile(dir=SCRATCH)  # noqa: SIM115 - it lives as long as this
        self._ends = array("q", [0])

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def append(self, data: bytes | memoryview) -> None:
        """Add a byte string."""
        with naming(SCRATCH):
            self._file.write(data)
        self._ends.append(self._ends[-1] + len(data))

    def column(self, chosen: np.ndarray) -> pa.LargeBinaryArray:
        """Return the byte strings at these places, which rise. They are mapped into memory and not read."""
        import numpy as np
        import pyarrow as pa

        if not len(chosen):
            return pa.array([], pa.large_binary())
        ends = np.frombuffer(self._ends, np.int64)
        with naming(SCRATCH):
            self._file.flush()
        whole = memoryview(mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)) if ends[-1] else b""
        if len(chosen) <= chosen[-1] - chosen[0]:  # Arrow has no gaps
            with ByteStore() as kept:
                for place in chosen.tolist():
                    kept.append(whole[ends[place] : ends[place + 1]])
                return kept.column(np.arange(len(chosen)))
        offsets = ends[chosen[0] : chosen[-1] + 2]
        data = whole[offsets[0] : offsets[-1]]
        buffers = [None, pa.py_buffer(offsets - offsets[0]), pa.py_buffer(data)]
        return pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(chosen), buffers)
