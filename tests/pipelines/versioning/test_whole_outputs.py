"""A stage reads outputs of earlier steps that are not here from DVC's cache, and leaves the workspace as it is."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipelines.data.split_chain import SPLIT, read_splits
from pipelines.project.errors import InputError
from pipelines.versioning.artifacts import whole_outputs
from sdlora.model_folder import read_model
from tests.support.commands import call_here
from tests.support.folders import contents

pytestmark = pytest.mark.slow


@pytest.fixture
def project(finished: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished chain as a worker may have it: of the first step there is the record of the model alone."""
    folder = tmp_path / "project"
    shutil.copytree(finished[0], folder, symlinks=True)
    record = (folder / "artifacts/model/t01/step.json").read_bytes()
    for kind in ("model", "split"):
        shutil.rmtree(folder / f"artifacts/{kind}/t01")
    (folder / "artifacts/model/t01").mkdir()
    (folder / "artifacts/model/t01/step.json").write_bytes(record)
    monkeypatch.chdir(folder)
    return folder


def test_a_step_is_evaluated_to_the_same_bytes_without_the_folders_of_earlier_ones(project: Path) -> None:
    call_here(
        project, "evaluate", "t02", "--model", "artifacts/model/t02", "--backbone", "artifacts/model/t00",
        "--split", "artifacts/split/t02", "--out", "evaluated",
    )  # fmt: skip

    assert contents(project / "evaluated") == contents(project / "artifacts/evaluation/t02")
    assert [path.name for path in (project / "artifacts/model/t01").iterdir()] == ["step.json"]
    assert not (project / "artifacts/split/t01").exists()


def test_what_is_whole_is_read_where_it_is(project: Path) -> None:
    with whole_outputs(Path("artifacts/model/t02"), "step.json") as found:
        assert found("t02") == Path("artifacts/model/t02")
        assert found("t01") != Path("artifacts/model/t01")
        read_model(found("t02"), beside=found, statistics=True)


def test_what_is_nowhere_is_one_line(project: Path) -> None:
    shutil.rmtree(project / ".dvc/cache")

    with (
        pytest.raises(
            InputError, match=r"artifacts/split/t01: it is neither here nor in DVC's cache or remote"
        ),
        whole_outputs(Path("artifacts/split/t02"), SPLIT) as found,
    ):
        read_splits(found("t02"), found)


def test_an_earlier_file_that_was_changed_is_refused(project: Path) -> None:
    shutil.rmtree(project / "artifacts/model/t01")
    shutil.copytree(project / "artifacts/model/t02", project / "artifacts/model/t01")

    with (
        pytest.raises(ValueError, match=r"t01/step\.json: not the record that step t02 was made from"),
        whole_outputs(Path("artifacts/model/t02"), "step.json") as found,
    ):
        read_model(found("t02"), beside=found)
