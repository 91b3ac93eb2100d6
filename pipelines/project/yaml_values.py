"""The values of a YAML text: YAML 1.2 as DVC reads it, in one bounded pass over the events of libyaml.

What two readers of YAML could take for two things is refused, and so is what only a program would write here: tags,
anchors and aliases, dates, tabs between values, hundreds of levels.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import yaml

from pipelines.project.display import show_value
from pipelines.project.errors import InputError


class Bounds(NamedTuple):
    """How large a file of YAML may be."""

    size: int
    """bytes"""
    values: int
    """values, keys and blocks"""


WRITTEN = Bounds(4 * 2**20, 100_000)
"""What people write, and programs for them: params.yaml, parameter sets, the values of a sweep."""
LOCKED = Bounds(64 * 2**20, 2_000_000)
"""dvc.lock, which DVC writes: 1 to 2 KB for each of five stages of a task."""
_LEVELS = 64
_LONGEST = 2**16
"""Characters of a value or a key."""
_LONGEST_NUMBER = 100

_UNREADABLE = re.compile(
    "[^\t\n\r\x20-\x7e\xa0-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]"
)
"""What YAML does not take, or one of its editions takes for the end of a line."""
_COMMENT = re.compile(r"(?:^|(?<=[ \r\n]))#[^\r\n]*")


def load_yaml(text: str, *, origin: str, bounds: Bounds = WRITTEN) -> Any:  # noqa: ANN401 - whatever YAML can hold
    """Return what a text says, None where it says nothing.

    Raises:
        InputError: it is not valid YAML, or more than a person writes. The line names `origin` and the place.
    """
    text = text.removeprefix("\ufeff")
    if unreadable := _UNREADABLE.search(text):
        raise _fault(
            origin,
            text.count("\n", 0, unreadable.start()),
            f"the character U+{ord(unreadable[0]):04X}, which YAML does not take; remove it",
        )
    values = _Values(origin, bounds)
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)(text)
    try:
        while not isinstance(event := loader.get_event(), yaml.StreamEndEvent):
            values.take(event)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = " ".join(str(error.problem or error.context).split())
        line = text.count("\n", 0, min(mark.index, len(text.rstrip())))
        raise _fault(origin, line, f"not valid YAML ({problem}); mend that line") from None
    finally:
        loader.dispose()
    if "\t" in text:
        _require_no_tab(text, values.quoted, origin)
    return values.root


def _fault(origin: str, line: int, text: str) -> InputError:
    return InputError(f"{origin}: line {line + 1}: {text}")


def _require_no_tab(text: str, quoted: list[tuple[int, int]], origin: str) -> None:
    """Refuse a tab that is neither in a comment nor in quotes: libyaml takes it for a blank, and DVC does not."""
    start = 0
    for first, end in [*quoted, (len(text), len(text))]:
        between = _COMMENT.sub(lambda comment: " " * len(comment[0]), text[start:first])
        if "\t" in between:
            line = text.count("\n", 0, start + between.index("\t"))
            raise _fault(origin, line, "a tab between values, which DVC does not take; write blanks")
        start = end


class _Open(NamedTuple):
    """A block or list that has not ended."""

    content: dict[Any, Any] | list[Any]
    keys: list[Any]
    """the key whose value comes next, if there is one"""
    in_brackets: bool


class _Values:
    """Makes values of events."""

    def __init__(self, origin: str, bounds: Bounds) -> None:
        self.root: Any = None
        self.quoted: list[tuple[int, int]] = []
        """From where to where the texts are that stand in quotes, or in lines of their own."""
        self._origin = origin
        self._most = self._left = bounds.values
        self._open: list[_Open] = []
        self._documents = 0

    def take(self, event: Any) -> None:  # noqa: ANN401 - PyYAML has no types
        """Take the next event."""
        if isinstance(event, yaml.NodeEvent):
            self._require_plain(event)
        if isinstance(event, yaml.ScalarEvent):
            self._place(self._scalar(event), event)
        elif isinstance(event, yaml.CollectionStartEvent):
            if len(self._open) == _LEVELS:
                raise self._fault(event, f"more than {_LEVELS} levels of blocks and lists; write fewer")
            content: dict[Any, Any] | list[Any] = {} if isinstance(event, yaml.MappingStartEvent) else []
            self._place(content, event)
            self._open.append(_Open(content, [], bool(event.flow_style)))
        elif isinstance(event, yaml.CollectionEndEvent):
            self._open.pop()
        elif isinstance(event, yaml.DocumentStartEvent):
            self._documents += 1
            if self._documents > 1 or event.version or event.tags:
                raise self._fault(event, "not valid YAML (a second document, or a directive); remove it")

    def _require_plain(self, event: Any) -> None:  # noqa: ANN401
        if event.anchor is not None:
            raise self._fault(
                event, f"an anchor or alias ({show_value(event.anchor)}); write the value itself"
            )
        if getattr(event, "tag", None) is not None:
            raise self._fault(event, f"a tag ({show_value(event.tag)}); write the value without it")
        self._left -= 1
        if self._left < 0:
            raise self._fault(event, f"more than {self._most:,} keys and values; write fewer")

    def _scalar(self, event: Any) -> object:  # noqa: ANN401
        text: str = event.value
        if len(text) > _LONGEST:
            raise self._fault(event, f"a text of {len(text):,} characters, at most {_LONGEST:,}; shorten it")
        if not event.implicit[0]:
            self.quoted.append((event.start_mark.index, event.end_mark.index))
            return text
        if ":" in text and self._open and self._open[-1].in_brackets:
            raise self._fault(
                event, f"{show_value(text)} in brackets, which DVC does not take; write it in quotes"
            )
        for pattern, read in _KINDS.get(text[:1], ()):
            if pattern.fullmatch(text):
                try:
                    return read(text)
                except ValueError as error:
                    raise self._fault(event, f"{show_value(text)} {error}; write it in quotes") from None
        return text

    def _place(self, value: object, event: Any) -> None:  # noqa: ANN401
        """Put a value where it belongs: at the end of a list, or in a block as a key or behind one."""
        if not self._open:
            self.root = value
            return
        content, keys, _ = self._open[-1]
        if isinstance(content, list):
            content.append(value)
        elif keys:
            content[keys.pop()] = value
        elif not isinstance(value, Hashable):
            raise self._fault(event, f"not valid YAML ({show_value(value)} as a key); mend that line")
        elif value in content:
            shown = repr(value) if isinstance(value, str) and len(value) < 40 else show_value(value)
            raise self._fault(event, f"the key {shown} stands there a second time; remove one of the two")
        else:
            keys.append(value)

    def _fault(self, event: Any, text: str) -> InputError:  # noqa: ANN401
        return _fault(self._origin, event.start_mark.line, text)


def _bool(text: str) -> bool:
    return text.lower() == "true"


def _null(text: str) -> None:
    return None


def _int(text: str) -> int:
    sign, digits = _signed(text)
    base = {"0b": 2, "0o": 8, "0x": 16}.get(digits[:2])
    if len(digits) > _LONGEST_NUMBER or not digits[2 * bool(base) :]:
        raise ValueError("is not a number that can be read")
    return sign * (int(digits[2:], base) if base else int(digits))


def _float(text: str) -> float:
    sign, digits = _signed(text.lower())
    if len(digits) > _LONGEST_NUMBER or not re.search(r"[0-9]|inf|nan", digits):
        raise ValueError("is not a number that can be read")
    return sign * float(digits[1:] if digits in (".inf", ".nan") else digits)


def _signed(text: str) -> tuple[int, str]:
    digits = text.replace("_", "")
    return (-1 if digits.startswith("-") else 1), digits.removeprefix("-" if "-" in digits[:1] else "+")


def _refused(text: str) -> object:
    raise ValueError("is a date, or of a meaning of its own, in YAML")


_SCALARS: dict[str, tuple[str, str, Callable[[str], object]]] = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF", _bool),
    "float": (
        r"[-+]?(?:[0-9][0-9_]*)\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[-+]?(?:[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)"
        r"|[-+]?\.[0-9_]+(?:[eE][-+][0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
        _float,
    ),
    "int": (r"[-+]?0b[0-1_]+|[-+]?0o?[0-7_]+|[-+]?[0-9_]+|[-+]?0x[0-9a-fA-F_]+", "-+0123456789", _int),
    "null": (r"~|null|Null|NULL", "~nN", _null),
    "timestamp": (
        r"[0-9]{4}-[0-9]{2}-[0-9]{2}|[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}(?:[Tt]|[ \t]+)[0-9]{1,2}:[0-9]{2}:[0-9]{2}"
        r"(?:\.[0-9]*)?(?:[ \t]*(?:Z|[-+][0-9]{1,2}(?::[0-9]{2})?))?",
        "0123456789",
        _refused,
    ),
    "merge": (r"<<", "<", _refused),
    "value": (r"=", "=", _refused),
}
"""Kind → pattern, first characters and reader. The patterns are ruamel's, for YAML 1.2. The first match counts."""


def _by_first_character() -> dict[str, list[tuple[re.Pattern[str], Callable[[str], object]]]]:
    found: dict[str, list[tuple[re.Pattern[str], Callable[[str], object]]]] = {
        "": [(re.compile(""), _null)],
    }
    for pattern, first, read in _SCALARS.values():
        for character in first:
            found.setdefault(character, []).append((re.compile(pattern), read))
    return found


_KINDS = _by_first_character()
