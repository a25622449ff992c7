"""A training killed at random moments and resumed equals the one that was left alone."""

import os
import random
import signal
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
from mlflow import MlflowClient
from reliability.harness import (
    Training,
    assert_same_training,
    history,
    journal_lines,
    training_runs,
    wait_until,
)

from longtail_experts.tracking.processes import is_alive

pytestmark = pytest.mark.slow
KILLS = int(os.environ.get("LONGTAIL_KILLS", "5"))
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
EXIT_CODES = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}


@pytest.fixture
def arguments(tiny_arguments) -> list[str]:
    changed = {"epochs": 6, "milestones": 4, "checkpoint_every": 3, "batch_size": 8}
    return [*tiny_arguments, *(f"--{name}={value}" for name, value in changed.items())]


@pytest.fixture
def undisturbed(store, arguments) -> tuple[str, int]:
    """The run id of a training left alone, and how many points it recorded."""
    training = Training(store, ["train", "--loss", "ce", *arguments])
    assert training.wait() == 0, training.output
    (run,) = training_runs()
    run_id = run.info.run_id
    return run_id, sum(map(len, history(run_id).values()))


class Killed(NamedTuple):
    """A training that got a signal at a random moment, and was resumed if that ended it."""

    run_id: str
    was_hit: bool  # False: it was faster than the signal
    seconds_to_end: float


def kill_and_resume(store, arguments, number: int, draw: random.Random, num_points: int) -> Killed:
    known = {run.info.run_id for run in training_runs()}
    training = Training(store, ["train", "--loss", "ce", *arguments])

    def new_runs() -> list:
        return [run for run in training_runs() if run.info.run_id not in known]

    wait_until(lambda: [run for run in new_runs() if "num_parameters" in run.data.params])
    after, pause = draw.randrange(num_points), draw.uniform(0, 0.3)
    wait_until(lambda: journal_lines(store) >= after or training.process.exitcode is not None)
    time.sleep(pause)
    training.kill(number)
    killed_at = time.monotonic()
    code = training.wait()
    seconds = time.monotonic() - killed_at
    (run,) = new_runs()
    run_id = run.info.run_id
    if run.info.status == "FINISHED":
        return Killed(run_id, False, seconds)
    assert code == EXIT_CODES[number], training.output
    if number != signal.SIGKILL:
        assert run.info.status == "KILLED", training.output
        assert f"-P resume={run_id} goes on from there" in training.output, training.output
    resumed = Training(store, ["train", "--resume", run_id])
    assert resumed.wait() == 0, resumed.output
    return Killed(run_id, True, seconds)


def test_killed_and_resumed_equals_undisturbed(store, undisturbed, arguments, capsys):
    reference, num_points = undisturbed
    draw = random.Random(20261122)
    hit: dict[int, list[float]] = {number: [] for number in SIGNALS}
    while sum(map(len, hit.values())) < KILLS:
        number = min(SIGNALS, key=lambda n: len(hit[n]))
        killed = kill_and_resume(store, arguments, number, draw, num_points)
        assert MlflowClient().get_run(killed.run_id).info.status == "FINISHED"
        assert_same_training(killed.run_id, reference)
        if killed.was_hit:
            hit[number].append(killed.seconds_to_end)
        with capsys.disabled():
            print(f"\n{summary(hit)}", end="", flush=True)


def summary(hit: dict[int, list[float]]) -> str:
    """How many trainings each signal ended, and how long that took."""
    parts = [
        f"{len(seconds)} {signal.Signals(number).name} (ended within {max(seconds):.1f} s)"
        for number, seconds in hit.items()
        if seconds
    ]
    return f"{', '.join(parts)}: weights bit-identical, no point missing or twice"


def test_a_run_killed_again_and_again_still_ends_the_same(store, undisturbed, arguments):
    reference, num_points = undisturbed
    known = {run.info.run_id for run in training_runs()}
    training = Training(store, ["train", "--loss", "ce", *arguments])
    wait_until(lambda: journal_lines(store))
    (run_id,) = {run.info.run_id for run in training_runs()} - known
    for part, number in enumerate((signal.SIGTERM, signal.SIGKILL, signal.SIGINT), start=1):
        wait_until(lambda part=part: journal_lines(store) > num_points * part / 4)
        training.kill(number)
        assert training.wait() == EXIT_CODES[number], training.output
        training = Training(store, ["train", "--resume", run_id])
    assert training.wait() == 0, training.output
    assert_same_training(run_id, reference)


def stop_between_writes(training: Training, store: Path) -> None:
    """SIGSTOP at a moment when the training does not hold the lock of the SQLite store."""
    while True:
        training.kill(signal.SIGSTOP)
        with closing(sqlite3.connect(store / "mlflow.db", timeout=0.5)) as database:
            try:
                database.execute("BEGIN EXCLUSIVE")
                return
            except sqlite3.OperationalError:
                training.kill(signal.SIGCONT)


def test_a_run_cut_off_is_offered_and_reaped(store, arguments):
    training = Training(store, ["train", "--loss", "ce", *arguments])
    wait_until(lambda: journal_lines(store) > 12)
    stop_between_writes(training, store)  # alive, but it shall not be done before we are
    (run,) = training_runs()
    run_id = run.info.run_id

    busy = Training(store, ["train", "--resume", run_id])
    assert busy.wait() == 2
    assert "of this host is filling it" in busy.output
    calibration = Training(store, ["calibrate", "--run_id", run_id])
    assert calibration.wait() == 2
    assert "of this host is filling it" in calibration.output
    alive = Training(store, ["reap"])
    assert alive.wait() == 0
    assert "no run of this host" in alive.output
    assert MlflowClient().get_run(run_id).info.status == "RUNNING"

    training.kill(signal.SIGKILL)
    assert training.wait() == EXIT_CODES[signal.SIGKILL], training.output
    assert not psutil.pid_exists(training.process.pid)
    assert MlflowClient().get_run(run_id).info.status == "RUNNING"
    short = [*arguments, "--epochs=1"]
    next_one = Training(store, ["train", "--loss", "ce", *short])
    assert next_one.wait() == 0
    offered = f"run {run_id} (ce images seed 0) was cut off on this host"
    tags = MlflowClient().get_run(run_id).data.tags
    assert offered in next_one.output, f"{tags}\nalive: {is_alive(tags)}\n{next_one.output}"

    reaping = Training(store, ["reap"])
    assert reaping.wait() == 0
    assert f"-P resume={run_id}" in reaping.output
    assert MlflowClient().get_run(run_id).info.status == "FAILED"
    before = history(run_id)
    assert before["train/loss"]

    resumed = Training(store, ["train", "--resume", run_id])
    assert resumed.wait() == 0, resumed.output
    assert len(history(run_id)["train/loss"]) == 6
    again = Training(store, ["train", "--resume", run_id])
    assert again.wait() == 0
    assert "is finished already" in again.output
