"""The charts that `mlflow ui` is to open with: rate, loss, validation of head and tail.

MLflow orders the sections of a run's *Model metrics* by the alphabet, and keeps any other order in
the browser alone. What a store can hold is a saved view of an experiment's runs: a tag of the
experiment (MLflow 3.15 and later), offered under *Views*, and opened by an address.
"""

import base64
import json
import logging
import zlib
from typing import Any

from mlflow.exceptions import MlflowException

from longtail_experts.tracking.runs import Run

log = logging.getLogger(__name__)

VIEW = "longtail-curves"  # in addresses that descriptions hold: not to be changed
VIEW_TAG = f"mlflow.sharedViewState.{VIEW}"
VIEW_NAME = "Learning curves"
FIRST_SECTION = "learning curves"
FIRST_CHARTS = (
    "lr",
    "train/loss",
    "val/balanced_accuracy",
    "val/head_accuracy",
    "val/tail_accuracy",
)
# Sections below it, as MLflow derives them from the names of metrics: those with one point a run
# are folded away.
OTHER_SECTIONS = {
    "val": True,
    "train": True,
    "test_balanced": False,
    "test_lt": False,
    "best": False,
    "Model metrics": False,
    "System metrics": False,
}


def link_to_curves(run: Run) -> str:
    """Where `mlflow ui` shows the curves of the experiment's runs, relative to its address."""
    return f"#/experiments/{run.experiment_id}/runs?viewStateShareKey={VIEW}&compareRunsMode=CHART"


def offer_curves(run: Run) -> None:
    """Save the view in the run's experiment where it is not there yet, or another.

    A store that refuses does no harm: the run matters, not how it is looked at.
    """
    client, state = run.plain_client, compressed(view_state())
    try:
        there = client.get_experiment(run.experiment_id).tags.get(VIEW_TAG, "")
        if state not in there:
            view = {"name": VIEW_NAME, "createdAt": run.started_at, "state": state}
            client.set_experiment_tag(run.experiment_id, VIEW_TAG, json.dumps(view))
    except MlflowException as error:
        log.debug("the view %s could not be saved: %s", VIEW_NAME, error)


def view_state() -> dict[str, Any]:
    """All experts, the newest first; as MLflow's front end writes it (ExperimentPageUIState and
    ExperimentPageSearchFacetsState)."""
    sections = {FIRST_SECTION: True, **OTHER_SECTIONS}
    return {
        "searchFilter": "tags.expert != ''",
        # By MLflow's own name of it, `attributes.start_time`, it would fold children away.
        "orderByKey": "attributes.`start_time`",
        "orderByAsc": False,
        "compareRunSections": [
            {
                "uuid": name,
                "name": name,
                "display": shown,
                "isReordered": True,
                "deleted": False,
                "isGenerated": True,
            }
            for name, shown in sections.items()
        ],
        "compareRunCharts": [line_chart(metric) for metric in FIRST_CHARTS],
        "isAccordionReordered": True,
    }


def line_chart(metric: str) -> dict[str, Any]:
    return {
        "uuid": metric,
        "type": "LINE",
        "metricKey": metric,
        "metricSectionId": FIRST_SECTION,
        "deleted": False,
        "isGenerated": True,
        "runsCountToCompare": 10,
        "xAxisKey": "step",
        "xAxisScaleType": "linear",
        "scaleType": "log" if metric == "lr" else "linear",
        "lineSmoothness": 0,
        "useGlobalXaxisKey": True,
        "useGlobalLineSmoothing": True,
    }


def compressed(state: dict[str, Any]) -> str:
    """The same for the same state; a tag of an experiment holds 5,000 characters."""
    packed = zlib.compress(json.dumps(state).encode(), 9)
    return "deflate;" + base64.b64encode(packed).decode()
