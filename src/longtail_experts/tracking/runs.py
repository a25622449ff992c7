"""One MLflow run: opened, written to, read from.

Nothing here sets a tracking URI or an experiment: a run goes where MLflow was told, or to
MLflow's own default, and `mlflow run` has already created the one that we are to fill.
"""

import json
import logging
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import cached_property, partial
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlparse
from urllib.request import url2pathname

os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
# Waiting is ours to do (patience.py): a call that fails must come back within seconds, so that a
# run told to stop can.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")

import mlflow
from filelock import Timeout
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.utils import name_utils

from longtail_experts.config import MLFLOW_RUN
from longtail_experts.data.addresses import without_passwords
from longtail_experts.data.locks import host_lock
from longtail_experts.data.sources import first_line
from longtail_experts.tracking.interrupts import delayed_signals
from longtail_experts.tracking.patience import (
    KILLED_PATIENCE,
    PatientClient,
    in_haste,
    is_transient,
    patience,
    patiently,
)
from longtail_experts.tracking.processes import process_tags
from longtail_experts.tracking.report import (
    KEPT_OF_A_TAG,
    digest,
    plain,
    signed,
    typed_by_hand,
    with_air,
)
from longtail_experts.tracking.stores import one_store, require_answer, require_lasting

for _noisy in ("mlflow", "alembic"):
    logging.getLogger(_noisy).setLevel(logging.WARNING)

log = logging.getLogger(__name__)

SYSTEM_METRICS = "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING"
SAMPLING_INTERVAL = "MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL"
MAX_TEXT = 100_000_000  # bytes of a JSON, YAML or Markdown artifact that is read back
RACES = 20  # of two runs that record the same data set at once; one a data set is lost at most
NOTE = "mlflow.note.content"
EXPERT_MODEL = "expert"  # its name as a logged model
IN_A_RUN = "in run "
BATCH = 1000  # what one log_batch call may hold
NOT_THERE = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # else a store has failed


class RunError(RuntimeError):
    """A run is not what a stage needs; one line with the remedy."""


class StoreError(RunError):
    """The store cannot take a run."""


class UndeliveredError(RunError):
    """The store has not answered for too long; nothing is lost, the message says where it is."""


FAILURES = (RunError, MlflowException)  # of which one line says what there is to say


@contextmanager
def malformed(what: str) -> Iterator[None]:
    """RunError about all that the content of an artifact can raise."""
    try:
        yield
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        says = f"{type(error).__name__}: {first_line(error)[:200]}"
        raise RunError(f"{what} is malformed ({says})") from None


def came_up_in_a_run(error: BaseException) -> bool:
    """Whether work had begun: a note on the error names the run that it ended."""
    return any(note.startswith(IN_A_RUN) for note in getattr(error, "__notes__", ()))


class Run:
    """A handle on a run, whoever started it and whatever its status."""

    def __init__(self, run_id: str):
        self.run_id = run_id
        self.plain_client = PatientClient(mlflow.MlflowClient(), lambda: 0.0)
        self.client = PatientClient(self.plain_client)

    # --- writing ---

    def log_params(self, params: Mapping[str, str]) -> None:
        """Params not there yet; those that the launcher has logged are left alone."""
        there = self._data().params
        new = [Param(k, v) for k, v in params.items() if k not in there]
        self.client.log_batch(self.run_id, params=new)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        self.client.log_batch(self.run_id, tags=[RunTag(k, v) for k, v in tags.items()])

    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        """Those that the run does not hold at this optimiser step: what was cut off and is done
        again logs nothing twice."""
        logged = self.metrics.keys() & values.keys()
        there = {name for name in logged if step in dict(self.history(name))}
        now = int(time.time() * 1000)
        new = [Metric(n, float(v), now, step) for n, v in values.items() if n not in there]
        self.log_metric_points(new)

    def replace_metrics(self, values: Mapping[str, float], step: int) -> None:
        """What the run holds another value of is logged anew: MLflow shows the newest of a step."""
        there, now = self.metrics, int(time.time() * 1000)
        new = [n for n, value in values.items() if there.get(n) != float(value)]
        for name in there.keys() & set(new):  # whatever the clock says now
            history = self.client.get_metric_history(self.run_id, name)
            now = max(now, *(point.timestamp + 1 for point in history))
        self.log_metric_points([Metric(n, float(values[n]), now, step) for n in new])

    def log_metric_points(self, points: list[Metric], wait: bool = True) -> None:
        """In requests of a thousand; `wait` for a store that is away, or raise at once."""
        client = self.client if wait else self.plain_client
        for start in range(0, len(points), BATCH):
            client.log_batch(self.run_id, metrics=points[start : start + BATCH])

    def upload(self, local: Path, folder: str | None, wait: bool = True) -> None:
        client = self.client if wait else self.plain_client
        with self.disk_at_fault(os.path.join(folder or "", local.name)):
            client.log_artifact(self.run_id, str(local), folder)

    @contextmanager
    def disk_at_fault(self, name: str) -> Iterator[None]:
        """RunError for what a disk raises, and PyTorch and shutil in its place; errors of a store
        are left as they are."""
        try:
            yield
        except (OSError, RuntimeError) as error:
            number = getattr(error, "errno", None)
            is_in_its_place = isinstance(error, shutil.Error) or "inline_container" in str(error)
            if not (number or is_in_its_place) or is_transient(error):
                raise
            says = getattr(error, "strerror", None) or first_line(error)
            raise RunError(
                f"run {self.run_id}: artifact {name} cannot be written ({says[:300]}); make room, "
                "then do this again"
            ) from None

    def describe(self, markdown: str) -> None:
        """What people have typed there stays, below; in an artifact where both are too long."""
        page = signed(with_air(markdown))
        notes = typed_by_hand(self.tags.get(NOTE, ""))
        if notes and len(f"{page}\n\n{notes}") <= KEPT_OF_A_TAG:
            page = f"{page}\n\n{notes}"
        elif notes:
            self.write_text(f"notes/{digest(notes)}.md", f"{notes}\n")
        self.client.set_tag(self.run_id, NOTE, page)

    def rename(self, name: str) -> None:
        self.client.update_run(self.run_id, name=name)

    @contextmanager
    def artifact(self, path: str) -> Iterator[Path]:
        """A local path to write; what is there at the end of the block becomes the artifact."""
        folder, name = os.path.split(path)
        with self.disk_at_fault(path), tempfile.TemporaryDirectory() as scratch:
            local = Path(scratch) / name
            yield local
            self.upload(local, folder or None)

    def write_text(self, path: str, text: str) -> None:
        with self.artifact(path) as local:
            local.write_text(text, encoding="utf-8")

    def write_json(self, path: str, content: Any) -> None:
        self.write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")

    def log_datasets(self, datasets: Iterable[tuple[str, str, str, Mapping[str, Any]]]) -> None:
        """(split, digest, source, profile) of each data set used, shown under *Datasets used*."""
        inputs = [
            DatasetInput(
                Dataset(
                    name=split,
                    digest=digest[:36],
                    source_type="local",
                    source=json.dumps({"source": source}),
                    profile=json.dumps(profile),
                ),
                [InputTag("mlflow.data.context", split)],
            )
            for split, digest, source, profile in datasets
        ]
        for attempt in range(RACES):
            try:
                self.client.log_inputs(self.run_id, inputs)
                return
            except MlflowException as error:
                # MLflow looks a data set up, then inserts it: another run of the same splits may
                # have done so in between, and the next look finds it.
                is_race = "unique constraint" in str(error).lower()
                if not is_race or attempt == RACES - 1:
                    raise

    # --- reading ---

    def _data(self) -> mlflow.entities.RunData:
        return self.client.get_run(self.run_id).data

    @property
    def params(self) -> dict[str, str]:
        return dict(self._data().params)

    @property
    def metrics(self) -> dict[str, float]:
        return dict(self._data().metrics)

    @property
    def tags(self) -> dict[str, str]:
        return dict(self._data().tags)

    @property
    def name(self) -> str:
        return self.client.get_run(self.run_id).info.run_name

    @property
    def status(self) -> str:
        return self.client.get_run(self.run_id).info.status

    @property
    def seconds(self) -> float:
        """From its start to its end; nan while it runs."""
        info = self.client.get_run(self.run_id).info
        return (info.end_time - info.start_time) / 1000 if info.end_time else math.nan

    @property
    def started_at(self) -> int:
        """Milliseconds since 1970."""
        return self.client.get_run(self.run_id).info.start_time

    @cached_property
    def experiment_id(self) -> str:
        return self.client.get_run(self.run_id).info.experiment_id

    @cached_property
    def artifact_uri(self) -> str:
        return self.client.get_run(self.run_id).info.artifact_uri

    @property
    def logged_experts(self) -> list[mlflow.entities.LoggedModel]:
        """The oldest first, whatever became of them. Other models of the run are its owner's, one
        of this name too: it has no temperature among its params."""
        named = self.client.search_logged_models(
            [self.experiment_id],
            f"source_run_id = '{self.run_id}' AND name = '{EXPERT_MODEL}'",
            order_by=[{"field_name": "creation_timestamp", "ascending": True}],
        )
        return [model for model in named if "temperature" in model.params]

    def history(self, metric: str) -> list[tuple[int, float]]:
        """(step, value) pairs in the order of steps."""
        points = self.client.get_metric_history(self.run_id, metric)
        return sorted((point.step, point.value) for point in points)

    def has_artifact(self, path: str) -> bool:
        """Raises RunError where nobody can tell: MLflow takes a folder that was moved for empty."""
        root = local_folder_of(self.artifact_uri)
        is_gone = root is not None and not root.parent.parent.exists()
        if is_gone and "process_started" in self.tags:  # a run of ours, which has made it
            raise RunError(
                f"run {self.run_id}: its artifacts were in {root.parent.parent}, which is gone: "
                "move the folder back"
            )
        folder = os.path.dirname(path)
        try:
            found = self._artifacts.list_artifacts(folder or None)
        except (MlflowException, OSError) as error:
            raise RunError(
                f"run {self.run_id}: its artifacts cannot be listed ({first_line(error)})"
            ) from None
        return any(file.path == path for file in found)

    @cached_property
    def _artifacts(self) -> PatientClient:
        """Where the run keeps its artifacts; MLflow's client would ask the store for that, and for
        logged models of the same name, at every read."""
        return PatientClient(get_artifact_repository(self.artifact_uri, mlflow.get_tracking_uri()))

    @contextmanager
    def read_artifact(self, path: str) -> Iterator[Path]:
        """A local path that holds the artifact while the block lasts."""
        with tempfile.TemporaryDirectory() as scratch:
            try:
                local = self._artifacts.download_artifacts(path, scratch)
            except (MlflowException, OSError) as error:
                raise RunError(
                    f"run {self.run_id}: artifact {path} cannot be read ({first_line(error)})"
                ) from None
            if not os.path.isfile(local):
                raise RunError(f"run {self.run_id}: artifact {path} is no file")
            yield Path(local)

    def read_text(self, path: str) -> str:
        """Raises RunError where it is missing or too large, UnicodeDecodeError, a ValueError."""
        with self.read_artifact(path) as local:
            if local.stat().st_size > MAX_TEXT:
                raise RunError(f"run {self.run_id}: {path} is larger than {MAX_TEXT:,} bytes")
            return local.read_text(encoding="utf-8")

    def read_json(self, path: str) -> Any:
        return json.loads(self.read_text(path))


@contextmanager
def _store_at_fault(what: str) -> Iterator[None]:
    """At the first contact, whatever MLflow, its database or the disk raises."""
    try:
        yield
    except RunError:
        raise
    except Exception as error:
        raise StoreError(f"{without_passwords(what)}: {first_line(error)}") from None


@contextmanager
def store_to_read() -> Iterator[mlflow.MlflowClient]:
    """A client for a look around; StoreError where the store cannot be read."""
    uri = mlflow.get_tracking_uri()
    with _store_at_fault(f"the store {uri} cannot be read"), _first_contact(uri):
        yield mlflow.MlflowClient()


def open_run(run_id: str, field: str = "run_id") -> Run:
    """A run that exists; raises RunError, naming `field`, where the store has none of that id."""
    with store_to_read() as client:
        client.search_experiments(max_results=1)
    run = Run(run_id)
    try:
        info = run.client.get_run(run_id).info
        experiment = run.client.get_experiment(info.experiment_id)
    except MlflowException as error:
        if error.error_code not in NOT_THERE:
            raise
        store = without_passwords(mlflow.get_tracking_uri())
        raise RunError(f"{field}={run_id[:60]}: not found in the store {store}") from None
    require_not_deleted(experiment, f"{field}={run_id}: its experiment")
    if info.lifecycle_stage == "deleted":
        raise RunError(
            f"{field}={run_id}: is deleted; restore it first "
            f"(mlflow runs restore --run-id {run_id})"
        )
    return run


def require_not_deleted(experiment: mlflow.entities.Experiment, what: str) -> None:
    """RunError, beginning with `what`, where an experiment is deleted."""
    if experiment.lifecycle_stage == "deleted":
        raise RunError(
            f"{what} is deleted; restore that first "
            f"(mlflow experiments restore --experiment-id {experiment.experiment_id})"
        )


@contextmanager
def start_run(
    name: str,
    tags: Mapping[str, str],
    parent: Run | None = None,
    existing: Run | None = None,
    system_metrics: bool = False,
) -> Iterator[Run]:
    """The run of this process, a child of `parent`, or `existing` once more; ends FINISHED,
    FAILED or KILLED.

    Under `mlflow run` the launcher has created it already; else a new one is created. A name
    that the user gave to the launcher is kept. `system_metrics`: processor, memory, disk, network
    and GPU every half a minute, unless MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING=false. Raises
    StoreError before any work is done.
    """
    if system_metrics and SAMPLING_INTERVAL not in os.environ:
        mlflow.set_system_metrics_sampling_interval(30)
    uri = mlflow.get_tracking_uri()
    nested = parent is not None or mlflow.active_run() is not None
    run, status, seconds, has_begun = None, "FAILED", None, False
    status_before = None  # of `existing`: MLflow changes it first, and may fail at what comes next

    def open_it() -> None:
        nonlocal run, status_before
        with _first_contact(uri):
            if existing is not None and status_before is None:
                status_before = existing.plain_client.get_run(existing.run_id).info.status
            if existing is None and parent is None:
                _require_nothing_recorded(launched_run_id())
            active = mlflow.start_run(
                run_id=existing and existing.run_id,
                nested=nested,
                parent_run_id=parent and parent.run_id,
                experiment_id=parent and parent.experiment_id,
                # At once, so that a run cut off in this moment is seen as ours.
                tags={**tags, **process_tags()},
                log_system_metrics=system_metrics
                and os.environ.get(SYSTEM_METRICS, "").lower() not in ("false", "0"),
            )
            run = Run(active.info.run_id)

    try:
        # What has begun waits for a store that is away: a child's parent, a run once more.
        with _store_at_fault(f"no run can be started in {uri}"):
            require_lasting(uri)
            patiently(open_it, patience() if parent or existing else 0.0)
        if existing is None and (is_generated(run.name) or name.startswith("DEMO")):
            run.rename(name)
        _require_usable_artifact_root(run)
        has_begun = True
        yield run
        status = "FINISHED"
    except BaseException as error:
        if has_begun:
            error.add_note(f"{IN_A_RUN}{run.run_id}")
        if not isinstance(error, Exception):  # Ctrl-C, SIGTERM
            status = "KILLED"
        if status == "KILLED" or isinstance(error, UndeliveredError) or is_transient(error):
            seconds = KILLED_PATIENCE  # told to stop, or the store was waited for already
        raise
    finally:
        try:
            if run is not None:
                _end(run, status, patience() if seconds is None else seconds)
            elif existing is not None and status_before is not None:
                _put_back(existing, status_before)
        except BaseException:  # Ctrl-C or SIGTERM meanwhile
            if run is not None:
                _end(run, status, KILLED_PATIENCE)
            if status != "KILLED":  # else the signal under way says how to go on
                raise


def _require_nothing_recorded(run_id: str | None) -> None:
    """Of a run that `mlflow run --run-id` names: an expert's must not become another stage's."""
    if run_id is None:
        return
    stage = Run(run_id).plain_client.get_run(run_id).data.tags.get("stage")
    if stage not in (None, "refused"):
        raise StoreError(
            f"MLFLOW_RUN_ID={run_id}: is the run of a {stage} already, which would be overwritten; "
            "leave out --run-id"
        )


def _end(run: Run, status: str, seconds: float) -> None:
    try:
        set_status = partial(run.plain_client.set_terminated, run.run_id, status)
        patiently(set_status, seconds, heeds=False)
    except Exception as error:  # the exception under way, or the work done, matters more
        log.warning(
            "run %s: its status could not be set to %s (%s); `%s -e reap` does that when the store "
            "is back",
            run.run_id,
            status,
            first_line(error),
            MLFLOW_RUN,
        )
    # At its exit, MLflow ends what it takes for active, as FINISHED.
    with suppress(Exception), delayed_signals():
        mlflow.end_run(status)


def _put_back(run: Run, status: str) -> None:
    """Of a run that could not be opened once more."""
    update = partial(run.plain_client.update_run, run.run_id, status)
    with suppress(Exception):
        patiently(update, KILLED_PATIENCE, heeds=False)


def end_unopened_run() -> None:
    """KILLED for the run that `mlflow run` has created for this process, where the process is told
    to stop before it has opened it: the launcher may be gone, and would leave it RUNNING."""
    run_id = launched_run_id()
    if run_id is None:
        return
    with in_haste(), suppress(Exception):  # a store that is away: the launcher says so too
        if Run(run_id).status == "RUNNING":
            _end(Run(run_id), "KILLED", KILLED_PATIENCE)


@contextmanager
def _first_contact(uri: str) -> Iterator[None]:
    """One process of this host at a time: MLflow creates its tables, and an experiment, without
    a lock, and all but one of the processes that do so at once fail. Signals wait for its end."""
    require_answer(uri)
    with host_lock(one_store(uri)), delayed_signals():
        yield


@contextmanager
def claimed(run: Run | None) -> Iterator[None]:
    """One process of this host at a time goes on with a run: RunError for the others, which have
    touched nothing."""
    if run is None:
        yield
        return
    with one_process(run.run_id, f"run {run.run_id}: another process is going on with it already"):
        yield


@contextmanager
def claimed_from_its_start(
    opened: AbstractContextManager[Run], existing: Run | None
) -> Iterator[Run]:
    """`opened`, a new run or `existing` once more, which is claimed before it is touched."""
    with claimed(existing), opened as run, claimed(None if existing else run):
        yield run


@contextmanager
def one_process(what: str, else_: str) -> Iterator[None]:
    """RunError, in the words `else_`, where another process of this host is in here for `what`."""
    try:
        lock = host_lock(what).acquire(timeout=0)
    except Timeout:
        raise RunError(else_) from None
    with lock:
        yield


def is_generated(run_name: str) -> bool:
    """Whether MLflow named a run by itself (silent-ant-42), and nobody did (lr-sweep-2)."""
    words = run_name.split("-")
    return (
        len(words) == 3
        and words[0] in name_utils._GENERATOR_PREDICATES
        and words[1] in name_utils._GENERATOR_NOUNS
        and words[2].isdigit()
    )


def launched_run_id() -> str | None:
    """The run that `mlflow run` has created for this process."""
    return os.environ.get("MLFLOW_RUN_ID")


def launched_run(name: str, tags: Mapping[str, str]) -> AbstractContextManager[Run | None]:
    """The run that `mlflow run` has created for this process; nothing without a launcher."""
    return start_run(name, tags) if launched_run_id() else nullcontext()


def note_failure(reason: str) -> None:
    """On the run that `mlflow run` has created, and ends as FAILED: why.

    For what fails before there is anything to read on the run's page; a page that says something
    is left alone. The terminal has the reason as well: a store that does not answer is no matter.
    """
    run_id = launched_run_id()
    if run_id is None:
        return
    try:
        client = mlflow.MlflowClient()
        run = client.get_run(run_id)
        tags = run.data.tags
        if NOTE in tags:
            return
        how = "Failed" if "stage" in tags else "Not started"
        client.set_tag(run_id, NOTE, signed(f"**{how}.** {plain(reason)}"))
        if "stage" not in tags:
            client.set_tag(run_id, "stage", "refused")
            if is_generated(run.info.run_name):
                client.update_run(run_id, name="refused")
    except Exception as error:
        log.debug("run %s: no note could be left (%s)", run_id, first_line(error))


def link_to(run: Run) -> str:
    """Where `mlflow ui` shows the run, relative to the address that it prints."""
    return f"#/experiments/{run.experiment_id}/runs/{run.run_id}"


def link_to_artifact(run: Run, path: str) -> str:
    return f"{link_to(run)}/artifacts/{path}"


def address_of_picture(run: Run, path: str) -> str:
    """Where its server gives the artifact to a description, relative to the address of the page."""
    return f"get-artifact?path={quote(path, safe='')}&run_uuid={run.run_id}"


def local_folder_of(root: str) -> Path | None:
    """The folder of an artifact root, where that is on this machine."""
    if root.startswith("file:"):
        return Path(url2pathname(urlparse(root).path))
    return None if "://" in root or root.startswith("mlflow-artifacts:") else Path(root)


def _require_usable_artifact_root(run: Run) -> None:
    """Said now, not at the first checkpoint hours later.

    `mlflow ui` opened on an empty folder creates the Default experiment with a root that only
    its own server can serve; roots are absolute, so that a moved folder loses its artifacts.
    """
    root, uri = run.artifact_uri, mlflow.get_tracking_uri()
    if root.startswith("mlflow-artifacts:") and not uri.startswith(("http:", "https:")):
        raise StoreError(
            "the experiment was created by `mlflow ui`, which keeps its artifacts for its own "
            f"server: use another one ({MLFLOW_RUN} --experiment-name longtail ...; without "
            "mlflow run: MLFLOW_EXPERIMENT_NAME=longtail)"
        )
    folder = local_folder_of(root)
    if folder is None:
        return
    experiment = folder.parent.parent
    if not experiment.exists() and Path.cwd() not in experiment.parents and _has_siblings(run):
        raise StoreError(
            f"the experiment keeps its artifacts in {experiment}, which is gone: move the folder "
            f"back, or use another experiment ({MLFLOW_RUN} --experiment-name longtail-2 ...)"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise StoreError(
            f"artifacts would go to {folder}, which cannot be written "
            f"({error.strerror or error}): give the experiment another place"
        ) from None


def _has_siblings(run: Run) -> bool:
    """Of ours, which have made their folder."""
    ours = "tags.process_started != ''"
    return len(run.client.search_runs([run.experiment_id], ours, max_results=2)) > 1


def free_bytes(place: Path) -> int:
    """Free on the disk that holds `place`, or will once it is made."""
    existing = next(p for p in (place, *place.parents) if p.exists())
    return shutil.disk_usage(existing).free


def require_room(run: Run, folder: Path, needed: int) -> None:
    """StoreError where `folder`, or the run's artifacts, lie on a disk with less than `needed`
    bytes free."""
    for place in (folder, local_folder_of(run.artifact_uri)):
        if place is None:
            continue
        free = free_bytes(place)
        if free < needed:
            raise StoreError(
                f"{place}: {free / 1e6:.0f} MB free, and the run writes about "
                f"{needed / 1e6:.0f} MB: make room first"
            )
