"""What every stage starts from: a config resolved for this machine, and its data set."""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import starmap
from typing import Any

import torch

from longtail_experts.config import CHANGES_NO_FIGURE, Config, ConfigError
from longtail_experts.data.augment import Augmentation
from longtail_experts.data.batches import EpochDraws, batches_of, derive_seed, loader_of
from longtail_experts.data.dataset import Dataset
from longtail_experts.data.sources import DataError, load_images
from longtail_experts.data.splits import make_splits
from longtail_experts.learning.fast_step import Batch
from longtail_experts.learning.losses import LOSSES, Knobs, Objective, mixed, objective_of
from longtail_experts.learning.resnet import ResNet32, build_resnet32
from longtail_experts.learning.schedule import lr_at, reweighted_from
from longtail_experts.learning.step import (
    TrainState,
    as_it_is,
    has_bf16_instructions,
    prepare_training,
    replays,
    start_training,
)
from longtail_experts.tracking.runs import RunError

MAY_CHANGE_ON_RESUME = CHANGES_NO_FIGURE  # between the parts of one training


def load_dataset(config: Config, of_run: str = "") -> Dataset:
    """Images and splits of a config, or of a run's; raises DataError before any work is done."""
    images = load_images(
        config.source,
        config.data_dir,
        seed=config.split_seed,
        images_per_class=config.images_per_class,
        download=os.environ.get("LONGTAIL_OFFLINE") != "1",
    )
    try:
        splits = make_splits(
            images,
            imbalance_profile=config.imbalance_profile,
            imbalance_factor=config.imbalance_factor,
            images_per_class=config.images_per_class,
            split_seed=config.split_seed,
            protocol=config.protocol,
            subset_rule=config.subset_rule,
        )
    except DataError as error:
        if not of_run:
            raise
        reason = str(error).split(";")[0]  # the remedy is one for a new run
        raise DataError(
            f"run {of_run}: was not trained on the images of data_dir={config.data_dir} ({reason})"
        ) from None
    for name in ("calib", "test_lt", "test_balanced"):
        if name in splits.indices and len(splits.indices[name]) == 0:
            raise DataError(
                f"split {name} would be empty: {sum(splits.pool_counts)} pool images and "
                f"{len(images.test_labels)} test images of {len(images.class_names)} classes are "
                "too few"
            )
    return Dataset(images, splits)


def resolve(config: Config) -> Config:
    """The config with `auto` replaced by what this machine has; raises ConfigError."""
    has_gpu = torch.cuda.is_available()
    if config.device == "cuda" and not has_gpu:
        raise ConfigError("device=cuda: torch sees no GPU here; give device=cpu or auto")
    device = ("cuda" if has_gpu else "cpu") if config.device == "auto" else config.device
    precision = config.precision
    if precision == "auto":
        precision = "bf16" if device == "cuda" or has_bf16_instructions() else "fp32"
    return config.replace(device=device, precision=precision)


def for_one_expert(config: Config, loss: str) -> Config:
    """The config of one expert, with the seed that drives its weights, order and augmentation."""
    seed = config.expert_seed
    seed = derive_seed(config.seed, loss) if seed is None else seed
    return config.replace(loss=loss, expert_seed=seed)


def trains_at_once(config: Config) -> bool:
    """Whether experts of loss=all train at the same time: on a GPU, with recorded steps. One expert
    uses all cores of a CPU."""
    return replays(config.device, config.fast)


def selects(config: Config) -> bool:
    """Whether there is a validation split to choose a checkpoint by; else the last one stands."""
    return config.protocol != "literature"


def steps_an_epoch(config: Config, data: Dataset) -> int:
    return math.ceil(data.size("train") / config.batch_size)


def augmentation_of(config: Config) -> Augmentation:
    return Augmentation(config.augmentation, config.cutout, config.mixup)


def schedule_of(config: Config, steps_per_epoch: int) -> partial:
    """step -> learning rate."""
    return partial(
        lr_at,
        lr=config.lr,
        lr_decay=config.lr_decay,
        milestones=config.milestones,
        warmup_steps=config.warmup_steps,
        steps_per_epoch=steps_per_epoch,
        warmup_epochs=config.warmup_epochs,
        cosine_epochs=config.epochs if config.lr_schedule == "cosine" else None,
    )


def knobs_of(config: Config) -> Knobs:
    return Knobs(tau=config.tau, beta=config.beta, gamma=config.gamma)


def log_offset_of(config: Config, data: Dataset, epoch: int) -> torch.Tensor:
    """float64 [C]; f + log_offset is the log-posterior under the training prior.

    f is the network as it is after `epoch`: weights that a deferred loss had not applied by then
    are not in it.
    """
    loss, class_counts = LOSSES[config.loss], data.class_counts("train")
    if loss.is_deferred and not is_reweighted(epoch, config):
        return torch.zeros(len(class_counts), dtype=torch.float64)
    return loss.log_offset(class_counts, knobs_of(config))


def is_reweighted(epoch: int, config: Config) -> bool:
    """Whether the weights of a deferred loss act in an epoch."""
    return epoch >= reweighted_from(config.reweight_from, config.milestones)


def patience_starts_at(config: Config) -> int:
    """The epoch from which validations without a better one are counted: that in which the rate
    last falls by a step, if it does, and not before the weights of a deferred loss act."""
    falls_at = config.milestones if config.lr_schedule == "milestones" else ()
    start = max((m for m in falls_at if m < config.epochs), default=0)
    if config.loss in LOSSES and LOSSES[config.loss].is_deferred:  # `all` is of others
        start = max(start, reweighted_from(config.reweight_from, config.milestones))
    return start


def build_network(config: Config, data: Dataset) -> ResNet32:
    """With the initial weights of the expert."""
    head = LOSSES[config.loss].head
    return build_resnet32(data.num_classes, config.shortcut, config.expert_seed, head)


def objective_at(epoch: int, config: Config, data: Dataset, device: str | None = None) -> Objective:
    """The loss as it is in an epoch, on a device: the config's, unless another is named.

    It takes plain targets, and with mixup those of a mixed batch as well.
    """
    objective = objective_of(
        config.loss,
        data.class_counts("train"),
        knobs_of(config),
        device or config.device,
        is_reweighted=is_reweighted(epoch, config),
    )
    return partial(mixed, objective) if config.mixup else objective


def batches_of_training(
    config: Config, data: Dataset
) -> tuple[Callable[[EpochDraws], Iterator[Batch]], Callable[..., Batch]]:
    """What makes an epoch's draws into batches, and what loads one of these as a step takes it.

    A step loads its own; under a policy of augmentation, whose kernels are chosen on the CPU so
    that none can record that, they are loaded ahead of it.
    """
    ahead, load = as_it_is, loader_of(data.pixels("train"), data.targets("train"), config.device)
    if config.augmentation != "plain":
        ahead, load = load, as_it_is
    return lambda draws: starmap(ahead, batches_of(draws, config.batch_size)), load


def prepare(config: Config, data: Dataset) -> None:
    """Begins, beside whatever comes before it, what `state_before_training` waits for."""
    prepare_training(**_steps_of(config, data))


def state_before_training(model: torch.nn.Module, config: Config, data: Dataset) -> TrainState:
    """Layers are compiled where a training of this config is long enough to repay it."""
    return start_training(
        model,
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        fused=config.fused,
        **_steps_of(config, data),
    )


def _steps_of(config: Config, data: Dataset) -> dict[str, Any]:
    """What decides how steps are taken."""
    return {
        "device": config.device,
        "precision": config.precision,
        "planned_images": config.epochs * data.size("train"),
        "fast": config.fast,
    }


def require_same_fields(
    recorded: Mapping[str, str],
    asked: Mapping[str, str],
    what: str,
    but: Iterable[str] = MAY_CHANGE_ON_RESUME,
) -> None:
    """RunError that names every field in which two configs differ."""
    known = Config().as_text() | dict(recorded)  # a field that is younger than the record
    different = [
        f"{name}={value} (was {known.get(name)})"
        for name, value in asked.items()
        if name not in but and known.get(name) != value
    ]
    if different:
        raise RunError(
            f"{what}: cannot go on with another config: {', '.join(different)}; leave these "
            "fields out, or start a new run"
        )
