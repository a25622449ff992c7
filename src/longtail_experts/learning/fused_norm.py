# ruff: noqa: N803  (Triton's constants are written large)
"""Batch norm, what is added to it and ReLU in two kernels each way, written in Triton for GPUs.

PyTorch takes six or more there, each of which goes over memory that the last one has just
written. Sums are float32, in a fixed order: the same input gives the same output, bit for bit. A
tensor in channels-last memory is a matrix here: rows are pixels, columns are channels.

The first kernel of each way sums up: every program writes down the sums of its part, and the one
that comes last adds those of all parts, in their order.

Triton comes with PyTorch's builds for CUDA on Linux. TRITON_INTERPRET=1 runs all of this on a CPU.
"""

from weakref import WeakKeyDictionary

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

SUMMED = 8192  # values of which a program makes one part of a sum
TILE = 4096  # values that a program holds where nothing is summed
NUM_WARPS = 4

# How many programs of the kernel that runs on a layer have written down their part. The last one
# puts it back to 0.
_arrived: WeakKeyDictionary[nn.Module, Tensor] = WeakKeyDictionary()


@triton.jit
def _tile(pid, num_rows, ROWS: tl.constexpr, C: tl.constexpr):
    """Offsets [ROWS, C] of a program's part of the matrix, and which of them are inside."""
    rows = pid * ROWS + tl.arange(0, ROWS)
    offsets = rows[:, None] * C + tl.arange(0, C)[None, :]
    return offsets, (rows < num_rows)[:, None]


@triton.jit
def _is_last(arrived, num_parts):
    """Whether the others have written down their parts, and this program its own."""
    tl.debug_barrier()  # the other threads of this program have
    is_last = tl.atomic_add(arrived, 1) == num_parts - 1
    if is_last:
        tl.store(arrived, 0)
    return is_last


@triton.jit
def _scale_and_shift(moments, weight, bias, C: tl.constexpr):
    """Batch norm is x * scale + shift."""
    columns = tl.arange(0, C)
    scale = tl.load(weight + columns) * tl.load(moments + C + columns)
    return scale, tl.load(bias + columns) - tl.load(moments + columns) * scale


@triton.jit
def _combined(
    partial, num_rows, num_parts, PARTS: tl.constexpr, ROWS: tl.constexpr, C: tl.constexpr
):
    """Mean and variance of all parts (Chan, Golub, LeVeque, 1983)."""
    parts = tl.arange(0, PARTS)
    at = partial + parts[:, None] * 2 * C + tl.arange(0, C)[None, :]
    is_part = (parts < num_parts)[:, None]
    means = tl.load(at, mask=is_part, other=0.0)
    squares = tl.load(at + C, mask=is_part, other=0.0)
    sizes = tl.minimum(num_rows - parts * ROWS, ROWS)
    sizes = tl.maximum(sizes, 0).to(tl.float32)[:, None]
    mean = tl.sum(means * sizes, 0) / num_rows
    apart = means - mean[None, :]
    return mean, (tl.sum(squares, 0) + tl.sum(apart * apart * sizes, 0)) / num_rows


@triton.jit(do_not_specialize=["num_parts"])  # full and short batches share a compilation
def _moments(
    x,
    partial,
    arrived,
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
):
    """moments [2, C]: the mean, and 1 / standard deviation; running statistics as PyTorch has them.

    A part is its mean and the sum of squared distances from it, partial [parts, 2, C].
    """
    pid, columns = tl.program_id(0), tl.arange(0, C)
    offsets, inside = _tile(pid, num_rows, ROWS, C)
    values = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(values, 0) / tl.minimum(num_rows - pid * ROWS, ROWS)
    apart = tl.where(inside, values - mean[None, :], 0.0)
    into = partial + pid * 2 * C + columns
    tl.store(into, mean)
    tl.store(into + C, tl.sum(apart * apart, 0))
    if _is_last(arrived, num_parts):
        mean, var = _combined(partial, num_rows, num_parts, PARTS, ROWS, C)
        tl.store(moments + columns, mean)
        tl.store(moments + C + columns, 1.0 / tl.sqrt(var + eps))
        old = tl.load(running_mean + columns)
        tl.store(running_mean + columns, old + momentum * (mean - old))
        unbiased = var * (num_rows / (num_rows - 1.0))
        old = tl.load(running_var + columns)
        tl.store(running_var + columns, old + momentum * (unbiased - old))
        tl.store(num_batches, tl.load(num_batches) + 1)


@triton.jit
def _normalise(
    x,
    added,
    y,
    moments,
    weight,
    bias,
    num_rows,
    ROWS: tl.constexpr,
    C: tl.constexpr,
    ADDS: tl.constexpr,
    RELU: tl.constexpr,
):
    """y = relu((x - mean) / std * weight + bias + added)."""
    scale, shift = _scale_and_shift(moments, weight, bias, C)
    offsets, inside = _tile(tl.program_id(0), num_rows, ROWS, C)
    out = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
    out = out * scale[None, :] + shift[None, :]
    if ADDS:
        out += tl.load(added + offsets, mask=inside, other=0.0).to(tl.float32)
    if RELU:
        out = tl.maximum(out, 0.0)
    tl.store(y + offsets, out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _passed_on(
    dy,
    y,
    values,
    offsets,
    inside,
    moments,
    weight,
    bias,
    C: tl.constexpr,
    ADDS: tl.constexpr,
    RELU: tl.constexpr,
):
    """The gradient behind the ReLU: y says where it was open, or what y was made of, if alone."""
    gradient = tl.load(dy + offsets, mask=inside, other=0.0).to(tl.float32)
    if RELU:
        if ADDS:
            out = tl.load(y + offsets, mask=inside, other=0.0).to(tl.float32)
        else:
            scale, shift = _scale_and_shift(moments, weight, bias, C)
            out = values * scale[None, :] + shift[None, :]
        gradient = tl.where(out > 0.0, gradient, 0.0)
    return gradient


@triton.jit(do_not_specialize=["num_parts"])
def _gradient_sums(
    dy,
    y,
    x,
    moments,
    weight,
    bias,
    partial,
    arrived,
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
    """The sums of the gradient, and of it times the normalised input: the gradients of bias and
    weight (Ioffe, Szegedy, 2015, section 3). partial [parts, 2, C]."""
    pid, columns = tl.program_id(0), tl.arange(0, C)
    offsets, inside = _tile(pid, num_rows, ROWS, C)
    values = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
    gradient = _passed_on(dy, y, values, offsets, inside, moments, weight, bias, C, ADDS, RELU)
    mean, inverse = tl.load(moments + columns), tl.load(moments + C + columns)
    normal = (values - mean[None, :]) * inverse[None, :]
    into = partial + pid * 2 * C + columns
    tl.store(into, tl.sum(gradient, 0))
    tl.store(into + C, tl.sum(gradient * normal, 0))
    if _is_last(arrived, num_parts):
        parts = tl.arange(0, PARTS)
        at = partial + parts[:, None] * 2 * C + columns[None, :]
        is_part = (parts < num_parts)[:, None]
        tl.store(dbias + columns, tl.sum(tl.load(at, mask=is_part, other=0.0), 0))
        tl.store(dweight + columns, tl.sum(tl.load(at + C, mask=is_part, other=0.0), 0))


@triton.jit
def _gradients(
    dy,
    y,
    x,
    moments,
    weight,
    bias,
    dweight,
    dbias,
    dx,
    dadded,
    num_rows,
    ROWS: tl.constexpr,
    C: tl.constexpr,
    ADDS: tl.constexpr,
    RELU: tl.constexpr,
):
    """Of the input, and of what was added."""
    columns = tl.arange(0, C)
    offsets, inside = _tile(tl.program_id(0), num_rows, ROWS, C)
    values = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
    gradient = _passed_on(dy, y, values, offsets, inside, moments, weight, bias, C, ADDS, RELU)
    if ADDS:
        tl.store(dadded + offsets, gradient.to(dadded.dtype.element_ty), mask=inside)
    mean, inverse = tl.load(moments + columns), tl.load(moments + C + columns)
    normal = (values - mean[None, :]) * inverse[None, :]
    plain, by_normal = tl.load(dbias + columns) / num_rows, tl.load(dweight + columns) / num_rows
    out = gradient - plain[None, :] - normal * by_normal[None, :]
    out *= (tl.load(weight + columns) * inverse)[None, :]
    tl.store(dx + offsets, out.to(dx.dtype.element_ty), mask=inside)


class FusedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, added, weight, bias, norm, relu):
        ctx.norm, ctx.adds, ctx.relu = norm, added is not None, relu
        moments = x.new_empty((2, x.shape[1]), dtype=torch.float32)
        num_rows, partial, parts = _parts(x)
        _moments[(len(partial),)](
            *(x, partial, _counter(norm), moments),
            *(norm.running_mean, norm.running_var, norm.num_batches_tracked),
            *(num_rows, len(partial), norm.momentum, norm.eps),
            **parts,
        )
        y = torch.empty_like(x)
        num_programs, tile = _tiles(x)
        _normalise[(num_programs,)](
            *(x, added if ctx.adds else x, y, moments, weight, bias, num_rows),
            ADDS=ctx.adds,
            RELU=relu,
            **tile,
        )
        ctx.save_for_backward(x, y if ctx.adds and relu else None, weight, bias, moments)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, y, weight, bias, moments = ctx.saved_tensors
        dy = dy.contiguous(memory_format=torch.channels_last)
        before = dy, x if y is None else y, x, moments, weight, bias  # any pointer: it is not read
        kind = {"ADDS": ctx.adds, "RELU": ctx.relu}
        dweight, dbias = torch.empty_like(weight), torch.empty_like(bias)
        num_rows, partial, parts = _parts(x)
        _gradient_sums[(len(partial),)](
            *(*before, partial, _counter(ctx.norm), dweight, dbias, num_rows, len(partial)),
            **kind,
            **parts,
        )
        dx = torch.empty_like(x)
        dadded = torch.empty_like(x) if ctx.adds else None
        num_programs, tile = _tiles(x)
        _gradients[(num_programs,)](
            *(*before, dweight, dbias, dx, dadded if ctx.adds else dx, num_rows),
            **kind,
            **tile,
        )
        return dx, dadded, dweight, dbias, None, None


def _parts(x: Tensor) -> tuple[int, Tensor, dict[str, int]]:
    """Rows of the matrix, memory for the sums of each part, and what makes a kernel for them."""
    num_rows, channels = x.numel() // x.shape[1], x.shape[1]
    rows = SUMMED // channels
    num_parts = triton.cdiv(num_rows, rows)
    partial = x.new_empty((num_parts, 2, channels), dtype=torch.float32)
    parts = triton.next_power_of_2(num_parts)
    return num_rows, partial, {"PARTS": parts, "ROWS": rows, "C": channels, "num_warps": NUM_WARPS}


def _tiles(x: Tensor) -> tuple[int, dict[str, int]]:
    channels = x.shape[1]
    rows = TILE // channels
    num_programs = triton.cdiv(x.numel() // channels, rows)
    return num_programs, {"ROWS": rows, "C": channels, "num_warps": NUM_WARPS}


def _counter(norm: nn.Module) -> Tensor:
    """int32, 0. A layer's own: kernels of two layers may run at once, in two streams."""
    counter = _arrived.get(norm)
    if counter is None or counter.device != norm.weight.device:
        counter = torch.zeros((), dtype=torch.int32, device=norm.weight.device)
        _arrived[norm] = counter
    return counter
