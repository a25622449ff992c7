"""Whether the process that filled a run is still there."""

import subprocess
import sys

import psutil
import pytest

from longtail_experts.tracking.processes import is_alive, is_on_this_host, process_tags


def test_this_process_is_alive_and_here():
    tags = process_tags()
    assert is_on_this_host(tags)
    assert is_alive(tags)


@pytest.mark.skipif(not hasattr(psutil, "_pslinux"), reason="looks into psutil's Linux part")
def test_setting_the_clock_makes_no_process_another(monkeypatch):
    tags, boot_time = process_tags(), psutil._pslinux.boot_time
    monkeypatch.setattr(psutil._pslinux, "boot_time", lambda: boot_time() + 3600)
    assert is_alive(tags)


def test_another_process_of_the_same_pid_is_not_this_one():
    tags = process_tags()
    assert not is_alive({**tags, "process_started": str(float(tags["process_started"]) - 1)})


@pytest.mark.parametrize("reaped", [True, False])
def test_a_dead_process_is_not_alive(reaped):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        started = psutil.Process(process.pid).create_time() - psutil.boot_time()
        tags = {"pid": str(process.pid), "process_started": f"{started:.2f}"}
        assert is_alive(tags)
        process.kill()
        if reaped:
            process.wait()
        else:  # a zombie, of which the pid is still taken
            while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
                pass
        assert not is_alive(tags)


@pytest.mark.parametrize("tags", [{}, {"pid": "x", "process_started": "1"}, {"pid": "1"}])
def test_tags_that_say_nothing_are_of_no_process(tags):
    assert not is_alive(tags)
