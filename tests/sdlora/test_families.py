"""Every family of timm's vision transformers goes through a chain: adapted, trained, frozen, written, merged."""

from pathlib import Path

import pytest
import torch

from sdlora.adapters import TARGETS, target_of
from sdlora.backbones import read_backbone, write_backbone
from sdlora.classifier import IncrementalClassifier, Learned, merged_classifier
from sdlora.freezing import freeze
from sdlora.methods import METHODS
from sdlora.model_folder import read_model, write_model
from sdlora.training import Fit, TaskImages
from tests.families import FAMILIES, tiny_backbone
from tests.sdlora.conftest import schedule, settings


@pytest.mark.parametrize("architecture", FAMILIES)
def test_two_steps_are_learned_and_the_written_model_is_the_trained_one(
    architecture: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    base = tiny_backbone(architecture)
    pixels = torch.randint(0, 256, (6, *base.input_size), dtype=torch.uint8)
    images = torch.rand(3, *base.input_size)
    write_backbone(tmp_path, base)
    learned = Learned()
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
        trained = fit.model.eval().features(images)
    (tmp_path / "model").mkdir()
    write_model(
        tmp_path / "model",
        learned,
        {"tasks": ["t01", "t02"], "directions": ["t01", "t02"], "targets": list(learned.directions["t01"])},
    )
    read, _ = read_model(tmp_path / "model")
    merged = merged_classifier(read_backbone(tmp_path).model, read)

    torch.testing.assert_close(merged.features(images), trained, rtol=1e-4, atol=1e-5)
    assert all(factors.up.any() for direction in read.directions.values() for factors in direction.values())
    assert merged(images).shape == (3, 4)
    assert merged.backbone.state_dict().keys() == base.model.state_dict().keys()


@pytest.mark.parametrize("architecture", FAMILIES)
def test_every_target_of_every_block_is_found(architecture: str) -> None:
    base = tiny_backbone(architecture)
    images = torch.rand(2, *base.input_size)
    expected = base.model(images)
    model = IncrementalClassifier(base.model, Learned(), targets=TARGETS)
    found = [name for name in model.targets if name.startswith("blocks.1.")]

    assert model.feature_size == expected.shape[1]
    torch.testing.assert_close(model.features(images), expected, rtol=1e-5, atol=1e-5)
    assert [target_of(name) for name in found if not name.endswith("fc1_x")] == list(TARGETS)
