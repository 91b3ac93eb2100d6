"""SD-LoRA on timm vision transformers: directions, magnitudes, a growing head, and the files they live in.

`sdlora.load("artifacts/model/t05")` is the model of a step, ready for use.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdlora.loading import load

__all__ = ["load"]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - Python's own protocol
    """Load torch and timm only when a model is."""
    if name == "load":
        from sdlora.loading import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
