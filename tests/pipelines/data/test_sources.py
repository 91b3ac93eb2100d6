import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.data.class_folders import litter_of
from pipelines.data.division import divide
from pipelines.data.source_files import Found
from pipelines.data.sources import class_names, read_source, task_images
from pipelines.project.errors import InputError
from pipelines.project.settings import Data

OWN = Path("data/raw/own")
DATA = Data(duplicates="refuse", test_fraction=0.2, seed=0, validation=None, max_pixels=100)


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    OWN.mkdir(parents=True)


def touch(*files: str) -> None:
    """Files by their names alone: a source is listed without being read."""
    for file in files:
        (OWN / file).parent.mkdir(parents=True, exist_ok=True)
        (OWN / file).touch()


def write(name: str, text: str) -> None:
    touch(name)
    (OWN / name).write_text(text, encoding="utf-8")


def images(*names: str, manifest: str | None = None, data: Data = DATA) -> dict[str, list[str]]:
    """The files of a task's classes by part, relative to the source."""
    parts: dict[str, list[str]] = {}
    for found in task_images(OWN, names, manifest=manifest, data=data):
        assert found.part
        parts.setdefault(found.part, []).append(found.path.relative_to(OWN).as_posix())
    return parts


def refusal(*names: str, manifest: str | None = None, data: Data = DATA) -> str:
    with pytest.raises(InputError) as caught:
        task_images(OWN, names, manifest=manifest, data=data)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def many(name: str, number: int) -> list[Found]:
    return [Found(OWN / name / f"{i}.png", None, name, f"{i}.png") for i in range(number)]


def held_out(found: Sequence[Found], data: Data = DATA) -> set[tuple[str, str]]:
    return {(one.name, one.file) for one in divide(found, data).images if one.part == "test"}


# ---- folders


def test_a_divided_folder_says_the_part_of_every_image() -> None:
    touch(
        "train/b/2.png", "train/b/10.JPG", "train/a/1.png", "test/a/3.webp", "test/b/3.tiff", "train/c/x.txt"
    )

    assert images("b", "a") == {
        "train": ["train/b/2.png", "train/b/10.JPG", "train/a/1.png"],
        "test": ["test/b/3.tiff", "test/a/3.webp"],
    }
    assert class_names(OWN, manifest=None, shown="own") == ["a", "b", "c"]


@pytest.mark.parametrize("word", ["validation", "valid", "val", "dev"])
def test_a_folder_of_validation_images_is_read_only_if_validation_is_asked_for(word: str) -> None:
    touch("train/a/1.png", f"{word}/a/2.png", "test/a/3.png")

    parts = images("a", data=DATA.model_copy(update={"validation": 0.5}))
    assert parts == {"train": ["train/a/1.png"], "validation": [f"{word}/a/2.png"], "test": ["test/a/3.png"]}
    assert refusal("a") == (
        f"data/raw/own/{word}/a/2.png: class 'a' has 1 validation images, but data.validation is null;"
        " set it to a share in params.yaml, or remove them"
    )


def test_a_folder_of_class_folders_is_divided_class_by_class() -> None:
    touch(*(f"{name}/{i}.png" for name in ("a", "b") for i in range(10)))

    parts = images("b", "a")

    assert Counter(file[0] for file in parts["test"]) == {"a": 2, "b": 2}
    assert len(parts["train"]) == 16
    assert [file[0] for file in parts["train"]] == ["b"] * 8 + ["a"] * 8


def test_a_class_may_be_called_train() -> None:
    touch("train/1.png", "train/2.png", "car/1.png", "car/2.png")

    assert class_names(OWN, manifest=None, shown="own") == ["car", "train"]
    parts = images("train")
    assert sorted([*parts["train"], *parts["test"]]) == ["train/1.png", "train/2.png"]


def test_numbers_are_classes_in_the_order_of_numbers_and_names_may_be_of_any_script() -> None:
    names = ["2", "10", "c9", "c10", "Ünal", "Жук", "猫"]
    touch(*(f"{name}/{i}.png" for name in names for i in (1, 2)))

    assert class_names(OWN, manifest=None, shown="own") == names
    assert {file.split("/")[0] for file in images(*names)["train"]} == set(names)


def test_thousands_of_classes_are_listed_in_one_pass() -> None:
    for number in range(3000):
        (OWN / f"class {number}").mkdir()
        (OWN / f"class {number}" / "1.png").touch()
        (OWN / f"class {number}" / "2.png").touch()

    names = class_names(OWN, manifest=None, shown="own")
    assert names == [f"class {number}" for number in range(3000)]
    assert len(images(*names)["test"]) == 3000


@pytest.mark.parametrize(
    ("files", "fault"),
    [
        pytest.param(
            ["train/a/1.png"], "data/raw/own/test: the folder is missing beside train; put test", id="no-test"
        ),
        pytest.param(
            ["test/a/1.png"], "data/raw/own/train: the folder is missing beside test", id="no-train"
        ),
        pytest.param(
            ["a/1.png"],
            "data/raw/own/a/1.png: class 'a' has one image, and needs one to learn and one to test; add images",
            id="one-image",
        ),
        pytest.param(["a/.1.png"], "data/raw/own/a: the class is empty; put at least one", id="only-hidden"),
        pytest.param(["b/1.png"], "data/raw/own/a: the folder is missing; make it", id="no-class"),
        pytest.param(["a/1.png", "a/b/1.png"], "data/raw/own/a/b: a folder inside a class", id="nested"),
        pytest.param(["a/1.png", "a/x.gif.txt"], "data/raw/own/a/x.gif.txt: not an image by", id="text"),
    ],
)
def test_a_folder_that_cannot_be_used_says_why(files: list[str], fault: str) -> None:
    touch(*files)

    assert refusal("a").startswith(fault)


def test_the_other_faults_are_counted() -> None:
    touch("a/1.txt", "a/2.txt", "a/b/3.png")

    assert refusal("a").endswith("(and 2 more)")


def test_a_linked_class_folder_is_refused_because_dvc_would_not_look_into_it() -> None:
    touch("a/1.png", "a/2.png")
    (OWN / "b").symlink_to("a")
    write("list.csv", "path,label\nb/1.png,x\nb/2.png,x\n")

    assert refusal("b").startswith("data/raw/own/b: a link to a folder, in which DVC would not notice")
    assert refusal("x", manifest="list.csv").startswith("data/raw/own/b: a link to a folder")


def test_a_linked_part_is_refused_because_dvc_would_not_look_into_it() -> None:
    touch("test/ant/1.png")
    (OWN / "elsewhere/ant").mkdir(parents=True)
    (OWN / "elsewhere/ant/2.png").touch()
    (OWN / "train").symlink_to("elsewhere")

    assert refusal("ant").startswith(f"{OWN}/train: a link to a folder, in which DVC would not notice")


def test_a_name_with_its_accent_in_another_form_is_explained() -> None:
    touch("e\u0301/1.png", "e\u0301/2.png")

    assert "one whose name looks the same has its accents in another form" in refusal("\xe9")


@pytest.mark.parametrize(
    ("files", "fault"),
    [
        pytest.param([], "own: no class folders there; make one for each class", id="empty"),
        pytest.param(["digits/train/3/1.png"], "own/digits: a folder of folders, so own holds", id="above"),
        pytest.param(["test/a/1.png"], "own/train: the folder is missing beside test", id="test-alone"),
        pytest.param(
            ["metadata.csv"], "neither path nor file_name stands among the columns none", id="empty-csv"
        ),
    ],
)
def test_a_source_without_classes_says_what_it_lacks(files: list[str], fault: str) -> None:
    touch(*files)

    with pytest.raises(InputError, match=fault):
        class_names(OWN, manifest=None, shown="own")


@pytest.mark.parametrize(
    ("files", "fault"),
    [
        pytest.param(
            ["labels.csv", "images/1.png"],
            "own/labels.csv: a table that nobody reads, beside the folder images; give the table itself if it lists the"
            " images, else move it away",
            id="one-folder",
        ),
        pytest.param(["train.parquet"], "own/train.parquet: a table that nobody reads, beside no class", id="none"),
        pytest.param(["l.csv", "train/1.png", "test/1.png"], "own/l.csv: a table that nobody reads,", id="parts"),
        pytest.param(["train/1.png", "test/1.png"], "own: images in test and train without class folders", id="flat"),
        pytest.param(
            ["cat/1.png", "cat/more/1.png"], "own/cat/more: a folder inside a class; move its images up", id="stray"
        ),
    ],
)  # fmt: skip
def test_what_would_be_learned_as_something_else_is_refused(files: list[str], fault: str) -> None:
    touch(*files)

    with pytest.raises(InputError) as caught:
        class_names(OWN, manifest=None, shown="own")
    assert str(caught.value).startswith(fault)


def test_what_other_programs_leave_is_no_class_and_no_image_and_is_counted() -> None:
    touch("Thumbs.db", "__MACOSX/x", "cat/1.png", "cat/2.png", "cat/desktop.ini", "cat/@eaDir/1.png")
    touch("cat/.DS_Store", "cat/.thumbnails/1.png", "@eaDir/1.png", "other/Thumbs.db")

    assert class_names(OWN, manifest=None, shown="own") == ["cat", "other"]
    assert images("cat")["test"] == ["cat/2.png"] or images("cat")["test"] == ["cat/1.png"]
    assert litter_of(OWN, ["cat"]) == {
        "Thumbs.db": 1, "__MACOSX": 1, "@eaDir": 2, "desktop.ini": 1, ".DS_Store": 1, ".thumbnails": 1,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["a\u202fb.png", "\u0645\u06cc\u200c\u062e.png", "\u200d.png", "\ue000.png"])
def test_a_name_may_have_characters_that_show_nothing(name: str) -> None:
    touch(f"cat/{name}", "cat/1.png")
    write("list.csv", f"path,label,split\ncat/{name},x,train\ncat/1.png,x,test\n")

    assert f"cat/{name}" in [file for part in images("cat").values() for file in part]
    assert images("x", manifest="list.csv")["train"] == [f"cat/{name}"]


@pytest.mark.parametrize("name", ["a\nb.png", "a\u2028b.png", "a\x1bb.png", "a\udc80b.png"], ids=ascii)
def test_a_name_that_would_break_a_line_is_refused(name: str) -> None:
    touch(f"cat/{name}", "cat/1.png")

    assert refusal("cat").endswith("b.png' has a line end or a control character; rename the file")
    assert refusal("cat").isprintable()


def test_validation_images_without_tests_are_one_line_that_says_how_they_can_serve() -> None:
    touch("train/a/1.png", "train/b/1.png", "val/a/1.png", "val/b/1.png")

    assert refusal("a", "b") == (
        "data/raw/own/test: the folder is missing beside train and val; rename val to test to test on its images, or"
        " make test"
    )


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        pytest.param(
            "x.zip", "x.zip: an archive, which is not read; unpack it and give the folder", id="archive"
        ),
        pytest.param("x.png", "x.png: a file, not a folder; give the folder of the images", id="file"),
        pytest.param("x", "x: the folder is missing; put images there", id="nothing"),
    ],
)
def test_a_source_that_is_no_folder_is_called_what_it_is(name: str, fault: str) -> None:
    touch("x.zip", "x.png")

    with pytest.raises(InputError) as caught:
        class_names(OWN / name, manifest=None, shown=name)
    assert str(caught.value).startswith(fault)


# ---- the draw


@pytest.mark.parametrize(("number", "tests"), [(2, 1), (3, 1), (5, 1), (10, 2), (100, 20)])
def test_the_share_of_tests_is_rounded_at_least_one_and_never_all(number: int, tests: int) -> None:
    assert len(held_out(many("a", number))) == tests
    nearly_all = DATA.model_copy(update={"test_fraction": 0.999})
    assert len(held_out(many("a", number), nearly_all)) == number - 1


def test_a_class_more_and_another_order_change_no_draw() -> None:
    alone = held_out(many("a", 50))

    assert held_out(many("b", 9) + many("a", 50)[::-1]) > alone
    assert held_out(many("a", 50), DATA.model_copy(update={"seed": 1})) != alone


def test_an_image_more_moves_few_others() -> None:
    before, after = held_out(many("a", 50)), held_out(many("a", 51))

    assert len(before - after) <= 1


def test_the_draw_is_the_same_on_every_machine_and_forever() -> None:
    """Golden: another draw would move test images into training in every project that there is."""
    assert sorted(file for _, file in held_out(many("zebra", 20))) == ["15.png", "17.png", "18.png", "8.png"]


def test_validation_images_are_drawn_from_train_and_leave_the_tests_alone() -> None:
    found = many("a", 50)
    chosen = divide(found, DATA.model_copy(update={"validation": 0.25})).images

    assert Counter(one.part for one in chosen) == {"train": 30, "validation": 10, "test": 10}
    assert {(one.name, one.file) for one in chosen if one.part == "test"} == held_out(found)


def test_a_class_of_one_training_image_keeps_it() -> None:
    chosen = divide(many("a", 2), DATA.model_copy(update={"validation": 0.5})).images

    assert Counter(one.part for one in chosen) == {"train": 1, "test": 1}


# ---- manifests

LIST = [
    ("im/1.png", "b", "train"),
    ("im/2.png", "b", "test"),
    ("im/10.png", "3", "train"),
    ("x.png", "3", "test"),
]


def as_csv(path: Path, rows: Sequence[Sequence[object]], columns: Sequence[str]) -> None:
    lines = [",".join(columns), *(",".join(map(str, row)) for row in rows)]
    path.write_text("\ufeff" + "\r\n".join(lines) + "\r\n", encoding="utf-8")


def as_jsonl(path: Path, rows: Sequence[Sequence[object]], columns: Sequence[str]) -> None:
    path.write_text("".join(json.dumps(dict(zip(columns, row, strict=True))) + "\n\n" for row in rows))


def as_parquet(path: Path, rows: Sequence[Sequence[object]], columns: Sequence[str]) -> None:
    pq.write_table(pa.table(dict(zip(columns, map(list, zip(*rows, strict=True)), strict=True))), path)


WRITERS: dict[str, Callable[[Path, Sequence[Sequence[Any]], Sequence[str]], None]] = {
    "csv": as_csv,
    "jsonl": as_jsonl,
    "parquet": as_parquet,
}


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("column", ["path", "file_name"])
@pytest.mark.parametrize("name", ["list", "metadata"])
def test_a_manifest_says_path_label_and_split(kind: str, column: str, name: str) -> None:
    touch(*(file for file, _, _ in LIST))
    WRITERS[kind](OWN / f"{name}.{kind}", LIST, (column, "label", "split"))
    manifest = f"{name}.{kind}" if name == "list" else None  # a metadata file is found by itself

    assert class_names(OWN, manifest=manifest, shown="own") == ["3", "b"]
    assert images("b", "3", manifest=manifest) == {
        "train": ["im/1.png", "im/10.png"],
        "test": ["im/2.png", "x.png"],
    }
    assert images("3", manifest=manifest) == {"train": ["im/10.png"], "test": ["x.png"]}


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_whole_numbers_are_names_in_decimal_digits(kind: str) -> None:
    touch("1.png", "2.png")
    WRITERS[kind](
        OWN / f"list.{kind}", [("1.png", 7, "train"), ("2.png", 7, "test")], ("path", "label", "split")
    )

    assert class_names(OWN, manifest=f"list.{kind}", shown="own") == ["7"]


def test_a_manifest_without_splits_is_divided_by_the_draw_or_by_folders_named_like_parts() -> None:
    touch("1.png", "2.png", "train/1.png", "test/2.png")
    write("loose.csv", "path,label\n1.png,a\n2.png,a\n")
    write("placed.csv", "path,label\ntrain/1.png,a\ntest/2.png,a\n")

    assert {part: len(files) for part, files in images("a", manifest="loose.csv").items()} == {
        "train": 1,
        "test": 1,
    }
    assert images("a", manifest="placed.csv") == {"train": ["train/1.png"], "test": ["test/2.png"]}


def test_metadata_files_in_train_and_test_are_of_that_part() -> None:
    touch("train/1.png", "test/1.png")
    for part in ("train", "test"):
        write(f"{part}/metadata.csv", "file_name,label,text\n1.png,a,hello\n")

    assert class_names(OWN, manifest=None, shown="own") == ["a"]
    assert images("a") == {"train": ["train/1.png"], "test": ["test/1.png"]}


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        pytest.param("/etc/1.png,a,train", "line 4: the path '/etc/1.png' is absolute; write it rel", id="absolute"),
        pytest.param("../1.png,a,train", "line 4: the path '../1.png' leaves the folder; put", id="outside"),
        pytest.param("x/../../1.png,a,train", "line 4: the path 'x/../../1.png' leaves", id="outside-later"),
        pytest.param("C:\\1.png,a,train", "line 4: the path 'C:\\\\1.png' is absolute", id="a-drive"),
        pytest.param("x\\1.png,a,train", "line 4: the path 'x\\\\1.png' has backslashes; write /", id="backslash"),
        pytest.param("9.png,a,train", "line 4: there is no file 9.png; add it, or remove the line", id="missing"),
        pytest.param("x.txt,a,train", "line 4: x.txt: not an image by its name", id="no-image"),
        pytest.param("3.png,a,dunno", "line 4: the split is 'dunno'; write train, validation or", id="split"),
        pytest.param("3.png,a,", "line 4: the split is ''; write train", id="no-split"),
        pytest.param("3.png,,train", "line 4: the label '' is empty or has blanks", id="no-label"),
        pytest.param("3.png,a/b,train", "line 4: the label 'a/b' has a path separator; rename", id="a-path"),
        pytest.param(",a,train", "line 4: the path is ''; write the path of the image file", id="no-path"),
        pytest.param("./1.png,a,train", "line 4: 1.png stands in data/raw/own/list.csv: line 2 already", id="twice"),
        pytest.param("1.png,b,train", "line 4: 1.png stands in data/raw/own/list.csv: line 2 already, with another"
                     " label ('a', here 'b'); remove one of the two lines", id="two-labels"),
        pytest.param("1.png,a,test", "line 4: 1.png stands in data/raw/own/list.csv: line 2 already, in another part"
                     " (train, here test)", id="two-parts"),
        pytest.param("3.png,a", "line 4: 2 fields, the first line has 3; put text with a comma in", id="short"),
        pytest.param('3.png,"a,train', "line 4: not valid CSV (unexpected end of data); mend", id="open-quote"),
    ],
)  # fmt: skip
def test_a_bad_line_of_a_manifest_is_named(line: str, fault: str) -> None:
    touch("1.png", "2.png", "3.png", "x.txt")
    write("list.csv", f"path,label,split\n1.png,a,train\n2.png,a,test\n{line}\n")

    assert refusal("a", manifest="list.csv").startswith(f"data/raw/own/list.csv: {fault}")


def test_lines_of_classes_of_other_tasks_may_name_files_that_are_gone() -> None:
    touch("1.png", "2.png")
    write("list.csv", "path,label,split\n1.png,a,train\n2.png,a,test\nold.png,z,train\n/x.png,z,?\n")

    assert images("a", manifest="list.csv") == {"train": ["1.png"], "test": ["2.png"]}


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        pytest.param("path;label\n", "neither path nor file_name stands among the columns path;label (a manifest is"
                     " separated by commas); name one of them so", id="semicolons"),
        pytest.param("path,file_name,label\n", "both path and file_name stand among the columns path, file_name, label;"
                     " name one of them so", id="two-paths"),
        pytest.param("path,class\n", "no column label among path, class; add it, or move the file out", id="label"),
        pytest.param("path,label,label\n", "two columns label; remove one", id="twice"),
        pytest.param("path,label\n", "no row has the label 'a'; add its images, or correct", id="no-rows"),
    ],
)  # fmt: skip
def test_a_manifest_without_its_columns_is_refused(text: str, fault: str) -> None:
    write("list.csv", text)

    assert refusal("a", manifest="list.csv").startswith(f"data/raw/own/list.csv: {fault}")


@pytest.mark.parametrize(
    ("name", "data", "fault"),
    [
        pytest.param("list.csv", b"path,label\n\xe9.png,a\n", "byte 11 is not UTF-8", id="latin-1"),
        pytest.param("list.jsonl", b'{"path": \n', "line 1: not valid JSON (", id="json"),
        pytest.param("list.jsonl", b"[1]\n", "line 1: expected an object, found [1]; mend", id="json-list"),
        pytest.param("list.parquet", b"PAR1", "not a Parquet file (", id="parquet"),
    ],
)
def test_a_file_that_is_no_manifest_is_refused(name: str, data: bytes, fault: str) -> None:
    (OWN / name).write_bytes(data)

    assert refusal("a", manifest=name).startswith(f"data/raw/own/{name}: {fault}")


@pytest.mark.parametrize("label", [1.0, True, None], ids=str)
def test_a_label_that_is_no_name_is_refused(label: object) -> None:
    touch("1.png")
    WRITERS["parquet"](OWN / "list.parquet", [("1.png", label)], ("path", "label"))

    assert "row 1: the label is" in refusal("a", manifest="list.parquet")


def test_a_line_without_the_split_that_others_have_is_refused() -> None:
    touch("1.png", "2.png", "3.png")
    lines = [{"path": f"{i}.png", "label": "a", "split": part} for i, part in ((1, "train"), (2, "test"))]
    write("list.jsonl", "\n".join(map(json.dumps, [*lines, {"path": "3.png", "label": "a"}])))

    assert refusal("a", manifest="list.jsonl") == (
        "data/raw/own/list.jsonl: line 3: no split, which other lines have; write train, validation or test"
    )


def test_labels_that_are_no_names_are_the_first_thing_said_of_a_manifest() -> None:
    touch("1.png", "2.png")
    as_jsonl(OWN / "metadata.jsonl", [("1.png", True), ("2.png", False)], ("file_name", "label"))

    with pytest.raises(InputError) as caught:
        class_names(OWN, manifest=None, shown="own")
    assert str(caught.value) == (
        "data/raw/own/metadata.jsonl: line 1: the label is True; write text or a whole number (and 1 more)"
    )


def test_paths_that_begin_above_their_manifest_are_said_and_nothing_else() -> None:
    touch("train/0.png", "train/1.png")
    as_jsonl(
        OWN / "train/metadata.jsonl", [(f"train/{i}.png", "a") for i in range(2)], ("file_name", "label")
    )

    faults = [str(fault) for fault in read_source(OWN, ["a"], manifest=None).faults]
    assert faults == [
        f"data/raw/own/train/metadata.jsonl: line {2 * i + 1}: there is no file train/{i}.png; paths begin at the"
        f" manifest: write {i}.png"
        for i in range(2)
    ]


def test_tabs_get_the_hint_that_semicolons_get() -> None:
    write("list.csv", "file_name\tlabel\n")

    assert "(a manifest is separated by commas); name one of them so" in refusal("a", manifest="list.csv")
    assert refusal("a", manifest="list.csv").isprintable()


def test_a_manifest_that_is_no_file_is_refused_at_once() -> None:
    os.mkfifo(OWN / "list.csv")

    assert refusal("a", manifest="list.csv") == (
        "data/raw/own/list.csv: it is a pipe, not a file; correct the manifest, or the task"
    )


def test_two_manifests_that_would_be_found_are_refused() -> None:
    write("metadata.csv", "path,label\n")
    write("metadata.jsonl", "")

    with pytest.raises(
        InputError, match=r"own/metadata\.jsonl: a second manifest beside .*metadata\.csv; remove"
    ):
        read_source(OWN, ["a"], manifest=None)


def test_a_missing_manifest_is_named() -> None:
    assert refusal("a", manifest="list.csv").startswith(
        "data/raw/own/list.csv: the manifest is missing; put it there"
    )
