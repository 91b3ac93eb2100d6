"""Sources whose images stand in Parquet and tar files."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.data.source_files import Found
from pipelines.data.sources import class_names, read_source, task_images
from pipelines.project.errors import InputError
from pipelines.project.settings import Data
from tests.support.shards import png, write_parquet, write_tar

OWN = Path("data/raw/own")
DATA = Data(duplicates="refuse", test_fraction=0.2, seed=0, validation=None, max_pixels=100)


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    OWN.mkdir(parents=True)


def listed(*names: str, manifest: str | None = None, data: Data = DATA) -> list[Found]:
    return task_images(OWN, names, manifest=manifest, data=data)


def classes(manifest: str | None = None) -> list[str]:
    return class_names(OWN, manifest=manifest, shown=str(OWN))


def faults(*names: str, manifest: str | None = None) -> list[str]:
    return [str(fault) for fault in read_source(OWN, names, manifest=manifest).faults]


def parts(images: Sequence[Found]) -> dict[str, set[bytes]]:
    found: dict[str, set[bytes]] = {}
    for image in images:
        found.setdefault(f"{image.part}/{image.name}", set()).add(image.read())
    return found


PICTURES = {f"{part}/{name}": png(seed) for seed, (part, name) in enumerate(
    (part, name) for part in ("train", "train2", "test") for name in ("ant", "bee")
)}  # fmt: skip


def as_hub_files() -> None:
    names = ["bee", "ant", "unused"]
    train = [
        (PICTURES[f"{part}/{name}"], names.index(name))
        for part in ("train", "train2")
        for name in ("ant", "bee")
    ]
    write_parquet(OWN / "data/train-00000-of-00002.parquet", train[:3], names=names)
    write_parquet(OWN / "data/train-00001-of-00002.parquet", train[3:], names=names)
    test = [(PICTURES[f"test/{name}"], names.index(name)) for name in ("ant", "bee")]
    write_parquet(OWN / "data/test-00000-of-00001.parquet", test, names=names)


def as_rows_of_bytes() -> None:
    for part in ("train", "test"):
        rows = [(data, place) for place, data in PICTURES.items() if place.startswith(part)]
        images, labels = pa.array([data for data, _ in rows]), [place.split("/")[1] for _, place in rows]
        (OWN / part).mkdir()
        pq.write_table(pa.table({"image": images, "label": labels}), OWN / part / "0.parquet")


def as_rows_with_parts() -> None:
    rows = [(data, *place.replace("train2", "training").split("/")) for place, data in PICTURES.items()]
    columns = dict(zip(("img", "split", "label"), map(list, zip(*rows, strict=True)), strict=True))
    pq.write_table(pa.table(columns), OWN / "all.parquet")


def as_web_dataset(label: Callable[[str], dict[str, bytes]]) -> None:
    for part in ("train", "test"):
        members = {}
        for index, (place, data) in enumerate(PICTURES.items()):
            if place.startswith(part):
                members |= {f"{index:06}.png": data, f"{index:06}.seg.png": b"a field of its own"}
                members |= {
                    f"{index:06}.{ending}": text for ending, text in label(place.split("/")[1]).items()
                }
        write_tar(OWN / f"own-{part}-000000.tar", members)


def as_class_folders() -> None:
    members = {
        f"./own/{place.split('/')[0].removesuffix('2')}/{place.split('/')[1]}/{index}.v2.png": data
        for index, (place, data) in enumerate(PICTURES.items())
    }
    write_tar(OWN / "all.tar", {"own/README.md": b"x", **members, "own/train/ant/.DS_Store": b"x"})


@pytest.mark.parametrize(
    "write",
    [
        pytest.param(as_hub_files, id="hub"),
        pytest.param(as_rows_of_bytes, id="bytes"),
        pytest.param(as_rows_with_parts, id="split-column"),
        pytest.param(lambda: as_web_dataset(lambda name: {"cls": name.encode() + b"\n"}), id="cls"),
        pytest.param(
            lambda: as_web_dataset(lambda name: {"json": json.dumps({"label": name}).encode()}), id="json"
        ),
        pytest.param(lambda: as_web_dataset(lambda name: {"txt": name.encode()}), id="txt"),
        pytest.param(
            lambda: as_web_dataset(lambda name: {"txt": b"a photo", "json": b"{}", "cls": name.encode()}),
            id="first",
        ),
        pytest.param(as_class_folders, id="folders"),
    ],
)
def test_every_layout_of_shards_gives_the_images_of_its_classes_and_parts(write: Callable[[], None]) -> None:
    write()

    images = listed("bee", "ant")

    assert classes() == ["ant", "bee"]
    assert parts(images) == {
        "train/ant": {PICTURES["train/ant"], PICTURES["train2/ant"]},
        "train/bee": {PICTURES["train/bee"], PICTURES["train2/bee"]},
        "test/ant": {PICTURES["test/ant"]},
        "test/bee": {PICTURES["test/bee"]},
    }
    assert [(image.part, image.name) for image in images] == [
        *[("train", "bee")] * 2, *[("train", "ant")] * 2, ("test", "bee"), ("test", "ant"),
    ]  # fmt: skip
    assert [image.file for image in images] == [image.file for image in listed("bee", "ant")]


def test_images_are_named_by_shard_and_row_and_come_in_the_order_of_names_wherever_shards_were_written() -> (
    None
):
    for number in (10, 9, 1):
        write_parquet(OWN / f"s{number}.parquet", [(png(number), "a"), (png(number + 50), "b")])

    images = listed("a", data=DATA.model_copy(update={"test_fraction": 0.1}))

    assert sorted(image.file for image in images) == ["s1.parquet/1", "s10.parquet/1", "s9.parquet/1"]
    train = [image.file for image in images if image.part == "train"]
    assert train == [file for file in ("s1.parquet/1", "s9.parquet/1", "s10.parquet/1") if file in train]
    assert images[0].shown == f"data/raw/own/{train[0].split('/')[0]}: row 1"


def test_one_file_or_a_pattern_may_be_the_source() -> None:
    for name in ("train-0", "train-1", "other"):
        write_parquet(OWN / f"{name}.parquet", [(png(len(name) + index), name) for index in range(2)])

    assert classes("train-*.parquet") == ["train-0", "train-1"]
    assert classes("other.parquet") == ["other"]
    assert classes() == ["other", "train-0", "train-1"]
    with pytest.raises(InputError, match=r"data/raw/own/x\*\.parquet: no file has such a name; correct it"):
        classes("x*.parquet")


def test_an_undivided_data_set_is_called_train_and_its_tests_are_drawn() -> None:
    write_parquet(OWN / "train.parquet", [(png(seed), "a") for seed in range(10)])

    assert [image.part for image in listed("a")].count("test") == 2


def test_numbers_without_names_are_classes_and_the_column_of_classes_may_be_known_by_its_names() -> None:
    write_parquet(OWN / "a.parquet", [(png(1), 10), (png(2), 2)])
    write_parquet(OWN / "b.parquet", [(png(3), 0)], names=["wren"], columns=("img", "fine_label"))

    assert classes() == ["2", "10", "wren"]


def test_bad_rows_of_a_parquet_file_are_named_by_file_and_row() -> None:
    names = ["ant", "bee"]
    write_parquet(OWN / "a.parquet", [(png(1), 0), (png(2), -1), (png(3), None), (None, 1)], names=names)
    write_parquet(OWN / "b.parquet", [(png(4), "a/b"), (png(5), 0.5)][:1])
    write_parquet(OWN / "c.parquet", [(png(6), "bee")], columns=("image", "category"))
    (OWN / "d.parquet").write_bytes(b"PAR1 and no more")

    assert faults("ant", "bee", "cat") == [
        "data/raw/own/a.parquet: row 2: the label is -1, and the file names those from 0 to 1; correct it, or leave "
        "the row out",
        "data/raw/own/a.parquet: row 3: the label is empty; write text or a whole number",
        "data/raw/own/b.parquet: row 1: the label 'a/b' has a path separator; rename the class",
        "data/raw/own/c.parquet: no column label among image, category; name that of the classes so",
        "data/raw/own/d.parquet: not a Parquet file (Parquet magic bytes not found in foote...not a parquet file.); "
        "write it anew, or move it away",
        "data/raw/own/a.parquet: no image has the label 'cat', in no shard; add its images, or correct the task's "
        "classes in params.yaml",
    ]
    (image,) = read_source(OWN, ["bee"], manifest=None).images
    assert image.shown == "data/raw/own/a.parquet: row 4"
    with pytest.raises(ValueError, match="the row has no bytes of an image; write them into the file"):
        image.read()


def test_two_columns_of_images_are_refused_and_one_beside_paths_is_none() -> None:
    both = {"left": [png(1)], "right": [png(2)], "label": ["a"]}
    pq.write_table(pa.table(both), OWN / "two.parquet")

    assert faults("a", manifest="two.parquet")[0] == (
        "data/raw/own/two.parquet: no column image with bytes among left, right, label; name that of the images so"
    )
    (OWN / "1.png").touch()
    pq.write_table(pa.table({"path": ["1.png"], "thumb": [b"x"], "label": ["a"]}), OWN / "list.parquet")
    assert [image.path for image in read_source(OWN, ["a"], manifest="list.parquet").images] == [
        OWN / "1.png"
    ]


def test_bad_members_of_a_tar_file_are_named_by_file_and_member() -> None:
    write_tar(OWN / "a.tar", {"1.png": png(1), "1.cls": b"ant", "2.png": png(2), "3.cls": b"ant", "4.png": png(3),
                              "4.json": b"no JSON"})  # fmt: skip
    write_tar(OWN / "b.tar", {"ant/1.png": png(4), "ant/notes.md": b"x", "loose.png": png(5)})
    with tarfile.open(OWN / "c.tar", "w") as archive:
        for name in ("ant/1.png", "ant/1.png", "ant/2.png"):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = (
                (tarfile.SYMTYPE, "x") if name == "ant/2.png" else (tarfile.REGTYPE, "")
            )
            archive.addfile(member, io.BytesIO())
    (OWN / "d.tar").write_bytes((OWN / "b.tar").read_bytes()[:700])
    (OWN / "e.tar").write_bytes((OWN / "b.tar").read_bytes()[:1024])

    assert faults("ant") == [
        "data/raw/own/a.tar: 2.png: no label; write one into 2.cls",
        "data/raw/own/a.tar: 4.png: no label; write one into 4.cls",
        "data/raw/own/a.tar: 3.cls: there is no image beside it; add it, or remove this",
        "data/raw/own/b.tar: loose.png: no label; put it into a class folder, or its label into KEY.cls beside it",
        "data/raw/own/b.tar: ant/notes.md: not an image by its name; remove it (known are .bmp .gif .jpeg .jpg .pgm "
        ".png .ppm .tif .tiff .webp)",
        "data/raw/own/c.tar: ant/1.png: it stands in the file twice; remove one",
        "data/raw/own/c.tar: ant/2.png: a link, a device or a file with holes; put the file itself there",
        "data/raw/own/d.tar: not a whole, uncompressed tar file (unexpected end of data); write it anew, or move it "
        "away",
        "data/raw/own/e.tar: not a whole, uncompressed tar file (it is cut off, or a header in the middle cannot be "
        "read); write it anew, or move it away",
    ]


def test_images_with_and_without_a_part_are_a_fault() -> None:
    write_parquet(OWN / "a-test.parquet", [(png(1), "a")])
    write_parquet(OWN / "b.parquet", [(png(2), "a")])

    assert faults("a") == [
        "data/raw/own/b.parquet: row 1: no part, which other images have; give all of them a part: train, validation "
        "or test"
    ]


def test_a_parquet_file_is_unpacked_page_by_page_whatever_its_row_groups() -> None:
    row, number = 20_000, 5_120
    schema = pa.schema({"image": pa.binary(), "label": pa.string()})
    with pq.ParquetWriter(OWN / "a.parquet", schema, compression="none", use_dictionary=False) as writer:
        images = [bytes([index % 251]) * row for index in range(number)]
        writer.write_table(pa.table([images, ["a"] * number], schema=schema), row_group_size=number)
    program = """
import sys
from pathlib import Path
import pyarrow as pa
from pipelines.data.sources import read_source

images = read_source(Path(sys.argv[1]), ["a"], manifest=None).images
order = [*range(2560, 5120), *range(2560)]
assert all(images[index].read()[0] == (int(images[index].file.split("/")[1]) - 1) % 251 for index in order)
print(pa.default_memory_pool().max_memory())
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(OWN)], capture_output=True, text=True, check=True
    )

    # Arrow writes pages of at most 1,024 rows, and reads a page as a whole.
    assert int(done.stdout) < 2.5 * 1024 * row
