"""Pictures that a test paints."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def paint(folder: Path, seed: int, count: int) -> None:
    """Small grey pictures of one pattern with noise."""
    random = np.random.default_rng(seed)
    pattern = random.integers(0, 200, (8, 8))
    folder.mkdir(parents=True)
    for index in range(count):
        noisy = pattern + random.integers(0, 55, (8, 8))
        Image.fromarray(noisy.astype(np.uint8)).save(folder / f"{index}.png")
