"""Experts that train at the same time on one GPU: a thread, and a stream, for each.

The kernels of a ResNet-32 at batch 128 are too small and too short to fill a large GPU; those of
another expert go beside them. What is done epoch after epoch does: steps, validations and
checkpoints, in memory and files of the expert's own; and at the end the fit of the temperature,
mathematics alone. All before that, the first recording of its steps above all, and all else after
it is done by one expert at a time, which has the turn: MLflow, Matplotlib and torch.export need not
be safe in threads.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import TypeVar

import torch

from longtail_experts.learning.step import exact_float32

Result = TypeVar("Result")


class _Turn:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.num_beside = 0  # experts that do without it at this moment
        self.changed = threading.Condition()


_turn: ContextVar[_Turn | None] = ContextVar("turn", default=None)


def at_once(work: Mapping[str, Callable[[], Result]], device: str) -> dict[str, Result]:
    """What each piece of work returns, each in a thread of its own that starts with the turn.

    Returns when all have ended, then raises what the first of them to have failed raised.
    """
    turn = _Turn()

    def in_turn(do: Callable[[], Result]) -> Result:
        _turn.set(turn)
        with turn.lock, _own_stream(device):
            return do()

    # cuDNN's flags belong to the process: a thread that puts them back must find them as it left
    # them, or another's convolutions would change in mid-step.
    with exact_float32(), ThreadPoolExecutor(len(work), "expert") as threads:
        begun = {name: threads.submit(in_turn, do) for name, do in work.items()}
    return {name: future.result() for name, future in begun.items()}


@contextmanager
def beside_the_others() -> Iterator[None]:
    """In here without the turn. Outside `at_once`, where there are no others: nothing."""
    turn = _turn.get()
    if turn is None:
        yield
        return
    with turn.changed:
        turn.num_beside += 1
    turn.lock.release()
    try:
        yield
    finally:
        with turn.changed:
            turn.num_beside -= 1
            turn.changed.notify_all()
        turn.lock.acquire()


def wait_until_alone() -> None:
    """With the turn: until no other computes, nor will before the turn is given up.

    For what changes the whole process meanwhile: `torch.export` switches cuDNN and oneDNN off, and
    a step of another expert would be another code's, rounded otherwise.
    """
    turn = _turn.get()
    if turn is not None:
        with turn.changed:
            turn.changed.wait_for(lambda: turn.num_beside == 0)


def _own_stream(device: str) -> AbstractContextManager[None]:
    """Where kernels of this thread go; the default stream would put all in one line."""
    return torch.cuda.stream(torch.cuda.Stream()) if device == "cuda" else nullcontext()
