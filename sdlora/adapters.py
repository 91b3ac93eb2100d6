"""Low-rank directions on the query and value projections of a timm vision transformer."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class Factors(NamedTuple):
    """The two factors of a low-rank matrix B·A: `up` is B (out, r), `down` is A (r, in)."""

    up: Tensor
    down: Tensor


def product_norm(factors: Factors) -> Tensor:
    """‖BA‖_F as a scalar, from two r×r Gram matrices: ‖BA‖² = tr((BᵀB)(AAᵀ))."""
    up, down = factors.up.double(), factors.down.double()
    squared = ((up.T @ up) * (down @ down.T)).sum()
    return squared.clamp_min(0).sqrt().to(factors.up.dtype)


def factor_norms(factors: Factors) -> Tensor:
    """‖B‖_F·‖A‖_F as a scalar, the normaliser of the authors' released code (backbone/lora.py:182-188)."""
    return (factors.up.double().norm() * factors.down.double().norm()).to(factors.up.dtype)


def initial_factors(rows: int, columns: int, rank: int, *, generator: torch.Generator) -> Factors:
    """B = 0 (rows, rank) and A (rank, columns) ~ U(−1/√columns, 1/√columns), as the released code starts them.

    The uniform bound is that of `kaiming_uniform_(a=√5)`. With B = 0 the model's output does not change.
    """
    bound = 1 / math.sqrt(columns)
    down = torch.empty(rank, columns).uniform_(-bound, bound, generator=generator)
    return Factors(up=torch.zeros(rows, rank), down=down)


class Directions(nn.Module):
    """All directions at one target: those of earlier tasks frozen and stacked, the current one trained.

    `update()` is Σ αₖ BₖAₖ (rows, columns), from the stacked factors of the earlier tasks in one product and
    the current task's factors in a second one, so its cost grows only with the sum of the ranks and no
    gradient is built for a frozen factor. `magnitudes` (number of tasks,) holds αₖ, the newest last; it is one
    and the same parameter at every target where the formulation shares it.
    """

    stacked_up: Tensor
    stacked_down: Tensor
    task_of_rank: Tensor

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.rows, self.columns = rows, columns
        self.register_buffer("stacked_up", torch.zeros(rows, 0), persistent=False)
        self.register_buffer("stacked_down", torch.zeros(0, columns), persistent=False)
        self.register_buffer("task_of_rank", torch.zeros(0, dtype=torch.long), persistent=False)
        self.up: nn.Parameter | None = None
        self.down: nn.Parameter | None = None
        self.magnitudes: nn.Parameter | None = None

    def set_frozen(self, frozen: list[Factors], magnitudes: nn.Parameter) -> None:
        """Hold the directions of earlier tasks, in task order, scaled by the first entries of `magnitudes`."""
        if frozen:
            self.stacked_up = torch.cat([factors.up for factors in frozen], dim=1)
            self.stacked_down = torch.cat([factors.down for factors in frozen], dim=0)
            ranks = torch.tensor([factors.down.shape[0] for factors in frozen])
            self.task_of_rank = torch.repeat_interleave(torch.arange(len(frozen)), ranks)
        self.magnitudes = magnitudes

    def set_current(self, factors: Factors) -> None:
        """Train `factors` as the newest direction, scaled by the last entry of the magnitudes."""
        self.up = nn.Parameter(factors.up.clone())
        self.down = nn.Parameter(factors.down.clone())

    def update(self) -> Tensor | None:
        """Σ αₖ BₖAₖ (rows, columns), or None where there is no direction at all."""
        if self.magnitudes is None:
            return None
        update = None
        if self.task_of_rank.numel():
            update = (self.stacked_up * self.magnitudes[self.task_of_rank]) @ self.stacked_down
        if self.up is not None and self.down is not None:
            current = (self.up * self.magnitudes[-1]) @ self.down
            update = current if update is None else update + current
        return update


class AdaptedWeight(nn.Module):
    """Parametrisation of a projection's weight: W₀ (rows, columns) plus the update of each adapted block of rows."""

    def __init__(self, blocks: Mapping[tuple[int, int], Directions]) -> None:
        super().__init__()
        self._blocks = dict(blocks)
        # Registered under their own list too, so that torch moves and counts their parameters.
        self.directions = nn.ModuleList(blocks.values())

    def forward(self, weight: Tensor) -> Tensor:
        # In full precision under autocast too: the sum is rounded once, by the layer, and not each term.
        with torch.autocast(weight.device.type, enabled=False):
            pieces, end = [], 0
            for (start, stop), directions in self._blocks.items():
                rows, update = weight[start:stop], directions.update()
                pieces += [weight[end:start], rows if update is None else rows + update]
                end = stop
            return torch.cat([*pieces, weight[end:]])


def _projections(backbone: nn.Module) -> Iterator[tuple[str, nn.Linear, dict[str, tuple[int, int]]]]:
    """The linear layers that hold query and value, each with its rows of either: fused and split ones alike."""
    for index, block in enumerate(getattr(backbone, "blocks", ())):
        attention = getattr(block, "attn", None)
        fused = getattr(attention, "qkv", None)
        if isinstance(fused, nn.Linear):
            third = fused.out_features // 3
            yield f"blocks.{index}.attn", fused, {"q": (0, third), "v": (2 * third, 3 * third)}
            continue
        for letter in "qv":
            split = getattr(attention, f"{letter}_proj", None)
            if not isinstance(split, nn.Linear):
                raise ValueError(
                    f"{type(backbone).__name__}: block {index} has neither a linear `attn.qkv` nor "
                    f"`attn.{letter}_proj`; "
                    "choose a backbone of timm's vision transformers"
                )
            yield f"blocks.{index}.attn", split, {letter: (0, split.out_features)}


def inject_adapters(backbone: nn.Module) -> dict[str, Directions]:
    """Freeze `backbone` and adapt the query and value projections of its every block, in place.

    The model's own code is not touched: the weight of each projection is parametrised, so every timm vision
    transformer that has the projections (fused or split, with or without separate biases) is adapted alike.

    Returns:
        The directions by target name (`blocks.0.attn.q`, `blocks.0.attn.v`, …), still empty: the output is the
        frozen model's.

    Raises:
        ValueError: `backbone` has no such projections.
    """
    backbone.requires_grad_(False)
    targets: dict[str, Directions] = {}
    for prefix, layer, letters in _projections(backbone):
        blocks = {
            (start, stop): Directions(stop - start, layer.in_features) for start, stop in letters.values()
        }
        parametrize.register_parametrization(layer, "weight", AdaptedWeight(blocks))
        targets |= {f"{prefix}.{letter}": blocks[span] for letter, span in letters.items()}
    if not targets:
        raise ValueError(
            f"{type(backbone).__name__} has no `blocks` with attention; choose one of timm's vision transformers"
        )
    return targets


@torch.no_grad()
def merge_adapters(backbone: nn.Module) -> None:
    """Put W₀ + Σ αₖDₖ in place of every parametrised weight: `backbone` is a plain timm model afterwards."""
    for module in list(backbone.modules()):
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)


@contextmanager
def formed_once() -> Iterator[None]:
    """Within this block every adapted weight is formed at its first use only (micro-batches, several passes)."""
    with parametrize.cached():
        yield
