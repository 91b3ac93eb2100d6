"""Every figure of the report agrees with a small computation of its own from the files of the steps."""

from __future__ import annotations

import base64
import io
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file
from scipy.linalg import subspace_angles
from scipy.stats import binomtest

from pipelines.reports.drawing import COLD, HEAT, Heat, draw_heat
from pipelines.reports.figures import accuracy_heat, overlap_heat
from pipelines.reports.history import History, head_of, read_history, shown_steps
from pipelines.reports.prefect_artifacts import make_exhibits
from pipelines.reports.samples import FLIPS_ON_THE_PAGE, Album, flipped_images
from pipelines.reports.statistics import parameter_spans, version_spans
from pipelines.reports.weights import block_of, read_movement
from sdlora.change import read_update, relative_changes
from tests.support.reported_project import (
    CLASSES,
    NORMS,
    TARGETS,
    read_arrow,
    read_csv,
    run_report,
    sha256,
    write_project,
)

TASKS = list(CLASSES)
TASK_OF = [task for task, names in CLASSES.items() for _ in names]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with its report, to be looked at only."""
    folder = write_project(tmp_path_factory.mktemp("project"))
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_report(folder, monkeypatch)
    return folder


@pytest.fixture(scope="module")
def history(project: Path) -> History:
    """What the report of the project is made of."""
    return read_history(project / "artifacts", TASKS)


def answers(project: Path, step: str) -> list[dict[str, Any]]:
    """The predictions of one step, image by image."""
    return read_arrow(project / f"artifacts/evaluation/{step}/predictions.arrow").to_pylist()


def added(project: Path, step: str, target: str) -> np.ndarray:
    """ΔW of one step at a target, as a whole matrix."""
    model = project / f"artifacts/model/{step}"
    magnitudes = load_file(model / "magnitudes.safetensors")
    total = np.zeros(())
    for task, values in magnitudes.items():
        factors = load_file(project / f"artifacts/model/{task}/directions/{task}.safetensors")
        product = factors[f"{target}.up"].astype(float) @ factors[f"{target}.down"].astype(float)
        total = total + float(values[TARGETS.index(target)]) * product
    return total


def test_the_change_of_a_weight_is_that_of_whole_matrices(project: Path) -> None:
    found = {(row["step"], row["target"]): float(row["change"]) for row in read_csv(project, "changes.csv")}
    expected = {}
    for target in TARGETS:
        before = np.zeros(())
        for step in TASKS:
            now = added(project, step, target)
            expected[step, target] = np.linalg.norm(now - before) / NORMS[target]
            before = now
    assert found == pytest.approx(expected, abs=1e-6)


def test_the_change_of_a_block_is_that_of_its_weights_side_by_side(project: Path) -> None:
    found = {
        (row["step"], row["block"]): float(row["change"]) for row in read_csv(project, "changes_by_block.csv")
    }
    assert len(found) == 3 * 6
    pair = ["blocks.2.attn.q", "blocks.2.attn.v"]
    now, before = ([added(project, step, target) for target in pair] for step in ("t03", "t02"))
    moved = np.linalg.norm(np.concatenate(now) - np.concatenate(before))
    base = np.hypot(*(NORMS[target] for target in pair))
    assert found["t03", "blocks.2"] == pytest.approx(moved / base, abs=1e-6)


def test_the_map_of_changes_agrees_with_the_audits(project: Path, history: History) -> None:
    movement = read_movement(project / "artifacts", history)
    assert movement
    updates = [read_update(project / f"artifacts/model/{step}") for step in TASKS]
    changes = relative_changes(updates[2], updates[1], NORMS)
    np.testing.assert_allclose(movement.steps[2], [changes[target] for target in TARGETS], rtol=1e-9)
    total = [np.linalg.norm(added(project, "t03", target)) / NORMS[target] for target in TARGETS]
    np.testing.assert_allclose(movement.total, total, rtol=1e-6)


def test_overlaps_are_mean_squared_cosines_of_the_principal_angles(project: Path, history: History) -> None:
    factors = {
        task: load_file(project / f"artifacts/model/{task}/directions/{task}.safetensors") for task in TASKS
    }
    found = {(row["task"], row["other"]): row for row in read_csv(project, "overlap.csv")}
    for side, turned in (("columns", False), ("rows", True)):
        cosines = []
        for target in TARGETS:
            spaces = [factors[task][f"{target}.{'down' if turned else 'up'}"] for task in ("t01", "t02")]
            angles = subspace_angles(*(space.T if turned else space for space in spaces))
            cosines.append(np.mean(np.cos(angles) ** 2))
        assert float(found["t01", "t02"][side]) == pytest.approx(np.mean(cosines), abs=1e-6)
        assert float(found["t02", "t02"][side]) == pytest.approx(1)
    movement = read_movement(project / "artifacts", history)
    assert movement
    assert movement.chance_rows == pytest.approx((3 / 8 + 3 / 8 + 2 / 8) / 3)


def test_random_spaces_overlap_by_what_is_called_chance() -> None:
    rng = np.random.default_rng(0)
    pairs = [(rng.normal(size=(30, 3)), rng.normal(size=(30, 5))) for _ in range(400)]
    found = np.mean([np.mean(np.cos(subspace_angles(*pair)) ** 2) for pair in pairs])
    assert found == pytest.approx(5 / 30, rel=0.05)


def test_the_head_bias_is_counted_from_the_predictions(project: Path) -> None:
    rows = read_csv(project, "bias.csv")
    assert [(row["after"], row["task"]) for row in rows] == [
        (after, task) for i, after in enumerate(TASKS) for task in TASKS[: i + 1]
    ]
    for row in rows:
        found = answers(project, row["after"])
        named = [TASK_OF[answer["prediction"]] for answer in found].count(row["task"]) / len(found)
        there = [answer["task"] for answer in found].count(row["task"]) / len(found)
        assert float(row["predictions"]) == pytest.approx(named, abs=1e-6)
        assert float(row["images"]) == pytest.approx(there, abs=1e-6)
        assert float(row["difference"]) == pytest.approx(named - there, abs=2e-6)


def test_flips_are_counted_on_the_images_that_both_steps_saw(project: Path) -> None:
    rows = read_csv(project, "flips.csv")
    assert [row["step"] for row in rows] == ["t02", "t02", "t03", "t03"]
    before = {answer["id"]: answer for answer in answers(project, "t02")}
    lost = gained = 0
    for now in answers(project, "t03"):
        if now["id"] in before:
            was = before[now["id"]]["prediction"] == now["label"]
            lost += was and now["prediction"] != now["label"]
            gained += not was and now["prediction"] == now["label"]
    assert lost
    assert gained
    assert [int(row["images"]) for row in rows[2:]] == [lost, gained]
    assert {int(row["of"]) for row in rows[2:]} == {len(before)}
    assert float(rows[2]["p"]) == pytest.approx(binomtest(lost, lost + gained).pvalue, abs=1e-6)


def test_the_pictures_of_flips_are_the_surest_of_them(project: Path, history: History) -> None:
    before = {answer["id"]: answer for answer in answers(project, "t02")}
    lost = [
        now
        for now in answers(project, "t03")
        if now["id"] in before
        and before[now["id"]]["prediction"] == now["label"]
        and now["prediction"] != now["label"]
    ]
    expected = sorted(lost, key=lambda now: -now["confidence"])[:12]
    shown = flipped_images(Album(project / "artifacts", history), history)
    assert list(shown) == ["t03", "t02"]
    assert [picture["id"] for picture in shown["t03"]] == [now["id"] for now in expected]
    assert shown["t03"][0]["confidence_before"] == before[expected[0]["id"]]["confidence"]


def test_the_pictures_of_flips_end_where_the_page_has_enough(tmp_path: Path) -> None:
    names = {f"t{i:02d}": [f"{i}"] for i in range(1, 21)}
    folder = write_project(tmp_path, names, images=6, accuracy=0.5)
    history = read_history(folder / "artifacts", list(names))
    shown = flipped_images(Album(folder / "artifacts", history), history)
    counts = [len(pictures) for pictures in shown.values()]
    assert counts[0] == 12
    assert sum(counts) == FLIPS_ON_THE_PAGE
    assert counts[-1] == 0


def test_the_calibration_error_is_the_mean_gap_over_the_images(project: Path) -> None:
    errors = {row["step"]: float(row["calibration_error"]) for row in read_csv(project, "steps.csv")}
    found = answers(project, "t03")
    bins: dict[int, list[dict[str, Any]]] = {}
    for answer in found:
        bins.setdefault(int(np.ceil(15 * answer["confidence"])), []).append(answer)
    gap = 0.0
    for mine in bins.values():
        right = sum(answer["prediction"] == answer["label"] for answer in mine)
        gap += abs(right - sum(answer["confidence"] for answer in mine))
    assert errors["t03"] == pytest.approx(gap / len(found), abs=1e-6)
    rows = {round(15 * float(row["highest"])): row for row in read_csv(project, "reliability.csv")}
    assert {place: int(rows[place]["images"]) for place in bins} == {
        place: len(mine) for place, mine in bins.items()
    }
    assert sum(int(row["images"]) for row in rows.values()) == len(found)


def pixels(svg: str) -> np.ndarray:
    """The picture within a figure."""
    (data,) = re.findall(r'data:image/png;base64,\s*([A-Za-z0-9+/=\s]+)"', svg)
    return np.array(Image.open(io.BytesIO(base64.b64decode(data))))


def test_a_map_is_one_pixel_for_each_number(history: History) -> None:
    svg = draw_heat(accuracy_heat(history), alt="accuracy")
    found = pixels(svg)
    low = np.floor(10 * np.nanmin(history.accuracy)) / 10
    expected = np.nan_to_num(255 * (history.accuracy - low) / (1 - low))
    np.testing.assert_allclose(found[..., 3], expected, atol=0.51)
    assert (found[found[..., 3] > 0][:, :3] == HEAT).all()


def test_a_signed_map_has_a_colour_for_either_side() -> None:
    values = np.array([[-0.5, 0.0], [0.25, np.nan]])
    names = ["a", "b"]
    heat = Heat(values=values, rows=names, columns=names, row_label="", column_label="", low=-0.5, high=0.5)
    found = pixels(draw_heat(heat, alt="signed"))
    assert found[0, 0].tolist() == [*COLD, 255]
    assert found[1, 0].tolist() == [*HEAT, 128]
    assert found[0, 1, 3] == found[1, 1, 3] == 0


def test_a_pixel_is_the_mean_of_the_cells_that_are_known_where_there_are_many() -> None:
    values = np.tril(np.random.default_rng(0).random((500, 400)))
    values[np.triu_indices(500, 1, 400)] = np.nan
    names = [f"{place}" for place in range(500)]
    heat = Heat(
        values=values, rows=names, columns=names[:400], row_label="", column_label="", low=0.0, high=1.0
    )
    found = pixels(draw_heat(heat, alt="many"))
    assert found.shape[:2] == (250, 200)
    blocks = values.reshape(250, 2, 200, 2)
    for row, column in ((0, 0), (249, 199), (120, 60), (3, 100)):
        known = blocks[row, :, column][~np.isnan(blocks[row, :, column])]
        depth = known.mean() if known.size else 0
        assert found[row, column, 3] == pytest.approx(255 * depth, abs=0.51)


def test_all_steps_are_shown_or_the_last_ones_and_some_of_those_before() -> None:
    for count in (1, 40, 100, 101, 170, 171, 999, 1000):
        shown = shown_steps(count)
        assert shown == sorted({*shown})
        assert shown[0] == 0
        assert shown[-30:] == list(range(max(0, count - 30), count))[-30:]
        assert len(shown) == count if count <= 100 else 60 <= len(shown) <= 100
        gaps = {after - before for before, after in pairwise(shown[:-30])}
        assert len(gaps) <= 1


def test_an_overlap_of_nothing_has_no_colour(project: Path, history: History) -> None:
    movement = read_movement(project / "artifacts", history)
    assert movement
    values = np.where(np.eye(3, dtype=bool), np.nan, movement.columns)
    assert (np.diag(pixels(draw_heat(overlap_heat(movement, values), alt="overlap"))[..., 3]) == 0).all()


@pytest.mark.parametrize(
    ("target", "block"),
    [("blocks.11.attn.q", "blocks.11"), ("stages.1.blocks.2.mlp.fc1", "stages.1.blocks.2"), ("head", "head")],
)
def test_a_target_is_in_its_block(target: str, block: str) -> None:
    assert block_of(target) == block


def test_parameters_and_versions_name_the_steps_where_they_differ(history: History) -> None:
    parameters = {name: [tuple(span) for span in spans] for name, spans in parameter_spans(history)}
    assert parameters["training.epochs"] == [("t01", "8"), ("t02\N{EN DASH}t03", "4")]
    assert parameters["training.learning_rate"] == [("", "0.01")]
    versions = {name: [tuple(span) for span in spans] for name, spans in version_spans(history)}
    assert versions["torch"] == [("", "2.9.0")]
    assert versions["determinism"] == [("", "bitwise on one machine")]


def test_the_head_is_the_hash_of_the_last_verdict(project: Path, history: History) -> None:
    assert head_of(history) == sha256(project / "artifacts/gate/t03/verdict.json")
    page = (project / "artifacts/report/report.html").read_text(encoding="utf-8")
    assert page.count(head_of(history)) >= 3


def test_what_prefect_shows_stands_alone(project: Path, history: History) -> None:
    exhibits = make_exhibits(history, read_movement(project / "artifacts", history))
    assert all(re.fullmatch("[a-z0-9-]+", key) for key in exhibits)
    images = [data for text in exhibits.values() for data in re.findall(r"svg\+xml;base64,([^)]*)\)", text)]
    assert len(images) == 3 + 1 + 1 + 2 + 4
    for data in images:
        svg = base64.b64decode(data).decode()
        assert "var(--" not in svg
        assert 'xmlns="http://www.w3.org/2000/svg"' in svg
    assert f"| t03 | {100 * history.accuracy[2, 0]:.1f} |" in exhibits["report-accuracy"]
