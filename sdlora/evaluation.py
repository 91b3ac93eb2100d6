"""Task-agnostic evaluation: one forward pass, every class seen so far is a candidate."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sdlora.preprocessing import normalise

AHEAD = 2
"""Batches that a GPU may have before it when the host waits for the result of the first."""


class Predictions(NamedTuple):
    """For each image the predicted class index (n,) int64 and its softmax probability (n,) float32."""

    classes: Tensor
    confidences: Tensor


@torch.inference_mode()
def predict_batches(
    model: nn.Module,
    batches: Iterable[Tensor],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device,
) -> Iterator[Predictions]:
    """Predict batches of uint8 images (n, channels, height, width) in order; no task id is used.

    The predictions are on the CPU. A GPU is given the next batch before the result of the one before is waited for, so
    it never stands still for the host; from pinned memory a batch is copied while it computes.
    """
    like = next(model.parameters())
    waiting: deque[tuple[Predictions, torch.cuda.Event | None]] = deque()
    for batch in batches:
        images = batch.to(device, non_blocking=True)
        logits = model(normalise(images, mean=mean, std=std).to(like.dtype))
        confidences, classes = logits.float().softmax(dim=1).max(dim=1)
        # From a GPU this is into pinned memory, and there only when the event has come.
        found = Predictions(*(part.to("cpu", non_blocking=True) for part in (classes, confidences)))
        waiting.append((found, torch.cuda.current_stream(device).record_event() if images.is_cuda else None))
        if not images.is_cuda or len(waiting) > AHEAD:
            yield _arrived(*waiting.popleft())
    while waiting:
        yield _arrived(*waiting.popleft())


def _arrived(found: Predictions, event: torch.cuda.Event | None) -> Predictions:
    if event is not None:
        event.synchronize()
    return found


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
