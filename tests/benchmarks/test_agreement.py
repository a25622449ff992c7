"""What is said of experts trained by two kinds of kernel."""

import argparse

import pytest
from agreement import comparison, config_of, layers_apart, measured
from conftest import TINY_EXPERT
from scipy import stats
from sklearn.metrics import balanced_accuracy_score

from longtail_experts.config import make_config
from longtail_experts.learning.calibration import fit_temperature
from longtail_experts.learning.losses import prior_of
from longtail_experts.stages.calibrate import split_logits
from longtail_experts.stages.inputs import build_network, for_one_expert, load_dataset


def test_a_comparison_is_that_of_pairs():
    fused, pytorch = [30.0, 31.0, 33.5], [29.0, 31.5, 33.0]
    found = comparison(fused, pytorch)
    assert found["difference"] == pytest.approx(found["fused"] - found["pytorch"])
    t, _ = stats.ttest_rel(fused, pytorch)
    assert found["difference"] / found["standard_error"] == pytest.approx(t)


def test_milestones_move_with_the_epochs():
    options = argparse.Namespace(data_dir=None, epochs=32)
    config = config_of(options, seed=3, is_fused=True)
    assert config.milestones == (12, 24, 28)  # 96, 192 and 224 of 256
    assert (config.epochs, config.seed, config.fused) == (32, 3, True)


def test_what_is_measured_of_an_expert_is_what_calibration_finds(image_folder):
    config = for_one_expert(
        make_config({**TINY_EXPERT, "data_dir": str(image_folder)}), "logit_adjust"
    )
    data = load_dataset(config)
    network = build_network(config, data)
    found = measured(network, config, data)
    logits = split_logits(network, config, data)
    prior = prior_of(data.class_counts("train"))
    fitted = fit_temperature(
        logits["calib"], data.targets("calib"), prior.log(), bootstrap_seed=config.split_seed
    )
    assert found["temperature"] == fitted.value
    predictions = logits["test_balanced"].argmax(1).numpy()
    expected = balanced_accuracy_score(data.targets("test_balanced").numpy(), predictions)
    assert found["balanced"] == pytest.approx(100 * expected)


def test_on_a_cpu_no_layer_has_kernels_to_compare(image_folder):
    config = make_config({**TINY_EXPERT, "data_dir": str(image_folder), "fused": "true"})
    assert list(layers_apart(config, load_dataset(config))) == []
