"""The report of a small made-up run: right numbers, same bytes, offline, whatever the classes are called."""

import base64
import csv
import hashlib
import io
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import safetensors.numpy
from PIL import Image, ImageDraw

from pipelines.errors import InputError
from pipelines.report import report

CLASSES = {"t01": ["3", "7"], "t02": ["0", "9", "1"], "t03": ["4", "8"]}

SIZE = 8
TARGETS = [f"blocks.{block}.attn.{name}" for block in range(6) for name in ("q", "v")]
NORMS = {target: 2.0 + place for place, target in enumerate(TARGETS)}

PARAMS = """\
seed: 1993
fetch: {digits: {test_fraction: 0.2, seed: 0}}
data: {duplicates: refuse, test_fraction: 0.2, seed: 0, validation: null, max_pixels: 1000}
backbone: {name: glyph_vit, weights: null, sha256: null, image_size: null, input_normalisation: model}
adapter: {method: sdlora, head: linear, formulation: continuous, targets: null, rank: 10, rank_schedule: {t01: 10},
  magnitude_start: null, magnitudes: null, initial_up: null, tolerance: 0.5, compress: null, penalty: null,
  covariance_rank: 8}
training: {optimizer: sgd, learning_rate: 0.01, momentum: 0.9, schedule: constant, epochs: 4, batch_size: 32,
  crop_scale: 1.0, flip: false, precision: fp32, compile: false, devices: 1, deterministic: true,
  checkpoint_seconds: 30, checkpoint_store: null}
evaluation: {batch_size: 256, precision: fp32}
gate: {fall: null, negative_flips: null, calibration_error: null, new_task: null}
approvals: {}
workers: {pool: gpu, schedule: null, inbox: data/inbox, branch: null, push: null, heartbeat_seconds: 30,
  dead_after_seconds: 90, attempts: 3}
tasks:
"""


def write_project(
    folder: Path,
    classes: dict[str, list[str]] = CLASSES,
    *,
    method: str = "sdlora",
    images: int = 10,
    accuracy: float = 0.8,
) -> Path:
    """Write params.yaml and all that the stages before the report leave, as if from a real run."""
    rng = np.random.default_rng(1)
    tasks = list(classes)
    lines = [
        f"  {task}: {{after: {after}, source: data/raw/digits, classes: {json.dumps(classes[task])}}}\n"
        for after, task in zip(["t00", *tasks], tasks, strict=False)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.yaml").write_text(PARAMS + "".join(lines), encoding="utf-8")
    artifacts = folder / "artifacts"
    known: list[dict[str, object]] = []
    tests: dict[str, pa.Table] = {}
    magnitudes: dict[str, np.ndarray] = {}
    dump(artifacts / "model/t00/backbone.json", {"name": "glyph_vit"})
    dump(artifacts / "model/t00/step.json", {"step": "t00", "previous": None, "norms": NORMS})
    previous = sha256(artifacts / "model/t00/step.json")
    dump(artifacts / "gate/t00/verdict.json", {"step": "t00", "previous": None})
    directions: dict[str, str] = {}
    for i, task in enumerate(tasks):
        mine = [{"label": len(known) + j, "name": name, "task": task} for j, name in enumerate(classes[task])]
        known += mine
        dump(artifacts / f"split/{task}/classes.json", {"classes": known, "tasks": tasks[: i + 1]})
        counts = {entry["name"]: {"train": 4 * images, "test": images} for entry in mine}
        dump(artifacts / f"split/{task}/split.json", {"task": task, "counts": counts, "digest": "0" * 64})
        tests[task] = test_table(task, mine, images)
        for name, table in tests.items():
            write_arrow(artifacts / f"split/{task}/test/{name}.arrow", table)
        write_evaluation(artifacts / f"evaluation/{task}", task, tests, len(known), accuracy, rng)
        model = artifacts / f"model/{task}"
        if method == "sdlora":
            magnitudes = {
                name: (values + rng.normal(0, 0.04, 12)).astype(np.float32)
                for name, values in magnitudes.items()
            }
            magnitudes[task] = rng.uniform(0.8, 1.3, 12).astype(np.float32)
            model.mkdir(parents=True)
            safetensors.numpy.save_file(magnitudes, model / "magnitudes.safetensors")
            (model / "directions").mkdir()
            safetensors.numpy.save_file(
                a_direction(rng, rank=2 + i % 2), model / f"directions/{task}.safetensors"
            )
            for earlier in tasks[:i]:
                os.link(
                    artifacts / f"model/{earlier}/directions/{earlier}.safetensors",
                    model / f"directions/{earlier}.safetensors",
                )
            directions[task] = sha256(model / f"directions/{task}.safetensors")
        record = {
            "step": task,
            "previous": previous,
            "method": method,
            "formulation": "continuous",
            "head": "aligned",
            "needs_old_images": False,
            "rank": 10,
            "targets": TARGETS if directions else [],
            "directions": list(directions),
            "files": {f"directions/{name}.safetensors": hash for name, hash in directions.items()},
            "parameters": {
                "training": {"epochs": 4 if i else 8, "learning_rate": 0.01},
                "backbone": {"weights": None},
            },
            "versions": {"torch": "2.9.0", "timm": "1.0.22"},
            "code": {
                "fit": hashlib.sha256(b"fit").hexdigest(),
                "freeze": hashlib.sha256(b"freeze").hexdigest(),
            },
            "split": {"counts": {}, "digest": hashlib.sha256(task.encode()).hexdigest(), "train": "0" * 64},
            "metrics": {"loss": 0.01, "training_accuracy": 0.75},
            "determinism": "bitwise on one machine",
        }
        dump(model / "step.json", record)
        previous = sha256(model / "step.json")
        dump(artifacts / f"gate/{task}/verdict.json", a_verdict(artifacts, task, f"t{i:02d}"))
        curve = [
            f"{10 * epoch},{epoch},{1.2 * left + 0.02 * i:.6f},{1 - 0.6 * left - 0.01 * i:.6f},0.01\n"
            for epoch, left in ((epoch, 0.5**epoch) for epoch in range(1, 5))
        ]
        fit = artifacts / f"fit/{task}"
        fit.mkdir(parents=True)
        (fit / "curve.csv").write_text("step,epoch,loss,accuracy,learning_rate\n" + "".join(curve))
    return folder


def a_direction(rng: np.random.Generator, *, rank: int) -> dict[str, np.ndarray]:
    """Random factors of every target."""
    shapes = {"up": (SIZE, rank), "down": (rank, SIZE)}
    return {
        f"{target}.{side}": rng.normal(0, 0.1, shape).astype(np.float32)
        for target in TARGETS
        for side, shape in shapes.items()
    }


def sha256(path: Path) -> str:
    """The hash of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def a_verdict(artifacts: Path, task: str, before: str) -> dict[str, object]:
    """A verdict that lets the second step through although it broke a limit."""
    late = task == "t02"
    return {
        "step": task,
        "previous": sha256(artifacts / f"gate/{before}/verdict.json"),
        "record": sha256(artifacts / f"model/{task}/step.json"),
        "measured": {
            "fall": 0.125 if late else None,
            "negative_flips": 0.0,
            "calibration_error": 0.034,
            "new_task": 0.9,
        },
        "limits": {"fall": 0.1, "negative_flips": None, "calibration_error": None, "new_task": None},
        "broken": ["made an old task fall"] if late else [],
        "approved": {"by": "Ana <b>", "why": "a new camera"} if late else None,
    }


def write_evaluation(
    folder: Path,
    step: str,
    tests: dict[str, pa.Table],
    classes: int,
    accuracy: float,
    rng: np.random.Generator,
) -> None:
    """Write predictions that are right with the given probability, and what follows from them."""
    rows = []
    for task, table in tests.items():
        for name, label in zip(table["id"].to_pylist(), table["label"].to_pylist(), strict=True):
            guess = label if rng.random() < accuracy else int(rng.integers(classes))
            rows.append(
                {
                    "id": name,
                    "task": task,
                    "label": label,
                    "prediction": guess,
                    "confidence": rng.uniform(0.3, 1),
                }
            )
    fields = [("id", pa.string()), ("task", pa.string()), ("label", pa.int32()), ("prediction", pa.int32())]
    table = pa.Table.from_pylist(rows, pa.schema([*fields, ("confidence", pa.float32())]))
    write_arrow(folder / "predictions.arrow", table)
    samples = [tests[task].num_rows for task in tests]
    correct = [
        sum(row["task"] == task and row["label"] == row["prediction"] for row in rows) for task in tests
    ]
    ratios = [round(right / of, 6) for right, of in zip(correct, samples, strict=True)]
    dump(
        folder / "metrics.json",
        {"step": step, "tasks": list(tests), "accuracy": ratios, "samples": samples, "correct": correct},
    )


def test_table(task: str, classes: list[dict[str, object]], images: int) -> pa.Table:
    """Test images that show their label."""
    rows = []
    for entry in classes:
        for number in range(images):
            picture = Image.new("L", (32, 32), 12 * (number % 6))
            ImageDraw.Draw(picture).text((6 + number % 5, 4), str(entry["label"]), fill=255, font_size=20)
            buffer = io.BytesIO()
            picture.save(buffer, "PNG")
            content = buffer.getvalue()
            digest = hashlib.sha256(content).hexdigest()
            name = f"{task}/test/{entry['name']}/{number:03d}.png"
            rows.append(
                {"id": name, "label": entry["label"], "image": content, "sha256": digest, "pixels": digest}
            )
    fields = [("id", pa.string()), ("label", pa.int32()), ("image", pa.binary())]
    return pa.Table.from_pylist(rows, pa.schema([*fields, ("sha256", pa.string()), ("pixels", pa.string())]))


test_table.__test__ = False


def write_arrow(path: Path, table: pa.Table) -> None:
    """Write one Arrow IPC file of one batch."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())


def read_arrow(path: Path) -> pa.Table:
    """Read one Arrow IPC file into memory, so that it can be written again."""
    return pa.ipc.open_file(pa.BufferReader(path.read_bytes())).read_all()


def dump(path: Path, value: object) -> None:
    """Write JSON as the stages do."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def run_report(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str | int | float]]:
    """Run the stage in a project's folder, as DVC does."""
    monkeypatch.chdir(folder)
    return report(artifacts=Path("artifacts"), out=Path("artifacts/report"), metrics=Path("metrics.json"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with its report, to be looked at only."""
    folder = write_project(tmp_path_factory.mktemp("finished"))
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_report(folder, monkeypatch)
    return folder


@pytest.fixture(scope="module")
def unreported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project without a report, whoever takes a file away puts it back."""
    return write_project(tmp_path_factory.mktemp("unreported"))


def outputs(folder: Path) -> dict[str, bytes]:
    """All that the stage leaves."""
    files = [folder / "metrics.json", *sorted((folder / "artifacts/report").rglob("*.*"))]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def read_csv(folder: Path, name: str) -> list[dict[str, str]]:
    """The rows of one file of plot data."""
    with (folder / "artifacts/report/plots" / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


class Page(HTMLParser):
    """What a browser makes of the page: tags with their attributes, and the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Keep a tag."""
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        """Keep text."""
        self.text += data


def read_page(folder: Path) -> Page:
    """The parsed page."""
    return Page((folder / "artifacts/report/report.html").read_text(encoding="utf-8"))


def test_the_accuracy_on_validation_images_is_a_metric_where_there_are_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_project(tmp_path)
    run_report(folder, monkeypatch)
    assert "validation_accuracy" not in json.loads((folder / "metrics.json").read_text())
    path = folder / "artifacts/evaluation/t03/metrics.json"
    extra = {"validation_correct": [3, 0, 9], "validation_samples": [4, 0, 12]}
    dump(path, json.loads(path.read_text()) | extra)

    run_report(folder, monkeypatch)

    assert json.loads((folder / "metrics.json").read_text())["validation_accuracy"] == 0.75


def test_the_metrics_follow_from_the_counts_of_right_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_project(tmp_path)
    evaluations = [([18], [20]), ([12, 24], [20, 30]), ([14, 15, 20], [20, 30, 20])]
    for (correct, samples), task in zip(evaluations, CLASSES, strict=True):
        path = folder / f"artifacts/evaluation/{task}/metrics.json"
        dump(path, json.loads(path.read_text()) | {"correct": correct, "samples": samples})
    summary = run_report(folder, monkeypatch)
    numbers = json.loads((folder / "metrics.json").read_text())
    assert numbers == {
        "accuracy": {"t01": 0.7, "t02": 0.5, "t03": 1.0},
        "last_accuracy": round(49 / 70, 6),
        "last_accuracy_per_task": round(2.2 / 3, 6),
        "average_accuracy": round((18 / 20 + 36 / 50 + 49 / 70) / 3, 6),
        "average_accuracy_per_task": round((0.9 + 0.7 + 2.2 / 3) / 3, 6),
        "forgetting": round((20 * 0.2 + 30 * 0.3) / 50, 6),
        "forgetting_per_task": 0.25,
        "backward_transfer": round(-(20 * 0.2 + 30 * 0.3) / 50, 6),
        "backward_transfer_per_task": -0.25,
        "steps": 3,
        "classes": 7,
    }
    assert summary[0] == {"metric": "last accuracy", "per sample": 0.7, "per task": round(2.2 / 3, 6)}
    assert read_csv(folder, "accuracy.csv")[3] == {"after": "t03", "task": "t01", "accuracy": "0.7"}
    assert read_csv(folder, "steps.csv")[0]["forgetting"] == ""
    assert read_csv(folder, "steps.csv")[2]["forgetting_per_task"] == "0.25"


def test_the_plot_data_is_in_long_form(finished: Path) -> None:
    assert len(read_csv(finished, "accuracy.csv")) == len(read_csv(finished, "magnitudes.csv")) == 1 + 2 + 3
    assert len(read_csv(finished, "training.csv")) == 3 * 4
    confusion = read_csv(finished, "confusion.csv")
    assert len(confusion) == 70
    assert {row["actual"] for row in confusion} == {"3", "7", "0", "9", "1", "4", "8"}


def test_the_same_files_give_the_same_bytes_in_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = write_project(tmp_path / "here"), write_project(tmp_path / "quite/another place")
    run_report(first, monkeypatch)
    run_report(second, monkeypatch)
    once = outputs(first)
    assert len(once) == 2 + 11
    assert once == outputs(second)
    run_report(first, monkeypatch)
    assert outputs(first) == once
    assert str(tmp_path).encode() not in b"".join(once.values())


def test_the_page_refers_to_nothing_outside_itself(finished: Path) -> None:
    page = read_page(finished)
    for _, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "srcset", "data", "action"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:image/"))
    html = (finished / "artifacts/report/report.html").read_text(encoding="utf-8")
    assert "@import" not in html
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", html))
    assert not {tag for tag, _ in page.tags} & {"link", "iframe", "object", "embed", "base"}


def test_only_the_script_that_sorts_tables_may_run(finished: Path) -> None:
    html = (finished / "artifacts/report/report.html").read_text(encoding="utf-8")
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{allowed}'\"" in html
    tables = [attributes for tag, attributes in read_page(finished).tags if tag == "table"]
    assert sum("rows" in (attributes.get("class") or "") for attributes in tables) == 9
    assert "<button" not in html, "without script a heading is no button"


def test_the_page_shows_the_figures_and_the_ledger(finished: Path) -> None:
    page = read_page(finished)
    assert sum(tag == "svg" for tag, _ in page.tags) == 10
    assert all(attributes.get("aria-label") for tag, attributes in page.tags if tag == "svg")
    assert all(attributes.get("alt") for tag, attributes in page.tags if tag == "img")
    assert not re.search(r"#f[ed]00", str(page.tags)), "a colour that stands for a role is left in a figure"
    for file in ("model/t03/step.json", "gate/t03/verdict.json"):
        last = hashlib.sha256((finished / "artifacts" / file).read_bytes()).hexdigest()
        assert any(attributes.get("title") == last for _, attributes in page.tags)
        assert last[:12] in page.text
    assert "let through by Ana <b>: a new camera" in " ".join(page.text.split())
    assert "12.5 (limit 10.0)" in " ".join(page.text.split())


def test_the_page_has_no_id_twice(finished: Path) -> None:
    ids = [attributes["id"] for _, attributes in read_page(finished).tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_images_are_those_of_the_predictions(finished: Path) -> None:
    shown = [attributes for tag, attributes in read_page(finished).tags if tag == "img"]
    assert {attributes["title"][:3] for attributes in shown} == set(CLASSES)
    for attributes in shown:
        with pa.memory_map(
            str(finished / f"artifacts/split/t03/test/{attributes['title'][:3]}.arrow")
        ) as source:
            table = pa.ipc.open_file(source).read_all()
            row = table["id"].to_pylist().index(attributes["title"])
            expected = Image.open(io.BytesIO(table["image"][row].as_py()))
        found = Image.open(io.BytesIO(base64.b64decode(attributes["src"].split(",")[1])))
        assert found.tobytes() == expected.tobytes()


def test_classes_may_have_any_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    awkward = [
        "<script>alert(1)<|script>",
        '" onload="x',
        "{{ 7 * 7 }}",
        "قطة",
        "बिल्ली",
        "猫の絵",
        "a,b",
        "日" * 60,
    ]
    folder = write_project(tmp_path, {"t01": awkward[:4], "t02": awkward[4:]})
    run_report(folder, monkeypatch)
    page = read_page(folder)
    assert all(name in page.text for name in awkward)
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    assert not any("onload" in attributes for _, attributes in page.tags)
    assert set(awkward) == {row["actual"] for row in read_csv(folder, "confusion.csv")}


def test_a_method_without_directions_has_no_magnitudes_to_show(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_project(tmp_path, method="frozen")
    run_report(folder, monkeypatch)
    assert "no magnitudes to follow" in read_page(folder).text
    assert "changes no weight of the backbone" in read_page(folder).text
    for name in ("magnitudes", "changes", "changes_by_block", "overlap"):
        assert read_csv(folder, f"{name}.csv") == []


def test_a_single_task_has_no_forgetting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_project(tmp_path, {"t01": ["a", "b"]})
    summary = run_report(folder, monkeypatch)
    numbers = json.loads((folder / "metrics.json").read_text())
    assert numbers["forgetting"] is numbers["backward_transfer_per_task"] is None
    assert summary[2]["per sample"] == "-"
    assert "there is no old task yet" in read_page(folder).text
    assert "There is no step before the first to compare with" in read_page(folder).text


def test_a_model_without_mistakes_has_none_to_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_project(tmp_path, accuracy=1.0)
    run_report(folder, monkeypatch)
    assert "Every test image is named right" in read_page(folder).text


def test_a_model_that_is_always_wrong_can_be_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_project(tmp_path, {"t01": ["a"], "t02": ["b"]}, accuracy=-1.0, images=2)
    path = folder / "artifacts/evaluation/t02/metrics.json"
    dump(path, json.loads(path.read_text()) | {"correct": [0, 0]})
    run_report(folder, monkeypatch)
    assert json.loads((folder / "metrics.json").read_text())["last_accuracy"] == 0


@pytest.mark.parametrize("count", [21, 60])
def test_many_tasks_stay_a_page(count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {f"t{i:02d}": [f"class {i}a", f"class {i}b"] for i in range(1, count + 1)}
    folder = write_project(tmp_path, names, images=3)
    run_report(folder, monkeypatch)
    assert (folder / "artifacts/report/report.html").stat().st_size < 2_000_000
    page = read_page(folder)
    assert sum(tag == "img" for tag, _ in page.tags) <= 160 + 60
    text = " ".join(page.text.split())
    assert "the 20 tasks with the lowest accuracy" in text
    assert "Each task, then and now" in text


def test_a_stale_folder_of_a_task_that_is_gone_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_project(tmp_path)
    for stage in ("evaluation", "model", "fit", "split"):
        (folder / f"artifacts/{stage}/t04").mkdir()
    run_report(folder, monkeypatch)
    assert json.loads((folder / "metrics.json").read_text())["steps"] == 3


@pytest.mark.parametrize(
    "missing",
    [
        "evaluation/t02/metrics.json",
        "evaluation/t02/predictions.arrow",
        "evaluation/t03/predictions.arrow",
        "model/t00/step.json",
        "model/t02/directions/t02.safetensors",
        "model/t01/step.json",
        "model/t00/backbone.json",
        "gate/t02/verdict.json",
        "fit/t02/curve.csv",
        "split/t03/classes.json",
        "split/t03/test/t01.arrow",
    ],
)
def test_a_stage_that_has_not_run_is_named_in_one_line(
    missing: str, unreported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = unreported / "artifacts" / missing
    content = path.read_bytes()
    path.unlink()
    with pytest.raises(InputError, match=f"artifacts/{missing} is missing: .*run `sdlora run`") as raised:
        run_report(unreported, monkeypatch)
    path.write_bytes(content)
    assert "\n" not in str(raised.value)
    assert not (unreported / "metrics.json").exists()
    assert not (unreported / "artifacts/report").exists()


def test_an_evaluation_of_other_tasks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_project(tmp_path)
    path = folder / "artifacts/evaluation/t02/metrics.json"
    dump(path, json.loads(path.read_text()) | {"tasks": ["t02", "t01"]})
    with pytest.raises(InputError, match=r"is of the tasks t02, t01, params\.yaml has t01, t02"):
        run_report(folder, monkeypatch)


def test_predictions_of_other_images_than_before_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_project(tmp_path)
    path = folder / "artifacts/evaluation/t02/predictions.arrow"
    table = read_arrow(path)
    write_arrow(path, table.take(list(reversed(range(len(table))))))
    with pytest.raises(InputError, match=r"t02/predictions\.arrow: its images are not those of the step"):
        run_report(folder, monkeypatch)
    write_arrow(path, table.slice(0, 49))
    with pytest.raises(InputError, match=r"49 predictions, metrics\.json beside it is of 50 images"):
        run_report(folder, monkeypatch)


def test_a_picture_is_never_shown_beside_the_prediction_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_project(tmp_path)
    path = folder / "artifacts/split/t03/test/t02.arrow"
    table = read_arrow(path)
    write_arrow(path, table.take(list(reversed(range(len(table))))))
    with pytest.raises(InputError, match=r"t02\.arrow: t02/test/\S+ is not where its prediction says"):
        run_report(folder, monkeypatch)


def test_records_of_an_older_release_are_shown_without_what_they_lack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_project(tmp_path)
    for task in CLASSES:
        path = folder / f"artifacts/model/{task}/step.json"
        record = json.loads(path.read_text())
        dump(path, {"step": task, "previous": record["previous"], "method": "sdlora", "formulation": "paper",
                    "head": "linear", "needs_old_images": False, "rank": 10})  # fmt: skip
    dump(folder / "artifacts/model/t00/step.json", {"step": "t00", "previous": None})
    run_report(folder, monkeypatch)
    assert "The records of these steps name no versions" in read_page(folder).text
    assert read_csv(folder, "changes.csv") == []


def test_a_broken_chain_is_said_on_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_project(tmp_path)
    run_report(folder, monkeypatch)
    assert "every record and every verdict holds the hashes of those before" in read_page(folder).text
    for name, broken in (("model/t01/step.json", "t01, t02"), ("gate/t02/verdict.json", "t03")):
        path = folder / "artifacts" / name
        text = path.read_text()
        dump(path, json.loads(text) | {"seed": 11})
        run_report(folder, monkeypatch)
        assert f"broken at {broken}" in read_page(folder).text
        path.write_text(text)


def test_the_report_needs_neither_torch_nor_timm(unreported: Path) -> None:
    code = """
import sys
from pathlib import Path
from pipelines.report import report
report(artifacts=Path("artifacts"), out=Path("report"), metrics=Path("numbers.json"))
print(sorted({"torch", "timm", "prefect", "dvc"} & set(sys.modules)))
"""
    repository = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=unreported,
        env={**os.environ, "PYTHONPATH": str(repository)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "[]\n"
