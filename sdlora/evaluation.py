"""Task-agnostic evaluation: one forward pass, every class seen so far is a candidate."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sdlora.classifier import IncrementalClassifier
from sdlora.preprocessing import normalise
from sdlora.products import by_onednn

_AHEAD = 2
"""Batches that a GPU may have before it when the host waits for the result of the first."""


class _Predictions(NamedTuple):
    """For each image the predicted class index (n,) int64 and its softmax probability (n,) float32."""

    classes: Tensor
    confidences: Tensor
    scores: Tensor | None = None
    """How much each looks like none of the classes (n,) float32, of a model with a threshold."""


def predict_batches(
    model: nn.Module,
    batches: Iterable[Tensor],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device,
    bf16: bool = False,
) -> Iterator[_Predictions]:
    """Predict batches of uint8 images (n, channels, height, width) in order, on the CPU. No task id is used.

    Args:
        bf16: whether the backbone computes in bfloat16 (autocast).
    """
    like = next(model.parameters())

    def predict(images: Tensor) -> tuple[Tensor, ...]:
        scores: list[Tensor] = []
        with torch.autocast(device.type, dtype=torch.bfloat16) if bf16 else by_onednn(device):
            normal = normalise(images, mean=mean, std=std).to(like.dtype)
            if isinstance(model, IncrementalClassifier) and model.unknown is not None:
                logits, *scores = model.scored(normal)
            else:
                logits = model(normal)
        confidences, classes = logits.float().softmax(dim=1).max(dim=1)
        return classes, confidences, *scores

    for found in _results(predict, batches, device):
        yield _Predictions(*found)


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

    def features(some: Tensor) -> tuple[Tensor, ...]:
        normal = normalise(some, mean=mean, std=std).to(like.dtype)
        with by_onednn(device):
            return (model.features(normal).float(),)  # type: ignore[operator]

    for (found,) in _results(features, images.split(batch_size), device):
        yield found


@torch.inference_mode()
def _results(
    compute: Callable[[Tensor], tuple[Tensor, ...]], batches: Iterable[Tensor], device: torch.device
) -> Iterator[tuple[Tensor, ...]]:
    """Yield what is computed of each batch, on the CPU, in order.

    A GPU is given the next batches before the result of the first is waited for, so it never stands still for the host;
    from pinned memory a batch is copied while it computes.
    """
    waiting: deque[tuple[tuple[Tensor, ...], torch.cuda.Event | None]] = deque()
    for batch in batches:
        results = compute(batch.to(device, non_blocking=True))
        # From a GPU this is a copy into pinned memory, and whole when the event has come.
        found = tuple(result.to("cpu", non_blocking=True) for result in results)
        on_gpu = results[0].is_cuda
        waiting.append((found, torch.cuda.current_stream(device).record_event() if on_gpu else None))
        if len(waiting) > (_AHEAD if on_gpu else 0):
            yield _arrived(*waiting.popleft())
    while waiting:
        yield _arrived(*waiting.popleft())


def _arrived(found: tuple[Tensor, ...], event: torch.cuda.Event | None) -> tuple[Tensor, ...]:
    if event is not None:
        event.synchronize()
    return found
