"""Sources that lie elsewhere, pinned by the hash of each file."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pipelines.data.pins import is_here, pin
from pipelines.data.sources import class_names, read_source
from pipelines.project.errors import InputError
from pipelines.project.files import read_json
from pipelines.project.layout import PINNED
from tests.support.hub import COMMIT, hub
from tests.support.repository import REPOSITORY
from tests.support.shards import png, write_parquet, write_tar

OWN = Path("data/birds")


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    write_parquet(Path("made/train.parquet"), [(png(1), 0), (png(2), 1)], names=["ant", "bee"])
    write_parquet(Path("made/test.parquet"), [(png(3), 0), (png(4), 1)], names=["ant", "bee"])
    write_tar(Path("made/more.tar"), {"1.png": png(5), "1.cls": b"cat"})
    yield
    MemoryFileSystem.store.clear()


def made(*names: str) -> dict[str, bytes]:
    return {name: Path("made", name).read_bytes() for name in names}


def put(name: str, data: bytes) -> None:
    fsspec.filesystem("memory").pipe(f"/bucket/{name}", data)


def refusal(*urls: str) -> str:
    with pytest.raises(InputError) as caught:
        pin(urls, OWN)
    assert not OWN.exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def shown() -> list[str]:
    return [image.shown for image in read_source(OWN, ["ant", "bee"], manifest=None).images]


def test_a_pinned_source_is_read_once_and_recorded_as_it_was_read() -> None:
    for name, data in made("train.parquet", "test.parquet").items():
        put(name, data)
    put("README.md", b"x")

    assert pin(["memory://bucket"], OWN) == [
        f"data/birds/remote.json: 2 files, {sum(map(len, made('train.parquet', 'test.parquet').values())):,} bytes, "
        "pinned by hash",
        "add the classes with `sdlora add-task data/birds`, and commit data/birds/remote.json",
    ]
    record = read_json(OWN / "remote.json")
    assert {file["name"]: file["sha256"] for file in record["files"]} == {
        name: hashlib.sha256(data).hexdigest() for name, data in made("train.parquet", "test.parquet").items()
    }
    fsspec.filesystem("memory").rm("/bucket", recursive=True)  # what follows asks nobody
    assert class_names(OWN, manifest=None, shown="own") == ["ant", "bee"]
    images = read_source(OWN, ["ant", "bee"], manifest=None).images
    assert [image.read() for image in images] == [png(1), png(2), png(3), png(4)]
    assert images[0].shown == "memory:///bucket/train.parquet: row 1"
    assert images[0].file == "train.parquet/1"


def test_what_changed_is_said_by_the_next_pin_and_refused_where_it_would_be_read() -> None:
    put("train.parquet", made("train.parquet")["train.parquet"])
    pin(["memory://bucket/*.parquet"], OWN)
    before = (OWN / "remote.json").read_bytes()
    assert pin(["memory://bucket/*.parquet"], OWN)[1] == "nothing has changed since they were pinned"
    assert (OWN / "remote.json").read_bytes() == before
    put("train.parquet", made("test.parquet")["test.parquet"])

    assert shown() == [
        f"memory:///bucket/train.parquet: row {row}" for row in (1, 2)
    ]  # as they are kept here
    for path in PINNED.glob("?" * 64):
        path.unlink()
    assert not is_here(OWN)
    with pytest.raises(InputError, match=r"it has changed since data/birds/remote\.json pinned it") as caught:
        shown()
    assert "pin the new one with `sdlora pin`" in str(caught.value)
    lines = pin(["memory://bucket/*.parquet"], OWN)
    assert lines[1] == "changed or new: memory:///bucket/train.parquet"
    assert is_here(OWN)


def test_what_is_kept_is_compared_before_it_is_used() -> None:
    put("train.parquet", made("train.parquet")["train.parquet"])
    pin(["memory://bucket/train.parquet"], OWN)
    (kept,) = PINNED.glob("?" * 64)
    data = bytearray(kept.read_bytes())
    data[10] ^= 1
    kept.write_bytes(data)
    os.utime(kept, ns=(0, 0))

    assert read_source(OWN, ["ant"], manifest=None).images[0].read() == png(1)
    assert hashlib.sha256(kept.read_bytes()).hexdigest() == kept.name


def test_several_places_make_one_source() -> None:
    put("train.parquet", made("train.parquet")["train.parquet"])
    with hub(made("more.tar")) as (address, _):
        pin(["memory://bucket/train.parquet", f"{address}/more.tar"], OWN)

    assert class_names(OWN, manifest=None, shown="own") == ["ant", "bee", "cat"]


@pytest.mark.parametrize(
    ("url", "fault"),
    [
        pytest.param("data/x", "data/x: not a URL; give one such as s3://bucket/folder", id="path"),
        pytest.param(
            "memory://bucket/none", "memory://bucket/none: no file there ends in .parquet or .tar", id="none"
        ),
        pytest.param("memory://bucket/x.tar", "memory:///bucket/x.tar: it cannot be read (", id="absent"),
        pytest.param(
            "what://x/y.tar", "what://x/y.tar: it cannot be read (Protocol not known: what", id="protocol"
        ),
        pytest.param(
            "https://me:word@x.org/a.tar", "https://…x.org: a password in the URL would be kept", id="secret"
        ),
        pytest.param(
            "https://x.org/a.zip", "https://x.org/a.zip: no file there ends in .parquet or .tar", id="kind"
        ),
        pytest.param(
            "hf://own/birds", "hf://own/birds: not a data set of the hub; write hf://datasets/", id="hub"
        ),
        pytest.param(
            "http://127.0.0.1:1/a.tar", "http://127.0.0.1:1/a.tar: it cannot be read (", id="refused"
        ),
    ],
)
def test_what_cannot_be_pinned_is_one_line(url: str, fault: str) -> None:
    assert refusal(url).startswith(fault)


def test_two_files_of_a_name_and_a_folder_of_images_are_refused() -> None:
    put("a/x.tar", b"")
    put("b/x.tar", b"")
    assert refusal("memory://bucket/a", "memory://bucket/b") == (
        "memory:///bucket/b/x.tar: a second x.tar, beside memory:///bucket/a/x.tar; pin each alone"
    )
    OWN.mkdir(parents=True)
    (OWN / "ant").mkdir()
    with pytest.raises(InputError, match="data/birds: ant stands there; pin a source in a folder of its own"):
        pin(["memory://bucket/a"], OWN)


def test_a_pin_that_is_broken_is_one_line() -> None:
    OWN.mkdir(parents=True)
    (OWN / "remote.json").write_text(
        '{"files": [{"name": "a.tar", "url": "memory://x", "sha256": "0", "size": 1}]}'
    )

    with pytest.raises(InputError, match=re.escape("write it again with `sdlora pin`")):
        class_names(OWN, manifest=None, shown="own")


@pytest.mark.parametrize("path", ["/data", "/data/*.parquet", "@main/data", "@refs/convert/parquet/data"])
def test_a_data_set_of_the_hub_is_pinned_to_the_commit_of_its_revision(path: str, tmp_path: Path) -> None:
    files = {f"data/{name}": data for name, data in made("train.parquet", "test.parquet").items()}
    with hub(files) as (address, _):
        done = subprocess.run(
            [sys.executable, "-c", "import sys; from pathlib import Path; from pipelines.data.pins import pin; "
             f"pin([sys.argv[1]], Path('{OWN}'))", f"hf://datasets/own/birds{path}"],
            env={**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": str(REPOSITORY),
                 "HF_HUB_DISABLE_TELEMETRY": "1"},
            capture_output=True, text=True,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr

    urls = {file["url"] for file in json.loads((OWN / "remote.json").read_text())["files"]}
    assert urls == {f"hf://datasets/own/birds@{COMMIT}/data/{name}.parquet" for name in ("train", "test")}
    assert [found.rpartition("/")[2] for found in shown()] == [
        "train.parquet: row 1", "train.parquet: row 2", "test.parquet: row 1", "test.parquet: row 2",
    ]  # fmt: skip
