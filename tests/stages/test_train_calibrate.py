"""`train` on one day and `calibrate` on another give what `main` gives in one go."""

import re
from contextlib import nullcontext
from pathlib import Path

import mlflow
import pytest
import torch
import yaml
from conftest import TINY_EXPERT, assert_same_logits
from mlflow import MlflowClient
from torch.nn import functional as F

from longtail_experts import load_expert_logits
from longtail_experts.cli import main
from longtail_experts.config import make_config
from longtail_experts.data.batches import load_batch
from longtail_experts.learning import fast_step
from longtail_experts.learning.fast_step import RecordedPasses, RecordedSteps
from longtail_experts.learning.step import as_it_is
from longtail_experts.stages import calibrate, train
from longtail_experts.stages.inputs import (
    build_network,
    for_one_expert,
    load_dataset,
    patience_starts_at,
    state_before_training,
)
from longtail_experts.stages.train import Selection
from longtail_experts.tracking import experts, sweeps
from longtail_experts.tracking.processes import process_tags
from longtail_experts.tracking.runs import Run, RunError, claimed


def only_run() -> mlflow.entities.Run:
    experiment = mlflow.get_experiment_by_name("tests")
    (run,) = MlflowClient().search_runs([experiment.experiment_id], "tags.stage != 'calibrate'")
    return run


@pytest.fixture
def trained(store, tiny_arguments) -> mlflow.entities.Run:
    assert main(["train", "--loss", "ce", *tiny_arguments]) == 0
    return only_run()


@pytest.fixture
def briefly(tiny_arguments) -> list[str]:
    return [*tiny_arguments, "--epochs", "2"]


@pytest.fixture
def trained_briefly(store, briefly) -> mlflow.entities.Run:
    assert main(["train", "--loss", "ce", *briefly]) == 0
    return only_run()


def artifact_folder(store: Path, run_id: str) -> Path:
    return next(store.glob(f"mlruns/*/{run_id}/artifacts"))


def test_train_then_calibrate_equals_main(store, trained, three_experts, capsys):
    run_id = trained.info.run_id
    assert trained.data.tags["stage"] == "train"
    assert not [name for name in trained.data.metrics if name.startswith(("test_", "temperature"))]
    with pytest.raises(RunError, match="calibrate it first"):
        load_expert_logits(run_id)

    experiment = trained.info.experiment_id
    assert sweeps.finished_experts(experiment) == {}
    assert main(["calibrate", "--run_id", run_id]) == 0
    calibrated = only_run()
    assert calibrated.info.status == trained.info.status == "FINISHED"
    assert calibrated.info.end_time == trained.info.end_time

    assert_same_logits(store, run_id, three_experts, "ce")

    key = (trained.data.tags["config_sha256"], trained.data.params["splits_sha256"])
    found = sweeps.finished_experts(experiment)  # which a sweep does not train again
    assert {key: run.info.run_id for key, run in found.items()} == {key: run_id}

    (pointer,) = MlflowClient().search_runs([experiment], "tags.stage = 'calibrate'")
    tags = {k: v for k, v in pointer.data.tags.items() if not k.startswith("mlflow.")}
    assert tags == {"stage": "calibrate", "source_run_id": run_id, **process_tags()}
    assert not pointer.data.metrics
    assert not MlflowClient().list_artifacts(pointer.info.run_id)

    report = artifact_folder(store, run_id) / "report.md"
    before = (calibrated.data.metrics, report.stat().st_mtime_ns)
    capsys.readouterr()
    assert main(["calibrate", "--run_id", run_id]) == 0
    assert "calibrated already" in capsys.readouterr().out
    assert (only_run().data.metrics, report.stat().st_mtime_ns) == before


def test_figures_of_an_epoch_are_those_of_its_weights_and_of_its_time(finished):
    run = Run(finished["ce"])
    metrics, val_lt = run.metrics, load_expert_logits(run.run_id).splits["val_lt"]
    loss = F.cross_entropy(torch.tensor(val_lt.logits), torch.tensor(val_lt.targets))
    assert dict(run.history("val/loss"))[metrics["best/step"]] == pytest.approx(float(loss))
    checkpoints = artifact_folder(Path(finished["folder"]), run.run_id) / "checkpoints"
    seconds = torch.load(checkpoints / "last.pt")["seconds"]
    assert metrics["train/images_per_second"] * seconds == pytest.approx(63)


def test_calibrate_refuses_what_another_is_calibrating(store, trained_briefly, capfd):
    run_id = trained_briefly.info.run_id
    with claimed(Run(run_id)):
        assert main(["calibrate", "--run_id", run_id]) == 2
    assert "another process is going on with it already" in capfd.readouterr().err


def test_calibrate_refuses_what_runs_on_another_host(store, trained_briefly, capfd):
    client, run_id = MlflowClient(), trained_briefly.info.run_id
    client.set_tag(run_id, "host", "elsewhere")
    client.update_run(run_id, "RUNNING")
    assert main(["calibrate", "--run_id", run_id]) == 2
    assert "is RUNNING on host elsewhere" in capfd.readouterr().err


def test_a_training_resumed_after_its_calibration_keeps_its_page(store, briefly, monkeypatch):
    def ctrl_c(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train.expert_report, "describe_trained", ctrl_c)
        assert main(["train", "--loss", "ce", *briefly]) == 130
    run_id = only_run().info.run_id
    assert main(["calibrate", "--run_id", run_id]) == 0
    page = Run(run_id).tags["mlflow.note.content"]
    monkeypatch.setattr(train, "train_expert", lambda *_: pytest.fail("trained again"))
    assert main(["train", "--resume", run_id]) == 0
    assert Run(run_id).tags["mlflow.note.content"] == page
    assert Run(run_id).status == "FINISHED"


def test_calibrate_refuses_what_it_cannot_use(store, trained_briefly, capfd, tmp_path):
    run_id = trained_briefly.info.run_id

    def refused(*arguments: str) -> str:
        capfd.readouterr()
        assert main(["calibrate", *arguments]) == 2
        (line,) = capfd.readouterr().err.strip().splitlines()
        return line

    assert "run_id=nosuchrun: not found" in refused("--run_id", "nosuchrun")
    assert "epochs" in refused("--run_id", run_id, "--epochs", "3")
    assert "batch_size=0" in refused("--run_id", run_id, "--batch_size", "0")
    assert "train/<class>/" in refused("--run_id", run_id, "--data_dir", str(tmp_path))

    artifacts = artifact_folder(store, run_id)
    config = yaml.safe_load((artifacts / "config.yaml").read_text())
    (artifacts / "config.yaml").write_text(yaml.safe_dump({**config, "split_seed": 1}))
    assert "was trained on splits" in refused("--run_id", run_id)
    (artifacts / "config.yaml").write_text(yaml.safe_dump(config))

    MlflowClient().delete_tag(run_id, "training")
    goes_on = f"its training has not ended (status FINISHED); -P resume={run_id} goes on with it"
    assert goes_on in refused("--run_id", run_id)
    with pytest.raises(RunError, match=re.escape(goes_on)):
        load_expert_logits(run_id)
    MlflowClient().set_tag(run_id, "training", "complete")

    last = (artifacts / "checkpoints/last.pt").read_bytes()
    torch.save(["not a dict"], artifacts / "checkpoints/last.pt")
    assert "checkpoints/last.pt is damaged" in refused("--run_id", run_id)
    (artifacts / "checkpoints/last.pt").write_bytes(last)

    damaged = (artifacts / "checkpoints/best.pt").read_bytes()[:1000]
    (artifacts / "checkpoints/best.pt").write_bytes(damaged)
    assert "checkpoints/best.pt is damaged" in refused("--run_id", run_id)
    (artifacts / "checkpoints/best.pt").unlink()
    assert "has no checkpoints/best.pt" in refused("--run_id", run_id)
    MlflowClient().delete_tag(run_id, "training")  # cut off before its first validation
    assert goes_on in refused("--run_id", run_id)

    experiment = mlflow.get_experiment_by_name("tests").experiment_id
    assert not MlflowClient().search_runs([experiment], "tags.stage = 'calibrate'")
    assert not (artifacts / "logits").exists()


def test_a_loss_that_is_not_finite_ends_the_run_at_once(store, tiny_arguments, capfd):
    arguments = [*tiny_arguments, "--lr", "100", "--warmup_steps", "0", "--weight_decay", "1"]
    assert main(["train", "--loss", "ce", *arguments]) == 1
    error = capfd.readouterr().err.splitlines()[-1]
    assert "error: loss is not finite at step" in error
    assert "lr 100" in error
    assert "lower lr" in error
    assert only_run().info.status == "FAILED"


def test_early_stopping_counts_validations_after_the_last_milestone(store, tiny_arguments):
    arguments = [*tiny_arguments, "--epochs", "30", "--validation_every", "1", "--milestones", "3"]
    arguments += ["--lr", "0.000001", "--early_stopping_patience", "2", "--checkpoint_every", "30"]
    assert main(["train", "--loss", "ce", *arguments]) == 0
    run = only_run()
    assert run.data.tags["training"] == "early_stopped"
    assert 4 <= run.data.metrics["epoch"] < 29
    history = MlflowClient().get_metric_history(run.info.run_id, "val/balanced_accuracy")
    values = [point.value for point in history]
    assert max(values[-2:]) <= max(values[:-2])
    losses = MlflowClient().get_metric_history(run.info.run_id, "train/loss")
    last = torch.load(artifact_folder(store, run.info.run_id) / "checkpoints/last.pt")
    assert last["step"] == max(point.step for point in losses)


def test_logits_that_are_not_finite_are_refused_before_anything_is_written(
    store, trained_briefly, monkeypatch, capfd
):
    """Weights that broke at the very last step, after every loss that was looked at."""
    run_id = trained_briefly.info.run_id
    path = artifact_folder(store, run_id) / "checkpoints/best.pt"
    content = torch.load(path, weights_only=True)
    content["model"]["fc.bias"][0] = float("inf")
    torch.save(content, path)
    assert main(["calibrate", "--run_id", run_id]) == 1
    assert "logits of train are not finite" in capfd.readouterr().err
    assert not (path.parent / "final_calibrated.pt").exists()


def test_a_schedule_without_steps_has_no_last_milestone():
    """Where early stopping would otherwise wait for one that does nothing."""

    def starts_at(**fields: str) -> int:
        return patience_starts_at(make_config(fields))

    assert starts_at(milestones="96,192") == 192
    assert starts_at(milestones="96,192", epochs="100") == 96
    assert starts_at(lr_schedule="cosine") == 0
    deferred = {"loss": "ldam_drw", "lr_schedule": "cosine"}
    assert starts_at(**deferred, milestones="160,180") == 160  # where it weighs classes
    assert starts_at(**deferred, reweight_from="200") == 200
    assert starts_at(loss="ldam_drw", milestones="96,192", reweight_from="100") == 192


def test_a_worse_validation_is_not_chosen_and_counts_against_patience():
    selection = Selection(patience=1, starts_at=0)
    assert selection.chooses(0.2, 0, 7)
    assert not selection.chooses(0.1, 1, 15)
    assert selection.is_over
    assert selection.best == {"epoch": 0, "step": 7, "val_balanced_accuracy": 0.2}


def test_a_better_validation_lets_patience_start_anew():
    selection = Selection(patience=2, starts_at=0)
    for epoch, value in enumerate([0.1, 0.05, 0.2, 0.15]):
        selection.chooses(value, epoch, epoch)
    assert not selection.is_over
    selection.chooses(0.15, 4, 4)
    assert selection.is_over


def test_ties_go_to_the_later_checkpoint_but_do_not_count_as_better():
    selection = Selection(patience=2, starts_at=1)
    for epoch, value in enumerate([0.3, 0.3, 0.3]):
        assert selection.chooses(value, epoch, epoch)
    assert selection.best["epoch"] == 2
    assert selection.is_over


@pytest.mark.parametrize("works", [True, False])
def test_a_stage_does_not_know_whether_steps_are_replayed(
    store, trained_briefly, briefly, monkeypatch, capfd, works
):
    """The recorder stands in for a GPU's. Where it fails, the run says at its end what ran. Steps
    taken to announce the time leave nothing behind but a recording for those that follow."""
    made = []

    def stand_in():
        def record(run):
            if not works:
                raise RuntimeError("no graphs here")
            made.append(run)
            return run

        return record

    def recorded(*arguments):
        state = state_before_training(*arguments)
        state.recorded, state.passes = RecordedSteps(stand_in), RecordedPasses(stand_in)
        return state

    monkeypatch.setattr(train, "state_before_training", recorded)
    monkeypatch.setattr(fast_step, "RECORD_AFTER", 0)
    monkeypatch.setattr(train, "ANNOUNCED_FROM", 0)
    before = trained_briefly
    assert before.data.tags["step_path"] == "plain"
    with pytest.warns(UserWarning, match="no graphs here") if not works else nullcontext():
        assert main(["train", "--loss", "ce", *briefly]) == 0
    runs = MlflowClient().search_runs([before.info.experiment_id])
    (after,) = [run for run in runs if run.info.run_id != before.info.run_id]
    assert after.data.tags["step_path"] == ("graph" if works else "plain")
    assert capfd.readouterr().out.count("ce: 2 epochs of 63 images, about 0.0 h (0 min)") == 1
    assert len(made) == (4 if works else 0)  # full batches and last ones, of training and of val_lt
    for name in ("best.pt", "last.pt"):
        ours, theirs = (
            torch.load(artifact_folder(store, run.info.run_id) / "checkpoints" / name)["model"]
            for run in (after, before)
        )
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), name


def test_a_stage_does_not_know_whether_forward_passes_are_replayed(image_folder, monkeypatch):
    replayed = []

    def stand_in():
        return lambda run: lambda: (replayed.append(run), run())

    config = for_one_expert(make_config({**TINY_EXPERT, "data_dir": str(image_folder)}), "ce")
    data = load_dataset(config)
    network = build_network(config, data)
    expected = calibrate.split_logits(network, config, data)
    assert replayed == []
    monkeypatch.setattr(fast_step, "RECORD_AFTER", 0)
    monkeypatch.setattr(calibrate, "recorded_passes", lambda *_: RecordedPasses(stand_in))
    logits = calibrate.split_logits(network, config, data)
    assert replayed
    assert logits.keys() == expected.keys()
    assert all(torch.equal(logits[split], expected[split]) for split in expected)


@pytest.mark.parametrize("augmentation", ["plain", "autoaugment"])
def test_what_no_graph_can_hold_is_done_before_the_step(
    store, tiny_arguments, monkeypatch, augmentation
):
    """The operations of a policy are chosen on the CPU, batch by batch."""
    seen = []

    def train_epoch(state, batches, *, load, **settings):
        first, *rest = batches
        seen.append((load, [part.dtype for part in first]))
        return original(state, [first, *rest], load=load, **settings)

    original = train.train_epoch
    monkeypatch.setattr(train, "train_epoch", train_epoch)
    arguments = ["--epochs", "1", "--augmentation", augmentation]
    assert main(["train", "--loss", "ce", *tiny_arguments, *arguments]) == 0
    ((load, types),) = seen
    if augmentation == "plain":
        assert load.func is load_batch
        assert torch.float32 not in types[:4]  # draws: indices, offsets, flips
    else:
        assert load is as_it_is
        assert types == [torch.float32, torch.int64]  # images and targets


def test_deferred_weights_act_from_their_epoch_on(store, tiny_arguments, monkeypatch):
    seen, original = [], train.train_epoch

    def train_epoch(*arguments, objective, **settings):
        seen.append(bool((objective.keywords["weights"] != 1).any()))
        return original(*arguments, objective=objective, **settings)

    monkeypatch.setattr(train, "train_epoch", train_epoch)
    asked = [*tiny_arguments, "--epochs", "3", "--reweight_from", "1"]
    assert main(["train", "--loss", "ldam_drw", *asked]) == 0
    assert seen == [False, True, True]


def test_what_a_calibration_finds_is_of_its_own_code_and_says_so(trained_briefly, monkeypatch):
    """Whatever one that was cut off has left."""
    run = Run(trained_briefly.info.run_id)
    step = int(run.metrics["best/step"])
    run.log_metrics({"temperature": 99.0, "test_balanced/nll": 99.0}, step)
    monkeypatch.setattr(experts, "code_sha256", lambda: "0" * 64)
    assert main(["calibrate", "--run_id", run.run_id]) == 0
    assert run.metrics["temperature"] == load_expert_logits(run.run_id).temperature
    assert run.metrics["test_balanced/nll"] < 99
    assert run.tags["calibrated.code_sha256"] == "0" * 64
    assert run.tags["code_sha256"] != "0" * 64
    assert not [name for name in run.tags if name.startswith("calibrated.git")]
    assert sweeps.finished_experts(run.experiment_id) == {}
