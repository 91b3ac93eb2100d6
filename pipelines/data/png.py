"""Pixels as PNG files whose bytes are the same everywhere."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def png(image: np.ndarray) -> bytes:
    """Return an image, (height, width) grey or (height, width, 3), as PNG without compression.

    Compressed bytes would vary with the version of zlib.
    """
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG", compress_level=0)
    return file.getvalue()
