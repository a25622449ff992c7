"""Batch norm in C++ equals PyTorch's, forward and backward, as closely as values are rounded."""

from functools import partial

import pytest
import torch
from learning.compiled_layers import (
    BF16,
    assert_same_bits_for_any_number_of_threads,
    draw,
    needs_compiler,
    outcome,
)

from longtail_experts.learning.compiled_norm import compiled_norm
from longtail_experts.learning.compiler import VALUES
from longtail_experts.learning.fused import how_far_from_float64
from longtail_experts.learning.layers import Norm

# Of a value in bf16: twice what it is moved by at most. Sums, and what is float32, are far closer.
ROUNDING = {BF16: 2**-8, torch.float32: 1e-6}
FLIPPED = 5e-3  # where a ReLU's input next to 0 comes out on the other side, among thousands


def a_norm(channels: int, relu: bool = True, dtype: torch.dtype | None = BF16) -> Norm:
    """With code for `dtype`; None: PyTorch's."""
    random = torch.Generator().manual_seed(channels)
    norm = Norm(channels, relu=relu)
    norm.weight.data = torch.rand(channels, generator=random) + 0.5
    norm.bias.data = torch.randn(channels, generator=random)
    norm.running_mean.normal_(generator=random)
    norm.fused = None if dtype is None else partial(compiled_norm, dtype)
    return norm


@needs_compiler
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("dtype", VALUES, ids=str)
@pytest.mark.parametrize(
    ("channels", "images", "side"),
    # Whole blocks of every part, parts that end within one, and fewer pixels than there are parts.
    [(16, 128, 32), (16, 37, 19), (32, 5, 6), (32, 1, 5), (64, 9, 8), (64, 2, 2)],
)
def test_equals_float64_but_for_rounding(channels, images, side, adds, relu, dtype):
    shape = (images, channels, side, side)
    inputs = [draw(*shape, seed=1 + i, dtype=dtype) for i in range(1 + adds)]
    apart = how_far_from_float64(a_norm(channels, relu, dtype), inputs)
    assert len(apart) == 7 + adds
    for name, value in apart.items():
        rounded = "output" in name or "input" in name
        flipped = relu and "gradient" in name
        assert value < (FLIPPED if flipped else ROUNDING[dtype] if rounded else 1e-6), name


@needs_compiler
@pytest.mark.parametrize("first_pixel", [None, 1000.0])
@pytest.mark.parametrize("dtype", VALUES, ids=str)
def test_variance_of_values_far_from_zero(dtype, first_pixel):
    """Squares of 100 in float32 would lose a part in a thousand of a variance of 1."""
    x = draw(64, 16, 32, 32, mean=100.0, std=1.0, dtype=dtype)
    if first_pixel is not None:
        x[0, :, 0, 0] = first_pixel
    norm = a_norm(16, dtype=dtype)
    norm.momentum = 1.0
    norm(x)
    exact = x.double()
    torch.testing.assert_close(norm.running_mean.double(), exact.mean((0, 2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(norm.running_var.double(), exact.var((0, 2, 3)), rtol=3e-5, atol=0)


@needs_compiler
@pytest.mark.parametrize("dtype", VALUES, ids=str)
def test_the_same_bits_for_any_number_of_threads(dtype):
    inputs = [draw(37, 16, 19, 19, seed=seed, dtype=dtype) for seed in (1, 2)]
    assert_same_bits_for_any_number_of_threads(partial(a_norm, 16, dtype=dtype), *inputs)


@needs_compiler
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("dtype", VALUES, ids=str)
def test_what_is_not_finite_is_not_hidden_by_the_relu(dtype, value, adds):
    inputs = [draw(4, 16, 8, 8, seed=1 + i, dtype=dtype) for i in range(1 + adds)]
    inputs[0][1, 5, 2, 2] = value
    found, expected = (outcome(a_norm(16, dtype=kind), *inputs) for kind in (dtype, None))
    assert found["output 0"].isnan()[:, 5].all()
    for name in expected:
        assert torch.equal(found[name].isnan(), expected[name].isnan()), name


@needs_compiler
def test_other_passes_are_pytorchs():
    x, added = (draw(4, 16, 8, 8, seed=seed) for seed in (1, 2))
    for dtype, *inputs in (
        (BF16, x.float()),
        (BF16, x.float(), added.float()),
        (BF16, x, added.float()),
        (torch.float32, x),
    ):
        found, expected = (outcome(a_norm(16, dtype=kind), *inputs) for kind in (dtype, None))
        assert all(torch.equal(found[name], values) for name, values in expected.items())
    evaluated = [a_norm(16, dtype=dtype).eval()(x, added) for dtype in (BF16, None)]
    assert torch.equal(*evaluated)
    of_one_pixel = added[:1, :, :1, :1].contiguous()
    broadcast = [a_norm(16, dtype=dtype)(x, of_one_pixel) for dtype in (BF16, None)]
    assert torch.equal(*broadcast)
    in_bf16 = [a_norm(16, dtype=dtype).bfloat16()(x) for dtype in (BF16, None)]
    assert torch.equal(*in_bf16)
    assert a_norm(16)(x[:0]).shape == (0, 16, 8, 8)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        a_norm(16)(of_one_pixel)
    with pytest.raises(RuntimeError, match="16"):
        a_norm(16)(draw(4, 32, 8, 8))
    leaf = x.clone().requires_grad_()
    squares = a_norm(16)(leaf).float().square().sum()
    (gradient,) = torch.autograd.grad(squares, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
