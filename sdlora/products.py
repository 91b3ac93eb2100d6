"""float32 matrix products on the CPU by oneDNN, where torch takes MKL's.

MKL uses half the width of the vector units of a processor that is not Intel's. Measured on an EPYC with AVX-512, in the
sizes of the models here: MKL 220, oneDNN 370 to 520 GFLOP/s on two cores (docs/explanation/performance.md. Not
measured on Intel).
torch takes oneDNN for bfloat16 by itself, for float32 through the operator that its own compiler uses. The products do
not depend on the number of threads, nor on the other rows of a batch.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.overrides import TorchFunctionMode


def by_onednn(device: torch.device) -> AbstractContextManager[object]:
    """Within this block float32 linear layers on the CPU go through oneDNN. Others, and other devices, as ever.

    Backward passes may come after the block. Second derivatives are refused; `torch.func` and checkpoints that compute
    again outside of the block know nothing of it.
    """
    usable = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    wanted = usable and torch.backends.mkldnn.enabled and device.type == "cpu"
    return _LinearByOneDnn() if wanted else nullcontext()


class _LinearByOneDnn(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - what any function of torch returns
        if func is functional.linear and not torch.is_autocast_enabled("cpu"):
            return _linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    parts = (input, weight) if bias is None else (input, weight, bias)
    plain = all(part.dtype == torch.float32 and part.device.type == "cpu" for part in parts)
    fitting = input.dim() > 1 and weight.dim() == 2 and input.shape[-1] == weight.shape[1] and input.numel()
    if not plain or not fitting:  # torch says what is wrong, where something is
        return functional.linear(input, weight, bias)
    return _Linear.apply(input, weight, bias)


class _Linear(torch.autograd.Function):
    """As `functional.linear`, and its gradients: of the input (…, d), the weight (k, d) and the bias (k,)."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(input if ctx.needs_input_grad[1] else None, weight)
        return _product(input, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # noqa: ANN401
        input, weight = ctx.saved_tensors
        of_input, of_weight, of_bias = ctx.needs_input_grad
        rows = grad.flatten(0, -2)
        return (
            _product(grad, weight.t()) if of_input else None,
            _product(rows.t(), input.flatten(0, -2).t()) if of_weight else None,
            rows.sum(dim=0) if of_bias else None,
        )


def _product(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """left (…, d) times the transpose of right (k, d): (…, k)."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise(left, right, bias, "none", [], "")
    return result
