import errno
import os
from pathlib import Path

import pytest

from pipelines.project.errors import InputError
from pipelines.project.files import (
    naming,
    natural_key,
    read_json,
    sha256_of,
    whole_folder,
    write_json,
    write_whole,
)
from pipelines.project.schemas import ClassMap


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def interrupt_after_writing(path: Path) -> None:
    path.write_text("new")
    raise KeyboardInterrupt


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_whole_folder_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")

    with whole_folder(tmp_path / "out") as folder:
        (folder / "new").write_text("new")

    assert names(tmp_path) == {"out"}
    assert names(tmp_path / "out") == {"new"}


def test_a_folder_whose_making_fails_leaves_the_old_one_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")

    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "out") as folder:
        interrupt_after_writing(folder / "new")

    assert names(tmp_path) == {"out"}
    assert (tmp_path / "out" / "old").read_text() == "old"


def test_what_a_killed_run_left_is_not_in_the_next_folder(tmp_path: Path) -> None:
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "half").write_text("ha")

    with whole_folder(tmp_path / "out") as folder:
        assert names(folder) == set()

    assert names(tmp_path) == {"out"}


def test_a_linked_output_is_replaced_and_what_it_points_to_stays(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "kept").write_text("kept")
    (tmp_path / "out").symlink_to(tmp_path / "cache")

    with whole_folder(tmp_path / "out") as folder:
        (folder / "new").write_text("new")

    assert not (tmp_path / "out").is_symlink()
    assert names(tmp_path / "cache") == {"kept"}


def test_a_disk_that_fills_up_in_mid_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_whole(path, b"old")
    monkeypatch.setattr("os.fsync", full_disk)

    with pytest.raises(OSError, match=r"No space left on device: '.*/file'"):
        write_whole(path, b"new")

    assert path.read_bytes() == b"old"
    assert names(tmp_path) == {"file"}


def test_an_error_that_names_a_file_keeps_its_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"'.*absent'"), naming(tmp_path / "other"):
        (tmp_path / "absent").read_bytes()


def test_equal_values_make_equal_json_bytes(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": "ä", "a": [1]})
    write_json(tmp_path / "b.json", {"a": [1], "b": "ä"})

    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert (tmp_path / "a.json").read_text() == '{\n  "a": [\n    1\n  ],\n  "b": "ä"\n}\n'
    assert read_json(tmp_path / "a.json") == {"a": [1], "b": "ä"}


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        pytest.param(None, "the file is missing; run `sdlora run`", id="missing"),
        pytest.param(b"{", r"not a JSON file \(.*\); delete it", id="cut-off"),
        pytest.param(b"\xff", r"not a JSON file \(.*\); delete it", id="not-text"),
        pytest.param(b"NaN", r"not a JSON file \(a number that is NaN\); delete it", id="nan"),
        pytest.param(b"1e999", r"not a JSON file \(a number that is 1e999\); delete it", id="infinite"),
        pytest.param(
            b'{"a": 1, "a": 2}', r"not a JSON file \(a key stands twice .*\); delete it", id="twice"
        ),
        pytest.param(b"[" * 100_000, r"more than 64 levels deep; delete it", id="deep"),
        pytest.param(b"[" * 70 + b"]" * 70, r"more than 64 levels deep; delete it", id="deeper-than-allowed"),
        pytest.param(b"9" * 5000, r"not a JSON file \(.*\); delete it", id="long-number"),
    ],
)
def test_json_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None, fault: str) -> None:
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)

    with pytest.raises(InputError, match=rf"a\.json: {fault}"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        ([], "it is an object|it is a list, expected an object"),
        ({"classes": []}, "it lacks tasks"),
        ({"classes": {}, "tasks": []}, "classes is an object, expected a list"),
        ({"classes": [], "tasks": ["t1"]}, r"tasks\[0\] is 't1', expected a step such as t03"),
        (
            {"classes": [{"label": True, "name": "a", "task": "t01"}], "tasks": []},
            r"classes\[0\]\.label is True, expected a whole",
        ),
        (
            {"classes": [{"label": 0, "name": "a\nb", "task": "t01"}], "tasks": []},
            r"classes\[0\]\.name is .*, expected one line",
        ),
        (
            {"classes": [{"label": -1, "name": "a", "task": "t01"}], "tasks": []},
            r"classes\[0\]\.label is -1, expected",
        ),
    ],
)
def test_json_of_another_type_is_refused_with_the_place(tmp_path: Path, value: object, fault: str) -> None:
    write_json(tmp_path / "classes.json", value)

    with pytest.raises(InputError, match=rf"classes\.json: ({fault}).*; delete it and run `sdlora run`"):
        read_json(tmp_path / "classes.json", ClassMap)


def test_a_large_file_and_a_pipe_are_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "large.json").open("wb") as file:
        file.truncate(20 * 2**30)
    os.mkfifo(tmp_path / "pipe.json")

    for name, fault in (("large", "it has 21,474,836,480 bytes"), ("pipe", "not a regular file")):
        with pytest.raises(InputError, match=fault):
            read_json(tmp_path / f"{name}.json")


def test_the_hash_of_a_file_is_that_of_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")

    assert sha256_of(tmp_path / "abc").startswith("ba7816bf8f01cfea")


def test_natural_order_counts_numbers_and_separates_unequal_names() -> None:
    given = ["img10.png", "img2.png", "b", "10", "9", "09", "Å", "a1b"]

    assert sorted(given, key=natural_key) == ["09", "9", "10", "a1b", "b", "img2.png", "img10.png", "Å"]
    assert natural_key("09") != natural_key("9")
