"""Checkpoints of a run: tensors and plain values, float32, read with weights_only=True."""

import pickle
from typing import Any

import torch
from torch import Tensor, nn

from longtail_experts.data.sources import first_line
from longtail_experts.tracking.runs import Run, RunError


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the state dict: float32 on the CPU, in plain memory order.

    Batch norm's integer step counters are left out: nothing reads them at a fixed momentum, and
    load_state_dict fills them in.
    """
    return {
        name: value.detach().float().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in model.state_dict().items()
        if value.is_floating_point()
    }


def save_checkpoint(run: Run, name: str, content: dict[str, Any]) -> None:
    with run.artifact(f"checkpoints/{name}.pt") as path:
        torch.save(content, path)


def read_checkpoint(run: Run, name: str) -> dict[str, Any]:
    """The checkpoint `name` of a run, on the CPU; RunError where it is missing or damaged."""
    with run.read_artifact(f"checkpoints/{name}.pt") as path:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            if not isinstance(content["model"], dict):
                raise TypeError("model is not a dict")
            int(content["epoch"]), int(content["step"])
        except (
            pickle.UnpicklingError,
            RuntimeError,
            EOFError,
            LookupError,
            TypeError,
            ValueError,
        ) as error:
            raise RunError(
                f"run {run.run_id}: checkpoints/{name}.pt is damaged ({first_line(error)})"
            ) from None
    return content
