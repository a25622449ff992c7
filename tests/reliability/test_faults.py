"""A store that is away, locked or full; a disk that is; an artifact root that is not there."""

import errno
import os
import shutil
import sqlite3
import threading
import time
from pathlib import Path

import mlflow
import pytest
import requests
import torch
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from reliability.harness import wait_until

from longtail_experts.cli import main
from longtail_experts.tracking import patience
from longtail_experts.tracking import recorder as recorders
from longtail_experts.tracking.patience import is_transient, patiently
from longtail_experts.tracking.recorder import (
    Recorder,
    UndeliveredError,
    deliver_left_over,
    local_folder,
    read_points,
)
from longtail_experts.tracking.runs import Run, RunError, start_run


@pytest.fixture
def run(store) -> Run:
    return Run(mlflow.MlflowClient().create_run("0").info.run_id)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(patience, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr("longtail_experts.tracking.recorder.FIRST_PAUSE", 0.01)


def away_for(calls: int, method):
    """`method`, but the first `calls` calls find no server."""
    left = [calls]

    def call(*args, **kwargs):
        if left[0]:
            left[0] -= 1
            raise MlflowException("API request to /log-batch failed with exception: refused")
        return method(*args, **kwargs)

    return call


def checkpoint(step: int) -> dict:
    return {"model": {"w": torch.full((1000,), float(step))}, "epoch": 0, "step": step}


# --- delivery -----------------------------------------------------------------------------------


def test_points_wait_for_the_store_and_arrive_in_order(run, monkeypatch, caplog):
    monkeypatch.setattr(run, "log_metric_points", away_for(3, run.log_metric_points))
    with Recorder(run) as recorder:
        for step in range(50):
            recorder.log_points([("train/loss", step / 7, step)])
        assert len(read_points(recorder.folder / "points.jsonl")) == 50
        recorder.finish(20)
    assert run.history("train/loss") == [(step, step / 7) for step in range(50)]
    said = [record.message for record in caplog.records]
    assert len([m for m in said if "training goes on" in m]) == 1
    assert len([m for m in said if "is back" in m]) == 1


def test_an_answer_that_got_lost_makes_no_duplicate(run, monkeypatch):
    send = run.log_metric_points
    lost = [True]

    def taken_but_not_confirmed(points, wait):
        send(points, wait)
        if lost.pop() if lost else False:
            raise requests.ConnectionError("reset by peer")

    monkeypatch.setattr(run, "log_metric_points", taken_but_not_confirmed)
    with Recorder(run) as recorder:
        recorder.log_points([("lr", 0.1, 0), ("lr", 0.2, 1)])
        recorder.finish(20)
    assert run.history("lr") == [(0, 0.1), (1, 0.2)]


def test_what_is_never_delivered_is_kept_and_delivered_later(run, monkeypatch):
    monkeypatch.setattr(run, "log_metric_points", away_for(10**9, None))
    with Recorder(run) as recorder:
        recorder.log_points([("train/loss", 1.5, 7), ("lr", 0.1, 7)])
        with pytest.raises(UndeliveredError, match=f"2 points.*-P resume={run.run_id}"):
            recorder.finish(0.1)
    fresh = Run(run.run_id)
    assert deliver_left_over(fresh) == 2
    assert deliver_left_over(fresh) == 0
    assert fresh.history("train/loss") == [(7, 1.5)]


def test_a_line_cut_off_by_a_crash_harms_no_other(run):
    folder = local_folder(run.run_id)
    folder.mkdir(parents=True)
    (folder / "points.jsonl").write_text('["lr", 0.5, 3, 1000]\n["lr", 0.25, 4, 10')
    with Recorder(run) as recorder:
        recorder.recall([])
        recorder.log_points([("lr", 0.25, 4), ("lr", 0.5, 3)])
        kept = read_points(recorder.folder / "points.jsonl")
        assert [point[:3] for point in kept] == [("lr", 0.5, 3), ("lr", 0.25, 4)]
        recorder.finish(20)
    assert run.history("lr") == [(3, 0.5), (4, 0.25)]


def test_a_checkpoint_is_on_the_disk_before_it_takes_the_place_of_another(run, monkeypatch):
    fsync, replace, done = os.fsync, os.replace, []

    def noted_fsync(number):
        done.append(("fsync", Path(f"/proc/self/fd/{number}").resolve().name))
        fsync(number)

    def noted_replace(source, target):
        done.append((Path(source).name, Path(target).name))
        replace(source, target)

    monkeypatch.setattr(run, "upload", lambda *_, **__: None)
    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    with Recorder(run) as recorder:
        for step in (1, 2):
            recorder.save_checkpoint("last", checkpoint(step))
    first = [("fsync", "last.tmp"), ("last.tmp", "last.pt")]
    assert done == [*first, first[0], ("last.pt", "previous.pt"), first[1]]


@pytest.mark.parametrize(("here", "stored"), [(5, 9), (9, 5)])
def test_the_newest_checkpoint_is_gone_on_with_wherever_it_is(run, here, stored):
    with Recorder(run) as recorder:
        recorder.save_checkpoint("last", checkpoint(stored))
        recorder.finish(20)
        torch.save(checkpoint(here), recorder.folder / "last.pt")
        assert recorder.latest()["step"] == 9


def test_checkpoints_are_sent_seldom_where_sending_is_slow_but_the_last_one_always(
    run, monkeypatch
):
    upload, sent = run.upload, []

    def slow_upload(*args, **kwargs):
        sent.append(time.monotonic())
        time.sleep(0.05)
        upload(*args, **kwargs)

    monkeypatch.setattr(run, "upload", slow_upload)
    with Recorder(run) as recorder:
        for step in range(20):
            recorder.save_checkpoint("last", checkpoint(step))
            time.sleep(0.01)
        recorder.finish(20)
    assert len(sent) <= 3  # 0.2 s of saving, of which 2 % may be spent; and the last
    stored = torch.load(run.client.download_artifacts(run.run_id, "checkpoints/last.pt"))
    assert stored["step"] == 19


def test_points_are_sent_seldom_where_sending_takes_long_but_all_are_sent_at_the_end(
    run, monkeypatch
):
    """Where a thread sends all the time, steps of a GPU wait for Python's lock."""
    send, sent = run.log_metric_points, []

    def counted(points, **kwargs):
        send(points, **kwargs)
        sent.append(len(points))

    monkeypatch.setattr(run, "log_metric_points", counted)
    monkeypatch.setattr(recorders, "SENDING_SHARE", 1e-9)  # others gather without an end
    monkeypatch.setattr(recorders, "LONGEST_GATHERING", 1000.0)
    monkeypatch.setattr(recorders, "BATCH", 10)
    with Recorder(run) as recorder:
        recorder.log_points([("lr", 0.1, 0)])
        wait_until(lambda: sent == [1])
        for step in range(1, 24):
            recorder.log_points([("lr", 0.1, step)])  # as many as are sent at once: no more wait
        wait_until(lambda: len(sent) == 3)
        recorder.finish(20)  # does not wait for others to gather
    assert sent == [1, 10, 10, 3]
    assert [step for step, _ in run.history("lr")] == list(range(24))


@pytest.mark.parametrize("artifacts_are_away", [False, True])
def test_points_that_never_end_and_checkpoints_are_sent_in_turn(
    run, monkeypatch, artifacts_are_away
):
    """As those of epochs that take less time than it takes to send their points."""
    send, upload, calls = run.log_metric_points, run.upload, []

    def more_points(points, **kwargs):
        calls.append("points")
        if len(calls) == 1:
            recorder.save_checkpoint("last", checkpoint(0))
        if len(calls) < 20:
            recorder.log_points([("lr", 0.1, len(calls))])
        send(points, **kwargs)

    def noted(*args, **kwargs):
        calls.append("checkpoint")
        if artifacts_are_away and len(calls) < 20:
            raise OSError(errno.EHOSTUNREACH, "no route")
        upload(*args, **kwargs)

    monkeypatch.setattr(run, "log_metric_points", more_points)
    monkeypatch.setattr(run, "upload", noted)
    monkeypatch.setattr(recorders, "LONGEST_GATHERING", 0.0)
    monkeypatch.setattr(recorders, "LONGEST_PAUSE", 0.0)
    with Recorder(run) as recorder:
        recorder.log_points([("lr", 0.1, 0)])
        recorder.finish(20)
    assert calls[:3] == ["points", "checkpoint", "points"]
    assert (calls[3] == "checkpoint") == artifacts_are_away
    assert torch.load(run.client.download_artifacts(run.run_id, "checkpoints/last.pt"))["step"] == 0


def test_a_checkpoint_replaced_while_it_is_sent_is_sent_again_whole(run, monkeypatch):
    upload, seen = run.upload, []

    def replaced_meanwhile(local, *args, **kwargs):
        if not seen:
            recorder.save_checkpoint("best", checkpoint(2))
        seen.append(torch.load(local)["step"])
        upload(local, *args, **kwargs)

    monkeypatch.setattr(run, "upload", replaced_meanwhile)
    with Recorder(run) as recorder:
        recorder.save_checkpoint("best", checkpoint(1))
        recorder.finish(20)
    assert seen == [1, 2]
    assert torch.load(run.client.download_artifacts(run.run_id, "checkpoints/best.pt"))["step"] == 2


def test_two_processes_cannot_fill_one_run(run):
    with (
        Recorder(run),
        pytest.raises(RunError, match="another process is training it"),
        Recorder(run),
    ):
        pass


# --- waiting ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "transient"),
    [
        (MlflowException("(sqlite3.OperationalError) database is locked"), True),
        (MlflowException("API request to http://x failed with exception HTTPConnectionPool"), True),
        (MlflowException("API request failed with error code 503 != 200"), True),
        (MlflowException("the database system is starting up"), True),
        (MlflowException("Run with id=abc not found"), False),
        (MlflowException("(sqlite3.OperationalError) database or disk is full"), False),
        (requests.ConnectionError("refused"), True),
        (requests.Timeout("30 s"), True),
        (ConnectionResetError(), True),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (ValueError("a bug"), False),
    ],
)
def test_what_passes_by_itself_is_told_from_what_does_not(error, transient):
    assert is_transient(error) is transient


def test_waiting_ends_with_the_answer_or_with_the_patience():
    assert patiently(away_for(2, lambda: "here"), 20) == "here"
    with pytest.raises(MlflowException, match="failed with exception"):
        patiently(away_for(10**9, None), 0.05)
    calls = []
    with pytest.raises(ZeroDivisionError):
        patiently(lambda: calls.append(1) or 1 / 0, 20)
    assert len(calls) == 1


@pytest.mark.slow
def test_a_database_locked_for_half_a_minute_is_waited_for(run, store):
    """SQLite gives up after 20 s by itself."""
    locked = sqlite3.connect(store / "mlflow.db", check_same_thread=False)
    locked.execute("BEGIN EXCLUSIVE")
    release = threading.Timer(26, locked.rollback)
    release.start()
    started = time.monotonic()
    run.log_metrics({"lr": 0.5}, 3)
    assert time.monotonic() - started > 20
    assert run.history("lr") == [(3, 0.5)]
    release.join()


# --- disks --------------------------------------------------------------------------------------


def test_a_disk_too_small_is_said_before_training(store, tiny_arguments, monkeypatch, capfd):
    usage = shutil.disk_usage(store)._replace(free=5_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert main(["train", "--loss", "ce", *tiny_arguments]) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert "5 MB free, and the run writes about" in error
    assert "make room first" in error


def test_a_disk_that_fills_up_leaves_the_checkpoint_before(run, monkeypatch):
    with Recorder(run) as recorder:
        recorder.save_checkpoint("last", checkpoint(1))
        save = torch.save

        def full(content, path):
            save(content, path)
            path.write_bytes(path.read_bytes()[:100])
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(torch, "save", full)
        with pytest.raises(RunError, match=r"No space left.*-P resume="):
            recorder.save_checkpoint("last", checkpoint(2))
        assert recorder.latest()["step"] == 1
        assert not list(recorder.folder.glob("*.tmp"))


# --- artifact roots -----------------------------------------------------------------------------


def test_a_journal_that_cannot_grow_is_said_and_leaves_the_run_to_the_next(run):
    def fill() -> None:
        with Recorder(run) as recorder, Path("/dev/full").open("w") as full:
            os.dup2(full.fileno(), recorder._file.fileno())
            recorder.log_points([("lr", 0.1, 0)])

    with pytest.raises(RunError, match="No space left"):
        fill()
    with Recorder(run):
        pass


def test_a_checkpoint_is_sent_from_a_disk_without_hard_links(run, monkeypatch):
    def refused(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    with Recorder(run) as recorder:
        recorder.save_checkpoint("last", checkpoint(3))
        recorder.finish(20)
    stored = torch.load(run.client.download_artifacts(run.run_id, "checkpoints/last.pt"))
    assert stored["step"] == 3


def test_an_artifact_root_that_cannot_be_written_is_said_before_training(
    store, tiny_arguments, monkeypatch, capfd
):
    (store / "occupied").write_text("a file, not a folder")
    MlflowClient().create_experiment("elsewhere", str(store / "occupied" / "artifacts"))
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "elsewhere")
    assert main(["train", "--loss", "ce", *tiny_arguments]) == 2
    assert "cannot be written" in capfd.readouterr().err.splitlines()[-1]


def test_a_folder_that_was_moved_is_noticed_before_training(
    store, tiny_arguments, monkeypatch, capfd, tmp_path_factory
):
    gone = tmp_path_factory.mktemp("gone") / "mlruns"
    MlflowClient().create_run(MlflowClient().create_experiment("moved", str(gone)))
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "moved")
    with start_run("the first to need the folder", {}):
        assert gone.exists()
    shutil.rmtree(gone)
    assert main(["train", "--loss", "ce", *tiny_arguments]) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert f"keeps its artifacts in {gone}, which is gone" in error
    assert not Path(gone).exists()
