"""What is said of experts trained by two kinds of kernel."""

import argparse

import pytest
from agreement import comparison, config_of, layers_apart
from conftest import TINY_EXPERT
from scipy import stats

from longtail_experts.config import make_config
from longtail_experts.stages.inputs import load_dataset


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


def test_on_a_cpu_no_layer_has_kernels_to_compare(image_folder):
    config = make_config({**TINY_EXPERT, "data_dir": str(image_folder), "fused": "true"})
    assert list(layers_apart(config, load_dataset(config))) == []
