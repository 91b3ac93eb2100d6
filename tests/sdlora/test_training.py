"""A fit trains what it should, resumes exactly, and freezing keeps what it promises."""

import math
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from sdlora.classifier import IncrementalClassifier, ModelState, merged_classifier
from sdlora.formulations import FORMULATIONS
from sdlora.freezing import freeze
from sdlora.heads import discriminant
from sdlora.methods import METHODS, FitResult
from sdlora.preprocessing import normalise
from sdlora.seeding import generator_for
from sdlora.statistics import class_statistics
from sdlora.training import Fit, TaskImages
from tests.support.tiny_model import everything, finish, learn, make_fit, settings, tiny_task, tiny_vit


def assert_identical(left: FitResult, right: FitResult) -> None:
    a, b = everything(left), everything(right)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(("formulation", "magnitudes"), [("paper", 1), ("reference", 1), ("continuous", 4)])
def test_only_the_newest_direction_all_magnitudes_and_the_new_rows_train(
    formulation: str, magnitudes: int, three_steps: dict[str, ModelState]
) -> None:
    fit = make_fit(three_steps[formulation], 4, chosen=settings(formulation))
    trained = {name.rsplit(".", 1)[-1]: 0 for name, p in fit.model.named_parameters() if p.requires_grad}
    for name, parameter in fit.model.named_parameters():
        if parameter.requires_grad:
            trained[name.rsplit(".", 1)[-1]] += parameter.numel()

    assert trained == {
        "magnitudes": 4 * magnitudes,
        "up": 4 * 16 * 3,
        "down": 4 * 16 * 3,
        "3": 2 * 16 + 2,
    }
    assert fit.trained_parameters == sum(trained.values())


@pytest.mark.parametrize("method", METHODS)
def test_a_step_moves_no_frozen_tensor(method: str) -> None:
    before = learn(2, method=method)
    kept = {
        "backbone": {name: t.clone() for name, t in tiny_vit().state_dict().items()},
        "head": {task: (block.weight.clone(), block.bias.clone()) for task, block in before.head.items()},
        "directions": {
            (task, name): (f.up.clone(), f.down.clone())
            for task, direction in before.directions.items()
            for name, f in direction.items()
        },
    }
    fit = make_fit(before, 3, method=method)
    after = freeze(before, finish(fit), method=METHODS[method], settings=settings()).learned

    for task, (weight, bias) in kept["head"].items() if method != "joint" else ():
        assert torch.equal(after.head[task].weight, weight)
        assert torch.equal(after.head[task].bias, bias)
    for (task, name), (up, down) in kept["directions"].items():
        for held in [before] if method in ("finetune", "joint") else [before, after]:
            assert torch.equal(held.directions[task][name].up, up)
            assert torch.equal(held.directions[task][name].down, down)
    weights = [name for name in fit.model.state_dict() if name.endswith("weight.original")]
    assert bool(weights) == bool(METHODS[method].targets)
    for name in weights:
        original = name.removeprefix("backbone.").replace("parametrizations.weight.original", "weight")
        assert torch.equal(fit.model.state_dict()[name], kept["backbone"][original])


@pytest.mark.parametrize("formulation", FORMULATIONS)
def test_every_magnitude_of_an_earlier_direction_moves(
    formulation: str, three_steps: dict[str, ModelState]
) -> None:
    fit = make_fit(three_steps[formulation], 4, chosen=settings(formulation))
    start = fit.result().magnitudes
    end = finish(fit).magnitudes

    assert list(end) == ["t01", "t02", "t03", "t04"]
    assert all((end[task] != start[task]).all() for task in end)


def test_reference_magnitudes_are_shared_and_all_start_anew(three_steps: dict[str, ModelState]) -> None:
    start = make_fit(three_steps["reference"], 4, chosen=settings("reference")).result().magnitudes

    assert {task: alpha.tolist() for task, alpha in start.items()} == {
        task: [pytest.approx(0.8)] for task in ("t01", "t02", "t03", "t04")
    }


def test_continuous_magnitudes_are_carried_per_target(three_steps: dict[str, ModelState]) -> None:
    before = three_steps["continuous"]
    start = make_fit(before, 4).result().magnitudes

    assert all(torch.equal(start[task], before.magnitudes[task]) for task in before.magnitudes)
    assert torch.equal(start["t04"], torch.ones(4))


def test_the_start_of_the_magnitudes_can_be_chosen(three_steps: dict[str, ModelState]) -> None:
    start = settings("continuous", magnitude_start=0.5)
    carried = make_fit(three_steps["continuous"], 4, chosen=start).result().magnitudes
    start = settings("reference", magnitude_start=0.5)
    shared = make_fit(three_steps["reference"], 4, chosen=start).result().magnitudes

    assert carried["t04"].tolist() == [0.5] * 4
    assert [alpha.tolist() for alpha in shared.values()] == [[0.5]] * 4


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("formulation", FORMULATIONS)
def test_freezing_changes_no_output(method: str, formulation: str) -> None:
    before = learn(2, method=method, chosen=settings(formulation))
    fit = make_fit(before, 3, method=method, chosen=settings(formulation))
    result = finish(fit)
    images = normalise(tiny_task(3)[0], mean=[0.5], std=[0.5])
    expected = fit.model(images).detach()
    after = freeze(before, result, method=METHODS[method], settings=settings(formulation)).learned

    found = merged_classifier(tiny_vit(), after)(images)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_next_step_begins_where_a_continuous_step_ended(three_steps: dict[str, ModelState]) -> None:
    before = three_steps["continuous"]
    images = normalise(tiny_task(1)[0], mean=[0.5], std=[0.5])
    expected = merged_classifier(tiny_vit(), before)(images)
    next_step = make_fit(before, 4).model(images)

    torch.testing.assert_close(next_step[:, :6], expected, rtol=1e-4, atol=1e-5)


def test_the_next_step_of_the_reference_jumps(three_steps: dict[str, ModelState]) -> None:
    before = three_steps["reference"]
    images = normalise(tiny_task(1)[0], mean=[0.5], std=[0.5])
    expected = merged_classifier(tiny_vit(), before)(images)
    next_step = make_fit(before, 4, chosen=settings("reference")).model(images)

    assert (next_step[:, :6] - expected).abs().max() > 1e-3


@pytest.mark.parametrize("method", ["sdlora", "sdlora-kd"])
def test_a_direction_of_zeros_is_recorded_as_none(method: str) -> None:
    before = learn(1)
    result = make_fit(before, 2).result()
    chosen = settings(compress=0.9, tolerance=1.0)
    after = freeze(before, result, method=METHODS[method], settings=chosen).learned

    assert list(after.directions) == list(after.magnitudes) == ["t01"]
    assert torch.equal(after.magnitudes["t01"], before.magnitudes["t01"])


def test_a_target_that_no_gradient_reached_keeps_zeros() -> None:
    result = finish(make_fit(ModelState(), 1))
    name, pair = next(iter(result.factors.items()))
    zeros = {**result.factors, name: pair._replace(up=torch.zeros_like(pair.up))}
    after = freeze(
        ModelState(), replace(result, factors=zeros), method=METHODS["sdlora"], settings=settings()
    ).learned

    assert not after.directions["t01"][name].up.any()
    assert all(part.isfinite().all() for part in after.directions["t01"][name])
    assert after.magnitudes["t01"].isfinite().all()


def test_a_direction_that_diverged_is_refused_by_name() -> None:
    result = finish(make_fit(ModelState(), 1))
    broken = {name: pair._replace(up=pair.up / 0) for name, pair in result.factors.items()}

    with pytest.raises(
        ValueError, match=r"t01: the direction at blocks\.0\.attn\.q has norm (nan|inf): it diverged"
    ):
        freeze(ModelState(), replace(result, factors=broken), method=METHODS["sdlora"], settings=settings())


@pytest.mark.parametrize("stop", [1, 3, 4, 8, 11], ids=lambda stop: f"after-step-{stop}")
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="sgd"),
        pytest.param({"optimizer": "adam", "learning_rate": 0.003}, id="adam"),
        pytest.param({"decay": "cosine", "crop_scale": 0.5, "flip": True}, id="cosine-with-augmentation"),
        pytest.param(
            {
                "optimizer": "adam",
                "learning_rate": 0.003,
                "decay": "cosine",
                "head_rate": 0.02,
                "magnitude_rate": 0.01,
            },
            id="a-rate-for-each",
        ),
        pytest.param({"head_start": "discriminant"}, id="rows-that-start-as-a-discriminant"),
        pytest.param({"feature_distillation": 2.0}, id="near-the-features-before"),
        pytest.param(
            {"feature_distillation": 2.0, "crop_scale": 0.5, "flip": True},
            id="near-the-features-before-with-augmentation",
        ),
        pytest.param({"formulation": "reference"}, id="reference"),
        pytest.param({"formulation": "paper"}, id="paper"),
        *(pytest.param({"method": name}, id=name) for name in METHODS if METHODS[name].trains_head),
    ],
)
def test_a_resumed_fit_is_bit_identical_to_an_undisturbed_one(stop: int, options: dict[str, str]) -> None:
    options = dict(options)
    chosen = settings(options.pop("formulation", "continuous"))
    options["chosen"] = chosen  # type: ignore[assignment]
    before = learn(1, method=options.get("method", "sdlora"), chosen=chosen)
    whole = make_fit(before, 2, **options)
    expected = finish(whole)
    killed = make_fit(before, 2, **options)
    for _ in killed.run():
        if killed.step == stop:
            break
    resumed = make_fit(before, 2, **options)
    resumed.restore(killed.snapshot())

    assert_identical(finish(resumed), expected)
    assert resumed.curve == whole.curve


def groups_of(fit: Fit) -> dict[str, float]:
    """What is trained, by its kind, and the rate of its next step."""
    assert fit._optimizer is not None
    kinds = {id(p): name.rstrip(".0123456789") for name, p in fit.model.named_parameters()}
    return {
        kinds[id(parameter)].rpartition(".")[2]: group["lr"]
        for group in fit._optimizer.param_groups
        for parameter in group["params"]
    }


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("method", [name for name in METHODS if METHODS[name].trains_head])
def test_a_rate_of_its_own_that_is_the_common_one_changes_no_bit(method: str, optimizer: str) -> None:
    common = {"method": method, "optimizer": optimizer, "learning_rate": 0.003, "decay": "cosine"}
    plain = finish(make_fit(learn(1, method=method), 2, **common))
    own = finish(make_fit(learn(1, method=method), 2, **common, head_rate=0.003, magnitude_rate=0.003))

    assert_identical(own, plain)


@pytest.mark.parametrize("method", [name for name in METHODS if METHODS[name].trains_head])
def test_the_head_obeys_a_rate_of_its_own_in_every_method(method: str) -> None:
    before = learn(1, method=method)
    start = make_fit(before, 2, method=method).result()
    still = finish(make_fit(before, 2, method=method, head_rate=1e-30))

    for task, block in still.head.items():
        assert torch.equal(block.weight, start.head[task].weight)
    changed = [
        name for name, pair in still.factors.items() if not torch.equal(pair.up, start.factors[name].up)
    ]
    assert bool(changed) == bool(METHODS[method].targets)


def test_magnitudes_obey_a_rate_of_their_own(three_steps: dict[str, ModelState]) -> None:
    for name in FORMULATIONS:
        fit = make_fit(three_steps[name], 4, chosen=settings(name), magnitude_rate=1e-30)
        start = fit.result()
        end = finish(fit)

        assert all(torch.equal(end.magnitudes[task], start.magnitudes[task]) for task in end.magnitudes)
        assert not torch.equal(end.head["t04"].weight, start.head["t04"].weight)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_magnitudes_of_rate_zero_are_those_they_start_with(
    optimizer: str, three_steps: dict[str, ModelState]
) -> None:
    fit = make_fit(three_steps["paper"], 4, chosen=settings("paper"), optimizer=optimizer, magnitude_rate=0.0)

    assert {float(alpha) for alpha in finish(fit).magnitudes.values()} == {1.0}


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_fixed_magnitudes_are_those_that_their_own_steps_left_and_only_the_new_one_is_trained(
    optimizer: str, three_steps: dict[str, ModelState]
) -> None:
    for name in FORMULATIONS:
        chosen = settings(name, carried=True, trains_earlier=False)
        fit = make_fit(three_steps[name], 4, chosen=chosen, optimizer=optimizer)
        start = fit.result()
        end = finish(fit)

        for task in ("t01", "t02", "t03"):
            assert torch.equal(end.magnitudes[task], start.magnitudes[task])
        assert not torch.equal(end.magnitudes["t04"], start.magnitudes["t04"])


def test_all_rates_follow_one_schedule() -> None:
    fit = make_fit(learn(1), 2, decay="cosine", head_rate=0.5, magnitude_rate=0.001)
    for _ in fit.run():
        rates = groups_of(fit)
        assert rates["up"] == rates["down"]
        assert rates["weights"] / rates["up"] == pytest.approx(0.5 / 0.05)
        assert rates["magnitudes"] / rates["up"] == pytest.approx(0.001 / 0.05)
    assert fit.curve[-1].learning_rate == rates["up"] < 0.05 / 10


def test_rows_start_with_the_deviation_that_is_asked_for() -> None:
    random, small = (make_fit(ModelState(), 1, head_start=start).result() for start in ("random", "small"))

    torch.testing.assert_close(
        small.head["t01"].weight / 0.01, random.head["t01"].weight * 16**0.5, rtol=1e-5, atol=1e-6
    )
    assert not small.head["t01"].bias.any()
    for name, pair in random.factors.items():
        assert torch.equal(small.factors[name].down, pair.down)


@pytest.mark.parametrize("method", ["sdlora", "frozen", "joint"])
def test_rows_that_start_as_a_discriminant_know_the_classes_before_the_first_step(method: str) -> None:
    """The logits are those of the closed form on the features of the start, divided by eight."""
    before = learn(1, method=method)
    fit = make_fit(before, 2, method=method, head_start="discriminant")
    images = torch.cat([tiny_task(i)[0] for i in ((1, 2) if method == "joint" else (2,))])
    labels = torch.cat([tiny_task(i)[1] + 2 * (i - 1) for i in ((1, 2) if method == "joint" else (2,))])
    features = fit.model.features(normalise(images, mean=[0.5], std=[0.5])).detach()
    blocks = fit.result().head
    own = labels - labels.min()
    statistics = {
        task: class_statistics(features[own // 2 == i], own[own // 2 == i] % 2, rank=16)
        for i, task in enumerate(blocks)
    }
    expected = discriminant(blocks, statistics, generator=torch.Generator())

    for task, block in blocks.items():
        torch.testing.assert_close(8 * block.weight, expected[task].weight, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(8 * block.bias, expected[task].bias, rtol=1e-3, atol=1e-3)
    logits = torch.cat([features @ block.weight.T + block.bias for block in blocks.values()], dim=1)
    assert (logits.argmax(dim=1) == own).float().mean() > 0.9


def moved(before: ModelState, **options: str | float | bool) -> float:
    """How far a step moves the features of its own images: the mean of ‖f − g‖² / ‖g‖²."""
    fit = make_fit(before, 2, optimizer="adam", learning_rate=0.01, **options)
    images = normalise(tiny_task(2)[0], mean=[0.5], std=[0.5])
    start = merged_classifier(tiny_vit(), before).features(images)
    finish(fit)
    end = fit.model.features(images).detach()
    return float(((end - start).square().sum(dim=1) / start.square().sum(dim=1)).mean())


@pytest.mark.parametrize("method", [name for name in METHODS if METHODS[name].targets and name != "joint"])
def test_features_stay_nearer_to_those_before_the_more_their_distillation_weighs(method: str) -> None:
    before = learn(1, method=method)
    free, light, heavy = (
        moved(before, method=method, feature_distillation=weight) for weight in (0.0, 1.0, 100.0)
    )

    assert free > light > heavy
    assert heavy < free / 10


@pytest.mark.parametrize("augmentation", [{}, {"crop_scale": 0.5, "flip": True}], ids=["plain", "augmented"])
@pytest.mark.parametrize("formulation", FORMULATIONS)
def test_distillation_adds_the_relative_change_of_the_features_to_the_loss(
    formulation: str, augmentation: dict[str, float | bool], three_steps: dict[str, ModelState]
) -> None:
    """Of the images as the model sees them, against the model of the steps before and no other."""
    before, chosen = three_steps[formulation], settings(formulation)
    common = {"chosen": chosen, "learning_rate": 1e-30, "epochs": 1, "batch_size": 24, **augmentation}
    plain, with_it = (make_fit(before, 4, feature_distillation=weight, **common) for weight in (0.0, 3.0))
    order = torch.randperm(24, generator=generator_for(7, "order", "t04", 0))
    inputs = plain._augmented(order, torch.arange(24))
    was = merged_classifier(tiny_vit(), before).features(inputs)
    now = plain.model.features(inputs).detach()
    change = (now - was).square().sum(dim=1) / was.square().sum(dim=1)
    for fit in (plain, with_it):
        finish(fit)

    added = with_it.curve[0].loss - plain.curve[0].loss
    assert added == pytest.approx(3 * float(change.mean()), rel=1e-3, abs=1e-5)
    assert (added > 1e-3) == (formulation != "continuous")  # which begins where the step before ended


@pytest.mark.parametrize(("method", "index"), [("sdlora", 1), ("frozen", 2), ("joint", 2)])
def test_where_no_earlier_class_moves_distillation_changes_no_bit(method: str, index: int) -> None:
    before = learn(index - 1, method=method)
    plain, with_it = (
        finish(make_fit(before, index, method=method, feature_distillation=weight)) for weight in (0.0, 3.0)
    )

    assert_identical(with_it, plain)


def test_a_snapshot_holds_the_factors_that_are_not_trained_too() -> None:
    """Another machine may not design InfLoRA's A again to the bit: it goes on with the one that it is given."""
    before = learn(1, method="inflora")
    killed = make_fit(before, 2, method="inflora")
    for _ in killed.run():
        if killed.step == 5:
            break
    resumed = make_fit(before, 2, method="inflora")
    with torch.no_grad():
        for target in resumed.model.targets.values():
            assert target.down is not None
            target.down.neg_()
    resumed.restore(killed.snapshot())

    assert_identical(finish(resumed), finish(make_fit(before, 2, method="inflora")))


def test_taking_a_snapshot_disturbs_nothing() -> None:
    expected = finish(make_fit(ModelState(), 1))
    watched = make_fit(ModelState(), 1)
    for _ in watched.run():
        watched.snapshot()

    assert_identical(watched.result(), expected)


def test_a_snapshot_of_another_fit_is_refused() -> None:
    snapshot = make_fit(ModelState(), 1, method="frozen").snapshot()

    with pytest.raises(ValueError, match="other parameters than this fit"):
        make_fit(ModelState(), 1).restore(snapshot)


def test_the_result_depends_on_the_seed_and_the_task_but_on_no_global_generator() -> None:
    torch.manual_seed(1)
    first = finish(make_fit(ModelState(), 1))
    torch.manual_seed(2)
    second = finish(make_fit(ModelState(), 1))

    assert_identical(first, second)


def test_the_loss_is_over_the_classes_of_the_current_task_only(three_steps: dict[str, ModelState]) -> None:
    fit = make_fit(three_steps["continuous"], 4, learning_rate=1e-12, epochs=1)
    finish(fit)

    assert fit.curve[0].loss < 2 * math.log(2)
    assert fit.model.head.newest(torch.zeros(1, 16)).shape == (1, 2)
    assert fit.model(torch.zeros(1, 1, 8, 8)).shape == (1, 8)


def test_a_diverging_loss_is_an_error_that_names_the_rate() -> None:
    with pytest.raises(
        FloatingPointError, match=r"t01: the loss became .* lower the learning rate \(1e\+30\)"
    ):
        finish(make_fit(ModelState(), 1, learning_rate=1e30))


def test_a_rank_beyond_the_projection_is_refused() -> None:
    with pytest.raises(ValueError, match=r"adapter\.rank 17 is more than blocks\.0\.attn\.q can hold"):
        make_fit(ModelState(), 1, chosen=settings(rank=17))


def test_a_task_without_images_is_refused() -> None:
    with pytest.raises(ValueError, match="t09: no training image"):
        Fit(
            tiny_vit(), ModelState(),
            tasks={"t09": TaskImages(torch.zeros(0, 1, 8, 8, dtype=torch.uint8), torch.zeros(0))},
            mean=[0.5], std=[0.5], method=METHODS["sdlora"], settings=settings(),
            schedule=make_fit(ModelState(), 1).schedule, seed=0, device=torch.device("cpu"),
        )  # fmt: skip


def test_bf16_trains_nearly_the_same_and_keeps_its_parameters_in_fp32() -> None:
    full, half = finish(make_fit(ModelState(), 1)), finish(make_fit(ModelState(), 1, precision="bf16"))

    assert {t.dtype for t in everything(half).values()} == {torch.float32}
    torch.testing.assert_close(half.head["t01"].weight, full.head["t01"].weight, rtol=0.1, atol=0.05)


def gradients(fit: Fit, batch: list[int]) -> dict[str, Tensor]:
    """The gradients of one step on these images, and its loss and how many are right."""
    chosen = torch.tensor(batch)
    places = torch.arange(len(chosen))
    inputs = fit._augmented(chosen, places) if fit._constant is None else fit._constant[chosen]
    sums = fit._backward(inputs, fit._labels[chosen], of=len(chosen)) / len(chosen)
    found = {name: p.grad.clone() for name, p in fit.model.named_parameters() if p.grad is not None}
    return {**found, "loss and right": sums}


@pytest.mark.parametrize("micro_batch", [1, 3, 4])
@pytest.mark.parametrize("method", [name for name in METHODS if METHODS[name].trains_head])
def test_micro_batches_leave_the_gradients_of_the_whole_batch(method: str, micro_batch: int) -> None:
    before = learn(1, method=method)
    options = {"method": method, "crop_scale": 0.5, "flip": True}
    whole = make_fit(before, 2, **options)
    # Off the start, where B is zero and A has no gradient.
    for _ in whole.run():
        if whole.step == 3:
            break
    parts = make_fit(before, 2, **options)
    parts.restore(whole.snapshot())
    parts.micro_batch = micro_batch
    expected, found = gradients(whole, list(range(7))), gradients(parts, list(range(7)))

    assert len(expected) > 1
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-6)


class SmallMemory:
    """A backbone's forward that has memory for so many images, and then fails as the accelerator does."""

    def __init__(self, fit: Fit, images: int) -> None:
        self.images, self.seen = images, list[int]()
        self._forward = fit.model.features
        fit.model.features = self.features  # type: ignore[method-assign]

    def features(self, batch: Tensor) -> Tensor:
        self.seen.append(len(batch))
        if len(batch) > self.images:
            raise torch.OutOfMemoryError("out of memory")
        return self._forward(batch)


def test_a_fit_that_runs_out_of_memory_takes_the_same_steps_with_fewer_images_at_once() -> None:
    expected = make_fit(ModelState(), 1, crop_scale=0.5)
    finish(expected)
    poor = make_fit(ModelState(), 1, crop_scale=0.5)
    memory = SmallMemory(poor, 2)
    finish(poor)

    assert memory.seen[:8] == [7, 4, 2, 2, 2, 1, 2, 2]  # and not with seven again
    assert poor.micro_batch == 2
    assert poor.step == expected.step
    for found, known in zip(poor.curve, expected.curve, strict=True):
        assert found == pytest.approx(known, rel=1e-4)
    found, known = everything(poor.result()), everything(expected.result())
    for name in known:
        torch.testing.assert_close(found[name], known[name], rtol=0, atol=1e-5)


def test_memory_that_fails_in_the_middle_of_a_batch_repeats_no_update() -> None:
    """The parts before have left gradients, which must not be counted again."""
    whole, poor = make_fit(ModelState(), 1), make_fit(ModelState(), 1)
    poor.micro_batch = 4
    memory = SmallMemory(poor, 4)
    forward = memory._forward

    def fail_once(batch: Tensor) -> Tensor:
        if len(memory.seen) == 2:
            raise torch.OutOfMemoryError("out of memory")
        return forward(batch)

    memory._forward = fail_once  # type: ignore[method-assign]
    expected, found = gradients(whole, list(range(7))), gradients(poor, list(range(7)))

    assert memory.seen == [4, 3, 2, 2, 2, 1]
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-6)


def test_an_image_that_does_not_fit_by_itself_is_an_error() -> None:
    fit = make_fit(ModelState(), 1)
    SmallMemory(fit, 0)

    with pytest.raises(torch.OutOfMemoryError):
        finish(fit)
    assert fit.step == 0


def test_growing_the_head_keeps_the_old_logits(three_steps: dict[str, ModelState]) -> None:
    features = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    model = IncrementalClassifier(tiny_vit(), three_steps["continuous"])
    expected = model.head(features)
    model.head.grow(three_steps["reference"].head["t01"])

    assert torch.equal(model.head(features)[:, :6], expected)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_fit_learns_the_same_within_rounding_and_goes_on_to_the_bit() -> None:
    """Three full batches and a rest in each epoch: the rest goes through the model as it is.

    One block is compiled in half the time of two.
    """
    small = partial(tiny_vit, depth=1)
    before = learn(1, backbone=small)
    plain = finish(make_fit(before, 2, backbone=small(), epochs=2))
    whole, again = (make_fit(before, 2, backbone=small(), epochs=2, compile=True) for _ in range(2))
    cut = next(whole.snapshot() for _ in whole.run() if whole.step == 5)
    again.restore(cut)
    learned, resumed = finish(whole), finish(again)
    assert_identical(learned, resumed)
    mine, theirs = everything(plain), everything(learned)
    for name in mine:
        torch.testing.assert_close(theirs[name], mine[name], rtol=1e-4, atol=1e-5)
