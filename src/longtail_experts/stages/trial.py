"""One trial of a sweep, in a Ray worker: an ordinary expert run, a child of the sweep's."""

import os
import signal
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from longtail_experts.config import Config
from longtail_experts.data.addresses import without_passwords
from longtail_experts.data.sources import first_line
from longtail_experts.learning.step import NonFiniteLossError
from longtail_experts.stages.inputs import load_dataset, resolve
from longtail_experts.stages.main import run_one
from longtail_experts.tracking import sweeps
from longtail_experts.tracking.interrupts import raise_terminated
from longtail_experts.tracking.recorder import local_folder
from longtail_experts.tracking.runs import Run, RunError

TAIL = 4000  # characters of a log that go with a failure


@dataclass(frozen=True)
class Order:
    """What a worker needs to know."""

    config: Config
    splits_sha256: str
    parent_id: str
    existing_id: str | None  # the run to go on with
    threads: int
    log: str  # file name
    environment: Mapping[str, str]  # where runs go


@dataclass(frozen=True)
class Outcome:
    run_id: str | None = None
    reason: str = ""  # why it failed or was stopped, in one line
    tail: str = ""  # of its output, where it failed
    stopped: bool = False  # by a signal


def run_trial(order: Order) -> Outcome:
    """Train and calibrate; whatever happens comes back as a value, so that the worker stays.

    Ray cancels a task by SIGINT's handler, at which training writes a checkpoint and its run
    ends as KILLED, as on Ctrl-C.
    """
    sweeps.enter_store(order.environment)
    torch.set_num_threads(order.threads)
    log = local_folder(order.parent_id) / order.log
    log.parent.mkdir(parents=True, exist_ok=True)
    before = {
        signal.SIGTERM: signal.signal(signal.SIGTERM, raise_terminated),
        signal.SIGINT: signal.signal(signal.SIGINT, signal.default_int_handler),
    }
    try:
        with output_in(log):
            try:
                outcome = Outcome(run_id=_run(order))
            except Exception as error:
                if isinstance(error, NonFiniteLossError | RunError):
                    print(f"error: {error}", file=sys.stderr)
                else:
                    traceback.print_exc()
                return Outcome(reason=first_line(error), tail=tail_of(log))
            except BaseException as stop:
                print(f"stopped: {stop}", file=sys.stderr)
                return Outcome(reason=first_line(stop), stopped=True)
        log.unlink(missing_ok=True)
        return outcome
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run(order: Order) -> str:
    config = resolve(order.config)
    data = load_dataset(config)
    if data.splits.sha256 != order.splits_sha256:
        raise RunError(
            f"data_dir={config.data_dir}: holds other images on this host (splits "
            f"{data.splits.sha256[:12]}, not {order.splits_sha256[:12]})"
        )
    existing = order.existing_id and Run(order.existing_id)
    if existing:
        sweeps.wait_until_left(existing)
    return run_one(config, data, config.loss, Run(order.parent_id), existing or None)


@contextmanager
def output_in(path: Path) -> Iterator[None]:
    """Whatever the process prints, of any language, goes to the end of a file, for its owner alone:
    MLflow prints addresses, with passwords."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    saved = [os.dup(1), os.dup(2)]
    try:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(file, 1)
        os.dup2(file, 2)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, copy in enumerate(saved, 1):
            os.dup2(copy, number)
            os.close(copy)
        os.close(file)


def tail_of(path: Path) -> str:
    sys.stderr.flush()
    return without_passwords(path.read_text(encoding="utf-8", errors="replace"))[-TAIL:]
