"""Which errors the user can mend, and the one line that each becomes."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path

from pipelines.project.error_text import user_message
from pipelines.project.errors import InputError


def raised(function: Callable[[], object]) -> Exception:
    try:
        function()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def test_a_missing_file_is_an_error_of_one_line_that_names_it(tmp_path: Path) -> None:
    error = raised((tmp_path / "weights").read_bytes)
    assert user_message(error) == f"No such file or directory ({tmp_path / 'weights'})"


def test_a_full_disk_is_an_error_of_one_line() -> None:
    line = user_message(OSError(errno.ENOSPC, "No space left on device", "artifacts/fit/t01"))
    assert line
    assert line.startswith("the disk is full (artifacts/fit/t01)")


def test_a_value_error_of_ours_is_the_users_and_one_of_a_library_is_a_bug() -> None:
    from pipelines.project.files import natural_key
    from sdlora.metrics import accuracy_matrix

    ours = raised(lambda: accuracy_matrix([[0.5, 0.5]]))
    assert isinstance(ours, ValueError)
    assert user_message(ours) == str(ours)
    assert user_message(raised(lambda: json.loads("{"))) is None
    assert user_message(raised(lambda: natural_key(3))) is None  # type: ignore[arg-type]


def test_a_missing_file_that_this_code_names_itself_is_the_users(tmp_path: Path) -> None:
    from sdlora.loading import read_step

    error = raised(lambda: read_step(tmp_path / "t05"))
    assert isinstance(error, FileNotFoundError)
    assert user_message(error) == str(error)
    assert user_message(OSError("a library's own")) is None


def test_an_error_of_several_lines_becomes_one() -> None:
    assert user_message(InputError("a\n  b")) == "a b"
