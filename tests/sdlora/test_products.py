"""Linear layers by oneDNN are those of torch within rounding, gradients included, and only where that is asked for."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from sdlora import products
from sdlora.classifier import IncrementalClassifier, ModelState
from sdlora.evaluation import feature_batches, predict_batches
from sdlora.head import HeadBlock
from sdlora.products import by_onednn
from tests.support.tiny_model import finish, make_fit, tiny_task, tiny_vit

CPU = torch.device("cpu")
HERE = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
only_here = pytest.mark.skipif(not HERE, reason="this torch has no MKL that oneDNN could stand in for")


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every product that oneDNN is asked for."""
    calls: list[int] = []
    product = products._product

    def counted(*arguments: Tensor) -> Tensor:
        calls.append(1)
        return product(*arguments)

    monkeypatch.setattr(products, "_product", counted)
    return calls


def random(*shape: int, trained: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).requires_grad_(trained)


@only_here
@pytest.mark.parametrize("shape", [(5, 16), (3, 7, 16), (2, 3, 5, 16)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("trained", [(True, True), (True, False), (False, True)])
def test_a_layer_and_its_gradients_are_those_of_torch(
    shape: tuple[int, ...], bias: bool, trained: tuple[bool, bool], taken: list[int]
) -> None:
    found = []
    for context in (nullcontext(), by_onednn(CPU)):
        inputs, weight = random(*shape, trained=trained[0]), random(24, 16, trained=trained[1])
        offset = random(24) if bias else None
        with context:
            outputs = functional.linear(inputs, weight, offset)
        (outputs * random(*outputs.shape, trained=False)).sum().backward()
        found.append([outputs, inputs.grad, weight.grad, None if offset is None else offset.grad])

    assert len(taken) == 1 + sum(trained)
    for theirs, ours in zip(*found, strict=True):
        assert (theirs is None) == (ours is None)
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@only_here
def test_the_input_of_a_frozen_layer_is_not_kept() -> None:
    kept: list[tuple[int, ...]] = []
    layer = nn.Linear(16, 24).requires_grad_(False)

    def note(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), by_onednn(CPU):
        layer(random(5, 16))

    assert kept == [(24, 16)]


def test_other_types_shapes_and_devices_go_as_ever(taken: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    layer, inputs = nn.Linear(16, 24), random(5, 16)
    with by_onednn(CPU):
        layer(random(16)).sum().backward()
        with pytest.raises(RuntimeError, match="dtype"):
            functional.linear(inputs, layer.weight, layer.bias.double())
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            layer(random(5, 15))
        layer.double()(inputs.double())
        layer.bfloat16()(inputs.bfloat16())
        layer.float()(inputs[:0])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            layer(inputs)
    with by_onednn(torch.device("cuda")):
        layer(inputs)
    layer(inputs)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    with by_onednn(CPU):
        layer(inputs)

    assert not taken


@only_here
def test_a_second_derivative_is_refused_and_not_wrong() -> None:
    inputs, layer = random(5, 16), nn.Linear(16, 24)
    with by_onednn(CPU):
        (grad,) = torch.autograd.grad(layer(inputs).square().sum(), inputs, create_graph=True)

    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@only_here
@pytest.mark.parametrize(("bf16", "used"), [(False, True), (True, False)])
def test_predictions_take_it_where_they_are_in_fp32(bf16: bool, used: bool, taken: list[int]) -> None:
    model = IncrementalClassifier(
        tiny_vit(), ModelState(head={"t01": HeadBlock(torch.zeros(2, 16), torch.zeros(2))})
    )
    images = [tiny_task(1)[0]]
    list(predict_batches(model, images, mean=[0.5], std=[0.5], device=CPU, bf16=bf16))

    assert bool(taken) == used


@only_here
def test_features_take_it(taken: list[int]) -> None:
    model = IncrementalClassifier(tiny_vit(), ModelState())
    list(feature_batches(model, tiny_task(1)[0], mean=[0.5], std=[0.5], batch_size=7, device=CPU))

    assert taken


@only_here
@pytest.mark.parametrize(("precision", "used"), [("fp32", True), ("bf16", False)])
def test_a_fit_in_fp32_takes_it_forward_and_back(precision: str, used: bool, taken: list[int]) -> None:
    fit = make_fit(ModelState(), 1, precision=precision)
    next(fit.run())
    layers = sum(isinstance(module, nn.Linear) for module in tiny_vit().modules())

    # Forward of every layer, the gradient of every input, and that of two layers' weights, which begin no input's.
    assert len(taken) == (2 * layers - 1 + 2 if used else 0)


def test_a_fit_is_the_same_within_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    by_it = finish(make_fit(ModelState(), 1))
    monkeypatch.setattr("sdlora.training.by_onednn", lambda device: nullcontext())
    without = finish(make_fit(ModelState(), 1))

    for name, factors in without.factors.items():
        for theirs, ours in zip(factors, by_it.factors[name], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_predictions_are_the_model_s_within_rounding() -> None:
    model, images = tiny_vit(), tiny_task(1)[0].float()
    with torch.inference_mode():
        theirs = model(images)
        with by_onednn(CPU):
            ours = model(images)

    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
