"""What a config decides reaches what it decides: steps, offsets, seeds, temperatures, trials."""

from types import SimpleNamespace

import pytest
import torch
from conftest import TINY_EXPERT, arguments_of
from reliability.harness import all_runs

from longtail_experts import load_expert_logits
from longtail_experts.cli import main
from longtail_experts.config import make_config
from longtail_experts.data.augment import Augmentation
from longtail_experts.data.batches import derive_seed
from longtail_experts.data.longtail import class_groups
from longtail_experts.learning import step as steps
from longtail_experts.learning.calibration import Temperature, fit_temperature
from longtail_experts.learning.losses import LOSSES, Knobs
from longtail_experts.stages import calibrate, train
from longtail_experts.stages import data as data_stage
from longtail_experts.stages import main as main_stage
from longtail_experts.stages import sweep as sweep_stage
from longtail_experts.stages.grid import Point
from longtail_experts.stages.inputs import for_one_expert, load_dataset, log_offset_of
from longtail_experts.tracking.runs import Run

COUNTS = torch.tensor([50, 5, 1])
DATA = SimpleNamespace(class_counts={"train": COUNTS}.get)


def test_every_step_is_drawn_and_taken_as_the_config_says(store, tiny_arguments, monkeypatch):
    drawn, taken, draw, train_step = [], [], train.draw_epoch, steps.train_step
    monkeypatch.setattr(train, "draw_epoch", lambda *given: drawn.append(given) or draw(*given))
    monkeypatch.setattr(
        steps, "train_step", lambda *given: taken.append(given[4:]) or train_step(*given)
    )
    asked = {"seed": 3, "epochs": 2, "milestones": 1, "precision": "bf16"}
    asked |= {"augmentation": "autoaugment", "cutout": 8, "mixup": 0.4}
    assert main(["train", "--loss", "ce", *tiny_arguments, *arguments_of(asked)]) == 0
    how = ("cpu", Augmentation("autoaugment", 8, 0.4))
    assert drawn == [(63, derive_seed(3, "ce"), epoch, *how) for epoch in (0, 1)]
    rates = [0.025 * min(1, (s + 1) / 4) * (0.1 if s >= 8 else 1) for s in range(16)]
    assert [rate for rate, _ in taken] == pytest.approx(rates)
    assert {precision for _, precision in taken} == {"bf16"}


@pytest.mark.parametrize(("entry", "begins"), [("main", True), ("train", True), ("data", False)])
def test_layers_are_compiled_while_the_store_is_opened(
    entry, begins, store, tiny_arguments, monkeypatch
):
    """For a training that is long enough, of 63 images an epoch, before the stage begins."""
    begun = []
    monkeypatch.setattr(steps, "compile_layers_ahead", begun.append)
    module = {"main": main_stage, "train": train, "data": data_stage}[entry]
    monkeypatch.setattr(module, "run", lambda config, data: f"after {begun}")
    asked = {"epochs": 48, "precision": "fp32", "loss": "ce"}
    assert main([entry, *tiny_arguments, *arguments_of(asked)]) == 0
    assert begun == [torch.float32] * begins
    assert main([entry, *tiny_arguments, *arguments_of({**asked, "epochs": 47})]) == 0
    assert begun == [torch.float32] * begins


def test_checkpoints_are_after_every_so_many_epochs_and_the_last(
    store, tiny_arguments, monkeypatch
):
    saved, content = [], train.last_checkpoint
    monkeypatch.setattr(
        train,
        "last_checkpoint",
        lambda state, epoch, *a: saved.append(epoch) or content(state, epoch, *a),
    )
    asked = {"epochs": 5, "milestones": "none", "checkpoint_every": 2}
    assert main(["train", "--loss", "ce", *tiny_arguments, *arguments_of(asked)]) == 0
    assert saved == [1, 3, 4]


def test_knobs_reach_the_offset_as_they_reach_the_loss():
    knobs = {"tau": 0.5, "beta": 0.9, "gamma": 3.0}
    for loss in ("logit_adjust", "balanced_softmax", "class_balanced", "ldam_drw"):
        config = make_config({"loss": loss, "milestones": "none", **knobs})
        expected = LOSSES[loss].log_offset(COUNTS, Knobs(**knobs))
        assert torch.equal(log_offset_of(config, DATA, epoch=0), expected), loss


def test_the_seed_of_an_expert_is_that_of_seed_and_loss_alone():
    def of(**fields) -> int:
        return for_one_expert(make_config(fields), "ce").expert_seed

    assert of(seed=3) == of(seed=3, split_seed=9) == derive_seed(3, "ce")
    assert of(seed=4) == derive_seed(4, "ce")
    assert of(seed=4, expert_seed=7) == 7


def test_the_offset_is_that_of_the_chosen_checkpoint(store, tiny_arguments, monkeypatch):
    """Chosen before the weights acted, which by the end they did."""
    given, validate = iter((0.9, 0.2)), train.validate
    monkeypatch.setattr(
        train, "validate", lambda *a: {**validate(*a), "balanced_accuracy": next(given)}
    )
    deferred = {"epochs": 4, "milestones": "none", "reweight_from": 3}
    assert main(["main", "--loss", "ldam_drw", *tiny_arguments, *arguments_of(deferred)]) == 0
    (run,) = all_runs()
    assert run.data.metrics["best/epoch"] == 1
    assert set(load_expert_logits(run.info.run_id).log_offset) == {0}


def test_the_best_is_logged_at_its_own_step(store, tiny_arguments, monkeypatch):
    given, validate = iter((0.9, 0.2)), train.validate
    monkeypatch.setattr(
        train, "validate", lambda *a: {**validate(*a), "balanced_accuracy": next(given)}
    )
    fields = {"epochs": 4, "milestones": "none"}
    assert main(["train", "--loss", "ce", *tiny_arguments, *arguments_of(fields)]) == 0
    (run,) = all_runs()
    for name, value in {"epoch": 1, "step": 15, "val_balanced_accuracy": 0.9}.items():
        assert Run(run.info.run_id).history(f"best/{name}") == [(15, value)]


def test_t_of_the_literature_is_of_all_test_images_under_the_uniform_prior():
    random, targets = torch.Generator().manual_seed(0), torch.arange(80) % 4
    logits = 3 * torch.randn(80, 4, generator=random) + 3 * torch.eye(4)[targets]
    prior = torch.tensor([0.7, 0.2, 0.08, 0.02], dtype=torch.float64)
    data = SimpleNamespace(split_names=("test_balanced",), targets=lambda _: targets)
    for offset in (torch.zeros(4, dtype=torch.float64), 0.5 * prior.log()):
        config = SimpleNamespace(split_seed=5)
        found = calibrate.fit({"test_balanced": logits}, config, data, offset, prior)
        expected = fit_temperature(logits, targets, offset - prior.log(), bootstrap_seed=5)
        assert found.temperature[:3] == expected[:3]
        assert not expected.at_bound


@pytest.mark.parametrize("at_bound", [True, False])
def test_what_is_logged_of_the_temperature(at_bound):
    targets, groups = torch.tensor([0, 1]), class_groups((30, 3))
    data = SimpleNamespace(
        targets=lambda _: targets,
        targets_if_any=lambda _: targets,
        groups={n: torch.from_numpy(m) for n, m in groups.items()},
        num_classes=2,
        splits=SimpleNamespace(pool_counts=(30, 3)),
    )
    fitted = calibrate.Calibration(Temperature(2.0, 1.5, 3.0, at_bound), 2.0, "calib")
    prior = torch.tensor([0.9, 0.1], dtype=torch.float64)
    logits = dict.fromkeys(("test_lt", "test_balanced"), torch.eye(2))
    found = calibrate.test_metrics(logits, data, fitted, prior.log(), prior)
    names = ("temperature", "temperature_low", "temperature_high", "temperature_at_bound")
    assert [found[name] for name in names] == [2.0, 1.5, 3.0, float(at_bound)]


def test_the_loss_that_mlflow_run_passes_by_itself_is_no_other_loss(finished, capsys):
    given = ["--loss", "ce", "--config", "auto", "--resume", finished["logit_adjust"]]
    assert main(["main", *given]) == 0
    assert "is finished already" in capsys.readouterr().out


def test_a_sweep_decides_precision_once_and_splits_for_each_seed_of_them(image_folder):
    fields = {**TINY_EXPERT, "data_dir": str(image_folder), "precision": "auto"}
    points = [Point({}, make_config({**fields, "split_seed": s})) for s in (0, 1)]
    jobs = sweep_stage.prepare(points, "bf16")
    assert [job.config.precision for job in jobs] == ["bf16", "bf16"]
    for point, job in zip(points, jobs, strict=True):
        expert = for_one_expert(point.config.replace(precision="bf16"), "ce")
        assert job.trial.key == (expert.sha256, load_dataset(point.config).splits.sha256)
