"""What removed tasks have left goes, and nothing else."""

from __future__ import annotations

from pathlib import Path

from pipelines.project.layout import TASK_FOLDERS
from pipelines.project.leftovers import leftovers, remove_leftovers


def test_the_outputs_of_tasks_that_are_no_more_go_and_nothing_else(tmp_path: Path) -> None:
    artifacts = tmp_path / "artifacts"
    for folder in TASK_FOLDERS:
        for name in ("t00", "t01", "t02", "t100", "t2", "taken", ".t03.partial"):
            (artifacts / folder.name / name).mkdir(parents=True)
    (artifacts / "code").mkdir()
    (artifacts / "model/t03").write_text("a file")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (artifacts / "model/t04").symlink_to(elsewhere)
    assert len(leftovers(["t01"], artifacts)) == 2 * len(TASK_FOLDERS) + 2
    assert remove_leftovers(["t01"], artifacts) == ["t02", "t03", "t04", "t100"]
    assert elsewhere.is_dir()
    for folder in TASK_FOLDERS:
        there = {path.name for path in (artifacts / folder.name).iterdir()}
        assert there == {"t00", "t01", "t2", "taken", ".t03.partial"}
    assert remove_leftovers(["t01"], artifacts) == []
