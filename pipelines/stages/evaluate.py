"""Stage `evaluate`: test a step on the test images of every task so far, all classes seen being candidates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipelines.data.split_chain import SPLIT, TEST, VALIDATION, read_splits
from pipelines.ledger.newcomers import NEWCOMERS
from pipelines.project.errors import InputError
from pipelines.project.files import whole_folder, write_json
from pipelines.project.params import read_params
from pipelines.project.settings import Evaluation
from pipelines.runtime.earlier_outputs import Find, outputs_beside
from pipelines.runtime.progress import progress
from pipelines.runtime.stage import StageResult, stage

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from torch import nn

    from pipelines.data.pixel_cache import PackedImages
    from pipelines.data.split_chain import Splits
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
        with outputs_beside(model, "step.json") as models:
            classifier, description = _classifier_of(
                model.name, models, backbone, splits.classes, settings, origin=split
            )
        preprocessing = Preprocessing.of(description)
        packed = {name: PackedImages(splits.needed(TEST, name), preprocessing) for name in splits.tasks}
        held = {name: splits.file(VALIDATION, name) for name in splits.tasks}
        selecting = {name: PackedImages(path, preprocessing) for name, path in held.items() if path}
        answers = _predict(task, classifier, [*packed.items(), *selecting.items()], preprocessing, settings)
        total = sum(len(images) for images in packed.values())
        tested = _Tested(_tables(packed), answers.part(slice(total)))
        held_out = _Tested(_tables(selecting), answers.part(slice(total, None)))
        newcomers = _newcomers(task, model, backbone, splits, settings)
    counts, right = tested.counts, tested.right
    with whole_folder(out) as folder:
        tested.write(folder / "predictions.arrow")
        if sum(held_out.counts.values()):
            held_out.write(folder / "validation.arrow")
        if newcomers is not None:
            _write_newcomers(folder / NEWCOMERS, newcomers)
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
    step: str,
    found: Find,
    backbone: Path,
    classes: Sequence[Mapping[str, Any]],
    settings: Evaluation,
    *,
    origin: Path,
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
    model = found(step)
    learned, record = read_model(model, beside=found)
    if record["classes"] != classes:
        raise InputError(
            f"{model}: its {len(record['classes'])} classes are not the {len(classes)} of {origin}; "
            "run `sdlora run` to bring both up to date"
        )
    classifier = merged_classifier(base.model, learned).to(device)
    if settings.precision == "bf16" and device.type == "cpu":
        spell_out_attention(base.model)
    return classifier, base.description


def _newcomers(
    task: str, model: Path, backbone: Path, splits: Splits, settings: Evaluation
) -> list[tuple[str, str, float]] | None:
    """Return what the step before says of the task's test and validation images of classes that it does not know.

    For each its id, its part and its score. None where the step before has no threshold.
    """
    from pipelines.data.pixel_cache import PackedImages
    from sdlora.ledger import read_own_record, read_record
    from sdlora.preprocessing import Preprocessing

    with outputs_beside(model, "step.json") as found:
        before = splits.tasks[-2] if len(splits.tasks) > 1 else None
        if before is None or "unknown" not in read_own_record(found(before)).get("freezing", {}):
            return None
        known = len(read_record(found(before), beside=found)["classes"])
        classifier, description = _classifier_of(
            before, found, backbone, splits.classes[:known], settings, origin=splits.needed(TEST, task)
        )
    preprocessing = Preprocessing.of(description)
    paths = {part: splits.file(part, task) for part in (TEST, VALIDATION)}
    packed = {part: PackedImages(path, preprocessing) for part, path in paths.items() if path}
    answers = _predict(task, classifier, list(packed.items()), preprocessing, settings)
    assert answers.scores is not None
    rows = [
        (name, part, label)
        for part, images in packed.items()
        for name, label in zip(images.table["id"].to_pylist(), images.table["label"].to_pylist(), strict=True)
    ]
    return [
        (name, part, score)
        for (name, part, label), score in zip(rows, answers.scores.tolist(), strict=True)
        if label >= known
    ]


def _write_newcomers(path: Path, rows: list[tuple[str, str, float]]) -> None:
    import pyarrow as pa

    from pipelines.data.packed import write_rows

    write_rows(path, rows, {"id": pa.string(), "part": pa.string(), "score": pa.float32()})


def _predict(
    task: str,
    classifier: nn.Module,
    images: Sequence[tuple[str, PackedImages]],
    preprocessing: Preprocessing,
    settings: Evaluation,
) -> _Said:
    """Return the predicted class and the confidence of all images, in order, and their scores where there are some."""
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
    scores = None
    with progress(f"evaluate {task}", total=total, unit="images") as bar:
        for name, batch in zip(tasks, batches, strict=True):
            own = slice(done, done + len(batch.classes))
            predictions[own], confidences[own] = batch.classes.numpy(), batch.confidences.numpy()
            if batch.scores is not None:
                scores = np.empty(total, np.float32) if scores is None else scores
                scores[own] = batch.scores.numpy()
            done = own.stop
            bar.update(done, task=name)
    return _Said(predictions, confidences, scores)


def _tables(images: Mapping[str, PackedImages]) -> dict[str, pa.Table]:
    return {name: packed.table for name, packed in images.items()}


class _Said(NamedTuple):
    """What a step says of images."""

    predictions: np.ndarray
    confidences: np.ndarray
    scores: np.ndarray | None
    """How much each looks like none of the classes; None where the step has no threshold."""

    def part(self, some: slice) -> _Said:
        """Return the same of some of the images."""
        scores = None if self.scores is None else self.scores[some]
        return _Said(self.predictions[some], self.confidences[some], scores)


class _Tested(NamedTuple):
    """The test images of all tasks, or those held out of training, and what the step says of each."""

    tables: Mapping[str, pa.Table]
    """Task id → its images; what is said is in this order."""
    said: _Said

    @property
    def counts(self) -> dict[str, int]:
        """Return how many images each task has."""
        return {name: len(table) for name, table in self.tables.items()}

    @property
    def right(self) -> dict[str, int]:
        """Return how many images of each task are predicted right."""
        hits = self.said.predictions == self._labels
        return {name: int(hits[self._tasks == name].sum()) for name in self.tables}

    def write(self, path: Path) -> None:
        """Write one row for each image."""
        import pyarrow as pa

        from pipelines.data.packed import write_rows

        ids = (sample.as_py() for table in self.tables.values() for sample in table["id"])
        columns = [ids, map(str, self._tasks), self._labels, self.said.predictions, self.said.confidences]
        types = {
            "id": pa.string(),
            "task": pa.string(),
            "label": pa.int32(),
            "prediction": pa.int32(),
            "confidence": pa.float32(),
        }
        if self.said.scores is not None:
            columns, types = [*columns, self.said.scores], {**types, "score": pa.float32()}
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
