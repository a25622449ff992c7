"""The chain on real images: a few hundred of them, for the plumbing and not for the numbers."""

import mlflow
import pytest
from mlflow import MlflowClient

from longtail_experts import load_expert_logits
from longtail_experts.cli import main

pytestmark = pytest.mark.real


def test_full_recipe_splits_of_real_images(store, real_data_dir, capsys):
    assert main(["data", "--config", "cifar100_lt", "--data_dir", real_data_dir]) == 0
    out = capsys.readouterr().out
    for split, size in (
        ("train", "8,677"),
        ("tuneV", "868"),
        ("val_small", "651"),
        ("calib", "651"),
        ("val_lt", "1,072"),
        ("test_lt", "4,287"),
        ("test_balanced", "8,928"),
    ):
        assert f"| {split} | {size} |" in out


def test_a_short_expert_on_real_images(store, real_data_dir):
    arguments = ["--config", "cifar100_lt", "--data_dir", real_data_dir, "--epochs", "1"]
    arguments += ["--imbalance_factor", "4", "--images_per_class", "8", "--milestones", "none"]
    assert main(["main", "--loss", "logit_adjust", *arguments]) == 0
    experiment = mlflow.get_experiment_by_name("tests").experiment_id
    (run,) = MlflowClient().search_runs([experiment])
    assert run.info.status == "FINISHED"
    expert = load_expert_logits(run.info.run_id)
    assert len(expert.class_names) == 100
    assert expert.class_names[0] == "apple"
    assert sum(len(expert.splits[s].targets) for s in ("val_lt", "test_balanced")) == 10_000
