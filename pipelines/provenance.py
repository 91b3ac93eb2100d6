"""Of what code, and with which libraries, a result was made: for the ledger."""

import hashlib
import platform
from functools import cache
from importlib import metadata
from pathlib import Path

HOME = Path(__file__).resolve().parent.parent
"""The repository: the code that runs, and the dvc.yaml that names what of it a stage depends on."""

LIBRARIES = ("numpy", "pillow", "pyarrow", "safetensors", "timm", "torch")
"""What can change the bytes of a step."""


def code_hash(stage: str) -> str:
    """SHA-256 over the names and bytes of the code that dvc.yaml lists under a stage, a folder being its modules.

    It is of what decides whether DVC runs the stage again, so the same inputs never give two records.
    """
    digest = hashlib.sha256()
    for name in _listed(stage):
        path = HOME / name
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(f"{file.relative_to(HOME).as_posix()}\n".encode())
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def library_versions() -> dict[str, str]:
    """The version of Python, without its patch level, and of every library that can change the bytes of a step."""
    return {
        "python": ".".join(platform.python_version_tuple()[:2]),
        **{name: metadata.version(name) for name in LIBRARIES},
    }


@cache
def _listed(stage: str) -> tuple[str, ...]:
    from pipelines.params import read_text, read_yaml

    path = HOME / "dvc.yaml"
    entry = read_yaml(read_text(path), origin=str(path))["stages"][stage]
    deps: list[str] = entry.get("do", entry)["deps"]
    return tuple(sorted(dep for dep in deps if dep.startswith(("pipelines/", "sdlora/"))))
