"""Adapters change what they say they change, and nothing else."""

import pytest
import timm
import torch
from timm.models import VisionTransformer
from torch import nn

from sdlora.adapters import (
    Factors,
    factor_norms,
    initial_factors,
    inject_adapters,
    merge_adapters,
    product_norm,
    projection_norms,
    truncate,
)
from sdlora.classifier import IncrementalClassifier, ModelState, merged_classifier
from tests.support.tiny_model import tiny_vit
from tests.support.vision_transformers import FAMILIES

IMAGES = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def random_factors(rows: int, columns: int, rank: int, seed: int = 0) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    return Factors(
        torch.randn(rows, rank, generator=generator), torch.randn(rank, columns, generator=generator)
    )


@pytest.mark.parametrize("make", FAMILIES)
def test_injecting_adapters_leaves_the_output_unchanged(make) -> None:  # noqa: ANN001
    expected = make()(IMAGES)
    model = make()
    inject_adapters(model)

    assert torch.equal(model(IMAGES), expected)


@pytest.mark.parametrize("make", FAMILIES)
def test_targets_are_query_and_value_of_every_block(make) -> None:  # noqa: ANN001
    targets = inject_adapters(make())

    assert list(targets) == ["blocks.0.attn.q", "blocks.0.attn.v", "blocks.1.attn.q", "blocks.1.attn.v"]
    assert all((target.rows, target.columns) == (16, 16) for target in targets.values())


@pytest.mark.parametrize("make", FAMILIES)
def test_a_new_direction_leaves_the_output_unchanged(make) -> None:  # noqa: ANN001
    expected = make()(IMAGES)
    model = IncrementalClassifier(make(), ModelState())
    model.set_directions({}, torch.ones(1, 1), trained=True)
    generator = torch.Generator().manual_seed(0)
    model.train_direction({name: initial_factors(16, 16, 3, generator=generator) for name in model.targets})

    torch.testing.assert_close(model.features(IMAGES), expected, rtol=0, atol=0)


@pytest.mark.parametrize("make", FAMILIES)
def test_the_adapted_weight_is_the_formula_and_the_key_rows_stay(make) -> None:  # noqa: ANN001
    plain, backbone = make(), make()
    model = IncrementalClassifier(backbone, ModelState())
    names = list(model.targets)
    frozen = {
        task: {name: random_factors(16, 16, 2, seed=10 * k + i) for i, name in enumerate(names)}
        for k, task in enumerate(["t01", "t02"])
    }
    magnitudes = torch.tensor([[0.5, -1.0, 2.0, 0.0], [1.5, 0.25, -0.5, 1.0]])
    model.set_directions(frozen, magnitudes, trained=False)
    merge_adapters(backbone)

    for i, name in enumerate(names):
        block, letter = int(name.split(".")[1]), name[-1]
        expected = sum(magnitudes[k, i] * f[name].up @ f[name].down for k, f in enumerate(frozen.values()))
        before, after = (m.blocks[block].attn for m in (plain, backbone))
        if before.qkv is not None:
            rows = slice(0, 16) if letter == "q" else slice(32, 48)
            change = (after.qkv.weight - before.qkv.weight)[rows]
            assert torch.equal(after.qkv.weight[16:32], before.qkv.weight[16:32])
        else:
            change = getattr(after, f"{letter}_proj").weight - getattr(before, f"{letter}_proj").weight
            assert torch.equal(after.k_proj.weight, before.k_proj.weight)
        torch.testing.assert_close(change, expected, rtol=1e-5, atol=1e-6)


EVERYTHING = ("q", "k", "v", "proj", "fc1", "fc2")


@pytest.mark.parametrize("make", FAMILIES)
@pytest.mark.parametrize("targets", [("k",), ("v", "q"), ("proj", "fc2"), EVERYTHING], ids="-".join)
def test_any_set_of_targets_is_adapted_and_nothing_else(make, targets: tuple[str, ...]) -> None:  # noqa: ANN001
    plain, backbone = make(), make()
    model = IncrementalClassifier(backbone, ModelState(), targets=targets)
    names = list(model.targets)
    direction = {
        name: random_factors(target.rows, target.columns, 2, seed=i)
        for i, (name, target) in enumerate(model.targets.items())
    }
    learned = ModelState(directions={"t01": direction}, magnitudes={"t01": torch.full((len(names),), 0.1)})
    merged = merged_classifier(make(), learned).backbone
    changed = {
        name
        for name, tensor in merged.state_dict().items()
        if not torch.equal(tensor, plain.state_dict()[name])
    }

    assert {name.rpartition(".")[2] for name in names} == set(targets)
    assert len(names) == 2 * len(targets)
    assert learned.targets == tuple(letter for letter in EVERYTHING if letter in targets)
    for i in (0, 1):
        attention = plain.blocks[i].attn
        expected = {f"blocks.{i}.attn.{letter}_proj.weight" for letter in "qkv" if letter in targets}
        if attention.qkv is not None:
            expected = {f"blocks.{i}.attn.qkv.weight"} if expected else set()
        expected |= {f"blocks.{i}.attn.proj.weight"} if "proj" in targets else set()
        expected |= {f"blocks.{i}.mlp.{name}.weight" for name in ("fc1", "fc2") if name in targets}
        assert {name for name in changed if name.startswith(f"blocks.{i}.")} == expected
    assert all(name.startswith("blocks.") for name in changed)


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_truncation_is_the_best_approximation_of_its_rank(rank: int) -> None:
    factors = random_factors(12, 9, 5)
    whole = (factors.up @ factors.down).double()
    values = torch.linalg.svdvals(whole)[:5]
    share = (values[:rank].square().sum() / values.square().sum()).item()
    found = truncate(factors, energy=share - 1e-6)

    assert found.down.shape == (rank, 9)
    expected = values[rank:].square().sum().sqrt().item()
    error = (whole - found.up.double() @ found.down.double()).norm().item()
    assert error == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_truncating_a_zero_direction_leaves_it() -> None:
    factors = Factors(torch.zeros(6, 2), torch.ones(2, 6))

    assert truncate(factors, energy=0.5) is factors


def test_a_target_that_a_block_lacks_is_named() -> None:
    model = tiny_vit()
    model.blocks[1].mlp = nn.Identity()

    with pytest.raises(ValueError, match=r"block 1 has no linear `mlp\.fc1`; .* other adapter\.targets"):
        inject_adapters(model, ("fc1",))


def test_merging_leaves_a_plain_timm_model_with_the_same_output() -> None:
    learned = ModelState(directions={"t01": {}}, magnitudes={"t01": torch.full((4,), 0.3)}, head={})
    names = list(inject_adapters(tiny_vit()))
    learned = ModelState(
        directions={"t01": {name: random_factors(16, 16, 2, seed=i) for i, name in enumerate(names)}},
        magnitudes=learned.magnitudes,
    )
    adapted = IncrementalClassifier(tiny_vit(), learned)
    adapted.set_directions(learned.directions, learned.magnitudes["t01"][None], trained=False)
    merged = merged_classifier(tiny_vit(), learned).backbone

    assert merged.state_dict().keys() == tiny_vit().state_dict().keys()
    assert type(merged.blocks[0].attn.qkv) is nn.Linear
    torch.testing.assert_close(merged(IMAGES), adapted.features(IMAGES), rtol=1e-5, atol=1e-6)


def test_norms_come_from_small_gram_matrices_and_are_exact() -> None:
    factors = random_factors(30, 20, 4)

    torch.testing.assert_close(product_norm(factors), (factors.up @ factors.down).norm())
    torch.testing.assert_close(factor_norms(factors), factors.up.norm() * factors.down.norm())


def test_a_backbone_without_attention_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="ResNet has no `blocks`"):
        inject_adapters(timm.create_model("resnet10t", num_classes=0))


def test_a_backbone_whose_attention_is_of_another_kind_is_refused() -> None:
    model = VisionTransformer(img_size=8, patch_size=4, embed_dim=16, depth=1, num_heads=2)
    model.blocks[0].attn = nn.Identity()

    with pytest.raises(ValueError, match=r"neither a linear `attn\.qkv`"):
        inject_adapters(model)


def test_norms_are_those_of_the_rows_that_a_target_adapts() -> None:
    model = tiny_vit()
    norms = projection_norms(model)
    assert list(norms)[:2] == ["blocks.0.attn.q", "blocks.1.attn.q"]
    assert {name.rpartition(".")[2] for name in norms} == {"q", "k", "v", "proj", "fc1", "fc2"}
    block = model.get_submodule("blocks.1")
    weight = block.get_parameter("attn.qkv.weight").detach()
    third = weight.shape[0] // 3
    assert norms["blocks.1.attn.v"] == pytest.approx(float(weight[2 * third :].norm()), rel=1e-5)
    assert norms["blocks.1.mlp.fc2"] == pytest.approx(
        float(block.get_parameter("mlp.fc2.weight").detach().norm()), rel=1e-5
    )
