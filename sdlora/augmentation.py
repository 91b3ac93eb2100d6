"""Random resized crop and horizontal flip of a whole batch, on the device that holds it."""

import math

import torch
from torch import Tensor

ASPECT_RATIOS = (3 / 4, 4 / 3)


def crop_and_flip(images: Tensor, *, crop_scale: float, flip: bool, generator: torch.Generator) -> Tensor:
    """Crop a share of the area of each image, resized back to the full size, and flip half of them.

    Args:
        images: (batch, channels, height, width), floating point.
        crop_scale: smallest share of the area that a crop keeps; 1.0 leaves the images uncropped.
        flip: whether each image is mirrored with probability one half.
        generator: a CPU generator; the draws do not depend on the device.

    Returns:
        Images of the same shape. The crop's area is uniform in [crop_scale, 1] and its aspect ratio log-uniform in
        [3/4, 4/3], clipped to the image, as in torchvision's `RandomResizedCrop`; bilinear.
    """
    if crop_scale == 1.0 and not flip:
        return images
    count = len(images)
    draws = torch.rand(count, 5, generator=generator)
    height = width = torch.ones(count)
    if crop_scale < 1.0:
        area = crop_scale + (1 - crop_scale) * draws[:, 0]
        low, high = (math.log(ratio) for ratio in ASPECT_RATIOS)
        ratio = torch.exp(low + (high - low) * draws[:, 1])
        width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    mirrored = torch.where(draws[:, 4] < 0.5, -1.0, 1.0) if flip else torch.ones(count)
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = width * mirrored, height
    theta[:, 0, 2], theta[:, 1, 2] = (1 - width) * (2 * draws[:, 2] - 1), (1 - height) * (2 * draws[:, 3] - 1)
    grid = torch.nn.functional.affine_grid(
        theta.to(images.device, images.dtype), list(images.shape), align_corners=False
    )
    return torch.nn.functional.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
