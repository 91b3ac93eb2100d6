"""Low-rank directions on the linear projections of a timm vision transformer's blocks."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

TARGETS = ("q", "k", "v", "proj", "fc1", "fc2")
"""What can be adapted in a block: the attention's projections, its output, and the two layers of the MLP."""


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


def initial_factors(
    rows: int, columns: int, rank: int, *, generator: torch.Generator, up: str = "zero"
) -> Factors:
    """Return A (rank, columns) ~ U(−1/√columns, 1/√columns), as the released code starts it, and B (rows, rank).

    Args:
        up: `zero`, as the released code, which leaves the model's output as it is; or `uniform`, with the bound
            of A, so that the direction has a norm (about √rank / 3 for a square target) and can be normalised.

    The uniform bound of A is that of `kaiming_uniform_(a=√5)`.
    """
    bound = 1 / math.sqrt(columns)
    down = torch.empty(rank, columns).uniform_(-bound, bound, generator=generator)
    start = torch.zeros(rows, rank)
    if up == "uniform":
        start.uniform_(-bound, bound, generator=generator)
    return Factors(up=start, down=down)


def truncate(factors: Factors, *, energy: float) -> Factors:
    """Return the best approximation of BA of the smallest rank that holds a share `energy` of ‖BA‖²_F (0 < energy ≤ 1).

    From the QR decompositions of both factors and the SVD of an r×r matrix; the singular values are shared out
    over the two new factors. A direction that is zero stays as it is.
    """
    left, upper = torch.linalg.qr(factors.up.double())
    right, lower = torch.linalg.qr(factors.down.double().T)
    u, values, v = torch.linalg.svd(upper @ lower.T)
    held = values.square().cumsum(0)
    if not held[-1] > 0:
        return factors
    # The sum of all has a rounding error; a share of 1 must keep every direction.
    kept = min(int((held < energy * held[-1]).sum()) + 1, len(values))
    root = values[:kept].sqrt()
    return Factors(
        up=((left @ u[:, :kept]) * root).to(factors.up.dtype).contiguous(),
        down=(root[:, None] * (v[:kept] @ right.T)).to(factors.down.dtype).contiguous(),
    )


class Directions(nn.Module):
    """All directions at one target: those of earlier tasks frozen and stacked, the current one trained.

    `update()` is Σ αₖ BₖAₖ (rows, columns), from the stacked factors of the earlier tasks in one product and
    the current task's factors in a second one, so its cost grows only with the sum of the ranks and no
    gradient is built for a frozen factor. `magnitudes` (number of tasks,) holds αₖ, the newest last; it is one
    and the same parameter at every target where the formulation shares it. With a `norm` the current direction
    is divided by it wherever it is used, as the paper's Eq. 4 has it.
    """

    stacked_up: Tensor
    stacked_down: Tensor
    owner: Tensor

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.rows, self.columns = rows, columns
        self.register_buffer("stacked_up", torch.zeros(rows, 0), persistent=False)
        self.register_buffer("stacked_down", torch.zeros(0, columns), persistent=False)
        self.register_buffer("owner", torch.zeros(0, 0), persistent=False)
        self.up: nn.Parameter | None = None
        self.down: nn.Parameter | None = None
        self.magnitudes: nn.Parameter | None = None
        self.trains_earlier = True
        self.norm: Callable[[Factors], Tensor] | None = None

    def set_frozen(
        self, frozen: list[Factors], magnitudes: nn.Parameter, *, trains_earlier: bool = True
    ) -> None:
        """Hold the directions of earlier tasks, in task order, scaled by the first entries of `magnitudes`.

        Args:
            trains_earlier: whether a gradient reaches these entries.
        """
        if frozen:
            self.stacked_up = torch.cat([factors.up for factors in frozen], dim=1)
            self.stacked_down = torch.cat([factors.down for factors in frozen], dim=0)
            # (Σr, tasks) of ones and zeros: a product with it, forward and back, costs less than gathering αₖ by
            # rank and scattering its gradient, and repeats to the bit on every device.
            ranks = torch.tensor([factors.down.shape[0] for factors in frozen])
            self.owner = torch.repeat_interleave(torch.eye(len(frozen)), ranks, dim=0).to(frozen[0].up)
        self.magnitudes, self.trains_earlier = magnitudes, trains_earlier

    def set_current(
        self,
        factors: Factors,
        *,
        norm: Callable[[Factors], Tensor] | None = None,
        train_down: bool = True,
    ) -> None:
        """Train `factors` as the newest direction, scaled by the last entry of the magnitudes."""
        self.up = nn.Parameter(factors.up.clone())
        self.down = nn.Parameter(factors.down.clone(), requires_grad=train_down)
        self.norm = norm

    def update(self) -> Tensor | None:
        """Σ αₖ BₖAₖ (rows, columns), or None where there is no direction at all."""
        if self.magnitudes is None:
            return None
        update = None
        if self.owner.numel():
            earlier = self.magnitudes[: self.owner.shape[1]]
            scales = self.owner @ (earlier if self.trains_earlier else earlier.detach())
            update = (self.stacked_up * scales) @ self.stacked_down
        if self.up is not None and self.down is not None:
            scale = self.magnitudes[-1]
            if self.norm is not None:
                scale = scale / self.norm(Factors(self.up, self.down))
            current = (self.up * scale) @ self.down
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

    @torch.no_grad()
    def summed(self, rows: int) -> Factors | None:
        """Return all frozen directions of a weight of so many rows as one B·A of the summed rank, magnitudes within B.

        B (rows, Σr) is zero outside the rows of the block that a direction belongs to; None where there is none.
        """
        ups, downs = [], []
        for (start, stop), directions in self._blocks.items():
            if directions.magnitudes is None or not directions.owner.numel():
                continue
            scales = directions.owner @ directions.magnitudes[: directions.owner.shape[1]]
            up = directions.stacked_up.new_zeros(rows, len(scales))
            up[start:stop] = directions.stacked_up * scales
            ups.append(up)
            downs.append(directions.stacked_down)
        return Factors(torch.cat(ups, dim=1), torch.cat(downs)) if ups else None


def _projections(
    backbone: nn.Module, targets: Sequence[str]
) -> Iterator[tuple[str, nn.Linear, dict[str, tuple[int, int]]]]:
    """Yield the linear layers that hold the targets, each with the rows of every target in it, in the model's order."""
    for index, block in enumerate(getattr(backbone, "blocks", ())):
        attention, mlp = getattr(block, "attn", None), getattr(block, "mlp", None)
        prefix = f"blocks.{index}"
        wanted = [letter for letter in "qkv" if letter in targets]
        fused = getattr(attention, "qkv", None)
        if isinstance(fused, nn.Linear):
            third = fused.out_features // 3
            rows = {
                letter: ("qkv".index(letter) * third, ("qkv".index(letter) + 1) * third) for letter in wanted
            }
            if rows:
                yield f"{prefix}.attn", fused, rows
        else:
            for letter in wanted:
                layer = getattr(attention, f"{letter}_proj", None)
                found = f"neither a linear `attn.qkv` nor `attn.{letter}_proj`"
                yield f"{prefix}.attn", *_whole(backbone, index, letter, layer, found)
        for name, home, place in (("proj", attention, "attn"), ("fc1", mlp, "mlp"), ("fc2", mlp, "mlp")):
            # A gated MLP (SwiGLU) may have its first layer in two parts.
            gated = name == "fc1" and hasattr(mlp, "fc1_g")
            for part in ("fc1_g", "fc1_x") if gated else (name,):
                if name in targets:
                    layer = getattr(home, part, None)
                    yield (
                        f"{prefix}.{place}",
                        *_whole(backbone, index, part, layer, f"no linear `{place}.{part}`"),
                    )


def _whole(
    backbone: nn.Module, index: int, name: str, layer: nn.Module | None, missing: str
) -> tuple[nn.Linear, dict[str, tuple[int, int]]]:
    """Return a layer that is one target by itself."""
    if not isinstance(layer, nn.Linear):
        raise ValueError(
            f"{type(backbone).__name__}: block {index} has {missing}; choose a backbone of timm's vision "
            "transformers, or other adapter.targets"
        )
    return layer, {name: (0, layer.out_features)}


def projection_norms(backbone: nn.Module) -> dict[str, float]:
    """‖W₀‖_F of everything in `backbone` that can be adapted, by target name, to six significant digits.

    What every change of a weight is measured against (`sdlora.change`), so that nobody has to read the weights again.
    """
    norms = {}
    for target in TARGETS:
        with suppress(ValueError):  # a backbone need not have them all
            for prefix, layer, rows in _projections(backbone, (target,)):
                weight = layer.weight.detach().double().numpy()
                for name, (start, stop) in rows.items():
                    norms[f"{prefix}.{name}"] = float(f"{np.linalg.norm(weight[start:stop]):.6g}")
    return norms


def target_of(name: str) -> str:
    """Return which of `TARGETS` an adapted layer is (`blocks.0.attn.q` → `q`. Both halves of a gated `fc1` → `fc1`)."""
    return name.rpartition(".")[2].partition("_")[0]


def inject_adapters(backbone: nn.Module, targets: Sequence[str] = ("q", "v")) -> dict[str, Directions]:
    """Freeze `backbone` and adapt the `targets` (of `TARGETS`) of its every block, in place.

    The model's own code is not touched: the weight of each projection is parametrised, so every timm vision
    transformer that has the projections (fused or split, with or without separate biases) is adapted alike.

    Returns:
        The directions by target name (`blocks.0.attn.q`, `blocks.0.attn.v`, …, `blocks.0.mlp.fc1`), still empty:
        the output is the frozen model's. Their order is the model's, whatever the order of `targets`.

    Raises:
        ValueError: `backbone` has no such projections.
    """
    backbone.requires_grad_(False)
    found: dict[str, Directions] = {}
    for prefix, layer, rows in _projections(backbone, targets):
        blocks = {(start, stop): Directions(stop - start, layer.in_features) for start, stop in rows.values()}
        parametrize.register_parametrization(layer, "weight", AdaptedWeight(blocks))
        found |= {f"{prefix}.{name}": blocks[span] for name, span in rows.items()}
    if targets and not found:
        raise ValueError(
            f"{type(backbone).__name__} has no `blocks` with attention; choose one of timm's vision transformers"
        )
    return found


@torch.no_grad()
def merge_adapters(backbone: nn.Module) -> None:
    """Put W₀ + Σ αₖDₖ in place of every parametrised weight: `backbone` is a plain timm model afterwards."""
    for module in list(backbone.modules()):
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
