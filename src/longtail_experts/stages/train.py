"""Entry point `train`: one expert, from its initial weights to checkpoints best and last."""

import copy
import math
import statistics
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import torch
from tqdm import tqdm

from longtail_experts.config import Config
from longtail_experts.data.batches import augmented_batches, draw_epoch, pad, plain_batches
from longtail_experts.data.dataset import Dataset
from longtail_experts.learning.losses import LOSSES, shifted_cross_entropy
from longtail_experts.learning.metrics import accuracies
from longtail_experts.learning.resnet import build_resnet32, num_parameters
from longtail_experts.learning.schedule import lr_at, steps_worth_logging
from longtail_experts.learning.step import (
    NonFiniteLossError,
    TrainState,
    predict_logits,
    start_training,
    train_epoch,
    train_step,
)
from longtail_experts.stages.inputs import for_one_expert
from longtail_experts.tracking import experts
from longtail_experts.tracking.checkpoints import save_checkpoint, weights_of
from longtail_experts.tracking.runs import Run


def run(config: Config, data: Dataset) -> str:
    """Train one expert in a run of its own; returns the run id."""
    config = for_one_expert(config, config.loss)
    with experts.start_expert_run(config, "train") as run_:
        train_expert(run_, config, data)
        experts.describe_trained(run_, config)
    return run_.run_id


def train_expert(run_: Run, config: Config, data: Dataset) -> None:
    """Everything up to the last optimiser step, into the run.

    Raises NonFiniteLossError at the step where the loss stops being a number.
    """
    num_images = data.size("train")
    steps_per_epoch = math.ceil(num_images / config.batch_size)
    lr_of = schedule_of(config, steps_per_epoch)
    model = build_resnet32(data.num_classes, config.shortcut, config.expert_seed)
    experts.record_inputs(run_, config, data, num_parameters(model))
    experts.record_schedule(run_, config.epochs, steps_per_epoch, lr_of)

    state = start_training(
        model,
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        device=config.device,
        precision=config.precision,
        batch_size=config.batch_size,
        planned_images=config.epochs * num_images,
        fast=config.fast,
    )
    run_.set_tags({"step_path": state.path})
    padded = pad(data.pixels("train")).to(config.device)
    targets = data.targets("train").to(config.device)
    shift = train_shift(config, data).to(config.device)
    announce_cost(config, state, padded, targets, shift)
    lr_steps = steps_worth_logging(
        warmup_steps=config.warmup_steps, steps_per_epoch=steps_per_epoch, epochs=config.epochs
    )
    selection = Selection(config.early_stopping_patience, last_milestone(config))
    validation: dict[str, float] = {}
    with progress_bar(config, steps_per_epoch) as bar:
        for epoch in range(config.epochs):
            draws = draw_epoch(num_images, config.expert_seed, epoch, config.device)
            first_step, started = state.step, time.perf_counter()
            mean_loss = train_epoch(
                state,
                augmented_batches(padded, targets, draws, config.batch_size),
                shift=shift,
                lr_at=lr_of,
                precision=config.precision,
                on_step=bar.update,
            )
            seconds = time.perf_counter() - started
            step, is_last = state.step - 1, epoch == config.epochs - 1
            points = [("lr", lr_of(s), s) for s in lr_steps if first_step <= s < state.step]
            points += [
                ("epoch", epoch, step),
                ("train/loss", mean_loss, step),
                ("train/images_per_second", num_images / seconds, step),
            ]
            if is_last or (epoch + 1) % config.validation_every == 0:
                validation = validate(state, config, data)
                points += [(f"val/{name}", value, step) for name, value in validation.items()]
                if selection.chooses(validation["balanced_accuracy"], epoch, step):
                    save_checkpoint(run_, "best", weights_at(state, epoch))
            run_.log_points(points)
            show(bar, lr_of(step), mean_loss, validation)
            if is_last or selection.is_over or (epoch + 1) % config.checkpoint_every == 0:
                save_checkpoint(run_, "last", last_checkpoint(state, epoch, selection))
            if selection.is_over:
                break
    best = selection.best
    run_.log_metrics({f"best/{name}": value for name, value in best.items()}, best["step"])
    run_.set_tags({"training": "complete" if is_last else "early_stopped"})


@dataclass
class Selection:
    """Which checkpoint is best by balanced accuracy on val_lt (ties: the later), and when no
    better one is waited for any longer."""

    patience: int | None
    starts_at: int  # epoch from which validations without a better one are counted
    best: dict[str, Any] = field(default_factory=dict)
    without_better: int = 0

    def chooses(self, balanced_accuracy: float, epoch: int, step: int) -> bool:
        """Whether this validation is the best so far."""
        so_far = self.best.get("val_balanced_accuracy", -math.inf)
        if epoch >= self.starts_at:
            self.without_better = 0 if balanced_accuracy > so_far else self.without_better + 1
        if balanced_accuracy < so_far:
            return False
        self.best = {"epoch": epoch, "step": step, "val_balanced_accuracy": balanced_accuracy}
        return True

    @property
    def is_over(self) -> bool:
        return self.patience is not None and self.without_better >= self.patience


def progress_bar(config: Config, steps_per_epoch: int) -> tqdm:
    return tqdm(
        total=config.epochs * steps_per_epoch,
        desc=f"train {config.loss}",
        unit="step",
        mininterval=1 if sys.stderr.isatty() else 30,
        dynamic_ncols=True,
    )


def schedule_of(config: Config, steps_per_epoch: int) -> partial:
    """step -> learning rate."""
    return partial(
        lr_at,
        lr=config.lr,
        lr_decay=config.lr_decay,
        milestones=config.milestones,
        warmup_steps=config.warmup_steps,
        steps_per_epoch=steps_per_epoch,
    )


def train_shift(config: Config, data: Dataset) -> torch.Tensor:
    """float32 [C], what the loss adds to the logits in training."""
    return LOSSES[config.loss].train_shift(data.class_counts("train"), config.tau).float()


def last_milestone(config: Config) -> int:
    return max((m for m in config.milestones if m < config.epochs), default=0)


def validate(state: TrainState, config: Config, data: Dataset) -> dict[str, float]:
    """Accuracies on val_lt, and the training loss there (not comparable across losses)."""
    batches = plain_batches(data.pixels("val_lt"), config.batch_size, config.device)
    logits, targets = predict_logits(state.model, batches), data.targets("val_lt")
    loss = shifted_cross_entropy(logits, targets, train_shift(config, data))
    if not bool(torch.isfinite(loss)):
        raise NonFiniteLossError(
            f"validation loss is not finite after step {state.step - 1}: lower lr, or lengthen "
            "warmup_steps"
        )
    values = accuracies(logits.argmax(1), targets, data.groups, data.num_classes)
    return {"loss": float(loss), **values}


def weights_at(state: TrainState, epoch: int) -> dict[str, Any]:
    return {"model": weights_of(state.model), "epoch": epoch, "step": state.step - 1}


def last_checkpoint(state: TrainState, epoch: int, selection: Selection) -> dict[str, Any]:
    """Everything that training depends on beyond the config: tensors and plain values."""
    return {
        **weights_at(state, epoch),
        "optimizer": state.optimizer.state_dict(),
        "rng": {"torch": torch.get_rng_state()},
        "best": selection.best,
        "validations_without_better": selection.without_better,
    }


def show(bar: tqdm, lr: float, loss: float, validation: dict[str, float]) -> None:
    facts = {"lr": f"{lr:.4g}", "loss": f"{loss:.3f}"}
    if validation:
        facts["val balanced"] = f"{100 * validation['balanced_accuracy']:.1f}%"
    bar.set_postfix(facts, refresh=False)


def announce_cost(
    config: Config,
    state: TrainState,
    padded: torch.Tensor,
    targets: torch.Tensor,
    shift: torch.Tensor,
) -> None:
    """Time a few steps on a throwaway copy and print what the whole training will take."""
    num_images = len(targets)
    if num_images * config.epochs < 100_000:
        return
    trial = copy.deepcopy(state)
    draws = draw_epoch(num_images, 0, 0, config.device)
    batches = augmented_batches(padded, targets, draws, config.batch_size)
    seconds = []
    for images, labels in islice(batches, 6):
        started = time.perf_counter()
        loss = train_step(trial, images, labels, shift, 0.0, config.precision)
        float(loss)  # waits for the device
        seconds.append((time.perf_counter() - started) / len(labels))
    minutes = statistics.median(seconds[1:]) * num_images * config.epochs / 60
    where = f"{config.device}, {config.precision}, {state.path} steps"
    if config.device == "cpu":
        where += f", {torch.get_num_threads()} threads"
    print(
        f"{config.loss}: {config.epochs} epochs of {num_images} images, about "
        f"{minutes / 60:.1f} h ({minutes:.0f} min) on this device ({where})",
        flush=True,
    )
