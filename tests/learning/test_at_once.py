"""Threads that take turns at everything but their epochs."""

import threading
import time

import pytest
import torch

from longtail_experts.learning.at_once import at_once, beside_the_others, wait_until_alone

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


def test_who_waits_to_be_alone_goes_on_when_the_last_has_left_its_epochs():
    in_epochs, waits, order = threading.Barrier(3, timeout=LONG), threading.Event(), []

    def exports():
        with beside_the_others():
            in_epochs.wait()
        waits.set()
        wait_until_alone()
        order.append("export")

    def trains():
        with beside_the_others():
            in_epochs.wait()
            assert waits.wait(LONG)
            time.sleep(0.05)
            order.append("epoch")

    at_once({"exports": exports, "b": trains, "c": trains}, "cpu")
    assert order == ["epoch", "epoch", "export"]


def test_outside_of_at_once_there_is_no_turn_to_give_up():
    with beside_the_others():
        pass
    wait_until_alone()


def test_flags_of_the_process_stay_as_they_are_while_threads_set_them():
    """One thread leaves `exact_float32` while another is in it."""
    from longtail_experts.learning.step import exact_float32

    inside, left = threading.Event(), threading.Event()

    def leaves():
        with beside_the_others():
            with exact_float32():
                assert inside.wait(LONG)
            left.set()

    def stays():
        with beside_the_others(), exact_float32():
            inside.set()
            assert left.wait(LONG)
            return torch.backends.cudnn.allow_tf32

    before = torch.backends.cudnn.allow_tf32
    assert before, "PyTorch's default: what a thread would put back too early"
    assert at_once({"leaves": leaves, "stays": stays}, "cpu")["stays"] is False
    assert torch.backends.cudnn.allow_tf32 is before
