"""The methods by name: what each of them trains in a step, and what it leaves behind when the step is frozen."""

from sdlora.methods import (
    clora,
    finetune,
    frozen,
    inflora,
    joint,
    ncm,
    nlora,
    olora,
    sdlora,
    sdlora_kd,
    sdlora_rr,
)
from sdlora.methods.method import FitResult, Frozen, Method, Settings

METHODS: dict[str, Method] = {
    "sdlora": sdlora.METHOD,
    "sdlora-rr": sdlora_rr.METHOD,
    "sdlora-kd": sdlora_kd.METHOD,
    "finetune": finetune.METHOD,
    "frozen": frozen.METHOD,
    "ncm": ncm.METHOD,
    "joint": joint.METHOD,
    "olora": olora.METHOD,
    "nlora": nlora.METHOD,
    "inflora": inflora.METHOD,
    "clora": clora.METHOD,
}

__all__ = ["METHODS", "FitResult", "Frozen", "Method", "Settings"]
