"""Locks that the processes of a host share."""

import getpass
import hashlib
import os
import tempfile
from pathlib import Path

from filelock import FileLock


def host_lock(what: str) -> FileLock:
    """Held by one process of this host and user at a time."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        user = str(os.getuid())
    digest = hashlib.sha256(what.encode()).hexdigest()[:16]
    return FileLock(Path(tempfile.gettempdir()) / f"longtail-experts-{user}-{digest}.lock")
