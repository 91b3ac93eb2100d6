"""Tasks of the kind `more`: images of known classes, with new ones among them or not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from pipelines.project.files import read_json
from pipelines.stages.evaluate import evaluate
from pipelines.stages.split import split
from pipelines.stages.start import start
from sdlora.arrivals import statistics_by_arrival
from sdlora.learner import Learner
from sdlora.loading import load
from sdlora.model_folder import read_model
from sdlora.tensors import read_tensors
from tests.support.commands import said_here
from tests.support.folders import contents
from tests.support.parameters import settings
from tests.support.pictures import paint
from tests.support.stage_project import backbone, run_step

TASKS = {
    "t01": ("classes", "first", ["a", "b"]),
    "t02": ("more", "second", ["c", "b"]),
    "t03": ("more", "third", ["a"]),
    "t04": ("classes", "fourth", ["d"]),
    "t05": ("more", "fifth", ["d", "a", "c", "b"]),
}


def make_project(root: Path, **changes: str) -> None:
    """Paint the pictures of all tasks and write params.yaml."""
    seed = 0
    lines = []
    for before, (task, (kind, source, names)) in zip(["t00", *TASKS], TASKS.items(), strict=False):
        lines.append(f"  {task}: {{after: {before}, kind: {kind}, source: {source}, classes: {names}}}")
        for name in names:
            for part, count in (("train", 5), ("test", 2)):
                paint(root / source / part / name, seed := seed + 1, count)
    text = settings(**changes).partition("tasks:\n")[0]
    (root / "params.yaml").write_text(text + "tasks:\n" + "\n".join(lines).replace("'", '"') + "\n")


def split_tasks() -> None:
    start(out=Path("split/t00"), evaluation=Path("evaluation/t00"), gate=Path("gate/t00"))
    for before, (task, (_, source, _)) in zip(["t00", *TASKS], TASKS.items(), strict=False):
        split(
            task,
            source=Path(source),
            before=Path(f"split/{before}"),
            out=Path(f"split/{task}"),
            images=Path(f"train/{task}"),
        )


def learn_tasks() -> None:
    backbone(out=Path("model/t00"))
    for before, task in zip(["t00", *TASKS], TASKS, strict=False):
        run_step(task, before)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chain of five tasks, three of which bring more images of known classes."""
    root = tmp_path_factory.mktemp("project")
    make_project(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        split_tasks()
        learn_tasks()
    return root


def test_a_class_keeps_the_label_and_the_task_of_its_arrival(project: Path) -> None:
    last = read_json(project / "split/t05/classes.json")

    assert [(entry["name"], entry["task"]) for entry in last["classes"]] == [
        *(("a", "t01"), ("b", "t01"), ("c", "t02"), ("d", "t04"))
    ]
    assert last["step_classes"] == {"t02": [1, 2], "t03": [0], "t05": [0, 1, 2, 3]}
    assert "step_classes" not in read_json(project / "split/t01/classes.json")


def test_a_record_says_what_such_a_step_saw_and_no_other_record_does(project: Path) -> None:
    own = {task: read_json(project / f"model/{task}/step.json") for task in TASKS}

    assert {task: record.get("step_classes") for task, record in own.items()} == {
        **dict.fromkeys(TASKS),
        "t02": {"t02": [1, 2]},
        "t03": {"t03": [0]},
        "t05": {"t05": [0, 1, 2, 3]},
    }
    assert [len(record["classes"]) for record in own.values()] == [2, 1, 0, 1, 0]


def test_a_step_holds_statistics_of_its_own_images_and_the_classifier_those_of_all(project: Path) -> None:
    learned, record = read_model(project / "model/t05", statistics=True)

    assert {task: taken.images.tolist() for task, taken in learned.statistics.items()} == {
        "t01": [5, 5], "t02": [5, 5], "t03": [5], "t04": [5], "t05": [5, 5, 5, 5],
    }  # fmt: skip
    merged = statistics_by_arrival(learned.statistics, learned.step_classes)
    assert {task: taken.images.tolist() for task, taken in merged.items()} == {
        "t01": [15, 15], "t02": [10], "t03": [], "t04": [10], "t05": [],
    }  # fmt: skip
    assert [len(rows.bias) for rows in learned.settled.values()] == [2, 1, 0, 1, 0]
    assert len(record["classes"]) == 4


def test_a_step_writes_none_of_what_earlier_steps_wrote(project: Path) -> None:
    for task in TASKS:
        files = read_json(project / f"model/{task}/step.json")["files"]
        assert {Path(name).stem for name in files} <= {task, "magnitudes", "classifier", "unknown"}


def test_the_model_has_one_output_for_each_class(project: Path) -> None:
    found = load(project / "model/t05", device="cpu")

    assert found.classes == ["a", "b", "c", "d"]
    assert found.module(torch.zeros(1, *found.transform.input_size)).shape == (1, 4)


def test_the_test_images_of_such_a_step_are_a_column_of_their_own(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    evaluate(
        "t03",
        model=Path("model/t03"),
        backbone=Path("model/t00"),
        split=Path("split/t03"),
        out=Path("evaluation/t03"),
    )
    found = read_json(project / "evaluation/t03/metrics.json")

    assert (found["tasks"], found["samples"]) == (["t01", "t02", "t03"], [4, 4, 2])


def test_a_learner_that_is_given_known_classes_leaves_the_bytes_of_the_stages(
    project: Path, tmp_path: Path
) -> None:
    record = read_json(project / "model/t01/step.json")
    learner = Learner.open(project / "model/t01", progress=False)
    assert record["parameters"] == learner.parameters
    for task, (_, source, names) in list(TASKS.items())[1:]:
        images = {
            name: [Image.open(path) for path in sorted((project / source / "train" / name).iterdir())]
            for name in names
        }
        learner.learn(images)
        assert set(learner.tasks[task]) == set(names)
    learner.save(tmp_path / "model")

    for task in TASKS:
        ours, theirs = contents(tmp_path / "model" / task), contents(project / "model" / task)
        assert ours.keys() == theirs.keys()
        assert {name for name in ours if ours[name] != theirs[name]} <= {"step.json"}
    assert learner.classes_.tolist() == ["a", "b", "c", "d"]


@pytest.mark.parametrize("head", ["aligned", "linear"])
def test_such_steps_go_with_a_head_that_goes_on_from_its_rows(
    head: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_project(tmp_path, head=head)
    monkeypatch.chdir(tmp_path)
    split_tasks()
    learn_tasks()
    learned, _ = read_model(tmp_path / "model/t05")
    trained = read_tensors(tmp_path / "model/t05/head/t05.safetensors")

    assert trained["weight"].shape == (4, 192)
    assert [len(rows.bias) for rows in learned.rows.values()] == [2, 1, 0, 1, 0]
    if head == "linear":
        used = torch.cat([rows.weight for rows in learned.rows.values()])
        assert torch.equal(used, trained["weight"])
        lone, _ = read_model(tmp_path / "model/t03")
        before, _ = read_model(tmp_path / "model/t02")
        assert torch.equal(lone.rows["t01"].weight, before.rows["t01"].weight)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (
            "kind: more, source: third", "kind: mor, source: third",
            "tasks.t03.kind: expected one of classes, more, found \"mor\"; did you mean more?",
        ),
        (
            "kind: more, source: third", "source: third",
            "tasks.t03.classes: \"a\" is already a class of t01; remove one, or write kind: more if these are more",
        ),
        (
            "method: sdlora ", "method: joint ",
            "tasks.t02.kind: found more, but joint learns all images at once",
        ),
    ],
)  # fmt: skip
def test_a_kind_that_cannot_be_is_one_line(old: str, new: str, says: str, tmp_path: Path) -> None:
    make_project(tmp_path, head="linear")
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    text = (tmp_path / "params.yaml").read_text()
    assert text.count(old) == 1
    (tmp_path / "params.yaml").write_text(text.replace(old, new))
    _, line = said_here(tmp_path, "run", status=2)

    assert says in line
    assert line.count("\n") == 1
