"""Rules that a machine can check; which room imports which is in `make lint` (import-linter, pyproject.toml)."""

from __future__ import annotations

import ast
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.project import layout
from tests.support.repository import REPOSITORY

LIBRARY = sorted((REPOSITORY / "sdlora").rglob("*.py"))
PIPELINES = sorted((REPOSITORY / "pipelines").rglob("*.py"))
STAGES = set(layout.STAGES)
ALLOWED = {"sdlora", "torch", "timm", "numpy", "safetensors"}


def relative(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative(path)}: a relative import"
            assert node.module
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def calls(path: Path) -> Iterator[str]:
    """The dotted name of everything that a file calls."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func)


@pytest.mark.parametrize("path", LIBRARY, ids=relative)
def test_the_library_imports_only_its_four_foundations(path: Path) -> None:
    found = {name.partition(".")[0] for name in imports(path)}
    assert found <= ALLOWED | sys.stdlib_module_names


@pytest.mark.parametrize("path", LIBRARY, ids=relative)
def test_the_library_does_not_print_or_log(path: Path) -> None:
    assert "print" not in set(calls(path))
    assert not {name for name in imports(path) if name.partition(".")[0] in ("logging", "warnings")}


@pytest.mark.parametrize("path", LIBRARY + PIPELINES, ids=relative)
def test_nothing_that_is_loaded_can_run_code(path: Path) -> None:
    loaders = {"pickle", "dill", "joblib", "cloudpickle", "marshal", "shelve"}
    assert not {name.partition(".")[0] for name in imports(path)} & loaders
    assert not {name for name in calls(path) if name in ("torch.load", "eval", "exec", "yaml.load")}
    loads = {name for name in calls(path) if name.endswith("np.load")}
    assert not loads


def test_no_file_names_a_place_on_one_machine() -> None:
    """Paths and hosts of the machine that something was written on are of no use on another."""
    suspicious = ("/wor" + "k/", "/ro" + "ot/", "/hom" + "e/")
    files = [*LIBRARY, *PIPELINES, *(REPOSITORY / name for name in ("dvc.yaml", "params.yaml", "Makefile"))]
    files += [REPOSITORY / "pyproject.toml", REPOSITORY / "requirements.lock"]
    found = [relative(f) for f in files if any(word in f.read_text(encoding="utf-8") for word in suspicious)]
    assert not found
    assert "://" not in (REPOSITORY / "requirements.lock").read_text(encoding="utf-8")


def texts(path: Path) -> Iterator[str]:
    """Every string of a file, parts of f-strings too, that is not a docstring."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    said = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in said:
            yield node.value


@pytest.mark.parametrize("path", PIPELINES, ids=relative)
def test_only_the_layout_knows_how_a_stage_is_spelt(path: Path) -> None:
    """Everywhere else the name of a stage is a kind and a task, `StageName`."""
    if path.name != "layout.py":
        spelt = re.compile(rf"\b({'|'.join(STAGES)})@|^@$")
        assert not [text for text in texts(path) if spelt.search(text)]


def test_every_error_of_ours_stands_in_the_tree_of_errors() -> None:
    from pipelines.project import errors

    classes = {
        node.name: [ast.unparse(base).rpartition(".")[2] for base in node.bases]
        for path in LIBRARY + PIPELINES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
    }
    found = {
        name for name, bases in classes.items() if any(b.endswith(("Error", "Exception")) for b in bases)
    }
    drawn = set(re.findall(r"── (\w+)", errors.__doc__ or ""))
    assert drawn == found | {"DvcException"}
    assert all(value.__doc__ for name, value in vars(errors).items() if name in found)
    page = (REPOSITORY / "docs" / "reference" / "errors.md").read_text(encoding="utf-8")
    assert set(re.findall(r"── (\w+)", page)) == drawn


@pytest.mark.parametrize("path", PIPELINES, ids=relative)
def test_environment_variables_are_named_and_explained_in_one_place(path: Path) -> None:
    if path.name != "environment.py":
        assert not [text for text in texts(path) if "SDLORA_" in text]
        return
    body = ast.parse(path.read_text(encoding="utf-8")).body[1:]
    assert body
    for name, meaning in zip(body[::2], body[1::2], strict=True):
        assert isinstance(name, ast.Assign)
        assert isinstance(meaning, ast.Expr)
        assert ast.unparse(meaning).strip("'\"").startswith("Set by ")


def test_the_page_of_environment_variables_has_all_of_ours() -> None:
    from pipelines.project import environment

    ours = {value for value in vars(environment).values() if str(value).startswith("SDLORA_")}
    page = (REPOSITORY / "docs" / "reference" / "environment.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`(SDLORA_\w+)`", page)) == ours


PROJECT_PATH = re.compile(
    r"(artifacts/|ledger/|\.sdlora\b|\.prefect\b|\.dvc/|data/raw\b)\S*|(params|dvc)\.yaml|dvc\.lock"
)
"""A text that is a path of a project as a whole; sentences for people may name one."""


@pytest.mark.parametrize("path", PIPELINES, ids=relative)
def test_paths_of_a_project_stand_in_the_layout_alone(path: Path) -> None:
    if path.name != "layout.py":
        module = {"dvc.lock"} if path.name == "dvc_server.py" else set()  # which is loaded there
        assert not [text for text in texts(path) if PROJECT_PATH.fullmatch(text) and text not in module]
        made = {call for call in calls_with_text(path, "Path") if call in ("artifacts", "ledger", ".dvc")}
        assert not made


def calls_with_text(path: Path, name: str) -> Iterator[str]:
    """The text that a function is called with, wherever a file calls it with one."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == name and node.args:
            first = node.args[0]
            if isinstance(first, ast.Constant):
                yield str(first.value)


COLUMNS = {
    "sdlora.methods": {"METHOD", "begin", "freeze", "penalty"},
    "pipelines.serving.exports": {"write", "logits", "usage"},
    "pipelines.versioning.patches": {"use"},
}
"""Packages whose modules are the rows of a table, and the names that are its columns."""
SHARED = {"main", "freeze"}
"""An entry of a program, and the stage that is called as what it does in the library."""


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


def public_names(path: Path) -> Iterator[str]:
    """The names that a module defines without an underscore, columns of tables aside."""
    package = module_name(path).rpartition(".")[0]
    for statement in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names = [statement.name]
        elif isinstance(statement, ast.Assign | ast.AnnAssign):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            names = [n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)]
        else:
            continue
        yield from (n for n in names if not n.startswith("_") and n not in COLUMNS.get(package, ()))


NAMED = [path for path in LIBRARY + PIPELINES if "cli" not in path.parts]
"""All modules but those of the command line, in which a command is called as what it calls."""


def test_a_public_name_stands_in_one_module() -> None:
    """So a name says one thing, and a search for it finds it."""
    found: dict[str, list[str]] = {}
    for path in NAMED:
        for name in public_names(path):
            found.setdefault(name, []).append(module_name(path))
    assert {name: where for name, where in found.items() if len(where) > 1 and name not in SHARED} == {}


def test_what_no_other_module_uses_is_private() -> None:
    """A name of a module's own has an underscore: it may change without a look elsewhere."""
    folders = ("pipelines", "sdlora", "tests", "benchmarks", "recipes", "docs")
    files = [
        path
        for folder in folders
        for path in (REPOSITORY / folder).rglob("*.*")
        if path.suffix in (".py", ".md")
    ]
    words = {path: set(re.findall(r"\w+", path.read_text(encoding="utf-8"))) for path in files}
    uses = Counter(word for known in words.values() for word in known)
    own = {"default_cfgs"}  # timm looks for it
    alone = [
        f"{module_name(path)}.{name}" for path in NAMED for name in public_names(path) if uses[name] == 1
    ]
    assert [name for name in alone if name.rpartition(".")[2] not in own] == []


@pytest.mark.parametrize("path", LIBRARY + PIPELINES, ids=relative)
def test_no_function_has_more_than_60_lines(path: Path) -> None:
    functions = [
        node
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    assert {f.name for f in functions if (f.end_lineno or 0) - f.lineno + 1 > 60} == set()


def test_every_module_of_the_application_has_a_room() -> None:
    assert {path.name for path in (REPOSITORY / "pipelines").glob("*.py")} == {"__init__.py", "__main__.py"}
