"""Ctrl-C and SIGTERM during training: noted at once, acted on between two steps."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

_noted: list[list[int]] = []  # in the main thread's blocks, for threads that it waits for


class Terminated(BaseException):
    """SIGTERM; ends the active run as KILLED on its way out."""


def raise_terminated(number: int, frame: FrameType | None) -> NoReturn:
    """The handler of SIGTERM wherever nothing has to be finished first."""
    raise Terminated


def raise_for(number: int, message: str = "") -> NoReturn:
    raise (KeyboardInterrupt if number == signal.SIGINT else Terminated)(message)


@contextmanager
def delayed_signals() -> Iterator[list[int]]:
    """Within the block, signals are only noted in the list; a second Ctrl-C does not wait.

    `mlflow run` passes Ctrl-C on as SIGINT and SIGTERM both, so that a second signal of another
    kind says nothing new. What arrived and was not acted on is raised at the end of the block.
    Python allows handlers in the main thread alone: another thread is given the list of the block
    that the main thread is in, else one that stays empty.
    """
    if threading.current_thread() is not threading.main_thread():
        yield _noted[-1] if _noted else []
        return
    arrived: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and number in arrived:
            raise KeyboardInterrupt
        arrived.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    _noted.append(arrived)
    try:
        yield arrived
    finally:
        _noted.pop()
        for number, handler in before.items():
            signal.signal(number, handler)
    if arrived:
        raise_for(arrived[0])
