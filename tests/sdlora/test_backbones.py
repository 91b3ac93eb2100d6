"""Backbones load by name or from a file, and a chain's first step holds exactly what was loaded."""

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

from sdlora.backbones import (
    GLYPH_VIT,
    create_backbone,
    read_backbone,
    read_description,
    spell_out_attention,
    write_backbone,
)
from sdlora.ledger import file_sha256, read_record
from sdlora.tensors import write_tensors
from tests.support.families import FAMILIES
from tests.support.repository import REPOSITORY
from tests.support.tiny_model import tiny_vit

PACKAGED = REPOSITORY / "sdlora" / "weights" / "glyph_vit.safetensors"


def test_the_packaged_backbone_loads_through_timm_by_its_name() -> None:
    model = timm.create_model("glyph_vit", pretrained=True, num_classes=0)
    shipped = load_file(PACKAGED)

    assert model.state_dict().keys() == shipped.keys()
    assert all(torch.equal(tensor, shipped[name].float()) for name, tensor in model.state_dict().items())


def test_the_packaged_weights_are_the_described_ones_and_small() -> None:
    assert file_sha256(PACKAGED) == GLYPH_VIT["sha256"]
    assert PACKAGED.stat().st_size < 8_000_000


def test_a_written_backbone_is_read_back_to_the_bit(tmp_path: Path) -> None:
    created = create_backbone("glyph_vit")
    write_backbone(tmp_path, created)
    found = read_backbone(tmp_path)
    images = torch.rand(2, *created.input_size, generator=torch.Generator().manual_seed(0))

    assert found.input_size == (1, 32, 32)
    assert torch.equal(found.model(images), created.model(images))
    assert read_record(tmp_path)["step"] == "t00"
    assert {path.name for path in tmp_path.iterdir()} == {
        "backbone.safetensors",
        "backbone.json",
        "step.json",
    }


def test_a_local_file_takes_the_place_of_the_own_weights(tmp_path: Path) -> None:
    changed = {name: tensor + 1 for name, tensor in create_backbone("glyph_vit").model.state_dict().items()}
    write_tensors(tmp_path / "mine.safetensors", changed)
    found = create_backbone("glyph_vit", weights=tmp_path / "mine.safetensors")

    assert all(torch.equal(tensor, changed[name]) for name, tensor in found.model.state_dict().items())


def test_an_unknown_name_is_refused_with_near_ones() -> None:
    with pytest.raises(
        ValueError, match="has no model 'vit_tiny_patch16'; did you mean vit_tiny_patch16_224"
    ):
        create_backbone("vit_tiny_patch16")


def test_a_name_without_the_tag_of_its_weights_is_refused_with_the_tags() -> None:
    with pytest.raises(ValueError, match=r"write vit_tiny_patch16_224\.TAG with one of augreg_in21k, augreg"):
        create_backbone("vit_tiny_patch16_224")
    with pytest.raises(ValueError, match=r"has no weights 'mine' for it; write vit_tiny_patch16_224\.TAG"):
        create_backbone("vit_tiny_patch16_224.mine")


def test_weights_that_timm_has_in_a_format_that_can_run_code_only_are_refused() -> None:
    with pytest.raises(ValueError, match=r"no \.safetensors file for it .*; convert its weights"):
        create_backbone("gcvit_tiny.in1k")


def test_without_a_network_it_is_said_that_weights_could_not_be_fetched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        FileNotFoundError, match=r"augreg_in21k could not be fetched: .*[Cc]annot find|offline"
    ):
        create_backbone("vit_tiny_patch16_224.augreg_in21k")


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224.augreg_in21k", "flexivit_small.300ep_in1k"])
def test_the_hub_is_asked_for_the_safetensors_file_and_for_no_other(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked for the default file, timm would fall back to a pickle."""
    asked = []

    def refuse(*positional: str, **named: str | None) -> str:
        asked.append(named.get("filename") or positional[1])
        raise OSError("no network here")

    monkeypatch.setattr("timm.models._hub.hf_hub_download", refuse)
    with pytest.raises(
        FileNotFoundError, match=f"the weights of {name} could not be fetched: no network here"
    ):
        create_backbone(name)
    assert asked == ["model.safetensors"]


def test_a_whole_checkpoint_with_its_classifier_loads_as_a_backbone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = timm.create_model("test_vit", num_classes=1000).eval()
    write_tensors(tmp_path / "whole.safetensors", whole.state_dict())
    found = create_backbone("test_vit.r160_in1k", weights=tmp_path / "whole.safetensors")
    images = torch.rand(1, 3, 160, 160)

    expected = whole.forward_head(whole.forward_features(images), pre_logits=True)
    torch.testing.assert_close(found.model(images), expected)


def test_another_image_size_goes_with_the_chain(tmp_path: Path) -> None:
    torch.manual_seed(0)
    own = timm.create_model("test_vit", num_classes=0)
    write_tensors(tmp_path / "own.safetensors", own.state_dict())
    created = create_backbone(
        "test_vit.r160_in1k", weights=tmp_path / "own.safetensors", image_size=64, input_normalisation="none"
    )
    write_backbone(tmp_path, created)
    found = read_backbone(tmp_path)

    assert found.input_size == (3, 64, 64)
    assert found.description["pretrained_cfg"]["mean"] == [0.0, 0.0, 0.0]
    assert found.description["pretrained_cfg"]["std"] == [1.0, 1.0, 1.0]
    images = torch.rand(1, 3, 64, 64)
    assert torch.equal(found.model(images), created.model(images))


def test_an_image_size_that_the_model_cannot_take_is_refused(tmp_path: Path) -> None:
    write_tensors(
        tmp_path / "own.safetensors", timm.create_model("cait_xxs24_224", num_classes=0).state_dict()
    )
    with pytest.raises(ValueError, match=r"backbone\.image_size: .* does not take images of 63×63"):
        create_backbone("resnet10t.c3_in1k", weights=tmp_path / "own.safetensors", image_size=63)


def test_a_missing_weight_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.safetensors: no such weight file"):
        create_backbone("glyph_vit", weights=tmp_path / "absent.safetensors")


def test_a_format_that_can_run_code_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"only \.safetensors files are loaded"):
        create_backbone("glyph_vit", weights=tmp_path / "model.pth")


def test_a_truncated_weight_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "cut.safetensors").write_bytes(PACKAGED.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"cut\.safetensors: not a whole safetensors file"):
        create_backbone("glyph_vit", weights=tmp_path / "cut.safetensors")


def test_the_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    write_tensors(tmp_path / "other.safetensors", {"somewhere.weight": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"other\.safetensors: no weights that fit glyph_vit"):
        create_backbone("glyph_vit", weights=tmp_path / "other.safetensors")


TINY = "tiny_vit.random"


def own_weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return FAMILIES["tiny_vit"]().state_dict()


def load(folder: Path, tensors: dict[str, torch.Tensor], said: list[str] | None = None) -> nn.Module:
    write_tensors(folder / "mine.safetensors", tensors)
    say = [].append if said is None else said.append
    return create_backbone(TINY, weights=folder / "mine.safetensors", say=say).model


@pytest.mark.parametrize("prefix", ["model.", "module.", "backbone.", "_orig_mod.", "module.model."])
@pytest.mark.parametrize("classifier", ["head", "fc", "model.head", None])
def test_what_a_wrapper_wrote_before_all_names_is_taken_off_and_said(
    prefix: str, classifier: str | None, tmp_path: Path
) -> None:
    own, said = own_weights(), []
    tensors = {f"{prefix}{name}": tensor for name, tensor in own.items()}
    if classifier is not None:
        name = classifier.replace("model.", prefix)
        tensors |= {f"{name}.weight": torch.zeros(5, 24), f"{name}.bias": torch.zeros(5)}
    found = load(tmp_path, tensors, said).state_dict()

    assert found.keys() == own.keys()
    assert all(torch.equal(found[name], own[name]) for name in own)
    (line,) = said
    assert line.endswith(
        f"mine.safetensors: {prefix} stands before the names of its tensors; it was taken off"
    )


def test_weights_with_their_own_names_are_taken_without_a_word(tmp_path: Path) -> None:
    said: list[str] = []
    load(tmp_path, own_weights(), said)

    assert not said


def test_missing_weights_are_refused_with_three_of_their_names(tmp_path: Path) -> None:
    own = {name: tensor for name, tensor in own_weights().items() if "attn" not in name}
    with pytest.raises(
        ValueError,
        match=r"it lacks blocks\.0\.attn\.qkv\.weight, blocks\.0\.attn\.qkv\.bias, blocks\.0\.attn\.proj\.weight "
        "and 5 more",
    ):
        load(tmp_path, own)


def test_weights_that_the_model_does_not_have_are_refused_with_three_of_their_names(tmp_path: Path) -> None:
    more = {f"decoder.{index}.weight": torch.zeros(2) for index in range(4)}
    with pytest.raises(
        ValueError,
        match=r"the model has no decoder\.0\.weight, decoder\.1\.weight, decoder\.2\.weight and 1 more",
    ):
        load(tmp_path, {**own_weights(), **more})


def test_weights_of_other_names_altogether_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"it lacks cls_token, .*; the model has no 30$"):
        load(tmp_path, {f"net.{name}": tensor for name, tensor in own_weights().items()})


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"another size has norm\.bias$"):
        load(tmp_path, {**own_weights(), "norm.bias": torch.zeros(7)})


def test_a_file_of_nothing_but_a_classifier_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing but a classifier"):
        load(tmp_path, {"head.weight": torch.zeros(5, 24), "head.bias": torch.zeros(5)})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(value: float, tmp_path: Path) -> None:
    own = own_weights()
    own["norm.weight"][3] = value
    with pytest.raises(ValueError, match=r"mine\.safetensors: norm\.weight holds NaN or infinity"):
        load(tmp_path, own)


def test_a_file_that_timm_takes_for_a_foreign_one_is_refused_in_one_line(tmp_path: Path) -> None:
    """By one of its names it is DINOv2's, whose other tensors it lacks."""
    with pytest.raises(ValueError, match="no weights that fit"):
        load(tmp_path, {"mask_token": torch.zeros(2), "visual.class_embedding": torch.zeros(2)})


def test_a_description_that_names_files_for_timm_is_refused(tmp_path: Path) -> None:
    """timm would load a pickle from there."""
    write_backbone(tmp_path, create_backbone("glyph_vit"))
    described = json.loads((tmp_path / "backbone.json").read_bytes())
    for change in (
        {"model_args": {"checkpoint_path": "evil.pth"}},
        {"name": "local-dir:evil"},
        {"name": "hf-hub:evil/model"},
    ):
        (tmp_path / "backbone.json").write_text(json.dumps({**described, **change}))
        with pytest.raises(ValueError, match=r"backbone\.json: (a key of model_args|timm .* has no model)"):
            read_description(tmp_path)


def test_changed_weights_of_a_chain_are_noticed(tmp_path: Path) -> None:
    write_backbone(tmp_path, create_backbone("glyph_vit"))
    data = bytearray((tmp_path / "backbone.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "backbone.safetensors").write_bytes(data)

    with pytest.raises(ValueError, match="changed since the step was frozen"):
        read_backbone(tmp_path)


def test_attention_by_its_formula_gives_the_features_and_gradients_of_the_fused_kernel() -> None:
    images = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    fused, spelled = tiny_vit(), tiny_vit()
    assert all(block.attn.fused_attn for block in fused.blocks)
    spell_out_attention(spelled)
    assert not any(block.attn.fused_attn for block in spelled.blocks)
    for model in (fused, spelled):
        model(images).square().sum().backward()
    torch.testing.assert_close(spelled(images), fused(images), rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(spelled.parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-5)
