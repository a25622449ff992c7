"""Signals noted by the main thread, and acted on by those that train beside each other."""

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from longtail_experts.stages.interrupts import (
    Terminated,
    delayed_signals,
    heed,
    stop_if_heeded,
)


def in_a_thread(work):
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(work).result()


def test_a_thread_acts_on_what_the_main_thread_noted():
    def work(arrived):
        heed(arrived)
        with delayed_signals() as seen:
            os.kill(os.getpid(), signal.SIGTERM)
            threading.Event().wait(0.2)  # the main thread waits for this one, and notes
            assert seen == [signal.SIGTERM]
        stop_if_heeded("at step 3")

    with pytest.raises(Terminated, match="at step 3"), delayed_signals() as arrived:
        in_a_thread(lambda: work(arrived))


def test_a_thread_still_stops_when_the_main_thread_has_left_its_block():
    """As after a second Ctrl-C, which does not wait."""
    begun, left = threading.Event(), threading.Event()

    def work(arrived):
        heed(arrived)
        begun.set()
        assert left.wait(60)
        with delayed_signals() as seen:
            return list(seen)

    def is_left_at_the_second(threads):
        with delayed_signals() as arrived:
            started.append(threads.submit(work, arrived))
            assert begun.wait(60)
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    started = []
    with ThreadPoolExecutor(1) as threads:
        with pytest.raises(KeyboardInterrupt):
            is_left_at_the_second(threads)
        left.set()
        assert started[0].result() == [signal.SIGINT]


def test_a_thread_that_was_told_nothing_heeds_nothing():
    def work():
        stop_if_heeded("never")
        with delayed_signals() as seen:
            return list(seen)

    def with_a_signal_noted():
        with delayed_signals() as arrived:
            arrived.append(signal.SIGTERM)
            assert in_a_thread(work) == []

    with pytest.raises(Terminated):
        with_a_signal_noted()


def test_outside_such_threads_nothing_stops():
    stop_if_heeded("never")
