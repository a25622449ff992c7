"""How far batch norm, what is added to it and ReLU are from float64 in a training pass on a CPU:
this project's compiled code beside PyTorch's.

    python benchmarks/norms.py

Of outputs, gradients and running statistics, as a share of their length (`how_far_from_float64`),
the most over shapes and seeds. Values have mean 3 and standard deviation 2.
"""

import argparse
from functools import partial
from itertools import product

import torch

from longtail_experts.learning.compiled_norm import VALUES, compile_norms
from longtail_experts.learning.fused import how_far_from_float64
from longtail_experts.learning.layers import Norm

SHAPES = ((128, 16, 32, 32), (37, 16, 19, 19), (5, 32, 6, 6), (1, 32, 5, 5), (9, 64, 8, 8))
SEEDS = (1, 2, 3)  # not 0, which is that of the gradients that come in
KINDS = {"the gradient of input": "of inputs", "the gradient of": "of weights, biases"}
KINDS |= {"output": "outputs", "running_mean": "running means", "running_var": "running variances"}


def apart(dtype: torch.dtype, adds: bool, compiled: bool) -> dict[str, float]:
    worst = dict.fromkeys(KINDS.values(), 0.0)
    for shape, relu, seed in product(SHAPES, (True, False), SEEDS):
        random = torch.Generator().manual_seed(seed)
        draw = partial(torch.randn, generator=random)
        norm = Norm(shape[1], relu=relu)
        norm.weight.data = 1 + 0.25 * draw(shape[1])
        norm.bias.data = draw(shape[1])
        if compiled:
            compile_norms(norm, dtype)
        drawn = [(3 + 2 * draw(shape)).to(dtype) for _ in range(1 + adds)]
        inputs = [x.contiguous(memory_format=torch.channels_last) for x in drawn]
        for name, value in how_far_from_float64(norm, inputs).items():
            kind = next((KINDS[start] for start in KINDS if name.startswith(start)), None)
            if kind:
                worst[kind] = max(worst[kind], value)
    return worst


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    print(f"{torch.get_num_threads()} threads")
    for dtype, adds, compiled in product(VALUES, (False, True), (True, False)):
        whose = "compiled" if compiled else "PyTorch's"
        found = ", ".join(f"{k} {v:.1e}" for k, v in apart(dtype, adds, compiled).items())
        print(f"{dtype!s:14} {'added' if adds else 'alone'} {whose:9} gradients {found}")


if __name__ == "__main__":
    main()
