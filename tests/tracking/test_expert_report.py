"""What an expert's page says, from logits made by hand."""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from longtail_experts.config import make_config
from longtail_experts.learning.calibration import deployment_scores
from longtail_experts.learning.metrics import reliability
from longtail_experts.tracking import expert_report


def test_accuracies_stand_with_the_errors_and_images_of_their_own_classes():
    """Recalls 3/4 and 1/2; variances by Laplace's rule, (k + 1) (n - k + 1) / (n + 2)^2 / n."""
    targets = torch.tensor([0] * 4 + [1] * 2)
    logits = torch.eye(2)[[0, 0, 0, 1, 1, 0]]
    groups = {"head": torch.tensor([True, False]), "tail": torch.tensor([False, True])}
    data = SimpleNamespace(
        groups=groups, num_classes=2, split_names=("val_lt",), targets={"val_lt": targets}.get
    )
    table = expert_report.accuracy_table({}, data, {"val_lt": logits})
    head, tail = (4 / 6) * (2 / 6) / 4, (2 / 4) * (2 / 4) / 2
    for name, value, error, num_images in (
        ("balanced", 62.5, np.sqrt(head + tail) / 2, 6),
        ("head", 75, np.sqrt(head), 4),
        ("tail", 50, np.sqrt(tail), 2),
    ):
        assert f"| {name} | {value:.2f} ± {100 * error:.2f} ({num_images}) |" in table


def test_reliability_is_drawn_under_the_prior_of_the_split(monkeypatch):
    drawn = {}
    monkeypatch.setattr(expert_report, "record_curves", lambda *_: None)
    monkeypatch.setattr(
        expert_report.figures, "reliability", lambda panels, _: drawn.update(panels)
    )
    logits = 3 * torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([0] * 40 + [1] * 15 + [2] * 5)
    prior = torch.tensor([0.8, 0.15, 0.05], dtype=torch.float64)
    offset = torch.zeros(3, dtype=torch.float64)
    data = SimpleNamespace(
        num_classes=3, targets=lambda _: targets, targets_if_any=lambda _: targets
    )
    run = SimpleNamespace(artifact=nullcontext)
    uniform = torch.full((3,), 1 / 3, dtype=torch.float64)
    splits = {"test_lt": torch.bincount(targets).double() / 60, "test_balanced": uniform}
    expert_report.record_figures(run, data, dict.fromkeys(splits, logits), 2.0, offset, prior)
    for (title, panel), (split, q) in zip(drawn.items(), splits.items(), strict=True):
        assert title.startswith(split)
        for label, temperature in (("T = 1", 1.0), ("T = 2.00", 2.0)):
            scores = deployment_scores(logits, temperature, offset, prior, q)
            assert np.array_equal(panel[label], reliability(scores.softmax(1), targets))


@pytest.mark.parametrize(
    ("later", "words"),
    [
        ({}, ""),
        ({"resumed": "2"}, "; resumed 2 times"),
        (
            {"resumed": "1", "resumed.git.commit": 40 * "b", "resumed.device": "cuda"},
            "; resumed once with device `cuda`, git.commit `bbbbbbbbbbbb`",
        ),
        (
            {"resumed": "2", "resumed.git.commit": f"{40 * 'b'}, {40 * 'c'}"},
            "; resumed 2 times with git.commit `bbbbbbbbbbbb`, `cccccccccccc`",
        ),
        ({"calibrated.torch": "2.11.0"}, "; calibrated with torch `2.11.0`"),
    ],
)
def test_the_page_says_where_and_by_which_code_every_part_was_made(later, words):
    tags = {"device": "cpu", "precision": "bf16", "git.commit": 40 * "a", "git.dirty": "true"}
    begun = "- on cpu, bf16; commit `aaaaaaaaaaaa` with uncommitted changes"
    assert expert_report.machine_and_commit(tags | later) == begun + words


@pytest.mark.parametrize(
    ("class_counts", "is_uneven"),
    [([99, 80], False), ([15, 10], False), ([16, 10], True), ([3, 0], True)],
)
def test_unequal_test_images_are_said_to_be_no_uniform_prior(class_counts, is_uneven):
    notice = expert_report.uneven_notice(torch.tensor(class_counts))
    least, most = class_counts[1], class_counts[0]
    assert (f"the classes of test_balanced have {least} to {most} images" in notice) is is_uneven
    assert bool(notice) is is_uneven


def test_the_best_validation_is_held_against_the_first(monkeypatch):
    monkeypatch.setattr(expert_report, "read_logits", lambda _: SimpleNamespace(splits={}))
    monkeypatch.setattr(expert_report, "read_checkpoint", lambda *_: None)
    targets = torch.arange(200) % 2
    metrics = {"epoch": 1, "best/val_balanced_accuracy": 0.9, "temperature": 2.0}
    metrics |= {"temperature_at_bound": 0.0, "test_lt/nll": 1.0, "test_lt/nll_uncalibrated": 2.0}
    points = {"train/loss": [(1, 0.1)], "val/balanced_accuracy": [(0, 0.2), (1, 0.9)]}
    run = SimpleNamespace(metrics=metrics, tags={}, history=points.get)
    data = SimpleNamespace(
        split_names=("val_lt", "test_lt"),
        size=lambda _: 0,
        targets=lambda _: targets,
        num_classes=2,
    )
    logits = {"val_lt": torch.eye(2)[targets]}
    checks = expert_report.success_checklist(run, make_config({"epochs": 2}), data, logits)
    (check,) = [check for check in checks if check.what.startswith("best validation")]
    assert check.passed
    assert "first 20.00 %" in check.numbers


def test_a_figure_of_val_lt_stands_with_its_number_of_images():
    data = SimpleNamespace(size={"val_lt": 1072}.get)
    metrics = {"best/epoch": 3, "best/val_balanced_accuracy": 0.25}
    says = expert_report.which_checkpoint(metrics, data)
    assert says == "the checkpoint of epoch 3, best on val_lt (25.00 % balanced, n = 1,072)"
