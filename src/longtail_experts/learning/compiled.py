"""Which layers of a network take this project's C++ in training passes on a CPU.

Convolutions, most of a step, for which Winograd's algorithm takes a quarter of the multiplications,
and batch norms with what follows them, for which PyTorch goes over memory more often
(benchmarks/README.md).
"""

import functools
from contextlib import nullcontext
from functools import partial
from itertools import product

import torch
from torch import nn

from longtail_experts.learning.compiled_conv import compile_convs_ahead, compiled_conv
from longtail_experts.learning.compiled_norm import compile_norms_ahead, compiled_norm
from longtail_experts.learning.fused import Kernel, require_same_layer
from longtail_experts.learning.layers import Conv, Norm

CHANNELS = (16, 32, 64)  # that it is written for


def compile_layers_ahead(dtype: torch.dtype) -> None:
    """Has a compiler begin what `compile_layers` waits for."""
    compile_norms_ahead(dtype)
    compile_convs_ahead(dtype)


def compile_layers(model: nn.Module, dtype: torch.dtype) -> None:
    """Training passes of `model` in `dtype` take this code, from now on.

    RuntimeError, with the model as it was, where it cannot be compiled, or does something else than
    PyTorch: once so, always so in this process, and experts of one run take the same steps.
    """
    if reason := _why_not(dtype):
        raise RuntimeError(reason)
    for module in model.modules():
        if kernel := _kernel_of(module, dtype):
            module.fused = kernel


def _kernel_of(module: nn.Module, dtype: torch.dtype) -> Kernel | None:
    if isinstance(module, Norm) and module.num_features in CHANNELS:
        return partial(compiled_norm, dtype)
    if isinstance(module, Conv):
        channels, kinds = module.out_channels, (module.kernel_size, module.stride)
        is_known = channels == module.in_channels and kinds == ((3, 3), (1, 1))
        return partial(compiled_conv, dtype) if is_known and channels in CHANNELS else None
    return None


@functools.cache
def _why_not(dtype: torch.dtype) -> str | None:
    """Why this code cannot be used here for tensors of `dtype`; None: it can."""
    try:
        compile_layers_ahead(dtype)  # of one source beside the other
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            for channels, number in product(CHANNELS, (1, 2)):
                # What is added by a batch norm, and what a convolution passes on: with and without.
                layers = Norm(channels), Conv(channels, channels, passes=number == 2)
                # Some blocks of every part, and the beginning of one, of either.
                draws = [(torch.randn(13, channels, 20, 32) + 1).to(dtype) for _ in range(number)]
                for layer, inputs in zip(layers, (draws, draws[:1]), strict=True):
                    if kernel := _kernel_of(layer, dtype):
                        layer.fused = kernel
                        require_same_layer(layer, inputs, nullcontext)
    except Exception as error:  # no compiler, a full disk, a bug in either: all leave PyTorch's
        return str(error) or type(error).__name__
    return None
