# ruff: noqa: N803  (Triton's constants are written large)
"""Convolutions of few channels, written in Triton for GPUs: forward, and both gradients.

What cuDNN chooses for 16 and 32 channels goes over memory many times (benchmarks/README.md). Here
a program holds a run of pixels with all their channels, multiplies it with one tap of the filter
after another and adds up in float32. Weights are rounded to bf16 where they are read, as autocast
does; their gradient is float32, summed in a fixed order: the same input gives the same bits.

Triton comes with PyTorch's builds for CUDA on Linux. TRITON_INTERPRET=1 runs all of this on a CPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

PIXELS = 128  # of one multiplication
EACH = 16384  # values of a channel-wide run that one program adds up for the weights' gradient
SUMMED = 8192  # values of partial sums that one program holds


@triton.jit
def _convolve(
    x,
    w,
    y,
    num_pixels,
    stride_in,
    stride_tap,
    stride_out,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    PIXELS: tl.constexpr,
    FLIP: tl.constexpr,
):
    """y[n, h, w] = sum over taps of x[n, h + i, w + j] w[tap]; with the taps in reverse order
    and channels exchanged, the gradient of the input."""
    pixels = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    column, row = pixels % W, (pixels // W) % H
    inside = pixels < num_pixels
    channels = tl.arange(0, C)
    out = tl.zeros([PIXELS, C], tl.float32)
    for tap in tl.static_range(9):
        down, right = tap // 3 - 1, tap % 3 - 1
        there = inside & (row + down >= 0) & (row + down < H)
        there = there & (column + right >= 0) & (column + right < W)
        at = (pixels + down * W + right)[:, None] * C + channels[None, :]
        values = tl.load(x + at, mask=there[:, None], other=0.0)
        number = 8 - tap if FLIP else tap
        at = channels[:, None] * stride_in + channels[None, :] * stride_out
        weights = tl.load(w + number * stride_tap + at).to(values.dtype)
        out = tl.dot(values, weights, out, input_precision="ieee")
    at = pixels[:, None] * C + channels[None, :]
    tl.store(y + at, out.to(y.dtype.element_ty), mask=inside[:, None])


@triton.jit
def _weight_sums(
    x,
    dy,
    partial,
    num_pixels,
    H: tl.constexpr,
    W: tl.constexpr,
    C_IN: tl.constexpr,
    C_OUT: tl.constexpr,
    STRIDE: tl.constexpr,
    PIXELS: tl.constexpr,
    EACH: tl.constexpr,
):
    """Of each run of the output's pixels, for the three taps of one row of the filter.

    partial [parts, 3 rows, C out, 3 columns, C in]. The three pixels beside each other that a
    row of taps sees lie beside each other in memory; the fourth fills up to a power of two.
    """
    part, down = tl.program_id(0), tl.program_id(1) - 1
    channels, wide = tl.arange(0, C_OUT), tl.arange(0, 4 * C_IN)
    right = wide // C_IN - 1
    sums = tl.zeros([C_OUT, 4 * C_IN], tl.float32)
    for begin in range(0, EACH, PIXELS):
        pixels = part * EACH + begin + tl.arange(0, PIXELS)
        inside = pixels < num_pixels
        at = pixels[:, None] * C_OUT + channels[None, :]
        gradient = tl.load(dy + at, mask=inside[:, None], other=0.0)
        column, row = (pixels % W) * STRIDE, (pixels // W) % H * STRIDE + down
        there = inside & (row >= 0) & (row < H * STRIDE)
        across = column[:, None] + right[None, :]
        there = there[:, None] & (across >= 0) & (across < W * STRIDE) & (right < 2)[None, :]
        at = (pixels // (W * H) * (H * STRIDE) + row) * (W * STRIDE) + column
        at = at[:, None] * C_IN + (wide - C_IN)[None, :]
        values = tl.load(x + at, mask=there, other=0.0)
        sums = tl.dot(tl.trans(gradient), values, sums, input_precision="ieee")
    at = ((part * 3 + down + 1) * C_OUT + channels)[:, None] * (3 * C_IN) + wide[None, :]
    tl.store(partial + at, sums, mask=(wide < 3 * C_IN)[None, :])


@triton.jit(do_not_specialize=["num_parts"])
def _sum_parts(
    partial,
    dw,
    num_parts,
    PARTS: tl.constexpr,
    NUM: tl.constexpr,
    C_IN: tl.constexpr,
    C_OUT: tl.constexpr,
):
    """dw [C out, 3 rows, 3 columns, C in] out of all parts."""
    number = tl.program_id(0) * NUM + tl.arange(0, NUM)
    parts = tl.arange(0, PARTS)
    at = parts[:, None] * (9 * C_IN * C_OUT) + number[None, :]
    is_weight = number < 9 * C_IN * C_OUT
    mask = (parts < num_parts)[:, None] & is_weight[None, :]
    sums = tl.sum(tl.load(partial + at, mask=mask, other=0.0), 0)
    rest, row = number % (3 * C_IN), number // (3 * C_IN)
    down, out = row // C_OUT, row % C_OUT
    tl.store(dw + (out * 3 + down) * (3 * C_IN) + rest, sums, mask=is_weight)


class FusedConv(torch.autograd.Function):
    """Of stride 1 and as many channels out as in."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return _convolved(x, weight)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dy = dy.contiguous(memory_format=torch.channels_last)
        return _convolved(dy, weight, flip=True), _weight_gradient(x, dy)


class FusedWeightGradient(torch.autograd.Function):
    """PyTorch's convolution of stride 2, but for the gradient of its weights."""

    @staticmethod
    def forward(ctx, x, weight):
        rounded = weight.to(x.dtype)
        ctx.save_for_backward(x, weight, rounded)
        return nn.functional.conv2d(x, rounded, stride=2, padding=weight.shape[2] // 2)

    @staticmethod
    def backward(ctx, dy):
        x, weight, rounded = ctx.saved_tensors
        dy = dy.contiguous(memory_format=torch.channels_last)
        around = [weight.shape[2] // 2] * 2
        dx, _, _ = torch.ops.aten.convolution_backward(
            *(dy, x, rounded, None, [2, 2], around, [1, 1], False, [0, 0], 1),
            output_mask=[True, False, False],
        )
        dw = _weight_gradient(x, dy)
        return dx, dw if weight.shape[2] == 3 else dw[:, :, 1:2, 1:2].contiguous()  # middle tap


def _convolved(x: Tensor, weight: Tensor, flip: bool = False) -> Tensor:
    num, channels, height, width = x.shape
    stride_out, stride_in, _, stride_tap = weight.stride()
    if flip:
        stride_out, stride_in = stride_in, stride_out
    y, num_pixels = torch.empty_like(x), num * height * width
    _convolve[(triton.cdiv(num_pixels, PIXELS),)](
        *(x, weight, y, num_pixels, stride_in, stride_tap, stride_out),
        H=height,
        W=width,
        C=channels,
        PIXELS=PIXELS,
        FLIP=flip,
        num_warps=4,
    )
    return y


def _weight_gradient(x: Tensor, dy: Tensor) -> Tensor:
    """float32 [C out, C in, 3, 3]."""
    num, c_out, height, width = dy.shape
    num_pixels, each = num * height * width, EACH // c_out
    c_in, num_parts = x.shape[1], triton.cdiv(num_pixels, each)
    partial = x.new_empty((num_parts, 9 * c_in * c_out), dtype=torch.float32)
    dw = x.new_empty((c_out, 3, 3, c_in), dtype=torch.float32).permute(0, 3, 1, 2)
    channels = {"C_IN": c_in, "C_OUT": c_out}
    is_large = max(channels.values()) > 32
    _weight_sums[(num_parts, 3)](
        *(x, dy, partial, num_pixels),
        H=height,
        W=width,
        STRIDE=x.shape[3] // width,
        PIXELS=PIXELS // 2 if is_large else PIXELS,
        EACH=each,
        **channels,
        num_warps=8 if is_large else 4,
        num_stages=2 if is_large else 3,
    )
    parts = triton.next_power_of_2(num_parts)
    together = max(16, SUMMED // parts)
    _sum_parts[(triton.cdiv(dw.numel(), together),)](
        partial, dw, num_parts, PARTS=parts, NUM=together, **channels, num_warps=4
    )
    return dw
