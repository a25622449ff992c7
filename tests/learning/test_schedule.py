import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longtail_experts.learning.schedule import lr_at, lr_by_epoch, steps_worth_logging

STEPS, EPOCHS, MILESTONES = 68, 256, (96, 192, 224)
WARMUPS = (0, 1, 15, 68, 136)


def recipe_lr(step: int, warmup_steps: int) -> float:
    return lr_at(
        step,
        lr=0.4,
        lr_decay=0.1,
        milestones=MILESTONES,
        warmup_steps=warmup_steps,
        steps_per_epoch=STEPS,
    )


def slow_schedule(lr, decay, milestones, warmup, steps_per_epoch, epochs) -> list[float]:
    """Every LR of a training, by walking through it."""
    rates, step, base = [], 0, lr
    for epoch in range(epochs):
        for milestone in milestones:
            if milestone == epoch:
                base *= decay
        for _ in range(steps_per_epoch):
            step += 1
            rates.append(base * step / warmup if step < warmup else base)
    return rates


@pytest.mark.parametrize("warmup", WARMUPS)
@pytest.mark.parametrize(
    ("epoch", "before", "after"), [(96, 0.4, 0.04), (192, 0.04, 0.004), (224, 0.004, 0.0004)]
)
def test_each_milestone_acts_from_its_first_step(warmup, epoch, before, after):
    assert recipe_lr(epoch * STEPS - 1, warmup) == pytest.approx(before)
    assert recipe_lr(epoch * STEPS, warmup) == pytest.approx(after)
    assert recipe_lr(epoch * STEPS + 1, warmup) == pytest.approx(after)


@pytest.mark.parametrize("warmup", [15, 68, 136])
def test_warmup_is_linear_and_full_at_its_last_step(warmup):
    assert recipe_lr(0, warmup) == pytest.approx(0.4 / warmup)
    assert recipe_lr(1, warmup) == pytest.approx(0.8 / warmup)
    assert recipe_lr(warmup - 2, warmup) == pytest.approx(0.4 * (warmup - 1) / warmup)
    assert recipe_lr(warmup - 1, warmup) == 0.4
    assert recipe_lr(warmup, warmup) == 0.4
    assert recipe_lr(warmup + 1, warmup) == 0.4


def test_a_cosine_is_warmed_up_as_well():
    half_way = 0.4 * (1 + math.cos(math.pi / 2)) / 2
    settings = {"lr": 0.4, "lr_decay": 0.1, "milestones": (), "steps_per_epoch": STEPS}
    for warmup, share in (({"warmup_epochs": 200}, 129 / 200), ({"warmup_steps": 40_000}, 0.21763)):
        found = lr_at(128 * STEPS, **{"warmup_steps": 0, **settings, **warmup}, cosine_epochs=256)
        assert found == pytest.approx(half_way * share, rel=1e-4)


@pytest.mark.parametrize("warmup", [0, 1])
def test_no_warmup_starts_at_the_full_rate(warmup):
    assert recipe_lr(0, warmup) == 0.4
    assert recipe_lr(1, warmup) == 0.4


@pytest.mark.parametrize("warmup", WARMUPS)
def test_last_step(warmup):
    assert recipe_lr(EPOCHS * STEPS - 1, warmup) == pytest.approx(0.0004)


@pytest.mark.parametrize("warmup", WARMUPS)
def test_the_whole_recipe_equals_a_walk_through_it(warmup):
    expected = slow_schedule(0.4, 0.1, MILESTONES, warmup, STEPS, EPOCHS)
    rates = [recipe_lr(step, warmup) for step in range(EPOCHS * STEPS)]
    np.testing.assert_allclose(rates, expected, rtol=1e-12)


schedules = st.fixed_dictionaries(
    {
        "milestones": st.lists(st.integers(0, 8), max_size=3, unique=True).map(sorted).map(tuple),
        "warmup_steps": st.integers(0, 30),
        "steps_per_epoch": st.integers(1, 7),
        "epochs": st.integers(1, 8),
    }
)


@settings(max_examples=80, deadline=None)
@given(schedules)
def test_any_schedule_equals_a_walk_through_it(case):
    """Warm-ups that reach past a milestone or the end, milestones at epoch 0 or past the end."""
    epochs = case.pop("epochs")
    expected = slow_schedule(
        0.3, 0.2, case["milestones"], case["warmup_steps"], case["steps_per_epoch"], epochs
    )
    rates = [lr_at(step, lr=0.3, lr_decay=0.2, **case) for step in range(len(expected))]
    np.testing.assert_allclose(rates, expected, rtol=1e-12)


@settings(max_examples=80, deadline=None)
@given(schedules)
def test_the_logged_steps_tell_the_whole_schedule(case):
    """Holding the last logged value gives back the LR of every step."""
    epochs = case.pop("epochs")
    shape = {"warmup_steps": case["warmup_steps"], "steps_per_epoch": case["steps_per_epoch"]}
    logged = steps_worth_logging(**shape, epochs=epochs)
    last = None
    for step in range(epochs * case["steps_per_epoch"]):
        rate = lr_at(step, lr=0.3, lr_decay=0.2, **case)
        last = rate if step in logged else last
        assert rate == last


@pytest.mark.parametrize("warmup", WARMUPS)
def test_logged_steps_of_the_recipe(warmup):
    logged = steps_worth_logging(warmup_steps=warmup, steps_per_epoch=STEPS, epochs=EPOCHS)
    assert logged == sorted(set(logged))
    assert set(range(warmup)) <= set(logged)
    assert {epoch * STEPS for epoch in range(EPOCHS)} <= set(logged)
    epochs_after_warmup = sum(epoch * STEPS >= warmup for epoch in range(EPOCHS))
    assert len(logged) == warmup + epochs_after_warmup


def test_a_warmup_longer_than_the_training_logs_no_step_past_its_end():
    assert steps_worth_logging(warmup_steps=100, steps_per_epoch=3, epochs=2) == list(range(6))


def test_epochs_of_one_rate_share_a_row():
    def rows(warmup: int) -> list:
        return lr_by_epoch(lambda step: recipe_lr(step, warmup), EPOCHS, STEPS)

    levels = [(96, 191, 0.04), (192, 223, 0.004), (224, 255, 0.0004)]
    assert rows(68)[0] == (0, 0, pytest.approx(0.4 / 68), pytest.approx(0.4))
    assert [row[:2] for row in rows(0)] == [(0, 95), *(level[:2] for level in levels)]
    for row, (first, last, rate) in zip(rows(68)[2:], levels, strict=True):
        assert row == (first, last, pytest.approx(rate), pytest.approx(rate))
    assert [row[:2] for row in rows(136)][:3] == [(0, 0), (1, 1), (2, 95)]


LDAM = {
    "lr": 0.1,
    "lr_decay": 0.01,
    "milestones": (160, 180),
    "warmup_steps": 0,
    "warmup_epochs": 5,
    "steps_per_epoch": 85,
}


def test_the_schedule_of_ldam_epoch_by_epoch():
    """The authors count epochs from 1: lr e / 5 up to 5, x0.01 after 160, x0.0001 after 180."""
    for epoch in range(1, 201):
        expected = 0.1
        if epoch <= 5:
            expected = 0.1 * epoch / 5
        elif epoch > 180:
            expected = 0.1 * 0.0001
        elif epoch > 160:
            expected = 0.1 * 0.01
        for step in ((epoch - 1) * 85, epoch * 85 - 1):
            assert lr_at(step, **LDAM) == pytest.approx(expected, rel=1e-12)


def test_a_cosine_falls_from_the_rate_to_nothing():
    settings = {**LDAM, "milestones": (3,), "warmup_epochs": 0, "cosine_epochs": 400}
    total = 400 * 85
    assert lr_at(0, **settings) == 0.1
    assert lr_at(total // 2, **settings) == pytest.approx(0.05)
    assert lr_at(total // 4, **settings) == pytest.approx(0.1 * (1 + math.sqrt(0.5)) / 2)
    assert 0 < lr_at(total - 1, **settings) < 1e-8
