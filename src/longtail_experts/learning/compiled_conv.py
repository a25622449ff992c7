"""Convolutions for training steps on a CPU, in C++: `compiled_conv.cpp`, for tensors in bf16 or
float32."""

import ctypes
import functools
from ctypes import c_int, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longtail_experts.learning.compiler import addresses, compile_ahead, compiled
from longtail_experts.learning.layers import Conv, as_autocast_has_it

SOURCE = Path(__file__).with_suffix(".cpp")
CPU = torch.device("cpu")


def compiled_conv(
    dtype: torch.dtype, x: Tensor, weight: Tensor, conv: Conv
) -> Tensor | tuple[Tensor, Tensor]:
    """What `conv` makes of x in a training pass: by this code where that is of `dtype` and the
    sides of images are multiples of 4, as in all of a training. Weights are rounded to `dtype`, as
    autocast does it."""
    is_known = as_autocast_has_it(x).dtype == x.dtype == dtype and weight.dtype == torch.float32
    is_known &= x.device == weight.device == CPU
    is_known &= x.dim() == 4 and weight.shape == (x.shape[1], x.shape[1], 3, 3)
    if not is_known or any(side == 0 or side % 4 for side in x.shape[2:]):
        return conv.plain(x)
    return CompiledConv.apply(x, weight, conv)


class CompiledConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, conv):
        x, weight = _in_order(x), _in_order(weight.to(x.dtype).float())
        ctx.save_for_backward(x, weight)
        y = torch.empty_like(x)
        threads = torch.get_num_threads()
        _library(x.dtype).convolution(*_sizes(x), *addresses(x, weight, None, y), False, threads)
        return (y, x.view_as(x)) if conv.passes else y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dpassed=None):
        x, weight = ctx.saved_tensors
        dy, dpassed = (None if d is None else _in_order(d) for d in (dy, dpassed))
        dx = dweight = None
        library, sizes, threads = _library(x.dtype), _sizes(x), torch.get_num_threads()
        if ctx.needs_input_grad[0]:
            dx = torch.empty_like(x)
            library.convolution(*sizes, *addresses(dy, weight, dpassed, dx), True, threads)
        if ctx.needs_input_grad[1]:
            dweight = torch.empty_like(weight)
            library.weight_gradient(*sizes, *addresses(x, dy, dweight), threads)
        return dx, dweight, None


def compile_convs_ahead(dtype: torch.dtype) -> None:
    compile_ahead(SOURCE, dtype)


@functools.cache
def _library(dtype: torch.dtype) -> ctypes.CDLL:
    library = compiled(SOURCE, dtype)
    sizes = [c_int, c_int64, c_int, c_int]
    library.convolution.argtypes = [*sizes, *[c_void_p] * 4, c_int, c_int]
    library.weight_gradient.argtypes = [*sizes, *[c_void_p] * 3, c_int]
    library.convolution.restype = library.weight_gradient.restype = None
    return library


def _in_order(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def _sizes(x: Tensor) -> tuple[int, int, int, int]:
    number, channels, height, width = x.shape
    return channels, number, height, width
