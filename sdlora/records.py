"""The JSON files of a chain as they are read: of the right types, or refused in one line."""

import json
import math
import re
import stat
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    NamedTuple,
    NotRequired,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

FORMAT = 1
"""The version of what is written. Files without one are of version 1 too."""
_LARGEST, _DEEPEST = 32 * 2**20, 64
"""Bytes of a JSON file, and levels in it."""
_NAMES: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "true or false",
    NoneType: "null",
}


class Rule(NamedTuple):
    """What more than its type a value must hold: `Annotated[str, Rule(…)]`."""

    holds: Callable[[Any], object]
    words: str


Format = Annotated[
    int, Rule(FORMAT.__eq__, f"{FORMAT}; a newer version of this program wrote it, install that")
]
Sha256 = Annotated[str, Rule(re.compile(r"[0-9a-f]{64}").fullmatch, "64 hexadecimal digits")]
TaskId = Annotated[str, Rule(re.compile(r"t[0-9]{2,9}").fullmatch, "a step such as t03")]
Name = Annotated[
    str,
    Rule(
        re.compile(r"[^\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]{1,4096}").fullmatch,
        "one line of 1 to 4096 characters",
    ),
]
FileName = Annotated[
    str,
    Rule(
        re.compile(r"([A-Za-z0-9_]{1,64}/)?[A-Za-z0-9_]{1,64}\.(safetensors|json)").fullmatch,
        "the name of a file inside the folder",
    ),
]
Number = Annotated[float, Rule(lambda value: abs(value) < 1e30, "a number below 1e30")]
WholeNumber = Annotated[int, Rule(range(2**53).__contains__, "a whole number from 0 to 2^53")]


def read_bounded_json(path: Path, kind: Any = object) -> Any:  # noqa: ANN401 - a type, and a value of it
    """Return the content of a JSON file: a regular file of at most 32 MiB and 64 levels, finite numbers, unequal keys.

    Args:
        kind: what it is: a TypedDict, list, dict, union, plain type, `object` for anything, or one of these with a
            `Rule`. Keys that a TypedDict does not have are left alone.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is something else.
    """
    size = regular_size(path)
    if size > _LARGEST:
        raise ValueError(f"{path}: it has {size:,} bytes, at most {_LARGEST:,} are read")
    try:
        value = json.loads(
            path.read_bytes(), parse_constant=_number, parse_float=_number, object_pairs_hook=_object
        )
    except RecursionError:
        raise ValueError(f"{path}: more than {_DEEPEST} levels deep") from None
    except ValueError as error:
        raise ValueError(f"{path}: not a JSON file ({shown(str(error), 100)})") from None
    level, depth = [value], 0
    while level := [child for each in level for child in _children(each)]:
        depth += 1
        if depth > _DEEPEST:
            raise ValueError(f"{path}: more than {_DEEPEST} levels deep")
    if (fault := _fault(value, kind, "it")) is not None:
        raise ValueError(f"{path}: {fault}")
    return value


def read_record_file(path: Path, kind: Any) -> Any:  # noqa: ANN401 - a type, and a value of it
    """Return what `read_bounded_json` does, of a file that a step has left for good."""
    try:
        return read_bounded_json(path, kind)
    except ValueError as error:
        raise ValueError(f"{error}; restore the file") from None


def regular_size(path: Path) -> int:
    """Return the bytes of a regular file. A ValueError where it is a folder, or a pipe, which nobody may ever fill."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{path}: not a regular file")
    return found.st_size


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"a number that is {text}")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice in one object")
    return found


def _children(value: object) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _fault(value: Any, kind: Any, where: str) -> str | None:  # noqa: ANN401 - any value, any type
    """Return what is wrong with a value at a place, None where nothing is."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is NotRequired:
        return _fault(value, parts[0], where)
    if origin is Annotated:
        wrong = _fault(value, parts[0], where)
        return wrong or (None if parts[1].holds(value) else _told(value, parts[1].words, where))
    if origin in (Union, UnionType):
        faults = [_fault(value, part, where) for part in parts]
        return None if None in faults else faults[0]
    if is_typeddict(kind) or origin is dict:
        if not isinstance(value, dict):
            return _told(value, "an object", where)
        fields = _fields(kind) if origin is None else dict.fromkeys(value, parts[-1])
        lacking = [key for key in fields if key not in value and get_origin(fields[key]) is not NotRequired]
        if lacking:
            return f"{where} lacks {', '.join(map(shown, lacking[:3]))}"
        keys = (_fault(key, parts[0], f"a key of {where}") for key in value) if origin is dict else ()
        items = (
            _fault(value[key], fields[key], _inside(where, shown(key))) for key in fields if key in value
        )
        return next(filter(None, [*keys, *items]), None)
    if origin is list:
        if not isinstance(value, list):
            return _told(value, "a list", where)
        places = enumerate(value)
        return next(
            filter(None, (_fault(each, parts[0], _inside(where, f"[{i}]")) for i, each in places)), None
        )
    right = kind is object or type(value) is kind or (kind is float and type(value) is int)
    return None if right else _told(value, _NAMES[kind], where)


@cache
def _fields(kind: Any) -> dict[str, Any]:  # noqa: ANN401 - a TypedDict
    return get_type_hints(kind, include_extras=True)


def _inside(where: str, key: str) -> str:
    return f"{where}{key}" if key.startswith("[") else f"{where}.{key}".removeprefix("it.")


def _told(value: object, words: str, where: str) -> str:
    kinds = {dict: "an object", list: "a list", NoneType: "null"}
    return f"{where} is {kinds.get(type(value)) or shown(repr(value))}, expected {words}"


def shown(text: str, most: int = 40) -> str:
    """Return a text of a file as a line may show it: printable, and not long."""
    plain = " ".join(text[: most + 1].encode("ascii", "backslashreplace").decode().split())
    clean = "".join(letter if letter.isprintable() else "?" for letter in plain)
    return clean if len(text) <= most and len(clean) <= most else f"{clean[:most]}…"
