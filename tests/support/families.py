"""The families of timm's vision transformers at tiny size, registered with timm under names of their own.

It imports nothing of this project, so that a process that has timm alone can load what was exported of them.
"""

from collections.abc import Callable
from typing import Any

import timm
import torch
from timm.models import VisionTransformer, build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.beit import Beit
from timm.models.cait import Cait
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from timm.models.xcit import Xcit
from torch import nn

SIZE = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}

ARCHITECTURES: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "tiny_vit": (VisionTransformer, {}),
    "tiny_vit_pooled": (VisionTransformer, {"class_token": False, "global_pool": "avg"}),
    "tiny_deit3": (VisionTransformer, {"no_embed_class": True, "init_values": 0.1}),
    "tiny_deit_distilled": (VisionTransformerDistilled, {}),
    "tiny_dinov2_registers": (
        VisionTransformer,
        {"reg_tokens": 4, "no_embed_class": True, "init_values": 0.1},
    ),
    "tiny_siglip": (VisionTransformer, {"class_token": False, "global_pool": "map"}),
    "tiny_clip": (VisionTransformer, {"pre_norm": True, "act_layer": "quick_gelu"}),
    "tiny_relative_positions": (VisionTransformerRelPos, {}),
    "tiny_beit": (Beit, {"use_rel_pos_bias": True, "init_values": 0.1}),
    "tiny_eva": (Eva, {"qkv_fused": True, "init_values": 0.1}),
    "tiny_eva02": (
        Eva,
        {
            "qkv_fused": False,
            "swiglu_mlp": True,
            "scale_mlp": True,
            "use_rot_pos_emb": True,
            "ref_feat_shape": (2, 2),
        },
    ),
    "tiny_cait": (Cait, {"depth_token_only": 1, "init_values": 0.1}),
    "tiny_xcit": (Xcit, {"eta": 0.1}),
}

default_cfgs = generate_default_cfgs(
    {
        f"{name}.random": {
            "url": "",
            "num_classes": 0,
            "input_size": (3, 16, 16),
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "interpolation": "bicubic",
            "crop_pct": 0.9,
            "crop_mode": "center",
            "license": "apache-2.0",
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        }
        for name in ARCHITECTURES
    }
)


def _entrypoint(name: str) -> Callable[..., nn.Module]:
    kind, options = ARCHITECTURES[name]

    def make(pretrained: bool = False, **kwargs: Any) -> nn.Module:  # noqa: ANN401 - timm's own protocol
        return build_model_with_cfg(kind, name, pretrained, **{**SIZE, **options, **kwargs})

    make.__name__ = name
    return make


def _factory(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=0).eval()
        with torch.no_grad():
            for parameter in model.parameters():  # many start at 0, where a mistake would not show
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        return model

    return make


for _name in ARCHITECTURES:
    register_model(_entrypoint(_name))

FAMILIES: dict[str, Callable[[], nn.Module]] = {name: _factory(name) for name in ARCHITECTURES}
"""Name in timm's registry → the model without a classifier, with random weights, the same every time."""
