"""Each method holds what it is known for."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sdlora.adapters import Factors, product_norm
from sdlora.classifier import IncrementalClassifier, ModelState, merged_classifier
from sdlora.fit_folder import read_fit, write_fit
from sdlora.formulations import FORMULATIONS
from sdlora.freezing import freeze, measured
from sdlora.methods import METHODS, FitResult, inflora, sdlora_kd
from sdlora.methods.clora import orthonormal
from sdlora.methods.sdlora_rr import rank_of
from sdlora.preprocessing import normalise
from tests.support.repository import REPOSITORY
from tests.support.tiny_model import learn, make_fit, settings, tiny_task, tiny_vit
from tests.support.vision_transformers import FAMILIES

PAPER = {"t01": 10, "t04": 8, "t08": 6}


def trained(method: str, before: ModelState, index: int, **options: object) -> FitResult:
    fit = make_fit(before, index, method=method, **options)
    for _ in fit.run():
        pass
    return fit.result()


def features(learned: ModelState) -> Tensor:
    images = normalise(tiny_task(3)[0], mean=[0.5], std=[0.5])
    with torch.no_grad():
        return merged_classifier(tiny_vit(), learned).features(images)


def dense(factors: Factors) -> Tensor:
    return factors.up.double() @ factors.down.double()


# ---- SD-LoRA-RR


@pytest.mark.parametrize(("task", "rank"), [(1, 10), (3, 10), (4, 8), (7, 8), (8, 6), (20, 6)])
def test_the_papers_schedule_changes_at_its_fourth_and_eighth_task(task: int, rank: int) -> None:
    assert rank_of(f"t{task:02}", settings(rank_schedule=PAPER)) == rank


def test_a_reduced_rank_is_that_of_the_direction_which_is_stored() -> None:
    learned = learn(3, method="sdlora-rr", chosen=settings(rank_schedule={"t01": 3, "t03": 2}))

    assert [d["blocks.0.attn.q"].down.shape[0] for d in learned.directions.values()] == [3, 3, 2]


@pytest.mark.parametrize("formulation", list(FORMULATIONS))
def test_after_a_rank_of_zero_only_magnitudes_and_rows_are_learned(formulation: str, tmp_path: Path) -> None:
    chosen = settings(formulation, rank_schedule={"t01": 3, "t02": 0})
    before = learn(1, method="sdlora-rr", chosen=chosen)
    result = trained("sdlora-rr", before, 2, chosen=chosen)
    description = {"task": "t02", "classes": ["a", "b"], "targets": []}
    write_fit(tmp_path, result, curve=[], description=description)
    fit = read_fit(tmp_path, description, tasks=["t01", "t02"])
    learned = freeze(before, fit, method=METHODS["sdlora-rr"], settings=chosen).learned

    assert not fit.factors
    assert list(learned.directions) == list(learned.magnitudes) == ["t01"]
    assert learned.directions["t01"] is before.directions["t01"]
    assert learned.magnitudes["t01"].shape == before.magnitudes["t01"].shape
    assert not torch.equal(learned.magnitudes["t01"], before.magnitudes["t01"])
    assert set(learned.head) == {"t01", "t02"}


def test_a_schedule_without_a_first_rank_is_refused() -> None:
    with pytest.raises(ValueError, match="has no rank for t01; let its first entry be t01"):
        make_fit(ModelState(), 1, method="sdlora-rr", chosen=settings(rank_schedule={"t02": 2}))


# ---- SD-LoRA-KD


def explained_fit(before: ModelState, *, shared: bool, extra: float = 0.0) -> FitResult:
    """A fit whose direction is a combination of two earlier ones, but for a part `extra` that is new."""
    random = torch.Generator().manual_seed(5)
    factors = {}
    for i, target in enumerate(before.directions["t01"]):
        first, second = (before.directions[task][target] for task in ("t01", "t02"))
        a, b = (2.0, -0.5) if shared else (2.0 + i, -0.5)
        rest = Factors(torch.randn(16, 1, generator=random), torch.randn(1, 16, generator=random))
        scale = extra / product_norm(rest)
        factors[target] = Factors(
            up=torch.cat([a * first.up, b * second.up, scale * rest.up], dim=1),
            down=torch.cat([first.down, second.down, rest.down], dim=0),
        )
    magnitudes = {**{t: m.clone() for t, m in before.magnitudes.items()}, "t03": torch.full((4,), 0.7)}
    if shared:
        magnitudes = {t: torch.tensor([0.8]) for t in magnitudes}
    head = {"t03": before.head["t01"]}
    return FitResult(task="t03", factors=factors, magnitudes=magnitudes, head=head)


@pytest.mark.parametrize("formulation", ["paper", "continuous"])
def test_an_explained_direction_is_absorbed_and_no_output_changes(formulation: str) -> None:
    chosen = settings(formulation, tolerance=0.01)
    before = learn(2, method="sdlora-kd", chosen=replace(chosen, tolerance=0.0))
    fit = explained_fit(before, shared=False) if formulation == "continuous" else None
    if fit is None:
        # One magnitude for the network: the combination must be the same once each direction is normalised.
        fit = FitResult(
            task="t03",
            factors=before.directions["t02"],
            magnitudes={t: torch.tensor([0.8]) for t in ("t01", "t02", "t03")},
            head={"t03": before.head["t01"]},
        )
    step = freeze(before, fit, method=METHODS["sdlora-kd"], settings=chosen)

    assert step.facts["absorbed"] == 1
    assert step.facts["residual"] < 1e-3
    assert list(step.learned.directions) == ["t01", "t02"]
    torch.testing.assert_close(features(step.learned), features(step.trained), rtol=1e-4, atol=1e-5)
    assert measured(step, features=features).facts["output_change"] < 1e-4


def test_absorption_adds_the_magnitude_times_the_coefficients() -> None:
    """α_k + α_t·Δα_k, where Eq. 8 of the paper drops α_t."""
    before = learn(2)
    fit = explained_fit(before, shared=False)
    chosen = settings(tolerance=0.01)
    after = freeze(before, fit, method=METHODS["sdlora-kd"], settings=chosen).learned

    for i in range(4):
        assert after.magnitudes["t01"][i] == pytest.approx(
            before.magnitudes["t01"][i].item() + 0.7 * (2 + i), abs=1e-4
        )
        assert after.magnitudes["t02"][i] == pytest.approx(
            before.magnitudes["t02"][i].item() - 0.7 * 0.5, abs=1e-4
        )


@pytest.mark.parametrize(("tolerance", "absorbed"), [(0.0, 0), (0.3, 0), (0.9, 1), (1.0, 1)])
def test_a_direction_is_kept_where_more_of_it_is_new_than_tolerated(tolerance: float, absorbed: int) -> None:
    before = learn(2)
    fit = explained_fit(before, shared=False, extra=3.0)
    step = freeze(before, fit, method=METHODS["sdlora-kd"], settings=settings(tolerance=tolerance))

    assert 0.3 < step.facts["residual"] < 0.9
    assert step.facts["absorbed"] == absorbed
    assert step.changed == bool(absorbed)
    assert ("t03" in step.learned.directions) != bool(absorbed)


@pytest.mark.parametrize("shared", [True, False])
def test_the_least_squares_from_gram_matrices_is_that_of_the_dense_matrices(shared: bool) -> None:
    before = learn(3)
    *_, new = before.directions.values()
    earlier = {task: before.directions[task] for task in ("t01", "t02")}
    alpha = torch.tensor([0.5, -1.0, 2.0, 0.25])
    products = sdlora_kd.products(earlier, new, alpha)
    found = (sdlora_kd.shared_coefficients if shared else sdlora_kd.own_coefficients)(products)
    residual = sdlora_kd.relative_residual(products, found)

    wanted = torch.stack([alpha[i] * dense(f).flatten() for i, f in enumerate(new.values())])
    basis = torch.stack([torch.stack([dense(d[t]).flatten() for t in new]) for d in earlier.values()])
    if shared:
        solved = torch.linalg.lstsq(basis.flatten(1).T, wanted.flatten()[:, None]).solution
        expected = solved.expand(2, 4)
    else:
        each = [torch.linalg.lstsq(basis[:, i].T, wanted[i][:, None]).solution[:, 0] for i in range(4)]
        expected = torch.stack(each, dim=1)
    rest = wanted - torch.einsum("kt,ktd->td", expected, basis)

    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert residual == pytest.approx((rest.norm() / wanted.norm()).item(), rel=1e-4)


def test_a_chain_goes_on_after_an_absorption() -> None:
    learned = learn(4, method="sdlora-kd", chosen=settings(tolerance=1.0))

    assert list(learned.directions) == ["t01"]
    assert list(learned.head) == ["t01", "t02", "t03", "t04"]


# ---- compress


def test_a_whole_share_of_the_energy_changes_no_output() -> None:
    fit = trained("sdlora", learn(2), 3)
    step = freeze(learn(2), fit, method=METHODS["sdlora"], settings=settings(compress=1.0))

    torch.testing.assert_close(features(step.learned), features(step.trained), rtol=1e-4, atol=1e-5)


def test_a_truncated_direction_has_a_smaller_rank_and_norm_one() -> None:
    before = learn(2)
    fit = trained("sdlora", before, 3)
    step = freeze(before, fit, method=METHODS["sdlora"], settings=settings(compress=0.7))
    ranks = [f.down.shape[0] for f in step.learned.directions["t03"].values()]

    assert max(ranks) < 3
    assert step.facts["compressed_rank_most"] == max(ranks)
    assert all(
        product_norm(f).item() == pytest.approx(1, rel=1e-5) for f in step.learned.directions["t03"].values()
    )
    assert 0 < measured(step, features=features).facts["output_change"] < 0.1


# ---- the others


def test_an_olora_direction_ends_nearly_orthogonal_to_the_earlier_ones() -> None:
    before = learn(1, method="olora")

    def overlap(penalty: float) -> float:
        fit = trained("olora", before, 2, chosen=settings(penalty=penalty), epochs=20, learning_rate=0.01)
        cosines = [
            (old.down @ fit.factors[name].down.T).norm() / (old.down.norm() * fit.factors[name].down.norm())
            for name, old in before.directions["t01"].items()
        ]
        return max(cosine.item() for cosine in cosines)

    assert overlap(0.05) < 0.1 < 0.2 < overlap(0.0)


def test_an_nlora_update_is_smaller_in_most_of_its_entries() -> None:
    def share_of_small(penalty: float) -> float:
        fit = trained("nlora", ModelState(), 1, chosen=settings(penalty=penalty), epochs=10)
        update = torch.stack([dense(f).abs() for f in fit.factors.values()])
        return (update < 0.1 * update.max()).double().mean().item()

    assert share_of_small(0.01) > share_of_small(0.0) + 0.05


def test_a_clora_direction_avoids_the_fixed_subspaces_of_its_target() -> None:
    def inside(penalty: float) -> float:
        fit = trained("clora", ModelState(), 1, chosen=settings(penalty=penalty), epochs=20)
        shares = [
            (f.down @ orthonormal(16, f"{name}.in", torch.float32, torch.device("cpu"))).norm()
            / f.down.norm()
            for name, f in fit.factors.items()
        ]
        return max(share.item() for share in shares)

    assert inside(1.0) < 0.1 * inside(0.0)


def test_clora_subspaces_are_orthonormal_and_the_same_in_every_process() -> None:
    basis = orthonormal(16, "blocks.0.attn.q.in", torch.float64, torch.device("cpu"))
    again = orthonormal.__wrapped__(16, "blocks.0.attn.q.in", torch.float64, torch.device("cpu"))

    torch.testing.assert_close(basis.T @ basis, torch.eye(11, dtype=torch.float64))
    assert torch.equal(basis, again)


@pytest.mark.parametrize("method", ["olora", "nlora", "clora", "inflora"])
def test_lora_sums_keep_the_earlier_factors_as_they_were_trained(method: str) -> None:
    first = trained(method, ModelState(), 1)
    learned = learn(2, method=method)

    for name, factors in first.factors.items():
        assert torch.equal(learned.directions["t01"][name].up, factors.up)
        assert torch.equal(learned.directions["t01"][name].down, factors.down)
    assert all((alpha == 1).all() for alpha in learned.magnitudes.values())


def test_an_inflora_step_moves_no_output_on_the_span_of_earlier_inputs() -> None:
    before = learn(2, method="inflora")
    fit = trained("inflora", before, 3)

    for block in (0, 1):
        basis = before.memory[f"blocks.{block}.attn"].double()
        assert 0 < basis.shape[1] < 16
        torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1], dtype=torch.float64))
        for letter in "kv":
            factors = fit.factors[f"blocks.{block}.attn.{letter}"]
            assert dense(factors).norm() > 0
            assert (dense(factors) @ basis).norm() < 1e-5 * dense(factors).norm()


def test_inflora_trains_the_up_factors_alone_and_key_and_value_share_the_other() -> None:
    fit = make_fit(learn(1, method="inflora"), 2, method="inflora")
    names = {name.rsplit(".", 1)[-1] for name, p in fit.model.backbone.named_parameters() if p.requires_grad}
    factors = fit.result().factors

    assert names == {"up"}
    assert list(fit.model.targets) == [f"blocks.{i}.attn.{letter}" for i in (0, 1) for letter in "kv"]
    assert torch.equal(factors["blocks.0.attn.k"].down, factors["blocks.0.attn.v"].down)


def test_the_memory_of_inflora_holds_the_energy_of_all_inputs_so_far() -> None:
    one = learn(1, method="inflora")
    fit = make_fit(one, 2, method="inflora")
    for _ in fit.run():
        pass
    memory = fit.result().memory

    for path, moment in inflora.second_moments(fit.model, fit._batches).items():
        basis = memory[path].double()
        rest = moment - basis @ (basis.T @ moment)
        assert 1 - rest.square().sum() / moment.square().sum() >= 0.98 - 1e-6
        earlier = one.memory[path].double()
        torch.testing.assert_close(basis @ (basis.T @ earlier), earlier, rtol=0, atol=1e-5)
        assert basis.shape[1] < 16


@pytest.mark.parametrize("make", FAMILIES)
def test_inflora_sees_the_inputs_of_every_family(make) -> None:  # noqa: ANN001
    fit = make_fit(ModelState(), 1, method="inflora", backbone=make())
    for _ in fit.run():
        pass

    assert fit.result().memory.keys() == {"blocks.0.attn", "blocks.1.attn"}
    assert all(dense(factors).norm() > 0 for factors in fit.result().factors.values())


def test_inflora_refuses_to_go_on_without_its_memory() -> None:
    before = replace(learn(1, method="inflora"), memory={})

    with pytest.raises(ValueError, match=r"remembers no inputs of blocks\.0\.attn"):
        make_fit(before, 2, method="inflora")


def test_inflora_leaves_a_rank_unused_where_no_free_direction_is_left() -> None:
    basis = torch.eye(6, dtype=torch.float64)[:, :4]
    moment = torch.diag(torch.arange(6.0, 0.0, -1.0, dtype=torch.float64))
    down = inflora.designed_down(moment, basis, rank=4)

    assert (down.norm(dim=1) > 0).tolist() == [True, True, False, False]
    assert torch.equal(down[:, :4], torch.zeros(4, 4, dtype=torch.float64))
    torch.testing.assert_close(3 * (down @ down.T)[:2, :2], torch.eye(2, dtype=torch.float64))


def test_joint_trains_every_row_on_all_tasks_from_the_pretrained_model() -> None:
    after, alone = trained("joint", learn(2, method="joint"), 3), trained("joint", ModelState(), 3)

    assert make_fit(ModelState(), 3, method="joint").images == 3 * 24
    assert list(after.head) == ["t01", "t02", "t03"]
    for task in after.head:
        start = make_fit(ModelState(), 3, method="joint").result().head[task]
        assert torch.equal(after.head[task].weight, alone.head[task].weight)
        assert not torch.equal(after.head[task].weight, start.weight)


def test_joint_learns_all_classes_at_once() -> None:
    fit = make_fit(ModelState(), 3, method="joint", epochs=30)
    for _ in fit.run():
        pass

    assert fit.curve[-1].accuracy == 1
    assert fit.model(torch.zeros(1, 1, 8, 8)).shape == (1, 6)


def test_a_method_other_than_joint_is_given_one_task_only() -> None:
    joint = make_fit(ModelState(), 2, method="joint")

    with pytest.raises(ValueError, match="2 tasks for a method that learns one at a time"):
        type(joint)(
            tiny_vit(), ModelState(), tasks={"t01": tiny_task(1), "t02": tiny_task(2)}, mean=[0.5], std=[0.5],
            method=METHODS["sdlora"], settings=settings(), schedule=joint.schedule, seed=0,
            device=torch.device("cpu"),
        )  # fmt: skip


def test_ncm_trains_nothing() -> None:
    fit = make_fit(ModelState(), 1, method="ncm")

    assert (fit.total_steps, fit.trained_parameters, list(fit.run())) == (0, 0, [])
    assert isinstance(fit.model, IncrementalClassifier)
    assert fit.model.targets == {}


def test_the_example_in_the_documentation_is_a_method(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (REPOSITORY / "docs/how-to/add-a-method.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], names)  # type: ignore[index]
    monkeypatch.setitem(METHODS, "first", names["METHOD"])
    one, three = learn(1, method="first"), learn(3, method="first")

    assert list(three.directions) == ["t01"]
    assert list(three.head) == ["t01", "t02", "t03"]
    for name, factors in one.directions["t01"].items():
        assert torch.equal(three.directions["t01"][name].up, factors.up)
    assert (three.magnitudes["t01"] != one.magnitudes["t01"]).all()
