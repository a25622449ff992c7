"""Entry point `export`: the files that AR-GSE reads, from one run of each loss.

data/<name>_splits/<split>_indices.json
outputs/logits/<name>/<expert>_baseline/<split>_logits.pt        float16 [N, C], f / T
checkpoints/experts/<name>/{best,final_calibrated}_<expert>_baseline.pth

and, which it does not read, outputs/logits/<name>/runs.json: the run that each expert came from.
"""

import json
import logging
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longtail_experts.config import shorten
from longtail_experts.data.locks import host_lock
from longtail_experts.data.sources import CIFARS
from longtail_experts.tracking.checkpoints import read_checkpoint
from longtail_experts.tracking.logits import ExpertLogits, read_logits, require_calibrated
from longtail_experts.tracking.runs import Run, RunError, launched_run, malformed, open_run

log = logging.getLogger(__name__)

ARGSE_NAMES = {"ce": "ce", "logit_adjust": "logitadjust", "balanced_softmax": "balsoftmax"}
ARGSE_SPLITS = ("train", "tuneV", "val_small", "calib", "val_lt", "test_lt")


def run(run_ids: list[str], out: Path) -> None:
    """Write the tree below `out`, each file whole; RunError before anything is written."""
    runs = [open_run(run_id) for run_id in run_ids]
    for run_ in runs:
        require_calibrated(run_)
    losses = [_loss_of(run_) for run_ in runs]
    for loss in losses:
        if losses.count(loss) > 1:
            raise RunError(f"run_ids: two runs of loss {loss}; give one of each")
    _require_same_splits(runs)
    with malformed(f"run {run_ids[0]}: splits/manifest.json"):
        manifest = runs[0].read_json("splits/manifest.json")
        name = dataset_name(manifest)
        index_space = str(manifest["index_space"])
        protocol = manifest.get("protocol", "experts")
    if protocol == "literature":
        raise RunError(
            f"run {run_ids[0]}: protocol=literature has no calib, val_lt or test_lt, which AR-GSE "
            "reads; train with protocol=experts"
        )
    files: dict[str, Any] = {}
    of_runs = {}
    for run_, loss in zip(runs, losses, strict=True):
        expert, label = read_logits(run_), f"{ARGSE_NAMES[loss]}_baseline"
        files |= files_of_expert(run_, expert, name, label)
        of_runs[label] = {
            "run_id": run_.run_id,
            **{key: run_.params.get(key) for key in ("seed", "expert_seed", "splits_sha256")},
            "temperature": expert.temperature,
        }
    files |= files_of_splits(expert, name, index_space, str(manifest.get("source")))
    with host_lock(os.path.realpath(out)):  # what is there is looked at, then added to
        _require_same_rows(out, files)
        path_of_runs = f"outputs/logits/{name}/runs.json"
        files[path_of_runs] = _runs_there(out / path_of_runs, of_runs) | of_runs
        with launched_run(f"export {name}", {"stage": "export"}):
            write_files(out, files)
    print(f"{len(files)} files of {', '.join(losses)} written below {out.absolute()}")


def files_of_expert(run_: Run, expert: ExpertLogits, name: str, label: str) -> dict[str, Any]:
    """Logits and weights by path; warns of what AR-GSE would not expect of them."""
    if run_.params.get("shortcut") == "pad":
        log.warning(
            "run %s: shortcut=pad: its weights have no shortcut.*, which AR-GSE's network has; "
            "logits are as ever",
            run_.run_id,
        )
    if run_.metrics.get("temperature_at_bound"):
        log.warning(
            "run %s: T = %.3g is at the bound of the search: no estimate",
            run_.run_id,
            expert.temperature,
        )
    files = {
        f"outputs/logits/{name}/{label}/{split}_logits.pt": values
        for split, values in half_precision_logits(expert).items()
    }
    weights = read_checkpoint(run_, "final_calibrated")["model"]
    for kind, temperature in (("best", 1.0), ("final_calibrated", expert.temperature)):
        files[f"checkpoints/experts/{name}/{kind}_{label}.pth"] = {
            **weights,
            "temperature": torch.tensor([temperature], dtype=torch.float32),
        }
    return files


def files_of_splits(
    expert: ExpertLogits, name: str, index_space: str, source: str
) -> dict[str, Any]:
    """Indices by path; where they do not count as torchvision does, what they count and the
    targets too, with a warning."""
    folder = f"data/{name}_splits"
    splits = {split: expert.splits[split] for split in ARGSE_SPLITS}
    files: dict[str, Any] = {
        f"{folder}/{split}_indices.json": of.indices.tolist() for split, of in splits.items()
    }
    if index_space == "torchvision":
        return files
    cifar = CIFARS.get(source)
    log.warning(
        "indices are %sin the order of the source %s...; targets and index_space.json are "
        "written beside them",
        f"not in torchvision's order of {cifar.title} but " if cifar else "",
        shorten(index_space[:12]),
    )
    files[f"{folder}/index_space.json"] = {"index_space": index_space}
    return files | {
        f"{folder}/{split}_targets.json": of.targets.tolist() for split, of in splits.items()
    }


def _require_same_rows(out: Path, files: dict[str, Any]) -> None:
    """Experts exported earlier to the same place must be of the same splits of the same images:
    the rows of their logits are those of the indices there."""
    of_data = {path: content for path, content in files.items() if path.endswith(".json")}
    folder = Path(next(iter(of_data))).parent
    of_data.setdefault(str(folder / "index_space.json"), None)  # None: the order is torchvision's
    for path, content in of_data.items():
        try:
            is_same = json.loads((out / path).read_text()) == content
        except FileNotFoundError:
            continue
        except OSError as error:
            raise RunError(f"out={shorten(out)}: cannot be written ({error.strerror})") from None
        except (ValueError, RecursionError):
            is_same = False
        if not is_same:
            raise RunError(
                f"out={out}: {path} is of other images or splits, exported before; give these "
                "experts another out"
            )


def _runs_there(path: Path, ours: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What earlier exports to the same place wrote of their runs; warns of experts that `ours`
    replace, and of those whose run is not known."""
    try:
        runs = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        runs = {}
    runs = runs if isinstance(runs, dict) else {}
    known = {label: of.get("run_id") for label, of in runs.items() if isinstance(of, dict)}
    for folder in sorted(path.parent.glob("*_baseline")):
        label = folder.name
        if label not in known:
            done = "is replaced" if label in ours else "stays"
            log.warning("%s, of a run that %s does not name, %s", label, path.name, done)
        elif label in ours and known[label] != ours[label]["run_id"]:
            log.warning("%s of run %s is replaced", label, shorten(known[label]))
    return {label: of for label, of in runs.items() if label in known}


def dataset_name(manifest: dict[str, Any]) -> str:
    """cifar100_lt_if100 for the full recipe; other settings are named after themselves.

    It becomes a folder: ValueError where a manifest from elsewhere would lead out of it.
    """
    profile, factor = manifest["imbalance_profile"], manifest["imbalance_factor"]
    source, largest = manifest["source"], manifest["images_per_class"]
    if profile == "natural":
        name = f"{source}_natural"
    else:
        step = "step_" if profile == "step" else ""
        of_source = next((c.largest for name, c in CIFARS.items() if name == source), None)
        fewer = f"_n{largest}" if largest not in (None, of_source) else ""
        name = f"{source}_lt_{step}if{factor:g}{fewer}"
    if not re.fullmatch(r"[\w.+-]{1,100}", name) or name.startswith("."):
        raise ValueError(f"its settings make no folder name: {shorten(name)!r}")
    return name


def half_precision_logits(expert: ExpertLogits) -> dict[str, Tensor]:
    """float16 [N, C] of f / T by split; RunError where a value does not fit."""
    halves = {}
    for split in ARGSE_SPLITS:
        scaled = torch.tensor(expert.splits[split].logits) / expert.temperature
        halves[split] = scaled.half()
        if not bool(torch.isfinite(halves[split]).all()):
            largest = float(scaled.abs().max())
            raise RunError(
                f"run {expert.run_id}: {split}: |f / T| reaches {largest:.4g}, beyond float16's "
                "65504"
            )
    return halves


def write_files(out: Path, files: dict[str, Any]) -> None:
    """Every file to a scratch folder below `out` first; then each moved to its place."""
    try:
        for path in files:
            (out / path).parent.mkdir(parents=True, exist_ok=True)
            if (out / path).is_dir():  # found later, half of the others would be replaced already
                raise RunError(f"out={out}: {path} is a folder; remove it, or give another out")
        with tempfile.TemporaryDirectory(dir=out, prefix=".export-") as scratch:
            for path, content in files.items():
                local = Path(scratch) / path
                local.parent.mkdir(parents=True, exist_ok=True)
                if path.endswith(".json"):
                    local.write_text(json.dumps(content))
                else:
                    torch.save(content, local)
            for path in files:
                os.replace(Path(scratch) / path, out / path)
    except OSError as error:
        raise RunError(f"out={out}: cannot be written ({error.strerror or error})") from None


def _loss_of(run_: Run) -> str:
    loss = run_.tags["expert"]
    if loss not in ARGSE_NAMES:
        raise RunError(
            f"run {run_.run_id}: AR-GSE has no place for loss {shorten(loss)}; give runs of "
            f"{', '.join(ARGSE_NAMES)} (longtail_experts.load_expert_logits reads any)"
        )
    return loss


def _require_same_splits(runs: list[Run]) -> None:
    hashes = {run_.run_id: run_.params.get("splits_sha256") for run_ in runs}
    if len(set(hashes.values())) > 1:
        listed = ", ".join(f"{run_id}: {str(sha)[:12]}" for run_id, sha in hashes.items())
        raise RunError(f"run_ids: experts of different splits ({listed})")
