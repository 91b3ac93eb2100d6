"""An evaluation keeps two numbers of each image, however many classes there are."""

from pathlib import Path

import psutil
import pytest
import torch
from torch import Tensor, nn

from pipelines.data.packed import ImageRow, write_images
from pipelines.data.pixel_cache import PackedImages
from pipelines.project.settings import Evaluation
from pipelines.stages.evaluate import _predict
from tests.support.chains import TINY_PREPROCESSING as WAY
from tests.support.chains import encoded, picture

BATCH, BATCHES, CLASSES = 64, 40, 10_000


class ManyClasses(nn.Module):
    """Logits of the class whose number is an image's brightness, and of many more."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = nn.Parameter(torch.arange(CLASSES, dtype=torch.float32))

    def forward(self, images: Tensor) -> Tensor:
        brightness = images.mean(dim=(1, 2, 3), keepdim=True)[:, 0, 0]
        return -(brightness * 1000 - self.numbers).abs()


def test_memory_does_not_grow_with_the_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits of all batches, of 10,000 classes, would take a hundred megabytes."""
    monkeypatch.chdir(tmp_path)
    image = encoded(picture(1))
    write_images(
        tmp_path / "t01.arrow",
        [ImageRow(f"t01/{index}", 0, image, "s", "p") for index in range(BATCH * BATCHES)],
    )
    settings = Evaluation(batch_size=BATCH, precision="fp32")
    images = [("t01", PackedImages(tmp_path / "t01.arrow", WAY))]
    process = psutil.Process()
    before = process.memory_info().rss
    classes, confidences, _ = _predict("t01", ManyClasses(), images, WAY, settings)
    grown = process.memory_info().rss - before
    assert len(classes) == len(confidences) == BATCH * BATCHES
    assert len(set(classes.tolist())) == 1
    assert grown < 2**20 * 50
