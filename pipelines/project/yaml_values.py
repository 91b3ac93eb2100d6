"""The values of a YAML text as DVC reads it, YAML 1.2, by libyaml where that is sure to find the same."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Hashable
from typing import Any

import yaml

_UNSURE = re.compile("[!\t\x85\u2028\u2029\ufeff]|^%", re.MULTILINE)
"""What libyaml may take otherwise: tags, tabs, line breaks of YAML 1.1 alone, a byte order mark, directives."""


def load_yaml(text: str) -> Any:  # noqa: ANN401 - whatever YAML can hold
    """Return what a text says. Whatever is not plain, an error too, is read by ruamel, as in DVC.

    Raises:
        ruamel.yaml.error.YAMLError: it is not valid YAML.
        ValueError: it has a value that there is not, such as a date in a thirteenth month.
    """
    if hasattr(yaml, "CSafeLoader") and not _UNSURE.search(text):
        with contextlib.suppress(yaml.YAMLError, ValueError, RecursionError):
            return _plain(text)
    from ruamel.yaml import YAML

    return YAML(typ="safe", pure=True).load(text)


def _plain(text: str) -> Any:  # noqa: ANN401
    loader = _PlainLoader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def _mapping(loader: Any, node: Any) -> dict[Any, Any]:  # noqa: ANN401 - PyYAML has no types
    found = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, Hashable) or key in found:
            raise yaml.YAMLError("a key that stands there twice, or cannot be one")
        found[key] = loader.construct_object(value_node, deep=True)
    return found


def _list(loader: Any, node: Any) -> list[Any]:  # noqa: ANN401
    return [loader.construct_object(value, deep=True) for value in node.value]


def _text(loader: Any, node: Any) -> str:  # noqa: ANN401
    return str(loader.construct_scalar(node))


def _null(loader: Any, node: Any) -> None:  # noqa: ANN401
    loader.construct_scalar(node)


def _bool(loader: Any, node: Any) -> bool:  # noqa: ANN401
    return {"true": True, "false": False}[_text(loader, node).lower()]


def _int(loader: Any, node: Any) -> int:  # noqa: ANN401
    sign, digits = _signed(_text(loader, node))
    base = {"0b": 2, "0o": 8, "0x": 16}.get(digits[:2])
    return sign * (int(digits[2:], base) if base else int(digits))


def _float(loader: Any, node: Any) -> float:  # noqa: ANN401
    sign, digits = _signed(_text(loader, node).lower())
    return sign * float(digits[1:] if digits in (".inf", ".nan") else digits)


def _signed(text: str) -> tuple[int, str]:
    digits = text.replace("_", "")
    return (-1 if digits.startswith("-") else 1), digits.removeprefix("-" if "-" in digits[:1] else "+")


def _unsure(loader: Any, node: Any) -> None:  # noqa: ANN401
    raise yaml.YAMLError(f"{node.tag} is not plain")


_SCALARS = {
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF"), _bool),
    "float": (
        r"[-+]?(?:[0-9][0-9_]*)\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[-+]?(?:[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)"
        r"|[-+]?\.[0-9_]+(?:[eE][-+][0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+0123456789."),
        _float,
    ),
    "int": (
        r"[-+]?0b[0-1_]+|[-+]?0o?[0-7_]+|[-+]?[0-9_]+|[-+]?0x[0-9a-fA-F_]+",
        list("-+0123456789"),
        _int,
    ),
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""], _null),
    # Dates, merged mappings and the rest are rare, and ruamel's.
    "timestamp": (r"[0-9]{4}-[0-9].*", list("0123456789"), _unsure),
    "merge": (r"<<", ["<"], _unsure),
    "value": (r"=", ["="], _unsure),
}
"""Kind → pattern, first characters and constructor. The patterns are ruamel's, for YAML 1.2. The first match counts."""

_TAG = "tag:yaml.org,2002:"


def _resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    """Return the kinds of scalars by first character, as PyYAML keeps them."""
    found: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    for kind, (pattern, first, _) in _SCALARS.items():
        for character in first:
            found.setdefault(character, []).append((f"{_TAG}{kind}", re.compile(f"^(?:{pattern})$")))
    return found


class _PlainLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Mappings without a key twice, lists, and the plain scalars of YAML 1.2. All else is an error."""

    yaml_implicit_resolvers = _resolvers()
    yaml_constructors: dict[str | None, Any] = {  # noqa: RUF012 - of PyYAML
        **{f"{_TAG}{kind}": make for kind, (_, _, make) in _SCALARS.items()},
        f"{_TAG}map": _mapping,
        f"{_TAG}seq": _list,
        f"{_TAG}str": _text,
        None: _unsure,
    }
