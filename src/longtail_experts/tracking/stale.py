"""Runs that the store shows as RUNNING although their process is gone."""

import logging

import mlflow

from longtail_experts.config import MLFLOW_RUN
from longtail_experts.data.sources import first_line
from longtail_experts.tracking.logits import is_calibrated
from longtail_experts.tracking.patience import PatientClient
from longtail_experts.tracking.processes import is_alive, is_on_this_host
from longtail_experts.tracking.recorder import deliver_left_over
from longtail_experts.tracking.runs import (
    Run,
    RunError,
    claimed,
    open_run,
    store_to_read,
)

log = logging.getLogger(__name__)

RESUMABLE_STAGES = ("main", "train", "all")


def stale_runs(experiment_ids: list[str] | None = None) -> list[Run]:
    """Runs of this host, of ours, that are RUNNING without a process; oldest first, of all
    experiments unless some are named. StoreError where the store cannot be read."""
    if experiment_ids is None:
        with store_to_read() as client:
            experiment_ids = [e.experiment_id for e in client.search_experiments()]
    found = PatientClient(mlflow.MlflowClient()).search_runs(
        experiment_ids,
        "attributes.status = 'RUNNING' and tags.host != ''",
        order_by=["attributes.start_time ASC"],
        max_results=1000,
    )
    return [
        Run(run.info.run_id)
        for run in found
        if is_on_this_host(run.data.tags) and not is_alive(run.data.tags)
    ]


def offer_to_resume(run: Run) -> None:
    """One warning for each run beside `run` that was cut off on this host."""
    for stale in stale_runs([run.experiment_id]):
        tags = stale.tags
        is_of_this = run.run_id in (stale.run_id, tags.get("mlflow.parentRunId"))
        if is_of_this or tags.get("stage") not in RESUMABLE_STAGES:
            continue
        epoch = stale.metrics.get("epoch")
        reached = "before its first epoch ended" if epoch is None else f"after epoch {epoch:.0f}"
        log.warning(
            "run %s (%s) was cut off on this host %s: %s`%s -e reap` marks it as FAILED",
            stale.run_id,
            stale.name,
            reached,
            f"-P resume={stale.run_id} goes on with it, " if can_go_on(stale) else "",
            MLFLOW_RUN,
        )


def can_go_on(run: Run) -> bool:
    """Whether a training got as far as to say with which config, and that is still there."""
    try:
        return run.tags.get("stage") in RESUMABLE_STAGES and run.has_artifact("config.yaml")
    except RunError:
        return False


def named_run(run_id: str) -> Run:
    """A run that the user knows to be without a process; RunError where it is seen to have one."""
    run = open_run(run_id)
    if run.status != "RUNNING":
        raise RunError(f"run {run_id}: is {run.status}, not RUNNING; there is nothing to reap")
    require_no_process(run)
    return run


def was_begun(run_id: str) -> bool:
    """Whether a run is a training that an earlier process began."""
    return open_run(run_id).tags.get("stage") in RESUMABLE_STAGES


def require_no_process(run: Run) -> None:
    tags = run.tags
    if is_on_this_host(tags) and is_alive(tags):
        raise RunError(f"run {run.run_id}: process {tags['pid']} of this host is filling it")


def require_training(run: Run) -> None:
    stage = run.tags.get("stage")
    if stage not in RESUMABLE_STAGES:
        raise RunError(f"run {run.run_id}: is no training (its stage is {stage})")


def require_not_running(run: Run) -> None:
    """RunError for a run that another process may be filling, on this host or another."""
    if run.status == "RUNNING":
        require_no_process(run)
        if not is_on_this_host(run.tags):
            raise RunError(
                f"run {run.run_id}: is RUNNING on host {run.tags.get('host')} as far as the store "
                f"knows; if its process is gone, first: {MLFLOW_RUN} -e reap -P "
                f"run_id={run.run_id}"
            )


def is_complete(run: Run) -> bool:
    """Whether nothing is missing of what its stage does for one expert."""
    tags = run.tags
    return "training" in tags if tags.get("stage") == "train" else is_calibrated(run)


def reap(run: Run) -> str:
    """Deliver what the run's process left on this disk, mark it FAILED, or FINISHED where nothing
    but that was missing; says what was done. One that goes on again by now is left alone."""
    try:
        with claimed(run):
            if run.status != "RUNNING":
                return f"run {run.run_id}: is {run.status} by now"
            require_no_process(run)  # of a sweep that goes on: it claims its trials alone
            delivered = deliver_left_over(run)
            status = "FINISHED" if is_complete(run) else "FAILED"
            run.client.set_terminated(run.run_id, status)
    except Exception as error:  # the journal of one run must not keep the others RUNNING
        return f"run {run.run_id}: left RUNNING: {first_line(error)}"
    hint = f"; -P resume={run.run_id} goes on with it" if can_go_on(run) else ""
    hint = hint if status == "FAILED" else ", nothing is missing"
    return f"run {run.run_id} ({run.name}): {status}, {delivered} points delivered{hint}"
