"""One fit on several devices, of one machine or more: each rank takes a share of every batch, and what it adds up is
shared.

Every rank holds the whole fit and takes the same steps on it; only the images of a batch are divided. What has to be
exchanged is the sum of the gradients of factors, magnitudes and head, which is small, so one exchange follows the
backward pass, and nothing stands between the model and plain torch.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor, distributed

_TIMEOUT = timedelta(minutes=10)
"""How long a rank waits for the others: for the slowest to have read its images, at most."""


@dataclass(frozen=True)
class ProcessGroup:
    """Who takes part in a fit. By itself, a fit on one device."""

    rank: int = 0
    """Which one this process is."""
    size: int = 1

    def share(self, batch: Tensor) -> Tensor:
        """Return this rank's part of a batch. The shares of all, one after the other, are the batch. May be empty."""
        return batch.tensor_split(self.size)[self.rank] if self.size > 1 else batch

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Put the sum over all ranks in place of these tensors, of one type and device. The same bits at all.

        Raises:
            DistError: one has gone.
        """
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        with _answered():
            distributed.all_reduce(flat)
        for tensor, total in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))

    def spread(self, data: bytes, *, device: torch.device) -> bytes:
        """Return the bytes that the first rank gives, which are at least one. What the others give is not read.

        Raises:
            DistError: one has gone.
        """
        size = torch.tensor(len(data), device=device)
        with _answered():
            distributed.broadcast(size, 0)
            content = torch.empty(int(size), dtype=torch.uint8, device=device)
            if self.rank == 0:
                content.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
            distributed.broadcast(content, 0)
        return content.cpu().numpy().tobytes()

    def leave(self) -> None:
        """Take leave of the others, with whom another fit may be shared after this one."""
        if self.size > 1:
            distributed.destroy_process_group()


SINGLE = ProcessGroup()


def join_group(
    rank: int, size: int, *, store: distributed.Store | None, device: torch.device
) -> ProcessGroup:
    """Meet the other ranks at a store that no group has met at before. One that is alone needs none.

    Raises:
        DistError: the others did not come, or one has gone.
    """
    if size == 1:
        return SINGLE
    with _answered():
        distributed.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=rank,
            world_size=size,
            timeout=_TIMEOUT,
        )
    return ProcessGroup(rank, size)


@contextlib.contextmanager
def _answered() -> Iterator[None]:
    """Raise torch's error of a lost rank for whatever a backend raises: gloo has none of its own."""
    try:
        yield
    except RuntimeError as error:
        raise distributed.DistError(str(error).strip().partition("\n")[0]) from error
