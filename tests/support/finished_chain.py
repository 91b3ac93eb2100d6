"""What a real chain leaves: the stages that ran, hashes of the files, entries of dvc.lock."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path


def stages_run(output: str) -> list[str]:
    return re.findall(r"^\[.*\] (\S+)  done, ", output, re.MULTILINE)


def hashes(folder: Path) -> dict[str, str]:
    files = [path for path in (folder / "artifacts").rglob("*") if path.is_file()]
    files += [folder / "metrics.json"]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def entries(folder: Path) -> dict[str, object]:
    return entries_of((folder / "dvc.lock").read_text())


def entries_of(lock: str) -> dict[str, object]:
    """The stages of a dvc.lock, whose order is that of their ends."""
    from ruamel.yaml import YAML

    return dict(YAML(typ="safe").load(lock)["stages"])
