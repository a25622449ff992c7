"""What a training costs on this machine: memory and time, before it starts and after."""

import copy
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from longtail_experts.learning.fast_step import Batch
from longtail_experts.learning.losses import Objective
from longtail_experts.learning.step import TrainState, as_it_is, predict_logits, take_step

WARM_UP = 2  # steps that are not counted
NUM_STEPS = 6  # steps that are


class TrainingMemory(NamedTuple):
    """Bytes on the device. Activations are what autograd keeps; the libraries' workspace is taken
    as half of that (measured at batch 128: 462 MB where 318 are kept); the rest is exact."""

    weights: int
    gradients: int
    momentum: int
    activations: int
    workspace: int
    images: int

    @property
    def total(self) -> int:
        return sum(self)


def training_memory(
    model: nn.Module, *, batch_size: int, num_images: int, precision: str, device: str
) -> TrainingMemory:
    """Of PyTorch's own operators. Images are padded to 40x40 uint8."""
    parameters = sum(p.nbytes for p in model.parameters())
    activations = batch_size * activation_bytes(model, precision, device)
    return TrainingMemory(
        weights=parameters + sum(b.nbytes for b in model.buffers()),
        gradients=parameters,
        momentum=parameters,
        activations=activations,
        workspace=activations // 2,
        images=num_images * 40 * 40 * 3,
    )


def activation_bytes(model: nn.Module, precision: str, device: str) -> int:
    """Bytes an image that the forward pass keeps for the backward pass, measured.

    The difference of two small batches, so that weights and what else does not grow with the
    batch drops out.
    """
    trial = copy.deepcopy(model).to(device).train()
    small, large = (_kept_bytes(trial, n, precision, device) for n in (2, 4))
    return (large - small) // 2


def _kept_bytes(model: nn.Module, num_images: int, precision: str, device: str) -> int:
    kept: dict[int, int] = {}  # address -> bytes: a tensor that two operators keep counts once

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    images = torch.zeros(num_images, 3, 32, 32, device=device)
    targets = torch.zeros(num_images, dtype=torch.int64, device=device)
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            logits = model(images)
        loss = F.cross_entropy(logits.float(), targets)
    total = sum(kept.values())
    del loss  # until here it held what was kept, so that no address was used twice
    return total


def peak_memory_bytes(device: str) -> int:
    """The most memory that this process has held since it began, experts that train beside this one
    included: on a GPU what PyTorch has taken from the device, that of recorded steps with it."""
    if device == "cuda":
        return torch.cuda.max_memory_reserved()
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class Pace(NamedTuple):
    """Seconds an image on this device: of a training step, and of a forward pass in float32."""

    training: float
    predicting: float


def measure_pace(
    state: TrainState,
    batches: Iterable[Batch],
    predicted: Tensor,
    objective: Objective,
    precision: str,
    load: Callable[..., Batch] = as_it_is,
) -> Pace:
    """Medians over steps on the first few of `batches` and over passes over the images `predicted`;
    `state` is of no use afterwards."""
    state.model.train()
    few = islice(batches, WARM_UP + NUM_STEPS)
    training = time_steps(state, few, objective, precision, load)
    predicting = []
    for _ in range(WARM_UP + NUM_STEPS):
        started = time.perf_counter()
        predict_logits(state.model, [predicted])
        predicting.append((time.perf_counter() - started) / len(predicted))
    return Pace(training, statistics.median(predicting[WARM_UP:]))


def time_steps(
    state: TrainState,
    batches: Iterable[Batch],
    objective: Objective,
    precision: str,
    load: Callable[..., Batch] = as_it_is,
) -> float:
    """Seconds an image, the making of its batch included: the median over steps after the first
    ones, at a learning rate of 0."""
    seconds, started = [], time.perf_counter()
    for batch in batches:
        float(take_step(state, batch, objective, 0.0, precision, load))  # waits for the device
        ended = time.perf_counter()
        seconds.append((ended - started) / len(batch[0]))
        started = ended
    return statistics.median(seconds[min(WARM_UP, len(seconds) - 1) :])


class Work(NamedTuple):
    """Images that one expert needs, by what is done with them."""

    training: int
    validation: int
    export: int

    def seconds(self, pace: Pace) -> "Seconds":
        return Seconds(
            self.training * pace.training,
            self.validation * pace.predicting,
            self.export * pace.predicting,
        )


class Seconds(NamedTuple):
    training: float
    validation: float
    export: float

    @property
    def total(self) -> float:
        return sum(self)
