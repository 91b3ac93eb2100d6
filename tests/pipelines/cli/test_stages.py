"""The commands of the stages say what the stages' functions take, and nothing else."""

from __future__ import annotations

import inspect
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipelines.cli.app import app
from pipelines.project.layout import CODE_STAGE, STAGES
from tests.support.command_line import command_names, command_of
from tests.support.repository import REPOSITORY

FUNCTIONS = {
    **{kind: (f"pipelines.stages.{kind}", kind) for kind in (CODE_STAGE, *STAGES)},
    "run-rank": ("pipelines.stages.fit", "run_rank"),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_command_takes_what_its_function_takes(name: str) -> None:
    """By position an argument, by name alone an option; of the same names, all of them needed but one."""
    module, function = FUNCTIONS[name]
    work = getattr(import_module(module), function)
    taken = inspect.signature(getattr(work, "fn", work)).parameters.values()
    by_position = [p.name for p in taken if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    by_name = [p.name for p in taken if p.kind is inspect.Parameter.KEYWORD_ONLY]
    command = command_of(name)
    kinds = {p.name: p.param_type_name for p in command.params}
    assert kinds == {**dict.fromkeys(by_position, "argument"), **dict.fromkeys(by_name, "option")}
    assert {p.name for p in command.params if not p.required} == ({"out"} if name == "fetch" else set())


def test_every_stage_has_a_command_and_only_fetch_is_for_people() -> None:
    assert set(FUNCTIONS) <= set(command_names())
    assert [name for name in FUNCTIONS if not command_of(name).hidden] == ["fetch"]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_help_of_a_stage_shows_what_its_docstring_says_of_every_option(name: str) -> None:
    shown = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "300"}).output
    module, function = FUNCTIONS[name]
    work = getattr(import_module(module), function)
    text = inspect.getdoc(getattr(work, "fn", work)) or ""
    for line in text.partition("Args:\n")[2].splitlines():
        name_, _, explained = line.strip().partition(": ")
        assert name_.replace("_", "-") in shown
        assert explained in shown


def test_the_help_of_a_stage_loads_no_stage() -> None:
    program = """
import sys
from pipelines.cli.app import app
try:
    app(["fit", "--help"])
except SystemExit:
    pass
print(sorted({"torch", "pyarrow", "prefect", "dvc", "pipelines.stages.fit"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_fetch_writes_to_the_folder_of_its_data_set_unless_told_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("params.yaml", "dvc.yaml"):
        (tmp_path / name).write_bytes((REPOSITORY / name).read_bytes())
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    assert CliRunner().invoke(app, ["fetch", "digits"]).exit_code == 0
    assert (tmp_path / "data" / "raw" / "digits" / "train" / "7").is_dir()
