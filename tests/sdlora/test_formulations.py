"""Each formulation is its written formula, computed here a second time in few lines of dense float64 matrices."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sdlora.adapters import factor_norms, product_norm
from sdlora.classifier import ModelState, merged_classifier
from sdlora.formulations import FORMULATIONS
from sdlora.freezing import freeze
from sdlora.methods import METHODS
from sdlora.preprocessing import normalise
from tests.support.tiny_model import learn, make_fit, settings, tiny_task, tiny_vit

RATE, MOMENTUM, STEPS = 0.05, 0.9, 5


def batch(index: int) -> Tensor:
    return normalise(tiny_task(index)[0], mean=[0.5], std=[0.5]).double()


class Written:
    """Three tasks of SD-LoRA by the formulas of method.md 1.1 and 1.2: dense directions, plain autograd, plain SGD."""

    def __init__(
        self, *, norm: Callable[[Tensor, Tensor], Tensor], normalise_current: bool, start: float
    ) -> None:
        self.norm, self.normalise_current, self.start = norm, normalise_current, start
        self.vit = tiny_vit().double()
        self.old: list[dict[str, Tensor]] = []  # of each task: target -> normalised dense direction
        self.heads: list[tuple[Tensor, Tensor]] = []
        self.losses: list[float] = []

    def features(self, images: Tensor, leaves: dict[str, Tensor]) -> Tensor:
        weights = {}
        for i, block in enumerate(self.vit.blocks):
            change = {}
            for letter in "qv":
                name = f"blocks.{i}.attn.{letter}"
                up, down = leaves[f"{name}.up"], leaves[f"{name}.down"]
                current = up @ down / (self.norm(up, down) if self.normalise_current else 1)
                change[letter] = leaves["alpha"][-1] * current
                for k, direction in enumerate(self.old):
                    change[letter] = change[letter] + leaves["alpha"][k] * direction[name]
            rows = torch.cat([change["q"], torch.zeros(16, 16, dtype=torch.float64), change["v"]])
            weights[f"blocks.{i}.attn.qkv.weight"] = block.attn.qkv.weight.detach() + rows
        return torch.func.functional_call(self.vit, weights, (images,))

    def learn(self, index: int, start: dict[str, Tensor]) -> Tensor:
        """Learn a task from the given factors and rows; return the logits of its images over all classes so far."""
        leaves = {name: value.double().clone().requires_grad_() for name, value in start.items()}
        leaves["alpha"] = torch.full(
            (len(self.old) + 1,), self.start, dtype=torch.float64, requires_grad=True
        )
        velocity = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
        for _ in range(STEPS):
            logits = self.features(batch(index), leaves) @ leaves["weight"].T + leaves["bias"]
            loss = torch.nn.functional.cross_entropy(logits, tiny_task(index)[1])
            self.losses.append(loss.item())
            gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
            for name, leaf in leaves.items():
                velocity[name] = MOMENTUM * velocity[name] + gradients[name]
                leaf.data -= RATE * velocity[name]
        self.heads.append((leaves["weight"].detach(), leaves["bias"].detach()))
        with torch.no_grad():
            features = self.features(batch(index), leaves)
            found = torch.cat([features @ weight.T + bias for weight, bias in self.heads], dim=1)
            pairs = {name: (leaves[f"{name}.up"], leaves[f"{name}.down"]) for name in targets()}
            self.old.append({name: up @ down / self.norm(up, down) for name, (up, down) in pairs.items()})
        return found


def targets() -> list[str]:
    return [f"blocks.{i}.attn.{letter}" for i in (0, 1) for letter in "qv"]


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        pytest.param(
            "reference",
            {"norm": lambda up, down: up.norm() * down.norm(), "normalise_current": False, "start": 0.8},
            id="reference",
        ),
        pytest.param(
            "paper",
            {"norm": lambda up, down: (up @ down).norm(), "normalise_current": True, "start": 1.0},
            id="paper",
        ),
    ],
)
def test_losses_and_logits_over_three_tasks_are_those_of_the_written_formulas(
    name: str, choices: dict[str, Any]
) -> None:
    written = Written(**choices)
    learned, losses = ModelState(), []
    for index in (1, 2, 3):
        fit = make_fit(
            learned,
            index,
            backbone=tiny_vit().double(),
            chosen=settings(name),
            batch_size=24,
            epochs=STEPS,
            learning_rate=RATE,
        )
        begun = fit.result()
        start = {f"{target}.{part}": value for target, pair in begun.factors.items()
                 for part, value in pair._asdict().items()}  # fmt: skip
        start |= begun.head[f"t{index:02}"]._asdict()
        for _ in fit.run():
            pass
        expected = written.learn(index, start)
        losses += [row.loss for row in fit.curve]

        torch.testing.assert_close(fit.model(batch(index)).detach(), expected, rtol=0, atol=1e-5)
        learned = freeze(learned, fit.result(), method=METHODS["sdlora"], settings=settings(name)).learned
        merged = merged_classifier(tiny_vit().double(), learned)
        torch.testing.assert_close(merged(batch(index)), expected, rtol=0, atol=1e-5)
    assert losses == pytest.approx(written.losses, abs=1e-5)
    assert losses[0] > losses[STEPS - 1]


def test_the_papers_current_direction_has_norm_one_at_every_step() -> None:
    fit = make_fit(learn(1, chosen=settings("paper")), 2, chosen=settings("paper"))
    for _ in fit.run():
        for target in fit.model.targets.values():
            assert target.magnitudes is not None
            held = target.update().detach() - target.magnitudes[0].item() * (
                target.stacked_up @ target.stacked_down
            )
            assert held.norm().item() == pytest.approx(abs(target.magnitudes[1].item()), rel=1e-4)


@pytest.mark.parametrize(
    ("name", "norm"),
    [("paper", product_norm), ("continuous", product_norm), ("reference", factor_norms)],
)
def test_a_frozen_direction_has_norm_one(name, norm, three_steps) -> None:  # noqa: ANN001
    for direction in three_steps[name].directions.values():
        for factors in direction.values():
            torch.testing.assert_close(norm(factors), torch.tensor(1.0), rtol=1e-5, atol=0)


def test_a_formulation_that_divides_by_a_norm_refuses_to_start_from_zero() -> None:
    with pytest.raises(ValueError, match="initial_up: zero gives a direction without a norm"):
        settings("paper", initial_up="zero")


@pytest.mark.parametrize("name", FORMULATIONS)
def test_carried_magnitudes_go_on_and_restarted_ones_do_not(
    name: str, three_steps: dict[str, ModelState]
) -> None:
    before = three_steps[name]
    carried = make_fit(before, 4, chosen=settings(name, carried=True)).result().magnitudes
    restarted = make_fit(before, 4, chosen=settings(name, carried=False)).result().magnitudes

    for task, held in before.magnitudes.items():
        expected = held if FORMULATIONS[name].per_target else held.mean()[None]
        torch.testing.assert_close(carried[task], expected)
        assert restarted[task].tolist() == pytest.approx([FORMULATIONS[name].magnitude_start] * len(expected))


def test_a_uniform_start_is_drawn_and_moves_the_output() -> None:
    fit = make_fit(ModelState(), 1, chosen=settings("continuous", initial_up="uniform"))
    zero = make_fit(ModelState(), 1)

    for name, factors in fit.result().factors.items():
        assert torch.equal(factors.down, zero.result().factors[name].down) == (name == "blocks.0.attn.q")
        assert 0 < factors.up.abs().max() <= 1 / 16**0.5
    assert not torch.equal(fit.model(batch(1).float()), zero.model(batch(1).float()))
