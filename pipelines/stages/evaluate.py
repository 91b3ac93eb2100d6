"""Stage `evaluate`: test a step on the test images of every task so far, all classes seen being candidates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipelines.data.split_chain import SPLIT, TEST, VALIDATION, read_splits
from pipelines.project.errors import InputError
from pipelines.project.files import whole_folder, write_json
from pipelines.project.params import read_params
from pipelines.project.settings import Evaluation
from pipelines.runtime.earlier_outputs import outputs_beside
from pipelines.runtime.progress import progress
from pipelines.runtime.stage import StageResult, stage

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from torch import nn

    from pipelines.data.pixel_cache import PackedImages
    from sdlora.preprocessing import Preprocessing


@stage
def evaluate(task: str, *, model: Path, backbone: Path, split: Path, out: Path) -> StageResult:
    """Test a step on every task so far, among all classes so far.

    Every prediction is left; no task id is used at test time. Where there are validation images, the accuracy on them
    stands beside it: the one to select on.

    Args:
        task: Task of params.yaml, such as t01.
        model: Model folder of this step.
        backbone: Model folder of step t00: the frozen backbone.
        split: What `split` left for this task; that of earlier tasks lies beside it.
        out: Folder to leave; an existing one is replaced as a whole.
    """
    from pipelines.data.pixel_cache import PackedImages
    from sdlora.devices import set_deterministic
    from sdlora.preprocessing import Preprocessing

    settings = read_params("evaluation", Evaluation)
    set_deterministic(read_params("training.deterministic", bool), tf32=settings.precision == "tf32")
    with outputs_beside(split, SPLIT) as found:
        splits = read_splits(found(split.name), found)
        classifier, description = _classifier_of(model, backbone, splits.classes, settings, origin=split)
        preprocessing = Preprocessing.of(description)
        packed = {name: PackedImages(splits.needed(TEST, name), preprocessing) for name in splits.tasks}
        held = {name: splits.file(VALIDATION, name) for name in splits.tasks}
        selecting = {name: PackedImages(path, preprocessing) for name, path in held.items() if path}
        predictions, confidences = _predict(
            task, classifier, [*packed.items(), *selecting.items()], preprocessing, settings
        )
        total = sum(len(images) for images in packed.values())
        tested = _Tested(_tables(packed), predictions[:total], confidences[:total])
        held_out = _Tested(_tables(selecting), predictions[total:], confidences[total:])
    counts, right = tested.counts, tested.right
    with whole_folder(out) as folder:
        tested.write(folder / "predictions.arrow")
        if sum(held_out.counts.values()):
            held_out.write(folder / "validation.arrow")
        write_json(
            folder / "metrics.json",
            {
                "step": task,
                "tasks": list(counts),
                "accuracy": [round(right[name] / counts[name], 6) for name in counts],
                "samples": list(counts.values()),
                "correct": list(right.values()),
                **_validation_metrics(held_out),
            },
        )
    rows: list[dict[str, str | int | float]] = [
        {"step": task, "task": name, "accuracy": round(right[name] / counts[name], 4), "images": counts[name]}
        for name in counts
    ]
    return StageResult(rows)


def _classifier_of(
    model: Path, backbone: Path, classes: Sequence[Mapping[str, Any]], settings: Evaluation, *, origin: Path
) -> tuple[nn.Module, dict[str, Any]]:
    """Return the classifier of a step on the device, and the description of its backbone.

    Raises:
        InputError: it knows other classes than `classes`, which `origin` lists.
    """
    from sdlora.backbones import read_backbone, spell_out_attention
    from sdlora.classifier import merged_classifier
    from sdlora.devices import best_device
    from sdlora.model_folder import read_model

    device = best_device()
    base = read_backbone(backbone)
    with outputs_beside(model, "step.json") as found:
        learned, record = read_model(found(model.name), beside=found)
    if record["classes"] != classes:
        raise InputError(
            f"{model}: its {len(record['classes'])} classes are not the {len(classes)} of {origin}; "
            "run `sdlora run` to bring both up to date"
        )
    classifier = merged_classifier(base.model, learned).to(device)
    if settings.precision == "bf16" and device.type == "cpu":
        spell_out_attention(base.model)
    return classifier, base.description


def _predict(
    task: str,
    classifier: nn.Module,
    images: Sequence[tuple[str, PackedImages]],
    preprocessing: Preprocessing,
    settings: Evaluation,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the predicted class and the confidence of all images, in order."""
    import numpy as np

    from pipelines.data.pixel_cache import pixel_batches
    from sdlora.devices import best_device
    from sdlora.evaluation import predict_batches

    size, device = settings.batch_size, best_device()
    tasks = [name for name, packed in images for _ in range(0, len(packed), size)]
    batches = predict_batches(
        classifier,
        pixel_batches([packed for _, packed in images], batch_size=size, device=device),
        mean=preprocessing.mean,
        std=preprocessing.std,
        device=device,
        bf16=settings.precision == "bf16",
    )
    total, done = sum(len(packed) for _, packed in images), 0
    # Arrays of each batch would lie between the logits of two, and keep the memory of 10,000 classes from being reused.
    predictions, confidences = np.empty(total, np.int32), np.empty(total, np.float32)
    with progress(f"evaluate {task}", total=total, unit="images") as bar:
        for name, batch in zip(tasks, batches, strict=True):
            own = slice(done, done + len(batch.classes))
            predictions[own], confidences[own] = batch.classes.numpy(), batch.confidences.numpy()
            done = own.stop
            bar.update(done, task=name)
    return predictions, confidences


def _tables(images: Mapping[str, PackedImages]) -> dict[str, pa.Table]:
    return {name: packed.table for name, packed in images.items()}


class _Tested(NamedTuple):
    """The test images of all tasks, or those held out of training, and what the step says of each."""

    tables: Mapping[str, pa.Table]
    """Task id → its images; the predictions are in this order."""
    predictions: np.ndarray
    confidences: np.ndarray

    @property
    def counts(self) -> dict[str, int]:
        """Return how many images each task has."""
        return {name: len(table) for name, table in self.tables.items()}

    @property
    def right(self) -> dict[str, int]:
        """Return how many images of each task are predicted right."""
        hits = self.predictions == self._labels
        return {name: int(hits[self._tasks == name].sum()) for name in self.tables}

    def write(self, path: Path) -> None:
        """Write one row for each image."""
        import pyarrow as pa

        from pipelines.data.packed import write_rows

        ids = (sample.as_py() for table in self.tables.values() for sample in table["id"])
        columns = (ids, map(str, self._tasks), self._labels, self.predictions, self.confidences)
        types = {
            "id": pa.string(),
            "task": pa.string(),
            "label": pa.int32(),
            "prediction": pa.int32(),
            "confidence": pa.float32(),
        }
        write_rows(path, zip(*columns, strict=True), types)

    @property
    def _labels(self) -> np.ndarray:
        import numpy as np

        return np.concatenate([table["label"].to_numpy() for table in self.tables.values()])

    @property
    def _tasks(self) -> np.ndarray:
        import numpy as np

        return np.repeat(list(self.tables), list(self.counts.values()))


def _validation_metrics(held_out: _Tested) -> dict[str, Any]:
    """Accuracy, images and right answers by task of the validation images. Nothing where there are none.

    A task whose classes have one training image each can spare none: its accuracy is null.
    """
    samples = list(held_out.counts.values())
    if not sum(samples):
        return {}
    correct = list(held_out.right.values())
    return {
        "validation_tasks": list(held_out.tables),
        "validation_accuracy": [
            round(c / n, 6) if n else None for c, n in zip(correct, samples, strict=True)
        ],
        "validation_samples": samples,
        "validation_correct": correct,
    }
