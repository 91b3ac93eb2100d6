"""dvc.yaml says the truth: every stage depends on just the code and the parameters that make its bytes."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

REPOSITORY = Path(__file__).resolve().parents[2]
STAGES: dict[str, dict[str, Any]] = YAML(typ="safe").load((REPOSITORY / "dvc.yaml").read_text())["stages"]

CANNOT_CHANGE_BYTES = {
    "pipelines/__init__.py",
    "pipelines/cli.py",
    "pipelines/downloads.py",  # what it hands on has the hash that is recorded beside the address
    "pipelines/errors.py",
    "pipelines/journal.py",
    "pipelines/members.py",
    "pipelines/processes.py",
    "pipelines/params.py",  # the values are params of the stage
    "pipelines/progress.py",
    "pipelines/receipts.py",  # what it gives back has the hash that the receipt names
    "pipelines/stage.py",
    "sdlora/__init__.py",
}

DATA_OF_CODE = {
    "fetch": {"pipelines/embedded/${key}"},
    "backbone": {"sdlora/weights"},
    "report": {"pipelines/templates"},
}
"""Files beside the code that a stage reads."""

NOT_OF_THE_RESULT = {"checkpoint_seconds", "checkpoint_store"}
"""Training keys that change when and where a fit saves itself, and nothing of what it learns."""


def stage(name: str) -> dict[str, Any]:
    return STAGES[name].get("do", STAGES[name])


def module_file(name: str) -> str | None:
    """The file of a module of this repository."""
    path = name.replace(".", "/")
    for candidate in (f"{path}.py", f"{path}/__init__.py"):
        if (REPOSITORY / candidate).is_file():
            return candidate
    return None


def imported(file: str) -> set[str]:
    """The files of this repository that a file imports when it runs, and the packages loaded on the way."""
    found = set()
    for node in running(ast.parse((REPOSITORY / file).read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            if name.partition(".")[0] in ("pipelines", "sdlora"):
                parents = name.split(".")
                found |= {module_file(".".join(parents[: i + 1])) for i in range(len(parents))}
    return {name for name in found if name}


def running(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those that only a type checker reads."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        yield node
        yield from running(node)


def closure(file: str) -> set[str]:
    """All files of this repository that can change what a module does."""
    seen: set[str] = set()
    waiting = {file}
    while waiting:
        current = waiting.pop()
        if current not in seen | CANNOT_CHANGE_BYTES:
            seen.add(current)
            waiting |= imported(current)
    return seen


def code(name: str) -> set[str]:
    """The code that a stage lists; a folder stands for the modules in it."""
    listed = {dep for dep in stage(name)["deps"] if dep.startswith(("pipelines/", "sdlora/"))}
    packages = {dep for dep in listed if (REPOSITORY / dep / "__init__.py").is_file()}
    files = {file for dep in packages for file in (REPOSITORY / dep).rglob("*.py")}
    return listed - packages | {str(file.relative_to(REPOSITORY)) for file in files}


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_depends_on_just_the_code_that_it_runs(name: str) -> None:
    listed = code(name)
    needed = closure(f"pipelines/{name}.py") | DATA_OF_CODE.get(name, set())
    advice = f"\n{name}: add {sorted(needed - listed)}\n{name}: remove {sorted(listed - needed)}"
    if listed != needed:
        pytest.fail(advice)


@pytest.mark.parametrize("name", STAGES)
def test_every_file_of_code_that_a_stage_lists_exists(name: str) -> None:
    from pipelines.fetch import KNOWN

    keys = KNOWN if name == "fetch" else ["t01"]
    code = [dep for dep in stage(name)["deps"] if dep.startswith(("pipelines/", "sdlora/"))]
    paths = {dep.replace("${key}", key) for dep in code for key in keys}
    assert not [path for path in paths if not (REPOSITORY / path).exists()]


def test_a_fit_is_keyed_by_every_training_parameter_that_matters_and_no_other() -> None:
    from pipelines.params import Training

    listed = {key.removeprefix("training.") for key in stage("fit")["params"] if key.startswith("training.")}
    assert listed == set(Training.model_fields) - NOT_OF_THE_RESULT


def test_a_fit_is_keyed_by_every_adapter_parameter_but_those_of_the_freezing() -> None:
    from pipelines.params import AT_FREEZING, Adapter

    listed = {key.removeprefix("adapter.") for key in stage("fit")["params"] if key.startswith("adapter.")}
    assert listed == set(Adapter.model_fields) - AT_FREEZING
    assert "adapter" in stage("freeze")["params"]


def test_every_section_of_params_is_a_param_of_some_stage() -> None:
    from pipelines.params import Params

    listed = {key.partition(".")[0] for name in STAGES for key in stage(name).get("params", [])}
    assert listed == set(Params.model_fields) - {"workers"}  # who runs the chain, and when, changes no stage


def test_no_stage_names_a_whole_section_that_a_new_task_would_change() -> None:
    """Else adding a task would run the earlier ones again; only the report is of all tasks."""
    assert [name for name in STAGES if "tasks" in stage(name).get("params", [])] == ["report"]


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_takes_part_in_the_run_cache(name: str) -> None:
    """DVC leaves out, without a word, stages without deps, and outputs that persist or are not cached."""
    assert stage(name)["deps"]
    assert all(isinstance(out, str) for out in stage(name)["outs"])


def test_the_commands_are_those_of_the_command_line() -> None:
    from typer.main import get_command

    from pipelines.cli import app

    commands = get_command(app).commands  # type: ignore[attr-defined]
    for name in STAGES:
        program, command, *rest = stage(name)["cmd"].split()
        assert (program, command) == ("sdlora", name)
        flags = {word for word in rest if word.startswith("--")}
        options = [p for p in commands[name].params if p.param_type_name == "option"]
        assert flags == {flag for option in options for flag in option.opts}


def test_the_plots_are_of_files_that_the_report_leaves() -> None:
    plots = YAML(typ="safe").load((REPOSITORY / "dvc.yaml").read_text())["plots"]
    for plot in plots:
        ((path, settings),) = plot.items()
        assert path.startswith("artifacts/report/plots/")
        template = settings.get("template")
        if template not in (None, "confusion", "linear"):
            assert (REPOSITORY / ".dvc" / "plots" / f"{template}.json").is_file()
