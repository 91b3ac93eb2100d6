"""The device of a process, and whether its arithmetic repeats to the bit."""

import os

import torch


def best_device() -> torch.device:
    """The accelerator where there is one (CUDA_VISIBLE_DEVICES chooses among several), else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def set_deterministic(deterministic: bool) -> None:
    """Make torch choose kernels that give the same bits on every run on the same machine, or the fastest ones."""
    if deterministic:
        # cuBLAS reads this when it is first used; without it, it may choose among streams' workspaces.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic
