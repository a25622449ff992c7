"""Figures drawn by other processes are those that this one draws, whatever becomes of them."""

import os
import signal
import subprocess
import sys
from functools import partial

import psutil
import pytest

from longtail_experts.learning.at_once import at_once
from longtail_experts.tracking import drawing, figures
from longtail_experts.tracking.drawing import draw, drawing_processes

RATES = [0.0, 0.1, 0.1, 0.01]


def schedule(path):
    return partial(figures.lr_schedule, RATES, 2, path)


def note_process(path):
    """A drawing that tells who draws, and whether PyTorch was imported for it."""
    return partial(
        exec,
        "import os, sys; open(path, 'w').write(f'{os.getpid()} {\"torch\" in sys.modules}')",
        {"path": str(path)},
    )


def test_figures_are_the_same_to_the_byte(tmp_path, drawn_figures):
    here, *there = (tmp_path / f"{name}.png" for name in ("here", "0", "1", "2"))
    draw(schedule(here))
    with drawing_processes(2):
        draw(*map(schedule, there))
    assert {path.read_bytes() for path in there} == {here.read_bytes()}


def test_other_processes_draw_and_import_no_torch_and_end(tmp_path):
    with drawing_processes(2):
        draw(note_process(tmp_path / "who"))
    pid, has_torch = (tmp_path / "who").read_text().split()
    assert int(pid) != os.getpid()
    assert has_torch == "False"
    assert not psutil.pid_exists(int(pid))
    draw(note_process(tmp_path / "who"))
    assert (tmp_path / "who").read_text().startswith(f"{os.getpid()} ")


@pytest.mark.parametrize("number", [0, 1])
def test_what_a_drawing_raises_is_raised(number):
    with drawing_processes(number), pytest.raises(ZeroDivisionError):
        draw(partial(divmod, 1, 0))


def test_where_a_process_that_draws_is_killed_this_one_draws(tmp_path):
    killed = "import os\nif os.getpid() != parent: os.kill(os.getpid(), 9)"
    with drawing_processes(1):
        for _ in range(2):
            who = tmp_path / "who"
            draw(partial(exec, killed, {"parent": os.getpid()}), note_process(who))
            assert who.read_text().startswith(f"{os.getpid()} ")
            who.unlink()


def test_where_there_can_be_no_other_processes_this_one_draws(tmp_path, monkeypatch):
    def fail(*arguments, **settings):
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(drawing.subprocess, "Popen", fail)
    with drawing_processes(3):
        draw(note_process(tmp_path / "who"))
    assert (tmp_path / "who").read_text().startswith(f"{os.getpid()} ")


WAIT_FOR = """
import os, time
until = time.monotonic() + 20
while not os.path.exists(path):
    assert time.monotonic() < until
    time.sleep(0.01)
"""


def test_an_expert_that_waits_for_a_figure_leaves_its_turn_to_the_others(tmp_path):
    """Each of two waits for a file that the other one's thread writes only once it has the turn."""
    names = ("first", "second")

    def work(mine, other):
        (tmp_path / mine).touch()
        draw(partial(exec, WAIT_FOR, {"path": str(tmp_path / other)}))
        return mine

    with drawing_processes(2):
        pairs = {mine: partial(work, mine, other) for mine, other in (names, names[::-1])}
        assert at_once(pairs, "cpu") == {name: name for name in names}


# No `if __name__ == "__main__"`: such a program, run again by each of them, would train again.
PARENT = """
import sys
from functools import partial
from longtail_experts.tracking.drawing import draw, drawing_processes

with drawing_processes(2):
    draw(partial(exec, "import os; print(os.getppid(), file=os.fdopen(2, 'w'))"))
    sys.stdin.read()
"""


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_they_end_with_their_parent_however_it_ends(tmp_path, number):
    (tmp_path / "parent.py").write_text(PARENT)
    parent = subprocess.Popen(
        [sys.executable, tmp_path / "parent.py"], stdin=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert int(parent.stderr.readline()) == parent.pid
    children = psutil.Process(parent.pid).children(recursive=True)
    assert len(children) == 2
    parent.send_signal(number)
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive
    parent.communicate()
