"""Batch norm, what is added to it and ReLU for training steps on a CPU, in C++:
`compiled_norm.cpp`, for tensors in bf16 or float32."""

import ctypes
import functools
from ctypes import c_double, c_int, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longtail_experts.learning.compiler import addresses, compile_ahead, compiled
from longtail_experts.learning.layers import Norm

SOURCE = Path(__file__).with_suffix(".cpp")


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


def compile_norms_ahead(dtype: torch.dtype) -> None:
    compile_ahead(SOURCE, dtype)


@functools.cache
def _library(dtype: torch.dtype) -> ctypes.CDLL:
    library = compiled(SOURCE, dtype)
    numbers = [c_double, c_int, c_int]
    library.norm_forward.argtypes = [c_int, c_int64, *[c_void_p] * 8, c_double, *numbers]
    library.norm_backward.argtypes = [c_int, c_int64, *[c_void_p] * 10, *numbers]
    library.norm_forward.restype = library.norm_backward.restype = None
    return library


class CompiledNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, added, weight, bias, norm, relu):
        channels = x.shape[1]
        y, moments = torch.empty_like(x), weight.new_empty((2, channels))
        _library(x.dtype).norm_forward(
            *(channels, x.numel() // channels, *addresses(x, added, y, moments, weight, bias)),
            *(*addresses(norm.running_mean, norm.running_var), norm.momentum, norm.eps),
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
            *(x.shape[1], x.numel() // x.shape[1], *addresses(dy, x, y, dx, dadded)),
            *(*addresses(moments, weight, bias, dweight, dbias), ctx.eps),
            *(ctx.relu, torch.get_num_threads()),
        )
        if ctx.adds and not ctx.relu:
            dadded = dy
        return dx, dadded, dweight, dbias, None, None
