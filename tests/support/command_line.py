"""The commands of `sdlora`, as typer makes them."""

from __future__ import annotations

from typing import Any

import typer
from typer.main import get_command

from pipelines.cli.app import app

GROUP: Any = get_command(app)


def command_names() -> list[str]:
    """Return the names of all commands, hidden ones too."""
    return list(GROUP.list_commands(typer.Context(GROUP)))


def command_of(name: str) -> Any:  # noqa: ANN401 - a class that typer does not export
    """Return the command of a name."""
    return GROUP.get_command(typer.Context(GROUP), name)
