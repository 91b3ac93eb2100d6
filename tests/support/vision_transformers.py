"""Variants of tiny vision transformers that adapters must fit."""

from __future__ import annotations

import pytest
import torch
from timm.models import VisionTransformer
from timm.models.eva import Eva
from torch import nn

from tests.support.tiny_model import tiny_vit


def eva(**options: bool) -> nn.Module:
    torch.manual_seed(0)
    return Eva(
        img_size=8, patch_size=4, in_chans=1, embed_dim=16, depth=2, num_heads=2, num_classes=0, **options
    ).eval()


def vit(**options: object) -> nn.Module:
    """A tiny vision transformer of timm's with one of its many options."""
    torch.manual_seed(0)
    sizes = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 2, "num_heads": 2}
    return VisionTransformer(**sizes, num_classes=0, **options).eval()


FAMILIES = [
    pytest.param(tiny_vit, id="fused-qkv"),
    pytest.param(lambda: vit(init_values=0.1), id="layer-scale"),
    pytest.param(lambda: vit(reg_tokens=3), id="register-tokens"),
    pytest.param(lambda: vit(global_pool="avg", class_token=False), id="pooled"),
    pytest.param(lambda: vit(qk_norm=True, qkv_bias=False), id="normalised-query-and-key"),
    pytest.param(lambda: eva(qkv_fused=True), id="fused-qkv-with-separate-biases"),
    pytest.param(lambda: eva(qkv_fused=False), id="split-qkv"),
]
