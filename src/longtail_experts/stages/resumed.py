"""What going on with a run starts from: the run itself, its config and its data, checked."""

from contextlib import AbstractContextManager
from dataclasses import dataclass

from longtail_experts.config import LOSS_NAMES, MLFLOW_RUN, Config
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
from longtail_experts.tracking.runs import Run, RunError, launched_run_id, open_run
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


def require_registrable(run_: Run, recorded: Config, name: str) -> None:
    """RunError where what goes on registers nothing: of `train`, that is left to `calibrate`, under
    the name in the run's config, which stays as it was."""
    is_new = name not in ("none", recorded.register_as)
    if is_new and run_.tags["stage"] == "train" and not is_calibrated(run_):
        raise RunError(
            f"register_as={name}: run {run_.run_id} is not calibrated; after "
            f"{MLFLOW_RUN} -e calibrate -P run_id={run_.run_id}, this registers it"
        )


def open_begun(run_id: str, given: dict[str, str], recipe: Config | None) -> Begun | None:
    """The run with everything it needs; None, after saying so, where it is finished already.

    Raises RunError where it is no training, is being filled by another process, or was begun
    with other values than those `given`, or those of the `recipe` that was named with them;
    DataError where its images are not there.
    """
    field = "MLFLOW_RUN_ID" if launched_run_id() == run_id else "resume"
    source, what = open_run(run_id, "resume"), f"{field}={run_id}"
    launcher = experts.launched_resuming_run(source)
    require_training(source)
    is_finished = source.status == "FINISHED" and is_done(source)
    if not is_finished:
        require_not_running(source)
    if not source.has_artifact("config.yaml"):
        lacks = "its artifacts are gone" if is_finished else "was cut off before it began to train"
        raise RunError(f"run {run_id}: {lacks}; start a new one")
    recorded = experts.recorded_config(source)
    # A run decides these itself, where nothing is said; loss=all, which takes no expert_seed, is
    # to be held against the run's loss.
    asked = (recipe or recorded.replace(**{"expert_seed": None} | given)).as_text()
    decides_itself = {"expert_seed": "none", "precision": "auto"}
    left_open = {name for name, value in decides_itself.items() if asked[name] == value}
    if given.get("loss", "ce") == "ce":  # what `mlflow run` passes where nothing was said
        left_open.add("loss")
    require_same_fields(recorded.as_text(), asked, what, {*MAY_CHANGE_ON_RESUME, *left_open})
    require_registrable(source, recorded, given.get("register_as", "none"))
    changes = {name: given[name] for name in MAY_CHANGE_ON_RESUME if name in given}
    if is_finished:
        with launcher:
            name = recorded.replace(**changes).register_as
            if name:  # asked for by now, or what was cut off at the very end
                register_finished(source, name)
            print(f"run {run_id} is finished already; nothing {'else ' if name else ''}was changed")
        return None
    config = resolve(recorded.replace(**{"device": "auto"} | changes))
    data = load_dataset(config, run_id)
    children = experts.children_of(source) if source.tags["stage"] == "all" else {}
    for begun in (source, *children.values()):
        if "splits_sha256" in begun.params:
            experts.require_same_splits(begun, config, data)
    return Begun(source, source.tags["stage"], config, data, launcher)
