"""From stored pixels to what the backbone expects."""

from collections.abc import Sequence

import torch
from torch import Tensor


def normalise(images: Tensor, *, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 images (batch, channels, height, width) as floats, scaled to [0, 1], then (x − mean) / std by channel."""
    shape = (1, -1, 1, 1)
    centre = torch.tensor(mean, device=images.device, dtype=torch.float32).view(shape)
    scale = torch.tensor(std, device=images.device, dtype=torch.float32).view(shape)
    return (images.float() / 255 - centre) / scale
