"""Who draws figures: this process or, for experts that end at the same time, others beside it.

Python draws one figure at a time, however many threads ask for one. The others are this module as a
program, which imports no PyTorch: it draws what it reads, until there is no one to read from.
"""

import logging
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from io import BytesIO
from queue import SimpleQueue
from typing import BinaryIO

log = logging.getLogger(__name__)

Drawing = Callable[[], None]  # a partial call of a function of `figures` or its like
DRAWN, FAILED = b"+", b"-"
_others: list[Callable[[Sequence[Drawing]], list[bool]]] = []  # what has them draw, if anything


def draw(*drawings: Drawing) -> None:
    """All are drawn when it returns. Raises what one of them raised.

    Where there are `drawing_processes` they draw, and an expert of `at_once` waits for them
    without its turn; this process draws what they could not.
    """
    are_drawn = _others[-1](drawings) if _others else [False] * len(drawings)
    for drawing, is_drawn in zip(drawings, are_drawn, strict=True):
        if not is_drawn:
            drawing()


@contextmanager
def drawing_processes(number: int) -> Iterator[None]:
    """In here `draw` has so many processes, which import Matplotlib meanwhile; 0 for none.

    They end with this, and with this process however it ends.
    """
    if not number:
        yield
        return
    # Not at the top of this module: it needs PyTorch.
    from longtail_experts.learning.at_once import beside_the_others

    idle: SimpleQueue[subprocess.Popen] = SimpleQueue()

    def is_drawn(drawing: Drawing) -> bool:
        process = idle.get()
        try:
            return _draws(process, drawing)
        finally:
            idle.put(process)

    with ExitStack() as at_its_end:
        threads = at_its_end.enter_context(ThreadPoolExecutor(number, "drawing"))

        def are_drawn(drawings: Sequence[Drawing]) -> list[bool]:
            with beside_the_others():
                return list(threads.map(is_drawn, drawings))

        try:
            for _ in range(number):
                process = _begun()
                at_its_end.callback(_end, process)
                idle.put(process)
            _others.append(are_drawn)
            at_its_end.callback(_others.pop)
        except OSError as error:
            log.debug("figures are drawn by this process: %s", error)
        yield


def _begun() -> subprocess.Popen:
    """In a session of its own: Ctrl-C is for this process."""
    path = os.pathsep.join(filter(None, sys.path))
    return subprocess.Popen(
        [sys.executable, "-m", __name__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
        start_new_session=True,
    )


def _draws(process: subprocess.Popen, drawing: Drawing) -> bool:
    order = pickle.dumps(drawing)
    try:
        process.stdin.write(order)
        process.stdin.flush()
        return process.stdout.read(1) == DRAWN
    except OSError as error:  # it was killed
        log.debug("a figure is drawn by this process: %s", error)
        return False


def _end(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()
    process.stdout.close()
    with suppress(OSError):  # of what it had not read
        process.stdin.close()


def serve(orders: BinaryIO, answers: BinaryIO) -> None:
    """Draw each order, and answer it with a byte, to the end of the orders."""
    from longtail_experts.tracking import figures

    figures.lr_schedule([0.1, 0.1], 1, BytesIO())  # the first one takes longest
    while True:
        try:
            pickle.load(orders)()
            answer = DRAWN
        except EOFError:
            return
        except Exception:  # the parent draws it again, and meets it
            answer = FAILED
        answers.write(answer)
        answers.flush()


if __name__ == "__main__":
    answers, sys.stdout = sys.stdout.buffer, sys.stderr  # whatever may print
    serve(sys.stdin.buffer, answers)
