"""How the time of training grows with the number of experts: at the same time, one after another.

    python benchmarks/experts.py --experts 1 3 6 15   # on a GPU
    python benchmarks/experts.py --experts 1 2 3      # on a CPU, where they never train at once

Each trains as `main -P loss=all` would train it, `--steps` steps a turn, the two ways in turns,
`--n` turns each, after a turn that is not counted (in which steps are recorded). Images are
generated unless `--data_dir` names a folder with CIFAR-100.
"""

import argparse
import json
from collections.abc import Iterator
from functools import partial

from throughput import (
    Found,
    common_options,
    experts_in_training,
    forget_peak,
    load,
    name_of,
    seconds_of,
    show,
    spread,
    take,
    together,
)

from longtail_experts.config import Config
from longtail_experts.data.dataset import Dataset
from longtail_experts.learning.cost import peak_memory_bytes
from longtail_experts.stages.inputs import trains_at_once


def one_by_one(running: list[Iterator[None]], num_steps: int, device: str) -> None:
    for steps in running:
        take(steps, num_steps)


def measure(options: argparse.Namespace, config: Config, data: Dataset, num_experts: int) -> Found:
    device = config.device
    forget_peak(device)
    loops = experts_in_training(options, config, data, num_experts)
    running = [loop.steps() for loop in loops]
    ways = {"one_by_one": one_by_one}
    if trains_at_once(config):
        ways["together"] = together
    one_by_one(running, options.steps, device)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.n):
        for name, way in ways.items():
            turn = partial(way, running, options.steps, device)
            seconds[name].append(seconds_of(turn, device))
    found: Found = {
        "device": name_of(device),
        "step_path": loops[0].state.path,
        "experts": num_experts,
        "n": options.n,
        "steps": options.steps,
        "peak_memory_bytes": peak_memory_bytes(device),
    }
    for name, values in seconds.items():
        found |= spread(f"{name}_seconds", values)
    return found


def main() -> None:
    parser = common_options(__doc__)
    parser.add_argument("--experts", type=int, nargs="+", default=[1, 3], help="how many, in turn")
    options = parser.parse_args()
    config, data = load(options)
    for num_experts in options.experts:
        found = measure(options, config, data, num_experts)
        if options.json:
            print(json.dumps(found), flush=True)
            continue
        show(found)
        print(flush=True)


if __name__ == "__main__":
    main()
