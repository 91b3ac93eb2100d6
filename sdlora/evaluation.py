"""Task-agnostic evaluation: one forward pass, every class seen so far is a candidate."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sdlora.preprocessing import normalise


class Predictions(NamedTuple):
    """For each image the predicted class index (n,) int64 and its softmax probability (n,) float32."""

    classes: Tensor
    confidences: Tensor


@torch.inference_mode()
def predict_batches(
    model: nn.Module,
    images: Tensor,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    batch_size: int,
    device: torch.device,
) -> Iterator[Predictions]:
    """Predict uint8 images (n, channels, height, width) batch by batch; no task id is used."""
    like = next(model.parameters())
    for batch in images.split(batch_size):
        logits = model(normalise(batch.to(device), mean=mean, std=std).to(like.dtype))
        confidences, classes = logits.float().softmax(dim=1).max(dim=1)
        yield Predictions(classes=classes.cpu(), confidences=confidences.cpu())


@torch.inference_mode()
def feature_batches(
    model: nn.Module,
    images: Tensor,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    batch_size: int,
    device: torch.device,
) -> Iterator[Tensor]:
    """Features (batch, d) on the CPU of uint8 images (n, channels, height, width), under a merged classifier."""
    like = next(model.parameters())
    for batch in images.split(batch_size):
        normal = normalise(batch.to(device), mean=mean, std=std).to(like.dtype)
        yield model.features(normal).float().cpu()  # type: ignore[operator]
