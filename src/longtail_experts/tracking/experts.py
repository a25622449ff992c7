"""What the run of one expert is given, in the names that other programs read."""

import csv
from collections.abc import Callable
from contextlib import AbstractContextManager

from longtail_experts.config import Config
from longtail_experts.data.dataset import Dataset
from longtail_experts.data.splits import SPLITS, manifest
from longtail_experts.tracking import figures
from longtail_experts.tracking.runs import Run, start_run

SYNTHETIC_NOTICE = (
    "**Synthetic images.** This is a demonstration on generated pictures; its numbers say "
    "nothing about CIFAR-100 or any real data."
)


def notice(config: Config) -> str:
    """What a description opens with where nobody must mistake the run for a real one."""
    return f"{SYNTHETIC_NOTICE}\n\n" if config.source == "synthetic" else ""


def run_name(config: Config) -> str:
    what = "DEMO synthetic" if config.source == "synthetic" else config.source
    return f"{config.loss} {what} seed {config.seed}"


def start_expert_run(
    config: Config, stage: str, parent: Run | None = None
) -> AbstractContextManager[Run]:
    tags = {"stage": stage, "expert": config.loss, **machine_tags(config)}
    return start_run(run_name(config), tags, parent)


def machine_tags(config: Config) -> dict[str, str]:
    return {
        "data.source": config.source,
        "device": config.device,
        "precision": config.precision,
    }


def record_inputs(run: Run, config: Config, data: Dataset, num_parameters: int) -> None:
    """Config, params, splits and data sets: all that is known before the first step."""
    run.describe(f"{notice(config)}Training {config.loss}; results appear here at the end.")
    run.write_text("config.yaml", config.to_yaml())
    record_splits(run, data)
    run.log_params(
        config.as_text()
        | {"splits_sha256": data.splits.sha256, "num_parameters": str(num_parameters)}
    )


def record_splits(run: Run, data: Dataset) -> None:
    """splits/*.json and what `mlflow ui` shows under *Datasets used*."""
    description = manifest(data.splits, data.images)
    for split in SPLITS:
        indices = data.splits.indices[split].tolist()
        run.write_json(f"splits/{split}_indices.json", indices)
    run.write_json("splits/manifest.json", description)
    run.log_datasets(
        (split, data.splits.sha256, data.images.source, {"num_rows": data.size(split)})
        for split in SPLITS
    )


def record_schedule(
    run: Run, epochs: int, steps_per_epoch: int, lr_of: Callable[[int], float]
) -> None:
    """tables/lr_schedule.csv, every step, and the same as a figure."""
    rates = [lr_of(step) for step in range(epochs * steps_per_epoch)]
    with run.artifact("tables/lr_schedule.csv") as path, path.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["step", "epoch", "lr"])
        for step, rate in enumerate(rates):
            table.writerow([step, step // steps_per_epoch, f"{rate:.10g}"])
    with run.artifact("figures/lr_schedule.png") as path:
        figures.lr_schedule(rates, steps_per_epoch, path)
