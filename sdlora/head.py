"""The linear classifier that grows by one block of rows for each task."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn


class HeadBlock(NamedTuple):
    """The rows of one task's classes: `weight` (classes, features), `bias` (classes,)."""

    weight: Tensor
    bias: Tensor


def initial_block(
    classes: int, features: int, *, generator: torch.Generator, deviation: float | None = None
) -> HeadBlock:
    """Weights ~ U(−√3·deviation, √3·deviation) and bias 0.

    Without a deviation it is 1/√features, as in the released code (backbone/linears.py:27-29).
    """
    bound = math.sqrt(3 / features) if deviation is None else math.sqrt(3) * deviation
    weight = torch.empty(classes, features).uniform_(-bound, bound, generator=generator)
    return HeadBlock(weight=weight, bias=torch.zeros(classes))


class GrowingHead(nn.Module):
    """One linear block per task, outputs concatenated in order of arrival. Earlier blocks are frozen.

    Growing copies nothing and nothing writes to an earlier block; each block is a product of its own, so the logits
    of earlier classes do not move by a bit when a block is added.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()

    def grow(self, block: HeadBlock) -> None:
        """Append a `block`. Nothing is trained until `train_newest` says so."""
        self.weights.append(nn.Parameter(block.weight.clone(), requires_grad=False))
        self.biases.append(nn.Parameter(block.bias.clone(), requires_grad=False))

    def train_newest(self, blocks: int) -> None:
        """Train the newest `blocks` blocks of rows (all of them where a method learns all tasks at once)."""
        for parameter in [*list(self.weights)[-blocks:], *list(self.biases)[-blocks:]]:
            parameter.requires_grad_(True)

    def newest(self, features: Tensor, *, blocks: int = 1) -> Tensor:
        """Logits (batch, classes of the newest `blocks` tasks)."""
        pairs = zip(list(self.weights)[-blocks:], list(self.biases)[-blocks:], strict=True)
        return torch.cat([nn.functional.linear(features, weight, bias) for weight, bias in pairs], dim=1)

    def forward(self, features: Tensor) -> Tensor:
        """Logits (batch, all classes so far) of features (batch, features)."""
        return self.newest(features, blocks=len(self.weights))
