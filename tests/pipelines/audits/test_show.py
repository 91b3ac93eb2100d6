"""`sdlora audit show`: what it says of a class, an image and a task is what the files say, step by step."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file
from scipy import stats
from typer.testing import CliRunner

from pipelines.cli.app import app
from pipelines.data.decoding import picture_hash
from pipelines.data.packed import SampleRow, read_images, write_samples
from pipelines.project.files import read_json, sha256_of
from sdlora.ledger import record_hash
from tests.support.audited_project import EACH, Answer, make_audited
from tests.support.chains import encoded, picture
from tests.support.commands import call_here, said_here


def image(task: int, label: int, index: int) -> str:
    return f"t{task:02}/test/c{label}/{index}.png"


SAID: dict[str, dict[str, Answer]] = {
    "t01": {image(1, 0, 5): ("c1", 0.7)},
    "t02": {image(1, 0, 0): ("c2", 0.6), image(1, 0, 5): ("c1", 0.7)},
    "t03": {
        image(1, 0, 0): ("c2", 0.55),
        image(1, 0, 1): ("c4", 0.8),
        image(1, 0, 2): ("c4", 0.95),
        image(1, 0, 3): ("c4", 0.65),
        image(3, 5, 0): ("c1", 0.5),
    },
}
"""c0 is wrong once, then loses one, then loses three and gains one."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_audited(tmp_path_factory.mktemp("audited"), SAID)


@pytest.fixture
def project(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the project, as the working directory."""
    root = tmp_path / "project"
    shutil.copytree(made, root)
    monkeypatch.chdir(root)
    return root


def run(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["audit", "show", *arguments])
    assert done.exit_code == 0, (done.output, done.exception)
    return done.stdout


def figures(*arguments: str) -> dict[str, Any]:
    return json.loads(run(*arguments, "--json"))


def fault(*arguments: str) -> str:
    """The one line of an error."""
    out, error = said_here(Path.cwd(), "audit", "show", *arguments, status=2)
    assert out == ""
    (line,) = error.splitlines()
    return line


# ---- a class


def test_a_class_has_accuracy_interval_and_confusions_at_every_step_since_it_arrived(project: Path) -> None:
    found = figures("--class", "c0")
    assert (found["class"], found["task"], found["images"]) == ("c0", "t01", EACH)
    assert [(row["step"], row["right"]) for row in found["steps"]] == [("t01", 5), ("t02", 4), ("t03", 2)]
    for row in found["steps"]:
        low, high = stats.binomtest(row["right"], EACH).proportion_ci(method="wilson")
        assert (row["low"], row["high"]) == pytest.approx((low, high), abs=1e-6)
    assert [row["taken_for"] for row in found["steps"]] == [
        [{"class": "c1", "task": "t01", "images": 1}],
        [{"class": "c1", "task": "t01", "images": 1}, {"class": "c2", "task": "t02", "images": 1}],
        [{"class": "c4", "task": "t03", "images": 3}, {"class": "c2", "task": "t02", "images": 1}],
    ]
    assert [row["step"] for row in figures("--class", "c2")["steps"]] == ["t02", "t03"]


def test_the_step_that_hurt_most_is_the_one_that_lost_most_net_of_what_it_gained(project: Path) -> None:
    found = figures("--class", "c0")
    assert [(row["lost"], row["gained"]) for row in found["steps"]] == [(None, None), (1, 0), (3, 1)]
    assert found["hurt"] == {
        "step": "t03",
        "before": "t02",
        "lost": 3,
        "gained": 1,
        "p_value": pytest.approx(stats.binomtest(1, 4).pvalue),
        "p_holm": 1.0,
    }
    assert figures("--class", "c3")["hurt"] is None
    assert "no step hurt it" in run("--class", "c3")


def test_the_worst_images_are_the_surest_mistakes_and_can_be_found(project: Path) -> None:
    found = figures("--class", "c0")["mistakes"]
    assert [(row["id"], row["taken_for"], row["confidence"]) for row in found] == [
        (image(1, 0, 2), "c4", 0.95),
        (image(1, 0, 1), "c4", 0.8),
        (image(1, 0, 3), "c4", 0.65),
        (image(1, 0, 0), "c2", 0.55),
    ]
    assert {row["file"] for row in found} == {None}
    assert found[0]["packed"] == "artifacts/split/t01/test/t01.arrow"
    table = read_images(Path(found[0]["packed"]))
    assert found[0]["id"] in table["id"].to_pylist()


def test_a_mistake_is_traced_to_its_file_only_while_the_file_is_that_picture(project: Path) -> None:
    table = read_images(Path("artifacts/split/t01/test/t01.arrow"))
    data = dict(zip(table["id"].to_pylist(), table["image"].to_pylist(), strict=True))
    for part in ("train", "test"):
        for name in ("c0", "c1"):
            (project / "pictures" / part / name).mkdir(parents=True)
            Image.new("L", (9, 9)).save(project / f"pictures/{part}/{name}/9.png")
    for index in (1, 2):
        Path(f"pictures/test/c0/{index}.png").write_bytes(data[image(1, 0, index)])
    found = {row["id"]: row["file"] for row in figures("--class", "c0")["mistakes"]}
    assert found[image(1, 0, 1)] == "pictures/test/c0/1.png"
    assert found[image(1, 0, 3)] is None

    Image.new("L", (9, 9), 90).save(project / "pictures/test/c0/2.png")
    found = {row["id"]: row["file"] for row in figures("--class", "c0")["mistakes"]}
    assert (found[image(1, 0, 1)], found[image(1, 0, 2)]) == ("pictures/test/c0/1.png", None)


def test_the_terminal_says_where_to_look_next_in_80_columns(project: Path) -> None:
    text = run("--class", "c0")
    assert "hurt most at t03: 3 lost, 1 gained, p = 0.625" in text
    assert "what changed there: sdlora audit diff t02 t03" in text
    assert " 95.0 % c4 (t03)  t01/test/c0/2.png  packed in artifacts/split/t01/test/t01.arrow" in text
    tables = [line for line in text.splitlines() if line.startswith(("step", "t0", "─"))]
    assert len(tables) == 5
    assert max(map(len, tables)) <= 80


# ---- an image


def test_what_steps_say_of_an_image_is_what_predict_says_of_its_file(project: Path, tmp_path: Path) -> None:
    key = image(1, 1, 3)
    table = read_images(Path("artifacts/split/t01/test/t01.arrow"))
    path = tmp_path / "file.png"
    path.write_bytes(table["image"][table["id"].to_pylist().index(key)].as_py())
    by_id, by_file = figures("--image", key), figures("--image", str(path))

    assert by_id["steps"] == by_file["steps"]
    assert [row["step"] for row in by_id["steps"]] == ["t01", "t02", "t03"]
    for row in by_id["steps"]:
        arguments = ["predict", row["step"], str(path), "--top", "3", "--format", "jsonl"]
        (line,) = CliRunner().invoke(app, arguments).stdout.splitlines()
        said = json.loads(line)["predictions"]
        assert [guess["class"] for guess in row["guesses"]] == [guess["class"] for guess in said]
        assert [guess["probability"] for guess in row["guesses"]] == pytest.approx(
            [guess["probability"] for guess in said], abs=2e-6
        )
        assert row["right"] == (said[0]["class"] == "c1")
    assert len(by_id["steps"][0]["guesses"]) == 2
    assert len(by_id["steps"][1]["guesses"]) == 3


def test_a_file_that_shows_a_known_picture_is_recognised_in_whatever_format(
    project: Path, tmp_path: Path
) -> None:
    key = image(2, 3, 0)
    table = read_images(Path("artifacts/split/t02/test/t02.arrow"))
    png = tmp_path / "file.png"
    png.write_bytes(table["image"][table["id"].to_pylist().index(key)].as_py())
    Image.open(png).save(tmp_path / "file.bmp")
    found = figures("--image", str(tmp_path / "file.bmp"))
    (known,) = found["known"]
    told = {"id": key, "part": "test", "class": "c3", "task": "t02", "same_bytes": False}
    assert known == {**told, "went_into": [], "tested_in": ["t02", "t03"]}
    assert [row["right"] is None for row in found["steps"]] == [True, False, False]

    Image.new("RGB", (20, 20)).save(tmp_path / "other.png")
    found = figures("--image", str(tmp_path / "other.png"))
    assert (found["known"], {row["right"] for row in found["steps"]}) == ([], {None})


def test_what_the_images_of_a_folder_went_into_is_told_by_bytes_and_by_picture(
    project: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "files"
    (folder / "sub").mkdir(parents=True)
    trained = picture(999)
    (folder / "same.png").write_bytes(encoded(trained))
    trained.save(folder / "sub/other format.bmp")
    table = read_images(Path("artifacts/split/t02/test/t02.arrow"))
    (folder / "tested.png").write_bytes(table["image"][0].as_py())
    (folder / "unknown.png").write_bytes(encoded(picture(998)))
    (folder / "no picture.txt").write_text("text")
    samples = Path("artifacts/split/t01/samples/t01.arrow")
    rows = [SampleRow(**row) for row in read_images(samples).to_pylist()]
    samples.unlink()  # the table of before may still be mapped
    hashes = {"sha256": sha256_of(folder / "same.png"), "pixels": picture_hash(trained)}
    write_samples(samples, [rows[0]._replace(**hashes), *rows[1:]])
    found = json.loads(run("--files", str(folder)))["files"]

    assert {name: [its["same_bytes"] for its in told["known"]] for name, told in found.items()} == {
        "no picture.txt": [],
        "same.png": [True],
        "sub/other format.bmp": [False],
        "tested.png": [True],
        "unknown.png": [],
    }
    assert [name for name, told in found.items() if told["in_test"]] == ["tested.png"]
    assert found["tested.png"]["known"][0]["tested_in"] == ["t02", "t03"]
    known = found["same.png"]["known"][0]
    assert (known["id"], known["part"], known["class"]) == (rows[0].id, "train", "c0")
    steps = known["went_into"]
    assert [(step["step"], step["trained_on_it"]) for step in steps] == [
        ("t01", True),
        ("t02", False),
        ("t03", False),
    ]
    assert steps[0]["files"] == [
        "directions/t01.safetensors",
        "head/t01.safetensors",
        "magnitudes.safetensors",
    ]
    assert steps[2]["as_they_were"] == ["directions/t01.safetensors", "head/t01.safetensors"]
    lines = run("--image", str(folder / "same.png")).splitlines()
    assert lines[1] == f"t01 was trained on it: {', '.join(steps[0]['files'])}"
    assert "it is in no test" in lines


def test_an_image_is_shown_in_80_columns(project: Path) -> None:
    text = run("--image", image(2, 3, 0))
    assert "t02/test/c3/0.png: a test image of class c3, of t02" in text
    assert "class unknown yet" in text
    assert max(map(len, text.splitlines())) <= 80


# ---- a task


def test_a_task_is_what_its_record_split_and_evaluations_say(project: Path) -> None:
    found = figures("--task", "1")
    record = read_json(Path("artifacts/model/t01/step.json"))
    assert (found["task"], found["after"]) == ("t01", "t00")
    assert found["record"] == record_hash(Path("artifacts/model/t01"))
    assert found["previous"] == record["previous"]
    assert found["classes"] == [{"class": name, "test": EACH, "train": 1} for name in ("c0", "c1")]
    assert [row["score"]["right"] for row in found["steps"]] == [11, 10, 8]
    for row in found["steps"]:
        values = load_file(f"artifacts/model/{row['step']}/magnitudes.safetensors")["t01"].astype(np.float64)
        expected = {"mean": values.mean(), "lowest": values.min(), "highest": values.max()}
        assert row["magnitudes"] == pytest.approx(expected, rel=1e-4)
    # At t03 it has 12 of 36 images; it loses 4 of its own and gains one of c5.
    last = found["steps"][-1]
    assert last["images_share"] == pytest.approx(12 / 36, abs=1e-6)
    assert last["predictions_share"] == pytest.approx(9 / 36, abs=1e-6)
    assert last["bias"] == pytest.approx(-3 / 36, abs=1e-6)


def test_a_task_is_shown_in_80_columns(project: Path) -> None:
    text = run("--task", "t02")
    assert text.startswith("t02: 2 classes, learned after t01\n")
    assert f"record {record_hash(Path('artifacts/model/t02'))}" in text
    assert max(map(len, text.splitlines())) <= 80


# ---- what is asked wrongly


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "audit show: give one of --class, --image, --task and --files"),
        (["--class", "c0", "--task", "t01"], "audit show: give one of --class, --image, --task and --files"),
        (["--class", "C0"], "t03 knows no class 'C0'; did you mean 'c0'"),
        (["--task", "t00"], "--task t00: not a task of params.yaml; there are t01, t02, t03"),
        (["--task", "t07"], "there is no step 't07'; there are t00, t01, t02, t03"),
        (
            ["--image", "t01/test/c0/9.png"],
            "t01/test/c0/9.png: no such file, and no test image of this id; did you mean 't01/test/c0/",
        ),
        (["--image", "params.yaml"], "params.yaml: it is no image that Pillow knows"),
    ],
    ids=["nothing", "two things", "a class", "the backbone", "a step", "an id", "no picture"],
)
def test_what_is_not_known_is_one_line_with_what_is_near(
    project: Path, arguments: list[str], line: str
) -> None:
    assert fault(*arguments).startswith(f"error: {line}")


def test_before_anything_was_evaluated_there_is_nothing_to_show(project: Path) -> None:
    shutil.rmtree("artifacts/evaluation")
    assert fault("--class", "c0") == (
        "error: artifacts/evaluation: no step was evaluated yet; run `sdlora run`"
    )


# ---- a chain that was trained


@pytest.mark.slow
def test_a_finished_chain_is_shown_from_its_files_and_from_the_cache_alike(
    finished: tuple[Path, str], tmp_path: Path
) -> None:
    folder = tmp_path / "project"
    shutil.copytree(finished[0], folder)
    questions = [("--class", "a"), ("--image", "pictures/test/a/0.png"), ("--task", "t01")]
    said = [json.loads(call_here(folder, "audit", "show", *asked, "--json")) for asked in questions]
    of_class, of_image, of_task = said

    assert [row["images"] for row in of_class["steps"]] == [2, 2]
    for row in of_class["mistakes"]:
        samples = read_images(folder / "artifacts/split/t01/samples/t01.arrow").to_pylist()
        (known,) = [sample for sample in samples if sample["id"] == row["id"]]
        assert sha256_of(folder / row["file"]) == known["sha256"]
    assert [entry["id"] for entry in of_image["known"]] == ["t01/test/a/0.png"]
    predictions = read_images(folder / "artifacts/evaluation/t02/predictions.arrow").to_pylist()
    (row,) = [row for row in predictions if row["id"] == "t01/test/a/0.png"]
    best = of_image["steps"][-1]["guesses"][0]
    assert best["class"] == "abcd"[row["prediction"]]
    assert best["probability"] == pytest.approx(row["confidence"], abs=1e-5)
    assert of_task["parameters"]["training.epochs"] == 12

    shutil.rmtree(folder / "artifacts")
    again = [json.loads(call_here(folder, "audit", "show", *asked, "--json")) for asked in questions]
    assert again == said
