"""The text of a YAML file, and the block of keys that it says."""

import json
import re
from pathlib import Path
from typing import Any

from pipelines.project.display import show_value
from pipelines.project.errors import InputError
from pipelines.project.yaml_values import LOCKED, WRITTEN, Bounds, load_yaml


def read_text(path: Path, *, bounds: Bounds = WRITTEN) -> str:
    """Return the text of a YAML file, line ends and all.

    Raises:
        InputError: there is no such file, or it is no text, or a larger one than a file of its kind.
    """
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            raise InputError(f"{path}: not a regular file; put the file itself there")
        with path.open("rb") as file:
            data = file.read(bounds.size + 1)
        if len(data) > bounds.size:
            raise InputError(
                f"{path}: larger than {bounds.size / 2**20:.0f} MiB; restore the file, or write less"
            )
        return data.decode()
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path}: the file is missing; run the command in the project's folder") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from None


def read_yaml(text: str, *, origin: str, bounds: Bounds = WRITTEN) -> dict[Any, Any]:
    """Return the block of keys in a YAML text, read as DVC reads it.

    Raises:
        InputError: the text is nothing that `load_yaml` reads, or no block of keys.
    """
    raw = load_yaml(text, origin=origin, bounds=bounds)
    if raw is None:
        raise InputError(f"{origin}: the file is empty; restore it from version control")
    if not isinstance(raw, dict):
        raise InputError(f"{origin}: expected a block of keys, found {show_value(raw)}; restore the file")
    return raw


def read_lock_file(path: Path) -> dict[Any, Any]:
    """Return what dvc.lock says."""
    return read_yaml(read_text(path, bounds=LOCKED), origin=str(path), bounds=LOCKED)


def quoted(text: str) -> str:
    """Return a text in double quotes, as YAML and JSON both read it."""
    written = json.dumps(text, ensure_ascii=False)
    return re.sub("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]", lambda c: f"\\u{ord(c[0]):04x}", written)


def value_at(block: object, keys: tuple[str, ...]) -> Any:  # noqa: ANN401 - whatever YAML can hold
    """Return what stands under some keys. None where nothing does."""
    for key in keys:
        block = block.get(key) if isinstance(block, dict) else None
    return block
