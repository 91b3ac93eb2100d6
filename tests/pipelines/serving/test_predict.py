"""Predictions are those of the evaluation, whatever form they are asked for and written in."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import sdlora
from pipelines.cli.app import app
from pipelines.data.packed import read_images
from pipelines.project.error_text import user_message
from pipelines.project.errors import InputError
from pipelines.project.files import write_json
from pipelines.runtime.devices import choose_bf16, choose_device
from pipelines.serving.predict import files, files_of
from pipelines.stages.evaluate import evaluate
from sdlora.ledger import read_record
from tests.support.chains import make_chain, picture
from tests.support.repository import REPOSITORY


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a chain on the packaged backbone, and its test images as files beside."""
    root = tmp_path_factory.mktemp("project")
    make_chain(root, "glyph_vit")
    (root / "params.yaml").write_bytes((REPOSITORY / "params.yaml").read_bytes())
    for task in ("t01", "t02"):
        for index, data in enumerate(
            read_images(root / f"artifacts/split/{task}/test/{task}.arrow")["image"]
        ):
            path = root / f"pictures/{task}/img{2 * index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data.as_py())
    return root


@pytest.fixture
def project(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(made)
    return made


def run(*arguments: str, stdin: bytes = b"", status: int = 0) -> str:
    done = CliRunner().invoke(app, ["predict", *arguments], input=stdin)
    assert done.exit_code == status, (done.output, done.exception)
    return done.stdout


def rows(*arguments: str, **options: object) -> list[dict[str, object]]:
    return [json.loads(line) for line in run(*arguments, "--format", "jsonl", **options).splitlines()]


def line_of(*arguments: str) -> str | None:
    """The line that a command which cannot be done ends with."""
    error = CliRunner().invoke(app, ["predict", *arguments]).exception
    assert error is not None
    return user_message(error)


@pytest.mark.parametrize(("head", "score"), [("rgda", "relative"), ("lda", "energy")])
def test_images_that_look_like_no_class_are_said_beside_their_nearest_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, head: str, score: str
) -> None:
    make_chain(tmp_path, "glyph_vit", head=head, unknown=score)
    monkeypatch.chdir(tmp_path)
    for seed in range(3):
        picture(seed).save(f"{seed}.png")
    Path("3.png").write_bytes(b"no image")
    model = ("artifacts/model/t02", "0.png", "1.png", "2.png", "3.png")
    loaded = sdlora.load("artifacts/model/t02", device="cpu")
    assert loaded.scored is not None
    with torch.inference_mode():
        _, scores = loaded.scored(torch.stack([loaded.transform(picture(seed)) for seed in range(3)]))

    plain = rows(*model, status=1)
    judged = rows(*model, "--unknown", status=1)
    table = run(*model, "--unknown", status=1).splitlines()
    cells = list(csv.DictReader(io.StringIO(run(*model, "--unknown", "--format", "csv", status=1))))

    assert [{k: row[k] for k in row.keys() - {"unknown", "score"}} for row in judged] == plain
    assert [row["score"] for row in judged[:3]] == pytest.approx(scores.tolist(), rel=1e-3, abs=1e-2)
    assert [row["unknown"] for row in judged[:3]] == (scores > 0).tolist()
    assert [line.split()[0] for line in table[:3]] == [
        "unknown" if row["unknown"] else "known" for row in judged[:3]
    ]
    assert [row["unknown"] == "yes" for row in cells[:3]] == [row["unknown"] for row in judged[:3]]
    assert (cells[3]["unknown"], cells[3]["error"]) == ("", judged[3]["error"])


def test_a_step_without_a_threshold_is_refused_where_unknown_images_are_asked(project: Path) -> None:
    assert line_of("t02", "pictures", "--unknown") == (
        "artifacts/model/t02: step t02 has no threshold for unknown images: adapter.unknown was null, or no image "
        "could be left out; set it and call `sdlora run`, or leave --unknown out"
    )


def test_a_step_by_itself_is_refused_with_what_else_to_get(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `dvc get REPO artifacts/model/t02` leaves it."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made / "artifacts/model/t02", "t02")
    picture(0).save("a.png")

    said = line_of("t02", "a.png")
    assert said is not None
    assert said.endswith(
        "t00: step t00, the backbone of the chain, is missing; get it too, beside t02 "
        "(`dvc get REPO artifacts/model/t00`), or say where it is"
    )
    shutil.copytree(made / "artifacts/model/t00", "t00")
    said = line_of("t02", "a.png")
    assert said is not None
    assert "t01/step.json: it is missing, and step t02 stands on it; get the model folders" in said
    shutil.copytree(made / "artifacts/model/t01", "t01")
    assert "class " in run("t02", "a.png")
    Path("t01/head/t01.safetensors").unlink()
    said = line_of("t02", "a.png")
    assert said is not None
    assert said.startswith("t01/head/t01.safetensors: it is missing; get the whole folder")
    Path("t02/step.json").unlink()
    said = line_of("t02", "a.png")
    assert said is not None
    assert said.startswith("t02: no model folder (no step.json in it)")


def test_predictions_are_those_of_the_evaluation(project: Path, tmp_path: Path) -> None:
    for task in ("t01", "t02"):
        write_json(Path(f"artifacts/split/{task}/split.json"), {"task": task})
    classes = read_record(Path("artifacts/model/t02"))["classes"]
    write_json(Path("artifacts/split/t02/classes.json"), {"tasks": ["t01", "t02"], "classes": classes})
    evaluate(
        "t02",
        model=Path("artifacts/model/t02"),
        backbone=Path("artifacts/model/t00"),
        split=Path("artifacts/split/t02"),
        out=tmp_path / "evaluation",
    )
    table = read_images(tmp_path / "evaluation/predictions.arrow")
    best = [row["predictions"][0] for row in rows("t02", "pictures", "--batch-size", "3")]

    assert [one["label"] for one in best] == table["prediction"].to_pylist()
    np.testing.assert_allclose(
        [one["probability"] for one in best], table["confidence"].to_numpy(), atol=2e-6
    )
    assert len(best) == 10


def test_the_formats_say_the_same(project: Path) -> None:
    found = rows("2", "pictures/t01", "--top", "2")
    text = csv.reader(io.StringIO(run("2", "pictures/t01", "--top", "2", "--format", "csv")))
    header, *lines = list(text)
    table = run("2", "pictures/t01", "--top", "2").splitlines()

    assert header == ["image", "class_1", "probability_1", "class_2", "probability_2", "error"]
    for row, line, shown in zip(found, lines, table, strict=True):
        first, second = row["predictions"]
        assert line == [
            row["image"],
            *(cell for one in (first, second) for cell in (one["class"], f"{one['probability']:.6f}")),
            "",
        ]
        assert shown.startswith(f"{first['class']} {first['probability']:6.1%}")
        assert shown.endswith(row["image"])
        assert first["probability"] >= second["probability"]


def test_probabilities_of_all_classes_sum_to_one_and_more_than_all_are_not_asked_for(project: Path) -> None:
    for row in rows("t02", "pictures/t01", "--top", "99"):
        assert len(row["predictions"]) == 4
        assert sum(one["probability"] for one in row["predictions"]) == pytest.approx(1, abs=1e-5)


def test_files_folders_and_a_list_give_the_same(project: Path) -> None:
    names = [f"pictures/t01/img{index}.png" for index in (0, 2, 4, 6, 8)]

    assert rows("t02", *names) == rows("t02", "pictures/t01")
    assert rows("t02", "-", stdin="\n".join([*names, "", ""]).encode()) == rows("t02", "pictures/t01")
    assert [row["image"] for row in rows("t02", "pictures/t01")] == names


def test_a_list_may_begin_with_a_byte_order_mark(project: Path) -> None:
    names = [f"pictures/t01/img{index}.png" for index in (0, 2)]

    found = rows("t02", "-", stdin=b"\xef\xbb\xbf" + "\r\n".join(names).encode())
    assert [row["image"] for row in found] == names
    assert all("predictions" in row for row in found)


def test_folders_are_walked_in_natural_order_without_what_is_hidden_or_no_image(tmp_path: Path) -> None:
    for name in ("b/img10.png", "b/img2.JPG", "a/x.webp", "a/.y.png", ".c/z.png", "b/notes.txt", "img1.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    assert [str(path.relative_to(tmp_path)) for path in files_of(tmp_path)] == [
        "img1.png", "a/x.webp", "b/img2.JPG", "b/img10.png",
    ]  # fmt: skip


def test_an_image_that_cannot_be_read_is_named_and_the_others_are_predicted(
    project: Path, tmp_path: Path
) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    names = ["pictures/t01/img0.png", str(tmp_path / "broken.png"), "gone.png", "pictures/t01/img2.png"]
    done = CliRunner().invoke(
        app, ["predict", "t02", "-", "--format", "csv"], input="\n".join(names).encode()
    )
    _, *lines = csv.reader(io.StringIO(done.stdout))

    assert done.exit_code == 1
    assert done.stderr.splitlines() == [
        f"{names[1]}: it is no image that Pillow knows",
        "gone.png: No such file or directory",
        "2 of 4 images could not be read",
    ]
    assert [line[0] for line in lines] == names
    assert [line[-1] for line in lines] == [
        "",
        "it is no image that Pillow knows",
        "No such file or directory",
        "",
    ]
    assert lines[1][1:3] == ["", ""]
    assert rows("t02", "pictures/t01/img2.png")[0]["predictions"][0]["class"] == lines[3][1]


def test_a_file_is_whole_or_absent(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "found.jsonl"
    expected = run("t02", "pictures", "--format", "jsonl")
    assert run("t02", "pictures", "--format", "jsonl", "--out", str(out)) == ""
    assert out.read_text() == expected

    def fail(names: object, preprocessing: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pipelines.serving.predict._pixels", fail)
    CliRunner().invoke(app, ["predict", "t02", "pictures", "--out", str(out)])
    assert out.read_text() == expected
    assert [path.name for path in tmp_path.iterdir()] == ["found.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["t03", "pictures"], "no step t03 with classes"),
        (["pictures", "pictures"], "pictures: no model folder"),
        (["t02", "nowhere"], "nowhere: no such file or folder"),
        (["t02", "artifacts"], "artifacts: no image there"),
        (["t02", "pictures", "--device", "quantum"], "--device quantum: not usable here"),
    ],
    ids=["step", "model", "image", "empty", "device"],
)
def test_what_cannot_be_done_is_one_line(project: Path, arguments: list[str], fault: str) -> None:
    done = CliRunner().invoke(app, ["predict", *arguments])

    assert isinstance(done.exception, InputError)
    assert fault in str(done.exception)
    assert done.stdout == ""


def test_a_name_that_is_no_text_comes_out_as_it_is_and_is_escaped_on_a_screen(
    project: Path, tmp_path: Path
) -> None:
    name = os.fsencode(tmp_path) + b"/bad\xff\x1b[31m.png"
    Path(os.fsdecode(name)).write_bytes(Path("pictures/t01/img0.png").read_bytes())
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONUTF8": "1"}
    command = [sys.executable, "-m", "pipelines", "predict", "t02", name]
    found = subprocess.run([*command, "--format", "csv"], env=environment, capture_output=True, check=True)
    screen = run("t02", os.fsdecode(name))

    assert name in found.stdout
    assert "\x1b" not in screen
    assert "\\udcff\\u001b[31m" in screen


def test_names_are_read_as_they_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    from itertools import islice

    from pipelines.serving.predict import AHEAD, _decoded_batches

    taken = 0

    def endless() -> object:
        nonlocal taken
        while True:
            taken += 1
            yield f"{taken}.png"

    monkeypatch.setattr("pipelines.serving.predict._pixels", lambda name, preprocessing: name)
    found = list(islice(_decoded_batches(endless(), None, 5), 3))

    assert [names for names, _ in found] == [[f"{5 * i + j}.png" for j in range(1, 6)] for i in range(3)]
    assert taken <= 5 * (3 + AHEAD)


def test_half_precision_is_chosen_where_it_is_fast() -> None:
    cpu = torch.device("cpu")

    assert choose_device("cpu") == cpu
    assert choose_bf16("bf16", cpu)
    assert not choose_bf16("fp32", cpu)
    assert not choose_bf16("auto", cpu)


def test_half_precision_predicts_nearly_the_same(project: Path) -> None:
    full, half = (rows("t02", "pictures", "--top", "4", "--precision", p) for p in ("fp32", "bf16"))
    by_class = [
        [{one["class"]: one["probability"] for one in row["predictions"]} for row in found]
        for found in (full, half)
    ]

    assert full != half
    for one, other in zip(*by_class, strict=True):
        assert all(one[name] == pytest.approx(other[name], abs=0.03) for name in one)


def test_a_picture_of_any_mode_is_predicted_as_python_would(project: Path, tmp_path: Path) -> None:
    import sdlora

    model = sdlora.load("artifacts/model/t02", device="cpu")
    for mode in ("L", "RGB", "RGBA", "P", "1"):
        picture(3, mode=mode).save(tmp_path / f"{mode}.png")
    for row in rows("t02", str(tmp_path)):
        logits = model.module(model.transform(Image.open(row["image"]))[None])
        best = row["predictions"][0]
        assert best["probability"] == pytest.approx(logits.softmax(dim=1).max().item(), abs=2e-6)
        assert best["class"] == model.classes[int(logits.argmax())]


def test_the_names_of_files_are_left_as_they_were_given() -> None:
    assert list(files(["./a.png", "b//c.png"])) == ["./a.png", "b//c.png"]
