"""How the time of training grows with the number of experts: at the same time, one after another.

    python benchmarks/experts.py --experts 1 3 6 15   # on a GPU
    python benchmarks/experts.py --experts 1 2 3      # on a CPU, where they never train at once

Each trains as `main -P loss=all` would train it, `--steps` steps a turn, the two ways in turns,
`--n` turns each, after a turn that is not counted (in which steps are recorded). Images are
generated unless `--data_dir` names a folder with CIFAR-100.
"""

import argparse
import json
import time
from functools import partial
from itertools import islice

from throughput import (
    Found,
    OurLoop,
    common_options,
    forget_peak,
    load,
    name_of,
    show,
    spread,
    wait_for,
)

from longtail_experts.config import Config
from longtail_experts.data.dataset import Dataset
from longtail_experts.learning.at_once import at_once, beside_the_others
from longtail_experts.learning.cost import peak_memory_bytes
from longtail_experts.stages.inputs import trains_at_once


def take_steps(loop: OurLoop, num_steps: int) -> None:
    for _ in islice(loop.steps(), num_steps):
        pass


def together(loops: list[OurLoop], num_steps: int, device: str) -> None:
    def work(loop: OurLoop) -> None:
        with beside_the_others():
            take_steps(loop, num_steps)

    at_once({str(number): partial(work, loop) for number, loop in enumerate(loops)}, device)


def one_by_one(loops: list[OurLoop], num_steps: int, device: str) -> None:
    for loop in loops:
        take_steps(loop, num_steps)


def measure(options: argparse.Namespace, config: Config, data: Dataset, num_experts: int) -> Found:
    device = config.device
    forget_peak(device)
    loops = [
        OurLoop(data, options.batch_size, device, config.precision, options.planned_images)
        for _ in range(num_experts)
    ]
    ways = {"one_by_one": one_by_one}
    if trains_at_once(config):
        ways["together"] = together
    one_by_one(loops, options.steps, device)
    wait_for(device)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.n):
        for name, way in ways.items():
            started = time.perf_counter()
            way(loops, options.steps, device)
            wait_for(device)
            seconds[name].append(time.perf_counter() - started)
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
