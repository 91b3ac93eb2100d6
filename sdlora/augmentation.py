"""Random resized crop and horizontal flip of a whole batch, on the device that holds it."""

import math

import torch
from torch import Tensor

_ASPECT_RATIOS = (3 / 4, 4 / 3)
_TRIES = 10
"""How often a box that does not fit into the image is drawn anew before the whole image is taken."""
DRAWS = 2 * _TRIES + 3
"""Uniform numbers that an image takes: areas and aspect ratios of all tries, two places, and the flip."""


def crop_and_flip(images: Tensor, *, crop_scale: float, flip: bool, draws: Tensor) -> Tensor:
    """Crop a share of the area of each image, resized back to the full size, and flip half of them.

    Args:
        images: (batch, channels, height, width), floating point.
        crop_scale: smallest share of the area that a crop keeps; 1.0 leaves the images uncropped.
        flip: whether each image is mirrored with probability one half.
        draws: (batch, DRAWS), uniform in [0, 1), on the CPU, so that they do not depend on the device.

    Returns:
        Images of the same shape, as torchvision's `RandomResizedCrop` (bilinear; a crop is never larger than what it is
        resized to, so there is nothing to smooth) and `RandomHorizontalFlip` make them of the same boxes.
    """
    if crop_scale == 1.0 and not flip:
        return images
    height, width = images.shape[-2:]
    if crop_scale < 1.0:
        boxes = random_boxes(height, width, crop_scale=crop_scale, draws=draws)
    else:
        boxes = torch.tensor([[0.0, 0.0, height, width]]).expand(len(images), 4)
    rows = _source(boxes[:, 0], boxes[:, 2], height)
    columns = _source(boxes[:, 1], boxes[:, 3], width)
    if flip:
        columns = torch.where(draws[:, -1:] < 0.5, columns.flip(1), columns)
    rows, columns = (part.to(images.device, images.dtype, non_blocking=True) for part in (rows, columns))
    grid = torch.stack(
        [
            columns[:, None, :].expand(-1, height, -1),
            rows[:, :, None].expand(-1, -1, width),
        ],
        dim=-1,
    )
    return torch.nn.functional.grid_sample(images, grid, padding_mode="border", align_corners=False)


def random_boxes(height: int, width: int, *, crop_scale: float, draws: Tensor) -> Tensor:
    """Boxes (batch, 4) of whole pixels (top, left, height, width), as torchvision's `RandomResizedCrop` draws them.

    The area is uniform in [crop_scale, 1] of the image's and the aspect ratio log-uniform in [3/4, 4/3]; a box that
    does not fit is drawn anew, ten times at most, and then it is the largest in the middle with an allowed ratio.
    """
    low, high = (math.log(ratio) for ratio in _ASPECT_RATIOS)
    area = height * width * (crop_scale + (1 - crop_scale) * draws[:, :_TRIES].double())
    ratio = torch.exp(low + (high - low) * draws[:, _TRIES : 2 * _TRIES].double())
    widths, heights = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    first = fits.to(torch.uint8).argmax(dim=1, keepdim=True)
    found = fits.any(dim=1)
    widest = min(width, round(height * _ASPECT_RATIOS[1]))
    highest = min(height, round(width / _ASPECT_RATIOS[0]))
    chosen_width = torch.where(found, widths.gather(1, first)[:, 0], float(widest))
    chosen_height = torch.where(found, heights.gather(1, first)[:, 0], float(highest))
    room_below, room_right = height - chosen_height, width - chosen_width
    top = torch.where(
        found, (draws[:, 2 * _TRIES].double() * (room_below + 1)).floor(), (room_below / 2).floor()
    )
    left = torch.where(
        found, (draws[:, 2 * _TRIES + 1].double() * (room_right + 1)).floor(), (room_right / 2).floor()
    )
    return torch.stack([top, left, chosen_height, chosen_width], dim=1)


def _source(start: Tensor, length: Tensor, size: int) -> Tensor:
    """Return where the `size` pixels of a row come from, (batch, size) in [−1, 1].

    Nothing beyond a box's edge is seen.
    """
    pixels = torch.arange(size, dtype=torch.float64)
    start, length = start.double()[:, None], length.double()[:, None]
    places = start + ((pixels + 0.5) * length / size - 0.5).clamp(torch.zeros_like(length), length - 1)
    return (2 * places + 1) / size - 1
