"""Checkpoints are whole or not there, belong to exactly one set of inputs, and do not pile up."""

import os
import time
from pathlib import Path

import pytest
import torch

from pipelines.checkpoints import CheckpointStore, input_key
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


def test_old_fits_are_forgotten_and_young_ones_and_this_one_are_not(tmp_path: Path) -> None:
    for key in ("this", "old", "young"):
        CheckpointStore(str(tmp_path), key).save(snapshot(1))
    long_ago = time.time() - 20 * 86400
    for key in ("this", "old"):
        for path in (tmp_path / key).iterdir():
            os.utime(path, (long_ago, long_ago))
    CheckpointStore(str(tmp_path), "this").forget_old()

    assert sorted(path.name for path in tmp_path.iterdir()) == ["this", "young"]


def test_the_key_changes_with_every_setting_and_every_byte_of_the_inputs(tmp_path: Path) -> None:
    file = tmp_path / "train.arrow"
    file.write_bytes(b"images")
    key = input_key({"seed": 1}, [file])

    assert input_key({"seed": 1}, [file]) == key
    assert input_key({"seed": 2}, [file]) != key
    file.write_bytes(b"imageS")
    assert input_key({"seed": 1}, [file]) != key
