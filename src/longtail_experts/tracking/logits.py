"""Exported logits of an expert: written with hashes, read only where the hashes agree."""

import hashlib
import math
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from longtail_experts.config import MLFLOW_RUN
from longtail_experts.data.archives import read_npz
from longtail_experts.data.sources import first_line
from longtail_experts.data.splits import LITERATURE_SPLITS, SPLITS
from longtail_experts.tracking.runs import Run, RunError, malformed, open_run

# What a file that is no npz can raise; RuntimeError and NotImplementedError: an encrypted zip,
# or one of an unknown method.
UNREADABLE = (KeyError, ValueError, OSError, EOFError, NotImplementedError, RuntimeError)


@dataclass(frozen=True, eq=False)  # arrays have no one truth
class SplitLogits:
    """Row i of logits and targets belongs to image indices[i] of the split's half."""

    logits: np.ndarray  # float32 [N, C], before the temperature
    targets: np.ndarray  # int64 [N]
    indices: np.ndarray  # int64 [N]


@dataclass(frozen=True, eq=False)  # arrays have no one truth
class ExpertLogits:
    """What an ensemble or a rejector built on top needs of one expert.

    `logits / temperature + log_offset` is the log-posterior under the training `prior`, up to a
    constant an image; for another deployment prior q add log q - log prior.
    """

    run_id: str
    splits: Mapping[str, SplitLogits]
    temperature: float
    tau: float
    log_offset: np.ndarray  # float64 [C]
    prior: np.ndarray  # float64 [C], of the train split
    class_names: tuple[str, ...]

    def __post_init__(self):
        object.__setattr__(self, "splits", MappingProxyType(dict(self.splits)))

    def __reduce__(self):  # a mapping proxy cannot be pickled, nor copied
        values = [getattr(self, field.name) for field in fields(self)]
        return type(self), tuple(dict(v) if isinstance(v, MappingProxyType) else v for v in values)


def write_logits(run: Run, logits: Mapping[str, SplitLogits], constants: dict[str, Any]) -> None:
    """logits/<split>.npz, then logits/manifest.json: constants, and hash and rows of each file."""
    files = {}
    for name, split in logits.items():
        with run.artifact(f"logits/{name}.npz") as path:
            np.savez(path, logits=split.logits, targets=split.targets, indices=split.indices)
            files[name] = {"sha256": _sha256(path), "rows": len(split.targets)}
    run.write_json("logits/manifest.json", {**constants, "files": files})


def is_calibrated(run: Run) -> bool:
    """Whether everything after training is in the run; the tag is the last thing written."""
    return run.tags.get("calibrated") == "true"


def load_expert_logits(run_id: str) -> ExpertLogits:
    """The logits and calibration of a finished expert, checked against its manifest.

    Raises RunError where the run is unknown or not calibrated, or where a file is missing,
    malformed or not the one whose hash the manifest holds.
    """
    run = open_run(run_id)
    require_calibrated(run)
    return read_logits(run)


def require_calibrated(run: Run) -> None:
    """RunError, with what is to be done first, for a run that is no calibrated expert."""
    if "expert" not in run.tags:
        stage = run.tags.get("stage", "none")
        raise RunError(f"run {run.run_id}: is not the run of an expert (its stage is {stage})")
    if is_calibrated(run):
        return
    require_training_ended(run)
    raise RunError(
        f"run {run.run_id}: is not calibrated; calibrate it first "
        f"({MLFLOW_RUN} -e calibrate -P run_id={run.run_id})"
    )


def require_training_ended(run: Run) -> None:
    if "training" not in run.tags:
        wait = "wait for it, or, if its process is gone, " if run.status == "RUNNING" else ""
        raise RunError(
            f"run {run.run_id}: its training has not ended (status {run.status}); {wait}"
            f"-P resume={run.run_id} goes on with it"
        )


def read_logits(run: Run) -> ExpertLogits:
    """What `write_logits` wrote, checked; RunError where anything is not as it should be."""
    what = f"run {run.run_id}: logits/manifest.json"
    with malformed(f"run {run.run_id}: splits/manifest.json"):
        about = run.read_json("splits/manifest.json")
        names = tuple(map(str, about["class_names"]))
        is_literature = about.get("protocol") == "literature"
        counts = {
            name: np.array(about["splits"][name]["class_counts"])
            for name in (LITERATURE_SPLITS if is_literature else SPLITS)
        }
    with malformed(what):
        manifest = run.read_json("logits/manifest.json")
        constants = {
            "temperature": float(manifest["temperature"]),
            "tau": float(manifest["tau"]),
            "log_offset": _vector(manifest["log_offset"], len(names)),
            "prior": _vector(manifest["prior"], len(names)),
        }
        files = {name: manifest["files"][name] for name in counts}
        expected = {name: (str(file["sha256"]), int(file["rows"])) for name, file in files.items()}
    if not 0 < constants["temperature"] < math.inf:
        raise RunError(f"{what}: temperature={constants['temperature']}: must be positive")
    if not math.isfinite(constants["tau"]):
        raise RunError(f"{what}: tau={constants['tau']}: must be finite")
    if not np.allclose(constants["prior"], counts["train"] / counts["train"].sum(), atol=0):
        raise RunError(f"{what}: prior is not that of the images in splits/manifest.json")
    splits = {}
    for name, (sha256, rows) in expected.items():
        with run.read_artifact(f"logits/{name}.npz") as path:
            where = f"run {run.run_id}: {name}"
            splits[name] = _read_split(path, sha256, (rows, len(names)), where)
        found = np.bincount(splits[name].targets, minlength=len(names))
        if not np.array_equal(found, counts[name]):
            raise RunError(f"{where}.npz has other targets than splits/manifest.json counts")
    return ExpertLogits(run_id=run.run_id, splits=splits, class_names=names, **constants)


def _vector(values: list[float], length: int) -> np.ndarray:
    vector = np.array(values, dtype=np.float64)
    if vector.shape != (length,) or not np.isfinite(vector).all():
        raise ValueError(f"expected {length} finite numbers")
    return _frozen(vector)


def _frozen(array: np.ndarray) -> np.ndarray:
    array.setflags(write=False)
    return array


def _read_split(path: Path, sha256: str, shape: tuple[int, int], what: str) -> SplitLogits:
    if _sha256(path) != sha256:
        raise RunError(f"{what}.npz is not the file that the manifest describes (sha256 differs)")
    try:
        read = read_npz(path, ("logits", "targets", "indices"))
        arrays = {name: _frozen(array) for name, array in read.items()}
    except (*UNREADABLE, zipfile.BadZipFile) as error:
        raise RunError(f"{what}.npz cannot be read ({first_line(error)})") from None
    split = SplitLogits(**arrays)
    if (
        split.logits.shape != shape
        or split.logits.dtype != np.float32
        or any(a.shape != shape[:1] or a.dtype != np.int64 for a in (split.targets, split.indices))
        or not np.isfinite(split.logits).all()
        or (len(split.targets) and not 0 <= split.targets.min() <= split.targets.max() < shape[1])
    ):
        raise RunError(
            f"{what}.npz: expected finite float32 logits {list(shape)} with int64 targets and "
            "indices"
        )
    return split


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
