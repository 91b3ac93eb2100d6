"""Fingerprints of code: which definitions a result can depend on, and what each of them says.

A fingerprint follows references from a function through all of `sdlora` and `pipelines`: to functions, classes and
constants, in whatever module they stand. Of each definition it holds the syntax tree without comments, docstrings,
type hints of functions, its own name and its place. So an edit that can change a result changes the fingerprint. A
moved module, a renamed function or a better docstring does not.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from pipelines.project.errors import InputError
from pipelines.project.files import write_whole
from pipelines.project.layout import CODE_MEMORY, STAGES

PACKAGES = ("pipelines", "sdlora")
"""The packages whose code is followed; of others the names are kept."""
_STAGES = "pipelines.stages"
"""The package of the stages."""


class Definition(NamedTuple):
    """A name that a module defines. The empty name stands for the module's statements that define none."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}".rstrip(".")


class Fingerprint(NamedTuple):
    """The definitions that a result can depend on, in the order in which references reach them."""

    lines: tuple[str, ...]
    """for each the hash of what it says, and the numbers of the lines that it refers to"""
    definitions: tuple[Definition, ...]
    """for each its name, which is no part of the key"""

    @property
    def text(self) -> str:
        """Return the lines as one text."""
        return "".join(f"{line}\n" for line in self.lines)

    @property
    def sha256(self) -> str:
        """Return the SHA-256 of the text, in hexadecimal."""
        return hashlib.sha256(self.text.encode()).hexdigest()


_FOUND: dict[Definition, Fingerprint] = {}
"""The fingerprints that this process knows."""


def fingerprint(module: str, name: str) -> Fingerprint:
    """Return the fingerprint of a function.

    Raises:
        ValueError: the code finds its files or modules in a way that cannot be followed.
    """
    function = Definition(module, name)
    if function not in _FOUND:
        _FOUND[function] = _follow(function)
    return _FOUND[function]


def _follow(function: Definition) -> Fingerprint:
    """Return the fingerprint of a function, found by following its references."""
    order = [function]
    numbers = {order[0]: 0}
    lines = []
    for definition in order:  # which grows on the way
        content = _content(definition)
        for reference in content.references:
            if reference not in numbers:
                numbers[reference] = len(order)
                order.append(reference)
        lines.append(" ".join([content.sha256, *(str(numbers[other]) for other in content.references)]))
    return Fingerprint(tuple(lines), tuple(order))


def fingerprint_of(function: Callable[..., object] | type) -> Fingerprint:
    """Return the fingerprint of a function or class that is imported."""
    return fingerprint(function.__module__, function.__qualname__)


def stage_fingerprint(kind: str) -> Fingerprint:
    """Return the fingerprint of a stage, which is a function in a module of its own name."""
    return _stage_fingerprints()[kind]


@cache
def _stage_fingerprints() -> Mapping[str, Fingerprint]:
    """Return the fingerprints of all stages. To find them takes some 0.6 s, so that they are kept by the sources."""
    sources = f"{sys.version} {source_hash()}"
    try:
        kept = json.loads(CODE_MEMORY.read_bytes())
        if kept["sources"] == sources:
            known = {
                kind: Fingerprint(tuple(lines), tuple(Definition(*name) for name in names))
                for kind, (lines, names) in kept["stages"].items()
            }
            _FOUND.update({_function_of(kind): known[kind] for kind in known})
            return known
    except (OSError, ValueError, LookupError, TypeError):  # none yet
        pass
    found = {kind: fingerprint(*_function_of(kind)) for kind in STAGES}
    if CODE_MEMORY.parent.is_dir():
        with suppress(OSError, InputError):
            write_whole(CODE_MEMORY, json.dumps({"sources": sources, "stages": found}).encode())
    return found


def _function_of(kind: str) -> Definition:
    """Return the function of a stage."""
    return Definition(f"{_STAGES}.{kind}", kind)


def program_fingerprint() -> str:
    """Return one hash for the code of all stages, in hexadecimal: what `sdlora --version` shows."""
    digest = hashlib.sha256()
    for kind in STAGES:
        digest.update(f"{kind} {stage_fingerprint(kind).sha256}\n".encode())
    return digest.hexdigest()


def code_files() -> dict[str, str]:
    """Return what stands in `artifacts/code`, by file name: what stages depend on.

    For each stage that is the text of its fingerprint, and for each packaged data set the hash of its files.
    `names.json`, which no stage depends on, has the names that the lines of a fingerprint stand for.
    """
    found = {kind: stage_fingerprint(kind) for kind in STAGES}
    names = {kind: [str(name) for name in fingerprint.definitions] for kind, fingerprint in found.items()}
    return {
        **{kind: fingerprint.text for kind, fingerprint in found.items()},
        **{f"embedded/{data.name}": f"{_tree_hash(data)}\n" for data in sorted(_EMBEDDED.iterdir())},
        "names.json": json.dumps(names, indent=1) + "\n",
    }


def require_own_code() -> None:
    """Refuse to work in a folder whose sources of this program, which DVC watches, are not those that run."""
    if Path("sdlora/__init__.py").is_file() and source_hash(Path()) != source_hash():
        raise InputError(
            f"{Path.cwd()}: dvc.yaml watches the sources here, and the sdlora that runs has others, in "
            f"{_root('sdlora').parent}; run the one that was installed from here (`make repro`, or .venv/bin/sdlora)"
        )


def source_hash(folder: Path | None = None) -> str:
    """Return the SHA-256 over the names and bytes of all source files, in hexadecimal.

    They are those of the program that runs, or those in a folder. It is quick, and changes with every edit.
    """
    digest = hashlib.sha256()
    for package in PACKAGES:
        root = folder / package if folder else _root(package)
        for file in sorted(root.rglob("*.py")):
            digest.update(f"{package}/{file.relative_to(root).as_posix()}\n".encode())
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _tree_hash(path: Path) -> str:
    """Return the SHA-256 over the names and bytes of a file, or of all files of a folder, in hexadecimal."""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file() and "__pycache__" not in file.parts:
            digest.update(f"{file.relative_to(path).as_posix()}\n".encode())
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _package_folder(package: str) -> Path:
    """Return the folder of a package of this program, as it is imported here."""
    top, *rest = package.split(".")
    return _root(top).joinpath(*rest)


class _Content(NamedTuple):
    sha256: str
    references: tuple[Definition, ...]


class _Import(NamedTuple):
    """What an imported name stands for: a module, or a name in it."""

    module: str
    name: str | None


class _Module:
    """A module's source: which statements bind which name."""

    def __init__(self, name: str, file: Path) -> None:
        self.name = name
        self.statements: dict[str, list[ast.stmt]] = {}
        self.imports: dict[str, _Import] = {}
        self.types: set[str] = set()
        """Names that are imported for type checkers only."""
        tree = ast.parse(file.read_bytes(), filename=str(file))
        for statement in tree.body:
            if isinstance(statement, ast.Import | ast.ImportFrom):
                self.imports |= _imports(statement)
            elif isinstance(statement, ast.If) and ast.unparse(statement.test) == "TYPE_CHECKING":
                for inner in statement.body:
                    if isinstance(inner, ast.Import | ast.ImportFrom):
                        self.types |= set(_imports(inner))
            elif not _is_text(statement):
                # What a loop or a branch does beside binding names is done for the whole module.
                compound = isinstance(statement, ast.For | ast.While | ast.If | ast.With | ast.Try)
                for bound in [*_bound(statement), *([""] if compound or not _bound(statement) else [])]:
                    self.statements.setdefault(bound, []).append(statement)


@cache
def _root(package: str) -> Path:
    """Return the folder that a top-level package is imported from."""
    file = importlib.import_module(package).__file__
    assert file is not None
    return Path(file).resolve().parent


@cache
def _module(name: str) -> _Module | None:
    """Read a module of this program. None for a name that is none."""
    package, *rest = name.split(".")
    if package not in PACKAGES:
        return None
    path = _root(package).joinpath(*rest)
    for file in (path / "__init__.py", path.with_name(f"{path.name}.py")):
        if file.is_file() and (rest or file.name == "__init__.py"):
            return _Module(name, file)
    return None


@cache
def _content(definition: Definition) -> _Content:
    module = _module(definition.module)
    assert module is not None
    statements = module.statements[definition.name]
    reader = _Reader(module, statements)
    digest = hashlib.sha256()
    for statement in statements:
        for token in reader.statement(statement):
            digest.update(token.encode("utf-8", "backslashreplace") + b"\0")
    if definition.name and "" in module.statements:
        reader.refer(Definition(module.name, ""))
    return _Content(digest.hexdigest(), tuple(reader.references))


class _Reader:
    """Turns the statements of a definition into tokens. References become numbers."""

    def __init__(self, module: _Module, statements: Iterable[ast.stmt]) -> None:
        self._module = module
        self._imports = dict(module.imports)
        self._types = set(module.types)
        self.references: dict[Definition, int] = {}
        for statement in statements:
            for node in ast.walk(statement):
                if isinstance(node, ast.Import | ast.ImportFrom):
                    found = _imports(node)
                    self._imports |= found
                    self._types -= set(found)

    def refer(self, definition: Definition) -> int:
        """Return the number of a reference."""
        return self.references.setdefault(definition, len(self.references))

    def statement(self, node: ast.stmt) -> Iterator[str]:
        """Yield the tokens of a top-level statement, without the name that it defines."""
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield from self._tokens(node, without=("name",))
        elif isinstance(node, ast.Assign | ast.AnnAssign) and _bound(node):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if all(isinstance(target, ast.Name) for target in targets):
                yield from self._tokens(node, without=("target", "targets"))
            else:
                yield from self._tokens(node)
        else:
            yield from self._tokens(node)

    def _tokens(self, node: ast.AST, *, without: tuple[str, ...] = ()) -> Iterator[str]:
        if isinstance(node, ast.Import | ast.ImportFrom) or _is_text(node):
            return
        if isinstance(node, ast.Name | ast.Attribute):
            known = self._known(node)
            if known is not None:
                yield from known
                return
        if isinstance(node, ast.BinOp):
            packaged = self._packaged(node)
            if packaged is not None:
                yield from packaged
                return
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            without = (*without, "returns")
        elif isinstance(node, ast.arg):
            without = (*without, "annotation")
        yield type(node).__name__
        for field, value in ast.iter_fields(node):
            if field in without or value is None or value == [] or field in ("kind", "type_comment", "ctx"):
                continue
            yield field
            for part in value if isinstance(value, list) else [value]:
                if isinstance(part, ast.AST):
                    yield from self._tokens(part)
                else:
                    yield f"{type(part).__name__} {part!r}"
        yield "end"

    def _known(self, node: ast.Name | ast.Attribute) -> Iterator[str] | None:
        """Return the tokens of a name that stands for a definition or an import. None for any other."""
        path: list[str] = []
        inner: ast.expr = node
        while isinstance(inner, ast.Attribute):
            path.insert(0, inner.attr)
            inner = inner.value
        if not isinstance(inner, ast.Name):
            return None
        name = inner.id
        if name == "__file__":
            raise ValueError(
                f"{self._module.name}: __file__ cannot be followed; write resources.files(PACKAGE) / NAME"
            )
        if name in self._types:
            return iter(["type"])
        if name in self._imports:
            module, imported = self._imports[name]
            found, rest = _resolve(module, [*([imported] if imported else []), *path])
        elif name in self._module.statements:
            found, rest = [Definition(self._module.name, name)], path
        else:
            return None
        if isinstance(found, str):
            if found == "importlib.resources.files":
                raise ValueError(
                    f"{self._module.name}: packaged files cannot be followed; write resources.files(PACKAGE) / NAME"
                )
            return iter([f"import {found}"])
        return iter(
            [*(f"reference {self.refer(other)}" for other in found), *(f"attribute {part}" for part in rest)]
        )

    def _packaged(self, node: ast.BinOp) -> Iterator[str] | None:
        """Return the tokens of packaged files, `resources.files(PACKAGE) / NAME`. None for any other operation.

        Their content counts. Where a variable follows the name, as in `… / "embedded" / key`, it does not: what is
        read by a key is a dependency of its own.
        """
        parts: list[ast.expr] = []
        inner: ast.expr = node
        while isinstance(inner, ast.BinOp) and isinstance(inner.op, ast.Div):
            parts.insert(0, inner.right)
            inner = inner.left
        if not (isinstance(inner, ast.Call) and self._is_files(inner.func)):
            return None
        names = [str(part.value) for part in [*inner.args, *parts] if isinstance(part, ast.Constant)]
        keyed = len(names) <= len(parts)
        path = _package_folder(names[0]).joinpath(*names[1:]) if names else Path()
        if len(names) < 2 or not path.exists():
            raise ValueError(f"{self._module.name}: {ast.unparse(node)} names no packaged file")
        tokens = ["keyed" if keyed else _tree_hash(path)]
        for part in parts[len(names) - 1 :]:
            tokens += self._tokens(part)
        return iter(["packaged", PurePosixPath(*names[1:]).as_posix(), *tokens])

    def _is_files(self, node: ast.expr) -> bool:
        return (
            isinstance(node, ast.Attribute)
            and node.attr == "files"
            and isinstance(node.value, ast.Name)
            and self._imports.get(node.value.id) == _Import("importlib", "resources")
        )


def _resolve(module: str, path: list[str]) -> tuple[list[Definition] | str, list[str]]:
    """Follow a path of names that begins in a module.

    Returns:
        The definitions that it leads to and what is left of the path, or the dotted name of something imported from
        elsewhere. A module that is used as a value stands for all its definitions.
    """
    known = _module(module)
    if known is None:
        return ".".join([module, *path]), []
    if not path:
        names = [name for name in known.statements if name]
        return [Definition(module, name) for name in names], []
    name, rest = path[0], path[1:]
    if name in known.statements:
        return [Definition(module, name)], rest
    if name in known.imports and known.imports[name] != _Import(module, name):  # a module below this one
        origin, imported = known.imports[name]
        return _resolve(origin, [*([imported] if imported else []), *rest])
    if _module(f"{module}.{name}"):
        return _resolve(f"{module}.{name}", rest)
    raise ValueError(f"{module}: no definition of {name} is found")


def _imports(node: ast.Import | ast.ImportFrom) -> Mapping[str, _Import]:
    found = {}
    for alias in node.names:
        if isinstance(node, ast.ImportFrom):
            found[alias.asname or alias.name] = _Import(str(node.module), alias.name)
        elif alias.asname:
            found[alias.asname] = _Import(alias.name, None)
        else:
            top = alias.name.partition(".")[0]
            found[top] = _Import(top, None)
    return found


def _bound(statement: ast.stmt) -> list[str]:
    """Return the names that a top-level statement binds, in any of its parts."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [statement.name]
    names = {
        node.id: None
        for node in ast.walk(statement)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }
    return list(names)


def _is_text(node: ast.AST) -> bool:
    """Return whether a statement is a text that nothing reads: a docstring."""
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


_EMBEDDED = _package_folder("pipelines.data") / "embedded"
"""The packaged data sets."""
