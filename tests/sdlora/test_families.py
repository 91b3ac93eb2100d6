"""Every family of timm's vision transformers goes through a chain: adapted, trained, frozen, written, merged."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from sdlora.adapters import TARGETS, target_of
from sdlora.backbones import PREPROCESSING, Backbone, read_backbone, write_backbone
from sdlora.classifier import IncrementalClassifier, ModelState, merged_classifier
from sdlora.freezing import freeze
from sdlora.methods import METHODS
from sdlora.model_folder import read_model
from sdlora.training import Fit, TaskImages
from tests.support.model_chains import write_chain
from tests.support.tiny_model import schedule, settings

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
FLEXIBLE = {key: value for key, value in TINY.items() if key != "img_size"}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "vit_base_patch16_224": TINY,
    "vit_base_patch16_clip_224": TINY,  # a norm before the blocks
    "vit_large_patch14_clip_quickgelu_224": TINY,
    "vit_base_patch16_siglip_224": TINY,  # attention pooling
    "vit_base_patch16_siglip_gap_224": TINY,
    "vit_base_patch16_rpn_224": TINY,  # norms after attention and MLP
    "vit_small_patch14_dinov2": TINY,  # layer-scale
    "vit_small_patch14_reg4_dinov2": TINY,  # register tokens
    "vit_giant_patch14_dinov2": TINY,  # a gated MLP, packed
    "vit_little_patch16_reg4_gap_256": TINY,
    "vit_dwee_patch16_reg1_gap_256": TINY,  # differential attention
    "vit_intern300m_patch14_448": TINY,
    "vit_so150m_patch16_reg4_map_256": TINY,
    "flexivit_small": TINY,
    "aimv2_large_patch14_224": TINY,  # a gated MLP in two parts
    "vit_relpos_small_patch16_224": TINY,  # a relative position bias
    "samvit_base_patch16_224": TINY,  # window attention
    "vit_tiny_r_s16_p8_224": {key: value for key, value in TINY.items() if key != "patch_size"},  # a stem
    "deit_tiny_patch16_224": TINY,
    "deit_tiny_distilled_patch16_224": TINY,  # two class tokens
    "deit3_small_patch16_224": TINY,
    "beit_base_patch16_224": TINY,  # separate biases
    "beitv2_base_patch16_224": TINY,
    "eva_large_patch14_196": TINY,
    "eva02_tiny_patch14_224": TINY,  # rotary positions, split projections
    "eva02_base_patch16_clip_224": TINY,
    "vit_small_patch16_dinov3": TINY,
    "vit_small_plus_patch16_dinov3": TINY,
    "vit_small_patch16_rope_mixed_ape_224": TINY,
    "vit_medium_patch16_rope_reg1_gap_256": TINY,
    "vit_pe_core_base_patch16_224": TINY,
    "naflexvit_base_patch16_gap": FLEXIBLE,
    "naflexvit_base_patch16_map": FLEXIBLE,
    "cait_xxs24_224": TINY,
    "xcit_nano_12_p16_224": {**TINY, "patch_size": 16},  # attention between channels
}
"""timm's architecture → what makes it tiny."""


def tiny_backbone(architecture: str, *, seed: int = 0) -> Backbone:
    """The architecture at tiny size, with random weights, for 32×32 images (naflexvit: of its own size)."""
    arguments = ARCHITECTURES[architecture]
    torch.manual_seed(seed)
    model = timm.create_model(architecture, num_classes=0, **arguments).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # some start so near zero that nothing would reach the features
            parameter.add_(0.1 * torch.randn_like(parameter))
    config = timm.data.resolve_model_data_config(model)
    channels, height, width = config["input_size"]
    if "img_size" in arguments:
        height = width = arguments["img_size"]
    config["input_size"] = (channels, height, width)
    return Backbone(
        model=model,
        description={
            "name": architecture,
            "features": model.num_features,
            "model_args": arguments,
            "pretrained_cfg": {key: config[key] for key in PREPROCESSING},
        },
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_two_steps_are_learned_and_the_written_model_is_the_trained_one(
    architecture: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    base = tiny_backbone(architecture)
    pixels = torch.randint(0, 256, (6, *base.input_size), dtype=torch.uint8)
    images = torch.rand(3, *base.input_size)
    write_backbone(tmp_path, base)
    learned = ModelState()
    steps: list[ModelState] = []
    for task in ("t01", "t02"):
        fit = Fit(
            read_backbone(tmp_path).model,
            learned,
            tasks={task: TaskImages(pixels, torch.tensor([0, 1] * 3))},
            mean=base.description["pretrained_cfg"]["mean"],
            std=base.description["pretrained_cfg"]["std"],
            method=METHODS["sdlora"],
            settings=settings(),
            schedule=schedule(epochs=1, batch_size=3),
            seed=1,
            device=torch.device("cpu"),
            targets=TARGETS,
        )
        for _ in fit.run():
            pass
        learned = freeze(learned, fit.result(), method=METHODS["sdlora"], settings=settings()).learned
        steps.append(learned)
        trained = fit.model.eval().features(images)
    read, _ = read_model(write_chain(tmp_path / "chain", steps) / "t02")
    merged = merged_classifier(read_backbone(tmp_path).model, read)

    torch.testing.assert_close(merged.features(images), trained, rtol=1e-4, atol=1e-5)
    assert all(factors.up.any() for direction in read.directions.values() for factors in direction.values())
    assert merged(images).shape == (3, 4)
    assert merged.backbone.state_dict().keys() == base.model.state_dict().keys()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_target_of_every_block_is_found(architecture: str) -> None:
    base = tiny_backbone(architecture)
    images = torch.rand(2, *base.input_size)
    expected = base.model(images)
    model = IncrementalClassifier(base.model, ModelState(), targets=TARGETS)
    found = [name for name in model.targets if name.startswith("blocks.1.")]

    assert model.feature_size == expected.shape[1]
    torch.testing.assert_close(model.features(images), expected, rtol=1e-5, atol=1e-5)
    assert [target_of(name) for name in found if not name.endswith("fc1_x")] == list(TARGETS)
