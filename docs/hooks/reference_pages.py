"""Fill the reference pages of the site from the source: command line, `params.yaml`, Python API.

A page keeps its own words and has a marker, `<!-- generated: NAME -->`, where this puts what the source says. A
notebook becomes a page, as it was executed.
"""

from __future__ import annotations

import ast
import base64
import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

APP = "pipelines.cli.app:app"
"""Where the typer application of the command line is."""
PARAMS = "pipelines.project.params:Params"
"""Where the pydantic model of the whole of `params.yaml` is."""
ROOT = Path(__file__).resolve().parents[2]
LIBRARY = "sdlora"
ROOT_PAGES = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
MARKER = re.compile(r"<!-- generated: (\w+) -->")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """List a page for each module of the library under the page of the Python API."""
    modules = [f"reference/python/{name}.md" for name in _modules()]
    _insert_after(config.nav, "reference/python.md", modules)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are no files of docs/."""
    for name in _modules():
        text = f"# {name}\n\n::: {name}\n"
        files.append(File.generated(config, f"reference/python/{name}.md", content=text))
    for page, source in ROOT_PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8").replace("](docs/", "](")
        files.append(File.generated(config, page, content=text))
    for file in [file for file in files if file.src_uri.endswith(".ipynb")]:
        text, pictures = _notebook(json.loads(file.content_string), file.src_uri.rpartition("/")[2])
        files.append(File.generated(config, file.src_uri.replace(".ipynb", ".md"), content=text))
        for name, content in pictures.items():
            folder = file.src_uri.rpartition("/")[0]
            files.append(File.generated(config, f"{folder}/{name}", content=content))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put what the source says in place of each marker. A link to a notebook becomes one to its page."""
    markdown = re.sub(r"(?<!`)\]\(([\w/.-]+)\.ipynb\)(?!\{)", r"](\1.md)", markdown)
    makers = {"commands": _commands, "stages": _stages, "params": _params, "modules": _module_list}
    return MARKER.sub(lambda found: "\n".join(makers[found[1]]()), markdown)


def _insert_after(nav: list[Any], page: str, children: list[str]) -> None:
    """Make the entry of a page a section that begins with it."""
    for position, entry in enumerate(nav):
        if entry == page:
            nav[position] = {"Python API": [page, *children]}
        elif isinstance(entry, dict):
            for inner in entry.values():
                if isinstance(inner, list):
                    _insert_after(inner, page, children)


# The command line


def _commands() -> Iterator[str]:
    for path, command in _walk(_load(APP)):
        if not command.hidden:
            yield from _command(path, command)


def _stages() -> Iterator[str]:
    for path, command in _walk(_load(APP)):
        if command.hidden:
            yield from _command(path, command)


def _walk(app: typer.Typer) -> Iterator[tuple[str, Any]]:
    """Return every command that does something, with all its words."""

    def below(path: str, command: Any) -> Iterator[tuple[str, Any]]:  # noqa: ANN401 - click's, which typer carries
        if not hasattr(command, "list_commands"):
            yield path, command
            return
        context = typer.Context(command)
        for name in command.list_commands(context):
            yield from below(f"{path} {name}", command.get_command(context, name))

    yield from below("sdlora", typer.main.get_command(app))


def _command(path: str, command: Any) -> Iterator[str]:  # noqa: ANN401 - click's, which typer carries
    """Return what `--help` says of a command, as a section."""
    context = typer.Context(command, info_name=path)
    first, _, rest = (command.help or "").strip().partition("\n\n")
    usage = _one_line(command.get_usage(context)).removeprefix("Usage: ")
    yield from ("", f"### {path}", "", _text(first), "", "```text", usage, "```", "")
    for paragraph in filter(None, rest.split("\n\n")):
        yield from (_text(paragraph), "")
    records = [parameter.get_help_record(context) for parameter in command.params if parameter.name != "help"]
    if records:
        yield from ("| | meaning | default |", "| --- | --- | --- |")
    for spelling, text in records:
        meaning, _, extra = text.partition("  [")
        facts = [fact.removeprefix("default: ") for fact in extra.removesuffix("]").split("; ") if fact]
        yield f"| {_cell(f'`{spelling}`')} | {_cell(meaning)} | {_cell(', '.join(facts))} |"


# params.yaml


def _params() -> Iterator[str]:
    """Return a section for each key at the top level."""
    schema = _load(PARAMS).model_json_schema()
    shipped = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    definitions = schema["$defs"]
    for key, field in schema["properties"].items():
        yield from ("", f"## {key}", "")
        block, entries = _block(field, definitions)
        if block is None:
            yield from _table([(key, field, shipped.get(key))], definitions)
            continue
        yield from (_text(_sentence(block["description"])), "")
        values = {} if entries else shipped[key]
        rows = [(name, inner, values.get(name)) for name, inner in block.get("properties", {}).items()]
        prefix = f"{key}.KEY." if entries else f"{key}."
        if key == "fetch":
            yield from _data_sets(block, definitions)
            continue
        yield from _table(
            [(prefix + name, inner, value) for name, inner, value in rows], definitions, not entries
        )


def _data_sets(block: dict[str, Any], definitions: dict[str, Any]) -> Iterator[str]:
    """Return a table of the data sets, with the settings of each."""
    yield from ("| data set | is | settings |", "| --- | --- | --- |")
    for name, field in block["properties"].items():
        entry, _ = _block(field, definitions)
        settings = [
            f"`{key}` ({_kind(inner, definitions)}): {inner['description']}"
            for key, inner in (entry or {}).get("properties", {}).items()
        ]
        yield f"| `{name}` | {_cell(field['description'])} | {'<br>'.join(map(_cell, settings)) or 'none'} |"


def _table(
    rows: list[tuple[str, dict[str, Any], Any]], definitions: dict[str, Any], values: bool = True
) -> Iterator[str]:
    if values:
        yield from ("| key | value | shipped | meaning |", "| --- | --- | --- | --- |")
    else:
        yield from ("| key | value | meaning |", "| --- | --- | --- |")
    for name, field, value in rows:
        cells = [f"`{name}`", _cell(_kind(field, definitions))]
        cells += [f"`{_shown(value)}`"] if values else []
        yield f"| {' | '.join([*cells, _cell(field.get('description', ''))])} |"


def _block(field: dict[str, Any], definitions: dict[str, Any]) -> tuple[dict[str, Any] | None, bool]:
    """Return the block of keys that a field holds, and whether it holds many of them by name."""
    if "$ref" in field:
        return definitions[field["$ref"].rpartition("/")[2]], False
    inner = field.get("additionalProperties")
    if isinstance(inner, dict) and "$ref" in inner:
        return definitions[inner["$ref"].rpartition("/")[2]], True
    for option in field.get("anyOf", []):
        if "$ref" in option:
            return _block(option, definitions)
    return None, False


def _kind(field: dict[str, Any], definitions: dict[str, Any]) -> str:
    """Say in words what values a field takes."""
    if "anyOf" in field:
        return " or ".join(_kind(option, definitions) for option in field["anyOf"])
    if "enum" in field:
        return ", ".join(f"`{choice}`" for choice in field["enum"])
    if "const" in field:
        return f"`{field['const']}`"
    kinds = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false"}
    kind = field.get("type")
    if kind == "null":
        return "null"
    if kind == "array":
        return f"list of {_kind(field.get('items', {}), definitions)}"
    if kind == "object":
        return f"block of {_kind(field.get('additionalProperties') or {}, definitions)}s"
    bounds = [
        f"{sign} {field[name]:.12g}"
        for name, sign in (
            ("exclusiveMinimum", ">"),
            ("minimum", "≥"),
            ("exclusiveMaximum", "<"),
            ("maximum", "≤"),
        )
        if name in field
    ]
    return ", ".join([kinds.get(str(kind), "block of keys"), *bounds])


# The Python API


def _modules() -> list[str]:
    """Return the modules of the library that have a docstring, the package itself first."""
    names = []
    for path in sorted((ROOT / LIBRARY).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if not any(part.startswith("_") for part in name.split(".")) and _docstring(name):
            names.append(name)
    return sorted(names)


def _module_list() -> Iterator[str]:
    yield from ("| module | |", "| --- | --- |")
    for name in _modules():
        first = _docstring(name).partition("\n")[0]
        yield f"| [`{name}`](python/{name}.md) | {_cell(first)} |"


def _docstring(name: str) -> str:
    path = ROOT.joinpath(*name.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""


# Notebooks


def _notebook(notebook: dict[str, Any], name: str) -> tuple[str, dict[str, bytes]]:
    """Return an executed notebook as a page, and the pictures that it shows by their names."""
    lines, pictures = [], {}
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        lines += [f"```py\n{source}\n```" if cell["cell_type"] == "code" else source, ""]
        for output in cell.get("outputs", []):
            data = output.get("data", {"text/plain": output.get("text", "")})
            if "image/png" in data:
                picture = name.replace(".ipynb", f"-{len(pictures) + 1}.png")
                pictures[picture] = base64.b64decode("".join(data["image/png"]))
                lines += [f"![What this cell draws]({picture})", ""]
            else:
                lines += [f"```text\n{''.join(data['text/plain']).rstrip()}\n```", ""]
    lines += [f"[This page as a notebook]({name}){{download}}", ""]
    return "\n".join(lines), pictures


# Words


def _load(where: str) -> Any:  # noqa: ANN401 - whatever stands there
    module, _, name = where.partition(":")
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    return getattr(importlib.import_module(module), name)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _sentence(text: str) -> str:
    text = _one_line(text)
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", ":", "!")) else ".")


def _cell(text: str) -> str:
    return _text(text).replace("|", "\\|")


def _text(text: str) -> str:
    """Return prose for Markdown, on one line: what stands in <brackets> outside of code is no HTML."""
    parts = _one_line(text).split("`")
    return "`".join(part if number % 2 else part.replace("<", "&lt;") for number, part in enumerate(parts))


def _shown(value: object) -> str:
    """Return a value as one reads it in YAML."""
    text = yaml.safe_dump(value, default_flow_style=True, width=1000, allow_unicode=True)
    return text.strip().removesuffix("...").strip()
