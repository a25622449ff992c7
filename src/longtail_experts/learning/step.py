"""One optimiser step, one epoch of them, and the forward pass that turns images into logits."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from longtail_experts.learning.losses import shifted_cross_entropy


class NonFiniteLossError(RuntimeError):
    """The loss stopped being a number; the message names the step, the LR and a remedy."""


@dataclass
class TrainState:
    """A network in training: weights, momentum, and the number of optimiser steps taken."""

    model: nn.Module
    optimizer: torch.optim.SGD
    memory_format: torch.memory_format = torch.channels_last
    step: int = 0


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
) -> TrainState:
    # On a CPU, bf16 in channels-last order is the slowest of the four combinations.
    plain_order = device == "cpu" and precision == "bf16"
    memory_format = torch.contiguous_format if plain_order else torch.channels_last
    model = model.to(device, memory_format=memory_format)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay
    )
    return TrainState(model, optimizer, memory_format)


def train_step(
    state: TrainState, images: Tensor, targets: Tensor, shift: Tensor, lr: float, precision: str
) -> Tensor:
    """One step of SGD at `lr`; returns the loss of the batch, on the device, before the step.

    images float32 [B, 3, H, W], targets int64 [B], shift float32 [C] of the loss.
    Under "bf16" the forward pass autocasts; weights, their update and the loss stay float32.
    """
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    with exact_float32():
        with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
            logits = state.model(images.contiguous(memory_format=state.memory_format))
        loss = shifted_cross_entropy(logits, targets, shift)
        state.optimizer.zero_grad(set_to_none=True)
        loss.backward()
    state.optimizer.step()
    state.step += 1
    return loss.detach()


def train_epoch(
    state: TrainState,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    shift: Tensor,
    lr_at: Callable[[int], float],
    precision: str,
    on_step: Callable[[], None] = lambda: None,
) -> float:
    """Train on every batch once; the mean loss over images, each before its own step.

    Raises NonFiniteLossError at the step where the loss is not finite: at once on the CPU; on
    a GPU at the end of the epoch, because reading every loss would stall it.
    """
    state.model.train()
    losses, sizes, first_step = [], [], state.step
    for images, targets in batches:
        losses.append(train_step(state, images, targets, shift, lr_at(state.step), precision))
        sizes.append(len(targets))
        if images.device.type == "cpu":
            _require_finite(losses[-1:], state.step - 1, lr_at)
        on_step()
    _require_finite(losses, first_step, lr_at)
    per_batch = torch.stack(losses).double().cpu()
    weight = torch.tensor(sizes, dtype=torch.float64)
    return float((per_batch * weight).sum() / weight.sum())


def _require_finite(losses: list[Tensor], first_step: int, lr_at: Callable[[int], float]) -> None:
    finite = torch.isfinite(torch.stack(losses)).cpu()
    if not bool(finite.all()):
        step = first_step + int(torch.nonzero(~finite)[0])
        raise NonFiniteLossError(
            f"loss is not finite at step {step} (lr {lr_at(step):.4g}): "
            "lower lr, or lengthen warmup_steps"
        )


def exact_float32() -> AbstractContextManager[None]:
    """Convolutions on a GPU in float32 as it is written, not in TF32's ten bits of mantissa."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


@torch.inference_mode()
def predict_logits(
    model: nn.Module, batches: Iterable[Tensor], on_batch: Callable[[int], None] = lambda n: None
) -> Tensor:
    """Logits float32 [N, C], on the CPU, of normalised image batches, in evaluation mode.

    Always in float32, whatever precision the training had: exported logits must not depend on
    the processor's instruction set.
    """
    model.eval()
    logits = []
    with exact_float32():
        for images in batches:
            logits.append(model(images).float())
            on_batch(len(images))
    return torch.cat(logits).cpu()
