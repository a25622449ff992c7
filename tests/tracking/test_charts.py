"""The saved view of the curves: what is in the tag, and when it is written."""

import base64
import json
import zlib

import mlflow
import pytest
from mlflow.exceptions import MlflowException

from longtail_experts.tracking import charts
from longtail_experts.tracking.runs import Run


@pytest.fixture
def run(store):
    with mlflow.start_run() as active:
        return Run(active.info.run_id)


def view_of(run) -> str:
    return run.plain_client.get_experiment(run.experiment_id).tags[charts.VIEW_TAG]


def test_the_tag_holds_what_the_front_end_inflates(run):
    charts.offer_curves(run)
    tag = view_of(run)
    view = json.loads(tag)
    assert len(tag) <= 5000
    assert (view["name"], type(view["createdAt"])) == ("Learning curves", int)
    method, packed = view["state"].split(";")
    assert method == "deflate"
    state = json.loads(zlib.decompress(base64.b64decode(packed)))
    drawn = [chart["metricKey"] for chart in state["compareRunCharts"]]
    assert drawn == [
        "lr",
        "train/loss",
        "val/balanced_accuracy",
        "val/head_accuracy",
        "val/tail_accuracy",
    ]
    shown = {section["name"]: section["display"] for section in state["compareRunSections"]}
    assert next(iter(shown)) == state["compareRunCharts"][0]["metricSectionId"]
    assert not any(shown[name] for name in ("best", "test_balanced", "test_lt"))


def test_it_is_written_once_and_again_where_it_is_another(run, monkeypatch):
    charts.offer_curves(run)
    first = view_of(run)
    monkeypatch.setattr(Run, "started_at", 1)
    charts.offer_curves(run)
    assert view_of(run) == first
    run.plain_client.set_experiment_tag(run.experiment_id, charts.VIEW_TAG, "of an older version")
    charts.offer_curves(run)
    assert json.loads(view_of(run)) == {**json.loads(first), "createdAt": 1}


def test_a_store_that_refuses_it_does_no_harm(run, monkeypatch):
    def refuse(*_):
        raise MlflowException("may not")

    monkeypatch.setattr(run.plain_client, "set_experiment_tag", refuse)
    charts.offer_curves(run)
    assert charts.VIEW_TAG not in run.plain_client.get_experiment(run.experiment_id).tags
