"""Ctrl-C, SIGTERM and SIGHUP: noted at once, acted on between two steps and after a call of the
store."""

import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType
from typing import NoReturn

HANG_UP = signal.SIGHUP  # of a terminal or connection that is gone
ENDING = {signal.SIGINT, signal.SIGTERM, HANG_UP}
SAME_PRESS = 1.0  # seconds within which another SIGINT is the same Ctrl-C

_heeded: ContextVar[list[int] | None] = ContextVar("heeded", default=None)


class Terminated(BaseException):
    """SIGTERM or SIGHUP; ends the active run as KILLED on its way out."""


def raise_terminated(number: int, frame: FrameType | None) -> NoReturn:
    """The handler of both wherever nothing has to be finished first."""
    raise Terminated


def raise_for(number: int, message: str = "") -> NoReturn:
    raise (KeyboardInterrupt if number == signal.SIGINT else Terminated)(message)


@contextmanager
def delayed_signals() -> Iterator[list[int]]:
    """Within the block, signals are only noted in the list; a second Ctrl-C does not wait.

    `mlflow run` passes Ctrl-C on as SIGINT and SIGTERM both, so that a second signal of another
    kind says nothing new; nor does one of the same kind at once, from terminal and launcher both.
    What arrived and was not acted on is raised at the end of the block; of blocks in each other,
    the outermost. A signal that the process ignores stays ignored. Python allows handlers in the
    main thread alone: another thread is given the list that it was told to `heed`, else one that
    stays empty.
    """
    heeded = _heeded.get()
    if heeded is not None or threading.current_thread() is not threading.main_thread():
        yield [] if heeded is None else heeded
        return
    arrived: list[int] = []
    first: dict[int, float] = {}

    def note(number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT and now - first.setdefault(number, now) > SAME_PRESS:
            raise KeyboardInterrupt
        arrived.append(number)

    before = {
        number: signal.signal(number, note)
        for number in ENDING
        if signal.getsignal(number) not in (signal.SIG_IGN, None)
    }
    outside = _heeded.set(arrived)
    try:
        yield arrived
    except Exception as error:  # which must not make a signal forgotten
        if arrived:
            raise_for(arrived[0], str(error))
        raise
    finally:
        _heeded.reset(outside)
        for number, handler in before.items():
            signal.signal(number, handler)
    if arrived:
        raise_for(arrived[0])


@contextmanager
def ignored_signals(numbers: Iterable[int] = ENDING) -> Iterator[None]:
    """For what is done about a signal, which another would cut off; and for processes begun within
    the block, which inherit it. In the main thread."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def heed(arrived: list[int]) -> None:
    """In this thread, act on the signals that the main thread notes in its block."""
    _heeded.set(arrived)


def stop_if_heeded(message: str) -> None:
    """Raise for a signal that this thread was told to heed; outside such threads, nothing."""
    if arrived := _heeded.get():
        raise_for(arrived[0], message)
