# ruff: noqa: N803  (Triton's constants are written large)
"""Batch norm, what is added to it and ReLU in two kernels each way, written in Triton for GPUs.

PyTorch takes six or more there, each of which goes over memory that the last one has just
written. Sums are float32, in a fixed order: the same input gives the same output, bit for bit. A
tensor in channels-last memory is a matrix here: rows are pixels, columns are channels.

Triton comes with PyTorch's builds for CUDA on Linux. TRITON_INTERPRET=1 runs all of this on a CPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 8192  # values that one program holds at a time
NUM_WARPS = 8


@triton.jit
def _tile(pid, num_rows, ROWS: tl.constexpr, C: tl.constexpr):
    """Offsets [ROWS, C] of a program's part of the matrix, and which of them are inside."""
    rows = pid * ROWS + tl.arange(0, ROWS)
    offsets = rows[:, None] * C + tl.arange(0, C)[None, :]
    return offsets, (rows < num_rows)[:, None]


@triton.jit
def _moments(x, partial, num_rows, ROWS: tl.constexpr, C: tl.constexpr):
    """Of each part: the mean, and the sum of squared distances from it.

    partial [parts, 2, C].
    """
    pid = tl.program_id(0)
    offsets, inside = _tile(pid, num_rows, ROWS, C)
    values = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(values, 0) / tl.minimum(num_rows - pid * ROWS, ROWS)
    apart = tl.where(inside, values - mean[None, :], 0.0)
    into = partial + pid * 2 * C + tl.arange(0, C)
    tl.store(into, mean)
    tl.store(into + C, tl.sum(apart * apart, 0))


@triton.jit(do_not_specialize=["num_parts"])  # one compilation for all sizes of batch
def _normalise(
    x,
    added,
    y,
    partial,
    weight,
    bias,
    moments,
    running_mean,
    running_var,
    num_batches,
    num_rows,
    num_parts,
    momentum,
    eps,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    C: tl.constexpr,
    ADDS: tl.constexpr,
    RELU: tl.constexpr,
):
    """y = relu((x - mean) / std * weight + bias + added). Every program combines the moments
    of all parts (Chan, Golub, LeVeque, 1983); the first writes them down."""
    pid = tl.program_id(0)
    columns, parts = tl.arange(0, C), tl.arange(0, PARTS)
    at = partial + parts[:, None] * 2 * C + columns[None, :]
    is_part = (parts < num_parts)[:, None]
    means = tl.load(at, mask=is_part, other=0.0)
    squares = tl.load(at + C, mask=is_part, other=0.0)
    sizes = tl.minimum(num_rows - parts * ROWS, ROWS)
    sizes = tl.maximum(sizes, 0).to(tl.float32)[:, None]
    mean = tl.sum(means * sizes, 0) / num_rows
    apart = means - mean[None, :]
    var = (tl.sum(squares, 0) + tl.sum(apart * apart * sizes, 0)) / num_rows
    inverse = 1.0 / tl.sqrt(var + eps)
    if pid == 0:
        tl.store(moments + columns, mean)
        tl.store(moments + C + columns, inverse)
        unbiased = var * (num_rows / (num_rows - 1.0))
        old = tl.load(running_mean + columns)
        tl.store(running_mean + columns, old + momentum * (mean - old))
        old = tl.load(running_var + columns)
        tl.store(running_var + columns, old + momentum * (unbiased - old))
        tl.store(num_batches, tl.load(num_batches) + 1)
    scale = tl.load(weight + columns) * inverse
    shift = tl.load(bias + columns) - mean * scale
    offsets, inside = _tile(pid, num_rows, ROWS, C)
    out = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
    out = out * scale[None, :] + shift[None, :]
    if ADDS:
        out += tl.load(added + offsets, mask=inside, other=0.0).to(tl.float32)
    if RELU:
        out = tl.maximum(out, 0.0)
    tl.store(y + offsets, out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _passed_on(dy, y, offsets, inside, RELU: tl.constexpr):
    """The gradient behind the ReLU."""
    gradient = tl.load(dy + offsets, mask=inside, other=0.0).to(tl.float32)
    if RELU:
        out = tl.load(y + offsets, mask=inside, other=0.0).to(tl.float32)
        gradient = tl.where(out > 0.0, gradient, 0.0)
    return gradient


@triton.jit
def _gradient_sums(
    dy,
    y,
    x,
    moments,
    partial,
    num_rows,
    ROWS: tl.constexpr,
    C: tl.constexpr,
    RELU: tl.constexpr,
):
    """Of each part: the sums of the gradient, and of it times the normalised input."""
    pid = tl.program_id(0)
    columns = tl.arange(0, C)
    offsets, inside = _tile(pid, num_rows, ROWS, C)
    gradient = _passed_on(dy, y, offsets, inside, RELU)
    values = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
    mean, inverse = tl.load(moments + columns), tl.load(moments + C + columns)
    normal = (values - mean[None, :]) * inverse[None, :]
    into = partial + pid * 2 * C + columns
    tl.store(into, tl.sum(gradient, 0))
    tl.store(into + C, tl.sum(gradient * normal, 0))


@triton.jit(do_not_specialize=["num_parts"])
def _gradients(
    dy,
    y,
    x,
    moments,
    partial,
    weight,
    dx,
    dadded,
    dweight,
    dbias,
    num_rows,
    num_parts,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    C: tl.constexpr,
    ADDS: tl.constexpr,
    RELU: tl.constexpr,
):
    """Of the input, of what was added, of weight and bias (Ioffe, Szegedy, 2015, section 3)."""
    pid = tl.program_id(0)
    columns, parts = tl.arange(0, C), tl.arange(0, PARTS)
    at = partial + parts[:, None] * 2 * C + columns[None, :]
    is_part = (parts < num_parts)[:, None]
    plain = tl.sum(tl.load(at, mask=is_part, other=0.0), 0)
    by_normal = tl.sum(tl.load(at + C, mask=is_part, other=0.0), 0)
    if pid == 0:
        tl.store(dbias + columns, plain)
        tl.store(dweight + columns, by_normal)
    offsets, inside = _tile(pid, num_rows, ROWS, C)
    gradient = _passed_on(dy, y, offsets, inside, RELU)
    if ADDS:
        tl.store(dadded + offsets, gradient.to(dadded.dtype.element_ty), mask=inside)
    values = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
    mean, inverse = tl.load(moments + columns), tl.load(moments + C + columns)
    normal = (values - mean[None, :]) * inverse[None, :]
    out = gradient - (plain / num_rows)[None, :] - normal * (by_normal / num_rows)[None, :]
    out *= (tl.load(weight + columns) * inverse)[None, :]
    tl.store(dx + offsets, out.to(dx.dtype.element_ty), mask=inside)


class FusedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, added, weight, bias, norm, relu):
        num_rows, channels, rows, num_parts = ctx.sizes = _sizes(x)
        partial = x.new_empty((num_parts, 2, channels), dtype=torch.float32)
        moments = x.new_empty((2, channels), dtype=torch.float32)
        y = torch.empty_like(x)
        shape = {"ROWS": rows, "C": channels, "num_warps": NUM_WARPS}
        _moments[(num_parts,)](x, partial, num_rows, **shape)
        _normalise[(num_parts,)](
            *(x, x if added is None else added, y, partial, weight, bias, moments),
            *(norm.running_mean, norm.running_var, norm.num_batches_tracked),
            *(num_rows, num_parts, norm.momentum, norm.eps),
            PARTS=triton.next_power_of_2(num_parts),
            ADDS=added is not None,
            RELU=relu,
            **shape,
        )
        ctx.save_for_backward(x, y if relu else None, weight, moments)
        ctx.adds, ctx.relu = added is not None, relu
        return y

    @staticmethod
    def backward(ctx, dy):
        x, y, weight, moments = ctx.saved_tensors
        num_rows, channels, rows, num_parts = ctx.sizes
        dy = dy.contiguous(memory_format=torch.channels_last)
        y = dy if y is None else y  # any pointer: it is not read
        partial = x.new_empty((num_parts, 2, channels), dtype=torch.float32)
        dx, dadded = torch.empty_like(x), torch.empty_like(x) if ctx.adds else None
        dweight, dbias = torch.empty_like(weight), torch.empty_like(weight)
        shape = {"ROWS": rows, "C": channels, "RELU": ctx.relu, "num_warps": NUM_WARPS}
        _gradient_sums[(num_parts,)](dy, y, x, moments, partial, num_rows, **shape)
        _gradients[(num_parts,)](
            *(dy, y, x, moments, partial, weight, dx, dx if dadded is None else dadded),
            *(dweight, dbias, num_rows, num_parts),
            PARTS=triton.next_power_of_2(num_parts),
            ADDS=ctx.adds,
            **shape,
        )
        return dx, dadded, dweight, dbias, None, None


def _sizes(x: Tensor) -> tuple[int, int, int, int]:
    """Rows and columns of the matrix; rows of a part, and how many parts there are."""
    num_rows, channels = x.numel() // x.shape[1], x.shape[1]
    rows = TILE // channels
    return num_rows, channels, rows, triton.cdiv(num_rows, rows)
