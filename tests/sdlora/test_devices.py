"""How arithmetic is set, for a whole process."""

import pytest
import torch

from sdlora.devices import set_deterministic


@pytest.mark.parametrize("tf32", [False, True])
def test_tf32_is_on_for_all_kinds_of_products_or_for_none(tf32: bool) -> None:
    """What reads one switch for all, as torch's own exporter does, must not find that they differ."""
    try:
        set_deterministic(True, tf32=tf32)
        assert torch.backends.cuda.matmul.allow_tf32 is tf32
        assert torch.backends.cudnn.allow_tf32 is tf32
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        set_deterministic(False)
