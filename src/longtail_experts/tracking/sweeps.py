"""A sweep in the store: its run, its trials, and experts that are finished already."""

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import mlflow

from longtail_experts.config import ConfigError, load_config
from longtail_experts.tracking import report, stale
from longtail_experts.tracking.comparison import experiment_id
from longtail_experts.tracking.experts import SYNTHETIC_NOTICE
from longtail_experts.tracking.identity import code_sha256, git_tags
from longtail_experts.tracking.patience import PatientClient
from longtail_experts.tracking.processes import is_alive, is_on_this_host
from longtail_experts.tracking.runs import (
    Run,
    RunError,
    launched_run_id,
    open_run,
    start_run,
    store_to_read,
)
from longtail_experts.tracking.stores import store_address

Key = tuple[str, str]  # config_sha256, splits_sha256; the code version is always ours
STATES = ("finished", "found", "running", "waiting", "stopped", "failed")
PATIENCE_WITH_A_PROCESS = 60.0  # seconds for which one that must be ending is waited for
RECIPE_EPOCHS = "recipe_epochs"  # a tag: full_epochs, when the sweep began
FIGURES = ("balanced", "head", "tail", "adjusted balanced")
UNITS = "On test_balanced, in percent: accuracies (means over classes) and the calibrated ECE."


@dataclass
class Trial:
    """What the sweep's page says of one trial; `found`: finished in the store beforehand."""

    fields: Mapping[str, str]
    key: Key
    state: str = "waiting"
    run_id: str | None = None
    reason: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.fields.items())


# --- what is there already --------------------------------------------------------------------


def experiment_here() -> str | None:
    """The experiment into which a run started now would go, where it exists."""
    launched = launched_run_id()
    if launched:
        return open_run(launched).experiment_id
    with store_to_read() as client:
        try:
            return experiment_id(client, "")
        except RunError:
            return None


def finished_experts(experiment: str | None) -> dict[Key, mlflow.entities.Run]:
    """The newest finished expert of each config and splits, under today's code throughout: of
    `main`, or of `train` and `calibrate`."""
    found = {}
    for run in _runs(experiment, f"tags.code_sha256 = '{code_sha256()}'"):
        tags = run.data.tags
        if (
            tags.get("stage") in ("main", "train")
            and tags.get("calibrated") == "true"
            and run.info.status == "FINISHED"
            # Began under today's code, and under other code went on or was calibrated.
            and not {"resumed.code_sha256", "calibrated.code_sha256"} & tags.keys()
        ):
            found[tags.get("config_sha256", ""), run.data.params.get("splits_sha256", "")] = run
    return found


def find_sweep(experiment: str | None, sweep_sha256: str) -> Run | None:
    """The newest run of this very sweep; RunError where another process may be filling it."""
    found = list(_runs(experiment, f"tags.sweep_sha256 = '{sweep_sha256}'"))
    if not found:
        return None
    run = Run(found[-1].info.run_id)
    stale.require_not_running(run)
    return run


def unfinished_trials(parent: Run) -> dict[str, list[mlflow.entities.Run]]:
    """By config_sha256, the trials' runs that are not finished, oldest first; of today's code
    throughout."""
    found: dict[str, list[mlflow.entities.Run]] = {}
    for run in _children(parent, f" and tags.code_sha256 = '{code_sha256()}'"):
        tags = run.data.tags
        is_finished = run.info.status == "FINISHED" and tags.get("calibrated") == "true"
        if not is_finished and "resumed.code_sha256" not in tags:
            found.setdefault(tags.get("config_sha256", ""), []).append(run)
    return found


def newest(unfinished: Mapping[str, Sequence[mlflow.entities.Run]], key: Key) -> str | None:
    """The run with which a trial goes on; one cut off early does not know its splits yet."""
    ids = [
        run.info.run_id
        for run in unfinished.get(key[0], ())
        if run.data.params.get("splits_sha256", key[1]) == key[1]
    ]
    return ids[-1] if ids else None


def running_trials(parent: Run) -> dict[str, str]:
    """Run ids of the trials that are under way, by config_sha256; not of those whose process was
    lost, which stay RUNNING in the store until they are taken up again."""
    left = _children(parent, " and attributes.status = 'RUNNING'")
    running = [r for r in left if is_alive(r.data.tags) or not is_on_this_host(r.data.tags)]
    return {run.data.tags.get("config_sha256", ""): run.info.run_id for run in running}


def reap_trials(parent: Run) -> None:
    """Mark as FAILED what no worker fills any more: a sweep's workers end with their driver."""
    for run in _children(parent, " and attributes.status = 'RUNNING'"):
        stale.reap(Run(run.info.run_id))


def wait_until_left(run: Run) -> None:
    """Until the process that filled a RUNNING run, if it is on this host, has ended: a worker
    needs a moment to see that its node or its driver is gone."""
    deadline = time.monotonic() + PATIENCE_WITH_A_PROCESS
    while run.status == "RUNNING" and time.monotonic() < deadline:
        tags = run.tags
        if not (is_on_this_host(tags) and is_alive(tags)) or tags.get("pid") == str(os.getpid()):
            return
        time.sleep(0.5)


def _children(parent: Run, more: str) -> Iterator[mlflow.entities.Run]:
    return _runs(parent.experiment_id, f"tags.mlflow.parentRunId = '{parent.run_id}'{more}")


def _runs(experiment: str | None, filter_: str) -> Iterator[mlflow.entities.Run]:
    """All of them, oldest first."""
    client, token = PatientClient(mlflow.MlflowClient()), None
    while experiment is not None:
        page = client.search_runs(
            [experiment],
            filter_,
            order_by=["attributes.start_time ASC"],
            max_results=1000,
            page_token=token,
        )
        yield from page
        token = page.token
        if not token:
            return


# --- the sweep's run --------------------------------------------------------------------------


def full_epochs(sweep: Mapping[str, Any]) -> dict[str, int]:
    """Of the longest recipe that a sweep names, by protocol; {} where it names none of ours."""
    grid = sweep.get("grid")
    named = grid.get("config") if isinstance(grid, dict) else None
    found: dict[str, int] = {}
    for name in named or [sweep.get("config")]:
        try:
            recipe = load_config(str(name), {})
        except ConfigError:
            continue
        found[recipe.protocol] = max(found.get(recipe.protocol, 0), recipe.epochs)
    return found


def start_sweep_run(
    name: str,
    sweep: Mapping[str, Any],
    sweep_sha256: str,
    synthetic: bool,
    existing: Run | None,
) -> AbstractContextManager[Run]:
    """A new one, or `existing` once more; named DEMO where a trial is on synthetic images."""
    tags = {"stage": "sweep", "sweep_sha256": sweep_sha256, "code_sha256": code_sha256()}
    tags[RECIPE_EPOCHS] = json.dumps(full_epochs(sweep))
    tags["demo"] = str(synthetic).lower()
    if existing is not None:
        tags["resumed"] = str(int(existing.tags.get("resumed", "0")) + 1)
    name = f"DEMO {name}"[:200] if synthetic else name[:200]
    return start_run(name, {**tags, **git_tags()}, existing=existing)


def record_trials(parent: Run, trials: Sequence[Trial]) -> None:
    """trials.json: every trial with its fields, state and run id, for programs; report.md and the
    description: the same with figures and links, for people."""
    parent.write_json(
        "trials.json",
        [
            {
                "fields": dict(trial.fields),
                "state": trial.state,
                "run_id": trial.run_id,
                "reason": trial.reason,
                "config_sha256": trial.key[0],
                "splits_sha256": trial.key[1],
            }
            for trial in trials
        ],
    )
    header, rows = _table(parent, trials)
    text_columns = len(header) - len(FIGURES) - 2
    notes = [f"{trial.label}: {trial.reason}" for trial in trials if trial.reason]
    if any(trial.state == "found" for trial in trials):
        notes.insert(0, "found: finished in the store before this sweep, and not repeated")
    listed = "\n".join(f"- {note}" for note in notes)
    notice = SYNTHETIC_NOTICE if parent.tags.get("demo") == "true" else ""
    title = f"{notice}## {len(trials)} trials: {counts(trials)}\n\n{UNITS}"
    text = "\n\n".join([title, report.table(header, rows, text_columns), listed]).rstrip()
    parent.write_text("report.md", text + "\n")
    shown = len(rows)  # as many as MLflow keeps
    while len(report.with_air(text)) > report.LONGEST_DESCRIPTION:
        shown = shown * 3 // 4
        table = report.table(header, rows[:shown], text_columns)
        text = f"{title}\n\n{table}\n\nThe other trials are in report.md."
    parent.describe(text)


def counts(trials: Sequence[Trial]) -> str:
    numbers = [(state, sum(trial.state == state for trial in trials)) for state in STATES]
    return ", ".join(f"{number} {state}" for state, number in numbers if number)


def _table(parent: Run, trials: Sequence[Trial]) -> tuple[list[str], list[list[str]]]:
    """Accuracies and ECE on test_balanced in percent, the temperature, and a link a trial."""
    header = [*trials[0].fields, "state", *FIGURES, "ECE", "T"]
    rows = []
    for trial in trials:
        state = trial.state
        if trial.run_id:
            here = f"#/experiments/{parent.experiment_id}/runs/{trial.run_id}"
            state = f"[{state}]({here})"
        cells = dict(
            zip(report.ACCURACIES, report.accuracy_row(trial.metrics, "test_balanced"), strict=True)
        )
        temperature = trial.metrics.get("temperature")
        rows.append(
            [
                *(value.replace("|", "/") for value in trial.fields.values()),
                state,
                *(cells[name] for name in FIGURES),
                report.percent(trial.metrics.get("test_balanced/ece")),
                "-" if temperature is None else f"{temperature:.3f}",
            ]
        )
    return header, rows


# --- for processes of other folders and hosts -------------------------------------------------


def environment_of_trials(parent: Run) -> dict[str, str]:
    """What sends a worker's runs to the store and the experiment of the sweep."""
    return {"MLFLOW_TRACKING_URI": store_address(), "MLFLOW_EXPERIMENT_ID": parent.experiment_id}


def enter_store(environment: Mapping[str, str]) -> None:
    """In a worker: nothing inherited from elsewhere decides which run or experiment is filled."""
    for name in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_NAME"):
        os.environ.pop(name, None)
    os.environ.update(environment)
