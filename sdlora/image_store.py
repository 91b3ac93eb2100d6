"""The training images of a fit, as bytes, where there is room for them: on the device, or else in main memory."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


class ImageStore:
    """Images of several tasks in a row, uint8 (n, channels, height, width). Batches of them come out on the device.

    Where they lie changes no value. In main memory they stay the tensors that they were, so a file that is mapped
    into it is read where a batch needs it.
    """

    def __init__(self, parts: Sequence[Tensor], device: torch.device, *, room: int | None = None) -> None:
        """Hold `parts`, on `device` if they take no more than `room` bytes of it.

        Args:
            room: None is half of what is free on a CUDA device, and all of what any other has.
        """
        self._device = device
        if room is None and device.type == "cuda":
            room = torch.cuda.mem_get_info(device)[0] // 2
        self.on_device = device.type != "cpu" and (room is None or sum(part.nbytes for part in parts) <= room)
        self._parts = [_joined(parts, device)] if self.on_device else list(parts)
        self._ends = torch.tensor([len(part) for part in self._parts]).cumsum(0)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, chosen: Tensor) -> Tensor:
        """Return the images at these indices (batch,), which are on the CPU."""
        if self.on_device:
            return self._parts[0][chosen.to(self._device)]
        if len(self._parts) == 1:
            return self._sent(self._parts[0][chosen])
        owners = torch.bucketize(chosen, self._ends, right=True)
        batch = self._parts[0].new_empty(len(chosen), *self._parts[0].shape[1:])
        for index, part in enumerate(self._parts):
            own = owners == index
            batch[own] = part[chosen[own] - (self._ends[index] - len(part))]
        return self._sent(batch)

    def split(self, size: int) -> Iterator[Tensor]:
        """Yield all images in order, so many at a time."""
        for indices in torch.arange(len(self)).split(size):
            yield self[indices]

    def _sent(self, batch: Tensor) -> Tensor:
        if self._device.type == "cuda":
            return batch.pin_memory().to(self._device, non_blocking=True)
        return batch.to(self._device)


def _joined(parts: Sequence[Tensor], device: torch.device) -> Tensor:
    """Return all parts in a row on a device, where they never lie twice."""
    whole = parts[0].new_empty(sum(len(part) for part in parts), *parts[0].shape[1:], device=device)
    for part, place in zip(parts, whole.split([len(part) for part in parts]), strict=True):
        place.copy_(part)
    return whole
