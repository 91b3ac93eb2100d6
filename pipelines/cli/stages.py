"""The commands of the stages, each made of its function's signature and docstring when it is asked for.

They are read from the source, because importing a stage loads what it works with: `sdlora --help` and `sdlora status`
do without.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from typer.core import TyperGroup
from typer.main import get_command

from pipelines.cli.machines import on_all_machines
from pipelines.cli.place import enter_project
from pipelines.project.layout import CODE_STAGE, RAW, STAGES

_TYPES: dict[str, Any] = {"str": str, "int": int, "Path": Path}
"""The types that a parameter of a stage can have."""


class _Source(NamedTuple):
    """Where the function of a command stands."""

    module: str
    function: str


_COMMANDS = {
    **{kind: _Source(kind, kind) for kind in (CODE_STAGE, *STAGES)},
    "run-rank": _Source("fit", "run_rank"),
}
_VISIBLE = {"fetch"}
"""The commands that people type; the others are called by dvc.yaml, and by a fit on several devices."""


class StageGroup(TyperGroup):
    """Commands, and with them those of the stages."""

    def get_params(self, ctx: Any) -> list[Any]:  # noqa: ANN401 - a class that typer does not export
        """Return the options. The rarer one about completion works, and leaves its room in the help to commands."""
        found = super().get_params(ctx)
        for option in found:
            if option.name == "show_completion":
                option.hidden = True  # type: ignore[attr-defined]
        return found

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ANN401 - a class that typer does not export
        """Return the names of all commands."""
        return [*super().list_commands(ctx), *_COMMANDS]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ANN401 - classes that typer does not export
        """Return the command of a name, None where there is none."""
        return _command(cmd_name) if cmd_name in _COMMANDS else super().get_command(ctx, cmd_name)


def stage_commands() -> list[str]:
    """Return the names of the hidden commands that dvc.yaml calls."""
    return [kind for kind in STAGES if kind not in _VISIBLE]


def _command(name: str) -> Any:  # noqa: ANN401 - a class that typer does not export
    """Make a command of a stage's function: what may be given by position is an argument, the rest are options."""
    source = _COMMANDS[name]
    node = _read_function(source)
    help_text, explained = _read_docstring(ast.get_docstring(node) or "")
    parameters = [
        *(_parameter(arg, typer.Argument(help=explained[arg.arg])) for arg in node.args.args),
        *(_parameter(arg, typer.Option(help=explained[arg.arg])) for arg in node.args.kwonlyargs),
    ]
    if name == "fetch":  # the one that people type: its folder follows from the name
        *parameters, out = parameters
        parameters.append(out.replace(default=None))

    def call(**arguments: Any) -> None:  # noqa: ANN401 - the stage's own arguments
        caller = enter_project(above=name in _VISIBLE)
        if name == "fetch":
            arguments["out"] = caller.optional(arguments["out"]) or RAW / arguments["name"]
        _run(source, arguments)

    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    single.command(name, help=help_text, hidden=name not in _VISIBLE)(call)
    return get_command(single)


def _run(source: _Source, arguments: Mapping[str, Any]) -> None:
    from pipelines.orchestration.stage_runs import launch
    from pipelines.runtime.earlier_outputs import bring_outputs
    from pipelines.runtime.stage import Stage
    from pipelines.versioning.artifacts import whole_outputs

    bring_outputs(whole_outputs)
    work = getattr(importlib.import_module(f"pipelines.stages.{source.module}"), source.function)
    if not isinstance(work, Stage):
        work(**arguments)
        return
    with on_all_machines() if work.name == "fit" else contextlib.nullcontext():
        launch(work, **arguments)


def _read_function(source: _Source) -> ast.FunctionDef:
    file = resources.files("pipelines.stages") / f"{source.module}.py"
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return next(
        node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == source.function
    )


def _parameter(arg: ast.arg, info: Any) -> inspect.Parameter:  # noqa: ANN401 - typer's
    assert arg.annotation is not None
    given = _TYPES[ast.unparse(arg.annotation)]
    return inspect.Parameter(arg.arg, inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[given, info])


def _read_docstring(text: str) -> tuple[str, dict[str, str]]:
    """Divide a docstring into its paragraphs, each a line, and the texts of its section `Args`."""
    head, _, rest = text.partition("\nArgs:\n")
    explained: dict[str, str] = {}
    name = ""
    for line in rest.splitlines():
        if line and not line.startswith(" "):  # the next section
            break
        if line.startswith("    ") and not line.startswith("     "):
            name, _, line = line.strip().partition(": ")
            explained[name] = line
        elif line:
            explained[name] += " " + line.strip()
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in head.split("\n\n")), explained
