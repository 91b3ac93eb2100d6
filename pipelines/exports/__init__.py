"""The formats that a model is exported to, one file each: what it writes, and how its logits are computed again."""
