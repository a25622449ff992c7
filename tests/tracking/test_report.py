"""Every box of the success checklist can fail, and shows its numbers when it does."""

import math

import pytest

from longtail_experts.tracking.report import (
    calibration_markdown,
    checklist_markdown,
    checkpoints_load,
    fitting,
    logits_complete,
    table,
    temperature_helps,
    trained_to_the_end,
    validation_improved,
    with_air,
)


@pytest.mark.parametrize(
    ("check", "passed", "numbers"),
    [
        (trained_to_the_end(256, 256, False, [3.0, 0.1]), True, "256 of 256"),
        (trained_to_the_end(10, 256, True, [3.0, 0.1]), True, "stopped early"),
        (trained_to_the_end(255, 256, False, [3.0, 0.1]), False, "255 of 256"),
        (trained_to_the_end(256, 256, False, [math.nan, 0.1]), False, "0.1"),
        (trained_to_the_end(256, 256, False, []), False, "none logged"),
        (validation_improved(0.40, 0.10, 100, 0.02), True, "40.00 %"),
        (validation_improved(0.15, 0.10, 100, 0.02), False, "first 10.00 %"),
        (validation_improved(0.06, 0.00, 100, 0.02), False, "chance 1.00 %"),
        (temperature_helps(1.7, "", 2.0, 2.5), True, "T = 1.7000"),
        (temperature_helps(1.7, "", 2.5, 2.5), False, "2.5000 against 2.5000"),
        (temperature_helps(54.6, " at the bound", 2.0, 2.5), False, "54.6000 at the bound, NLL"),
        (logits_complete({"calib": 5}, {"calib": 5}), True, "5 rows"),
        (logits_complete({"calib": 4}, {"calib": 5}), False, "missing or short: calib"),
        (logits_complete({}, {"calib": 5}), False, "missing or short: calib"),
        (logits_complete({"calib": 5}, {"calib": 5}, "calib: nan"), False, "calib: nan"),
        (checkpoints_load({"best": "", "last": ""}), True, "best, last"),
        (checkpoints_load({"best": "", "last": "damaged"}), False, "last: damaged"),
    ],
)
def test_boxes(check, passed, numbers):
    assert check.passed is passed
    assert numbers in check.numbers
    box = checklist_markdown([check])
    assert box.startswith("- ☑ " if passed else "- ☐ ")
    assert numbers in box


def test_tables_are_markdown():
    assert table(("a", "b"), [["x", "1"]]) == "| a | b |\n| --- | ---: |\n| x | 1 |"


def test_tables_of_descriptions_get_air_and_nothing_else_does():
    assert with_air(f"a | b\n{table(('a', 'b'), [['x', '1']])}") == (
        "a | b\n| a | &emsp;b |\n| --- | ---: |\n| x | &emsp;1 |"
    )


def test_what_fits_is_measured_with_its_air():
    part = table(("a", "b"), [["x", "1"]] * 700)
    assert len(part) < 8000 < len(with_air(part))
    assert fitting(["start", part], "more") == "start\n\nmore"


@pytest.mark.parametrize("at_bound", [False, True])
def test_a_temperature_where_the_search_ends_is_no_estimate(at_bound):
    found = {"temperature": 54.6, "temperature_low": 18.7, "temperature_high": 54.6}
    text = calibration_markdown({**found, "temperature_at_bound": float(at_bound)})
    assert ("at the bound of the search" in text) == at_bound
    assert ("of which an end is the bound of the search" in text) != at_bound


def test_a_half_whose_search_ends_at_its_bound_is_told_from_the_whole():
    found = {"temperature": 0.69, "temperature_low": 0.5, "temperature_high": 0.9}
    halves = {"temperature_half_0": math.exp(-4), "temperature_half_1": 0.9}
    text = calibration_markdown({**found, **halves, "temperature_at_bound": 1.0})
    assert "Temperature 0.6900 (95 % interval 0.500 to 0.900), that of a half at the bound" in text


def test_an_interval_within_the_search_is_one():
    found = {"temperature": 2.0, "temperature_low": 0.02, "temperature_high": 54.0}
    assert "bound" not in calibration_markdown(found)
