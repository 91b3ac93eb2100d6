"""Prediction uses every class seen and nothing that depends on the batch."""

import torch

from sdlora.classifier import Learned, merged_classifier
from sdlora.evaluation import predict_batches
from tests.sdlora.conftest import tiny_task, tiny_vit


def predict(learned: Learned, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.cat([tiny_task(index)[0] for index in (1, 2, 3)])
    batches = list(
        predict_batches(
            merged_classifier(tiny_vit(), learned),
            images.split(batch_size),
            mean=[0.5],
            std=[0.5],
            device=torch.device("cpu"),
        )
    )
    return torch.cat([b.classes for b in batches]), torch.cat([b.confidences for b in batches])


def test_every_class_seen_so_far_is_a_candidate(three_steps: dict[str, Learned]) -> None:
    classes, confidences = predict(three_steps["continuous"], 100)

    assert classes.shape == (72,)
    assert set(classes.tolist()) <= set(range(6))
    assert len(set((classes // 2).tolist())) > 1
    assert ((confidences >= 1 / 6 - 1e-6) & (confidences <= 1)).all()


def test_predictions_do_not_depend_on_the_batch_size(three_steps: dict[str, Learned]) -> None:
    whole, single = predict(three_steps["continuous"], 100), predict(three_steps["continuous"], 1)

    assert torch.equal(whole[0], single[0])
    torch.testing.assert_close(whole[1], single[1])
