"""Checkpoints: tensors and plain values, float32, read with weights_only=True."""

import pickle
import pickletools
import random
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from longtail_experts.config import shorten
from longtail_experts.data.archives import require_honest_zip
from longtail_experts.data.sources import first_line
from longtail_experts.tracking.runs import Run, RunError

MAX_BYTES = 2**30  # of a checkpoint; a ResNet-32 with its momentum has 6 MB
MAX_COUNT = 2**53  # of steps or epochs
# All that a file of tensors and plain values names. weights_only=True lets a file call more, of
# which bytearray(10**10) and torch.Tensor(10**10) are a few bytes that ask for gigabytes.
BUILDERS = re.compile(r"torch\._utils _rebuild_tensor_v2|collections OrderedDict|torch \w+Storage")


class CheckpointError(ValueError):
    """A file is not a checkpoint of ours, or not a whole one."""


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
            return read_file(path)
        except CheckpointError as error:
            raise RunError(
                f"run {run.run_id}: checkpoints/{name}.pt is damaged ({error})"
            ) from None


def read_file(path: Path) -> dict[str, Any]:
    """A whole checkpoint, on the CPU; CheckpointError where a byte of it is wrong.

    Sizes and checksums of the zip that torch writes, and what its pickle names, are checked before
    anything is unpacked.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise CheckpointError(f"larger than {MAX_BYTES:,} bytes")
        with zipfile.ZipFile(path) as archive:
            require_honest_zip(archive, path)
            for name in archive.namelist():
                if name.endswith("data.pkl"):
                    _require_plain(archive.read(name))
        content = torch.load(path, map_location="cpu", weights_only=True)
        if any(t.nbytes > t.untyped_storage().nbytes() for t in _tensors_of(content)):
            raise CheckpointError("a tensor claims more values than it holds")
        weights = content["model"]
        if not isinstance(weights, dict) or not all(map(_is_weight, weights.values())):
            raise CheckpointError("model is not a dict of float32 tensors")
        for name in ("epoch", "step"):
            if type(content[name]) is not int or not 0 <= content[name] < MAX_COUNT:
                raise CheckpointError(f"{name} is not a count")
    except CheckpointError:
        raise
    except (
        pickle.UnpicklingError,
        zipfile.BadZipFile,
        NotImplementedError,  # a zip flag that Python does not know
        RuntimeError,
        EOFError,
        OSError,
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        MemoryError,
    ) as error:
        raise CheckpointError(first_line(error)[:200]) from None
    return content


def _require_plain(pickled: bytes) -> None:
    for code, named, _ in pickletools.genops(pickled):
        if code.name == "GLOBAL" and not BUILDERS.fullmatch(named):
            raise CheckpointError(f"names {shorten(named)}, which no checkpoint of ours does")


def _tensors_of(content: Any) -> Iterator[Tensor]:
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, dict | list | tuple):
        for part in content.values() if isinstance(content, dict) else content:
            yield from _tensors_of(part)


def _is_weight(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.float32


def rng_states() -> dict[str, Any]:
    """Every generator of this process, as tensors and plain values."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    states = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def restore_rng(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    if "python" in states:
        random.setstate(states["python"])
    if "numpy" in states:
        kind, keys, *rest = states["numpy"]
        np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"][: torch.cuda.device_count()])
