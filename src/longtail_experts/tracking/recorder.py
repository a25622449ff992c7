"""What a training run writes as it goes: on the local disk at once, in the store seconds later.

Every point is a line of `points.jsonl` and every checkpoint a file in the run's local folder
before anything is sent. A thread of its own delivers both, points in order, and tries again
for as long as the store is away: training never waits for it.
"""

import json
import logging
import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from mlflow.entities import Metric

from longtail_experts.data.sources import first_line
from longtail_experts.tracking.checkpoints import CheckpointError, read_checkpoint, read_file
from longtail_experts.tracking.interrupts import stop_if_heeded
from longtail_experts.tracking.patience import (
    FIRST_PAUSE,
    KILLED_PATIENCE,
    LONGEST_PAUSE,
    patience,
)
from longtail_experts.tracking.runs import BATCH, Run, RunError, StoreError, UndeliveredError

log = logging.getLogger(__name__)

# Of the time, what sending may take: points gather meanwhile, a checkpoint waits for a later one.
# The thread that sends holds Python's lock, for which steps of a millisecond would wait.
SENDING_SHARE = 0.02
LONGEST_GATHERING = 5.0  # seconds, for points, however long it took to send the last ones
Point = tuple[str, float, int, int]  # name, value, optimiser step, milliseconds since 1970


def local_folder(run_id: str) -> Path:
    """Where a run keeps what must survive until it is in the store."""
    return Path(os.environ.get("LONGTAIL_CACHE_DIR") or ".cache").absolute() / "runs" / run_id


class Recorder:
    """A context: leaving it stops the delivery; `finish` before that waits for it to be whole."""

    def __init__(self, run: Run):
        self._run = run
        self.folder = local_folder(run.run_id)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(
                f"{self.folder}: cannot be written ({error.strerror or error}); name another "
                "place with LONGTAIL_CACHE_DIR"
            ) from None
        self._lock = FileLock(self.folder / "lock")
        self._points: deque[Metric] = deque()
        self._recorded: set[tuple[str, int]] = set()
        self._due: dict[str, int] = {}  # checkpoints to be sent, and how often each was saved
        self._later: dict[str, int] = {}  # to be sent when that costs little, or at the end
        self._sent: dict[str, tuple[float, float]] = {}  # name -> when, and how long it took
        self._change = threading.Condition()
        self._closing = self._is_over = self._in_haste = False
        self._problem = ""

    def __enter__(self) -> "Recorder":
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise RunError(
                f"run {self._run.run_id}: another process is training it (it holds {self.folder})"
            ) from None
        _drop_torn_line(self._journal)
        self._file = self._journal.open("a", encoding="utf-8")
        self._thread = threading.Thread(target=self._deliver, daemon=True, name="recorder")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._change:
            self._closing = True
            self._change.notify_all()
        self._thread.join(timeout=1)
        with suppress(OSError):  # a full disk, once more: it has been said
            self._file.close()
        self._lock.release()
        if self._is_over:
            shutil.rmtree(self.folder, ignore_errors=True)

    # --- what training calls ---

    @property
    def _journal(self) -> Path:
        return self.folder / "points.jsonl"

    def log_points(self, points: Iterable[tuple[str, float, int]]) -> None:
        """(name, value, optimiser step) triples; one that the run has already is left out."""
        now = int(time.time() * 1000)
        self._record([(name, float(value), step, now) for name, value, step in points])

    def points(self) -> list[Point]:
        """All that was recorded here, for a checkpoint to carry."""
        return read_points(self._journal)

    def recall(self, points: Iterable[Point]) -> None:
        """Before training: what an earlier process recorded, on this disk or in the checkpoint,
        is delivered where the store lacks it, and never recorded a second time."""
        known = self.points()
        stored = points_in_store(self._run)
        with self._change:
            waiting = [p for p in known if (p[0], p[2]) not in stored]
            self._points.extend(Metric(n, v, ms, step) for n, v, step, ms in waiting)
            self._recorded |= {(name, step) for name, _, step, _ in known} | stored
            self._change.notify_all()
        self._record([tuple(p) for p in points])

    def save_checkpoint(self, name: str, content: dict[str, Any]) -> None:
        """Whole or not at all; the last.pt before it stays as previous.pt."""
        path = self.folder / f"{name}.pt"
        scratch = self.folder / f"{name}.tmp"
        try:
            torch.save(content, scratch)
            with scratch.open("rb") as file:
                os.fsync(file.fileno())
            with self._change:  # nothing is sent between the two
                if name == "last" and path.exists():
                    os.replace(path, self.folder / "previous.pt")
                os.replace(scratch, path)
        except (OSError, RuntimeError) as error:  # torch says "unexpected pos" on a full disk
            scratch.unlink(missing_ok=True)
            raise RunError(
                f"run {self._run.run_id}: {path} cannot be written ({first_line(error)}); make "
                f"room, then -P resume={self._run.run_id} goes on from the last checkpoint"
            ) from None
        with self._change:
            when, seconds = self._sent.get(name, (0.0, 0.0))
            saved = 1 + max(self._due.pop(name, 0), self._later.pop(name, 0))
            is_cheap = seconds <= SENDING_SHARE * (time.monotonic() - when)
            (self._due if is_cheap else self._later)[name] = saved
            self._change.notify_all()

    def latest(self) -> dict[str, Any] | None:
        """The newest whole last.pt: of this disk, the one before it, or the store's."""
        found = []
        for name in ("last", "previous"):
            path = self.folder / f"{name}.pt"
            if path.exists():
                try:
                    found.append(read_file(path))
                except CheckpointError as error:
                    log.warning("%s is damaged (%s); looking for the one before it", path, error)
        if self._run.has_artifact("checkpoints/last.pt"):
            try:
                found.append(read_checkpoint(self._run, "last"))
            except RunError as error:
                if not found:  # to begin anew would write over it
                    raise
                log.warning("%s", error)
        return max(found, key=lambda content: content["step"], default=None)

    def finish(self, seconds: float | None = None, heeds: bool = True) -> None:
        """Wait until the store has everything; UndeliveredError after `seconds` (patience()). A
        signal that this thread heeds ends the wait, unless told that it `heeds` none."""
        seconds = patience() if seconds is None else seconds
        ends = time.monotonic() + seconds
        with self._change:
            self._due |= self._later
            self._later = {}
            self._in_haste = True
            self._change.notify_all()
            while self._points or self._due:
                if heeds:
                    stop_if_heeded(self.how_to_resume)
                if (left := ends - time.monotonic()) <= 0:
                    raise UndeliveredError(
                        f"run {self._run.run_id}: the tracking store has not taken "
                        f"{len(self._points)} points and {len(self._due)} checkpoints within "
                        f"{seconds:.0f} s ({self._problem}); they are kept in {self.folder}: when "
                        f"it is back, -P resume={self._run.run_id}"
                    )
                self._change.wait(min(left, 1.0))

    def finish_quietly(self) -> None:
        """On the way out of a run told to stop: what a few seconds do not deliver stays here."""
        try:
            self.finish(KILLED_PATIENCE, heeds=False)
        except UndeliveredError as error:
            log.warning("%s", error)

    @property
    def how_to_resume(self) -> str:
        return f"-P resume={self._run.run_id} goes on from there"

    def forget(self) -> None:
        """At the end, remove the local copies: the training is complete and in the store."""
        self._is_over = True

    # --- delivery ---

    def _record(self, points: list[Point]) -> None:
        new = [p for p in points if (p[0], p[2]) not in self._recorded]
        try:
            self._file.write("".join(json.dumps(p) + "\n" for p in new))
            self._file.flush()
        except OSError as error:
            raise RunError(
                f"run {self._run.run_id}: {self._journal} cannot be written "
                f"({first_line(error)}); make room, then -P resume={self._run.run_id}"
            ) from None
        with self._change:
            self._recorded |= {(name, step) for name, _, step, _ in new}
            self._points.extend(Metric(n, v, ms, step) for n, v, step, ms in new)
            self._change.notify_all()

    def _deliver(self) -> None:
        pause, gathering, sends_points = FIRST_PAUSE, 0.0, False
        while True:
            with self._change:
                self._change.wait_for(
                    lambda: self._closing or self._in_haste or len(self._points) >= BATCH, gathering
                )
                self._change.wait_for(lambda: self._closing or self._points or self._due)
                if self._closing:
                    return
                points, name = list(self._points)[:BATCH], min(self._due, default=None)
            # In turn: points of short epochs would never let a checkpoint pass.
            sends_points = bool(points) and not (sends_points and name)
            gathering = 0.0
            try:
                if sends_points:
                    gathering = self._send(points)
                else:
                    self._upload(name)
            except Exception as error:  # whatever a store, its client or a disk can raise
                if not self._problem:
                    log.warning(
                        "the tracking store does not answer (%s); training goes on, what it "
                        "records is kept in %s",
                        first_line(error),
                        self.folder,
                    )
                self._problem = first_line(error)
                with self._change:
                    self._change.wait_for(lambda: self._closing, pause)
                pause = min(2 * pause, LONGEST_PAUSE)
                continue
            if self._problem:
                log.warning("the tracking store is back; delivery goes on")
            self._problem, pause = "", FIRST_PAUSE

    def _send(self, points: list[Metric]) -> float:
        """The first of those that wait; seconds for which others may gather, unless in haste."""
        started = time.monotonic()
        self._run.log_metric_points(points, wait=False)
        seconds = time.monotonic() - started
        with self._change:
            for _ in points:
                self._points.popleft()
            self._change.notify_all()
        return min(seconds / SENDING_SHARE, LONGEST_GATHERING)

    def _upload(self, name: str) -> None:
        """A hard link is sent, so that a checkpoint replaced meanwhile is not a mixture of two."""
        outbox = self.folder / "outbox"
        outbox.mkdir(exist_ok=True)
        link = outbox / f"{name}.pt"
        link.unlink(missing_ok=True)
        with self._change:
            if name not in self._due:  # saved once more meanwhile, and put off
                return
            saved = self._due[name]
            try:
                os.link(self.folder / f"{name}.pt", link)
            except OSError:  # of a file system without such links
                shutil.copyfile(self.folder / f"{name}.pt", link)
        started = time.monotonic()
        self._run.upload(link, "checkpoints", wait=False)
        link.unlink()
        self._sent[name] = (time.monotonic(), time.monotonic() - started)
        with self._change:
            if self._due.get(name) == saved:
                del self._due[name]
            self._change.notify_all()


def read_points(journal: Path) -> list[Point]:
    """The whole lines of a points.jsonl; a last line cut off by a crash is left out."""
    points = []
    if journal.exists():
        for line in journal.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                name, value, step, milliseconds = json.loads(line)
                points.append((str(name), float(value), int(step), int(milliseconds)))
            except (ValueError, TypeError):
                continue
    return points


def points_in_store(run: Run) -> set[tuple[str, int]]:
    return {(name, step) for name in run.metrics for step, _ in run.history(name)}


def deliver_left_over(run: Run) -> int:
    """Send the points that a process which is gone left on this disk; how many there were."""
    points = read_points(local_folder(run.run_id) / "points.jsonl")
    stored = points_in_store(run)
    missing = [p for p in points if (p[0], p[2]) not in stored]
    run.log_metric_points([Metric(n, v, ms, step) for n, v, step, ms in missing])
    return len(missing)


def _drop_torn_line(journal: Path) -> None:
    """So that what is appended next does not join a line cut off by a crash."""
    if journal.exists() and (text := journal.read_bytes()) and not text.endswith(b"\n"):
        os.truncate(journal, text.rfind(b"\n") + 1)
