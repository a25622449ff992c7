"""The literature's protocol: no hold-out, no selection, a temperature cross-fitted on test."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import mlflow
import pytest
import torch
from conftest import CLASS_COUNTS, use_blank_figures, use_small_network, use_store
from mlflow import MlflowClient

from longtail_experts import load_expert_logits
from longtail_experts.cli import main
from longtail_experts.config import make_config
from longtail_experts.learning.calibration import cross_fit_temperature, deployment_scores
from longtail_experts.learning.metrics import expected_calibration_error, nll_per_image
from longtail_experts.stages import calibrate
from longtail_experts.stages.inputs import log_offset_of, objective_at
from longtail_experts.tracking import comparison
from longtail_experts.tracking.runs import Run


@pytest.fixture(scope="module")
def literature(tmp_path_factory, migrated_database, tiny_arguments) -> dict:
    """A store with one expert of each of two losses, trained on the whole pool."""
    folder = tmp_path_factory.mktemp("literature")
    with pytest.MonkeyPatch.context() as patch:
        use_blank_figures(patch)
        use_small_network(patch)
        use_store(folder, migrated_database, patch)
        arguments = [
            *tiny_arguments,
            "--protocol",
            "literature",
            "--checkpoint_every",
            "2",
            "--epochs",
            "3",
        ]
        assert main(["main", "--loss", "ce", *arguments]) == 0
        assert main(["train", "--loss", "ldam_drw", *arguments]) == 0
        (unfinished,) = MlflowClient().search_runs([_experiment()], "tags.expert = 'ldam_drw'")
        assert main(["calibrate", "--run_id", unfinished.info.run_id]) == 0
        runs = MlflowClient().search_runs([_experiment()], "tags.calibrated = 'true'")
    return {"folder": folder} | {run.data.tags["expert"]: run for run in runs}


def _experiment() -> str:
    return mlflow.get_experiment_by_name("tests").experiment_id


@pytest.fixture
def here(literature, monkeypatch, tmp_path) -> dict:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{literature['folder'] / 'mlflow.db'}")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "tests")
    return literature


def artifact(run: mlflow.entities.Run, path: str) -> Path:
    return Path(MlflowClient().download_artifacts(run.info.run_id, path))


@pytest.mark.parametrize("loss", ["ce", "ldam_drw"])
def test_nothing_is_held_out_and_nothing_selected(here, loss):
    run = here[loss]
    assert run.info.status == "FINISHED"
    expert = load_expert_logits(run.info.run_id)
    assert list(expert.splits) == ["train", "test_balanced"]
    assert len(expert.splits["train"].targets) == sum(CLASS_COUNTS.values())
    assert len(expert.splits["test_balanced"].targets) == 5 * 20
    assert set(expert.log_offset) == {0}  # of ldam_drw: three epochs, before its weights act
    named = set(run.data.metrics)
    assert not [name for name in named if name.startswith(("val/", "best/", "test_lt/"))]
    assert (
        run.data.metrics["test_balanced/balanced_accuracy"]
        == (run.data.metrics["test_balanced/balanced_accuracy_last"])
    )
    last, final = (
        torch.load(artifact(run, f"checkpoints/{name}.pt"), weights_only=True)
        for name in ("last", "final_calibrated")
    )
    assert all(torch.equal(final["model"][k], v) for k, v in last["model"].items())
    files = {f.path for f in MlflowClient().list_artifacts(run.info.run_id, "checkpoints")}
    assert files == {"checkpoints/last.pt", "checkpoints/final_calibrated.pt"}


def test_a_half_at_the_bound_of_the_search_is_noted(monkeypatch):
    """As where the only mistake is in the other half: the scores are of a T that is no estimate."""
    targets = torch.arange(10).repeat_interleave(2)
    logits = torch.nn.functional.one_hot(targets, 10) * 8.0
    logits[0] = logits[0].roll(1)
    data = SimpleNamespace(split_names=("test_balanced",), targets=lambda split: targets)
    uniform = torch.full((10,), 0.1, dtype=torch.float64)
    config = SimpleNamespace(split_seed=0)
    fitted = calibrate.fit({"test_balanced": logits}, config, data, uniform.log(), uniform)
    assert min(fitted.halves) == pytest.approx(math.exp(-4))
    assert fitted.temperature.value == pytest.approx(1.0, abs=0.9)
    assert fitted.temperature.at_bound


@pytest.mark.parametrize("loss", ["ce", "ldam_drw"])
def test_test_scores_are_cross_fitted_under_the_uniform_prior(here, loss):
    run = here[loss]
    expert, metrics = load_expert_logits(run.info.run_id), run.data.metrics
    split = expert.splits["test_balanced"]
    logits, targets = torch.tensor(split.logits), torch.tensor(split.targets)
    log_offset, prior = torch.tensor(expert.log_offset), torch.tensor(expert.prior)
    crossed = cross_fit_temperature(logits, targets, log_offset - prior.log(), seed=42)
    assert (metrics["temperature_half_0"], metrics["temperature_half_1"]) == crossed.halves
    uniform = torch.full((5,), 0.2, dtype=torch.float64)
    scores = deployment_scores(logits, crossed.per_row, log_offset, prior, uniform)
    nll = float(nll_per_image(scores, targets).mean())
    assert metrics["test_balanced/nll"] == pytest.approx(nll, rel=1e-12)
    ece = expected_calibration_error(scores.softmax(1), targets)
    assert metrics["test_balanced/ece"] == pytest.approx(ece, rel=1e-12)
    low, high = metrics["temperature_low"], metrics["temperature_high"]
    assert low <= metrics["temperature"] <= high
    manifest = json.loads(artifact(run, "logits/manifest.json").read_text())
    assert manifest["temperature_from"] == "test_balanced, uniform prior, all images"
    assert tuple(manifest["temperature_halves"]) == crossed.halves
    note = run.data.tags["mlflow.note.content"]
    assert "no calibration split" in note
    assert "own subset" in note
    assert "nothing was selected" in note
    assert "☐ trained" not in note
    assert ("**Approximate:**" in note) is (loss == "ldam_drw")
    assert manifest["log_offset_is_exact"] is (loss == "ce")


@pytest.mark.parametrize("fields", [{"milestones": "4,6"}, {"reweight_from": 4}, {}])
def test_the_offset_of_a_deferred_loss_is_of_the_weights_that_trained_it(fields):
    config = make_config({"loss": "ldam_drw", "device": "cpu", "milestones": "none", **fields})
    data = SimpleNamespace(class_counts=lambda split: torch.tensor([50, 5, 1]))
    for epoch in (0, 3, 4, 9):
        weights = objective_at(epoch, config, data).keywords["weights"]
        offset = log_offset_of(config, data, epoch)
        torch.testing.assert_close(offset, -weights.double().log())
        assert bool((offset == 0).all()) is (epoch < 4 and bool(fields))


def test_it_is_kept_out_of_the_export(here, capfd):
    assert main(["export", "--run_ids", here["ce"].info.run_id, "--out", "argse"]) == 2
    assert "protocol=literature has no calib" in capfd.readouterr().err
    assert not Path("argse").exists()


def test_experts_of_it_are_compared_by_scores_that_have_not_seen_their_rows(here):
    ids = ",".join(here[loss].info.run_id for loss in ("ce", "ldam_drw"))
    assert main(["compare", "--run_ids", ids]) == 0
    assert main(["compare", "--run_ids", ids, "--deployment", "test_lt"]) == 2
    members = comparison.read_members([Run(here[loss].info.run_id) for loss in ("ce", "ldam_drw")])
    result = comparison.together(members, "uniform")
    for member in members:
        nll = member.metrics["test_balanced/nll"]
        assert result.metrics[member.label]["nll"] == pytest.approx(nll, rel=1e-12)
        at_one = comparison.posthoc_of(member)[1.0]["balanced_accuracy"]
        assert at_one == member.metrics["test_balanced/adjusted_balanced_accuracy"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--early_stopping_patience", "3"], "early_stopping_patience=3: protocol=literature"),
        (["--register_as", "mine"], "register_as=mine: a champion is chosen on val_lt"),
        (["--subset_rule", "ldam"], "subset_rule=ldam: is a subset of CIFAR's official files"),
    ],
)
def test_what_it_cannot_have_is_refused(tiny_arguments, store, capfd, arguments, says):
    assert main(["main", *tiny_arguments, "--protocol", "literature", *arguments]) == 2
    assert says in capfd.readouterr().err
