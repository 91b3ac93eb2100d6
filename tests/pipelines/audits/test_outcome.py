"""What `sdlora audit verify` says and ends with, whatever it finds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.audits.outcome import Checks, show_verification
from pipelines.project.errors import InputError
from pipelines.versioning.project_lock import no_run, only_run
from tests.support.commands import call_here
from tests.support.repository import REPOSITORY


@pytest.fixture
def project(make_project: Callable[[dict[str, str]], Path]) -> Path:
    names = ("params.yaml", "dvc.yaml")
    return make_project({name: (REPOSITORY / name).read_text(encoding="utf-8") for name in names})


def test_nothing_is_verified_while_a_run_is_at_work(project: Path) -> None:
    with only_run():
        assert call_here(project, "audit", "verify", status=3) == "a run is at work: not verified\n"
        said = json.loads(call_here(project, "audit", "verify", "--json", status=3))
        assert said == {"holds": None, "fault": "a run is at work: not verified"}
    with pytest.raises(InputError, match=r"dvc\.lock: the file is missing"):
        show_verification(Checks(), as_json=False)


def test_audits_read_at_once_and_keep_a_run_away(project: Path) -> None:
    with no_run() as first, no_run() as second:
        assert (first, second) == (True, True)
        with (
            pytest.raises(InputError, match=r"another sdlora run is at work in .*, or an audit reads it"),
            only_run(),
        ):
            pass
    with only_run(), no_run() as alone:
        assert alone is False


def test_a_checkout_that_cannot_be_written_to_is_verified_all_the_same(project: Path) -> None:
    shutil.rmtree(project / ".sdlora", ignore_errors=True)
    (project / ".sdlora").touch()
    with no_run() as alone:
        assert alone
