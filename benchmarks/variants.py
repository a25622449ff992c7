"""The step by precision, memory order and what is compiled, in turns on one batch.

    python benchmarks/variants.py
    python benchmarks/variants.py --variants fp32-contiguous bf16-channels_last --n 10

`-compiled` is the network by PyTorch's compiler, `-layers` has the layers that this project
compiles. What the project runs was chosen from these (README.md here): by what a processor has,
never by timing. Images are random: the time of a step does not depend on them.
"""

import argparse
import statistics
import time
from itertools import product

import torch
from torch.nn import functional as F

from longtail_experts.learning.backend import exact_float32
from longtail_experts.learning.compiled import compile_layers
from longtail_experts.learning.resnet import build_resnet32
from longtail_experts.learning.step import DTYPES, autocast

ORDERS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
VARIANTS = [
    f"{precision}-{how}"
    for precision, how in product(
        DTYPES, (*ORDERS, "contiguous-compiled", "channels_last-compiled", "channels_last-layers")
    )
]
WARM_UP = 3  # steps before the first turn


class Variant:
    def __init__(self, name: str, batch_size: int):
        self.precision, order, *compiles = name.split("-")
        self.model = build_resnet32(100, "projection", 0).to(memory_format=ORDERS[order]).train()
        images = torch.randn(batch_size, 3, 32, 32)
        self.images = images.contiguous(memory_format=ORDERS[order])
        self.targets = torch.randint(100, (batch_size,))
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4
        )
        whole = compiles == ["compiled"]
        self.forward = torch.compile(self.model, dynamic=False) if whole else self.model
        if compiles == ["layers"]:
            compile_layers(self.model, DTYPES[self.precision])

    def seconds(self) -> float:
        started = time.perf_counter()
        with exact_float32():
            with autocast("cpu", self.precision):
                logits = self.forward(self.images)
            loss = F.cross_entropy(logits.float(), self.targets)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
        self.optimizer.step()
        return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variants", nargs="+", default=VARIANTS, choices=VARIANTS, metavar="NAME")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--n", type=int, default=5, help="turns of each variant")
    parser.add_argument("--steps", type=int, default=8, help="in a turn, after one that is not")
    options = parser.parse_args()
    variants, warm_up = {}, {}
    for name in options.variants:
        started = time.perf_counter()
        variants[name] = Variant(name, options.batch_size)
        for _ in range(WARM_UP):
            variants[name].seconds()
        warm_up[name] = time.perf_counter() - started
    rates: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(options.n):
        for name, variant in variants.items():
            variant.seconds()
            taken = sum(variant.seconds() for _ in range(options.steps))
            rates[name].append(options.steps * options.batch_size / taken)
    for name, values in rates.items():
        middle, least, most = statistics.median(values), min(values), max(values)
        print(
            f"{name:28} {middle:6.0f} images/s ({least:.0f} to {most:.0f}), {warm_up[name]:.1f} s "
            f"until {WARM_UP} steps are taken"
        )


if __name__ == "__main__":
    main()
