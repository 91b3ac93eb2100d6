"""The command line: help that fits a screen and comes at once, one line for what the user can mend."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipelines.cli.app import app
from pipelines.project.environment import OUTCOME_FILE
from pipelines.project.errors import GateClosedError
from pipelines.runtime.stage_outcome import GATE, INPUT, StageOutcome, read_outcome
from tests.support.command_line import command_names, command_of
from tests.support.repository import REPOSITORY

COMMANDS = command_names()


def sdlora(*arguments: str, folder: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "COLUMNS": "80", **settings}
    command = [sys.executable, "-m", "pipelines", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("command", [None, *COMMANDS], ids=str)
def test_help_fits_one_screen(command: str | None) -> None:
    shown = CliRunner().invoke(app, [*([command] if command else []), "--help"], env={"COLUMNS": "100"})
    assert shown.exit_code == 0
    assert len(shown.output.splitlines()) <= 32


@pytest.mark.parametrize("command", COMMANDS)
def test_every_argument_and_option_is_explained(command: str) -> None:
    found = command_of(command)
    assert found.help
    assert all(parameter.help for parameter in found.params)


def test_help_loads_nothing_heavy(tmp_path: Path) -> None:
    program = """
import sys
from pipelines.cli.app import app
try:
    app(["--help"])
except SystemExit:
    pass
print(sorted({"torch", "timm", "prefect", "dvc", "pyarrow", "numpy", "pydantic", "PIL"} & set(sys.modules)))
"""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


@pytest.mark.parametrize(
    ("words", "found"),
    [("sdlora au", ["audit"]), ("sdlora predict --f", ["--format"]), ("sdlora fe", ["fetch"])],
)
def test_a_shell_completes_commands_and_options(words: str, found: list[str], tmp_path: Path) -> None:
    asked = {"COMP_WORDS": words, "COMP_CWORD": str(words.count(" ")), "_SDLORA_COMPLETE": "complete_bash"}
    done = sdlora(folder=tmp_path, **asked)
    assert done.stdout.split() == found


def test_the_library_as_a_module_is_the_command_line(tmp_path: Path) -> None:
    shown = [
        subprocess.run(
            [sys.executable, "-m", module, "--version"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for module in ("sdlora", "pipelines")
    ]
    assert shown[0] == shown[1]
    assert shown[0].startswith("sdlora ")


@pytest.mark.parametrize(
    "arguments",
    [["nonsense"], ["fit"], ["split", "t01", "--nonsense"], ["plan", "x", "--tasks", "two"]],
    ids=["unknown command", "missing arguments", "unknown option", "wrong type"],
)
def test_wrong_usage_ends_with_status_2(arguments: list[str]) -> None:
    assert CliRunner().invoke(app, arguments).exit_code == 2


@pytest.mark.parametrize(
    "command", ["run", "status", "start --out x --evaluation y --gate z", "plan x --tasks 2", "add-task x"]
)
def test_outside_a_project_one_line_says_where_to_go(command: str, tmp_path: Path) -> None:
    done = sdlora(*command.split(), folder=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    line = f"error: no params.yaml in {tmp_path}: run sdlora in the folder of the project"
    assert done.stderr == f"{line}, or start one with sdlora init\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("command", "fault"),
    [
        ("plan --tasks 5", "plan: give either a folder of images or --benchmark NAME"),
        ("plan x --benchmark mnist --tasks 5", "plan: give either a folder of images or --benchmark NAME"),
        ("run --dry", "run: --seed, --dry and --force go with --params; give the file of a parameter set"),
    ],
)
def test_options_that_do_not_go_together_are_one_line(command: str, fault: str, tmp_path: Path) -> None:
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copyfile(REPOSITORY / name, tmp_path / name)
    done = sdlora(*command.split(), folder=tmp_path)
    assert (done.returncode, done.stderr) == (2, f"error: {fault}\n")


def test_a_parameter_set_can_be_written_without_running_it(tmp_path: Path) -> None:
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copyfile(REPOSITORY / name, tmp_path / name)
    chosen = REPOSITORY / "experiments" / "cifar100_10_default.yaml"
    done = sdlora("run", "--params", str(chosen), "--seed", "7", "--dry", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "params.yaml: seed: 1993 → 7"
    assert lines[-1] == "params.yaml: tasks: 10 of cifar100, in the order of seed 7"
    assert not (tmp_path / "artifacts").exists()

    done = sdlora("plan", "--benchmark", "mnist", "--tasks", "5", folder=tmp_path)
    assert (
        done.stdout.splitlines()[0]
        == "params.yaml: 10 classes of mnist in 5 tasks, in the order of seed 1993"
    )


def test_an_error_goes_to_the_file_that_the_outer_run_reads_and_is_printed_by_it_alone(
    tmp_path: Path,
) -> None:
    done = sdlora(
        "start",
        "--out",
        "x",
        "--evaluation",
        "y",
        "--gate",
        "z",
        folder=tmp_path,
        SDLORA_OUTCOME_FILE=str(tmp_path / "outcome.json"),
    )
    assert done.returncode == 2
    assert done.stderr == ""
    outcome = read_outcome(tmp_path / "outcome.json")
    assert outcome is not None
    assert (outcome.status, outcome.kind) == (2, INPUT)
    assert outcome.line.startswith("error: no params.yaml in ")


def test_a_closed_gate_is_told_apart_from_other_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines.cli.app import report_error

    monkeypatch.setenv(OUTCOME_FILE, str(tmp_path / "outcome.json"))
    assert report_error(GateClosedError("whatever it says")) == 2
    assert read_outcome(tmp_path / "outcome.json") == StageOutcome(2, GATE, "error: whatever it says")


def test_a_bug_shows_its_traceback_and_ends_with_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from pipelines.cli.app import report_error

    monkeypatch.delenv("SDLORA_OUTCOME_FILE", raising=False)
    with pytest.raises(KeyError) as found:
        _ = {}["key"]
    assert report_error(found.value) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1] == "bug: KeyError: 'key'"


def test_an_interrupted_command_ends_with_one_line(tmp_path: Path) -> None:
    program = """
import time, typer
import pipelines.cli.app as cli

@cli.app.command()
def wait() -> None:
    print("ready", flush=True)
    time.sleep(60)

import sys
sys.argv = ["sdlora", "wait"]
cli.main()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout
        assert process.stderr
        process.stdout.readline()
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == "interrupted; the same command goes on from here\n"
        assert process.wait() == 130


def test_the_version_of_the_package_is_the_one_of_pyproject() -> None:
    from importlib.metadata import version

    text = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    assert re.search(rf'^version = "{re.escape(version("sdlora"))}"$', text, re.MULTILINE)
