"""Entry point `calibrate`: everything after training, into the training run."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from longtail_experts.config import Config, make_config
from longtail_experts.data.batches import plain_batches
from longtail_experts.data.dataset import Dataset
from longtail_experts.data.sources import first_line
from longtail_experts.learning.at_once import beside_the_others
from longtail_experts.learning.calibration import (
    Temperature,
    cross_fit_temperature,
    fit_temperature,
)
from longtail_experts.learning.evaluation import (
    deployment_priors,
    evaluate,
    prior_weighted_accuracy,
)
from longtail_experts.learning.losses import LOSSES, prior_of
from longtail_experts.learning.metrics import mean_over, per_class_recall
from longtail_experts.learning.resnet import ResNet32
from longtail_experts.learning.step import predict_logits, recorded_passes
from longtail_experts.stages.inputs import load_dataset, log_offset_of, resolve, selects
from longtail_experts.tracking import expert_report, experts
from longtail_experts.tracking.checkpoints import read_checkpoint, save_checkpoint
from longtail_experts.tracking.logits import SplitLogits, is_calibrated, write_logits
from longtail_experts.tracking.model import log_expert_model
from longtail_experts.tracking.registry import register
from longtail_experts.tracking.runs import Run, RunError, claimed, open_run
from longtail_experts.tracking.stale import require_not_running


@dataclass(frozen=True)
class Trained:
    """The checkpoint that the expert is, and the last one, as networks on the device."""

    chosen: dict[str, Any]  # best.pt; last.pt where no split selects
    network: nn.Module
    last_step: int
    last_network: nn.Module


def run(run_id: str, changes: dict[str, str]) -> None:
    """Calibrate a training run, recorded by a run of its own that only points at it.

    `changes` may override data_dir, device and batch_size. On a run that is calibrated already,
    says so and changes nothing. Raises RunError or DataError before any work is done.
    """
    resolve(make_config(changes))  # values are checked before the store is opened
    source = open_run(run_id)
    if not is_calibrated(source):
        require_not_running(source)  # which names the process
    with claimed(source):
        if is_calibrated(source):
            name = experts.recorded_config(source).register_as
            with experts.launched_calibration_run(source):
                if name:  # which may have been cut off
                    register(source, name)
                else_ = "else " if name else ""
                print(f"run {run_id} is calibrated already; nothing {else_}was changed")
            return
        experts.require_trained(source)
        config = resolve(experts.recorded_config(source).replace(**{"device": "auto"} | changes))
        data = load_dataset(config, run_id)
        experts.require_same_splits(source, config, data)
        trained = load_trained(source, config, data)
        with experts.start_calibration_run(source):
            source.set_tags(experts.tags_that_differ("calibrated", source.tags, config))
            calibrate_expert(source, config, data, trained)
    print(f"run {run_id} calibrated")


def load_trained(run_: Run, config: Config, data: Dataset) -> Trained:
    """Both checkpoints; RunError where one is missing, damaged or of another network."""
    last = read_checkpoint(run_, "last")
    chosen = {name: last[name] for name in ("model", "epoch", "step")}
    if selects(config):
        chosen = read_checkpoint(run_, "best")
    return Trained(
        chosen=chosen,
        network=load_network(chosen["model"], config, data),
        last_step=last["step"],
        last_network=load_network(last["model"], config, data),
    )


def calibrate_expert(run_: Run, config: Config, data: Dataset, trained: Trained) -> None:
    """Temperature, logits, test figures, model and report of the chosen checkpoint.

    Raises RunError before anything is written where logits are not finite.
    """
    step = trained.chosen["step"]
    prior = prior_of(data.class_counts("train"))
    log_offset = log_offset_of(config, data, trained.chosen["epoch"])
    with beside_the_others():
        logits = split_logits(trained.network, config, data)
        calibration = fit(logits, config, data, log_offset, prior)
        metrics = test_metrics(logits, data, calibration, log_offset, prior)
        of_last = metrics["test_balanced/balanced_accuracy"]
        if trained.last_step != step:
            of_last = balanced_accuracy_of(trained.last_network, config, data)
    temperature = calibration.temperature
    scalars = {"temperature": temperature.value, "tau": config.tau}
    vectors = {"log_offset": log_offset, "prior": prior}
    save_checkpoint(
        run_,
        "final_calibrated",
        {**trained.chosen, **scalars, **{name: v.float() for name, v in vectors.items()}},
    )
    constants = {
        **scalars,
        "temperature_from": calibration.source,
        **({"temperature_halves": calibration.halves} if calibration.halves else {}),
        "log_offset_is_exact": LOSSES[config.loss].is_exact,
        **{name: v.tolist() for name, v in vectors.items()},
    }
    write_logits(run_, as_exported(logits, data), constants)
    run_.replace_metrics(metrics, step)  # those of a calibration that was cut off
    run_.replace_metrics({"test_balanced/balanced_accuracy_last": of_last}, trained.last_step)
    expert_report.record_per_class(run_, data, recalls(logits, data))
    expert_report.record_figures(run_, data, logits, calibration.of_rows, log_offset, prior)
    log_expert_model(
        run_,
        trained.network,
        data.pixels("test_balanced")[:2],
        temperature=temperature.value,
        log_offset=log_offset,
        prior=prior,
        step=step,
    )
    expert_report.record_report(run_, data, logits)
    if config.register_as:
        register(run_, config.register_as)


@dataclass(frozen=True)
class Calibration:
    """A temperature, where it comes from, and what the test rows are scored with."""

    temperature: Temperature
    of_rows: float | Tensor  # T, or float64 [N, 1] for the rows of test_balanced
    source: str
    halves: tuple[float, float] | None = None


def fit(
    logits: dict[str, Tensor], config: Config, data: Dataset, log_offset: Tensor, prior: Tensor
) -> Calibration:
    """On calib, under the training prior. Where there is no such split, on the test images under
    the uniform prior: T and its interval on all of them, and for the scores of each half of them
    the T of the other half."""
    seed = config.split_seed
    if "calib" in data.split_names:
        temperature = fit_temperature(
            logits["calib"], data.targets("calib"), log_offset, bootstrap_seed=seed
        )
        return Calibration(temperature, temperature.value, "calib")
    rows, offset = (
        (logits["test_balanced"], data.targets("test_balanced")),
        log_offset - prior.log(),
    )
    crossed = cross_fit_temperature(*rows, offset, seed=seed)
    temperature = fit_temperature(*rows, offset, bootstrap_seed=seed)
    return Calibration(
        temperature._replace(at_bound=temperature.at_bound or crossed.at_bound),
        crossed.per_row,
        "test_balanced, uniform prior, all images",
        crossed.halves,
    )


def load_network(weights: dict[str, Tensor], config: Config, data: Dataset) -> nn.Module:
    """The network of a checkpoint, on the device; RunError where they do not fit."""
    network = ResNet32(data.num_classes, config.shortcut, LOSSES[config.loss].head)
    try:
        network.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise RunError(
            f"checkpoint does not fit a ResNet-32 of this config ({first_line(error)})"
        ) from None
    return network.to(config.device, memory_format=torch.channels_last)


def split_logits(network: nn.Module, config: Config, data: Dataset) -> dict[str, Tensor]:
    """float32 [N, C] of every split; test_lt lies inside test_balanced and is cut out of it."""
    passes = recorded_passes(config.device, config.fast)
    logits = {
        split: predict_logits(
            network,
            plain_batches(data.pixels(split), config.batch_size, config.device),
            passes=passes,
        )
        for split in data.split_names
        if split != "test_lt" and data.size(split)
    }
    for split in data.split_names:  # a tiny pool may leave tuneV or val_small empty
        logits.setdefault(split, torch.empty(0, data.num_classes))
    if "test_lt" in data.split_names:
        balanced, lt = (
            torch.from_numpy(data.splits.indices[name]) for name in ("test_balanced", "test_lt")
        )
        logits["test_lt"] = logits["test_balanced"][torch.searchsorted(balanced, lt)]
    for split, values in logits.items():
        if not bool(torch.isfinite(values).all()):
            raise RunError(f"logits of {split} are not finite: the training diverged; lower lr")
    return {split: logits[split] for split in data.split_names}


def as_exported(logits: dict[str, Tensor], data: Dataset) -> dict[str, SplitLogits]:
    return {
        split: SplitLogits(
            logits=values.numpy(),
            targets=data.targets(split).numpy(),
            indices=data.splits.indices[split],
        )
        for split, values in logits.items()
    }


def test_metrics(
    logits: dict[str, Tensor],
    data: Dataset,
    calibration: Calibration,
    log_offset: Tensor,
    prior: Tensor,
) -> dict[str, float]:
    """Everything logged after calibration, by metric name."""
    temperature = calibration.temperature
    metrics = {
        "temperature": temperature.value,
        "temperature_low": temperature.low,
        "temperature_high": temperature.high,
        "temperature_at_bound": float(temperature.at_bound),
    }
    for number, half in enumerate(calibration.halves or ()):
        metrics[f"temperature_half_{number}"] = half
    deployment = deployment_priors(data.targets_if_any("test_lt"), data.num_classes)
    for split, q in deployment.items():
        values = evaluate(
            logits[split],
            data.targets(split),
            temperature=calibration.of_rows,
            log_offset=log_offset,
            prior=prior,
            deployment=q,
            groups=data.groups,
        )
        metrics |= {f"{split}/{name}": value for name, value in values.items()}
    pool_prior = prior_of(torch.tensor(data.splits.pool_counts))
    metrics["test_balanced/prior_weighted_accuracy"] = prior_weighted_accuracy(
        logits["test_balanced"], data.targets("test_balanced"), pool_prior
    )
    return {name: value for name, value in metrics.items() if not math.isnan(value)}


def balanced_accuracy_of(network: nn.Module, config: Config, data: Dataset) -> float:
    """Balanced accuracy on test_balanced."""
    pixels = data.pixels("test_balanced")
    logits = predict_logits(network, plain_batches(pixels, config.batch_size, config.device))
    recall, _ = per_class_recall(logits.argmax(1), data.targets("test_balanced"), data.num_classes)
    return mean_over(recall)


def recalls(logits: dict[str, Tensor], data: Dataset) -> dict[str, tuple[Tensor, Tensor]]:
    """(recall, images) a class on the three evaluation splits."""
    return {
        split: per_class_recall(logits[split].argmax(1), data.targets(split), data.num_classes)
        for split in ("val_lt", "test_lt", "test_balanced")
        if split in data.split_names
    }
