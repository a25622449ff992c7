"""Batch norm, what is added to it and ReLU for training steps on a CPU, in C++.

PyTorch takes a fifth of a step for them, this code half of that (benchmarks/README.md). A process
compiles `compiled_norm.cpp` once for tensors of a type, in bf16 or float32, for the processor that
it runs on, which takes a second or two.
"""

import ctypes
import functools
import os
import shlex
import subprocess
import tempfile
from contextlib import nullcontext
from ctypes import c_double, c_int, c_int64, c_void_p
from itertools import product
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from longtail_experts.learning.fused import require_same_layer
from longtail_experts.learning.layers import Norm

SOURCE = Path(__file__).with_suffix(".cpp")
CHANNELS = (16, 32, 64)  # that it is written for
VALUES = {torch.bfloat16: "bf16", torch.float32: "float"}  # and their names there
COMPILER = "c++"  # unless the environment names another, as CXX
# CXX may bring -ffast-math: PyTorch's own numbers below 1e-38 would become 0 in this process.
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-fast-math", "-fno-trapping-math", "-fopenmp")
COMPILER_SECONDS = 120  # that it may take
OPENMP = ("libgomp", "libiomp", "libomp")  # its libraries


def compile_norms(model: nn.Module, dtype: torch.dtype) -> None:
    """Training passes of `model` in `dtype` take this code for batch norms, from now on.

    RuntimeError, with the model as it was, where it cannot be compiled, or does something else than
    PyTorch: once so, always so in this process, and experts of one run take the same steps.
    """
    if reason := _why_not(dtype):
        raise RuntimeError(reason)
    for module in model.modules():
        if isinstance(module, Norm) and module.num_features in CHANNELS:
            module.fused = functools.partial(compiled_norm, dtype)


def compiled_norm(
    dtype: torch.dtype,
    x: Tensor,
    added: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    norm: Norm,
    relu: bool,
) -> Tensor:
    """What `norm` makes of x, and its running statistics, in a training pass: by this code where
    tensors are of `dtype`, as they are in all of a training."""
    kinds = [(t.device.type, t.dtype, t.shape) for t in (x, added) if t is not None]
    is_known = len(set(kinds)) == 1 and kinds[0][:2] == ("cpu", dtype)
    is_known &= weight.dtype == norm.running_mean.dtype == torch.float32
    if not is_known or x.shape[1] != norm.num_features or x.numel() <= x.shape[1]:
        return norm.plain(x, added)
    return CompiledNorm.apply(x, added, weight, bias, norm, relu)


@functools.cache
def _why_not(dtype: torch.dtype) -> str | None:
    """Why this code cannot be used here for tensors of `dtype`; None: it can."""
    random = torch.Generator().manual_seed(1)
    try:
        for channels, number in product(CHANNELS, (1, 2)):  # without what is added, and with it
            norm = Norm(channels)
            norm.fused = functools.partial(compiled_norm, dtype)
            shape = (5, channels, 30, 30)  # some blocks of every part, and the beginning of one
            draws = [torch.randn(shape, generator=random) + 1 for _ in range(number)]
            require_same_layer(norm, [x.to(dtype) for x in draws], nullcontext)
    except Exception as error:  # no compiler, a full disk, a bug in either: all leave PyTorch's
        return str(error) or type(error).__name__
    return None


@functools.cache
def _library(dtype: torch.dtype) -> ctypes.CDLL:
    compiler = shlex.split(os.environ.get("CXX", "")) or [COMPILER]
    before = _openmp_libraries()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "compiled_norm.so")
        options = [*FLAGS, f"-DVALUE={VALUES[dtype]}", "-shared", "-fPIC", SOURCE, "-o", path]
        try:
            made = subprocess.run(
                [*compiler, *options],
                check=False,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                env={**os.environ, "LC_ALL": "C"},  # "error", in English
                timeout=COMPILER_SECONDS,
            )
        except FileNotFoundError:
            raise RuntimeError(f"no C++ compiler {compiler[0]!r}; CXX names another") from None
        if made.returncode != 0:
            said = made.stderr.strip().split("\n")
            reason = next((line for line in said if "error" in line), said[-1])
            raise RuntimeError(f"{compiler[0]} failed: {reason or f'code {made.returncode}'}")
        library = ctypes.CDLL(str(path))
    if more := sorted(_openmp_libraries() - before):
        # They would wait for work on the cores that PyTorch's compute on.
        raise RuntimeError(f"what {compiler[0]} compiles brings threads of its own: {more[0]}")
    numbers = [c_double, c_int, c_int]
    library.norm_forward.argtypes = [c_int, c_int64, *[c_void_p] * 8, c_double, *numbers]
    library.norm_backward.argtypes = [c_int, c_int64, *[c_void_p] * 10, *numbers]
    library.norm_forward.restype = library.norm_backward.restype = None
    return library


def _openmp_libraries() -> set[str]:
    """Those of this process, where Linux says which."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return set()
    files = {line.split(maxsplit=5)[5] for line in lines if "/" in line}
    return {file for file in files if Path(file).name.startswith(OPENMP)}


class CompiledNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, added, weight, bias, norm, relu):
        channels = x.shape[1]
        y, moments = torch.empty_like(x), weight.new_empty((2, channels))
        _library(x.dtype).norm_forward(
            *(channels, x.numel() // channels, *_at(x, added, y, moments, weight, bias)),
            *(*_at(norm.running_mean, norm.running_var), norm.momentum, norm.eps),
            *(relu, torch.get_num_threads()),
        )
        norm.num_batches_tracked.add_(1)
        ctx.adds, ctx.relu, ctx.eps = added is not None, relu, norm.eps
        ctx.save_for_backward(x, y if ctx.adds and relu else None, weight, bias, moments)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, y, weight, bias, moments = ctx.saved_tensors
        dy = dy.contiguous(memory_format=torch.channels_last)
        dx, dweight, dbias = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)
        dadded = torch.empty_like(x) if y is not None else None
        _library(x.dtype).norm_backward(
            *(x.shape[1], x.numel() // x.shape[1], *_at(dy, x, y, dx, dadded)),
            *(*_at(moments, weight, bias, dweight, dbias), ctx.eps),
            *(ctx.relu, torch.get_num_threads()),
        )
        if ctx.adds and not ctx.relu:
            dadded = dy
        return dx, dadded, dweight, dbias, None, None


def _at(*tensors: Tensor | None) -> list[int | None]:
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]
