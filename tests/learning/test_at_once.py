"""Threads that take turns at everything but their epochs."""

import gc
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch

from longtail_experts.learning.at_once import at_once, beside_the_others
from longtail_experts.learning.backend import exact_float32, own_flags

LONG = 60  # seconds until a test is taken to hang


def test_results_are_by_name_and_all_work_ends_before_the_first_failure_is_raised():
    assert at_once({"b": lambda: 2, "a": lambda: 1}, "cpu") == {"b": 2, "a": 1}
    has_ended = threading.Event()
    began = threading.Event()

    def fails():
        with beside_the_others():
            assert began.wait(LONG)
        raise KeyboardInterrupt("first")

    def goes_on():
        began.set()
        with beside_the_others():
            pass
        has_ended.set()

    with pytest.raises(KeyboardInterrupt, match="first"):
        at_once({"fails": fails, "goes on": goes_on}, "cpu")
    assert has_ended.is_set()


def test_all_are_beside_each_other_at_the_same_time():
    everyone = threading.Barrier(3, timeout=LONG)

    def work():
        with beside_the_others():
            everyone.wait()  # broken where one of them is kept waiting for its turn

    at_once(dict.fromkeys("abc", work), "cpu")


def test_none_trains_before_all_have_begun_or_ended():
    order = []

    def trains():
        time.sleep(0.02)
        order.append("begin")
        with beside_the_others():
            order.append("train")
        with beside_the_others():  # at once, from now on
            order.append("end")

    def fails():
        order.append("begin")
        raise ValueError("before it trained")

    with pytest.raises(ValueError, match="before it trained"):
        at_once({"a": trains, "b": fails, "c": trains, "d": lambda: None}, "cpu")
    assert order[:3] == ["begin"] * 3
    assert sorted(order[3:]) == ["end", "end", "train", "train"]


def test_the_calling_thread_has_something_to_do_once_all_train():
    order, has_done = [], threading.Event()

    def trains():
        order.append("begin")
        with beside_the_others():
            assert has_done.wait(LONG)
        return "done"

    def meanwhile():
        order.append(threading.current_thread())
        has_done.set()

    ended = at_once(dict.fromkeys("abc", trains), "cpu", meanwhile)
    assert ended == dict.fromkeys("abc", "done")
    assert order == ["begin"] * 3 + [threading.current_thread()]


def test_what_the_calling_thread_brought_meanwhile_is_not_looked_through_either():
    brought, has_brought, left_alone = [], threading.Event(), []

    def trains():
        with beside_the_others():
            assert has_brought.wait(LONG)
            deadline = time.monotonic() + LONG
            while gc.get_freeze_count() < before + 100_000 and time.monotonic() < deadline:
                time.sleep(0.001)
            left_alone.append(gc.get_freeze_count())

    def meanwhile():
        nonlocal before
        before = gc.get_freeze_count()
        brought.extend([] for _ in range(100_000))
        has_brought.set()

    before = 0
    at_once({"a": trains, "b": trains}, "cpu", meanwhile)
    assert min(left_alone) >= before + 100_000
    assert gc.get_freeze_count() == 0


def test_where_all_have_ended_already_the_calling_thread_does_nothing_else():
    """As when a sweep is resumed, or all fail before they train."""
    called = []
    at_once(dict.fromkeys("abc", lambda: None), "cpu", lambda: called.append(1))
    assert called == []


def test_where_not_all_can_begin_those_that_have_do_not_wait_for_them(monkeypatch):
    submit, trained = ThreadPoolExecutor.submit, []

    def refuse_the_third(pool, do, *arguments):
        if len(pool._threads) == 2:
            raise RuntimeError("can't start new thread")
        return submit(pool, do, *arguments)

    def work():
        with beside_the_others():
            trained.append(1)

    monkeypatch.setattr(ThreadPoolExecutor, "submit", refuse_the_third)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        at_once(dict.fromkeys("abc", work), "cpu")
    assert len(trained) == 2


def test_only_one_has_the_turn():
    holders, seen = [], []

    def work():
        for _ in range(20):
            holders.append(threading.get_ident())
            time.sleep(0.001)  # long enough for another thread to come in
            seen.append(len(holders))
            holders.pop()
            with beside_the_others():
                pass

    at_once(dict.fromkeys("abc", work), "cpu")
    assert len(seen) == 60
    assert set(seen) == {1}


def test_a_failure_in_an_epoch_leaves_the_turn_to_the_others():
    def fails():
        with beside_the_others():
            raise ValueError("in an epoch")

    def works():
        with beside_the_others():
            pass
        return "done"

    with pytest.raises(ValueError, match="in an epoch"):
        at_once({"fails": fails, "works": works}, "cpu")


def test_python_changes_hands_often_while_experts_are_at_work():
    """A step asks for it ten times and more: with CPython's 5 ms each, of an expert that draws."""
    before = sys.getswitchinterval()
    intervals = at_once({"a": sys.getswitchinterval, "b": sys.getswitchinterval}, "cpu")
    assert max(intervals.values()) < before / 10
    assert sys.getswitchinterval() == before


def test_outside_of_at_once_there_is_no_turn_to_give_up():
    with beside_the_others():
        pass


@pytest.mark.parametrize("first", [own_flags, exact_float32])
@pytest.mark.parametrize("second", [own_flags, exact_float32])
def test_flags_of_the_process_belong_to_one_thread_at_a_time(first, second):
    inside, order = threading.Event(), []

    def stays():
        with beside_the_others(), first():
            inside.set()
            time.sleep(0.05)
            order.append(("stays", torch.backends.cudnn.allow_tf32))

    def comes():
        with beside_the_others():
            assert inside.wait(LONG)
            with second():
                order.append(("comes", torch.backends.cudnn.allow_tf32))

    before = torch.backends.cudnn.allow_tf32
    assert before, "PyTorch's default: what exact_float32 takes away"
    at_once({"stays": stays, "comes": comes}, "cpu")
    assert order == [("stays", first is own_flags), ("comes", second is own_flags)]
    assert torch.backends.cudnn.allow_tf32 is before


def test_an_expert_without_a_stream_leaves_the_others_to_train(monkeypatch):
    """As where the device has no memory left for one."""
    streams = [nullcontext(), None]  # None is nothing to enter
    monkeypatch.setattr("longtail_experts.learning.at_once._own_stream", lambda _: streams.pop(0))
    trained = threading.Event()

    def trains():
        with beside_the_others():
            trained.set()

    with ThreadPoolExecutor(1) as threads:
        ended = threads.submit(at_once, {"a": trains, "b": trains}, "cuda")
        with pytest.raises((TypeError, AttributeError)):
            ended.result(LONG)
    assert trained.is_set()
