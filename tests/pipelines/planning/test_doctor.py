import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.cli.app import report_error
from pipelines.planning.doctor.command import doctor
from pipelines.planning.doctor.examination import examine
from pipelines.planning.doctor.findings import Finding
from pipelines.planning.doctor.similarity import Features, alike_findings, pixel_findings
from pipelines.planning.tasks import add_task
from pipelines.project.errors import InputError
from pipelines.project.params import Params
from pipelines.stages.split import split
from pipelines.stages.start import start
from tests.support.repository import REPOSITORY
from tests.support.shards import png, write_parquet

OWN = Path("data/raw/own")


@pytest.fixture(autouse=True)
def project(make_project: Callable[[dict[str, str]], Path]) -> Path:
    """A project whose only task, of two classes with six images each, is without fault."""
    text = (REPOSITORY / "params.yaml").read_text(encoding="utf-8")
    text = text[: text.index("tasks:\n")]
    text += 'tasks:\n  t01: {after: t00, source: data/raw/first, classes: ["1", "2"]}\n'
    folder = make_project({"params.yaml": text, "dvc.yaml": ""})
    for index, name in enumerate(("1", "2")):
        fill(Path("data/raw/first"), name, seed=100 * index)
    return folder


def scene(seed: int, size: int = 64) -> Image.Image:
    """A picture with a structure of its own, of the backbone's usual brightness."""
    coarse = np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)


def paint(path: Path, seed: int, size: int = 64) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scene(seed, size).save(path)


def fill(source: Path, name: str, *, seed: int, train: int = 6, test: int = 5) -> None:
    for number in range(train):
        paint(source / "train" / name / f"{number}.png", seed + number)
    for number in range(test):
        paint(source / "test" / name / f"{number}.png", seed + 50 + number)


def choose(old: str, new: str) -> None:
    path = Path("params.yaml")
    text = path.read_text()
    assert text.count(old) == 1, old
    path.write_text(text.replace(old, new))


def found(source: Path | None = OWN, *, quick: bool = True) -> dict[tuple[str, str], Finding]:
    """What is wrong or looks wrong, by level and check."""
    findings = [finding for finding in examine(source, quick=quick) if finding.level != "ok"]
    by_check = {(finding.level, finding.check): finding for finding in findings}
    assert len(by_check) == len(findings)
    return by_check


def test_a_project_without_fault_is_well(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor(None, as_json=False, quick=True) == 0

    out = capsys.readouterr().out
    assert "22 images of 2 classes, nothing" in out
    assert out.endswith("0 errors, 0 warnings\n")


def test_a_new_source_without_fault_is_well_and_nothing_is_written() -> None:
    fill(OWN, "Ünal", seed=1000)
    before = Path("params.yaml").read_bytes()

    findings = examine(OWN)

    assert {finding.level for finding in findings} == {"ok"}
    assert findings[-1].what == "11 images of 1 class, nothing amiss"
    assert Path("params.yaml").read_bytes() == before
    assert not Path(".sdlora").exists()


def every_fault() -> None:
    """A folder of mixed formats, in which everything is wrong that can be."""
    fill(OWN, "good", seed=1000)
    good = OWN / "train/good"
    scene(2000).save(good / "photo.jpg", quality=90)
    scene(2001).convert("CMYK").save(good / "print.tif")
    scene(2002).save(good / "web.webp")
    scene(2003).save(good / "old.bmp")
    scene(2004).quantize(16).save(good / "few colours.gif")
    scene(2005).convert("LA").save(good / "clear.png")
    Image.fromarray(np.asarray(scene(2006).convert("L"), np.uint16) * 257).save(good / "deep.tiff")
    # Files that cannot be read.
    (good / "empty.png").write_bytes(b"")
    (good / "page.jpg").write_bytes(b"<html>not found</html>")
    (good / "cut.png").write_bytes((good / "0.png").read_bytes()[:500])
    Image.new("F", (9, 9)).save(good / "floats.tif")
    Image.new("1", (3000, 3000)).save(good / "huge.png")
    (good / "nowhere.png").symlink_to("gone.png")
    # Files that are none, and folders where none should be.
    (good / "notes.txt").write_text("x")
    paint(good / "more" / "1.png", 3000)
    paint(OWN / "train" / "loose.png", 3001)
    (OWN / "train" / "nothing").mkdir()
    (OWN / "test" / "nothing").mkdir()
    paint(OWN / "train" / "half" / "1.png", 3002)
    # Pictures that stand where they must not.
    shutil.copy(good / "0.png", OWN / "test/good/leak.png")
    shutil.copy("data/raw/first/train/1/0.png", good / "known.png")
    shutil.copy(good / "1.png", good / "again.png")
    scene(1002).save(OWN / "test/good/nearly.jpg", quality=85)


def test_every_fault_is_named_in_one_report_and_the_mended_folder_becomes_a_task(
    capsys: pytest.CaptureFixture[str],
) -> None:
    choose("max_pixels: 178_956_970", "max_pixels: 1_000_000")
    every_fault()

    assert doctor(OWN, as_json=True, quick=False) == 2

    report = json.loads(capsys.readouterr().out)
    findings = {(one["level"], one["check"]): one for one in report["findings"]}
    assert {where.split(" (")[0].rsplit("/")[-1] for where in findings["error", "unreadable"]["where"]} == {
        "empty.png", "page.jpg", "cut.png", "floats.tif", "huge.png", "nowhere.png",
    }  # fmt: skip
    assert "(it has more than 1,000,000 pixels)" in str(findings["error", "unreadable"]["where"])
    faults = "\n".join(findings["error", "source"]["where"])
    for fault in (
        "train/good/notes.txt: not an image by its name",
        "train/good/more: a folder inside a class",
        "train/nothing: the class is empty",
        "test/nothing: the class is empty",
        "test/half: the folder is missing",
    ):
        assert fault in faults
    assert findings["warning", "source"]["where"] == ["data/raw/own/train/loose.png"]
    same = "\n".join(findings["error", "same picture"]["where"])
    assert "test/good/leak.png: the same picture as data/raw/own/train/good/0.png, in train and test" in same
    assert "train/good/known.png: the same picture as data/raw/first/train/1/0.png, of another class" in same
    assert findings["warning", "copies"]["where"] == [
        "data/raw/own/train/good/again.png = data/raw/own/train/good/1.png"
    ]
    assert findings["warning", "near duplicates"]["where"] == [
        "data/raw/own/test/good/nearly.jpg ~ data/raw/own/train/good/2.png"
    ]
    assert report["errors"] == 3

    for part, name in (("train", "nothing"), ("test", "nothing"), ("train", "half"), ("train", "good/more")):
        shutil.rmtree(OWN / part / name)
    good = OWN / "train/good"
    for name in ("empty.png", "page.jpg", "cut.png", "floats.tif", "huge.png", "nowhere.png", "notes.txt"):
        (good / name).unlink()
    for path in (OWN / "train/loose.png", OWN / "test/good/leak.png", good / "known.png", good / "again.png"):
        path.unlink()
    (OWN / "test/good/nearly.jpg").unlink()

    assert doctor(OWN, as_json=True, quick=False) == 0
    assert json.loads(capsys.readouterr().out)["warnings"] == 0
    add_task(OWN)
    start(out=Path("split/t00"), evaluation=Path("evaluation/t00"), gate=Path("gate/t00"))
    for task, before in (("t01", "t00"), ("t02", "t01")):
        source = Path(Params.load().tasks[task].source)
        split(
            task,
            source=source,
            before=Path("split", before),
            out=Path("split", task),
            images=Path("train", task),
        )
    assert examine(None, quick=True)[-1].what == "18 images of 1 class, nothing amiss"


def test_the_table_names_all_that_cannot_be_read_and_ten_of_the_others(
    capsys: pytest.CaptureFixture[str],
) -> None:
    fill(OWN, "good", seed=1000, train=30)
    for number in range(25):
        (OWN / f"train/good/broken{number}.png").write_bytes(b"x")
        shutil.copy(OWN / f"train/good/{number}.png", OWN / f"train/good/copy{number}.png")

    assert doctor(OWN, as_json=False, quick=True) == 2

    out = capsys.readouterr().out
    assert all(f"broken{number}.png (it is no image" in out for number in range(25))
    assert out.count(" = ") == 10
    assert "… and 15 more (--json has all)" in out
    assert "1 error, 1 warning" in out


def test_warnings_alone_end_with_status_0(capsys: pytest.CaptureFixture[str]) -> None:
    fill(OWN, "few", seed=1000, train=2, test=1)

    assert doctor(OWN, as_json=False, quick=True) == 0
    assert "few: 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("make", "fault"),
    [
        pytest.param(lambda: None, "data/raw/own: the folder is missing; put images there", id="missing"),
        pytest.param(lambda: OWN.mkdir(), "data/raw/own: no class folders there", id="empty"),
        pytest.param(lambda: OWN.touch(), "data/raw/own: a file, not a folder; give the folder", id="file"),
    ],
)
def test_a_source_that_is_none_is_an_error(make: Callable[[], None], fault: str) -> None:
    make()

    assert found()["error", "source"].what.startswith(fault)


def test_a_broken_manifest_is_an_error_of_its_task() -> None:
    fill(OWN, "good", seed=1000)
    (OWN / "list.csv").write_text("path,label,split\ntrain/good/0.png,good,train\n,good,train\nx.png,good\n")

    assert "line 4: 2 fields" in found(OWN / "list.csv")["error", "source"].what
    (OWN / "list.csv").write_text(
        "path,label,split\ntrain/good/0.png,good,train\n,good,train\nx.png,good,test\n"
    )
    places = "\n".join(found(OWN / "list.csv")["error", "source"].where)
    assert "line 3: the path is ''" in places
    assert "line 4: there is no file x.png" in places


def test_lines_with_and_without_a_split_are_one_finding() -> None:
    fill(OWN, "good", seed=1000)
    lines = [
        {"path": "train/good/0.png", "label": "good", "split": "train"},
        {"path": "test/good/0.png", "label": "good", "split": "test"},
        {"path": "train/good/1.png", "label": "good"},
    ]
    (OWN / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))

    (finding,) = (one for one in examine(OWN / "list.jsonl", quick=True) if one.level == "error")
    assert finding.where[0].startswith("data/raw/own/list.jsonl: line 3: no split, which other lines have")


def test_a_class_of_test_alone_and_a_folder_beside_the_parts_are_said_not_to_be_read() -> None:
    fill(OWN, "good", seed=1000)
    paint(OWN / "test/forgotten/1.png", 5000)
    paint(OWN / "beside/1.png", 5001)
    (OWN / os.fsdecode(b"caf\xe9")).mkdir()

    assert found()["warning", "source"].where == [
        "data/raw/own/beside/",
        "'data/raw/own/caf\\udce9/'",
        "data/raw/own/test/forgotten/",
    ]


def test_bad_rows_of_a_shard_are_named_as_bad_files_are_and_a_whole_one_is_well() -> None:
    rows: list[tuple[bytes | None, object]] = [(png(1000 + number, 64), "wren") for number in range(30)]
    write_parquet(OWN / "train.parquet", rows)
    assert [finding.what for finding in examine(OWN, quick=True)] == ["30 images of 1 class, nothing amiss"]
    write_parquet(OWN / "train.parquet", [*rows, (b"no picture", "wren"), (None, "wren"), (png(1, 64), None)])

    findings = found()

    assert sorted(findings["error", "unreadable"].where) == [
        "data/raw/own/train.parquet: row 31 (it is no image that Pillow knows)",
        "data/raw/own/train.parquet: row 32 (the row has no bytes of an image; write them into the file, not their "
        "path)",
    ]
    assert findings["error", "source"].where == [
        "data/raw/own/train.parquet: row 33: the label is empty; write text or a whole number"
    ]


def test_names_that_no_class_can_have_are_named_and_the_others_examined() -> None:
    fill(OWN, "good", seed=1000, test=1)
    (OWN / "train" / " bad").mkdir()

    findings = found()
    assert findings["error", "class names"].where == ['" bad" is empty or has blanks at an end']
    assert findings["warning", "few images"].where == ["good: 1"]


def test_classes_that_are_learned_already_are_left_out_and_said() -> None:
    fill(OWN, "1", seed=1000)
    fill(OWN, "good", seed=2000)

    findings = found()
    assert findings["warning", "classes"].where == ["1 (t01)"]
    assert {place.split(":")[0] for finding in findings.values() for place in finding.where} == {"1 (t01)"}


def test_a_source_of_learned_classes_alone_is_examined_as_the_tasks_it_is() -> None:
    (Path("data/raw/first") / "train/1/0.png").write_bytes(b"x")

    assert found(Path("data/raw/first"))["error", "unreadable"].task == "t01"


def test_the_first_source_of_a_project_without_tasks_can_be_examined() -> None:
    path = Path("params.yaml")
    path.write_text(path.read_text().split("tasks:\n")[0])
    fill(OWN, "good", seed=1000)

    assert examine(OWN, quick=True)[-1].task == "t01"


def test_names_that_differ_in_case_only_are_a_warning() -> None:
    fill(OWN, "Cat", seed=1000)
    fill(OWN, "cat", seed=2000)

    assert found()["warning", "class names"].where == ["'Cat' (t02)", "'cat' (t02)"]


def test_uneven_classes_are_said_with_numbers() -> None:
    fill(OWN, "many", seed=1000, train=50)
    fill(OWN, "some", seed=2000, train=5)

    (finding,) = found().values()
    assert finding.what == "uneven classes: many has 50 training images, some 5 (median 27.5)"


def test_old_pictures_are_compared_as_they_were_packed_when_their_source_is_gone() -> None:
    start(out=Path("artifacts/split/t00"), evaluation=Path("evaluation/t00"), gate=Path("gate/t00"))
    split(
        "t01",
        source=Path("data/raw/first"),
        before=Path("artifacts/split/t00"),
        out=Path("artifacts/split/t01"),
        images=Path("artifacts/train/t01"),
    )
    fill(OWN, "good", seed=1000)
    shutil.copy("data/raw/first/train/1/0.png", OWN / "test/good/old.png")
    shutil.rmtree("data/raw/first")

    findings = found(quick=False)
    assert findings["error", "same picture"].where == [
        "data/raw/own/test/good/old.png: the same picture as t01/train/1/0.png of t01, in train and test"
    ]
    assert len(findings) == 1


def test_a_task_whose_classes_changed_since_it_was_packed_is_compared_as_it_was_packed() -> None:
    start(out=Path("artifacts/split/t00"), evaluation=Path("evaluation/t00"), gate=Path("gate/t00"))
    split(
        "t01",
        source=Path("data/raw/first"),
        before=Path("artifacts/split/t00"),
        out=Path("artifacts/split/t01"),
        images=Path("artifacts/train/t01"),
    )
    classes = Path("artifacts/split/t01/classes.json")
    names = [entry["name"] for entry in json.loads(classes.read_text())["classes"]]
    assert len(names) == 2
    listed = ", ".join(f'"{name}"' for name in names)
    choose(f"classes: [{listed}]", f'classes: ["{names[1]}"]')
    fill(OWN, "good", seed=1000)

    assert not [finding for finding in examine(OWN) if finding.level == "error"]


def test_old_pictures_that_are_nowhere_are_said() -> None:
    shutil.rmtree("data/raw/first")
    fill(OWN, "good", seed=1000)

    assert found()["warning", "source"].what == (
        "t01 has errors of its own, so not all of its pictures were compared with"
    )


def test_a_data_set_that_a_run_would_fetch_may_be_missing() -> None:
    choose("source: data/raw/first", "source: data/raw/digits")

    findings = {finding.check: finding for finding in examine(None, quick=True) if finding.task == "t01"}
    assert findings["source"].level == "warning"
    assert findings["source"].remedy == "run `sdlora fetch digits`"


def test_what_duplicates_allow_lets_pass_is_a_warning() -> None:
    choose("duplicates: refuse", "duplicates: allow")
    fill(OWN, "good", seed=1000)
    shutil.copy("data/raw/first/train/1/0.png", OWN / "train/good/old.png")

    assert list(found()) == [("warning", "same picture")]


def test_what_will_be_left_out_is_a_warning() -> None:
    choose("duplicates: refuse", "duplicates: leave_out")
    fill(OWN, "good", seed=1000)
    shutil.copy("data/raw/first/train/1/0.png", OWN / "test/good/old.png")

    findings = found()
    assert list(findings) == [("warning", "same picture")]
    assert findings["warning", "same picture"].where == [f"{OWN}/test/good/old.png"]


def test_what_the_class_that_came_first_keeps_is_a_warning() -> None:
    choose("duplicates: refuse", "duplicates: keep_first")
    fill(OWN, "good", seed=1000)
    shutil.copy("data/raw/first/train/1/0.png", OWN / "train/good/old.png")
    shutil.copy("data/raw/first/train/1/1.png", OWN / "test/good/old.png")

    findings = found()
    assert list(findings) == [("warning", "same picture")]
    assert findings["warning", "same picture"].where == [
        f"{OWN}/train/good/old.png", f"{OWN}/test/good/old.png",
    ]  # fmt: skip


def test_an_archive_is_said_to_be_one() -> None:
    Path("data/raw/x.zip").write_bytes(b"PK")

    assert found(Path("data/raw/x.zip"))["error", "source"].what == (
        "data/raw/x.zip: an archive, which is not read; unpack it and give the folder"
    )


def test_validation_images_without_tests_are_one_fault() -> None:
    fill(OWN, "good", seed=1000)
    fill(OWN, "better", seed=2000)
    (OWN / "test").rename(OWN / "val")

    (error,) = (finding for finding in examine(OWN, quick=True) if finding.level == "error")
    assert len(error.where) == 1
    assert "rename val to test" in error.where[0]


def test_what_other_programs_leave_is_counted_and_a_table_is_said_not_to_be_read() -> None:
    fill(OWN, "good", seed=1000)
    (OWN / "labels.csv").touch()
    for place in (OWN, OWN / "train/good", OWN / "test/good"):
        (place / "Thumbs.db").touch()
        (place / "@eaDir").mkdir()

    assert found()["warning", "source"].where == ["data/raw/own/labels.csv, a table"]
    (litter,) = (one for one in examine(OWN, quick=True) if one.check == "source" and one.level == "ok")
    assert litter.what == "6 things of other programs, left out"
    assert litter.where == ["@eaDir: 3", "Thumbs.db: 3"]


def test_small_and_dark_images_are_a_warning() -> None:
    for part, number in (("train", 12), ("test", 6)):
        for index in range(number):
            path = OWN / part / "dark" / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            scene(1000 * number + index, 12).point(lambda value: value // 16).save(path)

    findings = found(quick=False)
    assert findings["warning", "sizes"].what == (
        "the typical image is 12 pixels on its shorter side, the backbone sees 32×32"
    )
    assert findings["warning", "brightness"].what.startswith("normalised pixels have mean -0.9")


@pytest.mark.parametrize(
    ("mean", "spread", "well"),
    [(0.0, 1.0, True), (-0.6, 0.7, True), (1.1, 0.7, False), (0.0, 0.1, False), (0.0, 2.5, False)],
)
def test_pixels_far_from_the_normalisation_are_a_warning(mean: float, spread: float, well: bool) -> None:
    assert (not list(pixel_findings("t01", [(mean, mean**2 + spread**2)]))) == well


def test_a_class_that_looks_like_a_known_one_is_named_and_others_are_not() -> None:
    """The same scenes with noise, under a new name; and scenes of another kind."""
    noise = np.random.default_rng(0)
    kinds = {Path("data/raw/first"): {"1": 5, "2": 6}, OWN: {"twin": 5, "other": 7}}
    for source, classes in kinds.items():
        for name, seed in classes.items():
            for index in range(20):
                pixels = np.asarray(scene(seed), np.int64) + noise.integers(-60, 60, (64, 64, 3))
                path = source / "train" / name / f"{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
        for name, seed in classes.items():
            for index in range(5):
                paint(source / "test" / name / f"{index}.png", 10_000 + 100 * seed + index)

    similar = found(quick=False)["warning", "similar classes"]
    assert [place.split(" (")[0] for place in similar.where] == ["twin ~ 1 of t01"]


def features(task: str, centre: float, images: int) -> Features:
    return Features(task, np.array([centre, 0.0]), 1.0, images, (0.0, 1.0))


def test_classes_of_few_images_are_not_said_to_look_alike() -> None:
    known = features("t01", 0.0, 30)

    assert list(alike_findings({"a": known, "b": features("t02", 0.5, 30)}, {"t02"}))
    assert not list(alike_findings({"a": known, "b": features("t02", 0.5, 9)}, {"t02"}))
    assert not list(alike_findings({"a": known, "b": features("t02", 1.0, 30)}, {"t02"}))
    assert not list(alike_findings({"a": known, "b": features("t02", 0.5, 30)}, {"t03"}))


def test_a_backbone_that_is_not_there_is_an_error_and_the_files_are_examined_all_the_same() -> None:
    choose("name: glyph_vit ", "name: glyph_wit ")
    fill(OWN, "few", seed=1000, train=2)

    findings = found(quick=False)
    assert findings["error", "backbone"].what.startswith("glyph_wit cannot be loaded: timm")
    assert ("warning", "few images") in findings


def test_broken_params_are_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SDLORA_OUTCOME_FILE", raising=False)
    choose("duplicates: refuse", "duplicates: perhaps")

    with pytest.raises(InputError) as caught:
        examine(None)
    assert report_error(caught.value) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_command_says_it_in_its_exit_status() -> None:
    (Path("data/raw/first") / "train/1/0.png").write_bytes(b"x")
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "pipelines", "doctor", "data/raw/first", "--quick", "--json"]

    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)

    assert done.returncode == 2, done.stderr
    assert json.loads(done.stdout)["errors"] == 1


def test_the_page_about_data_names_every_check_ending_part_and_parameter() -> None:
    from pipelines.data.manifests import METADATA
    from pipelines.data.source_files import EXTENSIONS, WORDS
    from pipelines.project.settings import Data

    page = (REPOSITORY / "docs/reference/data.md").read_text(encoding="utf-8")
    modules = sorted((REPOSITORY / "pipelines/planning/doctor").glob("*.py"))
    program = "".join(module.read_text(encoding="utf-8") for module in modules)
    checks = set(re.findall(r'Finding\(\s*"(?:error|warning|ok)", "([a-z ]+)"', program)) - {"images"}
    assert len(checks) == 17
    assert {check for check in checks if f"`{check}`" not in page} == set()
    assert {end for end in EXTENSIONS if end not in page} == set()
    assert {name for name in METADATA if name not in page} == set()
    assert {word for word in WORDS if f"`{word}`" not in page} == set()
    assert {key for key in Data.model_fields if f"data.{key}" not in page} == set()


def test_a_folder_of_known_classes_is_looked_at_as_more_images_of_them() -> None:
    fill(OWN, "1", seed=300)
    assert not found()

    paint(OWN / "train/1/0.png", 0)  # as the first task has it
    same = found()["error", "same picture"]
    assert same.task == "t02"
    assert same.where == ["data/raw/own/train/1/0.png: the same picture as data/raw/first/train/1/0.png"]
