"""Every cell of what is recorded is of what its row and column say."""

import csv
import json
import math
import shlex
from contextlib import nullcontext
from types import SimpleNamespace

import mlflow
import pytest
import torch
from conftest import OTHER
from fake_trials import add_sweep, add_trial
from mlflow import MlflowClient

from longtail_experts import load_expert_logits
from longtail_experts.cli import main
from longtail_experts.config import Config, load_config, make_config
from longtail_experts.data.longtail import class_groups
from longtail_experts.stages.inputs import for_one_expert
from longtail_experts.tracking import expert_report, experts, sweeps
from longtail_experts.tracking.identity import code_sha256
from longtail_experts.tracking.report import calibration_markdown

RECORDED = {
    f"{split}/{name}": number + other
    for other, split in enumerate(("test_balanced", "test_lt"))
    for number, name in [
        (0.1, "accuracy"),
        (0.2, "balanced_accuracy"),
        (0.3, "head_accuracy"),
        (0.4, "tail_accuracy"),
        (0.5, "many_accuracy"),
        (0.6, "medium_accuracy"),
        (0.7, "few_accuracy"),
        (0.8, "adjusted_balanced_accuracy"),
        (0.03, "ece"),
    ]
}


def test_every_column_of_the_table_of_classes(monkeypatch):
    written = {}
    monkeypatch.setattr(expert_report.figures, "per_class_accuracy", lambda *_: None)
    run = SimpleNamespace(write_json=written.__setitem__, artifact=nullcontext)
    groups = {name: torch.from_numpy(mask) for name, mask in class_groups((30, 3)).items()}
    data = SimpleNamespace(
        class_counts={"train": torch.tensor([4, 2])}.get,
        groups=groups,
        splits=SimpleNamespace(pool_counts=(30, 3)),
        num_classes=2,
        images=SimpleNamespace(class_names=("ant", "bee")),
    )
    recalls = {
        split: (torch.tensor([k / 4, math.nan]), torch.tensor([k, 0]))
        for k, split in enumerate(("val_lt", "test_lt", "test_balanced"), 1)
    }
    expert_report.record_per_class(run, data, recalls)
    ant, bee = ([*row.values()] for row in written["tables/per_class.json"])
    assert ant == [0, "ant", 4, 30, "head", "medium", 0.25, 0.5, 0.75, 1, 2, 3]
    assert bee == [1, "bee", 2, 3, "tail", "few", None, None, None, 0, 0, 0]


def test_scores_at_one_stand_before_the_calibrated_ones():
    metrics = {"temperature": 2.0, "temperature_low": 1.9, "temperature_high": 2.1}
    metrics |= {"test_lt/nll": 1.0, "test_lt/nll_uncalibrated": 2.0, "test_lt/brier": 0.3}
    metrics |= {
        "test_lt/brier_uncalibrated": 0.4,
        "test_lt/ece": 0.05,
        "test_lt/ece_uncalibrated": 0.06,
    }
    text = calibration_markdown(metrics)
    assert "| calibration | T = 1 | calibrated |" in text
    for row in ("NLL, nats | 2.0000 | 1.0000", "Brier | 0.4000 | 0.3000", "ECE, % | 6.00 | 5.00"):
        assert f"| test_lt {row} |" in text


def test_overall_is_over_images_and_adjusted_is_a_mean_over_classes():
    targets, logits = torch.tensor([0] * 4 + [1] * 2), torch.eye(2)[[0, 0, 0, 1, 1, 0]]
    data = SimpleNamespace(
        groups={}, num_classes=2, split_names=("test_lt",), targets={"test_lt": targets}.get
    )
    metrics = {"test_lt/adjusted_accuracy": 0.9, "test_lt/adjusted_balanced_accuracy": 0.4}
    table = expert_report.accuracy_table(metrics, data, {"test_lt": logits})
    assert "| overall | 66.67 |" in table
    assert "| adjusted balanced | 40.00 |" in table


def test_the_temperature_box_is_ticked_where_it_lowers_the_nll(monkeypatch):
    monkeypatch.setattr(expert_report, "read_logits", lambda _: SimpleNamespace(splits={}))
    monkeypatch.setattr(expert_report, "read_checkpoint", lambda *_: None)
    metrics = {"epoch": 1, "temperature": 2.0, "temperature_at_bound": 0.0}
    metrics |= {"test_balanced/nll": 1.0, "test_balanced/nll_uncalibrated": 2.0}
    run = SimpleNamespace(metrics=metrics, tags={}, history=lambda _: [(1, 0.1)])
    data = SimpleNamespace(split_names=("test_balanced",), size=lambda _: 0)
    for epochs, trained in ((2, True), (3, False)):
        config = make_config({"epochs": epochs, "protocol": "literature"})
        first, second, *_ = expert_report.success_checklist(run, config, data, {})
        assert (first.passed, second.passed) == (trained, True)
        assert "NLL 1.0000 against 2.0000" in second.numbers


def test_the_table_of_the_schedule_has_a_line_a_step(tmp_path, monkeypatch):
    monkeypatch.setattr(experts.figures, "lr_schedule", lambda *_: None)
    run = SimpleNamespace(artifact=lambda path: nullcontext(tmp_path / path.replace("/", "_")))
    experts.record_schedule(run, epochs=2, steps_per_epoch=2, lr_of=lambda step: 0.4 - step / 10)
    rows = list(csv.reader((tmp_path / "tables_lr_schedule.csv").open()))
    assert rows == [
        ["step", "epoch", "lr"],
        *(
            list(r)
            for r in (("0", "0", "0.4"), ("1", "0", "0.3"), ("2", "1", "0.2"), ("3", "1", "0.1"))
        ),
    ]


@pytest.mark.parametrize("name", sorted(set(OTHER) - {"device", "preflight"}))
def test_the_line_to_repeat_an_expert_gives_its_config(name):
    config = Config().replace(warmup_steps=0).replace(**{name: OTHER[name]})
    config = for_one_expert(config, config.loss)
    words = shlex.split(expert_report.repeat_command(config))
    given = dict(word.split("=", 1) for word in words if "=" in word)
    again = load_config(given.pop("config"), given)
    assert for_one_expert(again, again.loss) == config


def test_the_table_of_the_parent_is_of_test_balanced(monkeypatch):
    child = SimpleNamespace(
        metrics={"temperature": 2.0, **RECORDED},
        experiment_id="1",
        params={"splits_sha256": "5" * 64},
        run_id="x",
    )
    monkeypatch.setattr(expert_report, "Run", lambda _: child)
    pages = []
    parent = SimpleNamespace(describe=pages.append, tags={}, experiment_id="1", run_id="p")
    expert_report.describe_parent(parent, make_config({"loss": "all"}), {"ce": "x"}, {})
    cells = "10.00 | 20.00 | 30.00 | 40.00 | 50.00 | 60.00 | 70.00 | 80.00 | 2.000 |"
    assert f"[ce](#/experiments/1/runs/x) | {cells}" in pages[0]
    assert (
        "| accuracy | balanced | head | tail | many | medium | few | adjusted balanced | T |"
        in pages[0]
    )


def test_the_table_of_a_sweep_is_of_test_balanced():
    trial = sweeps.Trial(
        {"seed": "0"}, ("c", "s"), "finished", metrics={"temperature": 2.0, **RECORDED}
    )
    header, (row,) = sweeps._table(SimpleNamespace(experiment_id="1"), [trial])
    assert dict(zip(header, row, strict=True)) == {
        "seed": "0",
        "state": "finished",
        "balanced": "20.00",
        "head": "30.00",
        "tail": "40.00",
        "adjusted balanced": "80.00",
        "ECE": "3.00",
        "T": "2.000",
    }


def test_targets_beside_the_indices(finished, tmp_path):
    assert main(["export", "--run_ids", finished["ce"], "--out", str(tmp_path)]) == 0
    for split in ("train", "tuneV", "val_small", "calib", "val_lt", "test_lt"):
        path = tmp_path / f"data/images_natural_splits/{split}_targets.json"
        expected = load_expert_logits(finished["ce"]).splits[split].targets.tolist()
        assert json.loads(path.read_text()) == expected


def test_only_what_todays_code_finished_is_found_and_of_that_the_newest(store):
    sweep, times = add_sweep(store), iter(range(1, 9))
    same = {"config_sha256": "c" * 64, "code_sha256": code_sha256()}

    def add(**tags: str) -> str:
        return add_trial(store, sweep, {}, tags={**same, **tags}, started=next(times))

    add()
    newest = add()
    add(**{"resumed.code_sha256": "of another"})
    add(**{"calibrated.code_sha256": "of another"})
    add(code_sha256="of another")
    MlflowClient().set_terminated(add(), "FAILED")
    (found,) = sweeps.finished_experts(
        mlflow.get_experiment_by_name("tests").experiment_id
    ).values()
    assert found.info.run_id == newest
