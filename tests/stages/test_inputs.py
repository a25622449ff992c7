"""What of a config reaches a training: every knob, and a seed of its own for each expert."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from longtail_experts.config import LOSS_NAMES, load_config, make_config
from longtail_experts.learning.losses import objective_of
from longtail_experts.learning.resnet import build_resnet32
from longtail_experts.stages import inputs
from longtail_experts.stages.inputs import (
    augmentation_of,
    build_network,
    for_one_expert,
    knobs_of,
    objective_at,
    schedule_of,
    state_before_training,
    steps_an_epoch,
)

COUNTS = torch.tensor([50, 5, 1])
COUNTS_OF = {"train": COUNTS, "calib": COUNTS.flip(0), "test_balanced": torch.tensor([7, 8, 9])}
DATA = SimpleNamespace(
    class_counts=COUNTS_OF.get, size=lambda split: int(COUNTS_OF[split].sum()), num_classes=3
)


def test_no_knob_is_left_at_its_default():
    asked = {"tau": 0.5, "beta": 0.9, "gamma": 3.0}
    assert knobs_of(make_config(asked))._asdict() == asked
    asked = {"augmentation": "randaugment", "cutout": 7, "mixup": 0.3}
    found = augmentation_of(make_config(asked))
    asked["policy"] = asked.pop("augmentation")
    assert found._asdict() == asked
    asked = {"lr": 0.07, "momentum": 0.3, "weight_decay": 0.02}
    config = make_config({**asked, "loss": "ce", "device": "cpu", "precision": "fp32"})
    network = torch.nn.Linear(2, 2)
    defaults = state_before_training(network, config, DATA).optimizer.defaults
    assert {name: defaults[name] for name in asked} == asked


@pytest.mark.parametrize(
    "loss", ["logit_adjust", "balanced_softmax", "class_balanced", "focal", "ldam_drw"]
)
def test_the_loss_of_an_epoch_is_the_one_asked_for(loss):
    knobs = {"tau": 0.5, "beta": 0.9, "gamma": 3.0}
    config = make_config({"loss": loss, "device": "cpu", "milestones": "160,180", **knobs})
    logits, targets = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    for epoch in (159, 160, 179, 180):
        expected = objective_of(
            loss, COUNTS, knobs_of(config), is_reweighted=loss != "ldam_drw" or epoch >= 160
        )
        ours = objective_at(epoch, config, DATA)(logits, targets)
        assert float(ours) == pytest.approx(float(expected(logits, targets)), rel=1e-12)


def test_experts_of_one_seed_begin_with_weights_of_their_own():
    configs = [for_one_expert(make_config({"seed": 3}), loss) for loss in LOSS_NAMES]
    assert {config.seed for config in configs} == {3}
    first = [build_network(config, DATA).backbone.conv1.weight for config in configs]
    for i, weights in enumerate(first):
        assert not any(torch.equal(weights, other) for other in first[:i])
    again = build_network(configs[0].replace(seed=9), DATA).backbone.conv1.weight
    assert torch.equal(again, first[0])  # of expert_seed alone


def test_the_strong_recipe_warms_up_under_its_cosine():
    rate = schedule_of(load_config("strong", {}), steps_per_epoch=85)
    assert [rate(85 * epoch) for epoch in range(5)] == pytest.approx(
        [0.1 * (epoch + 1) / 5 for epoch in range(5)], rel=1e-3
    )


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (
            {"lr_schedule": "cosine", "epochs": 10},
            [0.2 + 0.2 * math.cos(e / 10 * math.pi) for e in range(10)],
        ),
        ({"milestones": "2,4", "epochs": 6}, [0.4, 0.4, 0.04, 0.04, 0.004, 0.004]),
    ],
    ids=["cosine", "milestones"],
)
def test_the_rate_falls_over_all_epochs_asked_for(fields, expected):
    config = make_config({"lr": 0.4, "warmup_steps": 0, "lr_decay": 0.1, **fields})
    rate = schedule_of(config, steps_per_epoch=3)
    assert [rate(3 * epoch) for epoch in range(config.epochs)] == pytest.approx(expected)


@pytest.mark.parametrize(("num_images", "steps"), [(7, 2), (8, 2), (9, 3)])
def test_an_epoch_has_a_step_for_the_images_that_are_left(num_images, steps):
    data = SimpleNamespace(size={"train": num_images}.get)
    assert steps_an_epoch(make_config({"batch_size": 4}), data) == steps


def test_every_switch_reaches_the_steps(monkeypatch):
    seen = {}
    monkeypatch.setattr(inputs, "start_training", lambda model, **given: seen.update(given))
    asked = {"fast": False, "fused": True, "device": "cpu", "precision": "bf16"}
    state_before_training(None, make_config({**asked, "epochs": 7}), DATA)
    assert {name: seen[name] for name in asked} == asked
    assert seen["planned_images"] == 7 * 56


@pytest.mark.parametrize(
    ("shortcut", "loss", "head"), [("pad", "ldam_drw", "cosine"), ("projection", "ce", "linear")]
)
def test_the_network_is_the_one_asked_for(shortcut, loss, head):
    config = make_config({"shortcut": shortcut, "loss": loss, "expert_seed": 3})
    ours = build_network(config, DATA).state_dict()
    theirs = build_resnet32(3, shortcut, 3, head).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_mixup_reaches_the_loss():
    config = make_config({"loss": "ce", "mixup": 0.4, "device": "cpu"})
    logits = torch.randn(4, 3)
    own, partners = torch.tensor([0, 1, 2, 0]), torch.tensor([1, 1, 0, 2])
    ours = objective_at(0, config, DATA)(logits, (own, partners, torch.tensor(0.3)))
    expected = 0.3 * F.cross_entropy(logits, own) + 0.7 * F.cross_entropy(logits, partners)
    assert float(ours) == pytest.approx(float(expected))
