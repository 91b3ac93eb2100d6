"""InfLoRA (Liang & Li, CVPR 2024): every task learns in input directions that the earlier tasks do not use.

A_t is designed before the fit, from the second moment of the layer's inputs with the span of the earlier tasks' inputs
taken out, and stays; B_t alone is trained, so the step cannot move what the layer says of that span.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from sdlora.adapters import Factors
from sdlora.classifier import IncrementalClassifier, ModelState
from sdlora.methods.method import Batches, Method, Settings, keep_as_trained, new_direction, sum_on

_ENERGY = 0.98
"""Share of the squared singular values of the second moment that the remembered span holds.

The released code raises it over the tasks, from 0.98 towards 1 (ImageNet-R) by a rule that knows how many tasks there
will be; a chain that grows does not, so here it is one number.
"""
_NEGLIGIBLE = 1e-6
"""Singular values below this share of the largest one are rounding."""


def _inputs_of(model: IncrementalClassifier) -> dict[str, list[str]]:
    """Return the modules whose input is that of targets, and those targets: query, key and value share the attention's.

    The attention itself and not its projection, which some models (EVA) never call: they use its weight.
    """
    groups: dict[str, list[str]] = {}
    for name in model.targets:
        home, _, last = name.rpartition(".")
        groups.setdefault(home if last in ("q", "k", "v") else name, []).append(name)
    return groups


@torch.no_grad()
def second_moments(model: IncrementalClassifier, batches: Batches) -> dict[str, Tensor]:
    """XᵀX / tokens (in, in) float64 of the inputs of every adapted module, by its path in the backbone."""
    moments: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    hooks = []
    for path in _inputs_of(model):

        def add(_: torch.nn.Module, inputs: tuple[Tensor, ...], path: str = path) -> None:
            tokens = inputs[0].detach().flatten(0, -2).double()
            moments[path] = moments.get(path, 0) + tokens.T @ tokens
            counts[path] = counts.get(path, 0) + len(tokens)

        hooks.append(model.backbone.get_submodule(path).register_forward_pre_hook(add))
    try:
        for batch in batches():
            model.features(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return {path: moment / counts[path] for path, moment in moments.items()}


def designed_down(moment: Tensor, basis: Tensor | None, *, rank: int) -> Tensor:
    """Return A (rank, in): the leading left singular vectors of M without the span of `basis` (in, m), divided by √3.

    Where fewer than `rank` directions are left the other rows are 0: the released code takes null vectors there, which
    lie in the very span that is to be avoided.
    """
    free = moment if basis is None else moment - basis @ (basis.T @ moment)
    vectors, values, _ = torch.linalg.svd(free)
    usable = values[:rank] > _NEGLIGIBLE * torch.linalg.matrix_norm(moment, ord=2)
    return (vectors[:, :rank] * usable).T / math.sqrt(3)


def _widened(moment: Tensor, basis: Tensor | None, *, energy: float) -> Tensor:
    """Return the basis (in, m) with the leading directions of M outside it, until it holds a share `energy` of M's
    energy.
    """
    inside = basis if basis is not None else moment.new_zeros(len(moment), 0)
    rest = moment - inside @ (inside.T @ moment)
    total = torch.linalg.svdvals(moment).square().sum()
    vectors, values, _ = torch.linalg.svd(rest)
    held = 1 - (values.square().sum() - values.square().cumsum(0)) / total
    start = 1 - values.square().sum() / total
    before = torch.cat([start[None], held[:-1]])
    usable = values > _NEGLIGIBLE * torch.linalg.matrix_norm(moment, ord=2)
    added = int(((before < energy) & usable).sum())
    # Orthonormal again: the sum of many steps' rounding would let old inputs leak in.
    return torch.linalg.qr(torch.cat([inside, vectors[:, :added]], dim=1)).Q


def begin(
    model: IncrementalClassifier,
    before: ModelState,
    *,
    task: str,
    settings: Settings,
    batches: Batches,
    generator: torch.Generator,
) -> None:
    """Design A_t from the task's images, start B_t at 0, and train B_t only."""
    sum_on(model, before, new_direction(model, rank=settings.rank, generator=generator))
    moments = second_moments(model, batches)
    factors: dict[str, Factors] = {}
    for path, names in _inputs_of(model).items():
        down = designed_down(moments[path], _basis(before, path, moments[path]), rank=settings.rank)
        for name in names:
            up = model.targets[name].up
            assert up is not None
            factors[name] = Factors(up=torch.zeros_like(up), down=down.to(up.dtype))
    sum_on(model, before, factors, train_down=False)


def _basis(before: ModelState, path: str, moment: Tensor) -> Tensor | None:
    """Return the remembered span at a module, None in the first step."""
    if path in before.memory:
        return before.memory[path].to(moment)
    if before.directions:
        raise ValueError(
            f"inflora: the step before remembers no inputs of {path}; run `sdlora run` from the first task"
        )
    return None


def remember(
    model: IncrementalClassifier, before: ModelState, *, settings: Settings, batches: Batches
) -> Mapping[str, Tensor]:
    """Return the span of all inputs so far, (in, m) for every adapted module: statistics, from which no image comes
    back.
    """
    return {
        path: _widened(moment, _basis(before, path, moment), energy=_ENERGY).float()
        for path, moment in second_moments(model, batches).items()
    }


METHOD = Method(begin=begin, freeze=keep_as_trained, remember=remember, targets=("k", "v"))
