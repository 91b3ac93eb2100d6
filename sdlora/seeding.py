"""Where randomness comes from: one seed, and a generator for each use of it that nothing else can disturb."""

import hashlib

import torch


def generator_for(seed: int, *use: str | int) -> torch.Generator:
    """Return a CPU generator whose stream depends on the seed and on what it is used for, and on nothing else.

    Data order of an epoch, augmentation of a step and initial factors each have their own, so a run that is
    resumed draws what an undisturbed run draws without any generator state being saved.
    """
    digest = hashlib.sha256(repr((seed, *use)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
