"""The methods by name: what each of them trains in a step, and what it leaves behind when the step is frozen."""

from sdlora.methods import finetune, frozen, sdlora
from sdlora.methods.method import FitResult, Method

METHODS: dict[str, Method] = {
    "sdlora": sdlora.METHOD,
    "finetune": finetune.METHOD,
    "frozen": frozen.METHOD,
}

__all__ = ["METHODS", "FitResult", "Method"]
