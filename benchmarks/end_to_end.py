"""Where the time of one `main` goes.

    python benchmarks/end_to_end.py --config demo
    python benchmarks/end_to_end.py --config cifar100_lt --data_dir FOLDER --epochs 3 --json

Takes the fields of `main`, runs it into a store of its own (which goes with the end, unless
`--keep FOLDER` names a new folder for it), and prints wall seconds: `import`, `store` (MLflow
makes the tables of a new one; under `mlflow run` it has done so before `main` is started), `data`
(images and splits), `train` (steps), `validate`, `calibrate` (temperature, its interval, test
figures), `export` (logits of all splits, the model), and `tracking`: all that is left, so that
nothing spent on recording is missed. A moment at which several experts do several of these
(`--loss all` on a GPU) counts once: for training if one of them trains, else for the first here.
"""

import json
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

BUCKETS = {
    "data": (("inputs", "load_dataset"),),
    "train": (
        ("train", "state_before_training"),
        ("train", "announce_cost"),
        ("train", "train_epoch"),
    ),
    "validate": (("train", "validate"),),
    "calibrate": (("calibrate", "fit_temperature"), ("calibrate", "test_metrics")),
    "export": (
        ("calibrate", "split_logits"),
        ("calibrate", "write_logits"),
        ("calibrate", "balanced_accuracy_of"),
        ("calibrate", "log_expert_model"),
    ),
}


PRECEDENCE = ("train", *(bucket for bucket in BUCKETS if bucket != "train"))
Span = tuple[float, float]  # from, to


def timed(function: Callable[..., Any], spans: list[Span]) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        started = time.perf_counter()
        try:
            return function(*arguments, **named)
        finally:
            spans.append((started, time.perf_counter()))

    return call


def length(spans: Iterable[Span]) -> float:
    """Of their union."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def seconds_of(spans: dict[str, list[Span]]) -> dict[str, float]:
    """By bucket; what overlaps counts for the first in PRECEDENCE."""
    seconds, counted = {}, []
    for bucket in PRECEDENCE:
        before = length(counted)
        counted += spans[bucket]
        seconds[bucket] = length(counted) - before
    return seconds


def main(arguments: list[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    as_json, place = "--json" in arguments, tempfile.TemporaryDirectory
    if "--keep" in arguments:
        at = arguments.index("--keep")
        name = "".join(arguments[at + 1 : at + 2])
        if not name or name.startswith("--") or os.path.exists(name):
            raise SystemExit(f"error: --keep {name}: name a folder that does not exist yet")
        os.makedirs(name)
        place = partial(nullcontext, os.path.abspath(name))
        del arguments[at : at + 2]
    arguments = [a for a in arguments if a != "--json"]
    for at, argument in enumerate(arguments):  # `main` runs elsewhere
        is_folder = arguments[at - 1 : at] == ["--data_dir"]
        if os.path.isfile(argument) or is_folder:  # and not one that is named like a config
            arguments[at] = os.path.abspath(argument)
    spans: dict[str, list[Span]] = defaultdict(list)
    started = time.perf_counter()
    from longtail_experts import cli
    from longtail_experts.stages import calibrate, inputs, train
    from longtail_experts.tracking.runs import store_to_read

    importing = time.perf_counter() - started
    modules = {"calibrate": calibrate, "inputs": inputs, "train": train}
    for bucket, functions in BUCKETS.items():
        for module, name in functions:
            plain = getattr(modules[module], name)
            setattr(modules[module], name, timed(plain, spans[bucket]))
    with place() as folder:
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{Path(folder) / 'mlflow.db'}"
        os.environ.setdefault("LONGTAIL_CACHE_DIR", os.path.abspath(".cache"))
        home = os.getcwd()
        os.chdir(folder)
        begun = time.perf_counter()
        with store_to_read() as client:
            client.search_experiments(max_results=1)
        has_store = time.perf_counter()
        code = cli.main(["main", *arguments])
        finished = time.perf_counter()
        os.chdir(home)
    if code:
        return code
    by_bucket = seconds_of(spans)
    seconds = {
        "import": importing,
        "store": has_store - begun,
        **{bucket: by_bucket[bucket] for bucket in BUCKETS},
        "tracking": finished - has_store - sum(by_bucket.values()),
        "total": importing + finished - begun,
    }
    found = {name: round(value, 2) for name, value in seconds.items()}
    if as_json:
        print(json.dumps(found))
        return 0
    for name, value in found.items():
        print(f"{name:10} {value:9.2f} s {100 * value / found['total']:6.1f} %")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
