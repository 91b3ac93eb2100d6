"""Of what code, and with which libraries, a result was made: for the ledger."""

import platform
from collections.abc import Callable
from importlib import metadata

from pipelines.project.fingerprints import fingerprint_of

_LIBRARIES = ("numpy", "pillow", "pyarrow", "safetensors", "timm", "torch")
"""What can change the bytes of a step."""


def code_hash(function: Callable[..., object]) -> str:
    """Return the hash of the code of a stage's function: of what decides whether DVC runs it again.

    So the same inputs never give two records.
    """
    return fingerprint_of(function).sha256


def library_versions() -> dict[str, str]:
    """Return the versions of Python, without its patch level, and of libraries that can change the bytes of a step."""
    return {
        "python": ".".join(platform.python_version_tuple()[:2]),
        **{name: metadata.version(name) for name in _LIBRARIES},
    }
