"""SD-LoRA on timm vision transformers: directions, magnitudes, a growing head, and the files they live in.

`sdlora.Learner("glyph_vit")` learns tasks, one by one. `sdlora.load("artifacts/model/t05")` is the model of a step,
ready for use.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdlora.learner import Learner
    from sdlora.loading import load

    __version__: str

__all__ = ["Learner", "__version__", "load"]


def __dir__() -> list[str]:
    """Name what is loaded only when it is asked for, so that a notebook completes it."""
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:  # noqa: ANN401 - Python's own protocol
    """Load torch and timm only when a model is."""
    if name == "load":
        from sdlora.loading import load

        return load
    if name == "Learner":
        from sdlora.learner import Learner

        return Learner
    if name == "__version__":
        from importlib.metadata import version

        return version("sdlora")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
