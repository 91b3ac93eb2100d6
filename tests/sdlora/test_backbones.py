"""Backbones load by name or from a file, and a chain's first step holds exactly what was loaded."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

from sdlora.backbones import GLYPH_VIT, create_backbone, read_backbone, write_backbone
from sdlora.ledger import read_record
from sdlora.tensors import file_sha256, write_tensors

PACKAGED = Path(__file__).parents[2] / "sdlora" / "weights" / "glyph_vit.safetensors"


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


def test_changed_weights_of_a_chain_are_noticed(tmp_path: Path) -> None:
    write_backbone(tmp_path, create_backbone("glyph_vit"))
    data = bytearray((tmp_path / "backbone.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "backbone.safetensors").write_bytes(data)

    with pytest.raises(ValueError, match="changed since the chain began"):
        read_backbone(tmp_path)
