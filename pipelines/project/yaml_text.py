"""The text of a YAML file, and values as one writes them there."""

import json
import re
from pathlib import Path
from typing import Any

from pipelines.project.errors import InputError
from pipelines.project.yaml_values import load_yaml


def read_text(path: Path) -> str:
    """Return the text of a params file, line ends and all. An `InputError` where there is none."""
    try:
        return path.read_bytes().decode()
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path}: the file is missing; run the command in the project's folder") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from None


def read_yaml(text: str, *, origin: str) -> dict[Any, Any]:
    """Return the mapping in a YAML text, read as DVC reads it. An `InputError` names the line of a syntax error."""
    from ruamel.yaml.constructor import DuplicateKeyError
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    try:
        raw = load_yaml(text)
    except DuplicateKeyError as error:
        key = re.search(r'key "(.*?)"', str(error.problem))
        raise InputError(
            f"{origin}: line {error.problem_mark.line + 1}: the key {key[1] if key else ''!r} stands there"
            " a second time; remove one of the two"
        ) from None
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1}: " if mark else ""
        fault = " ".join(str(error.problem or error.context).split())
        raise InputError(f"{origin}: {line}not valid YAML ({fault}); mend that line") from None
    except (YAMLError, ValueError) as error:
        fault = " ".join(str(error).split())
        raise InputError(f"{origin}: not valid YAML ({fault})") from None
    if raw is None:
        raise InputError(f"{origin}: the file is empty; restore it from version control")
    if not isinstance(raw, dict):
        raise InputError(f"{origin}: expected a block of keys, found {show_value(raw)}; restore the file")
    return raw


def show_key(key: str) -> str:
    return key if key.isprintable() else json.dumps(key)


def show_value(value: object) -> str:
    """Return a value as one reads it in YAML, on one line."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool | int | float | str):
        text = json.dumps(value, ensure_ascii=not str(value).isprintable())
        return text if len(text) <= 60 else text[:57] + "..."
    return {"dict": "a block of keys", "list": "a list"}.get(type(value).__name__, str(value))


def value_at(block: object, keys: tuple[str, ...]) -> Any:  # noqa: ANN401 - whatever YAML can hold
    """Return what stands under some keys. None where nothing does."""
    for key in keys:
        block = block.get(key) if isinstance(block, dict) else None
    return block
