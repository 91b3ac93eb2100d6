"""The classes that a model gives to images, with their probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from sdlora.preprocessing import Preprocessing, normalise
from sdlora.products import by_onednn


class Guess(NamedTuple):
    """A class and the softmax probability that the model gives it."""

    name: str
    label: int
    probability: float


def best_guesses(
    classifier: nn.Module,
    pixels: Sequence[np.ndarray],
    preprocessing: Preprocessing,
    classes: Sequence[str],
    *,
    top: int,
    bf16: bool,
) -> list[list[Guess]]:
    """Return the `top` best guesses of each image, in one forward pass.

    Each image is uint8 pixels (channels, height, width).
    """
    if not pixels:
        return []
    device = next(classifier.parameters()).device
    batch = torch.from_numpy(np.stack(pixels)).to(device)
    how = torch.autocast(device.type, dtype=torch.bfloat16) if bf16 else by_onednn(device)
    with torch.inference_mode(), how:
        logits = classifier(normalise(batch, mean=preprocessing.mean, std=preprocessing.std))
    found = logits.float().softmax(dim=1).topk(top, dim=1)
    return [
        [Guess(classes[label], label, round(p, 6)) for p, label in zip(ps, labels, strict=True)]
        for ps, labels in zip(found.values.tolist(), found.indices.tolist(), strict=True)
    ]
