"""Resuming in the process of the test: what is continued, what is refused, what falls back."""

import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlflow
import pytest
import torch
from conftest import arguments_of, assert_same_logits
from mlflow import MlflowClient
from reliability.harness import all_runs, history, last_checkpoint, of_reference, training_runs

from longtail_experts.cli import main
from longtail_experts.config import load_config
from longtail_experts.data.sources import DataError
from longtail_experts.learning import step as steps
from longtail_experts.learning.step import NonFiniteLossError
from longtail_experts.stages import resumed, train
from longtail_experts.stages.inputs import load_dataset
from longtail_experts.tracking.experts import (
    recorded_config,
    start_expert_run,
    start_parent_run,
)
from longtail_experts.tracking.logits import is_calibrated
from longtail_experts.tracking.recorder import Recorder, local_folder, read_points
from longtail_experts.tracking.runs import Run, RunError, start_run


def interrupt_after(points: int, run_id: list[str]) -> threading.Thread:
    """SIGTERM to this process as soon as a run's journal holds that many points."""

    def watch() -> None:
        while not done.wait(0.005):
            for journal in Path(".cache/runs").glob("*/points.jsonl"):
                if journal.read_bytes().count(b"\n") >= points:
                    run_id.append(journal.parent.name)
                    os.kill(os.getpid(), signal.SIGTERM)
                    return

    done = threading.Event()
    thread = threading.Thread(target=watch, daemon=True)
    thread.done = done
    thread.start()
    return thread


def ctrl_c(*_: object) -> None:
    raise KeyboardInterrupt


@contextmanager
def away(run: Run, path: str) -> Iterator[Path]:
    """In place of Run.read_artifact: this one file cannot be read."""
    if path == "checkpoints/last.pt":
        raise RunError(f"run {run.run_id}: artifact {path} cannot be read (Input/output error)")
    yield Path(MlflowClient().download_artifacts(run.run_id, path))


@pytest.fixture
def interrupted(store, tiny_arguments):
    """(entry point, loss, points) -> the id of a run that got SIGTERM after so many points."""

    def interrupt(entry_point: str, loss: str, points: int, *changed: str) -> str:
        run_id: list[str] = []
        watcher = interrupt_after(points, run_id)
        assert main([entry_point, "--loss", loss, *tiny_arguments, *changed]) == 143
        watcher.done.set()
        watcher.join()
        assert Run(run_id[0]).status == "KILLED"
        return run_id[0]

    return interrupt


def test_a_run_that_someone_opened_to_add_a_tag_is_not_taken_for_finished(interrupted, capsys):
    """MLflow ends it as FINISHED."""
    run = Run(interrupted("main", "ce", 10))
    with mlflow.start_run(run_id=run.run_id):
        mlflow.set_tag("remark", "looks good so far")
    assert run.status == "FINISHED"
    assert main(["main", "--resume", run.run_id]) == 0
    assert f"run {run.run_id} FINISHED" in capsys.readouterr().out
    assert is_calibrated(run)


@pytest.mark.parametrize("loss", ["ce", "all"])
def test_a_live_run_that_someone_opened_to_add_a_tag_is_left_alone(store, capfd, loss):
    config = load_config("demo", {"loss": loss, "device": "cpu", "precision": "fp32"})
    live = start_parent_run(config) if loss == "all" else start_expert_run(config, "main")
    with live as run:
        with mlflow.start_run(run_id=run.run_id, nested=True):
            mlflow.set_tag("remark", "looks good so far")
        tags = run.tags
        assert run.status == "FINISHED"
        assert main(["main", "--resume", run.run_id]) == 1
        assert "another process is going on with it already" in capfd.readouterr().err
        assert (run.tags, run.status) == (tags, "FINISHED")


def test_experts_of_which_one_is_missing_are_not_done(finished, monkeypatch):
    parent, children = Run(finished["all"]), resumed.experts.children_of(Run(finished["all"]))
    assert resumed.is_done(parent)
    monkeypatch.setattr(resumed.experts, "children_of", lambda _: {"ce": children["ce"]})
    assert not resumed.is_done(parent)


def test_a_finished_run_that_is_no_training_is_refused(store, capsys):
    with start_run("a comparison", {"stage": "compare"}) as run:
        pass
    assert main(["main", "--resume", run.run_id]) == 2
    assert "is no training (its stage is compare)" in capsys.readouterr().err


def test_an_interrupted_main_resumes_to_the_same_expert(
    store, interrupted, three_experts, capsys, tiny_arguments, monkeypatch
):
    """That of `main loss=all`, too, though trained alone."""
    run_id = interrupted("main", "ce", 10)
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("terminated at step ")
    assert f"-P resume={run_id} goes on from there" in message
    rng = torch.load(local_folder(run_id) / "last.pt", weights_only=True)["rng"]
    assert {"torch", "python", "numpy"} <= set(rng)
    torch.manual_seed(99)

    assert main(["main", "--resume", run_id, "--epochs", "6", *tiny_arguments]) == 0
    assert f"run {run_id} FINISHED" in capsys.readouterr().out
    assert not local_folder(run_id).exists()
    assert Run(run_id).tags["resumed"] == "1"
    ours = history(run_id), last_checkpoint(run_id)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{three_experts['folder']}/mlflow.db")
        theirs = history(three_experts["ce"]), last_checkpoint(three_experts["ce"])
    assert ours[0] == theirs[0]
    for name, weights in theirs[1]["model"].items():
        assert torch.equal(ours[1]["model"][name], weights), name
    assert torch.equal(ours[1]["rng"]["torch"], rng["torch"])
    assert "mlflow.parentRunId" not in Run(run_id).tags
    assert_same_logits(store, run_id, three_experts, "ce")

    assert main(["main", "--resume", run_id]) == 0
    assert "is finished already; nothing was changed" in capsys.readouterr().out
    assert main(["main", "--resume", run_id, "--epochs", "7"]) == 2
    assert "epochs=7 (was 6)" in capsys.readouterr().err
    monkeypatch.setenv("MLFLOW_RUN_ID", run_id)  # left from the command before
    assert main(["train", "--loss", "logit_adjust", "--seed", "3"]) == 2
    said = capsys.readouterr().err
    assert f"MLFLOW_RUN_ID={run_id}: cannot go on with another config: loss=logit_adjust" in said
    assert Run(run_id).status == "FINISHED"


@pytest.fixture
def hang_up() -> Iterator[None]:
    """SIGHUP as it is where nothing ignores it, as `nohup pytest` does."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def test_a_connection_that_is_lost_is_nothing_to_whom_it_was_kept_from(hang_up):
    """`nohup`."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert main(["main", "--epoch", "2"]) == 2
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


@pytest.mark.parametrize(
    ("step", "number"),
    [
        pytest.param(1, signal.SIGTERM, id="first", marks=pytest.mark.slow),
        pytest.param(8, signal.SIGTERM, id="last of an epoch"),
        pytest.param(11, signal.SIGHUP, id="in an epoch"),
    ],
)
def test_a_signal_at_any_step_ends_in_the_same_weights(
    step, number, hang_up, store, tiny_arguments, three_experts, monkeypatch, capsys
):
    train_step, taken = steps.train_step, []

    def terminated_at_step(*args):
        loss = train_step(*args)
        taken.append(loss)
        if len(taken) == step:
            os.kill(os.getpid(), number)
        return loss

    with monkeypatch.context() as patch:
        patch.setattr(steps, "train_step", terminated_at_step)
        assert main(["train", "--loss", "ce", *tiny_arguments]) == 143
    assert len(taken) == step
    assert f"at step {step}: " in capsys.readouterr().err
    (run,) = training_runs()
    run_id = run.info.run_id
    assert main(["train", "--resume", run_id]) == 0
    assert f"resuming ce in epoch {step // 8 - (step == 8)}, at step {step} of 48" in (
        capsys.readouterr().out
    )
    ours = history(run_id), last_checkpoint(run_id)["model"]
    with monkeypatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{three_experts['folder']}/mlflow.db")
        theirs = history(three_experts["ce"]), last_checkpoint(three_experts["ce"])["model"]
    assert ours[0] == {name: theirs[0][name] for name in ours[0]}
    assert all(torch.equal(ours[1][name], weights) for name, weights in theirs[1].items())


def test_what_early_stopping_has_seen_is_kept(store, tiny_arguments, monkeypatch):
    """The best of the first epoch, then two without a better one, the second after resuming."""

    def validate(state, epoch, *_):
        return {"loss": 1.0, "balanced_accuracy": 0.9 if epoch == 0 else 0.1}

    def terminated_in_the_third_epoch(*args):
        loss = train_step(*args)
        if args[0].step == 17:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss

    train_step = steps.train_step
    monkeypatch.setattr(train, "validate", validate)
    fields = {"validation_every": 1, "early_stopping_patience": 2, "milestones": "none"}
    arguments = [*tiny_arguments, *arguments_of(fields)]
    with monkeypatch.context() as patch:
        patch.setattr(steps, "train_step", terminated_in_the_third_epoch)
        assert main(["train", "--loss", "ce", *arguments]) == 143
    (run_id,) = (run.info.run_id for run in training_runs())
    folder = local_folder(run_id)
    best = torch.load(folder / "best.pt", weights_only=True)
    assert best["step"] == 7
    points = torch.load(folder / "last.pt", weights_only=True)["points"]
    assert [(name, step) for name, _, step, _ in points if name == "epoch"] == [
        ("epoch", 7),
        ("epoch", 15),
    ]
    assert points == read_points(folder / "points.jsonl")

    assert main(["train", "--resume", run_id]) == 0
    assert Run(run_id).tags["training"] == "early_stopped"
    assert [step for step, _ in history(run_id)["epoch"]] == [7, 15, 23]
    assert last_checkpoint(run_id)["step"] == 23
    path = MlflowClient().download_artifacts(run_id, "checkpoints/best.pt")
    kept = torch.load(path, weights_only=True)
    assert kept["step"] == 7
    assert kept["model"].keys() == best["model"].keys()
    assert all(torch.equal(kept["model"][name], w) for name, w in best["model"].items())


def test_a_run_interrupted_as_soon_as_it_is_there_goes_on(
    store, tiny_arguments, three_experts, monkeypatch, capsys
):
    with monkeypatch.context() as patch:
        patch.setattr("longtail_experts.stages.train.offer_to_resume", ctrl_c)
        assert main(["train", "--loss", "ce", *tiny_arguments]) == 130
    (run,) = training_runs()
    assert f"-P resume={run.info.run_id} goes on" in capsys.readouterr().err
    assert main(["train", "--resume", run.info.run_id]) == 0
    whole = of_reference(three_experts, history)
    assert history(run.info.run_id).items() <= whole.items()


@pytest.mark.slow
def test_a_child_cut_off_before_its_config_was_there_goes_on(
    store, tiny_arguments, monkeypatch, capsys
):
    """And one cut off at its very end, calibrated, ends FINISHED, without a step."""
    short = [*tiny_arguments, "--epochs=1", "--milestones=none"]

    with monkeypatch.context() as patch:
        patch.setattr("longtail_experts.stages.main.train_expert", ctrl_c)
        assert main(["main", "--loss", "all", *short]) == 130
    (parent,) = (run for run in all_runs() if run.data.tags["stage"] == "all")
    (child,) = (run for run in all_runs() if run.data.tags["stage"] == "main")
    Path(child.info.artifact_uri, "config.yaml").unlink()
    assert main(["main", "--resume", parent.info.run_id]) == 0
    client = MlflowClient()
    for run_id in (parent.info.run_id, child.info.run_id):
        client.set_terminated(run_id, "KILLED")
    capsys.readouterr()
    assert main(["main", "--resume", parent.info.run_id]) == 0
    assert {run.info.status for run in all_runs()} == {"FINISHED"}
    assert len(all_runs()) == 4
    assert "resuming" not in capsys.readouterr().out


def test_a_parent_on_other_images_than_its_children_is_refused(
    store, three_experts, monkeypatch, capsys
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{three_experts['folder']}/mlflow.db")
    child = Run(three_experts["ce"])
    config = recorded_config(child)
    data = load_dataset(config.replace(split_seed=config.split_seed + 1))
    monkeypatch.setattr("longtail_experts.stages.resumed.load_dataset", lambda *_: data)
    monkeypatch.setattr(Run, "status", "KILLED")
    assert main(["main", "--resume", three_experts["all"]]) == 2
    assert f"run {child.run_id}: was trained on splits" in capsys.readouterr().err


def test_a_checkpoint_that_cannot_be_read_now_is_not_trained_over(
    store, interrupted, monkeypatch, capfd
):
    """On another machine, where only the store has it."""
    run_id = interrupted("train", "ce", 20)
    shutil.rmtree(store / ".cache/runs")
    before = last_checkpoint(run_id)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "read_artifact", away)
        assert main(["train", "--resume", run_id]) == 1
    assert "checkpoints/last.pt cannot be read" in capfd.readouterr().err
    assert last_checkpoint(run_id)["step"] == before["step"] > 0


def test_the_launchers_run_ends_as_the_training_that_it_resumed(
    store, interrupted, monkeypatch, capfd
):
    run_id = interrupted("train", "ce", 3)
    launched = MlflowClient().create_run(Run(run_id).experiment_id).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", launched)

    def diverges(*_: object) -> None:
        raise NonFiniteLossError("loss is not finite at step 3 (lr 0.4)")

    monkeypatch.setattr("longtail_experts.stages.train.train_expert", diverges)
    assert main(["train", "--resume", run_id]) == 1
    assert "error: loss is not finite" in capfd.readouterr().err
    assert (Run(run_id).status, Run(launched).status) == ("FAILED", "FAILED")


def test_a_last_checkpoint_not_yet_sent_at_the_end_is_sent_by_resuming(
    store, tiny_arguments, monkeypatch
):
    def away(*_: object) -> None:
        raise OSError("no answer")

    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "_upload", away)
        patch.setenv("LONGTAIL_STORE_PATIENCE", "1")
        assert main(["train", "--loss", "ce", *tiny_arguments]) == 1
    (run,) = training_runs()
    run_id = run.info.run_id
    assert not Run(run_id).has_artifact("checkpoints/last.pt")
    assert "train/loss" in Run(run_id).metrics
    assert "best/epoch" not in Run(run_id).metrics  # of a checkpoint that may never come
    assert main(["train", "--resume", run_id]) == 0
    assert last_checkpoint(run_id)["step"] == 47
    assert Run(run_id).has_artifact("checkpoints/best.pt")
    assert "best/epoch" in Run(run_id).metrics


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_a_deferred_loss_under_strong_augmentation_goes_on_in_mid_epoch(
    precision, store, tiny_arguments, monkeypatch
):
    """What chance decides of policy, holes and shares, and when the weights act, is where it was
    as well; a cosine with a warm-up by epochs takes the place of milestones."""
    fields = {
        **{"augmentation": "autoaugment", "cutout": "8", "mixup": "0.4", "epochs": "3"},
        **{
            "lr_schedule": "cosine",
            "warmup_steps": "0",
            "warmup_epochs": "2",
            "reweight_from": "1",
            "precision": precision,
        },
    }
    arguments = [*tiny_arguments, *arguments_of(fields)]
    assert main(["train", "--loss", "ldam_drw", *arguments]) == 0
    train_step, taken = steps.train_step, []

    def terminated_at_step(*args):
        loss = train_step(*args)
        taken.append(loss)
        if len(taken) == 12:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss

    with monkeypatch.context() as patch:
        patch.setattr(steps, "train_step", terminated_at_step)
        assert main(["train", "--loss", "ldam_drw", *arguments]) == 143
    (cut,) = (run.info.run_id for run in training_runs() if run.info.status == "KILLED")
    (whole,) = (run.info.run_id for run in training_runs() if run.info.status == "FINISHED")
    assert main(["train", "--resume", cut]) == 0
    assert history(cut) == history(whole)
    ours, theirs = last_checkpoint(cut)["model"], last_checkpoint(whole)["model"]
    assert all(torch.equal(ours[name], weights) for name, weights in theirs.items())


@pytest.mark.slow
def test_the_parent_of_all_goes_on_with_what_is_missing(interrupted):
    """Killed in its first child; resumed, it finishes that child and starts the other two."""
    child = interrupted("main", "all", 5)
    parent = Run(child).tags["mlflow.parentRunId"]
    assert Run(parent).status == "KILLED"
    assert main(["main", "--resume", parent]) == 0
    runs = training_runs()
    assert sorted(run.data.tags["expert"] for run in runs) == [
        "balanced_softmax",
        "ce",
        "logit_adjust",
    ]
    assert {run.info.status for run in runs} == {"FINISHED"} == {Run(parent).status}
    assert child in {run.info.run_id for run in runs}


def test_mlflow_run_with_run_id_goes_on_with_that_run(interrupted, monkeypatch, tiny_arguments):
    run_id = interrupted("train", "ce", 10)
    monkeypatch.setenv("MLFLOW_RUN_ID", run_id)
    assert main(["train", "--loss", "ce", *tiny_arguments]) == 0
    assert [run.info.run_id for run in training_runs()] == [run_id]
    assert len(history(run_id)["train/loss"]) == 6


@pytest.mark.slow
def test_another_host_resumes_from_the_store_under_a_launcher_that_only_points(
    interrupted, monkeypatch, tmp_path
):
    run_id = interrupted("train", "ce", 10)
    recorded = history(run_id)
    monkeypatch.setenv("LONGTAIL_CACHE_DIR", str(tmp_path / "elsewhere"))
    client = MlflowClient()
    launched = client.create_run(client.get_run(run_id).info.experiment_id).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", launched)
    assert main(["train", "--loss", "ce", "--config", "auto", "--resume", run_id]) == 0
    assert Run(launched).tags["stage"] == "resume"
    assert Run(launched).tags["source_run_id"] == run_id
    assert not Run(launched).metrics
    assert Run(launched).status == Run(run_id).status == "FINISHED"
    complete = history(run_id)
    assert len(complete["train/loss"]) == 6
    for name, points in recorded.items():
        assert complete[name][: len(points)] == points, name


def test_another_config_is_refused_by_name(interrupted, tiny_arguments, capfd, tmp_path):
    run_id = interrupted("train", "ce", 5)

    def refused(*arguments: str) -> str:
        capfd.readouterr()
        assert main(["train", "--resume", run_id, *arguments]) == 2
        (line,) = capfd.readouterr().err.strip().splitlines()
        return line

    line = refused("--lr", "0.1", "--epochs", "9")
    assert "lr=0.1 (was 0.025)" in line
    assert "epochs=9 (was 6)" in line
    assert "loss=balanced_softmax (was ce)" in refused("--loss", "balanced_softmax")
    assert "source=cifar100 (was images)" in refused("--config", "cifar100_lt")
    assert "loss=all (was ce)" in refused("--loss", "all")
    assert "train/<class>/" in refused("--data_dir", str(tmp_path))
    assert "epochs=0" in refused("--epochs", "0")
    name = refused("--register_as", "experts")
    assert "register_as=experts: run" in name
    assert "-e calibrate -P run_id=" in name
    assert Run(run_id).status == "KILLED"
    capfd.readouterr()
    assert main(["train", "--resume", "nosuchrun"]) == 2
    assert "resume=nosuchrun: not found" in capfd.readouterr().err


@pytest.mark.parametrize("command", [["calibrate", "--run_id"], ["train", "--resume"]])
def test_images_of_which_the_splits_cannot_be_are_refused_without_a_remedy_for_new_runs(
    store, tiny_arguments, command, image_folder, capfd, monkeypatch
):
    assert main(["train", *tiny_arguments, "--epochs", "1"]) == 0
    (run,) = training_runs()
    MlflowClient().update_run(run.info.run_id, "KILLED")
    if command[0] == "train":
        MlflowClient().delete_tag(run.info.run_id, "training")

    def fail(*arguments, **settings):
        raise DataError("class 1 (bee): 18 training images asked, 8 present; add images")

    monkeypatch.setattr("longtail_experts.stages.inputs.make_splits", fail)
    capfd.readouterr()
    assert main([*command, run.info.run_id]) == 2
    assert capfd.readouterr().err == (
        f"error: run {run.info.run_id}: was not trained on the images of data_dir={image_folder} "
        "(class 1 (bee): 18 training images asked, 8 present)\n"
    )


def test_other_images_are_refused(interrupted, image_folder, tmp_path, capfd):
    run_id = interrupted("train", "ce", 5)
    other = tmp_path / "other"
    shutil.copytree(image_folder, other)
    next((other / "train" / "ant").iterdir()).unlink()
    assert main(["train", "--resume", run_id, "--data_dir", str(other)]) == 2
    assert "was trained on splits" in capfd.readouterr().err


def torn(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5000])


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(torn, id="torn", marks=pytest.mark.slow),
        pytest.param(flipped, id="flipped"),
        pytest.param(Path.unlink, id="gone", marks=pytest.mark.slow),
    ],
)
def test_a_damaged_last_falls_back_to_the_one_before(
    damage, interrupted, three_experts, caplog, capsys
):
    """Both copies of the newest checkpoint, here and in the store, are damaged alike."""
    run_id = interrupted("train", "ce", 16, "--checkpoint_every=1")
    folder = local_folder(run_id)
    assert {"last.pt", "previous.pt"} <= {path.name for path in folder.iterdir()}
    before = torch.load(folder / "previous.pt", weights_only=True)["step"]
    stored = next(Path.cwd().glob(f"mlruns/*/{run_id}/artifacts/checkpoints/last.pt"))
    damage(folder / "last.pt")
    damage(stored)
    assert main(["train", "--resume", run_id]) == 0
    assert f"at step {before + 1} of" in capsys.readouterr().out
    if damage is not Path.unlink:
        assert "last.pt is damaged" in caplog.text
    assert len(history(run_id)["train/loss"]) == 6
