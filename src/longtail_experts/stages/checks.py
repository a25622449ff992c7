"""What can be checked in a moment, before hours are spent: recipe, data, disk."""

import logging
from collections.abc import Iterable
from pathlib import Path

from longtail_experts.config import LOSS_NAMES, Config
from longtail_experts.data.dataset import Dataset
from longtail_experts.data.splits import num_in_several_splits
from longtail_experts.learning import rules
from longtail_experts.learning.resnet import ResNet32, num_parameters
from longtail_experts.learning.rules import Finding, blocking
from longtail_experts.learning.step import has_bf16_instructions
from longtail_experts.stages.inputs import patience_starts_at, selects, steps_an_epoch
from longtail_experts.tracking import experts
from longtail_experts.tracking.recorder import local_folder
from longtail_experts.tracking.runs import RunError, free_bytes

log = logging.getLogger(__name__)


class NotReadyError(RunError):
    """Something would stop or spoil the training; the message names it and the remedy."""


def require_ready(config: Config, data: Dataset) -> None:
    """Warn of what is odd; raise NotReadyError, before any run is started, at what is blocking.

    The artifacts' disk is not known yet: training looks at it before its first step.
    """
    findings = cheap_findings(config, data, [local_folder("")])
    for finding in findings:
        if finding.verdict == "warning":
            log.warning("%s=%s: %s", finding.field, finding.value, finding.message)
    if blocking(findings):
        raise NotReadyError(f"{not_ready(findings)} (preflight=false starts all the same)")


def not_ready(findings: Iterable[Finding]) -> str:
    stops = [f"{f.field}={f.value}: {f.message}" for f in blocking(findings)]
    return f"NOT READY: {'; '.join(stops)}"


def cheap_findings(config: Config, data: Dataset, places: Iterable[Path]) -> list[Finding]:
    """On every knob, on the data, and on the disks that will be written to."""
    return [
        *config_findings(config, data),
        *data_findings(data),
        disk_finding(config, data, places),
    ]


def config_findings(config: Config, data: Dataset) -> list[Finding]:
    """One for each field, in the order of the config."""
    steps_per_epoch, num_images = steps_an_epoch(config, data), data.size("train")
    # The last of `warmup_steps` has the whole rate, and so has the last of `warmup_epochs`.
    warmup = max(config.warmup_steps, (config.warmup_epochs - 1) * steps_per_epoch + 1)
    falls_at = config.milestones if config.lr_schedule == "milestones" else ()
    found = [
        rules.loss_rule(config.loss, config.tau),
        rules.tau_rule(config.tau, config.loss),
        rules.knob_rule("beta", config.beta, Config().beta, config.loss),
        rules.knob_rule("gamma", config.gamma, Config().gamma, config.loss),
        rules.source_rule(config.source),
        rules.images_per_class_rule(config.images_per_class, config.source),
        rules.batch_rule(config.batch_size, num_images),
        rules.lr_rule(config.lr, config.batch_size, warmup, steps_per_epoch),
        rules.momentum_rule(config.momentum),
        rules.weight_decay_rule(config.weight_decay),
        rules.lr_decay_rule(config.lr_decay, config.milestones, config.lr_schedule),
        rules.protocol_rule(config.protocol, config.subset_rule),
        rules.reweight_rule(config.reweight_from, config.loss, config.epochs, config.milestones),
        rules.milestones_rule(
            config.milestones,
            config.epochs,
            config.lr_schedule,
            reweights=config.loss == "ldam_drw" and config.reweight_from is None,
        ),
        rules.warmup_rule(
            config.warmup_steps,
            steps_per_epoch,
            config.epochs,
            falls_at,
            num_images,
            config.warmup_epochs,
        ),
        rules.warmup_epochs_rule(config.warmup_epochs, config.epochs, falls_at, num_images),
        *([rules.validation_rule(config.validation_every, config.epochs)] * selects(config)),
        rules.patience_rule(
            config.early_stopping_patience,
            config.validation_every,
            config.epochs,
            patience_starts_at(config),
        ),
        rules.checkpoint_rule(config.checkpoint_every, config.epochs),
        rules.precision_rule(config.device, config.precision, has_bf16_instructions()),
    ]
    by_field = {finding.field: finding for finding in found}
    return [
        by_field.get(name, Finding(name, value, "ok")) for name, value in config.as_text().items()
    ]


def data_findings(data: Dataset) -> list[Finding]:
    absent = {split: int((data.class_counts(split) == 0).sum()) for split in data.split_names}
    return [
        rules.few_images_rule(data.class_counts("train").tolist()),
        rules.absent_classes_rule(absent, data.num_classes),
        rules.identical_images_rule(
            num_in_several_splits(data.manifest["identical_images"]), data.num_rows
        ),
    ]


def disk_finding(config: Config, data: Dataset, places: Iterable[Path]) -> Finding:
    """Room for the output of every expert asked for, on the fullest of the disks."""
    fullest = min(places, key=free_bytes)
    needed = num_experts(config) * experts.output_bytes(
        num_parameters(ResNet32(data.num_classes, config.shortcut)),
        data.num_rows,
        data.num_classes,
        config.epochs,
    )
    remedy = f"make room in {fullest}, or name another place (LONGTAIL_CACHE_DIR; the store's)"
    return rules.room_rule("disk", needed, free_bytes(fullest), remedy)


def num_experts(config: Config) -> int:
    return len(LOSS_NAMES) if config.loss == "all" else 1
