"""The ledger: one record per step, each holding the hash of the one before."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RECORD = "step.json"


def record_bytes(record: Mapping[str, Any]) -> bytes:
    """Return the record as it is written and hashed: JSON with sorted keys."""
    return (json.dumps(record, sort_keys=True, indent=2, ensure_ascii=False) + "\n").encode()


def record_hash(folder: Path) -> str:
    """SHA-256 of the record in a model folder: what the next step's record holds as `previous`."""
    return hashlib.sha256((folder / RECORD).read_bytes()).hexdigest()


def read_record(folder: Path) -> dict[str, Any]:
    """Return the record of a model folder.

    Raises:
        FileNotFoundError: the folder or its record is missing.
        ValueError: the record is not JSON.
    """
    path = folder / RECORD
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); restore the model folder") from error
