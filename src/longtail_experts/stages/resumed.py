"""What going on with a run starts from: the run itself, its config and its data, checked."""

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from longtail_experts.config import LOSS_NAMES, Config
from longtail_experts.data.dataset import Dataset
from longtail_experts.stages.inputs import (
    MAY_CHANGE_ON_RESUME,
    load_dataset,
    require_same_fields,
    resolve,
)
from longtail_experts.tracking import experts
from longtail_experts.tracking.logits import is_calibrated
from longtail_experts.tracking.registry import register
from longtail_experts.tracking.runs import Run, RunError, open_run
from longtail_experts.tracking.stale import is_complete, require_not_running, require_training


@dataclass(frozen=True)
class Begun:
    """A run to go on with."""

    run: Run
    stage: str
    config: Config
    data: Dataset
    launcher: AbstractContextManager[Run | None]  # the pointer that `mlflow run` made, if it did


def is_done(run_: Run) -> bool:
    """Whether nothing of what its stage does is missing. MLflow ends a run as FINISHED that someone
    opened to add a tag, whatever had become of it."""
    if run_.tags["stage"] != "all":
        return is_complete(run_)
    children = experts.children_of(run_)
    return all(loss in children and is_calibrated(children[loss]) for loss in LOSS_NAMES)


def register_finished(run_: Run, name: str) -> None:
    """The expert, or those of loss=all, as far as they are not registered yet."""
    is_one = run_.tags["stage"] != "all"
    for expert in [run_] if is_one else experts.children_of(run_).values():
        if is_calibrated(expert):
            register(expert, name)


def open_begun(
    run_id: str, asked: Config, compared: set[str], given: dict[str, str]
) -> Begun | None:
    """The run with everything it needs; None, after saying so, where it is finished already.

    Raises RunError where it is no training, is being filled by another process, or was begun
    with other values of the fields in `compared`; DataError where its images are not there.
    """
    source, what = open_run(run_id), f"resume={run_id}"
    if os.environ.get("MLFLOW_RUN_ID") == run_id:  # mlflow run --run-id: the run itself, no pointer
        what = f"MLFLOW_RUN_ID={run_id}"
        del os.environ["MLFLOW_RUN_ID"]
        launcher: AbstractContextManager[Run | None] = nullcontext()
    else:
        launcher = experts.launched_resuming_run(source)
    require_training(source)
    recorded = None
    is_finished = source.status == "FINISHED" and is_done(source)
    if not is_finished:
        require_not_running(source)
    if source.has_artifact("config.yaml"):
        recorded = experts.recorded_config(source)
        asked_text = {name: value for name, value in asked.as_text().items() if name in compared}
        undecided = {name for name in ("expert_seed", "precision") if name not in given}
        require_same_fields(
            recorded.as_text(), asked_text, what, {*MAY_CHANGE_ON_RESUME, *undecided}
        )
    elif not is_finished:
        raise RunError(f"run {run_id}: was cut off before it began to train; start a new one")
    changes = {name: given[name] for name in MAY_CHANGE_ON_RESUME if name in given}
    if is_finished:
        with launcher:
            name = recorded.replace(**changes).register_as if recorded else None
            if name:  # asked for by now, or what was cut off at the very end
                register_finished(source, name)
            print(f"run {run_id} is finished already; nothing {'else ' if name else ''}was changed")
        return None
    config = resolve(recorded.replace(**{"device": "auto"} | changes))
    data = load_dataset(config)
    children = experts.children_of(source) if source.tags["stage"] == "all" else {}
    for begun in (source, *children.values()):
        if "splits_sha256" in begun.params:
            experts.require_same_splits(begun, config, data)
    return Begun(source, source.tags["stage"], config, data, launcher)
