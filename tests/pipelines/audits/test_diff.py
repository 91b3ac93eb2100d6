"""`sdlora audit diff`: every figure agrees with one computed by hand from the files, however it is shown."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from scipy import stats
from scipy.linalg import subspace_angles
from typer.testing import CliRunner

from pipelines.audits.diff_page import share_out
from pipelines.audits.diff_tables import block_grid
from pipelines.cli.app import app
from pipelines.data.packed import read_images
from pipelines.project.files import read_json, sha256_of
from tests.support.audited_project import EACH, Answer, make_audited, replace_picture
from tests.support.commands import call_here, environment, said_here
from tests.support.repository import REPOSITORY


def image(task: int, label: int, index: int) -> str:
    return f"t{task:02}/test/c{label}/{index}.png"


THEN: dict[str, Answer] = {image(1, 1, 0): ("c0", 0.8), image(2, 2, 5): ("c0", 0.55)}
NOW: dict[str, Answer] = {
    **{image(1, 0, index): ("c4", 0.99 - 0.1 * index) for index in range(4)},
    image(1, 0, 4): ("c2", 0.6),
    image(2, 2, 5): ("c3", 0.7),
    image(2, 3, 1): ("c5", 0.5),
    image(3, 4, 1): ("c5", 0.4),
}
"""Of c0 five are lost, of c1 one is gained, of c2 one is wrong both times, of c3 one is lost."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_audited(tmp_path_factory.mktemp("audited"), {"t02": THEN, "t03": NOW})


@pytest.fixture
def project(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the project, as the working directory."""
    root = tmp_path / "project"
    shutil.copytree(made, root)
    monkeypatch.chdir(root)
    return root


def run(*arguments: str, status: int = 0) -> str:
    done = CliRunner().invoke(app, ["audit", "diff", *arguments])
    assert done.exit_code == status, (done.output, done.exception)
    return done.stdout


def figures(*arguments: str) -> dict[str, Any]:
    return json.loads(run(*arguments, "--no-features", "--json"))


def fault(*arguments: str) -> str:
    """The one line of an error."""
    out, error = said_here(Path.cwd(), "audit", "diff", *arguments, status=2)
    assert out == ""
    (line,) = error.splitlines()
    return line


def answers(step: str) -> dict[str, dict[str, Any]]:
    """The rows of a step's predictions by image."""
    table = read_images(Path(f"artifacts/evaluation/{step}/predictions.arrow"))
    return {row["id"]: row for row in table.to_pylist()}


def is_right(row: dict[str, Any]) -> bool:
    return row["label"] == row["prediction"]


def weights(step: str, target: str) -> np.ndarray:
    """Σ αₖ BₖAₖ as the whole matrix."""
    folder = Path(f"artifacts/model/{step}")
    record = read_json(folder / "step.json")
    magnitudes = load_file(folder / "magnitudes.safetensors")
    total = np.zeros(())
    for task in record["directions"]:
        tensors = load_file(f"artifacts/model/{task}/directions/{task}.safetensors")
        up, down = (tensors[f"{target}.{part}"].astype(np.float64) for part in ("up", "down"))
        total = total + float(magnitudes[task][record["targets"].index(target)]) * up @ down
    return total


# ---- answers


def test_accuracies_intervals_and_flips_are_those_of_scipy_on_the_images_of_both(project: Path) -> None:
    found = figures("t02", "3")
    then, now = answers("t02"), answers("t03")
    both = [name for name in now if name in then]
    assert found["images"] == {"compared": 4 * EACH, "then": 4 * EACH, "now": 6 * EACH, "other_picture": 0}

    rows = {"all": (found["accuracy"]["all"], both)}
    for row in found["accuracy"]["tasks"][:2]:
        rows[row["task"]] = row, [name for name in both if now[name]["task"] == row["task"]]
    for row in found["accuracy"]["classes"][:4]:
        rows[row["class"]] = row, [name for name in both if name.split("/")[2] == row["class"]]
    assert rows.keys() == {"all", "t01", "t02", "c0", "c1", "c2", "c3"}
    for row, names in rows.values():
        assert row["images"] == len(names)
        for side, said in (("then", then), ("now", now)):
            right = sum(is_right(said[name]) for name in names)
            low, high = stats.binomtest(right, len(names)).proportion_ci(method="wilson")
            expected = {
                "right": right,
                "images": len(names),
                "accuracy": right / len(names),
                "low": low,
                "high": high,
            }
            assert row[side] == pytest.approx(expected, abs=1e-6)
        lost = sum(is_right(then[name]) and not is_right(now[name]) for name in names)
        gained = sum(is_right(now[name]) and not is_right(then[name]) for name in names)
        assert (row["lost"], row["gained"]) == (lost, gained)
        expected_p = stats.binomtest(lost, lost + gained).pvalue if lost + gained else 1.0
        assert row["p_value"] == pytest.approx(expected_p, rel=1e-5)
    assert (found["accuracy"]["all"]["lost"], found["accuracy"]["all"]["gained"]) == (6, 1)


def test_p_values_of_classes_are_corrected_for_all_classes_that_were_tested(project: Path) -> None:
    rows = {row["class"]: row for row in figures("t02", "t03")["accuracy"]["classes"]}
    assert rows["c0"]["p_value"] == 2 * 0.5**5
    assert rows["c0"]["p_holm"] == 4 * rows["c0"]["p_value"]  # the smallest of four
    assert rows["c3"]["p_holm"] == 1.0


def test_what_only_one_of_them_was_tested_on_has_its_accuracy_and_no_flips(project: Path) -> None:
    for arguments, side, other in ((("t02", "t03"), "now", "then"), (("t03", "t02"), "then", "now")):
        found = figures(*arguments)
        (row,) = [row for row in found["accuracy"]["tasks"] if row["task"] == "t03"]
        assert (row["images"], row[other], row["lost"], row["p_value"], row["p_holm"]) == (0, *[None] * 4)
        assert (row[side]["right"], row[side]["images"]) == (2 * EACH - 1, 2 * EACH)
        assert found["images"]["compared"] == 4 * EACH


def test_flipped_images_are_named_with_the_surest_mistake_of_a_class_first(project: Path) -> None:
    flips = figures("t02", "t03")["flips"]
    assert [fact["id"] for fact in flips["lost"]] == [
        *(image(1, 0, index) for index in range(4)),
        image(1, 0, 4),
        image(2, 3, 1),
    ]
    assert flips["lost"][0] == {
        "id": image(1, 0, 0),
        "class": "c0",
        "task": "t01",
        "then": "c0",
        "confidence_then": 0.9,
        "now": "c4",
        "confidence_now": 0.99,
    }
    assert [(fact["id"], fact["then"], fact["now"]) for fact in flips["gained"]] == [
        (image(1, 1, 0), "c0", "c1")
    ]


def test_lost_images_are_followed_to_the_classes_and_tasks_that_took_them(project: Path) -> None:
    errors = figures("t02", "t03")["errors"]
    assert errors["lost"] == 6
    assert errors["tasks"] == [
        {"task": "t03", "new": True, "images": 5},
        {"task": "t02", "new": False, "images": 1},
    ]
    assert errors["classes"][0] == {
        "class": "c0",
        "task": "t01",
        "lost": 5,
        "taken_for": [
            {"class": "c4", "task": "t03", "images": 4},
            {"class": "c2", "task": "t02", "images": 1},
        ],
    }
    assert [row["class"] for row in errors["classes"]] == ["c0", "c3"]


def test_calibration_is_that_of_fifteen_ranges_counted_by_hand(project: Path) -> None:
    found = figures("t02", "t03")["calibration"]
    both = answers("t02").keys()
    for side, step in (("then", "t02"), ("now", "t03")):
        said = [row for name, row in answers(step).items() if name in both]
        ranges: dict[int, list[dict[str, Any]]] = {}
        for row in said:
            ranges.setdefault(math.ceil(15 * row["confidence"]), []).append(row)
        gap = sum(
            abs(sum(row["confidence"] for row in rows) - sum(is_right(row) for row in rows))
            for rows in ranges.values()
        )
        assert found[side]["error"] == pytest.approx(gap / len(said), abs=1e-6)
        assert found[side]["confidence"] == pytest.approx(np.mean([row["confidence"] for row in said]), 1e-5)
        assert found[side]["accuracy"] == pytest.approx(np.mean([is_right(row) for row in said]), abs=1e-6)


def test_an_image_of_the_same_name_but_another_picture_is_not_compared(project: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(project, other)
    replace_picture(project, image(1, 0, 0))
    found = figures(str(other / "artifacts/model/t02"), "t03")
    assert found["images"] == {
        "compared": 4 * EACH - 1,
        "then": 4 * EACH,
        "now": 6 * EACH,
        "other_picture": 1,
    }
    assert found["accuracy"]["all"]["lost"] == 5


def test_predictions_that_lack_a_test_image_are_refused(project: Path) -> None:
    shutil.copy("artifacts/evaluation/t01/predictions.arrow", "artifacts/evaluation/t02/predictions.arrow")
    assert fault("t02", "t03", "--no-features") == (
        f"error: artifacts/evaluation/t02: it has no prediction of {image(2, 2, 0)}; run `sdlora run` to bring it up "
        "to date"
    )


# ---- weights


def test_changes_are_those_of_the_whole_matrices_relative_to_the_pretrained_ones(project: Path) -> None:
    norms = read_json(Path("artifacts/model/t00/step.json"))["norms"]
    for then, now in (("t01", "t03"), ("t03", "t02"), ("t00", "t02")):
        changes = figures(then, now)["weights"]["changes"]
        assert len(changes) == 12
        for target, change in changes.items():
            before = 0 if then == "t00" else weights(then, target)
            expected = np.linalg.norm(weights(now, target) - before) / norms[target]
            assert change == pytest.approx(expected, rel=1e-4)


def test_magnitudes_are_those_of_the_files(project: Path) -> None:
    rows = {row["task"]: row for row in figures("t02", "t03")["weights"]["magnitudes"]}
    assert list(rows) == ["t01", "t02", "t03"]
    held = {step: load_file(f"artifacts/model/{step}/magnitudes.safetensors") for step in ("t02", "t03")}
    for task in ("t01", "t02"):
        for side, step in (("then", "t02"), ("now", "t03")):
            values = held[step][task].astype(np.float64)
            expected = {"mean": values.mean(), "lowest": values.min(), "highest": values.max()}
            assert rows[task][side] == pytest.approx(expected, rel=1e-4)
        expected_change = float(held["t03"][task].mean() - held["t02"][task].mean())
        assert rows[task]["change"] == pytest.approx(expected_change, rel=1e-3, abs=1e-6)
    assert (rows["t03"]["then"], rows["t03"]["change"]) == (None, None)


def test_overlaps_are_scipys_angles_with_the_space_of_all_earlier_directions(project: Path) -> None:
    (row,) = figures("t02", "t03")["weights"]["overlaps"]
    assert (row["task"], row["only"], row["against"]) == ("t03", "now", ["t01", "t02"])
    own = load_file("artifacts/model/t03/directions/t03.safetensors")
    earlier = [load_file(f"artifacts/model/{task}/directions/{task}.safetensors") for task in ("t01", "t02")]
    seen: dict[str, list[float]] = {"rows": [], "columns": []}
    for target, at in row["targets"].items():
        for side, part in (("rows", "down"), ("columns", "up")):
            turn = (lambda matrix: matrix.T) if side == "rows" else (lambda matrix: matrix)
            space = turn(own[f"{target}.{part}"].astype(np.float64))
            whole = np.hstack([turn(one[f"{target}.{part}"].astype(np.float64)) for one in earlier])
            angles = subspace_angles(whole, space)
            assert at[side]["overlap"] == pytest.approx(np.square(np.cos(angles)).mean(), abs=1e-5)
            assert at[side]["angle"] == pytest.approx(np.degrees(angles.max()), rel=1e-4)
            assert at[side]["chance"] == pytest.approx(max(whole.shape[1], space.shape[1]) / len(space), 1e-5)
            seen[side].append(np.square(np.cos(angles)).mean())
    for side, values in seen.items():
        expected = {"mean": np.mean(values), "lowest": min(values), "highest": max(values)}
        assert row[side]["overlap"] == pytest.approx(expected, rel=1e-4)


def test_random_spaces_overlap_as_much_as_chance_says() -> None:
    from pipelines.audits.weight_changes import overlap_of

    rng = np.random.default_rng(0)
    found = [
        overlap_of([rng.normal(size=(40, 3)), rng.normal(size=(40, 5))], rng.normal(size=(40, 2)))
        for _ in range(300)
    ]
    assert np.mean([one["overlap"] for one in found]) == pytest.approx(found[0]["chance"], abs=0.01)


def test_between_two_runs_a_direction_is_compared_with_its_namesake(project: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(project, other)
    path = other / "artifacts/model/t02/directions/t02.safetensors"
    path.unlink()
    shutil.copy(other / "artifacts/model/t01/directions/t01.safetensors", path)
    record = read_json(other / "artifacts/model/t02/step.json")
    record["files"]["directions/t02.safetensors"] = sha256_of(path)
    (other / "artifacts/model/t02/step.json").write_text(json.dumps(record))
    found = figures(str(other / "artifacts/model/t02"), "t02")

    assert found["relation"] == "two runs of t02"
    assert found["kept"] == {"frozen": 4, "differing": ["directions/t02.safetensors"]}
    (row,) = found["weights"]["overlaps"]
    assert (row["task"], row["only"], row["against"]) == ("t02", "both", ["t02"])
    assert found["images"]["compared"] == 4 * EACH


def test_two_runs_of_other_label_orders_are_compared_by_the_names_of_classes(
    project: Path, tmp_path: Path
) -> None:
    other = make_audited(tmp_path / "other", {}, names={0: "c1", 1: "c0"})
    found = figures(str(other / "artifacts/model/t01"), "t01")
    # The pictures are made from labels, so here every one of them is another.
    assert found["images"] == {"compared": 0, "then": 2 * EACH, "now": 2 * EACH, "other_picture": 2 * EACH}
    for name in ("c0", "c1"):
        for index in range(EACH):
            replace_picture(project, f"t01/test/{name}/{index}.png")
            replace_picture(other, f"t01/test/{name}/{index}.png")
    row = figures(str(other / "artifacts/model/t01"), "t01")["accuracy"]["all"]
    assert (row["then"]["right"], row["now"]["right"], row["lost"]) == (2 * EACH, 2 * EACH, 0)


def test_the_ledger_says_what_two_steps_are_to_each_other(project: Path) -> None:
    assert figures("t01", "t03")["relation"] == "t03 continues t01"
    assert figures("t03", "t01")["relation"] == "t03 continues t01"
    assert figures("t00", "t02")["relation"] == "t02 continues t00"
    assert figures("t02", "t02")["relation"] == "the same step"
    same = figures("t02", "t02")
    assert set(same["weights"]["changes"].values()) == {0.0}
    assert (same["accuracy"]["all"]["lost"], same["weights"]["overlaps"]) == (0, [])


# ---- features


def test_alignment_is_that_of_the_kernels_of_the_features_of_both_models(project: Path) -> None:
    import torch
    from PIL import Image

    import sdlora

    found = json.loads(run("t02", "t03", "--json"))["features"]
    models = [sdlora.load(f"artifacts/model/{step}", device="cpu") for step in ("t02", "t03")]

    def kernel(model: Any, names: list[Path]) -> np.ndarray:  # noqa: ANN401
        pixels = torch.stack([model.transform(Image.open(name)) for name in names])
        with torch.no_grad():
            hidden = model.module.forward_features(pixels)
            features = model.module.forward_head(hidden, pre_logits=True).double().numpy()
        centre = np.eye(len(names)) - 1 / len(names)
        return centre @ features @ features.T @ centre

    files: dict[str, list[Path]] = {}
    for task in ("t01", "t02"):
        for row in read_images(Path(f"artifacts/split/{task}/test/{task}.arrow")).to_pylist():
            path = project / "files" / row["id"].replace("/", "_")
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(row["image"])
            files.setdefault(task, []).append(path)

    def expected(names: list[Path]) -> float:
        k, other = (kernel(model, names) for model in models)
        return (k * other).sum() / np.sqrt((k * k).sum() * (other * other).sum())

    assert found["images"] == 4 * EACH
    assert found["all"] == pytest.approx(expected([*files["t01"], *files["t02"]]), abs=1e-4)
    assert [row["task"] for row in found["tasks"]] == ["t01", "t02"]
    for row in found["tasks"]:
        assert row["images"] == 2 * EACH
        assert row["alignment"] == pytest.approx(expected(files[row["task"]]), abs=1e-4)
    assert found["all"] < 0.9999


def test_the_backbone_is_compared_on_the_images_of_the_other_and_knows_no_class(project: Path) -> None:
    found = json.loads(run("t00", "t02", "--json"))
    assert found["features"]["images"] == 4 * EACH
    assert found["accuracy"] is None
    assert found["notes"] == ["t00: it knows no class, so answers are not compared"]
    assert "not compared: t00: it knows no class" in run("t00", "t02", "--no-features")


def test_without_features_neither_torch_nor_a_model_is_loaded(project: Path) -> None:
    program = """
import sys

from pipelines.cli.app import app
app(["audit", "diff", "t02", "t03", "--no-features"], standalone_mode=False)
print(sorted({"torch", "timm", "prefect", "dvc"} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment() | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_test_images_that_are_gone_leave_the_rest_of_the_figures(project: Path) -> None:
    Path("artifacts/split/t01/test/t01.arrow").unlink()
    found = json.loads(run("t02", "t03", "--json", "--html", "page.html"))
    assert found["accuracy"]["all"]["lost"] == 6
    assert found["features"]["images"] == 2 * EACH
    assert found["notes"] == ["t03: the test images of t01 are gone, so its features are not compared"]
    assert Path("page.html").read_text(encoding="utf-8").count("no picture") == 6


# ---- what is shown


def test_the_terminal_has_every_table_in_80_columns_without_colours(project: Path) -> None:
    text = run("t02", "t03")
    assert max(map(len, text.splitlines())) <= 80
    assert "\x1b" not in text
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "6 lost, 1 gained: no more than chance would do (McNemar, exact: p = 0.125)" in lines
    assert "c0 t01 6 100.0 (61–100) 16.7 (3–56) 5 0 0.250" in lines
    assert "c0 t01 5 c4 (t03) ×4, c2 (t02) ×1" in lines
    for title in ("Accuracy, %", "Calibration, %", "Features then", "Magnitudes", "Change of", "Overlap of"):
        assert any(line.startswith(title) for line in lines), title


def test_a_long_name_is_cut_and_no_number_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "a class whose name is as long as those of some benchmarks are, and then some"
    root = make_audited(tmp_path, {"t03": {f"t01/test/{name}/0.png": ("c3", 0.8)}}, names={0: name})
    monkeypatch.chdir(root)
    lines = run("t02", "t03", "--no-features").splitlines()
    (row,) = [line for line in lines if line.startswith("a class") and "100.0" in line]
    assert max(map(len, lines)) <= 80
    assert row.split("…")[1].split() == [
        "t01",
        "6",
        "100.0",
        "(61–100)",
        "83.3",
        "(44–97)",
        "1",
        "0",
        "1.000",
    ]


@pytest.mark.parametrize("command", ["diff", "show"])
def test_help_fits_one_screen(command: str) -> None:
    shown = CliRunner().invoke(app, ["audit", command, "--help"], env={"COLUMNS": "80"})
    assert shown.exit_code == 0
    assert len(shown.output.splitlines()) <= 24


def test_the_same_steps_give_the_same_bytes(project: Path) -> None:
    pages = []
    for _ in range(2):
        printed = run("t02", "t03", "--json", "--html", "page.html")
        pages.append((printed, Path("page.html").read_bytes()))
    assert pages[0] == pages[1]
    found = json.loads(pages[0][0])
    assert list(found) == sorted(found)


def test_the_page_shows_each_flipped_image_and_loads_nothing(project: Path) -> None:
    run("t02", "t03", "--no-features", "--html", "page.html")
    page = Path("page.html").read_text(encoding="utf-8")
    assert page.count('src="data:image/') == 7
    assert "://" not in page
    assert "<script" not in page
    assert "prefers-color-scheme: dark" in page
    assert "6 lost, 1 gained of 24 images" in page


def test_names_that_look_like_markup_are_shown_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hostile = '<script>x[bold]"&'
    root = make_audited(tmp_path, {"t03": {f"t01/test/{hostile}/0.png": ("c3", 0.8)}}, names={0: hostile})
    monkeypatch.chdir(root)
    text = run("t02", "t03", "--no-features", "--html", "page.html")
    page = Path("page.html").read_text(encoding="utf-8")
    assert "[bold]" in text
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_only_a_page_of_this_command_is_overwritten(project: Path) -> None:
    Path("notes.html").write_text("<p>mine</p>")
    assert fault("t02", "t03", "--no-features", "--html", "notes.html") == (
        "error: notes.html: it exists and is no page of `sdlora audit diff`; delete it or choose another name"
    )
    assert Path("notes.html").read_text() == "<p>mine</p>"
    assert "a folder; give the name of a file" in fault("t02", "t03", "--html", "artifacts")
    run("t01", "t02", "--no-features", "--html", "new/page.html")
    run("t02", "t03", "--no-features", "--html", "new/page.html")
    assert "t02 → t03" in Path("new/page.html").read_text(encoding="utf-8")
    assert [path.name for path in Path("new").iterdir()] == ["page.html"]


def test_steps_that_are_not_there_are_one_line(project: Path) -> None:
    assert fault("t02", "t09") == "error: there is no step 't09'; there are t00, t01, t02, t03"
    assert fault("artifacts/model/t09", "t02").startswith("error: artifacts/model/t09: no such folder; name")
    assert fault("artifacts", "t02").startswith("error: artifacts: no model folder (no step.json in it)")
    shutil.rmtree("artifacts/evaluation/t02")
    assert fault("t02", "t03").startswith("error: artifacts/evaluation/t02: it is missing, and there is no")


def test_model_folders_without_the_rest_say_what_could_not_be_compared(project: Path, tmp_path: Path) -> None:
    lone = tmp_path / "lone"
    for step in ("t00", "t01", "t02"):
        shutil.copytree(f"artifacts/model/{step}", lone / step)
    found = json.loads(run(str(lone / "t02"), "t03", "--json"))
    assert found["accuracy"] is None
    assert found["weights"]["changes"]
    assert [note.partition(": ")[2] or note for note in found["notes"]] == [
        "there is no evaluation beside it, so answers are not compared",
        "there is no test image of both, so features are not compared",
    ]


def test_blocks_and_targets_make_a_grid_with_gaps_where_a_block_lacks_a_target() -> None:
    grid = block_grid({"blocks.0.attn.q": 0.1, "blocks.0.mlp.fc1": 0.2, "blocks.11.attn.q": 0.3})
    assert grid["targets"] == ["q", "fc1"]
    assert grid["rows"] == [
        {"block": "0", "values": [0.1, 0.2]},
        {"block": "11", "values": [0.3, None]},
    ]


def test_where_there_is_no_room_for_all_pictures_every_class_gets_some() -> None:
    facts = [{"class": name, "n": index} for name in "aab" for index in range(4)]
    chosen = share_out(facts, 5)
    assert Counter(fact["class"] for fact in chosen) == {"a": 3, "b": 2}
    assert [facts.index(fact) for fact in chosen] == sorted(facts.index(fact) for fact in chosen)


# ---- a chain that was trained


@pytest.mark.slow
def test_a_finished_chain_is_compared_from_its_files_and_from_the_cache_alike(
    finished: tuple[Path, str], tmp_path: Path
) -> None:
    folder = tmp_path / "project"
    shutil.copytree(finished[0], folder)
    text = call_here(folder, "audit", "diff", "t01", "t02", "--html", "page.html")
    found = json.loads(call_here(folder, "audit", "diff", "t01", "t02", "--json"))

    assert max(map(len, text.splitlines())) <= 80
    assert "t02 continues t01: all 2 frozen files of t01 are the same, byte for byte" in text
    assert text.splitlines()[-1] == "page  page.html"
    for metrics, side in (("t01", "then"), ("t02", "now")):
        counted = read_json(folder / f"artifacts/evaluation/{metrics}/metrics.json")
        assert found["accuracy"]["tasks"][0][side]["right"] == counted["correct"][0]
    assert found["images"] == {"compared": 4, "then": 4, "now": 8, "other_picture": 0}
    assert 0 < found["features"]["all"] <= 1
    assert re.search(
        r"<h1>t01 → t02: \d lost, \d gained of 4 images</h1>", (folder / "page.html").read_text()
    )

    shutil.rmtree(folder / "artifacts")
    assert json.loads(call_here(folder, "audit", "diff", "t01", "t02", "--json")) == found
    assert not (folder / "artifacts").exists()
    assert not [name for name in os.listdir(tmp_path) if name != "project"]
