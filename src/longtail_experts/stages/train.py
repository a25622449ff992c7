"""Entry point `train`: one expert, from its initial weights to checkpoints best and last."""

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from longtail_experts.config import MLFLOW_RUN, Config
from longtail_experts.data.batches import (
    EpochDraws,
    draw_epoch,
    plain_batches,
)
from longtail_experts.data.dataset import Dataset
from longtail_experts.data.sources import first_line
from longtail_experts.learning.at_once import beside_the_others
from longtail_experts.learning.cost import peak_memory_bytes, time_steps
from longtail_experts.learning.fast_step import Batch, left_as_it_was
from longtail_experts.learning.losses import Objective
from longtail_experts.learning.metrics import accuracies
from longtail_experts.learning.resnet import num_parameters
from longtail_experts.learning.schedule import steps_worth_logging
from longtail_experts.learning.step import (
    NonFiniteLossError,
    TrainState,
    predict_logits,
    train_epoch,
)
from longtail_experts.stages.inputs import (
    augmentation_of,
    batches_of_training,
    build_network,
    for_one_expert,
    objective_at,
    patience_starts_at,
    require_same_fields,
    schedule_of,
    selects,
    state_before_training,
    steps_an_epoch,
)
from longtail_experts.tracking import expert_report, experts
from longtail_experts.tracking.checkpoints import restore_rng, rng_states, weights_of
from longtail_experts.tracking.interrupts import delayed_signals, raise_for
from longtail_experts.tracking.logits import is_calibrated
from longtail_experts.tracking.recorder import Recorder
from longtail_experts.tracking.runs import Run, RunError, require_room
from longtail_experts.tracking.stale import offer_to_resume

ANNOUNCED_FROM = 100_000  # images: what they will take is measured and printed before they start


def run(config: Config, data: Dataset) -> str:
    """Train one expert in a run of its own; returns the run id."""
    config = for_one_expert(config, config.loss)
    return _run(config, data, experts.start_expert_run(config, "train"))


def resume(existing: Run, config: Config, data: Dataset) -> str:
    """Go on with a run that `run` began."""
    return _run(config, data, experts.start_expert_run(config, "train", existing=existing))


def _run(config: Config, data: Dataset, started: AbstractContextManager[Run]) -> str:
    with started as run_:
        offer_to_resume(run_)
        if "training" not in run_.tags:
            train_expert(run_, config, data)
        if not is_calibrated(run_):
            expert_report.describe_trained(run_, config, data)
            print(f"next: {MLFLOW_RUN} -e calibrate -P run_id={run_.run_id}")
    return run_.run_id


def train_expert(run_: Run, config: Config, data: Dataset) -> None:
    """Everything up to the last optimiser step, into the run; from its newest checkpoint where
    it has one.

    Ctrl-C and SIGTERM are acted on after the step under way, with a checkpoint of that step.
    Raises NonFiniteLossError at the step where the loss stops being a number.
    """
    steps_per_epoch = steps_an_epoch(config, data)
    lr_of = schedule_of(config, steps_per_epoch)
    model = build_network(config, data)
    with Recorder(run_) as recorder:
        checkpoint = recorder.latest()
        if checkpoint is None:
            record_beginning(run_, recorder, config, data, model, lr_of)
        state = state_before_training(model, config, data)
        run_.set_tags({"step_path": state.path})
        selection = Selection(config.early_stopping_patience, patience_starts_at(config))
        first_epoch = 0
        if checkpoint is None:
            recorder.recall([])
        else:
            first_epoch = restore(run_, recorder, state, selection, checkpoint, config, data)
            print(
                f"resuming {config.loss} in epoch {first_epoch}, at step {state.step} of "
                f"{config.epochs * steps_per_epoch}",
                flush=True,
            )
        train_epochs(recorder, state, selection, first_epoch, config, data, lr_of)
        peak = peak_memory_bytes(config.device)
        print(f"{config.loss}: peak memory {peak / 1e6:.0f} MB ({config.device})", flush=True)
        with beside_the_others():  # who need not wait for a store that is away
            recorder.finish()  # first the checkpoint that the following is said of
            best = selection.best
            recorder.log_points(
                (f"best/{name}", value, best["step"]) for name, value in best.items()
            )
            recorder.log_points([("peak_memory_bytes", peak, state.step - 1)])
            recorder.finish()
        is_complete = state.step == config.epochs * steps_per_epoch
        training = "complete" if is_complete else "early_stopped"
        run_.set_tags({"training": training, "step_path": state.path})
        recorder.forget()


def record_beginning(
    run_: Run,
    recorder: Recorder,
    config: Config,
    data: Dataset,
    model: nn.Module,
    lr_of: Callable[[int], float],
) -> None:
    """All that is known before the first step, after a look at the disk."""
    needed = experts.output_bytes(
        num_parameters(model), data.num_rows, data.num_classes, config.epochs
    )
    require_room(run_, recorder.folder, needed)
    experts.record_inputs(run_, config, data, num_parameters(model))
    experts.record_schedule(run_, config.epochs, steps_an_epoch(config, data), lr_of)


def train_epochs(
    recorder: Recorder,
    state: TrainState,
    selection: "Selection",
    first_epoch: int,
    config: Config,
    data: Dataset,
    lr_of: Callable[[int], float],
) -> None:
    """The epochs from `first_epoch` on, the first of which may be half done."""
    num_images = data.size("train")
    steps_per_epoch = steps_an_epoch(config, data)
    batches_from, load = batches_of_training(config, data)
    announce_cost(
        config,
        config.epochs - first_epoch,
        state,
        num_images,
        batches_from,
        load,
        objective_at(first_epoch, config, data),
    )
    lr_steps = steps_worth_logging(
        warmup_steps=config.warmup_steps, steps_per_epoch=steps_per_epoch, epochs=config.epochs
    )
    validation: dict[str, float] = {}
    recorded_by = first_epoch + bool(state.losses)  # the first whole epoch has batches of all sizes
    with (
        delayed_signals() as arrived,
        progress_bar(config, steps_per_epoch, state.step) as bar,
        ExitStack() as without_the_turn,
    ):

        def save_last(epoch: int) -> None:
            content = last_checkpoint(state, epoch, selection, config, data)
            recorder.save_checkpoint("last", {**content, "points": recorder.points()})

        def stop_if_asked(epoch: int) -> None:
            if arrived:
                save_last(epoch)
                recorder.finish_quietly()
                raise_for(arrived[0], f"at step {state.step}: {recorder.how_to_resume}")

        def after_step(epoch: int) -> None:
            bar.update()
            stop_if_asked(epoch)

        for epoch in range(first_epoch, config.epochs):
            if selection.is_over:
                break
            if epoch == recorded_by + 1:
                without_the_turn.enter_context(beside_the_others())
            draws = draw_epoch(
                num_images, config.expert_seed, epoch, config.device, augmentation_of(config)
            )
            seen = len(state.losses) * config.batch_size
            left = EpochDraws(*(values[seen:] for values in draws))
            mean_loss = train_epoch(
                state,
                batches_from(left) if seen < num_images else [],
                objective=objective_at(epoch, config, data),
                lr_at=lr_of,
                precision=config.precision,
                load=load,
                on_step=partial(after_step, epoch),
            )
            step, is_last = state.step - 1, epoch == config.epochs - 1
            first_step = epoch * steps_per_epoch
            points = [("lr", lr_of(s), s) for s in lr_steps if first_step <= s < state.step]
            points += [
                ("epoch", epoch, step),
                ("train/loss", mean_loss, step),
                ("train/images_per_second", num_images / state.seconds, step),
            ]
            is_due = is_last or (epoch + 1) % config.validation_every == 0
            if is_due and selects(config):
                validation = validate(state, epoch, config, data)
                points += [(f"val/{name}", value, step) for name, value in validation.items()]
                if selection.chooses(validation["balanced_accuracy"], epoch, step, state.model):
                    recorder.save_checkpoint("best", selection.best_checkpoint)
            recorder.log_points(points)
            show(bar, lr_of(step), mean_loss, validation)
            if is_last or selection.is_over or (epoch + 1) % config.checkpoint_every == 0:
                save_last(epoch)
            stop_if_asked(epoch)


@dataclass
class Selection:
    """Which checkpoint is best by balanced accuracy on val_lt (ties: the later), and when no
    better one is waited for any longer."""

    patience: int | None
    starts_at: int  # epoch from which validations without a better one are counted
    best: dict[str, Any] = field(default_factory=dict)
    best_weights: dict[str, torch.Tensor] = field(default_factory=dict)
    without_better: int = 0

    def chooses(
        self, balanced_accuracy: float, epoch: int, step: int, model: nn.Module | None = None
    ) -> bool:
        """Whether this validation is the best so far; keeps a copy of the weights if so."""
        so_far = self.best.get("val_balanced_accuracy", -math.inf)
        if epoch >= self.starts_at:
            self.without_better = 0 if balanced_accuracy > so_far else self.without_better + 1
        if balanced_accuracy < so_far:
            return False
        self.best = {"epoch": epoch, "step": step, "val_balanced_accuracy": balanced_accuracy}
        self.best_weights = weights_of(model) if model is not None else {}
        return True

    @property
    def best_checkpoint(self) -> dict[str, Any]:
        best = self.best
        return {"model": self.best_weights, "epoch": best["epoch"], "step": best["step"]}

    @property
    def is_over(self) -> bool:
        return self.patience is not None and self.without_better >= self.patience


def progress_bar(config: Config, steps_per_epoch: int, done: int) -> tqdm:
    return tqdm(
        total=config.epochs * steps_per_epoch,
        initial=done,
        desc=f"train {config.loss}",
        unit="step",
        mininterval=1 if sys.stderr.isatty() else 30,
        dynamic_ncols=True,
    )


def validate(state: TrainState, epoch: int, config: Config, data: Dataset) -> dict[str, float]:
    """Accuracies on val_lt, and the training loss there (not comparable across losses)."""
    batches = plain_batches(data.pixels("val_lt"), config.batch_size, config.device)
    logits = predict_logits(state.model, batches, passes=state.passes)
    targets = data.targets("val_lt")
    loss = objective_at(epoch, config, data, device="cpu")(logits, targets)
    if not bool(torch.isfinite(loss)):
        raise NonFiniteLossError(
            f"validation loss is not finite after step {state.step - 1}: lower lr, or lengthen "
            "warmup_steps"
        )
    values = accuracies(logits.argmax(1), targets, data.groups, data.num_classes)
    return {"loss": float(loss), **values}


def last_checkpoint(
    state: TrainState, epoch: int, selection: Selection, config: Config, data: Dataset
) -> dict[str, Any]:
    """Everything that the rest of the training depends on: tensors and plain values.

    `epoch` is that of the last step taken; `losses` holds what it has had where it is not over.
    """
    return {
        "model": weights_of(state.model),
        "epoch": epoch,
        "step": state.step - 1,
        "optimizer": state.optimizer.state_dict(),
        "losses": torch.stack(state.losses).cpu() if state.losses else torch.empty(0),
        "sizes": state.sizes,
        "seconds": state.seconds,
        "rng": rng_states(),
        "best": selection.best,
        "best_weights": selection.best_weights,
        "validations_without_better": selection.without_better,
        "config": config.as_text(),
        "splits_sha256": data.splits.sha256,
    }


def restore(
    run_: Run,
    recorder: Recorder,
    state: TrainState,
    selection: Selection,
    checkpoint: dict[str, Any],
    config: Config,
    data: Dataset,
) -> int:
    """Put everything back as `last_checkpoint` found it; the epoch to go on with.

    Raises RunError where the checkpoint is of another config, other splits or another network.
    """
    try:
        require_same_fields(checkpoint["config"], config.as_text(), f"run {run_.run_id}: last.pt")
        if checkpoint["splits_sha256"] != data.splits.sha256:
            raise RunError(f"run {run_.run_id}: last.pt was trained on other splits")
        state.model.load_state_dict(checkpoint["model"])
        state.optimizer.load_state_dict(checkpoint["optimizer"])
        state.step = checkpoint["step"] + 1
        state.losses = list(checkpoint["losses"].to(config.device))
        state.sizes = list(checkpoint["sizes"])
        state.seconds = float(checkpoint["seconds"])
        selection.best = dict(checkpoint["best"])
        selection.best_weights = dict(checkpoint["best_weights"])
        selection.without_better = checkpoint["validations_without_better"]
        restore_rng(checkpoint["rng"])
        points = [tuple(point) for point in checkpoint["points"]]
    except RunError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise RunError(
            f"run {run_.run_id}: last.pt cannot be resumed from ({first_line(error)})"
        ) from None
    recorder.recall(points)
    # Both once more: a process that was cut off after its last step may not have sent them.
    recorder.save_checkpoint("last", checkpoint)
    if selection.best:
        recorder.save_checkpoint("best", selection.best_checkpoint)
    return checkpoint["epoch"] + (not state.losses)


def show(bar: tqdm, lr: float, loss: float, validation: dict[str, float]) -> None:
    facts = {"lr": f"{lr:.4g}", "loss": f"{loss:.3f}"}
    if validation:
        facts["val balanced"] = f"{100 * validation['balanced_accuracy']:.1f}%"
    bar.set_postfix(facts, refresh=False)


def announce_cost(
    config: Config,
    num_epochs: int,
    state: TrainState,
    num_images: int,
    batches_from: Callable[[EpochDraws], Iterator[Batch]],
    load: Callable[..., Batch],
    objective: Objective,
) -> None:
    """Time a few steps, which leave nothing behind, and print what the epochs ahead will take."""
    if num_images * num_epochs < ANNOUNCED_FROM:
        return
    draws = draw_epoch(num_images, 0, 0, config.device, augmentation_of(config))
    batches = islice(batches_from(draws), 6)
    with left_as_it_was(state):
        seconds = time_steps(state, batches, objective, config.precision, load)
    minutes = seconds * num_images * num_epochs / 60
    where = f"{config.device}, {config.precision}, {state.path} steps"
    if config.device == "cpu":
        where += f", {torch.get_num_threads()} threads"
    print(
        f"{config.loss}: {num_epochs} epochs of {num_images} images, about "
        f"{minutes / 60:.1f} h ({minutes:.0f} min) on this device ({where})",
        flush=True,
    )
