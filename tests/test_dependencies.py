"""What pyproject.toml declares is what the code imports: nothing less, and nothing more."""

from __future__ import annotations

import ast
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.repository import REPOSITORY

BOUNDS_ALONE = {"fastapi"}
"""Declared because another package bounds them too widely: no code of this project imports them."""
PLUGINS = {"onnxscript", "s3fs"}
"""Found by other packages, by name: the exporter of torch, and fsspec."""


def imported(package: str) -> Iterator[str]:
    """The top-level names of others' packages that a package imports anywhere."""
    for path in (REPOSITORY / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                yield from (alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and not node.level:
                yield str(node.module).partition(".")[0]


def declared() -> tuple[set[str], set[str]]:
    """The names of the dependencies, and those of the extras that a user may install."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [line for extra in ("bom", "export", "s3") for line in project["optional-dependencies"][extra]]
    names = [
        {canonicalize_name(Requirement(line).name) for line in lines}
        for lines in (project["dependencies"], extras)
    ]
    return names[0], names[1]


@pytest.fixture(scope="module")
def used() -> dict[str, set[str]]:
    """Imported name → the distributions that have it; of several any may be meant."""
    own = {"sdlora", "pipelines"}
    names = {name for package in own for name in imported(package)} - own - sys.stdlib_module_names
    distributions = packages_distributions()
    return {name: {canonicalize_name(of) for of in distributions.get(name, [])} for name in names}


def test_every_import_is_declared(used: dict[str, set[str]]) -> None:
    needed, extra = declared()
    assert {name for name, of in used.items() if not of & (needed | extra)} == set()


def test_everything_declared_is_imported(used: dict[str, set[str]]) -> None:
    needed, extra = declared()
    found = set().union(*used.values())
    assert needed - found == BOUNDS_ALONE
    assert extra - found - needed == PLUGINS
