"""Ctrl-C and SIGTERM during training: noted at once, acted on between two steps."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType
from typing import NoReturn

_heeded: ContextVar[list[int] | None] = ContextVar("heeded", default=None)


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
    Python allows handlers in the main thread alone: another thread is given the list that it was
    told to `heed`, else one that stays empty.
    """
    if threading.current_thread() is not threading.main_thread():
        heeded = _heeded.get()
        yield [] if heeded is None else heeded
        return
    arrived: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and number in arrived:
            raise KeyboardInterrupt
        arrived.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield arrived
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if arrived:
        raise_for(arrived[0])


def heed(arrived: list[int]) -> None:
    """In this thread, act on the signals that the main thread notes in its block."""
    _heeded.set(arrived)


def stop_if_heeded(message: str) -> None:
    """Raise for a signal that this thread was told to heed; outside such threads, nothing."""
    if arrived := _heeded.get():
        raise_for(arrived[0], message)
