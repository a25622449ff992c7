"""Experts that train at the same time on one GPU: a thread, and a stream, for each.

The kernels of a ResNet-32 at batch 128 are too small and too short to fill a large GPU; those of
another expert go beside them. What is done epoch after epoch does: steps, validations and
checkpoints, in memory and files of the expert's own; and at the end the fit of the temperature,
mathematics alone. All before that, the first recording of its steps above all, and all else after
it is done by one expert at a time, which has the turn: MLflow, Matplotlib and torch.export need not
be safe in threads.
"""

import gc
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import TypeVar

import torch

Result = TypeVar("Result")


# How long a thread may run Python while others wait for it, instead of CPython's 5 ms. A step asks
# for Python ten times and more: beside an expert that draws or writes, each would wait that long.
SWITCH_SECONDS = 1e-4

_turn: ContextVar["threading.Lock | None"] = ContextVar("turn", default=None)


def at_once(work: Mapping[str, Callable[[], Result]], device: str) -> dict[str, Result]:
    """What each piece of work returns, each in a thread of its own that starts with the turn.

    Returns when all have ended, then raises what the first of them to have failed raised.
    """
    turn = threading.Lock()

    def in_turn(do: Callable[[], Result]) -> Result:
        _turn.set(turn)
        with turn, _own_stream(device):
            return do()

    with _python_for_threads(), ThreadPoolExecutor(len(work), "expert") as threads:
        begun = {name: threads.submit(in_turn, do) for name, do in work.items()}
    return {name: future.result() for name, future in begun.items()}


@contextmanager
def beside_the_others() -> Iterator[None]:
    """In here without the turn. Outside `at_once`, where there are no others: nothing."""
    turn = _turn.get()
    if turn is None:
        yield
        return
    turn.release()
    try:
        yield
    finally:
        turn.acquire()


@contextmanager
def _python_for_threads() -> Iterator[None]:
    """Python's lock changes hands often. And what is there already, above all what was imported, is
    not looked through for garbage: half a second each time, in which no expert goes on."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_SECONDS)
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        sys.setswitchinterval(interval)


def _own_stream(device: str) -> AbstractContextManager[None]:
    """Where kernels of this thread go; the default stream would put all in one line."""
    return torch.cuda.stream(torch.cuda.Stream()) if device == "cuda" else nullcontext()
