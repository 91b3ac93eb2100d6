"""What a stage cost is kept beside the ledger, and never costs the stage."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from pipelines.ledger.journal import keep_cost
from pipelines.orchestration.stage_runs import launch
from pipelines.project.files import read_json, sha256_of
from pipelines.runtime.stage import Stage, StageResult


def a_stage(folder: Path) -> Stage:
    def work(task: str, *, out: Path) -> StageResult:
        out.mkdir(parents=True)
        (out / "step.json").write_text("{}")
        return StageResult([{"task": task, "images": 3}, {"task": task, "images": 4}])

    return Stage("freeze", work)


def test_a_stage_that_ended_leaves_what_it_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    launch(a_stage(tmp_path), task="t01", out=Path("out"))
    found = read_json(Path("ledger/journal/freeze@t01.json"))

    assert found["stage"] == "freeze@t01"
    assert found["images"] == 7
    assert found["output"] == {"step.json": sha256_of(Path("out/step.json"))}
    assert found["peak_memory"] > 10_000_000
    assert 0 <= found["seconds"] < 60
    assert found["commit"] is None


def test_a_commit_is_named_with_whether_files_differ_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a").write_text("1")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "a"], ["commit", "-qm", "one"], ["tag", "v1"]):
        subprocess.run([*git, *command], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    for content, expected in (("1", head), ("2", f"{head}+")):
        Path("a").write_text(content)
        keep_cost("fit@t01", {"out": Path("out")}, StageResult([]), seconds=1.0)
        assert read_json(Path("ledger/journal/fit@t01.json"))["commit"] == expected


def test_a_journal_that_cannot_be_written_costs_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("ledger").write_text("a file, where a folder should be")
    keep_cost("fit@t01", {"out": Path("out")}, StageResult([]), seconds=1.0)
    assert capsys.readouterr().err == (
        "warning: fit@t01 is done, but its cost could not be written to ledger/journal (Not a directory)\n"
    )
