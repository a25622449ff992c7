"""Which process fills a run, and whether it is still there."""

import os
import socket
from collections.abc import Mapping

import psutil


def process_tags() -> dict[str, str]:
    """Host, pid and start time of this process; a pid alone may be another's later."""
    return {
        "host": socket.gethostname(),
        "pid": str(os.getpid()),
        "process_started": _started(psutil.Process()),
    }


def is_on_this_host(tags: Mapping[str, str]) -> bool:
    return tags.get("host") == socket.gethostname()


def is_alive(tags: Mapping[str, str]) -> bool:
    """Whether the process of `process_tags`, on this host, still runs."""
    try:
        process = psutil.Process(int(tags["pid"]))
        return _started(process) == tags["process_started"] and process.status() != "zombie"
    except (psutil.Error, KeyError, ValueError):
        return False


def _started(process: psutil.Process) -> str:
    """Seconds after the machine's start: unlike the time of day, this does not move when the clock
    is set, which would make a live process look like another."""
    return f"{process.create_time() - psutil.boot_time():.2f}"
