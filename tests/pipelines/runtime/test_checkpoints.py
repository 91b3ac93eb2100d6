"""Checkpoints are whole or not there, belong to exactly one set of inputs, and do not pile up."""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from pipelines.project.errors import InputError
from pipelines.runtime import checkpoints
from pipelines.runtime.checkpoints import CheckpointStore, input_key
from sdlora.training import EpochRecord, Snapshot


def snapshot(step: int) -> Snapshot:
    return Snapshot(
        step=step,
        tensors={"parameter/a": torch.full((3,), float(step)), "sums": torch.zeros(2, dtype=torch.float64)},
        curve=[EpochRecord(2, 1, 0.1 + step, 0.5, 0.01)],
    )


@pytest.fixture(params=["folder", "file-url", "memory-url"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return {
        "folder": str(tmp_path / "store"),
        "file-url": f"file://{tmp_path}/store",
        "memory-url": f"memory://{tmp_path.name}",
    }[request.param]


def test_the_newest_snapshot_comes_back_to_the_bit(url: str) -> None:
    store = CheckpointStore(url, "key")
    store.save(snapshot(3))
    store.save(snapshot(12))
    found = next(CheckpointStore(url, "key").newest())

    assert found.step == 12
    assert found.curve == snapshot(12).curve
    assert found.tensors.keys() == snapshot(12).tensors.keys()
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in snapshot(12).tensors.items())


def test_two_snapshots_are_kept(url: str) -> None:
    store = CheckpointStore(url, "key")
    for step in (1, 2, 3, 4):
        store.save(snapshot(step))

    assert [found.step for found in store.newest()] == [4, 3]


def test_a_snapshot_of_other_inputs_is_not_picked_up(url: str) -> None:
    CheckpointStore(url, "key").save(snapshot(3))

    assert list(CheckpointStore(url, "other").newest()) == []


@pytest.mark.parametrize("damage", ["truncated", "one bit flipped", "empty"])
def test_a_damaged_snapshot_is_passed_over_with_a_warning(
    damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = CheckpointStore(str(tmp_path), "key")
    store.save(snapshot(1))
    store.save(snapshot(2))
    newest = max((tmp_path / "key").iterdir())
    data = newest.read_bytes()
    flipped = data[:-1] + bytes([data[-1] ^ 1])
    newest.write_bytes({"truncated": data[:-9], "one bit flipped": flipped, "empty": b""}[damage])

    assert [found.step for found in store.newest()] == [1]
    assert "is damaged; going on from the one before" in capsys.readouterr().err


def test_a_half_written_snapshot_is_not_seen(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path), "key")
    store.save(snapshot(1))
    (tmp_path / "key" / "000000002-00.safetensors.partial").write_bytes(b"half")

    assert [found.step for found in store.newest()] == [1]


def test_a_damaged_snapshot_is_not_one_of_the_two_and_is_replaced_by_a_whole_one(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        CheckpointStore(str(tmp_path), "key").save(snapshot(step))
    newest = max((tmp_path / "key").iterdir())
    newest.write_bytes(b"")
    resumed = CheckpointStore(str(tmp_path), "key")
    assert next(resumed.newest()).step == 2
    resumed.save(snapshot(3))
    assert [found.step for found in CheckpointStore(str(tmp_path), "key").newest()] == [3, 2]

    newest.write_bytes(b"")
    resumed = CheckpointStore(str(tmp_path), "key")
    assert next(resumed.newest()).step == 2
    resumed.save(snapshot(4))
    assert [found.step for found in CheckpointStore(str(tmp_path), "key").newest()] == [4, 2]


def test_with_no_whole_snapshot_left_there_is_none(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    store = CheckpointStore(url, "key")
    for step in (1, 2):
        store.save(snapshot(step))
    for name in store._names():
        store._fs.pipe_file(name, b"")

    assert list(store.newest()) == []
    assert capsys.readouterr().err.count("is damaged") == 2


def test_a_snapshot_that_vanishes_is_passed_over_and_what_came_instead_is_found(
    url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process that works at the same fit goes on while this one looks for where to begin."""
    reader, writer = CheckpointStore(url, "key"), CheckpointStore(url, "key")
    for step in (1, 2):
        writer.save(snapshot(step))
    bytes_of = reader._bytes

    def slowly(name: str) -> bytes | None:
        if "000000002" in name:
            for step in (3, 4):
                writer.save(snapshot(step))
        return bytes_of(name)

    monkeypatch.setattr(reader, "_bytes", slowly)
    assert next(reader.newest()).step == 4
    assert capsys.readouterr().err.count("has vanished") == 2


def test_writers_of_one_fit_do_not_disturb_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each state is written by several at once; everyone who reads meanwhile finds whole ones only."""
    monkeypatch.setattr(checkpoints, "WRITE_WAITS", ())
    failures: list[str] = []

    def work() -> None:
        store = CheckpointStore(str(tmp_path), "key")
        for step in range(1, 40):
            if not store.save(snapshot(step)):
                failures.append(f"step {step} was not saved")
            if step > 2 and next(store.newest()).step < step - 1:
                failures.append(f"after step {step} an older one is the newest")

    writers = [threading.Thread(target=work) for _ in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()

    assert failures == []
    assert [found.step for found in CheckpointStore(str(tmp_path), "key").newest()] == [39, 38]
    assert len(list((tmp_path / "key").iterdir())) == 2


class ObjectStore(MemoryFileSystem):
    """Shows a file when it is whole and cannot rename, as object stores; fails as often as it is told to."""

    protocol = "objects"
    store: dict[str, Any] = {}  # noqa: RUF012 - as in fsspec's own
    failures = 0
    calls: list[str] = []  # noqa: RUF012

    def _fail(self, call: str) -> None:
        ObjectStore.calls.append(call)
        if ObjectStore.failures:
            ObjectStore.failures -= 1
            raise TimeoutError("the endpoint does not answer")

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: object) -> None:
        self._fail("write")
        super().pipe_file(path, value, mode=mode, **kwargs)

    def cat_file(
        self, path: str, start: int | None = None, end: int | None = None, **kwargs: object
    ) -> bytes:
        self._fail("read")
        return bytes(super().cat_file(path, start, end, **kwargs))

    def ls(self, path: str, detail: bool = True, **kwargs: object) -> list[Any]:
        self._fail("list")
        return list(super().ls(path, detail=detail, **kwargs))

    def cp_file(self, path1: str, path2: str, **kwargs: object) -> None:
        self._fail("copy")
        super().cp_file(path1, path2, **kwargs)


@pytest.fixture
def objects(monkeypatch: pytest.MonkeyPatch) -> Callable[[], CheckpointStore]:
    """A store whose every call is noted, and that waits for nothing."""
    fsspec.register_implementation("objects", ObjectStore, clobber=True)
    for waits in ("WRITE_WAITS", "READ_WAITS"):
        monkeypatch.setattr(checkpoints, waits, [0.0] * len(getattr(checkpoints, waits)))
    monkeypatch.setattr(ObjectStore, "store", {})
    monkeypatch.setattr(ObjectStore, "pseudo_dirs", [""])
    monkeypatch.setattr(ObjectStore, "failures", 0)
    monkeypatch.setattr(ObjectStore, "calls", [])
    return lambda: CheckpointStore("objects://bucket/checkpoints", "key")


def test_an_object_store_is_written_to_once_and_never_copied_within(
    objects: Callable[[], CheckpointStore],
) -> None:
    objects().save(snapshot(1))

    assert [call for call in ObjectStore.calls if call != "list"] == ["write"]
    assert next(objects().newest()).step == 1


def test_a_store_that_fails_for_a_moment_costs_nothing(objects: Callable[[], CheckpointStore]) -> None:
    ObjectStore.failures = len(checkpoints.WRITE_WAITS)
    assert objects().save(snapshot(1))
    ObjectStore.failures = len(checkpoints.READ_WAITS)
    assert next(objects().newest()).step == 1
    ObjectStore.failures = 1
    assert [found.step for found in objects().newest()] == [1]


def test_a_store_that_takes_nothing_costs_a_warning(
    objects: Callable[[], CheckpointStore], capsys: pytest.CaptureFixture[str]
) -> None:
    ObjectStore.failures = 1000
    assert not objects().save(snapshot(7))
    assert capsys.readouterr().err == (
        "warning: no checkpoint of step 7 could be kept (TimeoutError: the endpoint does not answer); going on\n"
    )
    ObjectStore.failures = 0
    assert objects().save(snapshot(8))


def test_a_store_that_cannot_be_read_is_an_error_and_not_a_fresh_start(
    objects: Callable[[], CheckpointStore],
) -> None:
    objects().save(snapshot(1))
    ObjectStore.failures = 1000
    with pytest.raises(InputError, match=r"objects://bucket/checkpoints cannot be read \(TimeoutError: the"):
        next(objects().newest())


@pytest.mark.parametrize("url", ["s4://bucket", "gs://bucket"], ids=["unknown", "not-installed"])
def test_a_kind_of_store_that_is_not_there_is_one_line(url: str) -> None:
    with pytest.raises(InputError, match=rf"training\.checkpoint_store: {url}: .*(gcsfs|s4)"):
        CheckpointStore(url, "key")


KEYS = {name: f"{number:032x}" for number, name in enumerate(("this", "old", "young"))}


def test_old_fits_are_forgotten_and_young_ones_and_this_one_are_not(tmp_path: Path) -> None:
    for key in KEYS.values():
        CheckpointStore(str(tmp_path), key).save(snapshot(1))
    for name in ("this", "old"):
        age(tmp_path / KEYS[name])
    CheckpointStore(str(tmp_path), KEYS["this"]).forget_old()

    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([KEYS["this"], KEYS["young"]])


def test_forgetting_touches_nothing_that_is_not_a_checkpoint(tmp_path: Path) -> None:
    """The store may be a folder or a bucket with other things in it."""
    (tmp_path / "photographs").mkdir()
    (tmp_path / "photographs/cat.jpeg").write_bytes(b"a cat")
    CheckpointStore(str(tmp_path), KEYS["old"]).save(snapshot(1))
    (tmp_path / KEYS["old"] / "notes.txt").write_text("mine")
    (tmp_path / "readme").write_text("mine too")
    before = sorted(tmp_path.rglob("*"))
    for folder in tmp_path.iterdir():
        if folder.is_dir():
            age(folder)
    CheckpointStore(str(tmp_path), KEYS["this"]).forget_old()

    assert sorted(tmp_path.rglob("*")) == before


def test_a_store_that_fails_while_it_is_tidied_costs_a_warning(
    objects: Callable[[], CheckpointStore], capsys: pytest.CaptureFixture[str]
) -> None:
    ObjectStore.failures = 1
    objects().forget_old()

    assert capsys.readouterr().err.startswith(
        "warning: old checkpoints in objects://bucket/checkpoints could not"
    )


def test_what_a_killed_process_had_half_written_is_removed_when_it_is_old(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path), "key")
    store.save(snapshot(1))
    whole = next((tmp_path / "key").iterdir()).name
    for name, hours in ((f"{whole}.{0:032x}.partial", 2), (f"{whole}.{1:032x}.partial", 0)):
        path = tmp_path / "key" / name
        path.write_bytes(b"half")
        os.utime(path, (time.time() - hours * 3600,) * 2)
    store.save(snapshot(2))

    partial = [path.name for path in (tmp_path / "key").iterdir() if path.suffix == ".partial"]
    assert partial == [f"{whole}.{1:032x}.partial"]


def age(folder: Path) -> None:
    """Make all files of a folder twenty days old."""
    long_ago = time.time() - 20 * 86400
    for path in folder.iterdir():
        os.utime(path, (long_ago, long_ago))


def test_the_key_changes_with_every_setting_and_every_byte_of_the_inputs(tmp_path: Path) -> None:
    file = tmp_path / "train.arrow"
    file.write_bytes(b"images")
    key = input_key({"seed": 1}, [file])

    assert input_key({"seed": 1}, [file]) == key
    assert input_key({"seed": 2}, [file]) != key
    file.write_bytes(b"imageS")
    assert input_key({"seed": 1}, [file]) != key
