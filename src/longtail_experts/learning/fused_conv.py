# ruff: noqa: N803  (Triton's constants are written large)
"""Convolutions of few channels, written in Triton for GPUs: forward, and both gradients.

What cuDNN chooses for 3 to 64 channels goes over memory many times (benchmarks/README.md). Here a
program holds a run of pixels with all their channels, multiplies it with one tap of the filter
after another and adds up in float32. Weights are rounded to bf16 where they are read, as autocast
does; their gradient is float32, summed in a fixed order: the same input gives the same bits.

Batch norms stand around these convolutions, and need sums of what a program holds here anyway: a
result has its mean and variance with it, as the attribute `moments`; and what is computed as the
gradient for a batch norm's output is summed up for that one's own gradients (`Normed`).

Tensors are in channels-last memory: an image is rows of pixels of channels, a filter
[C out, taps, C in]. Triton comes with PyTorch's builds for CUDA on Linux. TRITON_INTERPRET=1 runs
all of this on a CPU.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from longtail_experts.learning.fused import takes
from longtail_experts.learning.fused_norm import (
    Normed,
    counter_of,
    launch,
    mean_and_inverse,
    memory_for_sums,
    sum_up_gradients,
    sum_up_moments,
)
from longtail_experts.learning.layers import Conv, as_autocast_has_it

TILE = 8192  # values that a program multiplies with a tap at a time
EACH = 16384  # values of the output's gradient that one program sums up for the weights' gradient
RUN = 64  # pixels of them at a time
SUMMED = 8192  # values of partial sums that one program holds

_beside: dict[torch.cuda.Stream, torch.cuda.Stream] = {}  # by the one that they run beside


@triton.jit
def _patch(
    x,
    pixels,
    inside,
    first,
    NUM: tl.constexpr,
    WIDE: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
):
    """[pixels, WIDE]: what NUM taps of the filter from `first` on see, a tap C values.

    pixels are those of the output, H x W an image; zero beyond the edges, and behind the taps.
    """
    wide = tl.arange(0, WIDE)
    tap = first + wide // C
    down, right = tap // SIZE - SIZE // 2, tap % SIZE - SIZE // 2
    row = (pixels // W % H * STRIDE)[:, None] + down[None, :]
    column = (pixels % W * STRIDE)[:, None] + right[None, :]
    there = inside[:, None] & (wide < NUM * C)[None, :]
    there = there & (row >= 0) & (row < H * STRIDE) & (column >= 0) & (column < W * STRIDE)
    image = (pixels // (W * H) * (H * W * STRIDE * STRIDE))[:, None]
    at = (image + row * (W * STRIDE) + column) * C + (wide % C)[None, :]
    return tl.load(x + at, mask=there, other=0.0)


@triton.jit(do_not_specialize=["num_parts"])  # full and short batches share a compilation
def _convolve(
    x,
    w,
    y,
    partial,
    arrived,
    moments,
    num_pixels,
    num_parts,
    H: tl.constexpr,
    W: tl.constexpr,
    C_IN: tl.constexpr,
    C_OUT: tl.constexpr,
    SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    PIXELS: tl.constexpr,
    NUM: tl.constexpr,
    WIDE: tl.constexpr,
    PARTS: tl.constexpr,
):
    """y[n, h, w] = sum over taps of x[n, h STRIDE + i, w STRIDE + j] w[tap], NUM taps at a time;
    and the moments of y, as it is rounded."""
    pixels = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    inside = pixels < num_pixels
    channels, wide = tl.arange(0, C_OUT), tl.arange(0, WIDE)
    out = tl.zeros([PIXELS, C_OUT], tl.float32)
    for first in tl.static_range(0, SIZE * SIZE, NUM):
        values = _patch(x, pixels, inside, first, NUM, WIDE, H, W, C_IN, SIZE, STRIDE)
        at = channels[None, :] * (SIZE * SIZE * C_IN) + first * C_IN + wide[:, None]
        weights = tl.load(w + at, mask=(wide < NUM * C_IN)[:, None], other=0.0)
        out = tl.dot(values, weights.to(values.dtype), out, input_precision="ieee")
    at = pixels[:, None] * C_OUT + channels[None, :]
    rounded = out.to(y.dtype.element_ty)
    tl.store(y + at, rounded, mask=inside[:, None])
    values = rounded.to(tl.float32)
    inside = inside[:, None]
    sum_up_moments(
        values, inside, partial, arrived, moments, num_pixels, num_parts, PARTS, PIXELS, C_OUT
    )


@triton.jit(do_not_specialize=["num_parts"])
def _input_gradients(
    dy,
    w,
    other,
    dx,
    x,
    before,
    moments,
    eps,
    partial,
    arrived,
    dweight,
    dbias,
    num_pixels,
    num_parts,
    H: tl.constexpr,
    W: tl.constexpr,
    C_IN: tl.constexpr,
    C_OUT: tl.constexpr,
    SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    PIXELS: tl.constexpr,
    WIDE: tl.constexpr,
    ADDS: tl.constexpr,
    SUMS: tl.constexpr,
    RELU: tl.constexpr,
    PARTS: tl.constexpr,
):
    """dx[n, h, w] = sum over taps of dy[n, (h - i) / STRIDE, (w - j) / STRIDE] w[tap]^T, where
    that is a pixel, plus `other`. H and W are the input's; WIDE is C_IN, or more.

    With SUMS, x was made of `before` by batch norm (and ReLU): its sums of dx, as it is rounded.
    """
    pixels = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    inside = pixels < num_pixels
    row, column = pixels // W % H + SIZE // 2, pixels % W + SIZE // 2
    image = pixels // (W * H) * (H * W // (STRIDE * STRIDE))
    out_channels, in_channels = tl.arange(0, C_OUT), tl.arange(0, WIDE)
    is_channel = (in_channels < C_IN)[None, :]
    out = tl.zeros([PIXELS, WIDE], tl.float32)
    for tap in tl.static_range(SIZE * SIZE):
        down, right = row - tap // SIZE, column - tap % SIZE
        there = inside & (down >= 0) & (down < H) & (right >= 0) & (right < W)
        there = there & (down % STRIDE == 0) & (right % STRIDE == 0)
        at = image + down // STRIDE * (W // STRIDE) + right // STRIDE
        at = at[:, None] * C_OUT + out_channels[None, :]
        values = tl.load(dy + at, mask=there[:, None], other=0.0)
        at = (out_channels[:, None] * (SIZE * SIZE) + tap) * C_IN + in_channels[None, :]
        weights = tl.load(w + at, mask=is_channel, other=0.0).to(values.dtype)
        out = tl.dot(values, weights, out, input_precision="ieee")
    at = pixels[:, None] * C_IN + in_channels[None, :]
    mask = inside[:, None] & is_channel
    if ADDS:
        out += tl.load(other + at, mask=mask, other=0.0).to(tl.float32)
    rounded = out.to(dx.dtype.element_ty)
    tl.store(dx + at, rounded, mask=mask)
    if SUMS:
        gradient = rounded.to(tl.float32)
        if RELU:
            is_open = tl.load(x + at, mask=mask, other=0.0).to(tl.float32) > 0.0
            gradient = tl.where(is_open, gradient, 0.0)
        values = tl.load(before + at, mask=mask, other=0.0).to(tl.float32)
        mean, inverse = mean_and_inverse(moments, eps, WIDE)
        normal = (values - mean[None, :]) * inverse[None, :]
        sum_up_gradients(gradient, normal, partial, arrived, dweight, dbias, num_parts, PARTS, WIDE)


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
    SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    PIXELS: tl.constexpr,
    NUM: tl.constexpr,
    WIDE: tl.constexpr,
    EACH: tl.constexpr,
):
    """Of each run of the output's pixels, for NUM taps: partial [parts, C out, taps, C in]."""
    part, first = tl.program_id(0), tl.program_id(1) * NUM
    channels, wide = tl.arange(0, C_OUT), tl.arange(0, WIDE)
    sums = tl.zeros([WIDE, C_OUT], tl.float32)
    for begin in range(0, EACH, PIXELS):
        pixels = part * EACH + begin + tl.arange(0, PIXELS)
        inside = pixels < num_pixels
        at = pixels[:, None] * C_OUT + channels[None, :]
        gradient = tl.load(dy + at, mask=inside[:, None], other=0.0)
        values = _patch(x, pixels, inside, first, NUM, WIDE, H, W, C_IN, SIZE, STRIDE)
        sums = tl.dot(tl.trans(values), gradient, sums, input_precision="ieee")
    at = (part * C_OUT + channels)[None, :] * (SIZE * SIZE * C_IN) + first * C_IN + wide[:, None]
    tl.store(partial + at, sums, mask=(wide < NUM * C_IN)[:, None])


@triton.jit(do_not_specialize=["num_parts"])  # full and short batches share a compilation
def _sum_parts(partial, dw, num_weights, num_parts, PARTS: tl.constexpr, TOGETHER: tl.constexpr):
    number = tl.program_id(0) * TOGETHER + tl.arange(0, TOGETHER)
    parts, is_weight = tl.arange(0, PARTS), number < num_weights
    at = parts[:, None] * num_weights + number[None, :]
    mask = (parts < num_parts)[:, None] & is_weight[None, :]
    sums = tl.sum(tl.load(partial + at, mask=mask, other=0.0), 0)
    tl.store(dw + number, sums, mask=is_weight)


def fused_conv(x: Tensor, weight: Tensor, conv: Conv) -> Tensor | tuple[Tensor, Tensor]:
    """What `conv` makes of x in a training pass."""
    seen = as_autocast_has_it(x)
    if not takes(seen):
        return conv.plain(x)
    return FusedConv.apply(seen.contiguous(memory_format=torch.channels_last), weight, conv)


class FusedConv(torch.autograd.Function):
    """Of a 1x1 or 3x3 filter, padded to keep the size of images, or to halve it with stride 2."""

    @staticmethod
    def forward(ctx, x, weight, conv):
        ctx.save_for_backward(x, weight)
        ctx.conv, ctx.normed = conv, getattr(x, "normed", None)
        y, y.moments = _convolved(x, weight, conv)
        return (y, x.view_as(x)) if conv.passes else y

    @staticmethod
    def backward(ctx, dy, dpassed=None):
        x, weight = ctx.saved_tensors
        dy, dpassed = (
            None if values is None else values.contiguous(memory_format=torch.channels_last)
            for values in (dy, dpassed)
        )
        with _another_stream(x.device) as beside:
            with beside:  # neither gradient fills the GPU alone
                dw = _weight_gradient(x, weight, dy, ctx.conv.stride[0])
            dx = None
            if ctx.needs_input_grad[0]:
                dx = _input_gradient(x, weight, dy, ctx.conv, dpassed, ctx.normed)
        return dx, dw, None


def _convolved(x: Tensor, weight: Tensor, conv: nn.Module) -> tuple[Tensor, Tensor]:
    """The output, and its moments."""
    stride, channels = conv.stride[0], len(weight)
    size = (len(x), channels, x.shape[2] // stride, x.shape[3] // stride)
    order = torch.channels_last
    y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=order)
    moments = y.new_empty((2, channels), dtype=torch.float32)
    num_pixels, pixels = y.numel() // channels, TILE // channels
    num_parts = triton.cdiv(num_pixels, pixels)
    partial, parts = memory_for_sums(y, num_parts)
    launch(
        _convolve,
        (num_parts,),
        *(x, weight, y, partial, counter_of(conv), moments, num_pixels, num_parts),
        **_kind(y, weight, stride),
        PIXELS=pixels,
        **_taps(weight, 1),
        **parts,
        num_warps=_warps(pixels),
    )
    return y, moments


def _input_gradient(
    x: Tensor,
    weight: Tensor,
    dy: Tensor,
    conv: nn.Module,
    other: Tensor | None,
    normed: Normed | None,
) -> Tensor:
    """And what `normed`, of which x is the output, is to know of it."""
    channels = x.shape[1]
    wide = max(16, channels)
    dx, num_pixels, pixels = torch.empty_like(x), x.numel() // channels, TILE // wide
    num_parts = triton.cdiv(num_pixels, pixels)
    partial, parts = memory_for_sums(x, num_parts)
    before, sums, eps = (dx, dx), (dx, dx), 0.0  # any pointers where they are not read
    if normed is not None:
        norm = normed.norm
        before, eps = (normed.x, normed.moments), norm.eps
        sums = torch.empty_like(norm.weight), torch.empty_like(norm.bias)
        normed.sums = (dx, *sums)
    launch(
        _input_gradients,
        (num_parts,),
        *(dy, weight, dx if other is None else other, dx, x, *before, eps),
        *(partial, counter_of(conv), *sums, num_pixels, num_parts),
        **_kind(x, weight, conv.stride[0]),
        PIXELS=pixels,
        WIDE=wide,
        ADDS=other is not None,
        SUMS=normed is not None,
        RELU=normed is not None and normed.norm.relu,
        **parts,
        num_warps=_warps(pixels),
    )
    return dx


def _weight_gradient(x: Tensor, weight: Tensor, dy: Tensor, stride: int) -> Tensor:
    """float32, in the weight's memory order."""
    channels = dy.shape[1]
    num_pixels, each = dy.numel() // channels, EACH // channels
    num_parts, num_weights = triton.cdiv(num_pixels, each), weight.numel()
    partial = x.new_empty((num_parts, num_weights), dtype=torch.float32)
    dw = torch.empty_like(weight)  # keeps channels last
    taps = _taps(weight, weight.shape[2])
    launch(
        _weight_sums,
        (num_parts, triton.cdiv(weight.shape[2] ** 2, taps["NUM"])),
        *(x, dy, partial, num_pixels),
        **_kind(dy, weight, stride),
        **taps,
        PIXELS=RUN,
        EACH=each,
        num_warps=4,
        num_stages=2 if taps["WIDE"] > 128 else 3,  # for shared memory of less than 100 kB
    )
    parts = triton.next_power_of_2(num_parts)
    together = max(16, SUMMED // parts)
    launch(
        _sum_parts,
        (triton.cdiv(num_weights, together),),
        *(partial, dw, num_weights, num_parts),
        PARTS=parts,
        TOGETHER=together,
        num_warps=4,
    )
    return dw


@contextmanager
def _another_stream(device: torch.device) -> Iterator[AbstractContextManager]:
    """A stream that begins with what has been asked of the current one, which waits for it at the
    end."""
    if device.type != "cuda":
        yield nullcontext()
        return
    ours = torch.cuda.current_stream(device)
    if ours not in _beside:
        _beside[ours] = torch.cuda.Stream(device)
    theirs = _beside[ours]
    theirs.wait_stream(ours)
    try:
        yield torch.cuda.stream(theirs)
    finally:  # a capture that fails says why only where all its streams have come together
        ours.wait_stream(theirs)


def _kind(images: Tensor, weight: Tensor, stride: int) -> dict[str, int]:
    """What kernels are compiled for; the images are those that a program goes over."""
    _, _, height, width = images.shape
    out_channels, in_channels, size, _ = weight.shape
    channels = {"C_IN": in_channels, "C_OUT": out_channels}
    return {"H": height, "W": width, **channels, "SIZE": size, "STRIDE": stride}


def _taps(weight: Tensor, together: int) -> dict[str, int]:
    """How many taps a multiplication takes: all of them for less than 16 channels, which would
    not fill it; and how many values of a pixel they see, rounded up to a power of two."""
    _, in_channels, size, _ = weight.shape
    num = size**2 if in_channels < 16 else together
    return {"NUM": num, "WIDE": max(16, triton.next_power_of_2(num * in_channels))}


def _warps(pixels: int) -> int:
    return 8 if pixels > 64 else 4
