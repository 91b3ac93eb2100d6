"""Prediction uses every class seen and nothing that depends on the batch."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sdlora.classifier import ModelState, merged_classifier
from sdlora.evaluation import predict_batches
from tests.support.tiny_model import tiny_task, tiny_vit


def predict(learned: ModelState, batch_size: int, *, bf16: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.cat([tiny_task(index)[0] for index in (1, 2, 3)])
    batches = list(
        predict_batches(
            merged_classifier(tiny_vit(), learned),
            images.split(batch_size),
            mean=[0.5],
            std=[0.5],
            device=torch.device("cpu"),
            bf16=bf16,
        )
    )
    return torch.cat([b.classes for b in batches]), torch.cat([b.confidences for b in batches])


def test_every_class_seen_so_far_is_a_candidate(three_steps: dict[str, ModelState]) -> None:
    classes, confidences = predict(three_steps["continuous"], 100)

    assert classes.shape == (72,)
    assert set(classes.tolist()) <= set(range(6))
    assert len(set((classes // 2).tolist())) > 1
    assert ((confidences >= 1 / 6 - 1e-6) & (confidences <= 1)).all()


def test_predictions_do_not_depend_on_the_batch_size(three_steps: dict[str, ModelState]) -> None:
    whole, single = predict(three_steps["continuous"], 100), predict(three_steps["continuous"], 1)

    assert torch.equal(whole[0], single[0])
    torch.testing.assert_close(whole[1], single[1])


def test_bf16_predicts_nearly_the_same(three_steps: dict[str, ModelState]) -> None:
    full = predict(three_steps["continuous"], 100)
    half = predict(three_steps["continuous"], 100, bf16=True)

    assert half[1].dtype == torch.float32
    assert not torch.equal(full[1], half[1])
    torch.testing.assert_close(half[1], full[1], rtol=0, atol=0.02)


def test_the_head_computes_in_full_precision_under_autocast(three_steps: dict[str, ModelState]) -> None:
    model = merged_classifier(tiny_vit(), three_steps["continuous"])
    images = tiny_task(1)[0].float() / 255
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        features, logits = model.features(images), model(images)
        rounded = model.head(features)

    with torch.inference_mode():
        assert torch.equal(logits, model.head(features.float()))
    assert rounded.dtype == torch.bfloat16
    assert not torch.equal(logits, rounded.float())


def test_a_gpu_has_its_next_batches_before_the_host_waits_for_a_result(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On tensors of a GPU that is not there: their values do not exist, so whoever looks at one fails."""
    said: list[str] = []

    class Event:
        def __init__(self) -> None:
            self.batch = sum(line.startswith("given") for line in said)

        def synchronize(self) -> None:
            said.append(f"waited for {self.batch}")

    class Stream:
        def record_event(self) -> Event:
            return Event()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3, device="cuda")

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            said.append(f"given {1 + sum(line.startswith('given') for line in said)}")
            return self.layer(images.flatten(1))

    monkeypatch.setattr("torch.cuda.current_stream", lambda device: Stream())
    with FakeTensorMode():
        batches = [torch.zeros(5, 1, 2, 2, dtype=torch.uint8) for _ in range(4)]
        found = list(predict_batches(Model(), batches, mean=[0.5], std=[0.5], device=torch.device("cuda")))

    assert [tuple(part.shape for part in batch[:2]) for batch in found] == [((5,), (5,))] * 4
    assert all(part.device.type == "cpu" for batch in found for part in batch[:2])
    assert all(batch.scores is None for batch in found)
    assert said == [
        *("given 1", "given 2", "given 3", "waited for 1", "given 4", "waited for 2"),
        *("waited for 3", "waited for 4"),
    ]
