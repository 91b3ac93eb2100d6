"""Edits of the text of `params.yaml`. Every byte outside the edited lines stays as it is, comments too."""

import io
import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from pipelines.project.layout import PARAMS
from pipelines.project.settings import Task
from pipelines.project.yaml_text import quoted, read_yaml


def task_line(key: str, task: Task) -> str:
    """Return a task as one line of YAML, class names always in quotes: 3 is a number, and no is false elsewhere."""
    classes = ", ".join(map(quoted, task.classes))
    plain = re.fullmatch(r"[A-Za-z_][\w.-]*(/[\w.-]+)+", task.source)
    source = task.source if plain else quoted(task.source)
    manifest = f" manifest: {quoted(task.manifest)}," if task.manifest else ""
    kind = "" if task.kind == "classes" else f" kind: {task.kind},"
    return f"{key}: {{after: {task.after},{kind} source: {source},{manifest} classes: [{classes}]}}"


def entry_lines(key: str, value: object, indent: int = 2) -> list[str]:
    """Return an entry of a block of params.yaml as DVC would write it, without its indent."""
    return [line[indent:] for line in _entry(key, value, indent)]


def _task_value(task: Task) -> dict[str, object]:
    value = {
        "after": task.after,
        "kind": None if task.kind == "classes" else task.kind,
        "source": task.source,
        "manifest": task.manifest,
        "classes": task.classes,
    }
    return {key: item for key, item in value.items() if item is not None}


def _entry(key: str, value: object, indent: int) -> list[str]:
    """Return the lines of an entry as DVC would write them: `dvc exp run -S` leaves such lines alone."""
    from ruamel.yaml import YAML

    yaml = YAML()
    yaml.default_flow_style = False
    around: dict[str, object] = {key: _node(value, in_brackets=not _needs_lines(value))}
    for _ in range(indent // 2):
        around = {"_": around}
    stream = io.StringIO()
    yaml.dump(around, stream)
    return stream.getvalue().splitlines()[indent // 2 :]


def _needs_lines(value: object) -> bool:
    """Return whether a text in a value stands on a line of its own, because DVC could not read it in brackets."""
    if isinstance(value, Mapping):
        return any(_needs_lines(part) for pair in value.items() for part in pair)
    if isinstance(value, list | tuple):
        return any(map(_needs_lines, value))
    return isinstance(value, str) and (":" in value or value.startswith("?"))


def _node(value: object, *, in_brackets: bool) -> Any:  # noqa: ANN401 - ruamel's
    from ruamel.yaml.comments import CommentedMap, CommentedSeq

    if isinstance(value, Mapping):
        node: Any = CommentedMap({key: _node(item, in_brackets=in_brackets) for key, item in value.items()})
    elif isinstance(value, list | tuple):
        node = CommentedSeq(_node(item, in_brackets=in_brackets) for item in value)
    else:
        return value
    if in_brackets or not value:
        node.fa.set_flow_style()
    return node


def with_block(text: str, tasks: Mapping[str, Task]) -> str:
    """Return the text with its `tasks` block, or its end if it has none, replaced."""
    return with_lines(
        text, "tasks", [line for key, task in tasks.items() for line in entry_lines(key, _task_value(task))]
    )


def with_lines(text: str, name: str, lines: Sequence[str]) -> str:
    """Return the text with the block called `name`, or its end if it has none, replaced by one of these lines."""
    end = "\r\n" if "\r\n" in text else "\n"
    block = end.join([f"{name}:", *(f"  {line}" for line in lines)]) + end
    nodes = _block_nodes(text, name)
    if nodes is None:
        return text + ("" if text.endswith(end) else end) + block
    key, value = nodes
    return text[: key.start_mark.index] + block + text[_line_end(text, _last_index(key, value)) :]


def with_block_of(text: str, name: str, other: str) -> str:
    """Return the text with its block called `name`, or its end if it has none, replaced by that of another text."""
    place = _block_place(text, name)
    return text[: place.start] + other[_block_place(other, name)] + text[place.stop :]


def _block_place(text: str, name: str) -> slice:
    nodes = _block_nodes(text, name)
    if nodes is None:
        return slice(len(text), len(text))
    key, value = nodes
    return slice(key.start_mark.index, _line_end(text, _last_index(key, value)))


def with_line(text: str, key: str, task: Task) -> str:
    """Return the text with one task more after the last one of its block."""
    nodes = _block_nodes(text, "tasks")
    assert nodes is not None
    _, value = nodes
    last_key, last_value = value.value[-1]
    if value.flow_style:
        position = _last_index(last_key, last_value)
        return text[:position] + f", {task_line(key, task)}" + text[position:]
    end = "\r\n" if "\r\n" in text else "\n"
    position = _line_end(text, _last_index(last_key, last_value))
    start = "" if text[:position].endswith(end) else end
    lines = entry_lines(key, _task_value(task))
    indent = " " * last_key.start_mark.column
    return text[:position] + start + "".join(f"{indent}{line}{end}" for line in lines) + text[position:]


def with_task(text: str, key: str, task: Task) -> str:
    """Return the text with the entry of a task that it has replaced by one line."""
    nodes = _block_nodes(text, "tasks")
    assert nodes is not None
    start, end = next(
        (name.start_mark.index, _last_index(name, value))
        for name, value in nodes[1].value
        if name.value == key
    )
    if nodes[1].flow_style:
        return text[:start] + task_line(key, task) + text[end:]
    newline = "\r\n" if "\r\n" in text else "\n"
    column = start - text.rfind("\n", 0, start) - 1
    return text[:start] + f"{newline}{' ' * column}".join(entry_lines(key, _task_value(task))) + text[end:]


def without_fetch(text: str, names: Collection[str]) -> str:
    """Return the text with data sets taken out of its `fetch` block. What is left of the block is written anew."""
    nodes = _block_nodes(text, "fetch")
    assert nodes is not None
    key, value = nodes
    held = read_yaml(text, origin=str(PARAMS))["fetch"]
    lines = [line for name, entry in held.items() if name not in names for line in entry_lines(name, entry)]
    if lines:
        return with_lines(text, "fetch", lines)
    end = "\r\n" if "\r\n" in text else "\n"
    return (
        text[: key.start_mark.index] + f"fetch: {{}}{end}" + text[_line_end(text, _last_index(key, value)) :]
    )


def _block_nodes(text: str, name: str) -> tuple[Any, Any] | None:
    """Return the nodes of a key at the top level and its value, which know their places in the text."""
    from ruamel.yaml import YAML

    root = YAML(typ="rt", pure=True).compose(text)
    return next(((key, value) for key, value in root.value if key.value == name), None)


def _last_index(key: Any, value: Any) -> int:  # noqa: ANN401 - ruamel nodes
    """Return where the text of an entry ends. The end mark of a block, or of nothing, lies after comments below."""
    if value.start_mark.index == value.end_mark.index:
        return key.end_mark.index
    if value.id == "scalar" and value.style in ("|", ">"):
        text = value.start_mark.buffer[: value.end_mark.index]  # the end mark lies at what follows
        return len(text.rstrip())
    if value.id == "scalar" or value.flow_style:
        return value.end_mark.index
    last = value.value[-1]
    return _last_index(*last) if isinstance(last, tuple) else _last_index(last, last)


def _line_end(text: str, index: int) -> int:
    """Return where the line of `index` ends, its comment and line break included."""
    found = text.find("\n", index)
    return len(text) if found < 0 else found + 1


def yaml_nodes(text: str) -> dict[tuple[str, ...], tuple[Any, Any]]:
    """Return the nodes of key and value under all keys that lead to them. They know their places in the text."""
    from ruamel.yaml import YAML

    found: dict[tuple[str, ...], tuple[Any, Any]] = {}

    def walk(node: Any, where: tuple[str, ...]) -> None:  # noqa: ANN401 - ruamel nodes
        for key, value in node.value:
            found[(*where, key.value)] = (key, value)
            if value.id == "mapping":
                walk(value, (*where, key.value))

    walk(YAML(typ="rt", pure=True).compose(text), ())
    return found


def with_value(text: str, keys: tuple[str, ...], value: object) -> str:
    """Return the text with a value in place of the present one. Comments stay, and stay in their columns if they can.

    Where the key is not there yet it becomes the last one of its block; whether it may be there is not asked.
    """
    found = yaml_nodes(text)
    _, parent = found.get(keys[:-1], (None, None))
    new = flow(value) if parent is not None and parent.flow_style else _value_text(value)
    newline = "\r\n" if "\r\n" in text else "\n"
    if keys in found:
        key, node = found[keys]
        start, end = node.start_mark.index, _last_index(key, node)
        if end <= start or (node.id != "scalar" and not node.flow_style):  # nothing, or lines of a block
            start, new = text.index(":", key.end_mark.index) + 1, f" {new}" if new else ""
            end = max(start, end)
        rest = text[end:]
        if comment := re.match(r" +(?=#)", rest):
            room = len(comment[0]) + (end - start) - len(new)
            rest = " " * max(2, room) + rest[len(comment[0]) :]
        elif not new:
            start = len(text[:start].rstrip(" "))
        return text[:start] + new + rest
    line = f"{flow(keys[-1])}: {new}".rstrip()
    if len(keys) == 1:
        return f"{text}{'' if text.endswith(newline) else newline}{line}{newline}"
    key, block = found.get(keys[:-1], (None, None))
    if block is None or block.id != "mapping" or not block.value:
        return with_value(text, keys[:-1], {keys[-1]: value})
    last_key, last_value = block.value[-1]
    position = _last_index(last_key, last_value)
    if block.flow_style:
        return f"{text[:position]}, {line}{text[position:]}"
    position = _line_end(text, position)
    start = "" if text[:position].endswith("\n") else newline
    return f"{text[:position]}{start}{' ' * last_key.start_mark.column}{line}{newline}{text[position:]}"


def _value_text(value: object) -> str:
    """Return a value as DVC would write it behind a key, on one line where it has brackets."""
    if _needs_lines(value):
        return flow(value)
    return " ".join(line.strip() for line in _entry("_", value, 2)).removeprefix("_:").strip()


def flow(value: object) -> str:
    """Return a value as one writes it in a line of YAML."""
    if value is None:
        return "null"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{flow(key)}: {flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(flow, value)) + "]"
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z][\w./-]*", value) and value.lower() not in _NOT_TEXT:
        return value
    return quoted(value) if isinstance(value, str) else json.dumps(value)


_NOT_TEXT = {"y", "n", "yes", "no", "on", "off", "true", "false", "null"}
"""Words that some reader of YAML takes for something else than text."""
