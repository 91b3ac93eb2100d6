"""Sentences about keys and types that are wrong in `params.yaml`."""

import difflib
import json
import re
from collections.abc import Iterator, Mapping
from types import NoneType
from typing import Any, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from pipelines.project.settings import Section, fields_of
from pipelines.project.yaml_text import show_key, show_value


def wrong_keys(block: dict[Any, Any], where: tuple[str, ...] = ()) -> Iterator[str]:
    """Yield keys that are not text: DVC drops them without a word, and their stages with them."""
    for key, value in block.items():
        if not isinstance(key, str):
            of_tasks = where in (("tasks",), ("adapter", "rank_schedule"))
            name = f"t{key:02d}" if of_tasks and type(key) is int else json.dumps(str(key))
            place = ".".join(where) or "top level"
            yield f"{place}: the key {show_value(key)} is not text, and DVC would drop it silently; write {name}"
        elif isinstance(value, dict):
            yield from wrong_keys(value, (*where, key))


def type_faults(error: ValidationError, model: type[Section]) -> list[str]:
    """Return one line for each fault that pydantic found.

    Unknown keys come first, because a misspelt key is also a missing one.
    """
    details = sorted(error.errors(include_url=False), key=lambda e: e["type"] != "extra_forbidden")
    return [f"{_place(e['loc'])}: {_type_fault(e, model)}" for e in details]


def _type_fault(error: Any, model: type[Section]) -> str:  # noqa: ANN401 - pydantic's ErrorDetails, whose keys vary
    found = show_value(error["input"])
    bounds = {
        "greater_than": ("gt", "more than"),
        "greater_than_equal": ("ge", "at least"),
        "less_than": ("lt", "less than"),
        "less_than_equal": ("le", "at most"),
    }
    match error["type"]:
        case "extra_forbidden":
            known = list(fields_of(_section(model, error["loc"][:-1])))
            close = difflib.get_close_matches(str(error["loc"][-1]), known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(known) or 'none'}"
            return f"unknown key; {hint}"
        case "missing":
            return f"the key is missing; add it ({_field(model, error['loc']).description})"
        case "literal_error":
            known = re.findall(r"'(.*?)'", error["ctx"]["expected"])
            close = difflib.get_close_matches(str(error["input"]), known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            return f"expected one of {', '.join(known)}, found {found}{hint}"
        case kind if kind in bounds:
            bound, words = bounds[kind]
            return f"expected {words} {error['ctx'][bound]:.12g}, found {found}; correct it"
        case "string_type" if isinstance(error["input"], bool | int | float):
            return f"expected text, found {found}; write it in quotes: {json.dumps(str(error['input']))}"
        case "int_type" | "float_type" | "bool_type" if isinstance(error["input"], str):
            return (
                f"expected {_KINDS[error['type']]}, found the text {found}; remove the quotes or correct it"
            )
        case "string_pattern_mismatch" if error["loc"][-1] == "sha256":
            return f"expected 64 hexadecimal digits, found {found}; write what `sha256sum` prints of the file"
        case "string_pattern_mismatch" if error["loc"][-1] == "schedule":
            return (
                f"expected a cron line, found {found}; write minute, hour, day, month and weekday,"
                ' such as "0 3 * * *"'
            )
        case "string_pattern_mismatch" if error["loc"][-1] == "project":
            return f"expected a name, found {found}; use lower-case letters, digits and single dashes"
        case "string_pattern_mismatch" if error["loc"][0] == "workers":
            return f"expected a name as Git has them, found {found}; use letters, digits and . _ - + /"
        case "string_pattern_mismatch":
            return f"expected the path of a .safetensors file, found {found}; other formats are not loaded"
        case "too_short":
            return "the list is empty; name at least one, or write null"
        case "string_too_short":
            return "expected text, found an empty one; fill it in"
        case kind:
            return f"expected {_KINDS.get(kind, 'another value')}, found {found}; correct it"


_KINDS = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "model_type": "a block of keys",
    "dict_type": "a block of keys",
}


def _section(root: type[Section], where: tuple[str | int, ...]) -> type[Section]:
    """Return the model of the block at `where`."""
    model: Any = root
    for part in where:
        if isinstance(part, int):  # an entry of a list, whose kind the field of the list says
            continue
        if get_origin(model) is Mapping:
            model = get_args(model)[1]
        else:
            annotation = fields_of(model)[part].annotation
            options = [option for option in get_args(annotation) if option is not NoneType]
            model = options[0] if NoneType in get_args(annotation) else annotation
    return model


def _field(root: type[Section], where: tuple[str | int, ...]) -> FieldInfo:
    while isinstance(where[-1], int):
        where = where[:-1]
    return fields_of(_section(root, where[:-1]))[str(where[-1])]


def _place(where: tuple[str | int, ...]) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{show_key(part)}" for part in where)
    return text.removeprefix(".") or "top level"
