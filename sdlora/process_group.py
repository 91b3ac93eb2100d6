"""One fit on several devices: each rank takes a share of every batch, and what it adds up is shared.

Every rank holds the whole fit and takes the same steps on it; only the images of a batch are divided. What has to be
exchanged is the sum of the gradients of factors, magnitudes and head, which is small, so one exchange follows the
backward pass, and nothing stands between the model and plain torch.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

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

    def wait(self) -> None:
        """Wait until all ranks have come here."""
        if self.size > 1:
            distributed.barrier()

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Put the sum over all ranks in place of these tensors, of one type and device. The same bits at all."""
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        distributed.all_reduce(flat)
        for tensor, total in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))


SINGLE = ProcessGroup()


def join_group(rank: int, size: int, *, meeting: Path, device: torch.device) -> ProcessGroup:
    """Meet the other ranks, each a process of this machine, at a file that none has made before.

    Raises:
        RuntimeError: the others did not come, or one has gone.
    """
    if size == 1:
        return SINGLE
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(name, "lo")  # all are on this machine
    distributed.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=meeting.resolve().as_uri(),
        rank=rank,
        world_size=size,
        timeout=_TIMEOUT,
    )
    return ProcessGroup(rank, size)
