"""Locks that the processes of a host share."""

import getpass
import hashlib
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

log = logging.getLogger(__name__)


def host_lock(what: str) -> FileLock:
    """Held by one process of this host and user at a time."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        user = str(os.getuid())
    digest = hashlib.sha256(what.encode()).hexdigest()[:16]
    return FileLock(Path(tempfile.gettempdir()) / f"longtail-experts-{user}-{digest}.lock")


@contextmanager
def in_turn(what: str, waiting: str) -> Iterator[None]:
    """In here one process of this host and user is at a time; `waiting` is said where another one
    keeps this one waiting."""
    lock = host_lock(what)
    try:
        lock.acquire(timeout=1)
    except Timeout:
        log.warning(waiting)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
