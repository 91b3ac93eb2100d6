"""SD-LoRA on timm vision transformers: directions, magnitudes, a growing head, and the files they live in."""
