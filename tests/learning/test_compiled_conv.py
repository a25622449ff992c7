"""Convolutions in C++ equal PyTorch's, forward and backward, but for rounding."""

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
from torch import Tensor
from torch.nn import functional as F

from longtail_experts.learning import compiler
from longtail_experts.learning.compiled_conv import compiled_conv
from longtail_experts.learning.compiler import VALUES
from longtail_experts.learning.fused import how_far_from_float64
from longtail_experts.learning.layers import Conv

LISTED = compiler.FLAGS
FLOAT = torch.float32
pytestmark = needs_compiler


def a_conv(
    channels: int, compiled: bool = True, passes: bool = False, dtype: torch.dtype = FLOAT
) -> Conv:
    conv = Conv(channels, channels, passes=passes).to(memory_format=torch.channels_last)
    conv.weight.data = draw(*conv.weight.shape, seed=channels, mean=0.1, std=0.3, dtype=FLOAT)
    conv.fused = partial(compiled_conv, dtype) if compiled else None
    return conv


def assert_equals_float64_but_for_rounding(conv: Conv, x: Tensor) -> None:
    """Of values in bf16 each is rounded once, which makes 1.7e-3 of their length (3.3e-3 if it were
    not to the nearest), and twice that of a variance at most; sums of gradients are not rounded."""
    apart = how_far_from_float64(conv, [x])
    assert len(apart) == 4 + conv.passes
    for name, value in apart.items():
        moments, sums = name.startswith("the moments"), "weight" in name
        at_most = 1e-6 if x.dtype == FLOAT or sums else (4e-3 if moments else 2e-3)
        assert value < at_most, name


@pytest.mark.parametrize("dtype", VALUES, ids=str)
@pytest.mark.parametrize("passes", [True, False])
@pytest.mark.parametrize(
    ("channels", "images", "height", "width"),
    # Whole blocks, some that end within a row of tiles, fewer tiles than there are parts, and one.
    [
        *((16, 128, 32, 32), (32, 128, 16, 16), (64, 128, 8, 8)),
        *((16, 37, 20, 24), (32, 5, 28, 4), (64, 3, 4, 36), (16, 1, 4, 4), (64, 1, 4, 8)),
    ],
)
def test_equals_float64_but_for_rounding(channels, images, height, width, passes, dtype):
    x = draw(images, channels, height, width, dtype=dtype)
    assert_equals_float64_but_for_rounding(a_conv(channels, passes=passes, dtype=dtype), x)


@pytest.mark.parametrize("dtype", VALUES, ids=str)
@pytest.mark.parametrize("option", ["-mno-avx512f", "-mno-avx", "-D__AVX512F__"])
def test_with_registers_of_any_width(option, dtype, compiles_anew, monkeypatch):
    """For the last, where there are none of AVX-512, the compiler takes several for one."""
    monkeypatch.setenv("CXX", f"c++ {option}")
    monkeypatch.setattr(compiler, "FLAGS", (*LISTED, "-O1"))
    for channels in (16, 32, 64):
        x = draw(3, channels, 20, 12, dtype=dtype)
        assert_equals_float64_but_for_rounding(a_conv(channels, dtype=dtype), x)


@pytest.mark.parametrize("channels", [16, 32, 64])
@pytest.mark.parametrize("tap", range(9))
def test_a_filter_of_one_tap_moves_the_image(channels, tap):
    """From channel to channel: y[o] is x[o + 3], a pixel further."""
    conv, (down, right) = a_conv(channels), divmod(tap, 3)
    conv.weight.data.zero_()
    number = torch.arange(channels)
    conv.weight.data[number, (number + 3) % channels, down, right] = 1.0
    x = draw(2, channels, 8, 12, dtype=FLOAT)
    moved = F.pad(x, (1, 1, 1, 1))[:, (number + 3) % channels, down : down + 8, right : right + 12]
    torch.testing.assert_close(conv(x).detach(), moved, rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", VALUES, ids=str)
def test_the_same_bits_for_any_number_of_threads(dtype):
    inputs = draw(37, 32, 20, 12, dtype=dtype)
    layer = partial(a_conv, 32, passes=True, dtype=dtype)
    assert_same_bits_for_any_number_of_threads(layer, inputs)


@pytest.mark.parametrize("dtype", VALUES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("of_weights", [True, False])
def test_what_is_not_finite_is_not_hidden(value, of_weights, dtype):
    found, expected = {}, {}
    for compiled, into in ((True, found), (False, expected)):
        conv, x = a_conv(16, compiled, dtype=dtype), draw(4, 16, 8, 8, dtype=dtype)
        (conv.weight.data[3, 5] if of_weights else x[1, 5])[1, 2] = value
        with torch.autocast("cpu", BF16, enabled=dtype == BF16):
            into |= outcome(conv, x)
    for name in expected:
        assert not (found[name].isfinite() & ~expected[name].isfinite()).any(), name
    assert of_weights or found["output 0"][[0, 2, 3]].isfinite().all()  # other images


def test_a_gradient_that_nobody_asks_for_is_left_out():
    x = draw(4, 16, 8, 8, dtype=FLOAT)
    whole, frozen = a_conv(16), a_conv(16)
    expected = outcome(whole, x)
    frozen.weight.requires_grad_(False)
    assert torch.equal(outcome(frozen, x)["gradient 0"], expected["gradient 0"])
    frozen.weight.requires_grad_(True)
    y = frozen(x)
    y.backward(draw(*y.shape, seed=9, mean=0.0, dtype=FLOAT))
    assert torch.equal(frozen.weight.grad, expected["gradient 1"])


def test_any_memory_order_comes_out_as_channels_last():
    x = draw(4, 32, 8, 8, dtype=FLOAT)
    conv = a_conv(32, passes=True)
    expected = outcome(conv, x)
    conv.weight.grad, conv.weight.data = None, conv.weight.data.contiguous()
    found = outcome(conv, x.contiguous())
    assert all(torch.equal(found[name], values) for name, values in expected.items())
    assert conv(x.contiguous())[0].is_contiguous(memory_format=torch.channels_last)


def test_other_passes_are_pytorchs():
    x = draw(4, 16, 8, 8, dtype=FLOAT)
    for changed in (x.double(), x[:, :, 2:], x[..., 1:], x[..., :6], x[:, :, :1]):
        found, expected = (
            outcome(a_conv(16, compiled, passes=True).to(changed.dtype), changed)
            for compiled in (True, False)
        )
        assert all(torch.equal(found[name], values) for name, values in expected.items())
    with torch.autocast("cpu", BF16):
        for dtype in (FLOAT, BF16):  # x is float32, and made bf16 by autocast
            in_bf16 = [a_conv(16, compiled, dtype=dtype)(x) for compiled in (True, False)]
            assert in_bf16[0].dtype == BF16
            assert torch.equal(*in_bf16)
    evaluated = [a_conv(16, compiled).eval()(x) for compiled in (True, False)]
    assert torch.equal(*evaluated)
    assert a_conv(16)(x[:0]).shape == (0, 16, 8, 8)
    half = a_conv(16)
    half.weight.data = half.weight.data[:8].clone()
    assert half(x).shape == (4, 8, 8, 8)
    with pytest.raises(RuntimeError):
        a_conv(16)(x[:, :, :0])
    with pytest.raises(RuntimeError, match="to have 16 channels, but got 32"):
        a_conv(16)(draw(4, 32, 8, 8, dtype=FLOAT))
    leaf = x.clone().requires_grad_()
    squares = a_conv(16)(leaf).square().sum()
    (gradient,) = torch.autograd.grad(squares, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
