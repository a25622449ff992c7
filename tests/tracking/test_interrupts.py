"""Signals noted in a block, and acted on after it or by threads that train beside each other."""

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import sqlalchemy
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from reliability.harness import all_runs

from longtail_experts.tracking import interrupts, patience
from longtail_experts.tracking.interrupts import (
    Terminated,
    delayed_signals,
    heed,
    stop_if_heeded,
)
from longtail_experts.tracking.patience import patiently
from longtail_experts.tracking.recorder import Recorder
from longtail_experts.tracking.runs import Run, start_run

LONG = 600  # seconds: a test that took as long would be taken to hang


@pytest.fixture(autouse=True)
def sigint_is_heard():
    """Whatever these tests were started from: in a script's background it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def in_a_thread(work):
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(work).result()


def test_a_thread_acts_on_what_the_main_thread_noted():
    def work(arrived):
        heed(arrived)
        with delayed_signals() as seen:
            os.kill(os.getpid(), signal.SIGTERM)
            threading.Event().wait(0.2)  # the main thread waits for this one, and notes
            assert seen == [signal.SIGTERM]
        stop_if_heeded("at step 3")

    with pytest.raises(Terminated, match="at step 3"), delayed_signals() as arrived:
        in_a_thread(lambda: work(arrived))


def test_a_thread_still_stops_when_the_main_thread_has_left_its_block(monkeypatch):
    """As after a second Ctrl-C, which does not wait."""
    monkeypatch.setattr(interrupts, "SAME_PRESS", 0.0)
    begun, left = threading.Event(), threading.Event()

    def work(arrived):
        heed(arrived)
        begun.set()
        assert left.wait(60)
        with delayed_signals() as seen:
            return list(seen)

    def is_left_at_the_second(threads):
        with delayed_signals() as arrived:
            started.append(threads.submit(work, arrived))
            assert begun.wait(60)
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    started = []
    with ThreadPoolExecutor(1) as threads:
        with pytest.raises(KeyboardInterrupt):
            is_left_at_the_second(threads)
        left.set()
        assert started[0].result() == [signal.SIGINT]


def test_a_thread_that_was_told_nothing_heeds_nothing():
    def work():
        stop_if_heeded("never")
        with delayed_signals() as seen:
            return list(seen)

    def with_a_signal_noted():
        with delayed_signals() as arrived:
            arrived.append(signal.SIGTERM)
            assert in_a_thread(work) == []

    with pytest.raises(Terminated):
        with_a_signal_noted()


def test_outside_such_threads_nothing_stops():
    stop_if_heeded("never")


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_a_block_within_another_leaves_it_to_that_one():
    reached = []

    def outer():
        with delayed_signals() as arrived:
            with delayed_signals():
                interrupt()
            reached.append(list(arrived))

    with pytest.raises(KeyboardInterrupt):
        outer()
    assert reached == [[signal.SIGINT]]
    with delayed_signals() as afresh:
        assert afresh == []


def test_one_press_that_arrives_twice_does_not_cut_the_step_off():
    """From the terminal, and from a launcher that passes it on."""
    reached = []

    def step():
        with delayed_signals():
            interrupt()
            interrupt()
            reached.append("its end")

    with pytest.raises(KeyboardInterrupt):
        step()
    assert reached == ["its end"]


def test_a_failure_does_not_make_a_signal_forgotten():
    """Who catches failures, to go on with another expert, shall not catch that."""

    def fails():
        with delayed_signals():
            interrupt()
            raise OSError("no space left")

    with pytest.raises(KeyboardInterrupt, match="no space left"):
        fails()


def test_a_signal_that_is_ignored_stays_ignored():
    """As in a script's background process, which Ctrl-C in that terminal is to spare."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with delayed_signals() as arrived:
        interrupt()
        assert arrived == []
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_a_call_of_the_store_is_ended_before_a_signal_is_raised():
    calls = []

    def call():
        interrupt()
        calls.append("ended")

    with pytest.raises(KeyboardInterrupt):
        patiently(call, 20)
    assert calls == ["ended"]


def test_a_store_that_is_away_is_not_called_again_after_a_signal(monkeypatch):
    monkeypatch.setattr(patience, "FIRST_PAUSE", 0.01)
    calls = []

    def away():
        interrupt()
        calls.append("refused")
        raise MlflowException("connection refused")

    with pytest.raises(KeyboardInterrupt):
        patiently(away, 20)
    assert calls == ["refused"]


def told(work):
    """`work` in a thread that is to heed a SIGTERM, which has been noted."""

    def heeds():
        heed([signal.SIGTERM])
        return work()

    return in_a_thread(heeds)


def away():
    raise MlflowException("API request to /log-batch failed with exception: refused")


def test_a_thread_told_to_stop_does_not_wait_for_a_store_that_is_away():
    with pytest.raises(Terminated):
        told(lambda: patiently(away, LONG))


def test_a_thread_told_to_stop_still_waits_where_it_ends_its_run(monkeypatch):
    monkeypatch.setattr(patience, "FIRST_PAUSE", 0.01)
    left = [3]

    def away_for_a_while():
        left[0] -= 1
        return away() if left[0] else "ended"

    assert told(lambda: patiently(away_for_a_while, LONG, heeds=False)) == "ended"


def test_a_thread_told_to_stop_does_not_wait_for_its_points_to_be_taken(store, monkeypatch):
    run = Run(MlflowClient().create_run("0").info.run_id)
    monkeypatch.setattr(run, "log_metric_points", lambda *_, **__: away())
    with Recorder(run) as recorder:
        recorder.log_points([("lr", 0.1, 0)])
        with pytest.raises(Terminated, match=f"-P resume={run.run_id}"):
            told(lambda: recorder.finish(LONG))


def test_a_run_interrupted_in_any_query_ends_as_killed(store):
    """SQLAlchemy cut off in the middle of one keeps its lock on SQLite, for this process as well,
    which then could not write how the run ended."""
    left = 0

    def count_down(*_):
        nonlocal left
        left -= 1
        if left == 0:
            interrupt()

    def work():
        with start_run("x", {"stage": "train"}) as run:
            run.set_tags({"a": "b"})
            run.log_metrics({"m": 1.0}, 3)
            run.log_params({"p": "q"})

    sqlalchemy.event.listen(sqlalchemy.Engine, "after_cursor_execute", count_down)
    try:
        work()  # the first of a process has others
        left = 0
        work()
        num_queries = -left
        for number in range(1, num_queries + 1, 3):
            left = number
            with pytest.raises(KeyboardInterrupt):
                work()
    finally:
        sqlalchemy.event.remove(sqlalchemy.Engine, "after_cursor_execute", count_down)
    ended = [run.info.status for run in all_runs()]
    assert len(ended) == 2 + len(range(1, num_queries + 1, 3))
    assert set(ended) == {"KILLED", "FINISHED"}  # the latter where it was on its way out
    assert ended.count("FINISHED") < 10
