"""From an encoded picture to what a model takes: the one way, for `sdlora predict` and for a server."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipelines.data.decoding import open_picture

if TYPE_CHECKING:
    import numpy as np

    from sdlora.preprocessing import Preprocessing


def picture_pixels(data: bytes, preprocessing: Preprocessing) -> np.ndarray:
    """Return an encoded picture as the backbone takes it, uint8 (channels, height, width).

    To be called within `strict_pictures`.

    Raises:
        ValueError: one line says why it cannot be.
    """
    return preprocessing.pixels(open_picture(data))
