"""The readiness report, and the part of it that `main` begins with."""

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import mlflow
import psutil
import pytest
import yaml
from mlflow import MlflowClient

from longtail_experts.cli import main
from longtail_experts.config import Config, make_config
from longtail_experts.learning.losses import LOSSES
from longtail_experts.stages import main as main_stage
from longtail_experts.stages import preflight
from longtail_experts.stages.checks import config_findings
from longtail_experts.tracking.readiness import duration
from longtail_experts.tracking.report import LONGEST_DESCRIPTION, fitting

ONE_STEP = SimpleNamespace(size=lambda split: 8)  # as a data set
# Long enough to be worth stopping, and a warm-up that outlasts it.
ENDLESS_WARMUP = ("--epochs", "2000", "--warmup_steps", "100000")


@pytest.fixture
def small_network():
    """Not here: room is asked for as for ResNet-32."""


def runs() -> list:
    experiment = mlflow.get_experiment_by_name("tests")
    return MlflowClient().search_runs([experiment.experiment_id]) if experiment else []


def full_disk(store: Path, monkeypatch) -> None:
    usage = shutil.disk_usage(store)._replace(free=5_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)


@pytest.fixture
def begun(monkeypatch) -> list:
    """`main` up to its run: what would be trained."""
    calls = []
    monkeypatch.setattr(main_stage, "run_one", lambda config, data, loss: calls.append(loss) or "x")
    return calls


def test_milestones_of_a_cosine_stop_nothing_and_may_weigh_classes():
    recipe = {"lr_schedule": "cosine", "early_stopping_patience": 5, "validation_every": 10}
    found = {
        loss: {f.field: f for f in config_findings(make_config({"loss": loss, **recipe}), ONE_STEP)}
        for loss in ("ce", "ldam_drw")
    }
    assert found["ce"]["early_stopping_patience"].verdict == "ok"  # not: after the last milestone
    assert found["ce"]["milestones"].message == "not used by lr_schedule=cosine"
    assert found["ldam_drw"]["milestones"].message.endswith("weighs classes from epoch 96")
    assert found["ldam_drw"]["beta"].verdict == "ok"


def test_a_slip_of_the_keyboard_takes_no_memory(store, tiny_arguments, capfd):
    """Rates of a billion epochs would be hundreds of gigabytes."""
    assert main(["preflight", *tiny_arguments, "--epochs", "1000000000"]) == 1
    assert "NOT READY: disk=" in capfd.readouterr().err
    (run,) = runs()
    assert run.data.tags["ready"] == "false"
    assert "Not computed: something is blocking." in run.data.tags["mlflow.note.content"]


def test_one_epoch_of_warm_up_is_none():
    """The first of the epochs has its share of the rate, which of one is all of it."""
    for epochs, verdict in ((1, "warning"), (2, "note")):
        config = make_config({"warmup_steps": 0, "warmup_epochs": epochs})
        found = {f.field: f for f in config_findings(config, ONE_STEP)}
        assert found["lr"].verdict == verdict


def test_the_report(store, tiny_arguments, capsys):
    assert main(["preflight", "--loss", "all", *tiny_arguments]) == 0
    (run,) = runs()
    assert run.info.status == "FINISHED"
    assert (run.data.tags["stage"], run.data.tags["ready"]) == ("preflight", "true")
    assert "expert" not in run.data.tags
    report = (next(store.glob(f"mlruns/*/{run.info.run_id}/artifacts")) / "report.md").read_text()
    printed = capsys.readouterr().out
    assert report.strip() in printed
    note = run.data.tags["mlflow.note.content"]
    assert note.startswith("## READY: all on images, about ")
    assert " for 3 experts\n" in note
    for heading in (
        "Time",
        "Memory and disk",
        "Losses before any training",
        "Learning rate by epoch",
        "Data",
        "Configuration",
    ):
        assert f"## {heading}\n" in report
    for name in Config.model_fields:
        assert f"\n| {name} | " in report
    assert "- **note** loss = all: at tau 1, logit_adjust and balanced_softmax are the" in report
    assert "| logit_adjust | smallest class | as theory | " in report
    assert "NOT AS THEORY" not in report
    assert "| 1-3 | 0.025 | 0.025 |" in report
    assert "| training | 378 | " in report  # 6 epochs of 63 images
    assert " in a few steps of 8 images " in report
    assert " Activations at batch 8, fp32, measured " in report
    assert run.data.params["splits_sha256"][:12] in report
    artifacts = {item.path for item in MlflowClient().list_artifacts(run.info.run_id)}
    assert artifacts == {"report.md", "tables", "figures"}


def test_a_batch_is_no_more_than_there_are_images(store, tiny_arguments, capsys):
    assert main(["preflight", *tiny_arguments, "--batch_size", "128"]) == 0
    report = capsys.readouterr().out
    assert " in a few steps of 63 images " in report
    assert " Activations at batch 63, fp32, measured " in report


@pytest.mark.parametrize("what", ["warm-up", "disk", "memory", "losses"])
def test_not_ready_is_exit_code_1_with_a_remedy(store, tiny_arguments, monkeypatch, capfd, what):
    arguments, says = (
        list(tiny_arguments),
        {
            "warm-up": "warmup_steps=100000: the rate never reaches lr",
            "disk": "disk=29 MB of 5 MB free: not enough: make room in",
            "memory": "memory=",
            "losses": "losses=against theory: logit_adjust",
        }[what],
    )
    if what == "warm-up":
        arguments += ENDLESS_WARMUP
    elif what == "disk":
        full_disk(store, monkeypatch)
    elif what == "memory":
        little = psutil.virtual_memory()._replace(available=1_000_000)
        monkeypatch.setattr(psutil, "virtual_memory", lambda: little)
    else:
        wrong = LOSSES["logit_adjust"]._replace(
            terms=lambda counts, knobs: {"shift": counts.double()}
        )
        monkeypatch.setitem(LOSSES, "logit_adjust", wrong)
    assert main(["preflight", "--loss", "ce", *arguments]) == 1
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert line.startswith(f"error: NOT READY: {says}")
    (run,) = runs()
    assert (run.info.status, run.data.tags["ready"]) == ("FAILED", "false")
    note = run.data.tags["mlflow.note.content"]
    assert note.startswith("## NOT READY: ce on images\n\n- **blocking** ")
    assert "Not measured" in note


def test_experts_that_train_at_the_same_time_need_memory_for_all(
    store, tiny_arguments, monkeypatch, capfd
):
    """With little free the finding says how much is needed: three times that of one."""
    little = psutil.virtual_memory()._replace(available=1_000_000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: little)
    megabytes = []
    for together in (False, True):
        monkeypatch.setattr(preflight, "trains_at_once", lambda config, value=together: value)
        assert main(["preflight", "--loss", "all", *tiny_arguments]) == 1
        needed = re.search(r"memory=(\d+) MB of 1 MB free", capfd.readouterr().err)
        megabytes.append(int(needed[1]))
    assert megabytes[1] == pytest.approx(3 * megabytes[0], abs=2)


def test_main_stops_before_there_is_a_run(store, tiny_arguments, begun, capfd):
    assert main(["main", *tiny_arguments, *ENDLESS_WARMUP]) == 1
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: NOT READY: warmup_steps=100000: the rate never reaches lr")
    assert "preflight=false" in error
    assert not begun
    assert not runs()


def test_the_launchers_run_says_why_main_stopped(store, tiny_arguments, begun, monkeypatch):
    client = MlflowClient()
    launched = client.create_run(client.create_experiment("launcher")).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", launched)
    assert main(["main", *tiny_arguments, *ENDLESS_WARMUP]) == 1
    assert not begun
    run = client.get_run(launched)
    note = run.data.tags["mlflow.note.content"]
    assert note.startswith("**Not started.** NOT READY: warmup_steps=100000: the rate never")
    assert (run.data.tags["stage"], run.info.run_name) == ("refused", "refused")


def test_main_stops_at_a_full_disk(store, tiny_arguments, begun, monkeypatch, capfd):
    full_disk(store, monkeypatch)
    assert main(["main", *tiny_arguments]) == 1
    assert "NOT READY: disk=29 MB of 5 MB free" in capfd.readouterr().err
    assert not begun
    assert not runs()


def test_preflight_false_skips_it(store, tiny_arguments, begun, caplog):
    arguments = [*tiny_arguments, *ENDLESS_WARMUP, "--milestones", "4,3000"]
    assert main(["main", *arguments, "--preflight", "false"]) == 0
    assert begun == ["ce"]
    assert "milestones=[3000] lie at or past epochs=2000" in caplog.text


def test_main_prints_warnings_once_and_goes_on(store, tiny_arguments, begun, caplog):
    arguments = [*tiny_arguments, "--milestones", "4,6,9", "--validation_every", "6"]
    assert main(["main", *arguments]) == 0
    assert begun == ["ce"]
    warnings = [r.getMessage() for r in caplog.records if r.levelname.lower() == "warning"]
    assert [w.split(":")[0] for w in warnings] == ["milestones=4,6,9", "validation_every=6"]


@pytest.mark.parametrize(
    "asked", [(), pytest.param(("--preflight", "false"), marks=pytest.mark.slow)]
)
def test_runs_from_before_this_field_are_resumed(store, tiny_arguments, monkeypatch, asked):
    """Neither config.yaml nor last.pt of such a run names it."""
    from longtail_experts.stages import train as train_stage
    from longtail_experts.tracking.checkpoints import read_file

    validate, calls = train_stage.validate, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return validate(*arguments)

    as_text = Config.as_text
    with monkeypatch.context() as before:
        before.setattr(
            Config, "as_text", lambda c: {k: v for k, v in as_text(c).items() if k != "preflight"}
        )
        before.setattr(train_stage, "validate", interrupted)
        arguments = [*tiny_arguments, "--epochs", "2", "--validation_every", "1"]
        arguments += ["--checkpoint_every", "1"]
        assert main(["train", "--loss", "ce", *arguments]) == 130
    (run,) = runs()
    path = next(store.glob(f"mlruns/*/{run.info.run_id}/artifacts/config.yaml"))
    recorded = yaml.safe_load(path.read_text())
    del recorded["preflight"]
    path.write_text(yaml.safe_dump(recorded))
    last = next(store.glob(f".cache/runs/{run.info.run_id}/**/last.pt"))
    assert "preflight" not in read_file(last)["config"]
    assert main(["train", "--resume", run.info.run_id, *asked]) == 0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.1234, "0.123 s"),
        (42, "42 s"),
        (95, "1.6 min"),
        (600, "10 min"),
        (5400, "1.5 h"),
        (36000, "10.0 h"),
    ],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_a_description_holds_whole_sections():
    parts = ["a" * 3000, "b" * 3000, "c" * 3000]
    assert fitting(parts, "More.") == "\n\n".join([*parts[:2], "More."])
    assert fitting(parts[:2], "More.") == "\n\n".join(parts[:2])
    assert len(fitting(["a" * 4000, "b" * 3998], "More.")) <= LONGEST_DESCRIPTION
