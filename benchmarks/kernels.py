"""What a GPU does in a step: how many kernels, how long they take, how long it is idle.

    python benchmarks/kernels.py --experts 1 3

Traces `--steps` recorded steps of so many experts at the same time with PyTorch's profiler, after
steps that are not traced. `busy_share` is the share of the time from the first kernel's start to
the last one's end in which at least one ran; `kernels_at_once` how many ran then, in the mean. The
profiler itself makes steps slower: how fast they are says `throughput.py`.
"""

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Iterable

import torch
from end_to_end import length
from throughput import (
    Found,
    common_options,
    experts_in_training,
    load,
    name_of,
    show,
    take,
    together,
    wait_for,
)
from torch.profiler import ProfilerActivity, profile

from longtail_experts.config import Config
from longtail_experts.data.dataset import Dataset

WARM_UP = 20  # steps of each expert
STEPS = 20
LONGEST = 12  # kinds of kernel that are listed

Kernel = tuple[str, float, float]  # name, start and end in microseconds


def traced(options: argparse.Namespace, config: Config, data: Dataset, n: int) -> list[Kernel]:
    loops = experts_in_training(options, config, data, n)
    running = [loop.steps() for loop in loops]
    for steps in running:
        take(steps, WARM_UP)
    together(running, WARM_UP, config.device)
    wait_for(config.device)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        together(running, options.steps, config.device)
        wait_for(config.device)
    return [
        (event.name, event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]


def summary(kernels: list[Kernel], num_steps: int) -> Found:
    """Of `num_steps` steps, those of all experts counted."""
    spans = [(start, end) for _, start, end in kernels]
    busy = length(spans)
    ran = sum(end - start for start, end in spans)
    whole = max(end for _, end in spans) - min(start for start, _ in spans)
    return {
        "kernels_a_step": len(kernels) / num_steps,
        "kernel_ms_a_step": ran / num_steps / 1000,
        "ms_a_step": whole / num_steps / 1000,
        "busy_share": busy / whole,
        "kernels_at_once": ran / busy,
        "median_kernel_us": statistics.median(end - start for start, end in spans),
    }


def longest(kernels: Iterable[Kernel], num_steps: int) -> Iterable[str]:
    by_name: dict[str, list[float]] = defaultdict(list)
    for name, start, end in kernels:
        by_name[name].append(end - start)
    for name, took in sorted(by_name.items(), key=lambda item: -sum(item[1]))[:LONGEST]:
        yield f"{len(took) / num_steps:7.1f} {sum(took) / num_steps:8.1f} us a step  {name[:100]}"


def main() -> None:
    parser = common_options(__doc__)
    parser.add_argument("--experts", type=int, nargs="+", default=[1, 3], help="how many, in turn")
    parser.set_defaults(steps=STEPS)
    options = parser.parse_args()
    config, data = load(options)
    if config.device != "cuda":
        raise SystemExit("error: there is no GPU here whose kernels could be traced")
    for num_experts in options.experts:
        kernels = traced(options, config, data, num_experts)
        num_steps = num_experts * options.steps
        found = {"device": name_of(config.device), "experts": num_experts}
        found |= summary(kernels, num_steps)
        if options.json:
            print(json.dumps(found), flush=True)
            continue
        show(found)
        print(*longest(kernels, num_steps), "", sep="\n", flush=True)


if __name__ == "__main__":
    main()
