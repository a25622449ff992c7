"""Coverage-guided fuzzing of everything that reads a file from elsewhere (pip install atheris).

    python tests/reliability/fuzz.py recipe -max_total_time=60
    targets: recipe, checkpoint, npz, manifest

Ends with an error at the first input that raises anything but what the target foresees.
"""

import io
import json
import sys
import tempfile
import zipfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["longtail_experts", "zipfile", "yaml", "numpy.lib"]):
    import numpy as np
    import torch

    from longtail_experts.config import ConfigError, make_config, parse_recipe
    from longtail_experts.data.archives import read_npz
    from longtail_experts.stages.export import dataset_name
    from longtail_experts.tracking.checkpoints import CheckpointError, read_file
    from longtail_experts.tracking.logits import UNREADABLE

SCRATCH = Path(tempfile.mkdtemp()) / "input"


def recipe(data: bytes) -> None:
    says = ""
    try:
        make_config(parse_recipe(data.decode(errors="surrogateescape"), "config=x"))
    except ConfigError as error:
        says = str(error)
    assert len(says.splitlines()) <= 1


def checkpoint(data: bytes) -> None:
    SCRATCH.write_bytes(data)
    says = ""
    try:
        read_file(SCRATCH)
    except CheckpointError as error:
        says = str(error)
    assert len(says.splitlines()) <= 1


def npz(data: bytes) -> None:
    SCRATCH.write_bytes(data)
    try:
        read_npz(SCRATCH, ("logits", "targets"))
    except (*UNREADABLE, zipfile.BadZipFile):
        pass


def manifest(data: bytes) -> None:
    try:
        name = dataset_name(json.loads(data))
    except (LookupError, TypeError, ValueError, RecursionError):
        return
    assert "/" not in name
    assert not name.startswith(".")


def seeds() -> dict[str, list[bytes]]:
    """A good input of each kind, to be damaged."""
    weights, arrays = io.BytesIO(), io.BytesIO()
    torch.save({"model": {"w": torch.zeros(4)}, "epoch": 1, "step": 2}, weights)
    np.savez(arrays, logits=np.zeros((2, 3), np.float32), targets=np.zeros(2, np.int64))
    settings = {
        "source": "cifar100",
        "imbalance_profile": "exp",
        "imbalance_factor": 100.0,
        "images_per_class": None,
    }
    return {
        "recipe": [b"lr: 0.4\nmilestones: [96, 192]\nsource: cifar100\n"],
        "checkpoint": [weights.getvalue()],
        "npz": [arrays.getvalue()],
        "manifest": [json.dumps(settings).encode()],
    }


if __name__ == "__main__":
    target = sys.argv.pop(1)
    corpus = Path(tempfile.mkdtemp())
    for number, seed in enumerate(seeds()[target]):
        (corpus / str(number)).write_bytes(seed)
    atheris.Setup([*sys.argv, str(corpus)], globals()[target])
    atheris.Fuzz()
