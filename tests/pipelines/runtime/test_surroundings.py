"""A command works whatever its streams, its user and its home are."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.runtime.surroundings import prepare_libraries

SETTLED = "from pipelines.runtime.surroundings import settle; settle(); import os, sys\n"
NAMELESS = [
    *("setpriv", "--reuid", "12345", "--regid", "12345", "--clear-groups"),
    *("--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search"),
]
"""Has a command run as a user without a name, who may read all the same: Python may stand in root's home."""


def run(code: str, streams: str = "", *, before: tuple[str, ...] = (), **settings: str) -> str:
    """Run code after `settle`, with streams as a shell writes them; return what it printed."""
    own = {
        key: value for key, value in os.environ.items() if key not in ("HOME", "USER", "LOGNAME", "LC_ALL")
    }
    command = [*before, sys.executable, "-c", SETTLED + code]
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {streams}', "sh", *command],
        env={**own, **settings},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_a_line_that_a_stream_cannot_show_is_escaped() -> None:
    said = run(r"print('a…ж\udcff'); sys.stderr.write('é')", LC_ALL="C", PYTHONIOENCODING="ascii")
    assert said == "a\\u2026\\u0436\\udcff\n\\xe9"


def test_what_is_started_escapes_too() -> None:
    code = "import subprocess; subprocess.run([sys.executable, '-c', 'print(\"…\")'], check=True)"
    assert run(code, LC_ALL="C", PYTHONIOENCODING="ascii") == "\\u2026\n"


@pytest.mark.parametrize("streams", [">&-", "2>&-", "<&-", "<&- >&- 2>&-"])
def test_a_closed_stream_takes_what_is_written_and_no_file_takes_its_place(
    streams: str, tmp_path: Path
) -> None:
    code = f"""
with open({str(tmp_path / "kept")!r}, "w") as file:
    assert file.fileno() > 2
    print("out"); sys.stdout.flush(); sys.stderr.write("err"); sys.stderr.flush()
    os.system("echo out; echo err >&2")
    file.write("whole")
sys.stdin.read() if sys.argv[1:] else None
"""
    run(code, streams)
    assert (tmp_path / "kept").read_text() == "whole"


@pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("setpriv"), reason="only root may become another user"
)
def test_a_user_without_a_name_has_one_and_a_home() -> None:
    code = "import getpass, pathlib; print(os.getuid(), getpass.getuser(), pathlib.Path.home())"
    assert run(code, before=tuple(NAMELESS)) == "12345 uid-12345 /\n"
    assert run(code, before=tuple(NAMELESS), USER="ann", HOME="/x") == "12345 ann /x\n"


def test_what_libraries_keep_at_home_is_kept_in_the_project_where_home_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for variable in ("XDG_CACHE_HOME", "MPLCONFIGDIR", "PREFECT_HOME", "HF_HUB_VERBOSITY"):
        monkeypatch.setenv(variable, "")  # so that it is as before when the test has ended
        monkeypatch.delenv(variable)
    monkeypatch.setenv("HOME", str(tmp_path))
    prepare_libraries()
    assert "XDG_CACHE_HOME" not in os.environ
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    prepare_libraries()
    assert os.environ["XDG_CACHE_HOME"] == str(tmp_path / ".sdlora" / "cache")
    assert os.environ["MPLCONFIGDIR"] == str(tmp_path / ".sdlora" / "matplotlib")
    assert os.environ["PREFECT_HOME"] == str(tmp_path / ".prefect")
