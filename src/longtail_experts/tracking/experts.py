"""Runs of experts, and of stages around them: how they begin, and what they are given then."""

import csv
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from longtail_experts.config import Config, make_config, parse_recipe
from longtail_experts.data.dataset import Dataset
from longtail_experts.data.sources import first_line
from longtail_experts.tracking import charts, figures
from longtail_experts.tracking.identity import code_sha256, git_tags, processor
from longtail_experts.tracking.logits import require_training_ended
from longtail_experts.tracking.runs import (
    NOTE,
    Run,
    RunError,
    claimed_from_its_start,
    launched_run,
    launched_run_id,
    link_to,
    start_run,
)

SYNTHETIC_NOTICE = (
    "**Synthetic images.** This is a demonstration on generated pictures; its numbers say "
    "nothing about CIFAR-100 or any real data.\n\n"
)


def notice(config: Config) -> str:
    """What a description opens with where nobody must mistake the run for a real one."""
    return SYNTHETIC_NOTICE if config.source == "synthetic" else ""


def run_name(config: Config, what: str, seed: str = "seed") -> str:
    """`seed`: the field of the one that it depends on."""
    demo = "DEMO " if config.source == "synthetic" else ""
    return f"{demo}{what} {config.source} {seed} {getattr(config, seed)}"


@contextmanager
def start_expert_run(
    config: Config, stage: str, parent: Run | None = None, existing: Run | None = None
) -> Iterator[Run]:
    """A new run of an expert, or `existing` once more, which keeps the tags of its start.

    Ctrl-C and SIGTERM say on their way out how to go on.
    """
    tags = {"stage": stage, "expert": config.loss, "config_sha256": config.sha256}
    tags |= machine_tags(config)
    if existing is not None:
        tags = tags_of_resumed(existing, config)
    name = run_name(config, config.loss)
    opened = start_run(name, tags, parent, existing, system_metrics=True)
    with claimed_from_its_start(opened, existing) as run:
        try:
            if existing is None or not run.has_artifact("config.yaml"):
                run.write_text("config.yaml", config.to_yaml())  # all that going on with it needs
            yield run
        except BaseException as stop:
            if not isinstance(stop, Exception) and not str(stop):
                stop.args = (f"in run {run.run_id}: -P resume={run.run_id} goes on from there",)
            raise


def tags_of_resumed(run: Run, config: Config) -> dict[str, str]:
    """How often a run was resumed, and with which code and devices that it was not begun with: all
    of them, in their order."""
    before = run.tags
    found = {"resumed": str(int(before.get("resumed", "0")) + 1)}
    for name, value in tags_that_differ("resumed", before, config).items():
        earlier = before[name].split(", ") if name in before else []
        found[name] = ", ".join(dict.fromkeys([*earlier, value]))
    return found


def tags_that_differ(since: str, before: Mapping[str, str], config: Config) -> dict[str, str]:
    """`since`.name of each machine tag that is another than when a run began."""
    now = machine_tags(config)
    return {f"{since}.{name}": value for name, value in now.items() if before.get(name) != value}


def machine_tags(config: Config) -> dict[str, str]:
    return {
        "data.source": config.source,
        "device": config.device,
        "processor": processor(config.device),
        "precision": config.precision,
        "torch": torch.__version__,
        "code_sha256": code_sha256(),
        **git_tags(),
    }


def record_inputs(run: Run, config: Config, data: Dataset, num_parameters: int) -> None:
    """Params, splits and data sets: all that is known before the first step."""
    run.describe(
        f"{notice(config)}Training under {config.loss}: figures by epoch are under Model metrics, "
        f"and beside those of other experts [here]({charts.link_to_curves(run)}); results appear "
        "on this page after calibration."
    )
    charts.offer_curves(run)
    record_splits(run, data)
    run.log_params(
        config.as_text()
        | {"splits_sha256": data.splits.sha256, "num_parameters": str(num_parameters)}
    )


def record_splits(run: Run, data: Dataset) -> None:
    """splits/*.json and what `mlflow ui` shows under *Datasets used*."""
    for split in data.split_names:
        indices = data.splits.indices[split].tolist()
        run.write_json(f"splits/{split}_indices.json", indices)
    run.write_json("splits/manifest.json", data.manifest)
    run.log_datasets(
        (split, data.splits.sha256, data.images.source, {"num_rows": data.size(split)})
        for split in data.split_names
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


# --- stages other than an expert's own --------------------------------------------------------


def start_data_run(config: Config) -> AbstractContextManager[Run]:
    tags = {"stage": "data", "data.source": config.source, **git_tags()}
    return start_run(run_name(config, "data", "split_seed"), tags)


def start_preflight_run(config: Config) -> AbstractContextManager[Run]:
    tags = {"stage": "preflight", **machine_tags(config)}
    return start_run(run_name(config, f"preflight {config.loss}"), tags)


@contextmanager
def start_parent_run(config: Config, existing: Run | None = None) -> Iterator[Run]:
    """Ctrl-C and SIGTERM say on their way out how to go on: with all experts, not one alone."""
    tags = {"stage": "all", **machine_tags(config)}
    if existing is not None:
        tags = tags_of_resumed(existing, config)
    name = run_name(config, "all experts")
    opened = start_run(name, tags, existing=existing)
    with claimed_from_its_start(opened, existing) as parent:
        try:
            if existing is None:
                parent.write_text("config.yaml", config.to_yaml())
            yield parent
        except BaseException as stop:
            if not isinstance(stop, Exception):
                stop.args = (f"in run {parent.run_id}: -P resume={parent.run_id} goes on with it",)
            raise


def describe_begun_parent(parent: Run, config: Config) -> None:
    parent.describe(
        f"{notice(config)}Experts of every loss, as child runs: "
        f"[learning curves]({charts.link_to_curves(parent)}). Results appear here at the end."
    )
    charts.offer_curves(parent)


def children_of(parent: Run) -> dict[str, Run]:
    """The newest child run of each loss."""
    found = parent.client.search_runs(
        [parent.experiment_id],
        f"tags.mlflow.parentRunId = '{parent.run_id}'",
        order_by=["attributes.start_time ASC"],
    )
    tagged = [(run.data.tags.get("expert"), run.info.run_id) for run in found]
    return {loss: Run(run_id) for loss, run_id in tagged if loss}  # others may nest runs there


def start_calibration_run(source: Run) -> AbstractContextManager[Run]:
    return start_run(f"calibrate {source.name}", pointer_to(source))


def launched_resuming_run(source: Run) -> AbstractContextManager[Run | None]:
    """The run that `mlflow run -P resume=...` made for itself: a pointer to the one resumed."""
    if launched_run_id() == source.run_id:  # mlflow run --run-id: the run itself, no pointer
        del os.environ["MLFLOW_RUN_ID"]
        return nullcontext()
    note = f"Resumed run [{source.name}]({link_to(source)}); everything is there."
    tags = {"stage": "resume", "source_run_id": source.run_id, NOTE: note}
    return launched_run(f"resume {source.name}", tags)


def launched_calibration_run(source: Run) -> AbstractContextManager[Run | None]:
    return launched_run(f"calibrate {source.name}", pointer_to(source))


def pointer_to(source: Run) -> dict[str, str]:
    note = f"Calibration of run [{source.name}]({link_to(source)}); everything is there."
    return {"stage": "calibrate", "source_run_id": source.run_id, NOTE: note}


def recorded_config(run: Run) -> Config:
    """The config that a run was started with; RunError where it cannot be read."""
    try:
        return make_config(parse_recipe(run.read_text("config.yaml"), "config.yaml"))
    except ValueError as error:  # ConfigError, or no UTF-8
        raise RunError(f"run {run.run_id}: config.yaml: {first_line(error)}") from None


def require_same_splits(run: Run, config: Config, data: Dataset) -> None:
    recorded = run.params.get("splits_sha256")
    if data.splits.sha256 != recorded:
        raise RunError(
            f"run {run.run_id}: was trained on splits {str(recorded)[:12]}, but data_dir="
            f"{config.data_dir} gives {data.splits.sha256[:12]}: give the data_dir of the same "
            "images in the same order"
        )


def output_bytes(num_parameters: int, num_rows: int, num_classes: int, epochs: int) -> int:
    """About what an expert's run writes: checkpoints here and in the store (last.pt holds
    weights, momentum and the best weights), model, logits, figures, points."""
    checkpoints = 4 * num_parameters * (3 + 3 + 1 + 3 + 1 + 1 + 2)
    return checkpoints + logit_bytes(num_rows, num_classes) + 3_000_000 + 2_000 * epochs


def logit_bytes(num_rows: int, num_classes: int) -> int:
    """Logits float32, targets and indices int64."""
    return num_rows * (4 * num_classes + 16)


def checkpoint_bytes(num_parameters: int) -> int:
    """best.pt and final_calibrated.pt; last.pt with momentum and a copy of the best weights."""
    return 4 * num_parameters * (1 + 1 + 3)


def require_trained(run: Run) -> None:
    """Raises RunError for a run that has no checkpoint, or whose training has not ended well."""
    stage = run.tags.get("stage", "none")
    if stage in ("main", "train"):
        require_training_ended(run)
    name = "last" if run.params.get("protocol") == "literature" else "best"
    if not run.has_artifact(f"checkpoints/{name}.pt"):
        raise RunError(
            f"run {run.run_id}: has no checkpoints/{name}.pt (its stage is {stage}); give the id "
            "of a train run"
        )
