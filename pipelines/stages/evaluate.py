"""Stage `evaluate`: test a step on the test images of every task so far, all classes seen being candidates."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.project.errors import InputError
from pipelines.project.files import read_json, whole_folder, write_json
from pipelines.project.params import read_params
from pipelines.project.settings import Evaluation
from pipelines.runtime.progress import progress
from pipelines.runtime.stage import StageResult, stage

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa


@stage
def evaluate(
    task: str, *, model: Path, backbone: Path, test: Path, validation: Path, classes: Path, out: Path
) -> StageResult:
    """Test a step on every task so far, among all classes so far.

    Every prediction is left; no task id is used at test time. Where there are validation images, the accuracy on them
    stands beside it: the one to select on.

    Args:
        task: Task of params.yaml, such as t01.
        model: Model folder of this step.
        backbone: Model folder of step t00: the frozen backbone.
        test: Folder of all test files so far.
        validation: Folder of all validation files so far.
        classes: All classes so far, classes.json.
        out: Folder to leave; an existing one is replaced as a whole.
    """
    import numpy as np
    import pyarrow as pa

    from pipelines.data.packed import write_rows
    from pipelines.data.pixel_cache import PackedImages, pixel_batches
    from sdlora.backbones import read_backbone, spell_out_attention
    from sdlora.classifier import merged_classifier
    from sdlora.devices import best_device, set_deterministic
    from sdlora.evaluation import predict_batches
    from sdlora.model_folder import read_model
    from sdlora.preprocessing import Preprocessing

    settings = read_params("evaluation", Evaluation)
    precision, batch_size = settings.precision, settings.batch_size
    set_deterministic(read_params("training.deterministic", bool), tf32=precision == "tf32")
    device = best_device()
    base = read_backbone(backbone)
    learned, record = read_model(model)
    seen = read_json(classes)
    if record["classes"] != seen["classes"]:
        raise InputError(
            f"{model}: its {len(record['classes'])} classes are not the {len(seen['classes'])} of {classes}; "
            "run `sdlora run` to bring both up to date"
        )
    classifier = merged_classifier(base.model, learned).to(device)
    if precision == "bf16" and device.type == "cpu":
        spell_out_attention(base.model)
    preprocessing = Preprocessing.of(base.description)
    packed = {name: PackedImages(test / f"{name}.arrow", preprocessing) for name in seen["tasks"]}
    held = read_json(validation / "tasks.json")["tasks"]
    selecting = {
        name: PackedImages(validation / f"{name}.arrow", preprocessing)
        for name in seen["tasks"]
        if name in held
    }
    waiting = [*packed.items(), *selecting.items()]
    of_tasks = [name for name, images in waiting for _ in range(0, len(images), batch_size)]
    predictions_of = predict_batches(
        classifier,
        pixel_batches([images for _, images in waiting], batch_size=batch_size, device=device),
        mean=preprocessing.mean,
        std=preprocessing.std,
        device=device,
        bf16=precision == "bf16",
    )
    columns: dict[str, list[np.ndarray]] = {"prediction": [], "confidence": []}
    done = 0
    with progress(f"evaluate {task}", total=sum(len(images) for _, images in waiting), unit="images") as bar:
        for name, batch in zip(of_tasks, predictions_of, strict=True):
            columns["prediction"].append(batch.classes.numpy().astype(np.int32))
            columns["confidence"].append(batch.confidences.numpy())
            done += len(batch.classes)
            bar.update(done, task=name)
    tables = {name: images.table for name, images in packed.items()}
    labels = np.concatenate([table["label"].to_numpy() for table in tables.values()])
    predictions, chosen = np.split(np.concatenate(columns["prediction"]), [len(labels)])
    confidences = np.concatenate(columns["confidence"])[: len(labels)]
    ids = [sample for table in tables.values() for sample in table["id"].to_pylist()]
    tasks = np.repeat(list(tables), [len(table) for table in tables.values()])
    right = {name: int((predictions == labels)[tasks == name].sum()) for name in tables}
    counts = {name: len(table) for name, table in tables.items()}
    with whole_folder(out) as folder:
        write_rows(
            folder / "predictions.arrow",
            list(zip(ids, tasks.tolist(), labels, predictions, confidences, strict=True)),
            {
                "id": pa.string(),
                "task": pa.string(),
                "label": pa.int32(),
                "prediction": pa.int32(),
                "confidence": pa.float32(),
            },
        )
        write_json(
            folder / "metrics.json",
            {
                "step": task,
                "tasks": list(tables),
                "accuracy": [round(right[name] / counts[name], 6) for name in tables],
                "samples": list(counts.values()),
                "correct": list(right.values()),
                **validation_metrics(chosen, {name: images.table for name, images in selecting.items()}),
            },
        )
    return StageResult(
        [
            {
                "step": task,
                "task": name,
                "accuracy": round(right[name] / counts[name], 4),
                "images": counts[name],
            }
            for name in tables
        ]
    )


def validation_metrics(predictions: np.ndarray, tables: Mapping[str, pa.Table]) -> dict[str, Any]:
    """Accuracy, images and right answers by task of the validation images; nothing where there are none.

    A task whose classes have one training image each can spare none: its accuracy is null.
    """
    correct, samples, start = [], [], 0
    for table in tables.values():
        part = predictions[start : start + len(table)]
        start += len(table)
        correct.append(int((part == table["label"].to_numpy()).sum()))
        samples.append(len(table))
    if not start:
        return {}
    return {
        "validation_tasks": list(tables),
        "validation_accuracy": [
            round(c / n, 6) if n else None for c, n in zip(correct, samples, strict=True)
        ],
        "validation_samples": samples,
        "validation_correct": correct,
    }
