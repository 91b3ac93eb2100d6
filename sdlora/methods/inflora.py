"""InfLoRA (Liang & Li, CVPR 2024): every task learns in input directions that the earlier tasks do not use.

A_t is designed before the fit, from the second moment of the layer's inputs with the span of the earlier tasks' inputs
taken out, and stays; B_t alone is trained, so the step cannot move what the layer says of that span.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from sdlora.adapters import Factors, adapted_layers
from sdlora.classifier import IncrementalClassifier, Learned
from sdlora.methods.method import Batches, Method, Settings, keep_as_trained, new_direction, sum_on

ENERGY = 0.98
"""Share of the squared singular values of the second moment that the remembered span holds.

The released code raises it over the tasks, from 0.98 towards 1 (ImageNet-R) by a rule that knows how many tasks there
will be; a chain that grows does not, so here it is one number.
"""
NEGLIGIBLE = 1e-6
"""Singular values below this share of the largest one are rounding."""


@torch.no_grad()
def second_moments(model: IncrementalClassifier, batches: Batches) -> dict[str, Tensor]:
    """XᵀX / tokens (in, in) float64 of the inputs of every adapted layer, under the name of its first target."""
    names = {id(directions): name for name, directions in model.targets.items()}
    moments: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    hooks = []
    for layer, directions in adapted_layers(model.backbone):
        name = names[id(directions[0])]

        def add(_: torch.nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
            tokens = inputs[0].detach().flatten(0, -2).double()
            moments[name] = moments.get(name, 0) + tokens.T @ tokens
            counts[name] = counts.get(name, 0) + len(tokens)

        hooks.append(layer.register_forward_pre_hook(add))
    try:
        for batch in batches():
            model.features(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: moment / counts[name] for name, moment in moments.items()}


def designed_down(moment: Tensor, basis: Tensor | None, *, rank: int) -> Tensor:
    """A (rank, in): the leading left singular vectors of M without the span of `basis` (in, m), divided by √3.

    Where fewer than `rank` directions are left the other rows are 0: the released code takes null vectors there, which
    lie in the very span that is to be avoided.
    """
    free = moment if basis is None else moment - basis @ (basis.T @ moment)
    vectors, values, _ = torch.linalg.svd(free)
    usable = values[:rank] > NEGLIGIBLE * torch.linalg.matrix_norm(moment, ord=2)
    return (vectors[:, :rank] * usable).T / math.sqrt(3)


def widened(moment: Tensor, basis: Tensor | None, *, energy: float) -> Tensor:
    """The basis (in, m) with the leading directions of M outside it, until it holds a share `energy` of M's energy."""
    inside = basis if basis is not None else moment.new_zeros(len(moment), 0)
    rest = moment - inside @ (inside.T @ moment)
    total = torch.linalg.svdvals(moment).square().sum()
    vectors, values, _ = torch.linalg.svd(rest)
    held = 1 - (values.square().sum() - values.square().cumsum(0)) / total
    start = 1 - values.square().sum() / total
    before = torch.cat([start[None], held[:-1]])
    usable = values > NEGLIGIBLE * torch.linalg.matrix_norm(moment, ord=2)
    added = int(((before < energy) & usable).sum())
    # Orthonormal again: the sum of many steps' rounding would let old inputs leak in.
    return torch.linalg.qr(torch.cat([inside, vectors[:, :added]], dim=1)).Q


def begin(
    model: IncrementalClassifier,
    before: Learned,
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
    names = {id(directions): name for name, directions in model.targets.items()}
    for _, directions in adapted_layers(model.backbone):
        key = names[id(directions[0])]
        basis = before.memory[key].double().to(moments[key].device) if key in before.memory else None
        down = designed_down(moments[key], basis, rank=settings.rank)
        for target in directions:
            assert target.up is not None
            factors[names[id(target)]] = Factors(
                up=torch.zeros_like(target.up), down=down.to(target.up.dtype)
            )
    sum_on(model, before, factors, train_down=False)


def remember(
    model: IncrementalClassifier, before: Learned, *, settings: Settings, batches: Batches
) -> Mapping[str, Tensor]:
    """The span of all inputs so far, (in, m) for every adapted layer: statistics, of which no image can be restored."""
    moments = second_moments(model, batches)
    return {
        key: widened(
            moment,
            before.memory[key].double().to(moment.device) if key in before.memory else None,
            energy=ENERGY,
        ).float()
        for key, moment in moments.items()
    }


METHOD = Method(begin=begin, freeze=keep_as_trained, remember=remember, targets=("k", "v"))
