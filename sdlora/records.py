"""The JSON files of a chain as they are read: of the right types, or refused in one line."""

import json
import math
import re
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
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
    while level := [child for each in level if isinstance(each, dict | list) for child in _children(each)]:
        depth += 1
        if depth > _DEEPEST:
            raise ValueError(f"{path}: more than {_DEEPEST} levels deep")
    if (fault := _check_of(kind)(value)) is not None:
        raise ValueError(f"{path}: {fault('it')}")
    return value


def read_record_file(path: Path, kind: Any) -> Any:  # noqa: ANN401 - a type, and a value of it
    """Return what `read_bounded_json` does, of a file that a step has left for good."""
    try:
        return read_bounded_json(path, kind)
    except ValueError as error:
        raise ValueError(f"{error}; restore the file") from None


def fault_of(value: object, kind: Any, where: str) -> str | None:  # noqa: ANN401 - a type
    """Return what is wrong with a value, in words, as `read_bounded_json` says it. None where nothing is."""
    fault = _check_of(kind)(value)
    return None if fault is None else fault(where)


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


_Fault = Callable[[str], str]
"""Returns what is wrong with a value, in words, where it is told the place of the value."""
_Check = Callable[[Any], _Fault | None]
"""Returns a fault of a value, None where it has none. Files of long chains have many values, so this has to be fast."""


@cache
def _check_of(kind: Any) -> _Check:  # noqa: ANN401 - any type
    """Return the check of a type."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is NotRequired:
        return _check_of(parts[0])
    if origin is Annotated:
        return _rule_check(_check_of(parts[0]), parts[1])
    if origin in (Union, UnionType):
        return _union_check([_check_of(part) for part in parts])
    if is_typeddict(kind):
        return _fields_check(_fields(kind))
    if origin is dict:
        return _dict_check(*map(_check_of, parts))
    if origin is list:
        return _list_check(_check_of(parts[0]))
    return _plain_check(kind)


def _plain_check(kind: Any) -> _Check:  # noqa: ANN401 - any type
    kinds = (float, int) if kind is float else (kind,)

    def check(value: object) -> _Fault | None:
        right = type(value) in kinds or kind is object
        return None if right else partial(_told, value, _NAMES[kind])

    return check


def _rule_check(plain: _Check, rule: Rule) -> _Check:
    def check(value: object) -> _Fault | None:
        return plain(value) or (None if rule.holds(value) else partial(_told, value, rule.words))

    return check


def _union_check(checks: Sequence[_Check]) -> _Check:
    def check(value: object) -> _Fault | None:
        faults = [check(value) for check in checks]
        return None if None in faults else faults[0]

    return check


def _fields_check(fields: Mapping[str, Any]) -> _Check:
    checks = {key: _check_of(kind) for key, kind in fields.items()}
    needed = [key for key, kind in fields.items() if get_origin(kind) is not NotRequired]

    def check(value: object) -> _Fault | None:
        if not isinstance(value, dict):
            return partial(_told, value, "an object")
        if lacking := [key for key in needed if key not in value]:
            return lambda where: f"{where} lacks {', '.join(map(shown, lacking[:3]))}"
        for key, its in checks.items():
            if key in value and (fault := its(value[key])) is not None:
                return _fault_inside(fault, shown(key))
        return None

    return check


def _dict_check(of_key: _Check, of_item: _Check) -> _Check:
    def check(value: object) -> _Fault | None:
        if not isinstance(value, dict):
            return partial(_told, value, "an object")
        for key in value:
            if (fault := of_key(key)) is not None:
                return _fault_of_key(fault)
        for key, item in value.items():
            if (fault := of_item(item)) is not None:
                return _fault_inside(fault, shown(key))
        return None

    return check


def _list_check(of_item: _Check) -> _Check:
    def check(value: object) -> _Fault | None:
        if not isinstance(value, list):
            return partial(_told, value, "a list")
        for index, item in enumerate(value):
            if (fault := of_item(item)) is not None:
                return _fault_inside(fault, f"[{index}]")
        return None

    return check


def _fault_of_key(fault: _Fault) -> _Fault:
    return lambda where: fault(f"a key of {where}")


def _fault_inside(fault: _Fault, key: str) -> _Fault:
    return lambda where: fault(
        f"{where}{key}" if key.startswith("[") else f"{where}.{key}".removeprefix("it.")
    )


@cache
def _fields(kind: Any) -> dict[str, Any]:  # noqa: ANN401 - a TypedDict
    return get_type_hints(kind, include_extras=True)


def _told(value: object, words: str, where: str) -> str:
    kinds = {dict: "an object", list: "a list", NoneType: "null"}
    return f"{where} is {kinds.get(type(value)) or shown(repr(value))}, expected {words}"


def shown(text: str, most: int = 40) -> str:
    """Return a text of a file as a line may show it: printable, and not long."""
    plain = " ".join(text[: most + 1].encode("ascii", "backslashreplace").decode().split())
    clean = "".join(letter if letter.isprintable() else "?" for letter in plain)
    return clean if len(text) <= most and len(clean) <= most else f"{clean[:most]}…"
