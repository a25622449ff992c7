"""Coverage-guided fuzzing of everything that reads a file from elsewhere (pip install atheris).

    python tests/reliability/fuzz.py recipe -max_total_time=300
    targets: recipe, checkpoint, npz, manifest, logits, images

Ends with an error at the first input that raises anything but what the target foresees.
"""

import contextlib
import hashlib
import io
import json
import logging
import os
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["longtail_experts", "zipfile", "yaml", "numpy.lib"]):
    import numpy as np
    import torch
    from PIL import Image

    from longtail_experts.config import ConfigError, make_config, parse_recipe
    from longtail_experts.data import sources
    from longtail_experts.data.archives import read_npz
    from longtail_experts.data.sources import DataError, folder_images
    from longtail_experts.data.splits import SPLITS
    from longtail_experts.stages.export import dataset_name
    from longtail_experts.tracking.checkpoints import CheckpointError, read_file
    from longtail_experts.tracking.logits import UNREADABLE, read_logits
    from longtail_experts.tracking.runs import RunError

FOLDER = Path(tempfile.mkdtemp())
SCRATCH = FOLDER / "input"


def picture(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), (200, 10, 10)).save(buffer, kind)
    return buffer.getvalue()


def arrays() -> bytes:
    buffer = io.BytesIO()
    integers = {name: np.zeros(2, np.int64) for name in ("targets", "indices")}
    np.savez(buffer, logits=np.zeros((2, 3), np.float32), **integers)
    return buffer.getvalue()


PNG, LOGITS = picture("PNG"), arrays()
os.environ["LONGTAIL_CACHE_DIR"] = "/dev/null/nothing"  # what is decoded is not to be kept
logging.disable()


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


class RecordedRun:
    """What `read_logits` sees of a run whose logits/manifest.json is the input."""

    run_id = "fuzzed"

    def __init__(self, data: bytes):
        self.data = data

    def read_json(self, path: str) -> object:
        if path == "splits/manifest.json":
            return {"class_names": ["a", "b", "c"], "splits": dict.fromkeys(SPLITS)}
        return json.loads(self.data)

    @contextlib.contextmanager
    def read_artifact(self, path: str) -> Iterator[Path]:
        yield SCRATCH


def logits(data: bytes) -> None:
    SCRATCH.write_bytes(LOGITS)
    says = ""
    try:
        read_logits(RecordedRun(data))
    except RunError as error:
        says = str(error)
    assert len(says.splitlines()) <= 1


def images(data: bytes) -> None:
    """A folder of two classes; named in the first line are one and a file of it."""
    names, _, content = data.partition(b"\n")
    folder, _, file = names.replace(b"\0", b"").partition(b"/")
    shutil.rmtree(FOLDER / "images", ignore_errors=True)
    for half in ("train", "test"):
        for name in (b"bee", folder):
            place = os.path.join(os.fsencode(FOLDER), b"images", half.encode(), name)
            try:
                os.makedirs(place, exist_ok=True)
                (Path(os.fsdecode(place)) / "0.png").write_bytes(PNG)
            except OSError:  # too long a name
                return
    with contextlib.suppress(OSError):  # the same, a folder that is not there, or is one
        (Path(os.fsdecode(place)) / os.fsdecode(file)).write_bytes(content)
    with contextlib.suppress(DataError):
        folder_images(FOLDER / "images")


def seeds() -> dict[str, list[bytes]]:
    """A good input of each kind, to be damaged."""
    weights = io.BytesIO()
    torch.save({"model": {"w": torch.zeros(4)}, "epoch": 1, "step": 2}, weights)
    settings = {
        "source": "cifar100",
        "imbalance_profile": "exp",
        "imbalance_factor": 100.0,
        "images_per_class": None,
    }
    pictures = [b"ant/1.png\n" + picture(kind) for kind in sources.IMAGE_FORMATS]
    rows = {"sha256": hashlib.sha256(LOGITS).hexdigest(), "rows": 2}
    described = {
        "temperature": 1.5,
        "tau": 1.0,
        "log_offset": [0.0, 0.0, 0.0],
        "prior": [0.5, 0.25, 0.25],
        "files": dict.fromkeys(SPLITS, rows),
    }
    return {
        "logits": [json.dumps(described).encode()],
        "images": pictures,
        "recipe": [b"lr: 0.4\nmilestones: [96, 192]\nsource: cifar100\n"],
        "checkpoint": [weights.getvalue()],
        "npz": [LOGITS],
        "manifest": [json.dumps(settings).encode()],
    }


if __name__ == "__main__":
    target = sys.argv.pop(1)
    corpus = Path(tempfile.mkdtemp())
    for number, seed in enumerate(seeds()[target]):
        (corpus / str(number)).write_bytes(seed)
    atheris.Setup([*sys.argv, str(corpus)], globals()[target])
    atheris.Fuzz()
