"""The classifier that grows by one block of rows for each task: linear, or with a square for each class."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn


class HeadBlock(NamedTuple):
    """The rows of one task's classes: `weight` (classes, features), `bias` (classes,)."""

    weight: Tensor
    bias: Tensor


class QuadraticBlock(NamedTuple):
    """The rows of one task's classes with half a sum of k squares for each: ½ Σ_j (products[c, j] · f − offsets[c, j])²
    is added to the logit of class c.
    """

    weight: Tensor
    """(classes, features)."""
    bias: Tensor
    """(classes,)."""
    products: Tensor
    """(classes, k, features)."""
    offsets: Tensor
    """(classes, k)."""


HeadRows = HeadBlock | QuadraticBlock


def initial_block(
    classes: int, features: int, *, generator: torch.Generator, deviation: float | None = None
) -> HeadBlock:
    """Weights ~ U(−√3·deviation, √3·deviation) and bias 0.

    Without a deviation it is 1/√features, as in the released code (backbone/linears.py:27-29).
    """
    bound = math.sqrt(3 / features) if deviation is None else math.sqrt(3) * deviation
    weight = torch.empty(classes, features).uniform_(-bound, bound, generator=generator)
    return HeadBlock(weight=weight, bias=torch.zeros(classes))


def block_logits(blocks: Iterable[HeadRows], features: Tensor) -> Tensor:
    """Logits (…, all classes of the blocks) of features (…, d), in the type of the features."""
    held = list(blocks)
    weight = torch.cat([block.weight for block in held]).to(features.dtype)
    bias = torch.cat([block.bias for block in held]).to(features.dtype)
    found = features @ weight.T + bias
    parts = found.split([len(block.bias) for block in held], dim=-1)
    for part, block in zip(parts, held, strict=True):
        if isinstance(block, QuadraticBlock):
            part += _half_squares(
                features, block.products.to(features.dtype), block.offsets.to(features.dtype)
            )
    return found


def _half_squares(features: Tensor, products: Tensor, offsets: Tensor) -> Tensor:
    """(…, classes): half the sum of the squares of each class."""
    found = (features @ products.flatten(0, 1).T).unflatten(-1, offsets.shape)
    return (found - offsets).square().sum(dim=-1) / 2


class GrowingHead(nn.Module):
    """One block per task, outputs concatenated in order of arrival. Earlier blocks are frozen.

    Growing copies nothing and nothing writes to an earlier block; each block is a product of its own, so the logits
    of earlier classes do not move by a bit when a block is added.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()
        self.squares = nn.ModuleDict()
        """Place of a block → what it adds to its linear part; most have none."""

    def grow(self, block: HeadRows) -> None:
        """Append a `block`. Nothing is trained until `train_newest` says so."""
        if isinstance(block, QuadraticBlock):
            self.squares[str(len(self.weights))] = _Squares(block)
        self.weights.append(nn.Parameter(block.weight.clone(), requires_grad=False))
        self.biases.append(nn.Parameter(block.bias.clone(), requires_grad=False))

    def train_newest(self, blocks: int) -> None:
        """Train the newest `blocks` blocks of rows (all of them where a method learns all tasks at once)."""
        for parameter in [*list(self.weights)[-blocks:], *list(self.biases)[-blocks:]]:
            parameter.requires_grad_(True)

    def newest(self, features: Tensor, *, blocks: int = 1) -> Tensor:
        """Logits (batch, classes of the newest `blocks` tasks)."""
        found = []
        for place, (weight, bias) in list(enumerate(zip(self.weights, self.biases, strict=True)))[-blocks:]:
            logits = nn.functional.linear(features, weight, bias)
            if str(place) in self.squares:
                logits = logits + self.squares[str(place)](features)
            found.append(logits)
        return torch.cat(found, dim=1)

    def forward(self, features: Tensor) -> Tensor:
        """Logits (batch, all classes so far) of features (batch, features)."""
        return self.newest(features, blocks=len(self.weights))


class _Squares(nn.Module):
    """What a quadratic block adds to its linear part."""

    def __init__(self, block: QuadraticBlock) -> None:
        super().__init__()
        self.products = nn.Parameter(block.products.clone(), requires_grad=False)
        self.offsets = nn.Parameter(block.offsets.clone(), requires_grad=False)

    def forward(self, features: Tensor) -> Tensor:
        """(batch, classes) of features (batch, d)."""
        return _half_squares(features, self.products, self.offsets)
