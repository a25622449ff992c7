"""Entry point `sweep`: a grid of experts, each a child run of the sweep's, run by Ray.

Ray decides which trial runs where and when. What is ours: which trials need not run at all,
which run a trial goes on with, and what the sweep's page says.
"""

import hashlib
import logging
import math
import os
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from longtail_experts.config import Config, ConfigError
from longtail_experts.data.sources import first_line
from longtail_experts.learning.rules import blocking
from longtail_experts.stages.checks import NotReadyError, cheap_findings, not_ready
from longtail_experts.stages.grid import Point, Sweep
from longtail_experts.stages.inputs import for_one_expert, load_dataset, resolve
from longtail_experts.stages.trial import Order, Outcome, run_trial
from longtail_experts.tracking import experts, sweeps
from longtail_experts.tracking.identity import code_sha256
from longtail_experts.tracking.interrupts import (
    HANG_UP,
    Terminated,
    delayed_signals,
    ignored_signals,
    raise_for,
)
from longtail_experts.tracking.patience import in_haste
from longtail_experts.tracking.recorder import local_folder
from longtail_experts.tracking.registry import register
from longtail_experts.tracking.runs import Run, RunError, one_process
from longtail_experts.tracking.stores import is_file_of_this_host, one_store, store_address
from longtail_experts.tracking.study import SPLITS_FOLLOW_FROM

log = logging.getLogger(__name__)

LOCAL = "local"
ATTEMPTS = 2  # at a trial that fails, or whose worker is lost
SHARE_OF_A_GPU = 1 / 3  # a ResNet-32 leaves most of one idle
PAGE_EVERY = 15.0  # seconds between two looks at what is running, and at the sweep's page
LISTENS_WITHIN = 10  # seconds
START_WITHIN = "180"  # seconds; Ray gives itself 30, which a busy machine does not keep
STOPPING = 60.0  # seconds in which trials told to stop write their checkpoints
OBJECT_STORE = 100 * 2**20  # bytes; configs and outcomes are all that is passed around
GOES_ON = "the same command goes on with this sweep"
NAMED = 5  # failed trials in the last line


class TrialsFailedError(RunError):
    """Some trials failed; the message names them."""


@dataclass
class Job:
    """A trial on its way: what is to be run, what the page says of it, how often it was tried."""

    config: Config
    trial: sweeps.Trial
    log: str
    attempts: int = 0
    went_on: bool = False  # the last attempt went on with an earlier run
    begin_afresh: bool = False


def run(sweep: Sweep, points: Sequence[Point], address: str) -> str:
    """All trials that are not finished yet; the run id of the sweep.

    Raises ConfigError, DataError or RunError before anything is started, and TrialsFailedError
    at the end where trials failed twice.
    """
    with ExitStack() as stack:
        if address == LOCAL:
            gpus = gpus_of_a_trial(sweep, points, torch.cuda.device_count())
            precision = what_auto_means(points[0].config)
        else:
            ray = stack.enter_context(cluster(address, sweep.cpus_per_trial))
            gpus = gpus_of_a_trial(sweep, points, ray.cluster_resources().get("GPU", 0))
            ask = ray.remote(num_cpus=sweep.cpus_per_trial, num_gpus=gpus)(what_auto_means)
            precision = value_of(ray, ask.remote(points[0].config))
        jobs = prepare(points, precision)
        sweep_sha256 = identity(jobs)
        experiment = sweeps.experiment_here()
        stack.enter_context(
            one_process(
                f"sweep {one_store(store_address())} {experiment} {sweep_sha256}",
                "another process is at this sweep already; wait for its end",
            )
        )
        existing = sweeps.find_sweep(experiment, sweep_sha256)
        look_up(jobs, sweeps.finished_experts(experiment), existing)
        left = [job for job in jobs if job.trial.state == "waiting"]
        register_finished(jobs)
        if existing:
            stack.enter_context(experts.launched_resuming_run(existing))
            if not left and existing.status == "FINISHED":
                registers = any(job.config.register_as for job in jobs)
                changed = f"nothing {'else ' if registers else ''}was changed"
                print(f"run {existing.run_id} is this sweep, finished; {changed}")
                return existing.run_id
            print(f"going on with run {existing.run_id}, which is this sweep")
        if left and address == LOCAL:
            stack.enter_context(cluster(LOCAL, sweep.cpus_per_trial))
        name = f"sweep {sweep.config} over {', '.join(sweep.grid)}"
        synthetic = any(job.config.source == "synthetic" for job in jobs)
        with sweeps.start_sweep_run(
            name, sweep.model_dump(), sweep_sha256, synthetic, existing
        ) as parent:
            parent.write_text("sweep.yaml", sweep.to_yaml())
            trials = [job.trial for job in jobs]
            try:
                drive(parent, jobs, left, sweep, gpus)
            except BaseException:  # which says more than a store that is away
                with in_haste(), suppress(Exception):
                    sweeps.record_trials(parent, trials)
                raise
            sweeps.record_trials(parent, trials)
            failed = [job for job in jobs if job.trial.state == "failed"]
            if failed:
                named = "; ".join(
                    f"{job.trial.label}: {job.trial.reason}" for job in failed[:NAMED]
                )
                more = f"; and {len(failed) - NAMED} more" if len(failed) > NAMED else ""
                raise TrialsFailedError(
                    f"{len(failed)} of {len(jobs)} trials failed twice: {named}{more}; the same "
                    "command tries them again"
                )
        with suppress(OSError):  # there is none, or it holds the log of a trial that was stopped
            local_folder(parent.run_id).rmdir()
    return parent.run_id


# --- before anything starts -------------------------------------------------------------------


def require_ray() -> None:
    if find_spec("ray") is None:
        raise ConfigError(
            'sweep: Ray is not installed; pip install -e ".[sweep]" (with mlflow run: '
            "--env-manager local, in that environment)"
        )


def gpus_of_a_trial(sweep: Sweep, points: Sequence[Point], num_gpus: float) -> float:
    """The share that a trial takes of a GPU; 0 where there is none, or where it is not to."""
    if sweep.gpus_per_trial is not None:
        if sweep.gpus_per_trial > num_gpus:
            raise ConfigError(
                f"gpus_per_trial={sweep.gpus_per_trial:g}: there are {num_gpus:g} GPUs; give less, "
                "or leave it out"
            )
        return sweep.gpus_per_trial
    uses_gpu = any(point.config.device != "cpu" for point in points)
    return SHARE_OF_A_GPU if num_gpus and uses_gpu else 0.0


def what_auto_means(config: Config) -> str:
    """The precision of a training by this process, where the config leaves it open."""
    return resolve(config.replace(precision="auto")).precision


def prepare(points: Sequence[Point], precision: str) -> list[Job]:
    """What is to be trained on which splits, checked as `preflight` checks one expert.

    precision=auto is decided once: a sweep never compares bf16 with fp32 by accident.
    """
    jobs: dict[int, Job] = {}
    by_data: dict[tuple, list[int]] = {}
    for number, point in enumerate(points):
        text = point.config.as_text()
        key = tuple(text[name] for name in ("data_dir", *SPLITS_FOLLOW_FROM))
        by_data.setdefault(key, []).append(number)
    warnings, checked, seen = {}, set(), {}
    for numbers in by_data.values():
        data = load_dataset(points[numbers[0]].config)
        for number in numbers:
            point = points[number]
            config = point.config
            if config.precision == "auto":
                config = config.replace(precision=precision)
            apart_from_seed = config.replace(seed=0)
            if config.preflight and apart_from_seed not in checked:
                checked.add(apart_from_seed)
                here = resolve(config.replace(device="auto"))  # a worker's may be another
                findings = cheap_findings(here, data, [local_folder("")])
                if blocking(findings):
                    raise NotReadyError(
                        f"{point.label}: {not_ready(findings)} (preflight=false starts it anyway)"
                    )
                for finding in findings:
                    if finding.verdict == "warning":
                        warnings.setdefault((finding.field, finding.value), finding.message)
            key = (for_one_expert(config, config.loss).sha256, data.splits.sha256)
            if key in seen:
                raise ConfigError(
                    f"grid: two trials are the same ({seen[key]}; {point.label}): leave one out"
                )
            seen[key] = point.label
            if config.data_dir is not None:
                config = config.replace(data_dir=os.path.abspath(config.data_dir))
            jobs[number] = Job(config, sweeps.Trial(point.fields, key), f"{number:05}.log")
    for (field, value), message in warnings.items():
        log.warning("%s=%s: %s", field, value, message)
    return [jobs[number] for number in sorted(jobs)]


def identity(jobs: Sequence[Job]) -> str:
    """Which sweep this is: its trials, whatever file or order names them, and the code."""
    lines = sorted(" ".join(job.trial.key) for job in jobs)
    return hashlib.sha256("\n".join([code_sha256(), *lines]).encode()).hexdigest()


def look_up(jobs: Sequence[Job], finished: Mapping[sweeps.Key, Any], existing: Run | None) -> None:
    """Say of each trial that is in the store where it is."""
    for job in jobs:
        if run_ := finished.get(job.trial.key):
            is_ours = existing and run_.data.tags.get("mlflow.parentRunId") == existing.run_id
            job.trial.state = "finished" if is_ours else "found"
            job.trial.run_id = run_.info.run_id
            job.trial.metrics = run_.data.metrics


def register_finished(jobs: Sequence[Job]) -> None:
    """What is not trained again is registered all the same, where that is asked for."""
    for job in jobs:
        if job.trial.run_id and job.config.register_as:
            register(Run(job.trial.run_id), job.config.register_as)


# --- Ray --------------------------------------------------------------------------------------


@contextmanager
def cluster(address: str, threads: int) -> Iterator[Any]:
    """Ray, started on this host for as long as the block lasts, or joined at `address`."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"  # it would send the whole folder along
    os.environ.setdefault("RAY_raylet_start_wait_time_s", START_WITHIN)
    options: dict[str, Any] = {}
    if address == LOCAL:
        # Read when Ray is imported. Ray's own name for it: listen on the loopback device only.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        options = {
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE,
            "_node_ip_address": "127.0.0.1",
        }
    import ray

    handler = signal.getsignal(signal.SIGTERM)
    # A lost terminal is ours to heed: processes that begin here ignore it.
    ours_alone = ignored_signals({HANG_UP}) if address == LOCAL else nullcontext()
    try:
        with ours_alone:
            require_listener(address)
            ray.init(
                address=address,
                runtime_env={"env_vars": environment_of_workers(threads)},
                log_to_driver=False,
                logging_level=logging.ERROR,
                **options,
            )
    except Exception as error:
        what, remedy = "Ray does not start", "see its logs in /tmp/ray/session_latest/logs"
        if address != LOCAL:
            what = "no Ray cluster answers there"
            remedy = "`ray start --head` starts one; RAY_AUTH_TOKEN must be the same here and there"
        raise ConfigError(f"address={address}: {what} ({first_line(error)}); {remedy}") from None
    finally:
        signal.signal(signal.SIGTERM, handler)  # Ray has put its own there
    try:
        require_room_for(ray, address, threads)
        yield ray
    finally:
        ray.shutdown()
        signal.signal(signal.SIGTERM, handler)


def require_listener(address: str) -> None:
    """OSError where nothing listens at an address of the form host:port; Ray would try for a
    quarter of an hour."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=LISTENS_WITHIN).close()


def environment_of_workers(threads: int) -> dict[str, str]:
    """This source, this cache, so many threads; settings of ours and of MLflow's, but for which
    run is filled, and for passwords: those a node has itself."""
    source = str(Path(__file__).resolve().parents[2])
    passed = {
        name: value
        for name, value in os.environ.items()
        if name in ("MLFLOW_DISABLE_TELEMETRY", "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING")
        or (name.startswith("LONGTAIL_") and name != "LONGTAIL_DATA_DIR")
    }
    return passed | {
        "PYTHONPATH": os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")])),
        "LONGTAIL_CACHE_DIR": os.path.abspath(os.environ.get("LONGTAIL_CACHE_DIR") or ".cache"),
        "OMP_NUM_THREADS": str(threads),
    }


def require_room_for(ray: Any, address: str, threads: int) -> None:
    """ConfigError where no node could ever take a trial; a warning where its runs would go to a
    store that only this host has."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    most = max(node["Resources"].get("CPU", 0) for node in nodes)
    if threads > most:
        raise ConfigError(f"cpus_per_trial={threads}: no node has more than {most:g} cores")
    hosts = {node["NodeManagerHostname"] for node in nodes} - {socket.gethostname()}
    store = store_address()
    if address != LOCAL and hosts and is_file_of_this_host(store):
        log.warning(
            "the store %s is a file: unless %s share it with this host, use a tracking server",
            store,
            ", ".join(sorted(hosts)),
        )


def value_of(ray: Any, ref: Any) -> Any:
    """What a task returned; what it raised."""
    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None


def drive(parent: Run, jobs: Sequence[Job], left: Sequence[Job], sweep: Sweep, gpus: float) -> None:
    """Hand every trial that is left to Ray, and those that fail or are lost once more.

    Whatever ends it early, the trials under way write their checkpoints first.
    """
    if not left:
        return
    import ray

    task = ray.remote(max_retries=0, num_cpus=sweep.cpus_per_trial, num_gpus=gpus)(run_trial)
    waiting, submitted = deque(left), {}
    at_once = sweep.trials_at_once or len(left)
    begun = sweeps.unfinished_trials(parent)
    page = Page(parent, jobs)
    with delayed_signals() as arrived, page, stopped_in_the_end(ray, parent, submitted):
        while waiting or submitted:
            while waiting and len(submitted) < at_once:
                job = waiting.popleft()
                submitted[task.remote(order_for(job, parent, begun, sweep))] = job
            ended, _ = ray.wait(list(submitted), timeout=1.0)
            for ref in ended:
                job = submitted.pop(ref)
                job.attempts += 1
                outcome = outcome_of(ray, ref)
                if not outcome.run_id and not arrived:
                    begun = sweeps.unfinished_trials(parent)
                conclude(job, outcome, parent, begun)
                if job.trial.state == "waiting":
                    page.say(f"{job.trial.label}: {job.trial.reason}; tried once more")
                    waiting.append(job)
                elif job.trial.state == "failed":
                    page.say(f"{job.trial.label}: failed again: {job.trial.reason}\n{outcome.tail}")
            if arrived:
                raise_for(arrived[0], GOES_ON)
            page.show()
    sweeps.reap_trials(parent)


def order_for(job: Job, parent: Run, begun: Mapping[str, Any], sweep: Sweep) -> Order:
    existing_id = None if job.begin_afresh else sweeps.newest(begun, job.trial.key)
    job.went_on = existing_id is not None
    return Order(
        config=job.config,
        splits_sha256=job.trial.key[1],
        parent_id=parent.run_id,
        existing_id=existing_id,
        threads=sweep.cpus_per_trial,
        log=job.log,
        environment=sweeps.environment_of_trials(parent),
    )


def outcome_of(ray: Any, ref: Any) -> Outcome:
    """What became of a trial; a worker that died with its node, for want of memory or by a signal
    is `stopped`, as if it had said so."""
    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        return Outcome(reason=first_line(error.cause))
    except ray.exceptions.RayError as error:
        return Outcome(reason=f"its worker was lost ({type(error).__name__})", stopped=True)


def conclude(job: Job, outcome: Outcome, parent: Run, begun: Mapping[str, Any]) -> None:
    """Finished; or to be tried once more: a trial that was stopped goes on with its run, one that
    failed too, but for a run that it had gone on with already; or failed for good."""
    trial = job.trial
    if outcome.run_id:
        trial.state, trial.run_id, trial.reason = "finished", outcome.run_id, ""
        trial.metrics = Run(outcome.run_id).metrics
        return
    trial.reason = outcome.reason
    trial.run_id = sweeps.newest(begun, trial.key)
    job.begin_afresh = job.went_on and not outcome.stopped
    trial.state = "waiting"
    if job.attempts >= ATTEMPTS:
        trial.state = "failed"
        if outcome.tail:
            parent.write_text(f"logs/{job.log}", outcome.tail)


@contextmanager
def stopped_in_the_end(ray: Any, parent: Run, submitted: Mapping[Any, Job]) -> Iterator[None]:
    """Where a signal or a failure ends the block, the trials under way end as KILLED, with a
    checkpoint; so they do where the store is away and nobody can say what became of them."""
    try:
        yield
    except BaseException as error:
        if submitted:
            print(f"\nstopping {len(submitted)} trials, within {STOPPING:.0f} s", file=sys.stderr)
            for ref in submitted:
                ray.cancel(ref)
            ray.wait(list(submitted), num_returns=len(submitted), timeout=STOPPING)
            with in_haste(), suppress(Exception, KeyboardInterrupt, Terminated):
                begun = sweeps.unfinished_trials(parent)
                for job in submitted.values():
                    job.trial.run_id = sweeps.newest(begun, job.trial.key)
                    job.trial.state = "stopped" if job.trial.run_id else "waiting"
        if not isinstance(error, Exception):
            error.args = (GOES_ON,)
        raise


class Page:
    """A context: trials done, running, failed and the time left, on the terminal and in the
    sweep's run."""

    def __init__(self, parent: Run, jobs: Sequence[Job]):
        self._parent, self._trials = parent, [job.trial for job in jobs]
        self._looked = self._shown = -math.inf
        self._recorded, self._is_behind = "", False

    def __enter__(self) -> "Page":
        self._bar = tqdm(
            total=len(self._trials),
            initial=self._num("finished", "found"),
            desc="sweep",
            unit="trial",
            dynamic_ncols=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def say(self, text: str) -> None:
        tqdm.write(text.rstrip(), file=sys.stderr)

    def show(self) -> None:
        now = time.monotonic()
        if now - self._looked > PAGE_EVERY:
            self._looked = now
            try:
                with in_haste():
                    self._look()
                self._is_behind = False
            except Exception as error:  # the trials go on whatever the page shows
                if not self._is_behind:
                    log.warning("the sweep's page is not up to date (%s)", first_line(error))
                self._is_behind = True
        self._bar.n = self._num("finished", "found", "failed")
        self._bar.set_postfix(
            running=self._num("running"), failed=self._num("failed"), refresh=False
        )
        if now - self._shown > (1 if sys.stderr.isatty() else 30):
            self._shown = now
            self._bar.refresh()

    def _look(self) -> None:
        running = sweeps.running_trials(self._parent)
        for trial in self._trials:
            if trial.state in ("waiting", "running"):
                is_running = trial.key[0] in running
                trial.state = "running" if is_running else "waiting"
                trial.run_id = running.get(trial.key[0], trial.run_id)
        states = " ".join(f"{trial.state} {trial.run_id}" for trial in self._trials)
        if states != self._recorded:
            self._recorded = states
            sweeps.record_trials(self._parent, self._trials)

    def _num(self, *states: str) -> int:
        return sum(trial.state in states for trial in self._trials)
