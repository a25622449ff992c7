"""Waiting for a tracking store that is locked, restarting or away for a while."""

import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import requests
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import OperationalError

from longtail_experts.data.sources import first_line
from longtail_experts.tracking.interrupts import delayed_signals, stop_if_heeded

log = logging.getLogger(__name__)
T = TypeVar("T")

FIRST_PAUSE, LONGEST_PAUSE = 0.25, 30.0  # seconds between two tries, doubled after each
KILLED_PATIENCE = 3.0  # seconds that a run told to stop waits for its store
_at_most: ContextVar[float] = ContextVar("at_most", default=math.inf)
# What a store says that will answer later. MLflow has no error code for most of them.
TRANSIENT = (
    "database is locked",
    "failed with exception",  # MLflow's client: refused, reset, timed out
    "could not connect",
    "connection refused",
    "connection reset",
    "server closed the connection",
    "terminating connection",
    "the database system is",  # PostgreSQL: starting up, shutting down
    "timed out",
    "too many 5",
    "error code 502",
    "error code 503",
    "error code 504",
)


def patience() -> float:
    """Seconds for which a run that has begun waits for its store (LONGTAIL_STORE_PATIENCE)."""
    text = os.environ.get("LONGTAIL_STORE_PATIENCE", "600")
    try:
        seconds = float(text)
    except ValueError:
        log.warning("LONGTAIL_STORE_PATIENCE=%s is not a number of seconds; 600 is used", text)
        seconds = 600.0
    return min(seconds, _at_most.get())


@contextmanager
def in_haste() -> Iterator[None]:
    """Within the block `patience` is a few seconds: for whoever is told to stop."""
    outside = _at_most.set(KILLED_PATIENCE)
    try:
        yield
    finally:
        _at_most.reset(outside)


def is_transient(error: BaseException) -> bool:
    """Whether the same call may well succeed later."""
    if isinstance(error, requests.HTTPError):
        return error.response is not None and error.response.status_code in (502, 503, 504)
    if isinstance(error, requests.RequestException | ConnectionError | TimeoutError):
        return True
    if isinstance(error, MlflowException) and error.error_code == "TEMPORARILY_UNAVAILABLE":
        return True
    is_of_a_store = isinstance(error, MlflowException | OperationalError)
    return is_of_a_store and any(text in str(error).lower() for text in TRANSIENT)


def patiently(call: Callable[[], T], seconds: float, heeds: bool = True) -> T:
    """The result of `call`, tried again with growing pauses for `seconds` while the error is one
    that passes; the last error otherwise.

    A signal waits for the end of a call, not for the next: SQLAlchemy interrupted in the middle
    of a query leaves SQLite locked for this very process, which could not even end its run. One
    that was noted, and is heeded here, ends the pauses, unless told that it `heeds` none.
    """
    deadline, pause, said = time.monotonic() + seconds, FIRST_PAUSE, False
    while True:
        with delayed_signals():
            try:
                return call()
            except Exception as error:
                if not is_transient(error) or time.monotonic() + pause > deadline:
                    raise
                if not said:
                    says = first_line(error)[:200]
                    log.warning("the tracking store does not answer (%s); trying again", says)
                    said = True
        wakes = time.monotonic() + pause
        while (left := wakes - time.monotonic()) > 0:
            if heeds:
                stop_if_heeded("while the tracking store does not answer")
            time.sleep(min(left, 1.0))
        pause = min(2 * pause, LONGEST_PAUSE)


class PatientClient:
    """An MlflowClient, or what else asks a store, whose calls wait for one that is locked or away,
    for as long as `seconds` says: patience(), or 0 for one that raises at once."""

    def __init__(self, client: Any, seconds: Callable[[], float] = patience):
        self._client, self._seconds = client, seconds

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)
        return lambda *args, **kwargs: patiently(lambda: method(*args, **kwargs), self._seconds())
