"""The device and the precision that a person has asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipelines.project.errors import InputError

if TYPE_CHECKING:
    import torch


def choose_device(name: str) -> torch.device:
    """Return the device of a name, `auto` for the best one.

    Raises:
        InputError: this machine has no such device.
    """
    import torch

    from sdlora.devices import best_device

    if name == "auto":
        return best_device()
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        fault = str(error).strip().splitlines()[0]
        raise InputError(f"--device {name}: not usable here ({fault}); try cpu or auto") from None
    return device


def choose_bf16(precision: str, device: torch.device) -> bool:
    """Return whether to compute in bfloat16: `auto` does on a GPU that is fast at it, and nowhere else."""
    import torch

    if precision == "auto":
        return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return precision == "bf16"
