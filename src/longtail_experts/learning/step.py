"""One optimiser step, one epoch of them, and the forward pass that turns images into logits."""

import functools
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from longtail_experts.learning.backend import exact_float32
from longtail_experts.learning.compiled import compile_layers, compile_layers_ahead
from longtail_experts.learning.fast_step import (
    Batch,
    CannotRecordError,
    RecordedPasses,
    RecordedSteps,
)
from longtail_experts.learning.losses import Objective

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # of activations in training passes
# images: compiling layers has repaid itself then, even where nothing is done beside it. It takes 2
# to 5 s in float32, where it saves 0.8 to 2.7 ms an image, and 2.4 to 3 s in bf16, for 0.7 ms
# (benchmarks/README.md).
COMPILE_REPAID_AFTER = {"fp32": 3_000, "bf16": 5_000}


class NonFiniteLossError(RuntimeError):
    """The loss stopped being a number; the message names the step, the LR and a remedy."""


@dataclass
class TrainState:
    """A network in training: weights, momentum, and the number of optimiser steps taken.

    `losses` and `sizes` are those of the batches that the epoch under way has had so far, on
    the device; between epochs they are empty. `seconds` is the time those took, or the whole of
    the last epoch.
    """

    model: nn.Module
    optimizer: torch.optim.SGD
    is_compiled: bool = False  # layers of it are, for a CPU
    recorded: RecordedSteps | None = None  # takes the steps, where there is one
    passes: RecordedPasses | None = None  # the same for forward passes of validations
    step: int = 0
    losses: list[Tensor] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def path(self) -> str:
        """Which code takes the steps: "fused" for graphs of this project's kernels, "graph" for
        those of PyTorch's, "compiled" for this project's layers on a CPU, or "plain" for one
        operator of PyTorch after another."""
        if self.recorded is not None:
            return "fused" if self.recorded.is_fused else "graph"
        return "compiled" if self.is_compiled else "plain"

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, C] of normalised images [B, 3, H, W]."""
        return self.model(images.contiguous(memory_format=torch.channels_last))


def has_bf16_instructions() -> bool:
    """Whether this processor multiplies bf16 in hardware (AVX512-BF16 or AMX)."""
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, check, lambda: False)() for check in checks)


def start_training(
    model: nn.Module,
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    device: str,
    precision: str,
    planned_images: int = 0,
    fast: bool = True,
    fused: bool = False,
) -> TrainState:
    """The state before the first step, on `device`.

    With `fast`, steps on a GPU are recorded and replayed, with `fused` those of this project's
    kernels; on a CPU, a training of `planned_images` (epochs x images) that is long enough to repay
    it has layers compiled. That depends on these arguments alone, never on a timing, so that two
    runs of one seed take the same steps.
    """
    model = model.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(  # the first one imports for two seconds, while compilers work
        model.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay
    )
    is_repaid = compiles(device, precision, planned_images, fast)
    is_compiled = is_repaid and _compiles_layers(model, precision)
    recorded = RecordedSteps(fuses=fused) if replays(device, fast) else None
    passes = recorded_passes(device, fast)
    return TrainState(model, optimizer, is_compiled, recorded, passes)


def compiles(device: str, precision: str, planned_images: int, fast: bool) -> bool:
    """Whether layers are compiled, where they can be."""
    return fast and device == "cpu" and planned_images >= COMPILE_REPAID_AFTER[precision]


def prepare_training(*, device: str, precision: str, planned_images: int, fast: bool) -> None:
    """Begins, beside whatever comes before it, what `start_training` waits for."""
    if compiles(device, precision, planned_images, fast):
        compile_layers_ahead(DTYPES[precision])


def replays(device: str, fast: bool) -> bool:
    """Whether steps and forward passes are recorded, where they can be."""
    return fast and device == "cuda"


def recorded_passes(device: str, fast: bool) -> RecordedPasses | None:
    """For `predict_logits`."""
    return RecordedPasses() if replays(device, fast) else None


def _compiles_layers(model: nn.Module, precision: str) -> bool:
    """False, with a warning, where they cannot be."""
    try:
        compile_layers(model, DTYPES[precision])
    except RuntimeError as error:
        reason = str(error).strip().split("\n")[0]
        warnings.warn(f"training steps are not compiled, and slower: {reason}", stacklevel=3)
        return False
    return True


def as_it_is(*batch: Tensor) -> Batch:
    """Loads batches that are (images, targets) already."""
    return batch


def take_step(
    state: TrainState,
    batch: Batch,
    objective: Objective,
    lr: float,
    precision: str,
    load: Callable[..., Batch] = as_it_is,
) -> Tensor:
    """`train_step` on (images, targets) = load(*batch), by whichever code is fastest here.

    Where `load` and the step cannot be recorded, one warning says why and steps are plain from
    then on.
    """

    def step(state: TrainState, batch: Batch, lr: float | Tensor) -> Tensor:
        images, targets = load(*batch)
        return train_step(state, images, targets, objective, lr, precision)

    if state.recorded is not None:
        kind = (load, objective, precision)
        try:
            return state.recorded.take(state, batch, lr, step, kind=kind, precision=precision)
        except CannotRecordError as error:
            state.recorded = None
            warnings.warn(f"training steps are not replayed, and slower: {error}", stacklevel=2)
    return step(state, batch, lr)


def train_step(
    state: TrainState,
    images: Tensor,
    targets: Tensor,
    objective: Objective,
    lr: float | Tensor,
    precision: str,
) -> Tensor:
    """One step of SGD at `lr`; returns the loss of the batch, on the device, before the step.

    images float32 [B, 3, H, W], targets int64 [B], or whatever `objective` takes for them.
    Under "bf16" the forward pass autocasts; weights, their update and the loss stay float32.
    """
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    with exact_float32():
        with autocast(images.device.type, precision):
            logits = state.forward(images)
        loss = objective(logits, targets)
        state.optimizer.zero_grad(set_to_none=True)
        loss.backward()
    state.optimizer.step()
    state.step += 1
    return loss.detach()


def train_epoch(
    state: TrainState,
    batches: Iterable[Batch],
    *,
    objective: Objective,
    lr_at: Callable[[int], float],
    precision: str,
    load: Callable[..., Batch] = as_it_is,
    on_step: Callable[[], None] = lambda: None,
) -> float:
    """Train on the batches that are left of an epoch; its mean loss over images, each before
    its own step: that of a batch counts as often as it has images.

    A batch is (images, targets), or whatever `load` makes these of: a row an image.
    `on_step` may raise: the state is then that of a step just finished. Raises
    NonFiniteLossError at the step where the loss is not finite: at once on the CPU; on a GPU at
    the end of the epoch, because reading every loss would stall it.
    """
    state.model.train()
    first_step = state.step - len(state.losses)
    started = time.perf_counter() - (state.seconds if state.losses else 0.0)
    for batch in batches:
        loss = take_step(state, batch, objective, lr_at(state.step), precision, load)
        state.losses.append(loss)
        state.sizes.append(len(batch[0]))
        if loss.device.type == "cpu":
            _require_finite([loss], state.step - 1, lr_at)
        state.seconds = time.perf_counter() - started
        on_step()
    _require_finite(state.losses, first_step, lr_at)
    per_batch = torch.stack(state.losses).double().cpu()
    state.seconds = time.perf_counter() - started
    weight = torch.tensor(state.sizes, dtype=torch.float64)
    state.losses, state.sizes = [], []
    return float((per_batch * weight).sum() / weight.sum())


def _require_finite(losses: list[Tensor], first_step: int, lr_at: Callable[[int], float]) -> None:
    finite = torch.isfinite(torch.stack(losses)).cpu()
    if not bool(finite.all()):
        step = first_step + int(torch.nonzero(~finite)[0])
        raise NonFiniteLossError(
            f"loss is not finite at step {step} (lr {lr_at(step):.4g}): "
            "lower lr, or lengthen warmup_steps"
        )


def autocast(device: str, precision: str) -> torch.autocast:
    """Without its cache: each weight is used once a step, and what is recorded must cast anew."""
    return torch.autocast(device, torch.bfloat16, enabled=precision == "bf16", cache_enabled=False)


@torch.inference_mode()
def predict_logits(
    model: nn.Module,
    batches: Iterable[Tensor],
    passes: RecordedPasses | None = None,
) -> Tensor:
    """Logits float32 [N, C], on the CPU, of normalised image batches, in evaluation mode.

    Always in float32, whatever precision the training had: exported logits must not depend on
    the processor's instruction set. `passes` takes them, where there are any.
    """
    model.eval()
    forward = model if passes is None else functools.partial(passes.take, model)
    logits = []
    for images in batches:
        with exact_float32():
            logits.append(forward(images).float())
    return torch.cat(logits).cpu()
