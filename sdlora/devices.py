"""The device of a process, whether its arithmetic repeats to the bit, and how it rounds."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def best_device() -> torch.device:
    """Return the accelerator where there is one (CUDA_VISIBLE_DEVICES chooses among several), else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_of(member: int, size: int) -> torch.device:
    """Return the device of one of `size` processes that share a fit: an accelerator each, or all of them the CPU.

    Raises:
        ValueError: there are fewer accelerators than processes.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if torch.cuda.device_count() < size:
        raise ValueError(f"this process sees {torch.cuda.device_count()} of {size} devices")
    torch.cuda.set_device(member)
    return torch.device("cuda", member)


def set_deterministic(deterministic: bool, *, tf32: bool = False) -> None:
    """Make torch choose kernels that give the same bits on every run on the same machine, or the fastest ones.

    Args:
        tf32: whether products of float32 on a CUDA device may round their factors to ten bits; what is not asked for
            is switched off, convolutions too, where torch's own default is on.
    """
    if deterministic:
        # cuBLAS reads this when it is first used; without it, it may choose among streams' workspaces.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32


@contextmanager
def arithmetic(deterministic: bool, *, tf32: bool = False) -> Iterator[None]:
    """Within this block torch computes as `set_deterministic` says, and after it as before."""
    before = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    switches = [
        (torch.backends.cudnn, "benchmark"),
        (torch.backends.cuda.matmul, "allow_tf32"),
        (torch.backends.cudnn, "allow_tf32"),
    ]
    held = [getattr(place, name) for place, name in switches]
    set_deterministic(deterministic, tf32=tf32)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)
        for (place, name), value in zip(switches, held, strict=True):
            setattr(place, name, value)
