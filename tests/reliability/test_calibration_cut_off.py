"""A calibration cut off at any point goes on to the record of one left alone."""

import mlflow
import pytest
from reliability.harness import history, of_reference, training_runs

from longtail_experts.cli import main
from longtail_experts.stages import calibrate
from longtail_experts.tracking import expert_report, model
from longtail_experts.tracking.logits import read_logits
from longtail_experts.tracking.runs import Run, RunError

# In the order in which calibrate_expert takes them.
PARTS = {
    "final_calibrated.pt": (calibrate, "save_checkpoint"),
    "logits": (calibrate, "write_logits"),
    "tables": (expert_report, "record_per_class"),
    "figures": (expert_report, "record_figures"),
    "model": (calibrate, "log_expert_model"),
    "half a model": (model, "_save_model"),
    "report": (expert_report, "record_report"),
}
QUICK = {("half a model", "after"), ("report", "before")}  # most is recorded by then
CASES = [
    pytest.param(
        part,
        when,
        id=f"{when} {part}",
        marks=[] if (part, when) in QUICK else pytest.mark.slow,
    )
    for part in PARTS
    for when in ("before", "after")
]


def cut_off(part: str, when: str, error: BaseException, patch) -> None:
    """`error` comes up instead of a part of the calibration, or once it is done."""
    where, name = PARTS[part]
    work = getattr(where, name)

    def stopped(*args, **kwargs):
        if when == "after":
            work(*args, **kwargs)
        raise error

    patch.setattr(where, name, stopped)


@pytest.fixture
def trained(store, tiny_arguments, monkeypatch) -> str:
    """The run of a `main` that got Ctrl-C when it was about to calibrate."""
    with monkeypatch.context() as patch:
        cut_off("final_calibrated.pt", "before", KeyboardInterrupt(), patch)
        assert main(["main", "--loss", "ce", *tiny_arguments]) == 130
    (run,) = training_runs()
    assert run.info.status == "KILLED"
    return run.info.run_id


def test_one_that_fails_once_begun_says_so_by_its_exit_code(trained, monkeypatch, capsys):
    """2 is for what was refused before any work; whoever repeats what failed goes by that."""
    with monkeypatch.context() as patch:
        cut_off("logits", "before", RunError("the disk is full"), patch)
        assert main(["calibrate", "--run_id", trained]) == 1
    assert capsys.readouterr().err.strip().endswith("the disk is full")
    assert main(["calibrate", "--run_id", trained, "--batch_size", "0"]) == 2
    assert main(["calibrate", "--run_id", trained]) == 0


def temperature(run_id: str) -> float:
    return read_logits(Run(run_id)).temperature


@pytest.mark.parametrize(("part", "when"), CASES)
def test_a_calibration_cut_off_is_recorded_once(part, when, trained, three_experts, monkeypatch):
    with monkeypatch.context() as patch:
        cut_off(part, when, KeyboardInterrupt(), patch)
        assert main(["main", "--resume", trained]) == 130
    assert Run(trained).status == "KILLED"
    assert main(["main", "--resume", trained]) == 0
    assert Run(trained).status == "FINISHED"
    assert Run(trained).tags["calibrated"] == "true"
    assert history(trained) == of_reference(three_experts, history)
    assert temperature(trained) == of_reference(three_experts, temperature)
    (logged,) = Run(trained).logged_experts
    assert logged.status == "READY"
    assert mlflow.pyfunc.load_model(f"models:/{logged.model_id}")
