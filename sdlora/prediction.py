"""The classes that a model gives to images, with their probabilities."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from sdlora.classifier import IncrementalClassifier
from sdlora.preprocessing import Preprocessing, normalise
from sdlora.products import by_onednn

_Outputs = TypeVar("_Outputs")


class Guess(NamedTuple):
    """A class and the softmax probability that the model gives it."""

    name: str
    label: int
    probability: float


class _Judged(NamedTuple):
    """The best guesses of an image, and how much it looks like none of the classes, where that is asked."""

    guesses: list[Guess]
    score: float | None = None
    unknown: bool = False
    """Whether the score is above the step's threshold."""


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
    return _best(_applied(classifier, classifier, pixels, preprocessing, bf16=bf16), classes, top=top)


def judged_guesses(
    classifier: IncrementalClassifier,
    pixels: Sequence[np.ndarray],
    preprocessing: Preprocessing,
    classes: Sequence[str],
    *,
    top: int,
    bf16: bool,
    unknown: bool = True,
) -> list[_Judged]:
    """Return the same as `best_guesses` with the score of each image, of a step that has a threshold.

    Args:
        unknown: whether scores are asked. A step without a threshold has none.
    """
    if not pixels:
        return []
    if not unknown:
        return list(
            map(_Judged, best_guesses(classifier, pixels, preprocessing, classes, top=top, bf16=bf16))
        )
    assert classifier.unknown is not None
    logits, scores = _applied(classifier, classifier.scored, pixels, preprocessing, bf16=bf16)
    above = (scores > classifier.unknown.threshold).tolist()
    rounded = (round(score, 4) for score in scores.tolist())
    return list(map(_Judged, _best(logits, classes, top=top), rounded, above))


def _applied(
    model: nn.Module,
    forward: Callable[[Tensor], _Outputs],
    pixels: Sequence[np.ndarray],
    preprocessing: Preprocessing,
    *,
    bf16: bool,
) -> _Outputs:
    """Return what a model says of images."""
    device = next(model.parameters()).device
    batch = torch.from_numpy(np.stack(pixels)).to(device)
    how = torch.autocast(device.type, dtype=torch.bfloat16) if bf16 else by_onednn(device)
    with torch.inference_mode(), how:
        return forward(normalise(batch, mean=preprocessing.mean, std=preprocessing.std))


def _best(logits: Tensor, classes: Sequence[str], *, top: int) -> list[list[Guess]]:
    found = logits.float().softmax(dim=1).topk(top, dim=1)
    return [
        [Guess(classes[label], label, round(p, 6)) for p, label in zip(ps, labels, strict=True)]
        for ps, labels in zip(found.values.tolist(), found.indices.tolist(), strict=True)
    ]
