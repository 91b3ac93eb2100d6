"""Hashes that are taken ahead are those of the files, and what was not taken is hashed when it is asked for."""

import hashlib
import multiprocessing
import os
from pathlib import Path

import pytest

from pipelines.versioning.file_hashes import FileHashes

NAMES = ("t01/a", "t01/within/b", "t02/c", "alone")


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for name in NAMES:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode() * 500_000)
    return tmp_path


def expected(path: Path) -> tuple[str, str]:
    data = path.read_bytes()
    return hashlib.md5(data, usedforsecurity=False).hexdigest(), hashlib.sha256(data).hexdigest()


def test_hashes_are_those_of_the_files_in_and_out_of_their_turn(files: Path) -> None:
    groups = [[files / "t01", files / "gone"], [files / "t02", files / "alone"]]
    known = {name: expected(files / name) for name in NAMES}
    with FileHashes(groups) as hashes:
        for _ in groups:
            hashes.advance()
            assert {n: (hashes.md5(files / n), hashes.sha256(files / n)) for n in NAMES} == known
    assert hashes.sha256(files / "alone") == FileHashes().sha256(files / "alone") == known["alone"][1]


def test_what_was_taken_ahead_is_not_read_again_until_it_is_forgotten(files: Path) -> None:
    was, path = expected(files / "t01/a"), files / "t01/a"
    with FileHashes([[files / "t01"], []]) as hashes:
        hashes.advance()
        path.unlink()
        assert (hashes.md5(path), hashes.sha256(path)) == was
        hashes.advance()
        with pytest.raises(FileNotFoundError):
            hashes.md5(path)


def test_a_pipe_among_the_files_is_not_waited_for(files: Path) -> None:
    os.mkfifo(files / "t01/pipe")
    with FileHashes([[files / "t01", files / "t01/pipe"]]) as hashes:
        hashes.advance()
        assert hashes.md5(files / "t01/a") == expected(files / "t01/a")[0]


def test_hashes_are_right_where_the_processes_that_take_them_are_killed(files: Path) -> None:
    groups = [[files / "t01"], [files / "t02", files / "alone"]]
    with FileHashes(groups) as hashes:
        for process in multiprocessing.active_children():
            process.kill()
        for _ in groups:
            hashes.advance()
            for name in NAMES:
                assert (hashes.md5(files / name), hashes.sha256(files / name)) == expected(files / name)
