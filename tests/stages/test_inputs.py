"""What of a config reaches a training: every knob, and a seed of its own for each expert."""

from types import SimpleNamespace

import pytest
import torch

from longtail_experts.config import LOSS_NAMES, load_config, make_config
from longtail_experts.learning.losses import objective_of
from longtail_experts.stages.inputs import (
    augmentation_of,
    build_network,
    for_one_expert,
    knobs_of,
    objective_at,
    schedule_of,
    state_before_training,
)

COUNTS = torch.tensor([50, 5, 1])
DATA = SimpleNamespace(
    class_counts=lambda split: COUNTS, size=lambda split: int(COUNTS.sum()), num_classes=3
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


@pytest.mark.parametrize("loss", ["logit_adjust", "class_balanced", "focal", "ldam_drw"])
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
