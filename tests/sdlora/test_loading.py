"""A step is loaded as a plain timm model that computes what was evaluated."""

import gc
import subprocess
import sys
import weakref
from collections.abc import Iterable
from pathlib import Path

import pytest
import timm
import torch
from timm.models import VisionTransformer
from torch import nn

import sdlora
from sdlora.classifier import adapted_classifier, merged_classifier
from sdlora.loading import (
    classifier_names,
    head_rows,
    newest_step,
    read_step,
    summed_directions,
    timm_architecture,
    timm_classifier,
)
from tests.support.chains import make_chain, picture
from tests.support.families import FAMILIES

NAMES = ["glyph_vit", *FAMILIES]


@pytest.fixture(scope="module")
def chains(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """artifacts/model of a chain of two steps on every family."""
    return {name: make_chain(tmp_path_factory.mktemp(name), name) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_the_loaded_model_computes_what_is_evaluated(name: str, chains: dict[str, Path]) -> None:
    loaded = sdlora.load(chains[name] / "t02", device="cpu")
    step = read_step(chains[name] / "t02")
    images = torch.stack([loaded.transform(picture(seed)) for seed in range(4)])
    expected = merged_classifier(step.backbone.model, step.learned)(images)

    torch.testing.assert_close(loaded.module(images), expected, rtol=0, atol=1e-5)
    assert expected.std() > 0.01
    assert loaded.classes == [f"class {label} | ä" for label in range(4)]
    assert loaded.tasks == ["t01", "t02"]


def test_the_loaded_model_of_a_head_that_is_not_linear_computes_what_is_evaluated(tmp_path: Path) -> None:
    folder = make_chain(tmp_path, "tiny_vit", head="rgda") / "t02"
    loaded, step = sdlora.load(folder, device="cpu"), read_step(folder)
    images = torch.stack([loaded.transform(picture(seed)) for seed in range(4)])
    expected = merged_classifier(step.backbone.model, step.learned)(images)

    assert torch.equal(loaded.module(images), expected)
    assert not any(parameter.requires_grad for parameter in loaded.module.parameters())
    with pytest.raises(ValueError, match="the head is not linear"):
        timm_classifier(read_step(folder))


def test_the_linear_rows_of_a_head_that_is_not_linear_are_those_of_lda(tmp_path: Path) -> None:
    quadratic, linear = (
        make_chain(tmp_path / head, "tiny_vit", head=head) / "t02" for head in ("rgda", "lda")
    )
    found, own = read_step(quadratic, linear=True), read_step(linear, linear=True)

    assert (found.fallback, own.fallback) == ("lda", None)
    for name, rows in head_rows(own.learned).items():
        assert torch.equal(head_rows(found.learned)[name], rows)


@pytest.mark.parametrize("name", NAMES)
def test_the_loaded_model_is_timms_own(name: str, chains: dict[str, Path]) -> None:
    module = sdlora.load(chains[name] / "t01", device="cpu").module
    plain = timm.create_model(name, num_classes=2)

    assert type(module) is type(plain)
    assert module.state_dict().keys() == plain.state_dict().keys()
    assert not module.training
    assert not any(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_a_merged_model_is_the_layers_and_the_memory_of_the_plain_one(
    name: str, chains: dict[str, Path]
) -> None:
    module = sdlora.load(chains[name] / "t02", device="cpu").module
    plain = timm.create_model(name, num_classes=4)

    assert [type(layer) for layer in module.modules()] == [type(layer) for layer in plain.modules()]
    ours, theirs = module.state_dict(), plain.state_dict()
    for key, tensor in theirs.items():
        assert (ours[key].shape, ours[key].dtype) == (tensor.shape, tensor.dtype)
        assert ours[key].stride() == tensor.stride()
    assert memory(ours.values()) == memory(theirs.values())


@pytest.mark.parametrize("name", NAMES)
def test_a_merged_classifier_holds_no_directions_any_more(name: str, chains: dict[str, Path]) -> None:
    step = read_step(chains[name] / "t02")
    model = adapted_classifier(step.backbone.model, step.learned)
    directions = [weakref.ref(at) for at in model.targets.values()]
    assert directions

    model.merge()
    gc.collect()

    assert not [at for at in directions if at() is not None]


def memory(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of all memory that tensors are in, whether they use all of it or not."""
    blocks = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(blocks.values())


@pytest.mark.parametrize("name", NAMES)
def test_all_directions_of_a_layer_are_one_of_the_summed_rank(name: str, chains: dict[str, Path]) -> None:
    found = summed_directions(read_step(chains[name] / "t02"))
    merged = timm_classifier(read_step(chains[name] / "t02"))
    plain = read_step(chains[name] / "t02").backbone.model
    ranks = sum(
        pair.down.shape[0]
        for direction in read_step(chains[name] / "t02").learned.directions.values()
        for pair in direction.values()
    )

    for layer, (up, down) in found.items():
        change = merged.get_submodule(layer).weight - plain.get_submodule(layer).weight
        assert change.abs().max() > 1e-3
        torch.testing.assert_close(up @ down, change, rtol=0, atol=1e-5)
    assert sum(factors.down.shape[0] for factors in found.values()) == ranks


def test_importing_the_package_loads_no_torch() -> None:
    program = (
        "import sys, sdlora; print('torch' in sys.modules, callable(sdlora.load), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert done.stdout.split() == ["False", "True", "True"]
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = sdlora.nonsense


def test_of_a_chain_the_newest_step_is_loaded(chains: dict[str, Path], tmp_path: Path) -> None:
    folder = chains["tiny_vit"]
    assert newest_step(folder) == newest_step(folder / "t02") == folder / "t02"
    assert sdlora.load(folder, device="cpu").tasks == ["t01", "t02"]
    (tmp_path / "t03").mkdir()
    with pytest.raises(
        FileNotFoundError, match=r"no step\.json of a step, and no folder such as t01 with one"
    ):
        sdlora.load(tmp_path)


def test_a_step_without_classes_is_refused(chains: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="step t00 knows no classes yet"):
        sdlora.load(chains["tiny_vit"] / "t00")


def test_the_backbone_of_another_chain_is_refused(chains: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="t01: it began from another backbone"):
        sdlora.load(chains["tiny_vit"] / "t01", backbone=chains["tiny_beit"] / "t00")


def test_a_missing_backbone_is_named(chains: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"step t00, the backbone .* get it too"):
        sdlora.load(chains["tiny_vit"] / "t01", backbone=tmp_path)


def test_a_tampered_file_is_named(tmp_path: Path) -> None:
    models = make_chain(tmp_path, "tiny_vit")
    path = models / "t01/head/t01.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")

    with pytest.raises(ValueError, match=r"head/t01\.safetensors: changed since the step was frozen"):
        sdlora.load(models / "t02")


def test_a_classifier_that_is_not_linear_is_refused() -> None:
    model = VisionTransformer(img_size=8, patch_size=4, embed_dim=16, depth=1, num_heads=2, num_classes=3)
    model.head = nn.Sequential(nn.Linear(16, 3))

    with pytest.raises(ValueError, match="its classifier is a Sequential, expected a linear layer on its 16"):
        classifier_names(model)


def test_the_packaged_backbone_has_a_name_of_timms_own() -> None:
    name, arguments = timm_architecture({"name": "glyph_vit.fonts", "model_args": {}})
    ours = timm.create_model("glyph_vit", num_classes=0)
    theirs = timm.create_model(name, num_classes=0, **arguments)

    assert {key: value.shape for key, value in ours.state_dict().items()} == {
        key: value.shape for key, value in theirs.state_dict().items()
    }
    described = {"name": "vit_base_patch16_224.augreg_in21k", "model_args": {"img_size": 384}}
    assert timm_architecture(described) == ("vit_base_patch16_224", {"img_size": 384})
