"""How the time of training grows with the number of experts: at the same time, one after another.

    python benchmarks/experts.py --experts 1 3 6 15   # on a GPU
    python benchmarks/experts.py --experts 1 2 3      # on a CPU, where they never train at once

Each trains as `main -P loss=all` would train it, `--steps` steps a turn, the two ways in turns,
`--n` turns each, after a turn that is not counted (in which steps are recorded). Images are
generated unless `--data_dir` names a folder with CIFAR-100.
"""

import argparse
import json
import statistics
import time
from functools import partial
from itertools import chain, count, islice

import torch
from throughput import FULL_RECIPE, OurLoop, wait_for

from longtail_experts.config import make_config
from longtail_experts.learning.at_once import at_once, beside_the_others
from longtail_experts.learning.cost import peak_memory_bytes
from longtail_experts.stages.inputs import load_dataset, resolve
from longtail_experts.stages.main import trains_at_once


def take_steps(loop: OurLoop, num_steps: int) -> None:
    steps = chain.from_iterable(loop.steps() for _ in count())  # epoch after epoch
    for _ in islice(steps, num_steps):
        pass


def together(loops: list[OurLoop], num_steps: int, device: str) -> None:
    def work(loop: OurLoop) -> None:
        with beside_the_others():
            take_steps(loop, num_steps)

    at_once({str(number): partial(work, loop) for number, loop in enumerate(loops)}, device)


def one_by_one(loops: list[OurLoop], num_steps: int, device: str) -> None:
    for loop in loops:
        take_steps(loop, num_steps)


def measure(options: argparse.Namespace, num_experts: int) -> dict[str, float | int | str]:
    source = "cifar100" if options.data_dir else "synthetic"
    config = resolve(
        make_config({"source": source, "data_dir": options.data_dir, "device": options.device})
    )
    data, device = load_dataset(config), config.device
    loops = [
        OurLoop(data, config.batch_size, device, config.precision, options.planned_images)
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
    found: dict[str, float | int | str] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "step_path": loops[0].state.path,
        "experts": num_experts,
        "n": options.n,
        "steps": options.steps,
        "peak_memory_bytes": peak_memory_bytes(device),
    }
    for name, values in seconds.items():
        ends = {"": statistics.median(values), "_min": min(values), "_max": max(values)}
        found |= {f"{name}_seconds{end}": value for end, value in ends.items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experts", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--data_dir", help="folder with CIFAR-100; without: generated images")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--n", type=int, default=5, help="turns of each way")
    parser.add_argument("--steps", type=int, default=20, help="of each expert in a turn")
    parser.add_argument("--planned_images", type=int, default=FULL_RECIPE, help="as in throughput")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    options = parser.parse_args()
    for num_experts in options.experts:
        found = measure(options, num_experts)
        if options.json:
            print(json.dumps(found), flush=True)
            continue
        for name, value in found.items():
            print(f"{name:24} {value:,.2f}" if isinstance(value, float) else f"{name:24} {value}")
        print(flush=True)


if __name__ == "__main__":
    main()
