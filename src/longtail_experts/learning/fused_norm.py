# ruff: noqa: N803, N806  (Triton's constants are written large)
"""Batch norm, what is added to it and ReLU in two kernels each way, written in Triton for GPUs.

PyTorch takes six or more there, each of which goes over memory that the last one has just
written. Sums are float32, in a fixed order: the same input gives the same output, bit for bit. A
tensor in channels-last memory is a matrix here: rows are pixels, columns are channels.

Each way needs sums over all pixels first: of what comes in, and of its gradient. A convolution of
this project (`fused_conv.py`) makes them while it has the values at hand, and leaves them with its
result; else a kernel of its own does. Every program writes down the sums of its part, and the one
that comes last adds those of all parts, in their order.

Triton comes with PyTorch's builds for CUDA on Linux. TRITON_INTERPRET=1 runs all of this on a CPU.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from longtail_experts.learning.garbage import no_garbage_collected

SUMMED = 8192  # values of which a program makes one part of a sum
TILE = 4096  # values that a program holds where nothing is summed
HELD = tl.constexpr(2048)  # values of sums that the last program holds: more would take registers
NUM_WARPS = 4

# How many programs of the kernel that runs on a layer have written down their part. The last one
# puts it back to 0.
_arrived: WeakKeyDictionary[nn.Module, Tensor] = WeakKeyDictionary()

# Where kernels are compiled without being started: which.
_compiled_alone: ContextVar[set[Any] | None] = ContextVar("compiled_alone", default=None)


@dataclass
class Normed:
    """What an output of `FusedNorm` was made of: its attribute `normed`. The convolution that
    computes the gradient for it sums that up as well, into `sums`."""

    norm: nn.Module
    x: Tensor
    moments: Tensor
    sums: tuple[Tensor, Tensor, Tensor] | None = None  # the gradient; dweight and dbias for it

    def take_sums(self, dy: Tensor) -> tuple[Tensor, Tensor] | None:
        """None where dy is another gradient: of several that were added, for example."""
        summed, self.sums = self.sums, None  # not kept: memory is used again
        is_that = summed is not None and summed[0].data_ptr() == dy.data_ptr()
        return summed[1:] if is_that else None


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
def mean_and_inverse(moments, eps, C: tl.constexpr):
    """The mean, and 1 / standard deviation."""
    columns = tl.arange(0, C)
    return tl.load(moments + columns), 1.0 / tl.sqrt(tl.load(moments + C + columns) + eps)


@triton.jit
def _scale_and_shift(moments, weight, bias, eps, C: tl.constexpr):
    """Batch norm is x * scale + shift."""
    columns = tl.arange(0, C)
    mean, inverse = mean_and_inverse(moments, eps, C)
    scale = tl.load(weight + columns) * inverse
    return scale, tl.load(bias + columns) - mean * scale


@triton.jit
def _combined(
    partial, num_rows, num_parts, PARTS: tl.constexpr, ROWS: tl.constexpr, C: tl.constexpr
):
    """Mean and variance of all parts (Chan, Golub, LeVeque, 1983), whose means are taken from that
    of the first."""
    NUM: tl.constexpr = HELD // C if HELD // C < PARTS else PARTS
    columns, first = tl.arange(0, C), tl.load(partial + tl.arange(0, C))
    sums, squares = tl.zeros([NUM, C], tl.float32), tl.zeros([NUM, C], tl.float32)
    for begin in range(0, PARTS, NUM):
        parts = begin + tl.arange(0, NUM)
        at = partial + parts[:, None] * 2 * C + columns[None, :]
        is_part = (parts < num_parts)[:, None]
        sizes = tl.minimum(num_rows - parts * ROWS, ROWS)
        sizes = tl.maximum(sizes, 0).to(tl.float32)[:, None]
        apart = tl.load(at, mask=is_part, other=0.0) - first[None, :]
        sums += apart * sizes
        squares += tl.load(at + C, mask=is_part, other=0.0) + apart * apart * sizes
    from_first = tl.sum(sums, 0) / num_rows
    return first + from_first, tl.sum(squares, 0) / num_rows - from_first * from_first


@triton.jit
def _added_up(partial, num_parts, PARTS: tl.constexpr, C: tl.constexpr):
    """[C], of all parts."""
    NUM: tl.constexpr = HELD // C if HELD // C < PARTS else PARTS
    columns = tl.arange(0, C)
    sums = tl.zeros([NUM, C], tl.float32)
    for begin in range(0, PARTS, NUM):
        parts = begin + tl.arange(0, NUM)
        at = partial + parts[:, None] * 2 * C + columns[None, :]
        sums += tl.load(at, mask=(parts < num_parts)[:, None], other=0.0)
    return tl.sum(sums, 0)


@triton.jit
def sum_up_moments(
    values,
    inside,
    partial,
    arrived,
    moments,
    num_rows,
    num_parts,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    C: tl.constexpr,
):
    """moments [2, C]: mean and variance, from a program's part of the matrix: values [ROWS, C],
    0 where they are not inside.

    A part is its mean and the sum of squared distances from it, partial [parts, 2, C].
    """
    pid, columns = tl.program_id(0), tl.arange(0, C)
    mean = tl.sum(values, 0) / tl.minimum(num_rows - pid * ROWS, ROWS)
    apart = tl.where(inside, values - mean[None, :], 0.0)
    into = partial + pid * 2 * C + columns
    tl.store(into, mean)
    tl.store(into + C, tl.sum(apart * apart, 0))
    if _is_last(arrived, num_parts):
        mean, var = _combined(partial, num_rows, num_parts, PARTS, ROWS, C)
        tl.store(moments + columns, mean)
        tl.store(moments + C + columns, var)


@triton.jit
def sum_up_gradients(
    gradient,
    normal,
    partial,
    arrived,
    dweight,
    dbias,
    num_parts,
    PARTS: tl.constexpr,
    C: tl.constexpr,
):
    """The sums of the gradient, and of it times the normalised input, from a program's part of
    them: the gradients of bias and weight (Ioffe, Szegedy, 2015, section 3). partial [parts, 2, C].
    """
    columns = tl.arange(0, C)
    into = partial + tl.program_id(0) * 2 * C + columns
    tl.store(into, tl.sum(gradient, 0))
    tl.store(into + C, tl.sum(gradient * normal, 0))
    if _is_last(arrived, num_parts):
        plain, by_normal = (
            _added_up(partial, num_parts, PARTS, C),
            _added_up(partial + C, num_parts, PARTS, C),
        )
        tl.store(dbias + columns, plain)
        tl.store(dweight + columns, by_normal)


@triton.jit(do_not_specialize=["num_parts"])  # full and short batches share a compilation
def _moments(
    x,
    partial,
    arrived,
    moments,
    num_rows,
    num_parts,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    C: tl.constexpr,
):
    offsets, inside = _tile(tl.program_id(0), num_rows, ROWS, C)
    values = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
    sum_up_moments(values, inside, partial, arrived, moments, num_rows, num_parts, PARTS, ROWS, C)


@triton.jit
def _normalise(
    x,
    added,
    y,
    moments,
    weight,
    bias,
    running_mean,
    running_var,
    num_batches,
    num_rows,
    momentum,
    eps,
    ROWS: tl.constexpr,
    C: tl.constexpr,
    ADDS: tl.constexpr,
    RELU: tl.constexpr,
):
    """y = relu((x - mean) / std * weight + bias + added); running statistics as PyTorch has
    them."""
    if tl.program_id(0) == 0:
        columns = tl.arange(0, C)
        old = tl.load(running_mean + columns)
        tl.store(running_mean + columns, old + momentum * (tl.load(moments + columns) - old))
        unbiased = tl.load(moments + C + columns) * (num_rows / (num_rows - 1.0))
        old = tl.load(running_var + columns)
        tl.store(running_var + columns, old + momentum * (unbiased - old))
        tl.store(num_batches, tl.load(num_batches) + 1)
    scale, shift = _scale_and_shift(moments, weight, bias, eps, C)
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
    eps,
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
            scale, shift = _scale_and_shift(moments, weight, bias, eps, C)
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
    eps,
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
    offsets, inside = _tile(tl.program_id(0), num_rows, ROWS, C)
    values = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
    gradient = _passed_on(dy, y, values, offsets, inside, moments, weight, bias, eps, C, ADDS, RELU)
    mean, inverse = mean_and_inverse(moments, eps, C)
    normal = (values - mean[None, :]) * inverse[None, :]
    sum_up_gradients(gradient, normal, partial, arrived, dweight, dbias, num_parts, PARTS, C)


@triton.jit
def _gradients(
    dy,
    y,
    x,
    moments,
    weight,
    bias,
    eps,
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
    gradient = _passed_on(dy, y, values, offsets, inside, moments, weight, bias, eps, C, ADDS, RELU)
    if ADDS:
        tl.store(dadded + offsets, gradient.to(dadded.dtype.element_ty), mask=inside)
    mean, inverse = mean_and_inverse(moments, eps, C)
    normal = (values - mean[None, :]) * inverse[None, :]
    plain, by_normal = tl.load(dbias + columns) / num_rows, tl.load(dweight + columns) / num_rows
    out = gradient - plain[None, :] - normal * by_normal[None, :]
    out *= (tl.load(weight + columns) * inverse)[None, :]
    tl.store(dx + offsets, out.to(dx.dtype.element_ty), mask=inside)


class FusedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, added, weight, bias, norm, relu):
        ctx.adds, ctx.relu = added is not None, relu
        moments = getattr(x, "moments", None)
        if moments is None:
            moments = x.new_empty((2, x.shape[1]), dtype=torch.float32)
            num_rows, partial, parts = _parts(x)
            launch(
                _moments,
                (len(partial),),
                *(x, partial, counter_of(norm), moments, num_rows, len(partial)),
                **parts,
            )
        y = torch.empty_like(x)
        num_rows, num_programs, tile = _tiles(x)
        launch(
            _normalise,
            (num_programs,),
            *(x, added if ctx.adds else x, y, moments, weight, bias),
            *(norm.running_mean, norm.running_var, norm.num_batches_tracked),
            *(num_rows, norm.momentum, norm.eps),
            ADDS=ctx.adds,
            RELU=relu,
            **tile,
        )
        ctx.save_for_backward(x, y if ctx.adds and relu else None, weight, bias, moments)
        ctx.normed = y.normed = Normed(norm, x, moments)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, y, weight, bias, moments = ctx.saved_tensors
        dy = dy.contiguous(memory_format=torch.channels_last)
        norm, read_if_y = ctx.normed.norm, x if y is None else y  # any pointer where there is none
        before = dy, read_if_y, x, moments, weight, bias, norm.eps
        kind = {"ADDS": ctx.adds, "RELU": ctx.relu}
        sums = ctx.normed.take_sums(dy)
        if sums is None:
            sums = torch.empty_like(weight), torch.empty_like(bias)
            num_rows, partial, parts = _parts(x)
            launch(
                _gradient_sums,
                (len(partial),),
                *(*before, partial, counter_of(norm), *sums, num_rows, len(partial)),
                **kind,
                **parts,
            )
        dweight, dbias = sums
        dx = torch.empty_like(x)
        dadded = torch.empty_like(x) if ctx.adds else None
        num_rows, num_programs, tile = _tiles(x)
        launch(
            _gradients,
            (num_programs,),
            *(*before, dweight, dbias, dx, dadded if ctx.adds else dx, num_rows),
            **kind,
            **tile,
        )
        return dx, dadded, dweight, dbias, None, None


def _parts(x: Tensor) -> tuple[int, Tensor, dict[str, int]]:
    """Rows of the matrix, memory for the sums of each part, and what makes a kernel for them."""
    channels = x.shape[1]
    rows = SUMMED // channels
    num_rows = x.numel() // channels
    partial, parts = memory_for_sums(x, triton.cdiv(num_rows, rows))
    return num_rows, partial, {**parts, "ROWS": rows, "C": channels, "num_warps": NUM_WARPS}


def memory_for_sums(x: Tensor, num_parts: int) -> tuple[Tensor, dict[str, int]]:
    """[parts, 2, C] for two sums of each part, and how many parts a kernel is made for."""
    partial = x.new_empty((num_parts, 2, x.shape[1]), dtype=torch.float32)
    return partial, {"PARTS": triton.next_power_of_2(num_parts)}


def _tiles(x: Tensor) -> tuple[int, int, dict[str, int]]:
    channels = x.shape[1]
    rows, num_rows = TILE // channels, x.numel() // channels
    tile = {"ROWS": rows, "C": channels, "num_warps": NUM_WARPS}
    return num_rows, triton.cdiv(num_rows, rows), tile


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Start a kernel; in `compiled_together` compile it alone."""
    # Triton's default before 3.10; 3.9 warns where it is not said.
    settings = {"enable_fp_fusion": True, **constants}
    compiled = _compiled_alone.get()
    if compiled is None:
        kernel[grid](*arguments, **settings)
    else:
        compiled.add(kernel)
        kernel.warmup(*arguments, grid=grid, **settings)


@contextmanager
def compiled_together(num_threads: int) -> Iterator[None]:
    """In here `launch` starts nothing in this thread: kernels are compiled, by so many threads, and
    all are at the end; results hold whatever was in memory.

    Who starts them afterwards loads them, one after another: Triton's launchers are not made for
    threads. Nor is `ast.parse`, which Triton calls for every kernel, before Python 3.11.8: where
    the collection of garbage lets another thread in, it raises SystemError (CPython gh-106905).
    """
    kernels: set[Any] = set()
    with no_garbage_collected(), ThreadPoolExecutor(num_threads, "compile") as threads:
        token = _compiled_alone.set(kernels)
        try:
            with triton.AsyncCompileMode(threads, ignore_errors=True):
                yield
        except BaseException:  # a signal above all: those under way are enough to wait for
            threads.shutdown(wait=False, cancel_futures=True)
            raise
        finally:
            _compiled_alone.reset(token)
            _forget_failures(kernels)


def _forget_failures(kernels: Iterable[Any]) -> None:
    """Whoever starts such a kernel compiles it, and meets an error of its own. Triton 3.7 and 3.8
    would raise that of the thread, every time."""
    for kernel in kernels:
        for of_device, *_ in kernel.device_caches.values():
            for key, found in list(of_device.items()):
                if isinstance(found, triton.FutureKernel) and found.kernel is None:
                    del of_device[key]


def counter_of(layer: nn.Module) -> Tensor:
    """int32, 0. A layer's own: kernels of two layers may run at once, in two streams."""
    counter = _arrived.get(layer)
    if counter is None or counter.device != layer.weight.device:
        counter = torch.zeros((), dtype=torch.int32, device=layer.weight.device)
        _arrived[layer] = counter
    return counter
