from pathlib import Path

import pytest
from dvc.utils.serialize import modify_yaml

from pipelines.planning.tasks import add_task, plan, task_sizes
from pipelines.project.errors import InputError
from pipelines.project.params import Params
from pipelines.project.params_text import entry_lines, with_lines, with_task, with_value, without_fetch
from pipelines.project.settings import Task
from tests.support.repository import REPOSITORY
from tests.support.shards import png, write_parquet

SHIPPED = REPOSITORY / "params.yaml"


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The shipped params beside the folders of ten digits."""
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_bytes(SHIPPED.read_bytes())
    make_classes("data/raw/digits", *map(str, range(10)))
    return tmp_path


def make_classes(source: str, *names: str) -> None:
    for name in names:
        Path(source, "train", name).mkdir(parents=True)


def text() -> str:
    return Path("params.yaml").read_bytes().decode()


def write(content: str) -> None:
    Path("params.yaml").write_bytes(content.encode())


def classes() -> dict[str, tuple[str, ...]]:
    return {key: task.classes for key, task in Params.load().tasks.items()}


def head_of(content: str) -> str:
    return content[: content.index("tasks:\n")]


def test_the_shipped_tasks_are_those_of_plan() -> None:
    before = text()

    plan("data/raw/digits", tasks=5)

    assert text() == before


def test_a_table_beside_class_folders_is_said_to_be_read_by_nobody() -> None:
    make_classes("data/raw/own", "cat", "dog")
    Path("data/raw/own/labels.csv").touch()
    line = (
        "warning: data/raw/own/labels.csv: a table that nobody reads, because the folders say the classes; give the"
        " table itself if it should"
    )

    assert add_task("data/raw/own")[-1] == line
    assert plan("data/raw/own", tasks=2, force=True)[-1] == line


@pytest.mark.parametrize("pattern", ["t*.parquet", "*.parquet", "[st]*.parquet"])
def test_shards_are_a_source_by_their_folder_or_by_a_pattern_and_a_url_is_pinned_first(pattern: str) -> None:
    write_parquet(Path("data/raw/own/train.parquet"), [(png(1), "cat"), (png(2), "dog")])

    lines = add_task(f"data/raw/own/{pattern}")
    assert (
        lines[1]
        == f't06: {{after: t05, source: data/raw/own, manifest: "{pattern}", classes: ["cat", "dog"]}}'
    )
    assert len(lines) == 2
    assert Params.load().tasks["t06"].manifest == pattern
    assert plan("data/raw/own", tasks=1, force=True)[-1] == (
        't01: {after: t00, source: data/raw/own, classes: ["cat", "dog"]}'
    )
    with pytest.raises(InputError) as caught:
        add_task(Path("s3://bucket/own"))
    assert str(caught.value) == (
        "s3://bucket/own: a URL; `sdlora pin URL data/NAME` reads it and notes what was there, then give data/NAME"
    )


def test_planning_changes_no_byte_outside_the_block() -> None:
    write(text() + "# the end\n")

    lines = plan("data/raw/digits", classes_per_task=5, seed=0)

    new = "  t01: {after: t00, source: data/raw/digits, classes: ['2', '8', '4', '9', '1']}\n"
    new += "  t02: {after: t01, source: data/raw/digits, classes: ['6', '7', '3', '0', '5']}\n"
    assert text() == head_of(text()) + "tasks:\n" + new + "# the end\n"
    assert head_of(text()) == head_of(SHIPPED.read_text())
    assert lines[0] == "params.yaml: 10 classes of data/raw/digits in 2 tasks, in the order of seed 0"


def test_a_block_in_the_middle_is_replaced_where_it_stands() -> None:
    before = text()
    head = head_of(before)
    seed, rest = head.split("\nfetch:", 1)
    write(seed + "\n" + before[len(head) :] + "\n# data sets\nfetch:" + rest)

    plan("data/raw/digits", tasks=1)

    assert text().startswith(seed + "\ntasks:\n  t01: {after: t00,")
    assert text().endswith("]}\n\n# data sets\nfetch:" + rest)


@pytest.mark.parametrize(
    "block",
    [
        pytest.param("", id="absent"),
        pytest.param("tasks:\n", id="null"),
        pytest.param("tasks:   # none yet\n\n# the end\n", id="null-with-comments"),
        pytest.param("tasks: {}\n", id="empty"),
        pytest.param("tasks: {1: {after: x}}", id="broken"),
        pytest.param('tasks:\n    t01:\n        classes: ["1"]\n        after: t00\n', id="block-style"),
    ],
)
def test_whatever_block_there_is_can_be_planned_anew(block: str) -> None:
    write(head_of(text()) + block)

    plan("data/raw/digits", tasks=2)

    assert list(classes()) == ["t01", "t02"]
    assert text().startswith(head_of(SHIPPED.read_text()))
    assert ("# the end" in text()) == ("# the end" in block)


def test_classes_that_do_not_divide_are_said_and_the_first_tasks_are_larger() -> None:
    lines = plan("data/raw/digits", tasks=3)

    assert [len(names) for names in classes().values()] == [4, 3, 3]
    assert lines[1] == "10 classes do not divide into 3 equal tasks: the first 1 has 4, the others 3"


@pytest.mark.parametrize(
    ("count", "per_task", "sizes"),
    [
        (3, None, [4, 4, 3]),
        (11, None, [1] * 11),
        (None, 4, [4, 4, 3]),
        (None, 11, [11]),
        (None, 5, [4, 4, 3]),
    ],
)
def test_sizes_are_as_even_as_possible(count: int | None, per_task: int | None, sizes: list[int]) -> None:
    assert task_sizes(11, tasks=count, classes_per_task=per_task) == sizes


def test_plan_and_add_task_name_classes_in_natural_order_of_folders() -> None:
    make_classes("data/raw/own", "c10", "c9", ".hidden")
    Path("data/raw/own/train/readme.txt").write_text("x")

    add_task("data/raw/own")

    assert classes()["t06"] == ("c9", "c10")


def test_a_block_with_a_computed_step_is_replaced_only_by_force(project: Path) -> None:
    (project / "artifacts/model/t02").mkdir(parents=True)
    before = text()

    with pytest.raises(
        InputError, match=r"params.yaml: tasks: t02 already computed .* or replace them all with --force"
    ):
        plan("data/raw/digits", tasks=2)
    assert text() == before

    plan("data/raw/digits", tasks=2, force=True)
    assert list(classes()) == ["t01", "t02"]


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        pytest.param({}, "give either the number of tasks or the classes per task", id="neither"),
        pytest.param({"tasks": 2, "classes_per_task": 5}, "give either the number", id="both"),
        pytest.param({"tasks": 0}, "0 tasks for 10 classes; give a number from 1 to 10", id="no-task"),
        pytest.param({"tasks": 11}, "11 tasks for 10 classes; give a number from 1 to 10", id="too-many"),
        pytest.param({"classes_per_task": 11}, "11 classes per task for 10 classes", id="too-large"),
        pytest.param({"tasks": 2, "seed": -1}, "the seed is -1; give a number from 0", id="seed"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(settings: dict[str, int], fault: str) -> None:
    with pytest.raises(InputError, match=f"plan: {fault}"):
        plan("data/raw/digits", **settings)


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        pytest.param("data/raw/own", "data/raw/own: the folder is missing; put images there", id="own"),
        pytest.param("data/raw/glyphs100", "the folder is missing; run `sdlora fetch glyphs100", id="known"),
        pytest.param(
            "data/raw", "data/raw/digits: a folder of folders, so data/raw holds neither", id="of-sources"
        ),
        pytest.param("..", r"\.\.: not a folder inside the project; copy or link", id="outside"),
        pytest.param("/usr/share", "/usr/share: not a folder inside the project", id="absolute-outside"),
        pytest.param(".", r"\.: not a folder inside the project", id="the-project-itself"),
    ],
)
def test_a_source_that_cannot_be_used_is_refused(source: str, fault: str) -> None:
    with pytest.raises(InputError, match=fault):
        add_task(source)
    with pytest.raises(InputError, match=fault):
        plan(source, tasks=2)
    assert text() == SHIPPED.read_text()


def test_a_source_without_classes_is_refused(project: Path) -> None:
    (project / "data/raw/own/train").mkdir(parents=True)

    with pytest.raises(
        InputError, match="data/raw/own/train: no class folders there; make one for each class"
    ):
        add_task("data/raw/own")


def test_adding_a_task_appends_one_line_and_changes_no_other_byte() -> None:
    make_classes("data/raw/own", "zebra", "grand piano", 'the "no"')
    before = text()

    lines = add_task("data/raw/own")

    line = r't06: {after: t05, source: data/raw/own, classes: ["grand piano", "the \"no\"", "zebra"]}'
    written = 't06: {after: t05, source: data/raw/own, classes: [grand piano, the "no", zebra]}'
    assert text() == before + f"  {written}\n"
    assert lines == ["params.yaml: added t06, 3 classes", line]
    assert classes()["t06"] == ("grand piano", 'the "no"', "zebra")


def test_an_absolute_source_inside_the_project_becomes_relative(project: Path) -> None:
    make_classes("data/raw/own", "zebra")

    add_task(project / "data/raw/own/")

    assert Params.load().tasks["t06"].source == "data/raw/own"


def test_a_manifest_stands_for_its_folder_and_is_named() -> None:
    Path("data/raw/own").mkdir()
    Path("data/raw/own/my list.csv").write_text("path,label\n1.png,zebra\n2.png,c10\n3.png,c9\n")

    lines = add_task("data/raw/own/my list.csv")

    line = 't06: {after: t05, source: data/raw/own, manifest: "my list.csv", classes: ["c9", "c10", "zebra"]}'
    assert lines[1] == line
    task = Params.load().tasks["t06"]
    assert (task.source, task.manifest) == ("data/raw/own", "my list.csv")


def test_a_plan_of_a_manifest_names_it_in_every_task() -> None:
    Path("data/raw/own").mkdir()
    Path("data/raw/own/list.csv").write_text("path,label\n1.png,a\n2.png,b\n")

    plan("data/raw/own/list.csv", tasks=2)

    assert [task.manifest for task in Params.load().tasks.values()] == ["list.csv", "list.csv"]


def test_a_metadata_file_is_found_and_not_named() -> None:
    Path("data/raw/own").mkdir()
    Path("data/raw/own/metadata.csv").write_text("file_name,label\n1.png,zebra\n")

    assert add_task("data/raw/own")[1] == 't06: {after: t05, source: data/raw/own, classes: ["zebra"]}'


def test_the_classes_of_an_undivided_folder_are_its_folders() -> None:
    for name in ("c10", "c9"):
        Path("data/raw/own", name).mkdir(parents=True)

    add_task("data/raw/own")

    assert classes()["t06"] == ("c9", "c10")


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        pytest.param(
            "data/raw/own/list.csv", "list.csv: the manifest is missing; put it there", id="missing"
        ),
        pytest.param("list.csv", "list.csv: not a folder inside the project|not a folder", id="at-the-top"),
        pytest.param("../x/list.csv", "not a folder inside the project", id="outside"),
    ],
)
def test_a_manifest_that_cannot_be_used_is_refused(source: str, fault: str) -> None:
    Path("data/raw/own").mkdir()

    with pytest.raises(InputError, match=fault):
        add_task(source)
    assert text() == SHIPPED.read_text()


def test_given_classes_are_added_in_their_order_and_the_others_left() -> None:
    make_classes("data/raw/own", "a", "b", "c")

    add_task("data/raw/own", classes=["c", "a"])
    add_task("data/raw/own")

    assert list(classes().items())[5:] == [("t06", ("c", "a")), ("t07", ("b",))]


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        pytest.param(None, "all 10 classes are in params.yaml already; nothing to add", id="none"),
        pytest.param(
            ["3"],
            "class '3' is already in t03 of params.yaml; leave it out, or add --kind more if these are more "
            "images of it",
            id="known",
        ),
        pytest.param(["x"], "data/raw/digits: there is no class 'x'; classes there are 0, 1, 2", id="absent"),
    ],
)
def test_a_task_without_new_classes_is_refused(given: list[str] | None, fault: str) -> None:
    with pytest.raises(InputError, match=fault):
        add_task("data/raw/digits", classes=given)
    assert text() == SHIPPED.read_text()


@pytest.mark.parametrize("block", ["", "tasks:\n", "tasks: {}\n"], ids=["absent", "null", "empty"])
def test_the_first_task_can_be_added(block: str) -> None:
    write(head_of(text()) + block)
    make_classes("data/raw/own", "zebra")

    add_task("data/raw/own")

    assert Params.load().tasks["t01"].after == "t00"


LINE = '{after: t00, source: data/raw/digits, classes: ["3"]}'


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        pytest.param(
            f"tasks:\n    t01: {LINE}  # why\n\n# the end\n",
            f"tasks:\n    t01: {LINE}  # why\n    t02: NEW\n\n# the end\n",
            id="with-comments-after",
        ),
        pytest.param(f"tasks:\n  t01: {LINE}", f"tasks:\n  t01: {LINE}\n  t02: NEW\n", id="no-line-end"),
        pytest.param(f"tasks: {{t01: {LINE}}}\n", f"tasks: {{t01: {LINE}, t02: NEW}}\n", id="flow-style"),
        pytest.param(
            "tasks:\n  t01:\n    after: t00\n    source: data/own\n    classes:\n    - '3'\n",
            "tasks:\n  t01:\n    after: t00\n    source: data/own\n    classes:\n    - '3'\n  t02: NEW\n",
            id="block-style",
        ),
    ],
)
def test_a_block_of_any_style_gets_its_next_line(block: str, expected: str) -> None:
    head = head_of(text())
    write(head + block)
    make_classes("data/raw/own", "zebra")

    add_task("data/raw/own")

    name = '"zebra"' if "tasks: {" in block else "zebra"
    new = f"{{after: t01, source: data/raw/own, classes: [{name}]}}"
    assert text() == head + expected.replace("t02: NEW", f"t02: {new}")


def test_windows_line_ends_stay() -> None:
    write(text().replace("\n", "\r\n"))
    make_classes("data/raw/own", "zebra")

    add_task("data/raw/own")

    assert text().count("\n") == text().count("\r\n")
    assert list(classes())[-1] == "t06"


def test_a_gap_in_the_numbers_is_not_filled() -> None:
    write(head_of(text()) + f"tasks:\n  t01: {LINE}\n  t04: {LINE.replace('t00', 't01').replace('3', '4')}\n")
    make_classes("data/raw/own", "zebra")

    add_task("data/raw/own")

    assert list(classes()) == ["t01", "t04", "t05"]


def test_an_edit_that_would_make_the_file_invalid_leaves_it_alone() -> None:
    make_classes("data/raw/own", " zebra")
    before = text()

    with pytest.raises(
        InputError, match=r"params.yaml \(not changed\): tasks.t06.classes\[0\]: .* blanks at an end"
    ):
        add_task("data/raw/own")

    assert text() == before
    assert {path.name for path in Path().iterdir()} == {"params.yaml", "data"}


def test_nothing_is_added_to_a_file_that_is_broken() -> None:
    write(text().replace("epochs: 8", "epochs: ten"))
    make_classes("data/raw/own", "zebra")

    with pytest.raises(InputError, match=r"params.yaml: training.epochs: expected a whole number"):
        add_task("data/raw/own")


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        (
            "tasks:\n  t01: {after: t00, source: a/b, classes: [x]}  # first\n"
            "  t02: {after: t01, source: a/b, classes: [y]}\n",
            "tasks:\n  t01: {after: t00, source: c/d, classes: [x]}  # first\n"
            "  t02: {after: t01, source: a/b, classes: [y]}\n",
        ),
        (
            "tasks:\n  t01:\n    after: t00\n    source: a/b\n    classes: [x]\n# end\n",
            "tasks:\n  t01: {after: t00, source: c/d, classes: [x]}\n# end\n",
        ),
        (
            "tasks: {t01: {after: t00, source: a/b, classes: [x]}, t02: {after: t01, source: a/b, classes: [y]}}\n",
            'tasks: {t01: {after: t00, source: c/d, classes: ["x"]}, '
            "t02: {after: t01, source: a/b, classes: [y]}}\n",
        ),
    ],
    ids=["lines", "block", "flow"],
)
def test_a_task_is_replaced_where_it_stands(block: str, expected: str) -> None:
    task = Task(after="t00", source="c/d", classes=("x",))
    assert with_task("seed: 1\n" + block, "t01", task) == "seed: 1\n" + expected


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        ("fetch:\n  digits: {seed: 0}  # share\n\ndata: 1\n", "fetch: {}\n\ndata: 1\n"),
        ("fetch: {digits: {seed: 0}}\ndata: 1\n", "fetch: {}\ndata: 1\n"),
        (
            "fetch:\n  mnist: {}\n  digits:\n    seed: 0\n  imagenet-r: {split: coda-prompt}\ndata: 1\n",
            "fetch:\n  mnist: {}\n  imagenet-r: {split: coda-prompt}\ndata: 1\n",
        ),
    ],
    ids=["lines", "flow", "among-others"],
)
def test_a_data_set_is_taken_out_of_fetch(block: str, expected: str) -> None:
    assert without_fetch("# top\n" + block, ["digits"]) == "# top\n" + expected


def test_dvc_would_write_what_is_written(project: Path) -> None:
    names = ["12:30", "? q", "no", "007", "a, b", "#a", "نمی\u200cدانم"]
    make_classes("data/raw/own", *names)
    make_classes("data/raw/long", *(f"a class of a long name {number}" for number in range(40)))
    add_task("data/raw/own")
    add_task("data/raw/long")
    write(with_value(with_value(text(), ("adapter", "targets"), ["q", "k"]), ("gate", "fall"), 0.05))
    write(with_value(text(), ("adapter", "targets"), None))
    approval = {"by": "A. B: C", "why": "why not?", "evaluation": "0f" * 32, "limits": ["fall"]}
    write(with_lines(text(), "approvals", entry_lines("t01", approval)))
    before = text()
    with modify_yaml("params.yaml"):
        pass
    assert text() == before
    assert sorted(classes()["t06"]) == sorted(names)
    assert len(classes()["t07"]) == 40


def test_more_images_of_known_classes_are_a_task_of_their_own_kind() -> None:
    make_classes("data/raw/late", "3", "zebra")

    lines = add_task("data/raw/late", kind="more")

    assert lines == [
        "params.yaml: added t06, 2 classes, 1 of them known",
        't06: {after: t05, kind: more, source: data/raw/late, classes: ["3", "zebra"]}',
    ]
    assert Params.load().tasks["t06"].kind == "more"
    with pytest.raises(InputError, match=r"all 2 classes are in params\.yaml already; nothing to add$"):
        add_task("data/raw/late", kind="more")


def test_known_classes_that_a_task_leaves_out_are_named_where_they_come_from_elsewhere() -> None:
    make_classes("data/raw/late", "3", "zebra")
    make_classes("data/raw/digits", "ten")

    assert add_task("data/raw/late") == [
        "params.yaml: added t06, 1 class",
        't06: {after: t05, source: data/raw/late, classes: ["zebra"]}',
        "left out as known: 3; `sdlora add-task data/raw/late --kind more` learns these images of them too",
    ]
    assert len(add_task("data/raw/digits")) == 2


def test_a_task_of_the_usual_kind_is_written_without_one() -> None:
    make_classes("data/raw/late", "3", "zebra")

    add_task("data/raw/late")

    assert "kind" not in text()
