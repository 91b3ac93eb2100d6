"""The report of a small made-up run: right numbers, same bytes, offline, whatever the classes are called."""

import base64
import hashlib
import io
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image

from pipelines.project.errors import InputError
from tests.support.evaluations import write_scores
from tests.support.reported_project import (
    CLASSES,
    dump,
    read_arrow,
    read_csv,
    run_report,
    write_arrow,
    write_project,
)
from tests.support.repository import REPOSITORY


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with its report, to be looked at only."""
    folder = write_project(tmp_path_factory.mktemp("finished"))
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_report(folder, monkeypatch)
    return folder


def test_what_a_removed_task_has_left_goes(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that what DVC records of the folders that the report reads is the same in every clone."""
    folder = write_project(tmp_path / "project")
    dump(folder / "artifacts/model/t04/step.json", {})
    dump(folder / "artifacts/fit/mine.json", {})
    run_report(folder, monkeypatch)
    assert not (folder / "artifacts/model/t04").exists()
    assert (folder / "artifacts/fit/mine.json").is_file()
    assert outputs(folder) == outputs(finished)


@pytest.fixture(scope="module")
def unreported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project without a report, whoever takes a file away puts it back."""
    return write_project(tmp_path_factory.mktemp("unreported"))


def outputs(folder: Path) -> dict[str, bytes]:
    """All that the stage leaves."""
    files = [folder / "metrics.json", *sorted((folder / "artifacts/report").rglob("*.*"))]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


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


def test_the_page_of_a_long_chain_shows_some_steps_and_names_the_files_of_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {f"t{number:02d}": [f"{number}"] for number in range(1, 121)}
    folder = write_project(tmp_path, names, images=2)
    run_report(folder, monkeypatch)
    html = (folder / "artifacts/report/report.html").read_text(encoding="utf-8")
    rows = [table.count("<tr>") - 1 for table in re.findall(r"<table.*?</table>", html, re.DOTALL)]
    assert 60 < max(rows) <= 100
    named = set(re.findall(r"<code>((?:tables|plots)/\w+\.csv)</code>", html))
    whole = {
        "tables/tasks.csv",
        "tables/shares.csv",
        "tables/steps.csv",
        "plots/flips.csv",
        "tables/gate.csv",
    }
    assert named >= whole | {"tables/ledger.csv"}
    for name in named:
        assert (folder / "artifacts/report" / name).is_file()
    assert len(read_csv(folder, "../tables/tasks.csv")) == len(read_csv(folder, "steps.csv")) == 120
    accuracy = read_csv(folder, "accuracy.csv")
    assert len(accuracy) == len(read_csv(folder, "magnitudes.csv")) <= 100 * 101 / 2
    assert accuracy[-1]["after"] == accuracy[-1]["task"] == "t120"
    assert json.loads((folder / "metrics.json").read_text())["steps"] == 120


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
        task = attributes["title"][:3]
        with pa.memory_map(str(finished / f"artifacts/split/{task}/test/{task}.arrow")) as source:
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
        "split/t01/test/t01.arrow",
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
    path = folder / "artifacts/split/t02/test/t02.arrow"
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


def test_the_page_says_from_which_step_on_drift_has_cost_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_project(tmp_path)
    run_report(folder, monkeypatch)
    assert "it is much" not in read_page(folder).text
    for task, loss in (("t02", 0.2), ("t03", 0.4321)):
        path = folder / f"artifacts/model/{task}/step.json"
        dump(path, json.loads(path.read_text()) | {"freezing": {"drift_loss": loss}})
        path = folder / f"artifacts/gate/{task}/verdict.json"
        verdict = json.loads(path.read_text())
        dump(path, verdict | {"measured": verdict["measured"] | {"drift": loss}})
    run_report(folder, monkeypatch)
    text = " ".join(read_page(folder).text.split())
    assert "In t03 it is much : lower training.learning_rate" in text.replace("much:", "much :")
    assert "43.2" in text


def test_the_page_says_by_what_the_last_step_divides_its_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_project(tmp_path)
    run_report(folder, monkeypatch)
    assert "divided by" not in read_page(folder).text
    path = folder / "artifacts/model/t03/step.json"
    dump(path, json.loads(path.read_text()) | {"freezing": {"temperature": 8.0123}})
    run_report(folder, monkeypatch)
    assert "The logits of the last step are divided by 8.01, a temperature" in read_page(folder).text


def test_the_page_and_the_metrics_say_how_well_each_step_tells_unknown_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_project(tmp_path)
    run_report(folder, monkeypatch)
    assert "Unknown images" not in read_page(folder).text
    assert "unknown" not in json.loads((folder / "metrics.json").read_text())
    for step, newcomers in (("t02", []), ("t03", [("test", 0.95), ("test", 0.4)])):
        evaluation = folder / "artifacts/evaluation" / step
        images = sum(json.loads((evaluation / "metrics.json").read_text())["samples"])
        write_scores(evaluation, [place / images for place in range(images)], newcomers)
        path = folder / f"artifacts/model/{step}/step.json"
        dump(
            path,
            json.loads(path.read_text()) | {"freezing": {"unknown": "relative", "unknown_threshold": 0.5}},
        )
    run_report(folder, monkeypatch)

    found = json.loads((folder / "metrics.json").read_text())["unknown"]
    assert list(found) == ["t02", "t03"]
    assert found["t02"]["noticed"] == 0.5
    assert found["t03"]["auroc"] is None
    values = [f"{100 * found['t02'][name]:.1f}" for name in ("false_alarms", "auroc", "fpr95", "noticed")]
    cells = "".join(f'<td class="number">{value}</td>' for value in values)
    assert f'<th scope="row">t02</th>{cells}' in (folder / "artifacts/report/report.html").read_text()


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
from pipelines.stages.report import report
report(artifacts=Path("artifacts"), out=Path("report"), metrics=Path("numbers.json"))
print(sorted({"torch", "timm", "prefect", "dvc"} & set(sys.modules)))
"""
    repository = REPOSITORY
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=unreported,
        env={**os.environ, "PYTHONPATH": str(repository)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "[]\n"
