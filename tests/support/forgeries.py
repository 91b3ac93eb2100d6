"""What somebody can do to a finished chain of two tasks who can write every file, and hashes all that follows anew."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipelines.data.packed import PACKED, TRAINING, read_images, write_rows
from pipelines.ledger.fit_facts import last_epoch
from pipelines.ledger.kept import KeptStage, write_note
from pipelines.ledger.newcomers import unknown_figures
from pipelines.ledger.verdicts import broken, measured_in
from pipelines.project.files import read_json, sha256_of, write_json
from pipelines.project.layout import (
    CODE,
    EVALUATIONS,
    FITS,
    GATES,
    JOURNAL,
    LOCK,
    METRICS,
    MODELS,
    PARAMS,
    SPLITS,
    TRAINED,
)
from pipelines.project.params import Params
from pipelines.project.settings import Gate
from pipelines.project.yaml_text import read_yaml, value_at
from pipelines.reports.history import thresholds_of
from pipelines.reports.statistics import headline_of
from pipelines.stages.report import report
from pipelines.stages.split import split
from pipelines.versioning.artifacts import folder_md5
from pipelines.versioning.file_hashes import md5_of
from sdlora.ledger import read_record, record_bytes, record_hash
from sdlora.tensors import read_tensors, write_tensors

Forgery = Callable[[], None]
"""Is done in the folder of a chain."""


def seal(*, commands: Mapping[str, str] | None = None, page: bool = False) -> None:
    """Hash anew, in the order of the chain, all that holds a hash or follows from files at no cost.

    Args:
        commands: Stage → another command line for dvc.lock.
        page: Make the report anew too, which shows what was changed.
    """
    tasks = list(Params.load().tasks)
    for before, step in pairwise(["t00", *tasks]):
        _seal_record(before, step)
        _seal_verdict(before, step)
    evaluations = [read_json(EVALUATIONS / task / "metrics.json") for task in tasks]
    classes = read_record(MODELS / tasks[-1])["classes"]
    records = [read_json(MODELS / task / "step.json") for task in tasks]
    unknown = unknown_figures(tasks, EVALUATIONS.joinpath, thresholds_of(records))
    write_json(METRICS, headline_of(tasks, len(classes), evaluations, unknown))
    if page:
        report.fn(artifacts=Path("artifacts"), out=Path("artifacts/report"), metrics=METRICS)
    seal_lock(commands)


def _seal_record(before: str, step: str) -> None:
    folder, fit = MODELS / step, FITS / step
    record = read_json(folder / "step.json")
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.safetensors")}
    means = {
        name: round(alpha.mean().item(), 6)
        for name, alpha in read_tensors(folder / "magnitudes.safetensors").items()
    }
    record |= {
        "previous": record_hash(MODELS / before),
        "backbone": read_json(MODELS / "t00/step.json")["backbone"],
        "files": {name: sha256_of(path) for name, path in files.items()},
        "fit": {path.name: sha256_of(path) for path in fit.iterdir()},
        "images": {step: sha256_of(TRAINED / step / PACKED)},
        "split": read_json(SPLITS / step / TRAINING),
        "metrics": last_epoch(fit),
        "magnitudes": means,
    }
    (folder / "step.json").write_bytes(record_bytes(record))


def _seal_verdict(before: str, step: str) -> None:
    path = GATES / step / "verdict.json"
    verdict = read_json(path)
    measured = measured_in(EVALUATIONS / step, EVALUATIONS / before, "test", model=MODELS / step)
    verdict |= {
        "previous": sha256_of(GATES / before / "verdict.json"),
        "record": record_hash(MODELS / step),
        "samples": read_json(SPLITS / step / "split.json")["digest"],
        "evaluation": {file.name: sha256_of(file) for file in sorted((EVALUATIONS / step).iterdir())},
        "measured": measured,
        "broken": broken(Gate.model_validate(verdict["limits"]), measured),
    }
    write_json(path, verdict)


def seal_lock(commands: Mapping[str, str] | None = None) -> None:
    """Have dvc.lock say what the files and params.yaml say."""
    lock = read_yaml(LOCK.read_text(), origin=str(LOCK))
    chosen = read_yaml(PARAMS.read_text(), origin=str(PARAMS))
    md5 = cache(_md5_at)
    for name, stage in lock["stages"].items():
        for part in [*stage.get("deps", []), *stage.get("outs", [])]:
            if Path(part["path"]).exists():
                part["md5"] = md5(part["path"])
        read = stage.get("params", {}).get(str(PARAMS), {})
        read |= {key: value_at(chosen, tuple(key.split("."))) for key in read}
        stage["cmd"] = (commands or {}).get(name, stage["cmd"])
    LOCK.write_text(json.dumps(lock))


def _md5_at(path: str) -> str:
    root = Path(path)
    if root.is_file():
        return md5_of(root)
    files = (file for file in root.rglob("*") if file.is_file())
    return folder_md5({file.relative_to(root).as_posix(): md5_of(file) for file in files})


def _edit_text(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text, (path, old)
    path.write_text(text.replace(old, new))


def _edit_json(path: Path, change: Callable[[Any], object]) -> None:
    found = read_json(path)
    change(found)
    path.write_bytes(record_bytes(found))


def _edit_tensor(path: Path) -> None:
    """Move every tensor of a file a little."""
    write_tensors(path, {name: tensor + 0.01 for name, tensor in read_tensors(path).items()})


def moved(*names: str, page: bool = False) -> None:
    for name in names:
        _edit_tensor(MODELS / name)
    seal(page=page)


def brought_again() -> None:
    name = "directions/t01.safetensors"
    shutil.copy(MODELS / "t01" / name, MODELS / "t02" / name)
    moved(f"t02/{name}")


def other_fit() -> None:
    _edit_tensor(FITS / "t02/head.safetensors")
    seal()


def other_curve() -> None:
    path = FITS / "t02/curve.csv"
    first, second, *others = path.read_text().splitlines()
    path.write_text("\n".join([first, re.sub(r"^(\d+,\d+),[^,]+", r"\1,0.5", second), *others]) + "\n")
    seal(page=True)


def other_recorded_seed() -> None:
    _edit_json(MODELS / "t02/step.json", lambda record: record["parameters"].update(seed=1))
    seal()


def other_seed() -> None:
    """In the parameters, and in all that says which they were."""
    _edit_text(PARAMS, "\nseed: 1993", "\nseed: 1994")
    for step in ("t01", "t02"):
        _edit_json(FITS / step / "fit.json", lambda fit: fit.update(seed=1994))
        _edit_json(MODELS / step / "step.json", lambda record: record["parameters"].update(seed=1994))
    seal(page=True)


def other_parameter(old: str, new: str) -> None:
    _edit_text(PARAMS, old, new)
    seal_lock()


def forged_approval() -> None:
    """As if a person had let through a step that breaks a limit."""
    _edit_text(PARAMS, "  calibration_error:", "  calibration_error: 0.0")
    said = {"by": "Ana", "why": "looked at it"}
    for step in ("t01", "t02"):
        _edit_json(
            GATES / step / "verdict.json",
            lambda verdict: verdict.update(
                limits={**verdict["limits"], "calibration_error": 0.0}, approved=said
            ),
        )
    seal(page=True)
    from pipelines.ledger.verdicts import results_of

    lines = [
        f"  {step}: {{by: Ana, why: looked at it, evaluation: {results_of(EVALUATIONS / step)}, "
        "limits: [calibration_error]}"
        for step in ("t01", "t02")
    ]
    _edit_text(PARAMS, "\napprovals: {}", "\napprovals:\n" + "\n".join(lines))
    seal_lock()


def other_recorded_code() -> None:
    _edit_json(MODELS / "t02/step.json", lambda record: record["code"].update(fit="0" * 64))
    seal()


def said_to_be_kept() -> None:
    _edit_json(MODELS / "t02/step.json", lambda record: record["code"].update(freeze="0" * 64))
    seal()
    kept = KeptStage(made_by="0" * 32, now=md5_of(CODE / "freeze"), result=record_hash(MODELS / "t02"))
    write_note("2026-01-01T00:00:00Z", {"freeze@t02": kept})


def other_code(kind: str) -> None:
    path = CODE / kind
    path.write_text(path.read_text() + f"{'0' * 64} pipelines.stages.{kind}.more\n")
    for step in ("t01", "t02"):
        if kind == "fit":
            _edit_json(FITS / step / "fit.json", lambda fit: fit.update(code=sha256_of(path)))
            _edit_json(MODELS / step / "step.json", lambda record: record["code"].update(fit=sha256_of(path)))
    seal(page=kind == "fit")


def other_command() -> None:
    old, new = "--evaluation-before artifacts/evaluation/", "--evaluation-before artifacts/evaluation/t00"
    command = read_yaml(LOCK.read_text(), origin="")["stages"]["gate@t02"]["cmd"]
    _edit_text(Path("dvc.yaml"), f"{old}${{item.after}}", new)
    seal_lock({"gate@t02": command.replace(f"{old}t01", new)})


def other_predictions() -> None:
    """A test image of t02 that is wrong is said to be right, or one that is right wrong; figures follow."""
    folder = EVALUATIONS / "t02"
    table = read_images(folder / "predictions.arrow")
    types = {field.name: field.type for field in table.schema}
    rows = [list(row.values()) for row in table.to_pylist()]
    at = list(types).index("prediction")
    rows[-1][at] = 3 if rows[-1][at] != 3 else 2
    right = [row[at] == row[at - 1] for row in rows]
    (folder / "predictions.arrow").unlink()
    write_rows(folder / "predictions.arrow", [tuple(row) for row in rows], types)

    def count(metrics: dict[str, Any]) -> None:
        halves = right[: metrics["samples"][0]], right[metrics["samples"][0] :]
        metrics["correct"] = [sum(half) for half in halves]
        metrics["accuracy"] = [round(sum(half) / len(half), 6) for half in halves]

    _edit_json(folder / "metrics.json", count)
    seal()


def other_headline() -> None:
    _edit_json(METRICS, lambda numbers: numbers.update(last_accuracy=1.0, steps=3))
    seal_lock()


def other_figures() -> None:
    _edit_json(GATES / "t02/verdict.json", lambda verdict: verdict["measured"].update(new_task=0.99))
    seal_lock()


def other_file(path: str) -> None:
    """Add to a file that nothing but dvc.lock holds."""
    with Path(path).open("a") as file:
        file.write("\n")
    seal_lock()


def other_picture(part: str, *, packed: bool) -> None:
    """Replace a raw image of t02, and with `packed` all that was packed of it."""
    pixels = np.random.default_rng(5).integers(0, 255, (8, 8)).astype(np.uint8)
    Image.fromarray(pixels).save(f"pictures/{part}/c/0.png")
    if not packed:
        seal_lock()
        return
    split.fn(
        "t02",
        source=Path("pictures"),
        before=SPLITS / "t01",
        out=SPLITS / "t02",
        images=TRAINED / "t02",
    )
    described = read_json(SPLITS / "t02" / TRAINING)
    _edit_json(FITS / "t02/fit.json", lambda fit: fit.update(split=described))
    seal()


def other_backbone() -> None:
    folder = MODELS / "t00"
    was = read_json(folder / "step.json")["backbone"]
    _edit_tensor(folder / "backbone.safetensors")
    now = sha256_of(folder / "backbone.safetensors")
    for name in ("backbone.json", "step.json"):
        _edit_text(folder / name, was, now)
    _edit_json(
        folder / "step.json",
        lambda record: record.update(files={name: sha256_of(folder / name) for name in record["files"]}),
    )
    seal()


def dropped_task() -> None:
    text = PARAMS.read_text()
    PARAMS.write_text(
        "".join(line for line in text.splitlines(keepends=True) if not line.startswith("  t02:"))
    )
    for folder in Path("artifacts").glob("*/t02"):
        shutil.rmtree(folder)
    seal(page=True)


def changed_lock(old: str, new: str) -> None:
    """Change an entry of dvc.lock, and nothing else."""
    text = LOCK.read_text()
    changed = re.sub(old, new, text, count=1)
    assert changed != text, old
    LOCK.write_text(changed)


def changed_journal() -> None:
    lines = JOURNAL.read_bytes().splitlines(keepends=True)
    JOURNAL.write_bytes(b"".join([lines[0], lines[1].replace(b'"host": "', b'"host": "not-'), *lines[2:]]))


def cut_journal() -> None:
    JOURNAL.write_bytes(b"".join(JOURNAL.read_bytes().splitlines(keepends=True)[:-2]))


def other_threshold() -> None:
    """Fewer images are called unknown after t02; figures follow."""
    _edit_json(MODELS / "t02/step.json", lambda record: record["freezing"].update(unknown_threshold=1e6))
    seal()


FORGERIES: dict[str, Forgery] = {
    "a frozen direction": partial(moved, "t01/directions/t01.safetensors"),
    "a frozen direction that a later step brings again": brought_again,
    "head, classifier, statistics, drift and magnitudes of the last step": partial(
        moved,
        "t02/head/t02.safetensors",
        "t02/classifier.safetensors",
        "t02/statistics/t02.safetensors",
        "t02/drift/t02.safetensors",
        "t02/magnitudes.safetensors",
    ),
    "the threshold for unknown images, and all figures": other_threshold,
    "the raw fit": other_fit,
    "the curve of a fit, and the report": other_curve,
    "a parameter in a record": other_recorded_seed,
    "a parameter in records, fits, `params.yaml`, lock and report": other_seed,
    "`params.yaml` and lock: the learning rate": partial(
        other_parameter, "learning_rate: 0.002", "learning_rate: 0.02"
    ),
    "`params.yaml` and lock: the precision of evaluations": partial(
        other_parameter,
        "precision: fp32             # fp32 | tf32 | bf16, as",
        "precision: bf16             # as",
    ),
    "an approval, and the limit that it lets break": forged_approval,
    "the code in a record": other_recorded_code,
    "the code in a record, and a note that it was kept": said_to_be_kept,
    "the code of `fit`, in records, lock and report": partial(other_code, "fit"),
    "the code of `evaluate`, and the lock": partial(other_code, "evaluate"),
    "a command in `dvc.yaml`, and the lock": other_command,
    "predictions, and all figures": other_predictions,
    "`metrics.json`, and the lock": other_headline,
    "the figures in a verdict": other_figures,
    "`report.html`, and the lock": partial(other_file, "artifacts/report/report.html"),
    "a raw image, and the lock": partial(other_picture, "train", packed=False),
    "a training image, raw and packed": partial(other_picture, "train", packed=True),
    "a test image, raw and packed": partial(other_picture, "test", packed=True),
    "the backbone": other_backbone,
    "the last task dropped, and the report": dropped_task,
    "a parameter in the lock alone": partial(changed_lock, r"adapter\.rank: 2", "adapter.rank: 3"),
    "an input in the lock alone": partial(
        changed_lock,
        r"(path: artifacts/code/evaluate\n\s+hash: md5\n\s+md5: )[0-9a-f]{32}",
        r"\g<1>" + "a" * 32,
    ),
    "a line of the journal": changed_journal,
    "the last lines of the journal": cut_journal,
}
"""What is changed → how. Everything that holds a hash of it is made to agree."""
