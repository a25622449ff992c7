"""Trainings in processes of their own, to be killed; and what they left in the store."""

import contextlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import use_blank_figures
from mlflow import MlflowClient

from longtail_experts.learning import resnet

# A server that has imported everything forks each training: milliseconds where a start from
# nothing takes eight seconds. It runs no OpenMP region itself, which would not survive a fork.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    [
        "longtail_experts.stages.main",
        "longtail_experts.cli",
        "matplotlib.pyplot",
        "mlflow.store.tracking.sqlalchemy_store",
        "torch._dynamo",  # which the first optimiser imports
    ]
)
# Seconds until a test is taken to hang: a matter of the machine, never a claim about ours.
PATIENCE = float(os.environ.get("LONGTAIL_TEST_PATIENCE", "300"))
TIMED = {"train/images_per_second", "peak_memory_bytes"}  # these differ between equal runs


def _work(
    arguments: list[str], environment: dict[str, str], folder: str, log: str, blocks: int
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from longtail_experts.cli import main

    resnet.BLOCKS_PER_STAGE = blocks
    use_blank_figures(pytest.MonkeyPatch())
    code = main(arguments)
    sys.stdout.flush()
    os._exit(code)


class Training:
    """One command of ours, in a process of its own and with its output in a file."""

    def __init__(self, folder: Path, arguments: list[str], **environment: str):
        self.log = folder / f"training-{time.monotonic_ns()}.log"
        self.process = PROCESSES.Process(
            target=_work,
            args=(
                arguments,
                {**os.environ, **environment},
                str(folder),
                str(self.log),
                resnet.BLOCKS_PER_STAGE,
            ),
            daemon=True,  # a failed test leaves none behind
        )
        self.process.start()

    def kill(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself
            os.kill(self.process.pid, number)

    def wait(self, seconds: float = PATIENCE) -> int:
        """The exit code (negative: the signal that ended it)."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"still running after {seconds} s:\n{self.output}")
        return self.process.exitcode

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""


def wait_until(condition: Callable[[], object], seconds: float = PATIENCE, what: str = "") -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.02)


def journal_lines(folder: Path) -> int:
    """Points that trainings below `folder` have recorded on the local disk."""
    return sum(p.read_bytes().count(b"\n") for p in folder.glob(".cache/runs/*/points.jsonl"))


def all_runs(experiment: str = "tests") -> list:
    """The newest first."""
    client = MlflowClient()
    found = client.get_experiment_by_name(experiment)
    return client.search_runs([found.experiment_id], max_results=1000) if found else []


def training_runs(experiment: str = "tests") -> list:
    return [run for run in all_runs(experiment) if run.data.tags.get("stage") in ("main", "train")]


def history(run_id: str) -> dict[str, list[tuple[int, float | None]]]:
    """(step, value) of every metric, in order of steps; a duplicate would show twice."""
    client = MlflowClient()
    names = client.get_run(run_id).data.metrics
    return {
        name: sorted(
            (point.step, None if name in TIMED else point.value)
            for point in client.get_metric_history(run_id, name)
        )
        for name in names
    }


def of_reference(
    three_experts: dict[str, str], read: Callable[[str], Any], loss: str = "ce"
) -> Any:
    """What `read` finds of an expert of the finished `main loss=all`, in that one's store."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{three_experts['folder']}/mlflow.db")
        return read(three_experts[loss])


def last_checkpoint(run_id: str) -> dict:
    path = MlflowClient().download_artifacts(run_id, "checkpoints/last.pt")
    return torch.load(path, weights_only=True)


def assert_same_training(run_id: str, other: str) -> None:
    """Bit-identical weights and the same metric points, none missing and none twice."""
    ours, theirs = last_checkpoint(run_id)["model"], last_checkpoint(other)["model"]
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    ours, theirs = history(run_id), history(other)
    assert ours.keys() == theirs.keys()
    for name, points in theirs.items():
        assert ours[name] == points, name
