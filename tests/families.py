"""One tiny model with random weights of every family of timm's vision transformers that can be a backbone."""

from typing import Any

import timm
import torch

from sdlora.backbones import PREPROCESSING, Backbone

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
FLEXIBLE = {key: value for key, value in TINY.items() if key != "img_size"}
FAMILIES: dict[str, dict[str, Any]] = {
    "vit_base_patch16_224": TINY,
    "vit_base_patch16_clip_224": TINY,  # a norm before the blocks
    "vit_large_patch14_clip_quickgelu_224": TINY,
    "vit_base_patch16_siglip_224": TINY,  # attention pooling
    "vit_base_patch16_siglip_gap_224": TINY,
    "vit_base_patch16_rpn_224": TINY,  # norms after attention and MLP
    "vit_small_patch14_dinov2": TINY,  # layer-scale
    "vit_small_patch14_reg4_dinov2": TINY,  # register tokens
    "vit_giant_patch14_dinov2": TINY,  # a gated MLP, packed
    "vit_little_patch16_reg4_gap_256": TINY,
    "vit_dwee_patch16_reg1_gap_256": TINY,  # differential attention
    "vit_intern300m_patch14_448": TINY,
    "vit_so150m_patch16_reg4_map_256": TINY,
    "flexivit_small": TINY,
    "aimv2_large_patch14_224": TINY,  # a gated MLP in two parts
    "vit_relpos_small_patch16_224": TINY,  # a relative position bias
    "samvit_base_patch16_224": TINY,  # window attention
    "vit_tiny_r_s16_p8_224": {key: value for key, value in TINY.items() if key != "patch_size"},  # a stem
    "deit_tiny_patch16_224": TINY,
    "deit_tiny_distilled_patch16_224": TINY,  # two class tokens
    "deit3_small_patch16_224": TINY,
    "beit_base_patch16_224": TINY,  # separate biases
    "beitv2_base_patch16_224": TINY,
    "eva_large_patch14_196": TINY,
    "eva02_tiny_patch14_224": TINY,  # rotary positions, split projections
    "eva02_base_patch16_clip_224": TINY,
    "vit_small_patch16_dinov3": TINY,
    "vit_small_plus_patch16_dinov3": TINY,
    "vit_small_patch16_rope_mixed_ape_224": TINY,
    "vit_medium_patch16_rope_reg1_gap_256": TINY,
    "vit_pe_core_base_patch16_224": TINY,
    "naflexvit_base_patch16_gap": FLEXIBLE,
    "naflexvit_base_patch16_map": FLEXIBLE,
    "cait_xxs24_224": TINY,
    "xcit_nano_12_p16_224": {**TINY, "patch_size": 16},  # attention between channels
}
"""timm's architecture → what makes it tiny."""


def tiny_backbone(architecture: str, *, seed: int = 0) -> Backbone:
    """The architecture at tiny size, with random weights, for 32×32 images (naflexvit: of its own size)."""
    arguments = FAMILIES[architecture]
    torch.manual_seed(seed)
    model = timm.create_model(architecture, num_classes=0, **arguments).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # some start so near zero that nothing would reach the features
            parameter.add_(0.1 * torch.randn_like(parameter))
    config = timm.data.resolve_model_data_config(model)
    channels, height, width = config["input_size"]
    if "img_size" in arguments:
        height = width = arguments["img_size"]
    config["input_size"] = (channels, height, width)
    return Backbone(
        model=model,
        description={
            "name": architecture,
            "features": model.num_features,
            "model_args": arguments,
            "pretrained_cfg": {key: config[key] for key in PREPROCESSING},
        },
    )
