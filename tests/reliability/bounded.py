"""A piece of work in a process that may take only so much more memory than it has."""

import os
import resource
from collections.abc import Callable

import psutil

ROOM = 400 * 2**20  # bytes; what is opened here would ask for gigabytes


def says_within(work: Callable[[], object], foreseen: tuple[type[Exception], ...]) -> str:
    """What `work` says in a `foreseen` error; anything else, and memory beyond ROOM, fails.

    Address space is what is limited: memory that is asked for counts, used or not.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            limit = psutil.Process().memory_info().vms + ROOM
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            try:
                outcome = f"returned {type(work()).__name__}"
            except foreseen as error:
                outcome = f"said {error}"
            except BaseException as error:
                outcome = f"raised {error!r}"
            os.write(writing, outcome.encode(errors="replace")[:4000])
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as answer:
        outcome = answer.read().decode()
    _, status = os.waitpid(child, 0)
    assert status == 0
    assert outcome.startswith("said "), outcome
    return outcome.removeprefix("said ")
