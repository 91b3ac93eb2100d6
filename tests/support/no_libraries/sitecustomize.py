"""What Python loads at its start where this folder is in PYTHONPATH: the fork server of stages finds no torch.

A library that is not there is not preloaded, and stages that are shell scripts need none.
"""

import sys

if "pipelines.cli.preloaded" in sys.orig_argv:
    for name in ("torch", "timm"):
        sys.modules[name] = None  # type: ignore[assignment]
