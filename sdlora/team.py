"""One fit on several devices: each member takes a share of every batch, and what it adds up is shared.

Every member holds the whole fit and takes the same steps on it; only the images of a batch are divided. What has to be
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

PATIENCE = timedelta(minutes=10)
"""How long a member waits for the others: for the slowest to have read its images, at most."""


@dataclass(frozen=True)
class Team:
    """Who takes part in a fit. By itself, a fit on one device."""

    member: int = 0
    """Which one this process is."""
    size: int = 1

    def share(self, batch: Tensor) -> Tensor:
        """This member's part of a batch. The shares of all, one after the other, are the batch. May be empty."""
        return batch.tensor_split(self.size)[self.member] if self.size > 1 else batch

    def wait(self) -> None:
        """Wait until all members have come here."""
        if self.size > 1:
            distributed.barrier()

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Put the sum over all members in place of these tensors, of one type and device. The same bits at all."""
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        distributed.all_reduce(flat)
        for tensor, total in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))


ALONE = Team()


def join_team(member: int, size: int, *, meeting: Path, device: torch.device) -> Team:
    """Meet the other members, each a process of this machine, at a file that none has made before.

    Raises:
        RuntimeError: the others did not come, or one has gone.
    """
    if size == 1:
        return ALONE
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(name, "lo")  # all are on this machine
    distributed.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=meeting.resolve().as_uri(),
        rank=member,
        world_size=size,
        timeout=PATIENCE,
    )
    return Team(member, size)
