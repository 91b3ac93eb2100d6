import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from pipelines.data.packed import read_images
from pipelines.project.errors import InputError
from pipelines.project.files import read_json, sha256_of
from pipelines.stages.split import split
from pipelines.stages.start import start
from tests.support.commands import call, call_here
from tests.support.folders import write_project
from tests.support.repository import REPOSITORY
from tests.support.shards import write_parquet, write_tar

SHIPPED = REPOSITORY / "params.yaml"
SOURCE = Path("data/raw/own")


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two tasks of two classes; every class has two train images and one test image, all different."""
    monkeypatch.chdir(tmp_path)
    text = SHIPPED.read_text()
    Path("params.yaml").write_text(
        text[: text.index("tasks:\n")]
        + "tasks:\n"
        + "  t01: {after: t00, source: data/raw/own, classes: [cat, ant]}\n"
        + "  t02: {after: t01, source: data/raw/own, classes: [dog, bee]}\n"
    )
    shade = iter(range(0, 250, 2))
    for name in ("ant", "bee", "cat", "dog"):
        for file in (f"train/{name}/10.png", f"train/{name}/9.png", f"test/{name}/1.png"):
            paint(SOURCE / file, next(shade))
    start(out=Path("split/t00"), evaluation=Path("evaluation/t00"), gate=Path("gate/t00"))
    return tmp_path


def paint(path: Path, shade: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (3, 2), shade).save(path)


def copy(source: str, target: str) -> None:
    """The same picture as another file, in another encoding where the names' endings differ."""
    (SOURCE / target).parent.mkdir(parents=True, exist_ok=True)
    with Image.open(SOURCE / source) as image:
        image.save(SOURCE / target)


def choose(old: str, new: str) -> None:
    path = Path("params.yaml")
    text = path.read_text()
    assert text.count(old) == 1, old
    path.write_text(text.replace(old, new))


def allow_duplicates() -> None:
    choose("duplicates: refuse", "duplicates: allow")


def run(task: str, *, root: str = "split") -> list[dict[str, str | int | float]]:
    before = {"t01": "t00", "t02": "t01"}[task]
    return split(
        task,
        source=SOURCE,
        before=Path(root, before),
        out=Path(root, task),
        images=Path(root, "train", task),
    ).rows


def refusal(task: str) -> str:
    with pytest.raises(InputError) as caught:
        run(task)
    assert not Path("split", task).exists()
    assert not Path("split/train", task).exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def tree(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): sha256_of(p) for p in folder.rglob("*") if p.is_file()}


def test_the_start_is_an_empty_class_map() -> None:
    assert set(tree(Path("split/t00"))) == {"classes.json", "split.json"}
    assert read_json(Path("split/t00/classes.json")) == {"classes": [], "tasks": []}
    assert read_json(Path("split/t00/split.json")) == {"task": "t00"}


def test_a_task_is_packed_in_the_order_of_its_classes_and_of_natural_names() -> None:
    summary = run("t01")

    train = read_images(Path("split/train/t01/train.arrow"))
    ids = ["t01/train/cat/9.png", "t01/train/cat/10.png", "t01/train/ant/9.png", "t01/train/ant/10.png"]
    assert train["id"].to_pylist() == ids
    assert train["label"].to_pylist() == [0, 0, 1, 1]
    assert train["image"][0].as_py() == (SOURCE / "train/cat/9.png").read_bytes()
    assert train["sha256"][0].as_py() == sha256_of(SOURCE / "train/cat/9.png")
    assert read_images(Path("split/t01/test/t01.arrow"))["id"].to_pylist() == [
        "t01/test/cat/1.png",
        "t01/test/ant/1.png",
    ]
    assert summary == [{"class": "cat", "train": 2, "test": 1}, {"class": "ant", "train": 2, "test": 1}]


def test_a_later_task_holds_its_own_files_and_all_classes_and_names_the_split_before() -> None:
    run("t01")
    run("t02")

    found, record = tree(Path("split/t02")), read_json(Path("split/t02/split.json"))
    assert set(found) == {"train.json", "classes.json", "split.json", "test/t02.arrow", "samples/t02.arrow"}
    assert (record["after"], record["previous"]) == ("t01", sha256_of(Path("split/t01/split.json")))
    assert record["files"] == {name: digest for name, digest in found.items() if name != "split.json"}
    assert read_json(Path("split/t02/classes.json")) == {
        "classes": [
            {"label": 0, "name": "cat", "task": "t01"},
            {"label": 1, "name": "ant", "task": "t01"},
            {"label": 2, "name": "dog", "task": "t02"},
            {"label": 3, "name": "bee", "task": "t02"},
        ],
        "tasks": ["t01", "t02"],
    }
    assert read_images(Path("split/train/t02/train.arrow"))["label"].to_pylist() == [2, 2, 3, 3]


def test_samples_are_all_images_of_the_task_without_their_bytes() -> None:
    run("t01")

    samples = read_images(Path("split/t01/samples/t01.arrow"))
    assert samples.schema.names == ["id", "split", "label", "sha256", "pixels", "perceptual"]
    assert samples["split"].to_pylist() == ["train"] * 4 + ["test"] * 2
    facts = read_json(Path("split/t01/split.json"))
    assert len(facts.pop("digest")) == 64
    assert facts.pop("files").keys() == {"classes.json", "train.json", "samples/t01.arrow", "test/t01.arrow"}
    assert facts == {
        "format": 2,
        "previous": sha256_of(Path("split/t00/split.json")),
        "task": "t01",
        "after": "t00",
        "counts": {"ant": {"train": 2, "test": 1}, "cat": {"train": 2, "test": 1}},
        "duplicates": 0,
        "near_duplicates": 0,
        "left_out": 0,
    }


def test_the_same_images_give_the_same_bytes_in_whatever_order_the_disk_lists_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run("t01")
    run("t02")
    listed = os.listdir
    generator = random.Random(0)

    def shuffled(path: str) -> list[str]:
        names = sorted(listed(path))
        generator.shuffle(names)
        return names

    def iterdir(folder: Path) -> Iterator[Path]:
        return (folder / name for name in shuffled(str(folder)))

    monkeypatch.setattr(Path, "iterdir", iterdir)
    start(out=Path("again/t00"), evaluation=Path("evaluation/t00"), gate=Path("gate/t00"))
    run("t01", root="again")
    run("t02", root="again")

    assert tree(Path("again")) == tree(Path("split"))


def test_a_changed_test_image_changes_the_tests_and_not_the_train_file() -> None:
    run("t01")
    before = tree(Path("split/t01"))
    paint(SOURCE / "test/cat/1.png", 251)

    run("t01")

    after = tree(Path("split/t01"))
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {"test/t01.arrow", "samples/t01.arrow", "split.json"}


def test_classes_of_other_tasks_and_hidden_files_are_left_alone() -> None:
    (SOURCE / "train/cat/.DS_Store").write_bytes(b"x")
    (SOURCE / "train/dog/broken.png").write_bytes(b"x")

    run("t01")

    assert len(read_images(Path("split/train/t01/train.arrow"))) == 4


def test_a_class_of_an_earlier_task_is_refused() -> None:
    run("t01")
    classes = read_json(Path("split/t01/classes.json"))
    classes["classes"][1]["name"] = "bee"
    Path("split/t01/classes.json").write_text(json.dumps(classes))
    assert refusal("t02").startswith("split/t01/classes.json: not the file that split.json names; restore it")
    record = read_json(Path("split/t01/split.json"))
    record["files"]["classes.json"] = sha256_of(Path("split/t01/classes.json"))
    Path("split/t01/split.json").write_text(json.dumps(record))

    assert refusal("t02") == (
        "t02: class 'bee' was already learned in t01; remove it from tasks.t02.classes in params.yaml, or write "
        "kind: more there if these are more images of it"
    )


def test_a_task_that_is_not_in_the_params_is_refused() -> None:
    with pytest.raises(InputError, match=r"tasks: there is no t09; known are t01, t02"):
        split("t09", source=SOURCE, before=Path("split/t00"), out=Path("split/t09"), images=Path("train/t09"))


def test_a_split_without_the_one_before_is_refused() -> None:
    assert refusal("t02") == "split/t01/classes.json: the file is missing; run `sdlora run`, which makes it"


def test_a_missing_source_is_refused() -> None:
    shutil.rmtree(SOURCE)

    assert refusal("t01").startswith(
        "data/raw/own: the folder is missing; put images there, one folder for each class"
    )


def test_a_missing_class_folder_is_refused() -> None:
    shutil.rmtree(SOURCE / "test/ant")

    assert refusal("t01").startswith("data/raw/own/test/ant: the folder is missing; make it")


@pytest.mark.parametrize("part", ["train", "test"])
def test_an_empty_class_is_refused(part: str) -> None:
    for path in (SOURCE / part / "ant").iterdir():
        path.rename(path.with_name(f".{path.name}"))

    assert refusal("t01").startswith(f"data/raw/own/{part}/ant: the class is empty; put at least one image")


def test_an_unreadable_image_is_named() -> None:
    whole = (SOURCE / "train/cat/9.png").read_bytes()
    (SOURCE / "train/cat/9.png").write_bytes(whole[:50])

    assert refusal("t01").startswith("cannot read data/raw/own/train/cat/9.png (")


def test_of_many_unreadable_images_three_are_named_and_all_are_counted() -> None:
    for path in SOURCE.rglob("*.png"):
        path.write_bytes(b"no image")

    assert refusal("t01") == (
        "cannot read data/raw/own/train/cat/9.png (it is no image that Pillow knows),"
        " data/raw/own/train/cat/10.png (it is no image that Pillow knows),"
        " data/raw/own/train/ant/9.png (it is no image that Pillow knows)"
        " and 3 more, all of them in .sdlora/unreadable/t01.txt; replace or remove what is broken"
    )


def test_what_is_no_file_is_an_unreadable_image() -> None:
    os.mkfifo(SOURCE / "train/cat/pipe.png")
    (SOURCE / "train/ant/zero.png").symlink_to("/dev/zero")

    assert refusal("t01") == (
        "cannot read data/raw/own/train/cat/pipe.png (it is a pipe, not a file),"
        " data/raw/own/train/ant/zero.png (it is a device, not a file); replace or remove what is broken"
    )


def test_a_link_to_nothing_is_an_unreadable_image() -> None:
    (SOURCE / "train/cat/x.png").symlink_to("nowhere")

    assert "train/cat/x.png (No such file or directory)" in refusal("t01")


def test_an_image_above_the_limit_is_named() -> None:
    choose("max_pixels: 178_956_970", "max_pixels: 5")

    assert "train/cat/9.png (it has more than 5 pixels)" in refusal("t01")


def test_a_file_that_is_no_image_by_its_name_is_refused() -> None:
    (SOURCE / "train/cat/notes.txt").write_text("x")

    assert refusal("t01").startswith("data/raw/own/train/cat/notes.txt: not an image by its name; remove it")


def test_a_file_name_that_would_break_a_line_is_refused() -> None:
    paint(SOURCE / "train/cat/a\nb.png", 251)

    assert "the file name 'a\\nb.png' has a line end or a control character; rename the file" in refusal(
        "t01"
    )


def test_a_folder_inside_a_class_is_refused() -> None:
    paint(SOURCE / "train/cat/kittens/1.png", 251)

    assert refusal("t01").startswith(
        "data/raw/own/train/cat/kittens: a folder inside a class; move its images up"
    )


@pytest.mark.parametrize("target", ["test/cat/2.png", "test/cat/2.bmp", "test/ant/2.png"])
@pytest.mark.parametrize("allowed", [False, True], ids=["refuse", "allow"])
def test_a_picture_in_train_and_test_is_always_refused(target: str, allowed: bool) -> None:
    copy("train/cat/9.png", target)
    if allowed:
        allow_duplicates()

    assert refusal("t01") == (
        f"data/raw/own/{target}: the same picture as data/raw/own/train/cat/9.png, in train and test;"
        " remove one"
    )


@pytest.mark.parametrize("allowed", [False, True], ids=["refuse", "allow"])
@pytest.mark.parametrize(
    ("source", "target"),
    [
        pytest.param("train/cat/9.png", "test/dog/2.png", id="now-tested"),
        pytest.param("test/cat/1.png", "train/dog/2.png", id="now-trained-on"),
    ],
)
def test_a_picture_on_the_other_side_of_an_earlier_task_is_always_refused(
    source: str, target: str, allowed: bool
) -> None:
    copy(source, target)
    if allowed:
        allow_duplicates()
    run("t01")

    assert refusal("t02") == (
        f"data/raw/own/{target}: the same picture as t01/{source} of an earlier task, in train and test;"
        " remove one"
    )


@pytest.mark.parametrize("part", ["train/{}/9.png", "test/{}/1.png"], ids=["train", "test"])
def test_a_picture_in_two_tasks_is_refused_unless_allowed(part: str) -> None:
    copy(part.format("cat"), part.format("dog"))
    run("t01")

    assert refusal("t02") == (
        f"data/raw/own/{part.format('dog')}: the same picture as t01/{part.format('cat')} of an earlier"
        " task, of another class; remove one, or set data.duplicates: allow or keep_first in params.yaml"
    )
    allow_duplicates()
    assert len(run("t02")) == 2


@pytest.mark.parametrize(
    ("source", "target", "task", "left"),
    [
        pytest.param("train/cat/9.png", "test/ant/2.png", "t01", "train/cat/9.png", id="within-a-task"),
        pytest.param("train/cat/9.png", "test/dog/2.png", "t02", "test/dog/2.png", id="trained-on-before"),
        pytest.param("test/cat/1.png", "train/dog/2.png", "t02", "train/dog/2.png", id="tested-before"),
    ],
)
def test_a_picture_in_two_parts_is_left_out_if_wanted(source: str, target: str, task: str, left: str) -> None:
    copy(source, target)
    choose("duplicates: refuse", "duplicates: leave_out")
    run("t01")
    if task == "t02":
        run("t02")

    samples = read_images(Path(f"split/{task}/samples/{task}.arrow"))["id"].to_pylist()
    assert f"{task}/{left}" not in samples
    assert read_json(Path(f"split/{task}/split.json"))["left_out"] == 1
    parts: dict[str, set[str]] = {}
    for step in ("t01", task):
        for row in read_images(Path(f"split/{step}/samples/{step}.arrow")).to_pylist():
            parts.setdefault(row["pixels"], set()).add(row["split"])
    assert all(len(found) == 1 for found in parts.values())


def test_a_class_of_which_nothing_is_left_is_refused() -> None:
    for name in ("9.png", "10.png"):
        copy(f"train/cat/{name}", f"test/ant/{name}")
    choose("duplicates: refuse", "duplicates: leave_out")

    assert refusal("t01") == (
        "t01: class 'cat': every train image stands in another part too, and would be left out; "
        "give it images of its own"
    )


def test_a_picture_under_two_classes_is_refused_unless_allowed() -> None:
    copy("train/cat/9.png", "train/ant/9.png")
    copy("train/cat/10.png", "train/ant/10.png")

    assert refusal("t01") == (
        "data/raw/own/train/ant/9.png: the same picture as data/raw/own/train/cat/9.png, of another class;"
        " remove one, or set data.duplicates: allow or keep_first in params.yaml (and 1 more)"
    )
    allow_duplicates()
    run("t01")
    assert read_json(Path("split/t01/split.json"))["duplicates"] == 2


def test_the_class_that_came_first_keeps_a_picture_if_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    copy("train/cat/9.png", "train/ant/1.png")
    copy("train/cat/10.png", "test/ant/2.png")
    copy("train/ant/9.png", "train/dog/1.png")
    choose("duplicates: refuse", "duplicates: keep_first")
    run("t01")
    run("t02")

    assert read_json(Path("split/t01/split.json"))["left_out"] == 2
    assert read_json(Path("split/t02/split.json"))["left_out"] == 1
    assert parts_of("t01")["train.arrow"] == [
        "t01/train/cat/9.png", "t01/train/cat/10.png", "t01/train/ant/9.png", "t01/train/ant/10.png",
    ]  # fmt: skip
    assert "t02/train/dog/1.png" not in parts_of("t02")["train.arrow"]
    assert "2 pictures stand under another class too and left out" in capsys.readouterr().err


def test_a_class_that_would_lose_all_its_pictures_is_refused() -> None:
    copy("test/cat/1.png", "test/ant/1.png")
    choose("duplicates: refuse", "duplicates: keep_first")

    assert refusal("t01") == (
        "t01: class 'ant': every test image stands under another class too, and would be left out; "
        "give it images of its own"
    )


def test_a_picture_that_differs_in_what_is_clear_alone_stands_in_one_part() -> None:
    clear = Image.new("RGBA", (3, 2), (9, 9, 9, 255))
    clear.putpixel((0, 0), (200, 0, 0, 0))
    clear.save(SOURCE / "train/cat/clear.png")
    clear.save(SOURCE / "test/ant/clear.webp", lossless=True)

    assert "test/ant/clear.webp: the same picture as data/raw/own/train/cat/clear.png, in train" in refusal(
        "t01"
    )


def test_copies_within_a_class_stay_and_are_counted() -> None:
    copy("train/cat/9.png", "train/cat/11.bmp")

    run("t01")

    assert len(read_images(Path("split/train/t01/train.arrow"))) == 5
    assert read_json(Path("split/t01/split.json"))["duplicates"] == 1


def test_a_refused_split_leaves_the_one_there_was() -> None:
    run("t01")
    before = tree(Path("split"))
    (SOURCE / "train/cat/9.png").write_bytes(b"x")

    with pytest.raises(InputError):
        run("t01")

    assert tree(Path("split")) == before


def parts_of(task: str, *, root: str = "split") -> dict[str, list[str]]:
    folder = Path(root, task)
    parts = [*sorted(folder.glob("validation/*.arrow")), *folder.glob("test/*.arrow")]
    files = {"train.arrow": Path(root, "train", task, "train.arrow")}
    files |= {str(file.relative_to(folder)): file for file in parts}
    return {name: read_images(file)["id"].to_pylist() for name, file in files.items()}


def noise(path: Path, seed: int) -> None:
    """A picture with a structure, unlike every other one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = random.Random(seed).randbytes(64)
    Image.frombytes("L", (8, 8), pixels).resize((64, 64), Image.Resampling.BICUBIC).save(path)


def undivided(source: str) -> None:
    """Two tasks of two classes of five images each, in one folder of class folders."""
    path = Path("params.yaml")
    path.write_text(path.read_text().replace("data/raw/own", source))
    for index, name in enumerate(("ant", "bee", "cat", "dog")):
        for number in range(5):
            noise(Path(source, name, f"{number}.png"), 10 * index + number)


def run_of(source: str, task: str, *, root: str = "split") -> list[dict[str, str | int | float]]:
    before = {"t01": "t00", "t02": "t01"}[task]
    return split(
        task,
        source=Path(source),
        before=Path(root, before),
        out=Path(root, task),
        images=Path(root, "train", task),
    ).rows


def test_without_validation_there_is_no_file_of_it() -> None:
    run("t01")

    assert not Path("split/t01/validation").exists()


def test_validation_images_are_taken_from_train() -> None:
    undivided("data/raw/flat")
    run_of("data/raw/flat", "t01")
    plain = parts_of("t01")
    choose("validation:  ", "validation: 0.25")

    summary = run_of("data/raw/flat", "t01")

    chosen = parts_of("t01")
    assert summary == [{"class": name, "train": 3, "validation": 1, "test": 1} for name in ("cat", "ant")]
    assert chosen["test/t01.arrow"] == plain["test/t01.arrow"]
    names = {part: {name.split("/", 2)[2] for name in ids} for part, ids in chosen.items()}
    assert names["train.arrow"] | names["validation/t01.arrow"] == {
        name.split("/", 2)[2] for name in plain["train.arrow"]
    }
    assert not names["train.arrow"] & names["validation/t01.arrow"]


def test_a_manifest_and_its_folder_make_the_same_pixels() -> None:
    undivided("data/raw/flat")
    run_of("data/raw/flat", "t01", root="split")
    lines = [
        f"{path.relative_to('data/raw/flat')},{path.parent.name}"
        for path in Path("data/raw/flat").rglob("*.png")
    ]
    Path("data/raw/flat/list.csv").write_text("path,label\n" + "\n".join(lines) + "\n")
    choose("{after: t00, source: data/raw/flat,", "{after: t00, source: data/raw/flat, manifest: list.csv,")
    start(out=Path("listed/t00"), evaluation=Path("evaluation/t00"), gate=Path("gate/t00"))

    summary = run_of("data/raw/flat", "t01", root="listed")

    assert summary == [{"class": name, "train": 4, "test": 1} for name in ("cat", "ant")]
    table = read_images(Path("listed/train/t01/train.arrow"))
    assert table["id"][0].as_py().startswith("t01/train/cat/cat/")
    every = {
        root: {
            pixels
            for file in Path(root, "t01").rglob("*.arrow")
            for pixels in read_images(file)["pixels"].to_pylist()
        }
        for root in ("split", "listed")
    }
    assert every["split"] == every["listed"]


def test_a_picture_of_validation_is_refused_in_train() -> None:
    choose("validation:  ", "validation: 0.5")
    copy("train/cat/9.png", "val/cat/1.png")

    assert (
        "data/raw/own/val/cat/1.png: the same picture as data/raw/own/train/cat/9.png, in train and val"
        in refusal("t01")
    )


def test_nearly_the_same_pictures_across_parts_are_a_warning_and_counted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    noise(SOURCE / "train/cat/a.png", 1)
    noise(SOURCE / "test/dog/b.png", 2)
    with Image.open(SOURCE / "train/cat/a.png") as image:
        image.save(SOURCE / "test/ant/a.jpg", quality=90)
    with Image.open(SOURCE / "test/dog/b.png") as image:
        image.resize((50, 50)).save(SOURCE / "train/ant/b.png")

    run("t01")
    run("t02")

    assert read_json(Path("split/t01/split.json"))["near_duplicates"] == 1
    assert read_json(Path("split/t02/split.json"))["near_duplicates"] == 1
    said = capsys.readouterr().err
    assert (
        "split t01: warning: 1 picture nearly stands in train and in test or validation, such as"
        " data/raw/own/test/ant/a.jpg and data/raw/own/train/cat/a.png; `sdlora doctor` lists them"
    ) in said
    assert "such as data/raw/own/test/dog/b.png and t01/train/ant/b.png of an earlier task" in said


def in_shards() -> None:
    """The pictures of the source, in a Parquet file for train and a tar file for test."""
    files = {path.relative_to(SOURCE): path.read_bytes() for path in sorted(SOURCE.rglob("*.png"))}
    shutil.rmtree(SOURCE)
    names = ["cat", "dog", "ant", "bee"]
    train = [(data, names.index(path.parts[1])) for path, data in files.items() if path.parts[0] == "train"]
    write_parquet(SOURCE / "data/train-00000-of-00001.parquet", train, names=names)
    test = {str(path): data for path, data in files.items() if path.parts[0] == "test"}
    write_tar(SOURCE / "own-test.tar", test)


def test_images_of_shards_are_packed_as_those_of_files_are() -> None:
    run("t01")
    files = {
        name: read_images(Path(name)) for name in ("split/train/t01/train.arrow", "split/t01/test/t01.arrow")
    }
    shutil.rmtree("split/t01")
    in_shards()

    run("t01")

    for name, expected in files.items():
        packed = read_images(Path(name))
        for column in ("label", "image", "sha256", "pixels"):
            assert sorted(packed[column].to_pylist()) == sorted(expected[column].to_pylist())
    ids = read_images(Path("split/t01/test/t01.arrow"))["id"].to_pylist()
    assert ids == ["t01/test/cat/own-test.tar/test/cat/1.png", "t01/test/ant/own-test.tar/test/ant/1.png"]
    first = tree(Path("split/t01"))
    run("t01")
    assert tree(Path("split/t01")) == first


def test_rows_that_are_no_pictures_are_named_by_shard_and_row() -> None:
    in_shards()
    write_parquet(SOURCE / "train-more.parquet", [(b"no picture", "cat"), (None, "ant"), (b"x", "dog")])

    assert refusal("t01") == (
        "cannot read data/raw/own/train-more.parquet: row 1 (it is no image that Pillow knows), "
        "data/raw/own/train-more.parquet: row 2 (the row has no bytes of an image; write them into the file, not their "
        "path); replace or remove what is broken"
    )


@pytest.mark.slow
def test_a_changed_byte_of_a_shard_makes_the_split_stale(project: Path) -> None:
    in_shards()
    shutil.rmtree("split")
    write_project(project, {"dvc.yaml": (REPOSITORY / "dvc.yaml").read_text()})
    call_here(project, "code", "--out", "artifacts/code")
    call_here(project, "start", "--out", "artifacts/split/t00", "--evaluation", "artifacts/evaluation/t00",
              "--gate", "artifacts/gate/t00")  # fmt: skip
    call(project, "dvc", "repro", "--single-item", "split@t01")
    assert "up to date" in call(project, "dvc", "status", "split@t01")
    for shard in ("data/train-00000-of-00001.parquet", "own-test.tar"):
        before = (SOURCE / shard).read_bytes()
        (SOURCE / shard).write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        assert "modified:           data/raw/own" in call(project, "dvc", "status", "split@t01")
        (SOURCE / shard).write_bytes(before)
    assert "up to date" in call(project, "dvc", "status", "split@t01")
