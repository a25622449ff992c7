"""What the store is given, and what it is spared."""

import errno
import os
import shutil
import socket
import time
from collections.abc import Callable

import mlflow
import pytest
import requests
import torch
from mlflow import MlflowClient
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from mlflow.utils import name_utils

from longtail_experts.cli import main
from longtail_experts.tracking import patience, runs
from longtail_experts.tracking.checkpoints import read_checkpoint, save_checkpoint
from longtail_experts.tracking.experts import children_of
from longtail_experts.tracking.interrupts import Terminated
from longtail_experts.tracking.processes import process_tags
from longtail_experts.tracking.runs import (
    NOTE,
    Run,
    RunError,
    StoreError,
    UndeliveredError,
    claimed,
    open_run,
    start_run,
)
from longtail_experts.tracking.stale import offer_to_resume, reap


def test_params_that_the_launcher_has_logged_are_left_alone(store):
    with mlflow.start_run() as launched:
        mlflow.log_param("epochs", "2.0")
    run = open_run(launched.info.run_id)
    run.log_params({"epochs": "2", "lr": "0.4"})
    assert run.params == {"epochs": "2.0", "lr": "0.4"}


def described_after(typed: Callable[[str], str], *pages: str) -> tuple[str, Run]:
    """The description that someone changed after the first of the pages."""
    with start_run("a run", {"stage": "data"}) as run:
        run.describe(pages[0])
        run.client.set_tag(run.run_id, NOTE, typed(run.tags[NOTE]))
        for page in pages[1:]:
            run.describe(page)
    return run.tags[NOTE], run


def test_what_nobody_changed_is_replaced(store):
    description, _ = described_after(lambda page: page, "| a | b |", "after")
    assert description.startswith("after\n")
    assert "| a" not in description


@pytest.mark.parametrize("typed", [lambda page: f"{page}\nmy notes\n", lambda page: "my notes"])
def test_what_someone_typed_into_a_description_stays_below_it(store, typed):
    description, _ = described_after(typed, "before", "between", "after")
    assert description.startswith("after\n")
    assert description.endswith("\n\nmy notes")
    assert not {"before", "between"} & set(description.split())


def test_a_page_that_someone_changed_stays_as_they_left_it(store):
    description, _ = described_after(lambda page: page.replace("old", "mine"), "old page", "after")
    assert description.startswith("after\n")
    assert description.endswith("\n\nmine page")


def test_notes_too_long_for_a_description_become_an_artifact(store):
    notes = "n" * 4000
    description, run = described_after(lambda page: page + notes, "before", "p" * 4000, "after")
    assert description.startswith("after\n")
    assert notes not in description
    (kept,) = run.client.list_artifacts(run.run_id, "notes")
    assert run.read_text(kept.path) == f"{notes}\n"


def test_where_artifacts_are_is_asked_once_however_many_are_read(store, monkeypatch):
    with start_run("a run", {"stage": "data"}) as run:
        for number in range(3):
            run.write_json(f"numbers/{number}.json", number)
    asked, get_run = [], SqlAlchemyStore.get_run
    monkeypatch.setattr(
        SqlAlchemyStore, "get_run", lambda *given: asked.append(1) or get_run(*given)
    )
    reader = Run(run.run_id)
    assert [reader.read_json(f"numbers/{number}.json") for number in range(3)] == [0, 1, 2]
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("error", "status"),
    [(None, "FINISHED"), (ValueError, "FAILED"), (KeyboardInterrupt, "KILLED")],
)
def test_a_run_never_stays_running(store, error, status):
    run_id = None
    try:
        with start_run("a run", {"stage": "data"}) as run:
            run_id = run.run_id
            if error:
                raise error
    except (ValueError, KeyboardInterrupt):
        assert error
    assert MlflowClient().get_run(run_id).info.status == status


def test_a_second_signal_does_not_hide_what_the_first_one_said(store, monkeypatch):
    """`mlflow run` sends SIGTERM a moment after a Ctrl-C."""
    ended, end = [], runs._end

    def interrupted_once(*arguments: object) -> None:
        ended.append(arguments)
        if len(ended) == 1:
            raise Terminated
        end(*arguments)

    monkeypatch.setattr(runs, "_end", interrupted_once)
    says = "-P resume=... goes on from there"
    with pytest.raises(KeyboardInterrupt, match=says), start_run("1", {"stage": "data"}) as run:
        raise KeyboardInterrupt(says)
    assert run.status == "KILLED"
    ended.clear()
    # A failure must not make one forgotten.
    with pytest.raises(Terminated), start_run("2", {"stage": "data"}) as run:
        raise ValueError
    assert run.status == "FAILED"


@pytest.mark.parametrize(
    ("error", "hasty"),
    [
        (UndeliveredError("for too long"), True),
        (MlflowException("database is locked"), True),
        (RunError("of another kind"), False),
    ],
)
def test_a_store_that_was_waited_for_is_not_waited_for_again(store, monkeypatch, error, hasty):
    waited, end = [], runs._end
    monkeypatch.setattr(runs, "_end", lambda *a: (waited.append(a[2]), end(*a)))
    with pytest.raises(type(error)), start_run("a run", {"stage": "data"}):
        raise error
    assert waited == [patience.KILLED_PATIENCE if hasty else 600.0]


def test_a_run_that_could_not_be_opened_again_is_as_it_was(store, monkeypatch):
    """MLflow sets the status before the tags."""
    with pytest.raises(KeyboardInterrupt), start_run("a run", {"stage": "train"}) as run:
        raise KeyboardInterrupt
    log_batch = MlflowClient.log_batch

    def fails(*_: object, **__: object) -> None:
        assert run.status == "RUNNING"
        raise MlflowException("disk I/O error")

    monkeypatch.setattr(MlflowClient, "log_batch", fails)
    with start_run("the parent", {"stage": "all"}) as parent:
        with pytest.raises(StoreError), start_run("a run", {"stage": "train"}, existing=run):
            raise AssertionError
        monkeypatch.setattr(MlflowClient, "log_batch", log_batch)
        assert mlflow.active_run().info.run_id == parent.run_id
    assert (run.status, parent.status) == ("KILLED", "FINISHED")


@pytest.mark.parametrize(
    ("stage", "tags", "status"),
    [
        ("train", {"training": "complete"}, "FINISHED"),
        ("main", {"training": "complete"}, "FAILED"),
        ("main", {"training": "complete", "calibrated": "true"}, "FINISHED"),
    ],
)
def test_a_run_that_only_its_status_was_missing_of_is_reaped_as_finished(
    store, capsys, stage, tags, status
):
    run = cut_off("a run")
    run.set_tags({"stage": stage, **tags})
    assert main(["reap"]) == 0
    assert f"run {run.run_id} (a run): {status}, 0 points delivered" in capsys.readouterr().out
    assert run.status == status


def test_a_run_that_goes_on_by_now_is_not_reaped(store):
    run = cut_off("a run")  # as far as was seen when the runs to reap were listed
    with claimed(run):
        assert "left RUNNING" in reap(run)
        assert run.status == "RUNNING"
    run.client.set_terminated(run.run_id, "FINISHED")
    assert "is FINISHED by now" in reap(run)
    again = cut_off("a sweep")
    again.set_tags(process_tags())  # it goes on, and claims its trials alone
    assert f"left RUNNING: run {again.run_id}: process {os.getpid()} of this host" in reap(again)
    assert again.status == "RUNNING"
    assert run.status == "FINISHED"


@pytest.mark.parametrize("stage", ["data", "train"])  # the latter before its config was written
def test_a_run_of_any_stage_is_reaped_once_its_process_is_gone(store, stage, capsys, caplog):
    """Cut off by SIGKILL, which leaves it RUNNING."""
    with start_run("splits", {"stage": stage}) as run:
        assert main(["reap"]) == 0
        assert "no run of this host" in capsys.readouterr().out
        run.set_tags({"process_started": "1.00"})  # of another process of this pid
    MlflowClient().set_terminated(run.run_id, "RUNNING")
    with start_run("the next", {"stage": "train"}) as next_one:
        offer_to_resume(next_one)
    offered = f"run {run.run_id} (splits) was cut off on this host before its first epoch ended: `"
    assert (offered in caplog.text) == (stage == "train")
    assert main(["reap"]) == 0
    out = capsys.readouterr().out
    assert f"run {run.run_id} (splits): FAILED, 0 points delivered\n" in out  # and no -P resume
    assert run.status == "FAILED"


@pytest.mark.parametrize(
    "command",
    [
        ["reap"],
        ["reap", "--run_id", "a"],
        ["calibrate", "--run_id", "a"],
        ["main", "--resume", "a"],
        ["export", "--run_ids", "a", "--out", "x"],
        ["compare"],
        ["results", "--sweeps", "a", "--out", "x.md"],
    ],
    ids=" ".join,
)
def test_where_no_run_has_begun_a_store_that_is_away_is_not_waited_for(
    command, tmp_path, monkeypatch, caplog, capfd
):
    monkeypatch.chdir(tmp_path)
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        uri = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        monkeypatch.setenv("LONGTAIL_STORE_PATIENCE", "1")
        assert main(command) == 2
    refused = os.strerror(errno.ECONNREFUSED)
    assert capfd.readouterr().err == f"error: the store {uri} cannot be read: {refused}\n"
    assert not caplog.records
    assert not list(tmp_path.iterdir())


def cut_off(name: str, parent: Run | None = None) -> Run:
    with start_run(name, {"stage": "train"}, parent) as run:
        run.set_tags({"process_started": "1.00"})  # of another process of this pid
    MlflowClient().set_terminated(run.run_id, "RUNNING")
    return run


def test_a_parent_offers_no_other_way_for_its_own_children(store, caplog):
    other = cut_off("other")
    with start_run("all experts", {"stage": "all"}) as parent:
        child = cut_off("child", parent)
        offer_to_resume(parent)
    assert other.run_id in caplog.text
    assert child.run_id not in caplog.text


def test_artifacts_that_a_server_keeps_stop_no_reaping(store, capsys):
    """Without MLFLOW_TRACKING_URI, nobody can list them."""
    served = MlflowClient().create_experiment("served", artifact_location="mlflow-artifacts:/7")
    tags = {**cut_off("before").tags, "stage": "train"}
    run = Run(MlflowClient().create_run(served, tags=tags).info.run_id)
    after = cut_off("after")
    assert main(["reap"]) == 0
    assert capsys.readouterr().out.count("FAILED") == 3
    assert (run.status, after.status) == ("FAILED", "FAILED")
    for command in (["main", "--resume", run.run_id], ["calibrate", "--run_id", run.run_id]):
        run.set_tags({"training": "complete"})
        assert main(command) == 2
        assert f"error: run {run.run_id}: its artifacts cannot be" in capsys.readouterr().err


def test_artifacts_that_were_moved_are_not_taken_for_missing(store, capfd):
    run = cut_off("a run")
    run.write_text("config.yaml", "epochs: 2\n")
    assert run.has_artifact("config.yaml")
    assert not run.has_artifact("checkpoints/best.pt")
    mlruns = runs.local_folder_of(run.artifact_uri).parent.parent
    mlruns.rename(store / "moved")
    assert main(["main", "--resume", run.run_id]) == 2
    says = f"error: run {run.run_id}: its artifacts were in {mlruns}, which is gone"
    assert says in capfd.readouterr().err
    with start_run("another", {"stage": "train"}, existing=None) as next_one:
        offer_to_resume(next_one)  # without a word on artifacts


def test_a_run_of_a_deleted_experiment_is_refused(store):
    run = cut_off("a run")
    MlflowClient().delete_experiment(run.experiment_id)
    with pytest.raises(RunError, match="mlflow experiments restore --experiment-id"):
        open_run(run.run_id)
    MlflowClient().restore_experiment(run.experiment_id)
    MlflowClient().delete_run(run.run_id)
    with pytest.raises(RunError, match=f"mlflow runs restore --run-id {run.run_id}"):
        open_run(run.run_id)


def full_disk_of_torch(*_: object) -> None:
    raise RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 704 vs 598")


def test_a_full_disk_of_artifacts_is_one_line(store, monkeypatch):
    def raises(error: OSError) -> None:
        def log_artifact(*_: object) -> None:
            raise error

        monkeypatch.setattr(MlflowClient, "log_artifact", log_artifact)

    monkeypatch.setenv("LONGTAIL_STORE_PATIENCE", "0")
    with start_run("a run", {"stage": "data"}) as run:
        raises(OSError(errno.ENOSPC, "No space left on device"))
        with pytest.raises(RunError, match=r"artifact a/b.txt cannot be written \(No space left"):
            run.write_text("a/b.txt", "text")
        raises(shutil.Error([("a", "b", "[Errno 28] No space left on device")]))
        with pytest.raises(RunError, match=r"cannot be written \(.*No space left"):
            run.write_text("a/b.txt", "text")
        monkeypatch.setattr(torch, "save", full_disk_of_torch)
        with pytest.raises(RunError, match=r"final_calibrated.pt cannot be written \(.*unexpected"):
            save_checkpoint(run, "final_calibrated", {})
        raises(requests.exceptions.InvalidURL("what a server is at fault for"))
        with pytest.raises(requests.exceptions.InvalidURL):
            run.write_text("a/b.txt", "text")


@pytest.mark.parametrize(
    "name", ["ce-baseline-1", "rare-classes-2", "silent-ant", "my run", "a-b-c"]
)
def test_a_name_that_someone_gave_is_kept(name):
    assert not runs.is_generated(name)


def test_a_name_that_mlflow_made_up_is_not():
    made_up = {name_utils._generate_random_name() for _ in range(200)}
    assert all(map(runs.is_generated, made_up))


def test_an_experiment_made_by_mlflow_ui_is_detected(store, monkeypatch):
    MlflowClient().create_experiment("by-ui", artifact_location="mlflow-artifacts:/7")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "by-ui")
    with pytest.raises(RunError, match="--experiment-name longtail"), start_run("a", {}):
        raise AssertionError("no work may start")
    (run,) = MlflowClient().search_runs([mlflow.get_experiment_by_name("by-ui").experiment_id])
    assert run.info.status == "FAILED"


def test_more_points_than_one_request_holds(store):
    with start_run("a", {}) as run:
        run.log_metric_points([Metric("lr", step / 10, 0, step) for step in range(2500)])
    assert run.history("lr") == [(step, step / 10) for step in range(2500)]


def test_pickled_code_in_a_checkpoint_is_not_run(store):
    import torch

    class Payload:
        def __reduce__(self):
            return (open, (str(store / "executed"), "w"))

    with start_run("a", {}) as run, run.artifact("checkpoints/best.pt") as path:
        torch.save({"model": Payload()}, path)
    with pytest.raises(RunError, match=r"checkpoints/best\.pt is damaged"):
        read_checkpoint(run, "best")
    assert not (store / "executed").exists()


def test_mlflow_does_not_end_a_run_whose_status_could_not_be_set(store, monkeypatch):
    """At the exit of the program it would end what it takes for active, as FINISHED."""

    def locked(*_: object) -> None:
        raise MlflowException("disk I/O error")

    def interrupted() -> None:
        with start_run("x", {"stage": "train"}):
            monkeypatch.setattr(MlflowClient, "set_terminated", locked)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert mlflow.active_run() is None


def test_a_name_that_the_user_gave_is_kept(store, monkeypatch):
    for given, kept in (("mine", "mine"), (None, "ce images seed 0")):
        launched = MlflowClient().create_run("0", run_name=given)
        monkeypatch.setenv("MLFLOW_RUN_ID", launched.info.run_id)
        with start_run("ce images seed 0", {"stage": "main"}) as run:
            assert run.run_id == launched.info.run_id
        assert run.name == kept


@pytest.mark.parametrize("uri", ["foo://bar", "file:./x", "sqlite:///file/x.db"])
def test_a_store_that_cannot_be_read_is_one_line(store, monkeypatch, uri):
    (store / "file").touch()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    for act in (lambda: open_run("0" * 32), lambda: start_run("a", {}).__enter__()):
        with pytest.raises(StoreError) as error:
            act()
        assert "\n" not in str(error.value)


def test_a_deleted_run_is_refused(store):
    with start_run("a", {}) as run:
        pass
    MlflowClient().delete_run(run.run_id)
    with pytest.raises(RunError, match="is deleted"):
        open_run(run.run_id)


@pytest.mark.parametrize(("says", "passes"), [("unique constraint", True), ("no such run", False)])
def test_two_runs_that_record_one_data_set_at_once(store, monkeypatch, says, passes):
    with start_run("x", {}) as run:
        log_inputs, calls = run.plain_client.log_inputs, []

        def lost_the_race(*arguments):
            calls.append(arguments)
            if len(calls) == 1:
                raise MlflowException(f'duplicate key violates {says} "dataset_pk"')
            return log_inputs(*arguments)

        monkeypatch.setattr(run.plain_client, "log_inputs", lost_the_race)
        record = [("train", "abc", "images", {"num_rows": 3})]
        if passes:
            run.log_datasets(record)
            (dataset,) = run.client.get_run(run.run_id).inputs.dataset_inputs
            assert dataset.dataset.name == "train"
        else:
            with pytest.raises(MlflowException, match="no such run"):
                run.log_datasets(record)
            assert len(calls) == 1


def test_a_child_is_where_its_parent_is(store, monkeypatch):
    """Though the experiment is not named again when the parent is resumed."""
    with start_run("parent", {"stage": "all"}) as parent:
        pass
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "another")
    mlflow.tracking.fluent._active_experiment_id = None
    with start_run("child", {"stage": "main"}, parent=parent) as child:
        assert child.experiment_id == parent.experiment_id


def test_a_child_is_begun_once_the_store_is_back(store, monkeypatch):
    begin, left = mlflow.start_run, [3]

    def away(**arguments):
        if arguments["parent_run_id"] and left[0]:
            left[0] -= 1
            raise MlflowException("API request to /runs/create failed with exception: refused")
        return begin(**arguments)

    monkeypatch.setattr(patience, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(mlflow, "start_run", away)
    with (
        start_run("parent", {"stage": "all"}) as parent,
        start_run("child", {"stage": "main"}, parent=parent) as child,
    ):
        assert child.tags["mlflow.parentRunId"] == parent.run_id
    assert left == [0]
    assert child.status == "FINISHED"


@pytest.mark.parametrize("stage", ["main", "compare"])
def test_a_record_is_not_overwritten_by_another_stage(stage, store, monkeypatch):
    with start_run("mine", {"stage": stage}) as mine:
        mine.describe("what came out")
    before = mine.tags
    monkeypatch.setenv("MLFLOW_RUN_ID", mine.run_id)
    with (
        pytest.raises(StoreError, match=f"is the run of a {stage} already.*leave out --run-id"),
        start_run("data", {"stage": "data"}),
    ):
        pass
    assert (mine.tags, mine.status) == (before, "FINISHED")


def test_a_refused_run_may_be_used_again(store, monkeypatch):
    launched = MlflowClient().create_run("0", tags={"stage": "refused"})
    monkeypatch.setenv("MLFLOW_RUN_ID", launched.info.run_id)
    with start_run("data", {"stage": "data"}) as run:
        assert run.run_id == launched.info.run_id


def test_a_replaced_metric_is_the_newest_whatever_the_clock_says(store, monkeypatch):
    with start_run("a run", {"stage": "data"}) as run:
        run.replace_metrics({"x": 0.3, "y": 0.5}, 0)
        now = time.time()
        monkeypatch.setattr("longtail_experts.tracking.runs.time.time", lambda: now - 3600)
        run.replace_metrics({"x": 0.4, "y": 0.5}, 0)
        assert run.metrics == {"x": 0.4, "y": 0.5}
        assert len(run.history("y")) == 1


def test_a_user_without_a_name_can_start_runs(store, monkeypatch):
    def unknown():
        raise KeyError("getpwuid(): uid not found: 54321")

    monkeypatch.setattr("getpass.getuser", unknown)
    with start_run("a run", {"stage": "data"}) as run:
        assert run.status == "RUNNING"


@pytest.mark.parametrize("asked", ["0", "False"])
def test_system_metrics_are_left_out_in_every_spelling(store, monkeypatch, asked):
    seen, start = {}, mlflow.start_run
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", asked)
    monkeypatch.setattr(mlflow, "start_run", lambda **given: seen.update(given) or start(**given))
    with start_run("a run", {"stage": "train"}, system_metrics=True):
        assert seen["log_system_metrics"] is False


def test_a_run_that_someone_nested_in_a_parent_is_no_expert(store):
    with start_run("parent", {"stage": "all"}) as parent, mlflow.start_run(nested=True):
        assert children_of(parent) == {}
