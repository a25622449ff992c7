"""Entry point `preflight`: the readiness report before hours are spent."""

from itertools import chain, count
from pathlib import Path

import psutil
import torch
from torch import nn

from longtail_experts.config import LOSS_NAMES, Config
from longtail_experts.data.batches import draw_epoch, plain_batches
from longtail_experts.data.dataset import Dataset
from longtail_experts.learning.cost import (
    Pace,
    TrainingMemory,
    Work,
    measure_pace,
    training_memory,
)
from longtail_experts.learning.loss_behaviour import LossBehaviour, loss_behaviour
from longtail_experts.learning.resnet import num_parameters
from longtail_experts.learning.rules import Finding, blocking, num_validations, room_rule
from longtail_experts.learning.schedule import lr_by_epoch
from longtail_experts.stages.checks import NotReadyError, cheap_findings, not_ready, num_experts
from longtail_experts.stages.inputs import (
    augmentation_of,
    batches_of_training,
    build_network,
    for_one_expert,
    objective_at,
    schedule_of,
    selects,
    state_before_training,
    steps_an_epoch,
    trains_at_once,
)
from longtail_experts.tracking import experts, readiness
from longtail_experts.tracking.recorder import local_folder
from longtail_experts.tracking.runs import Run, local_folder_of


def run(config: Config, data: Dataset) -> str:
    """Record the report in a run of its own; returns the run id.

    Raises NotReadyError, and the run ends FAILED, where a finding is blocking.
    """
    with experts.start_preflight_run(config) as run_:
        expert = for_one_expert(config, LOSS_NAMES[0] if config.loss == "all" else config.loss)
        model = build_network(expert, data)
        behaviour = loss_behaviour(data.class_counts("train"), data.groups["head"], config.tau)
        batch_size = min(config.batch_size, data.size("train"))
        memory = training_memory(
            model,
            batch_size=batch_size,
            num_images=data.size("train"),
            precision=config.precision,
            device=config.device,
        )
        free = free_memory(config.device)
        needed = memory.total * (num_experts(config) if trains_at_once(config) else 1)
        findings = [
            *cheap_findings(config, data, disks_of(run_)),
            room_rule("memory", needed, free, "lower batch_size, or free some"),
            theory_finding(behaviour),
        ]
        pace, work, path = None, work_of_one(config, data), ""
        rates = "Not computed: something is blocking."
        if not blocking(findings):
            rates = schedule_section(run_, config, data)
            try:
                pace, path = time_training(model, expert, data)
            except torch.OutOfMemoryError:
                says = f"a step of {config.batch_size} images does not fit: lower batch_size"
                findings.append(Finding("memory", "of a real step", "blocking", says))
        readiness.record(
            run_,
            config,
            data,
            readiness.verdict(config, findings, pace, work, num_experts(config)),
            {
                "Time": readiness.time_section(pace, work, config, data, path, batch_size),
                "Memory and disk": machine_section(memory, free, config, data, model, batch_size),
                "Losses before any training": readiness.loss_section(behaviour, data),
                "Learning rate by epoch": rates,
                "Data": readiness.data_section(config, data),
                "Configuration": readiness.findings_table(findings),
            },
        )
        run_.set_tags({"ready": str(not blocking(findings)).lower()})
        if blocking(findings):
            raise NotReadyError(not_ready(findings))
    return run_.run_id


def disks_of(run_: Run) -> list[Path]:
    """Where an expert keeps what it has not delivered, and its artifacts if that is here."""
    places = (local_folder(run_.run_id), local_folder_of(run_.artifact_uri))
    return [place for place in places if place is not None]


def free_memory(device: str) -> int:
    """Bytes that the device has left."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return psutil.virtual_memory().available


def theory_finding(behaviour: list[LossBehaviour]) -> Finding:
    wrong = sorted({row.loss for row in behaviour if not row.as_theory})
    if wrong:
        says = f"{', '.join(wrong)}: not as the equation of the paper has it; mend losses.py"
        return Finding("losses", "against theory", "blocking", says)
    return Finding("losses", "against theory", "ok")


def work_of_one(config: Config, data: Dataset) -> Work:
    """Images through the network; test_lt is cut out of test_balanced, which last.pt sees too."""
    seen = sum(data.size(split) for split in data.split_names if split != "test_lt")
    validations = num_validations(config.validation_every, config.epochs)
    return Work(
        training=config.epochs * data.size("train"),
        validation=validations * data.size("val_lt") if selects(config) else 0,
        export=seen + (data.size("test_balanced") if selects(config) else 0),
    )


def time_training(model: nn.Module, config: Config, data: Dataset) -> tuple[Pace, str]:
    """The pace of a few batches of real images, augmented as in the training, and by which code
    (`TrainState.path`)."""
    state = state_before_training(model, config, data)
    pixels, augmentation = data.pixels("train"), augmentation_of(config)
    predicted = next(plain_batches(pixels, config.batch_size, config.device))
    batches_from, load = batches_of_training(config, data)
    epochs = (draw_epoch(len(pixels), 0, e, config.device, augmentation) for e in count())
    batches = chain.from_iterable(map(batches_from, epochs))
    objective = objective_at(0, config, data)
    return measure_pace(state, batches, predicted, objective, config.precision, load), state.path


def machine_section(
    memory: TrainingMemory,
    free: int,
    config: Config,
    data: Dataset,
    model: nn.Module,
    batch_size: int,
) -> str:
    parameters = num_parameters(model)
    output = {
        "logits of all splits": experts.logit_bytes(data.num_rows, data.num_classes),
        "checkpoints": experts.checkpoint_bytes(parameters),
        "room taken while it runs": experts.output_bytes(
            parameters, data.num_rows, data.num_classes, config.epochs
        ),
    }
    return readiness.machine_section(memory, free, output, config, batch_size)


def schedule_section(run_: Run, config: Config, data: Dataset) -> str:
    """Also every step as a table and a figure, as a training run has them."""
    steps_per_epoch = steps_an_epoch(config, data)
    lr_of = schedule_of(config, steps_per_epoch)
    experts.record_schedule(run_, config.epochs, steps_per_epoch, lr_of)
    return readiness.schedule_section(lr_by_epoch(lr_of, config.epochs, steps_per_epoch))
