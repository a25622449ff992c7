"""What recording costs steps as short as a GPU's: experts with and without it, in turns.

    python benchmarks/recording.py

No GPU is needed. A thread an expert does what a replayed step asks of Python: eight small tensor
operations, then a wait of a millisecond in which Python's lock is free, 68 times an epoch. With
recording, each epoch's points go the way of a training's: on the disk, and by a thread of the
recorder to a SQLite store, which takes Python's lock from the steps.
"""

import argparse
import json
import os
import tempfile
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from throughput import show, spread

from longtail_experts.learning.at_once import at_once, beside_the_others
from longtail_experts.tracking.recorder import Recorder
from longtail_experts.tracking.runs import start_run

STEPS_AN_EPOCH, STEP = 68, 0.001  # seconds
EACH_EPOCH = ("epoch", "lr", "train/loss", "train/images_per_second")
EACH_TENTH = tuple(f"val/{group}_accuracy" for group in ("balanced", "head", "tail"))


def steps_a_second(num_experts: int, num_epochs: int, is_recorded: bool) -> float:
    """Of each of the experts, over their epochs; the delivery of what is left is not counted."""

    def train(recorder: Recorder | None) -> float:
        values = [torch.zeros(128) for _ in range(8)]
        started = time.perf_counter()
        for epoch in range(num_epochs):
            for _ in range(STEPS_AN_EPOCH):
                for value in values:
                    value.add_(1)
                time.sleep(STEP)
            names = EACH_EPOCH if epoch % 10 else EACH_EPOCH + EACH_TENTH
            if recorder:
                recorder.log_points((name, 0.5, epoch) for name in names)
        return num_epochs * STEPS_AN_EPOCH / (time.perf_counter() - started)

    def expert(number: int) -> float:
        with start_run(f"expert {number}", {"stage": "benchmark"}) as run, beside_the_others():
            with Recorder(run) if is_recorded else nullcontext() as recorder:
                rate = train(recorder)
                if recorder:
                    recorder.finish()
                    recorder.forget()
            return rate

    rates = at_once({str(n): partial(expert, n) for n in range(num_experts)}, "cpu")
    return sum(rates.values()) / num_experts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experts", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=50, help="in a turn")
    parser.add_argument("--n", type=int, default=5, help="turns")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rates: dict[bool, list[float]] = {False: [], True: []}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{Path(folder) / 'mlflow.db'}"
        os.environ["MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING"] = "false"
        os.environ["LONGTAIL_CACHE_DIR"] = folder
        steps_a_second(1, 1, True)  # makes the store
        for _ in range(options.n):
            for is_recorded, values in rates.items():
                values.append(steps_a_second(options.experts, options.epochs, is_recorded))
    ratios = [recorded / bare for bare, recorded in zip(rates[False], rates[True], strict=True)]
    found = {"experts": options.experts, "n": options.n, "epochs": options.epochs}
    found |= spread("steps_a_second", rates[False])
    found |= spread("recorded_steps_a_second", rates[True])
    found |= spread("ratio", ratios)
    if options.json:
        print(json.dumps(found))
        return
    show(found)


if __name__ == "__main__":
    main()
