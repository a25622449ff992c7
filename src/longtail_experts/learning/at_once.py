"""Experts that train at the same time on one GPU: a thread, and a stream, for each.

The kernels of a ResNet-32 at batch 128 are too small and too short to fill a large GPU; those of
another expert go beside them. What is done epoch after epoch does: steps, validations and
checkpoints, in memory and files of the expert's own; and at the end logits, temperature and
metrics. All before that, the first recording of its steps above all, and all else after it is done
by one expert at a time, which has the turn: what opens and ends MLflow's runs and logs models,
Matplotlib and torch.export need not be safe in threads. Points and checkpoints are sent to the
store, and read back, beside the others. The trace that all need is made meanwhile, by the thread
that waits for them; the last figures other processes draw, for which an expert waits without the
turn.
"""

import gc
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import TypeVar

import torch

Result = TypeVar("Result")


# How long a thread may run Python while others wait for it, instead of CPython's 5 ms. A step asks
# for Python ten times and more: beside an expert that draws or writes, each would wait that long.
SWITCH_SECONDS = 1e-4


class _Experts:
    """Those of one `at_once`."""

    def __init__(self, names: Iterable[str]):
        self.turn = threading.Lock()
        self.to_come = set(names)  # who have not been ready to train yet; changed with the turn
        self.at_work = set(names)  # who have not ended
        self.are_ready = threading.Event()

    def has_come(self, name: str) -> None:
        self.to_come.discard(name)
        if not self.to_come:
            self.are_ready.set()


_expert: ContextVar[tuple[_Experts, str] | None] = ContextVar("expert", default=None)


def at_once(
    work: Mapping[str, Callable[[], Result]],
    device: str,
    meanwhile: Callable[[], None] = lambda: None,
) -> dict[str, Result]:
    """What each piece of work returns, each in a thread of its own that starts with the turn.

    `meanwhile` is called once none begins any more, unless all have ended: without the turn, in
    the calling thread, which else would only wait. Returns when all have ended, then raises what
    the first of those that failed, in the order of `work`, raised.
    """
    experts = _Experts(work)

    def in_turn(name: str, do: Callable[[], Result]) -> Result:
        _expert.set((experts, name))
        with experts.turn:
            try:
                with _own_stream(device):
                    return do()
            finally:
                experts.at_work.discard(name)
                experts.has_come(name)

    with _python_for_threads(), ThreadPoolExecutor(len(work), "expert") as threads:
        try:
            begun = {name: threads.submit(in_turn, name, do) for name, do in work.items()}
        except BaseException:  # those that have begun wait for one that does not come
            experts.are_ready.set()
            raise
        experts.are_ready.wait()
        if experts.at_work:
            meanwhile()
            gc.freeze()  # what it imported
    return {name: future.result() for name, future in begun.items()}


@contextmanager
def beside_the_others() -> Iterator[None]:
    """In here without the turn. Outside `at_once`, where there are no others: nothing.

    Goes on once all have come here, or ended: beside experts that train, the others' beginnings,
    with the recording of their steps, took several times as long.
    """
    expert = _expert.get()
    if expert is None:
        yield
        return
    experts, name = expert
    experts.has_come(name)
    experts.turn.release()
    try:
        experts.are_ready.wait()
        yield
    finally:
        experts.turn.acquire()


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
