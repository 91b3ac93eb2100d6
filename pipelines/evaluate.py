"""Stage `evaluate`: test a step on the test images of every task so far, all classes seen being candidates."""

from pathlib import Path

from pipelines.errors import InputError
from pipelines.files import read_json, whole_folder, write_json
from pipelines.params import Params
from pipelines.progress import Progress
from pipelines.stage import Summary, stage


@stage
def evaluate(task: str, *, model: Path, backbone: Path, test: Path, classes: Path, out: Path) -> Summary:
    """Leave the accuracy on each task so far and every prediction in `out`; no task id is used at test time."""
    import numpy as np
    import pyarrow as pa
    import torch

    from pipelines.images import decode, read_images, write_rows
    from sdlora.backbones import read_backbone
    from sdlora.classifier import merged_classifier
    from sdlora.devices import best_device, set_deterministic
    from sdlora.evaluation import predict_batches
    from sdlora.model_folder import read_model
    from sdlora.preprocessing import Preprocessing

    params = Params.load()
    set_deterministic(params.training.deterministic)
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
    preprocessing = Preprocessing.of(base.description)
    tables = {name: read_images(test / f"{name}.arrow") for name in seen["tasks"]}
    columns: dict[str, list[np.ndarray]] = {"prediction": [], "confidence": []}
    done = 0
    with Progress(f"evaluate {task}", total=sum(map(len, tables.values())), unit="images") as bar:
        for name, table in tables.items():
            pixels = decode(table, preprocessing)
            for batch in predict_batches(
                classifier,
                torch.from_numpy(pixels),
                mean=preprocessing.mean,
                std=preprocessing.std,
                batch_size=params.evaluation.batch_size,
                device=device,
            ):
                columns["prediction"].append(batch.classes.numpy().astype(np.int32))
                columns["confidence"].append(batch.confidences.numpy())
                done += len(batch.classes)
                bar.update(done, task=name)
    labels = np.concatenate([table["label"].to_numpy() for table in tables.values()])
    predictions = np.concatenate(columns["prediction"])
    confidences = np.concatenate(columns["confidence"])
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
            },
        )
    return [
        {"step": task, "task": name, "accuracy": round(right[name] / counts[name], 4), "images": counts[name]}
        for name in tables
    ]
