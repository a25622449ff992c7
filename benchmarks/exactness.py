"""How far layers are from float64 in a training pass on a CPU: this project's compiled code beside
PyTorch's.

    python benchmarks/exactness.py

Of outputs, gradients and running statistics, as a share of their length (`how_far_from_float64`),
the most over shapes and seeds: of batch norm, what is added to it and ReLU, and of convolutions of
3x3. Values have mean 3 and standard deviation 2.
"""

import argparse
from collections.abc import Callable
from functools import partial
from itertools import product

import torch
from torch import Tensor, nn

from longtail_experts.learning.compiled import compile_layers
from longtail_experts.learning.compiler import VALUES
from longtail_experts.learning.fused import how_far_from_float64
from longtail_experts.learning.layers import Conv, Norm

NORMS = ((128, 16, 32, 32), (37, 16, 19, 19), (5, 32, 6, 6), (1, 32, 5, 5), (9, 64, 8, 8))
CONVS = ((128, 16, 32, 32), (128, 32, 16, 16), (128, 64, 8, 8), (37, 16, 20, 24), (5, 32, 8, 8))
SEEDS = (1, 2, 3)  # not 0, which is that of the gradients that come in
KINDS = {"the gradient of input": "of inputs", "the gradient of": "of weights, biases"}
KINDS |= {"output 0": "outputs"}
KINDS |= {"running_mean": "running means", "running_var": "running variances"}


def a_norm(draw: partial[Tensor], channels: int, relu: bool) -> Norm:
    norm = Norm(channels, relu=relu)
    norm.weight.data = 1 + 0.25 * draw(channels)
    norm.bias.data = draw(channels)
    return norm


def a_conv(draw: partial[Tensor], channels: int, passes: bool) -> Conv:
    conv = Conv(channels, channels, passes=passes).to(memory_format=torch.channels_last)
    conv.weight.data.copy_(draw(conv.weight.shape) / (3 * channels**0.5))
    return conv


def apart(
    dtype: torch.dtype, shapes: tuple, made: Callable[..., nn.Module], adds: bool, compiled: bool
) -> dict[str, float]:
    worst: dict[str, float] = {}
    for shape, flag, seed in product(shapes, (True, False), SEEDS):
        random = torch.Generator().manual_seed(seed)
        draw = partial(torch.randn, generator=random)
        layer = made(draw, shape[1], flag)
        if compiled:
            compile_layers(layer, dtype)
        drawn = [(3 + 2 * draw(shape)).to(dtype) for _ in range(1 + adds)]
        inputs = [x.contiguous(memory_format=torch.channels_last) for x in drawn]
        for name, value in how_far_from_float64(layer, inputs).items():
            kind = next((KINDS[start] for start in KINDS if name.startswith(start)), None)
            if kind:
                worst[kind] = max(worst.get(kind, 0.0), value)
    return worst


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    print(f"{torch.get_num_threads()} threads")
    rows = [
        (f"norm, {'added' if adds else 'alone'}", dtype, NORMS, a_norm, adds)
        for dtype, adds in product(VALUES, (False, True))
    ]
    rows += [("convolution", dtype, CONVS, a_conv, False) for dtype in VALUES]
    for (name, *row), compiled in product(rows, (True, False)):
        whose = "compiled" if compiled else "PyTorch's"
        found = ", ".join(f"{k} {v:.1e}" for k, v in apart(*row, compiled).items())
        print(f"{row[0]!s:14} {name:11} {whose:9} gradients {found}")


if __name__ == "__main__":
    main()
