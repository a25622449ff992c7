"""Registered versions, and when the alias `champion` moves."""

import mlflow
import numpy as np
import pytest
import torch
from filelock import Timeout
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import PERMISSION_DENIED
from sklearn.metrics import balanced_accuracy_score

from longtail_experts.cli import main
from longtail_experts.data.locks import host_lock
from longtail_experts.tracking import registry
from longtail_experts.tracking.experts import recorded_config
from longtail_experts.tracking.logits import SplitLogits, load_expert_logits
from longtail_experts.tracking.registry import model_id_of, paired_difference, register
from longtail_experts.tracking.runs import Run

JUDGED_BY = "best/val_balanced_accuracy"


def split_logits(predictions, targets, num_classes: int) -> SplitLogits:
    logits = np.eye(num_classes, dtype=np.float32)[predictions]
    return SplitLogits(logits, np.asarray(targets), np.arange(len(targets)))


def test_the_difference_is_that_of_balanced_accuracies_and_its_error_covers_it():
    draw = np.random.RandomState(1)
    targets = np.repeat(np.arange(6), [40, 20, 10, 5, 2, 1])
    found = []
    for _ in range(300):
        ours, theirs = (
            np.where(draw.rand(len(targets)) < p, targets, (targets + 1) % 6) for p in (0.6, 0.5)
        )
        difference = paired_difference(*(split_logits(p, targets, 6) for p in (ours, theirs)))
        expected = balanced_accuracy_score(targets, ours) - balanced_accuracy_score(targets, theirs)
        assert difference.value == pytest.approx(expected)
        found.append(difference)
    spread = np.std([difference.value for difference in found])
    mean_error = np.sqrt(np.mean([difference.standard_error**2 for difference in found]))
    assert spread <= mean_error * 1.05  # squares about zero: at most too wide
    assert mean_error <= spread * 1.2


def test_an_expert_does_not_differ_from_itself():
    same = split_logits([0, 1, 1], [0, 1, 0], 2)
    assert paired_difference(same, same) == (0, 0)


@pytest.fixture
def champion_of(experts_copy):
    client = MlflowClient()

    def version(name: str) -> str:
        return client.get_model_version_by_alias(name, "champion").run_id

    return version


def judged(runs: dict[str, Run], **values: float) -> None:
    """Set what the runs are judged by."""
    for loss, value in values.items():
        runs[loss].log_metrics({JUDGED_BY: value}, step=10**6)


def test_the_alias_goes_to_the_best_on_val_lt_and_stays_there(experts_copy, champion_of, capsys):
    client, losses = MlflowClient(), ("ce", "logit_adjust", "balanced_softmax")
    runs = {loss: Run(experts_copy[loss]) for loss in losses}
    judged(runs, ce=0.3, logit_adjust=0.4, balanced_softmax=0.4)
    for number, (loss, reigns) in enumerate(
        (("ce", "ce"), ("logit_adjust", "logit_adjust"), ("balanced_softmax", "logit_adjust")),
        start=1,
    ):  # better: it moves; equal: it does not
        register(runs[loss], "experts")
        assert f"version {number}, " in capsys.readouterr().out
        assert champion_of("experts") == experts_copy[reigns]
        assert runs[loss].tags["registered_as"] == f"experts/{number}"
        assert runs[loss].tags["champion_when_registered"] == str(loss == reigns).lower()
    for number, (ours, theirs) in enumerate(
        (("logit_adjust", "ce"), ("balanced_softmax", "logit_adjust"))
    ):
        splits = [load_expert_logits(experts_copy[e]).splits["val_lt"] for e in (ours, theirs)]
        value, error = paired_difference(*splits)
        metrics = runs[ours].metrics
        assert metrics["champion/difference"] == pytest.approx(value), number
        assert metrics["champion/difference_standard_error"] == pytest.approx(error)
    register(runs["ce"], "experts")
    assert capsys.readouterr().out == ""
    assert len(client.search_model_versions("name = 'experts'")) == 3
    register(runs["ce"], "others")
    register(runs["balanced_softmax"], "others")  # the difference told last is from its champion
    splits = [load_expert_logits(experts_copy[e]).splits["val_lt"] for e in (ours, "ce")]
    metrics = runs["balanced_softmax"].metrics
    assert metrics["champion/difference"] == pytest.approx(paired_difference(*splits)[0])


def test_a_store_that_fails_in_between_hands_the_alias_to_nobody(
    experts_copy, champion_of, monkeypatch, caplog
):
    runs = {loss: Run(experts_copy[loss]) for loss in ("ce", "logit_adjust")}
    judged(runs, ce=0.4, logit_adjust=0.3)
    register(runs["ce"], "experts")

    def refuse(*arguments):
        raise MlflowException("the disk is on fire")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "get_registered_model", refuse)
        register(runs["logit_adjust"], "experts")
    assert "the disk is on fire" in caplog.text
    assert "registered_as" not in runs["logit_adjust"].tags
    assert champion_of("experts") == experts_copy["ce"]
    register(runs["logit_adjust"], "experts")  # goes on with the version that it had made
    assert runs["logit_adjust"].tags["registered_as"] == "experts/2"
    assert len(MlflowClient().search_model_versions("name = 'experts'")) == 2


def test_a_first_version_cut_off_before_its_alias_gets_it_later(
    experts_copy, champion_of, monkeypatch
):
    run = Run(experts_copy["ce"])

    def refuse(*arguments):
        raise MlflowException("away")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "set_registered_model_alias", refuse)
        register(run, "experts")
    register(run, "experts")
    assert champion_of("experts") == experts_copy["ce"]


def test_a_champion_without_a_run_stays(experts_copy, capsys):
    client, run = MlflowClient(), Run(experts_copy["ce"])
    client.create_registered_model("experts")
    client.create_model_version("experts", "file:///tmp/none")
    client.set_registered_model_alias("experts", "champion", "1")
    register(run, "experts")
    assert "version 1 stays champion, its run cannot be read" in capsys.readouterr().out
    assert int(client.get_model_version_by_alias("experts", "champion").version) == 1


def test_an_expert_of_other_splits_does_not_take_the_alias(experts_copy, champion_of, capsys):
    client = MlflowClient()
    ours, other = Run(experts_copy["ce"]), Run(experts_copy["logit_adjust"])
    register(ours, "experts")
    copy = client.create_run(other.experiment_id)
    client.log_param(copy.info.run_id, "splits_sha256", "f" * 64)
    client.log_metric(copy.info.run_id, JUDGED_BY, 1.0)
    client.create_model_version(
        "experts", client.search_model_versions("name = 'experts'")[0].source, copy.info.run_id
    )
    client.set_registered_model_alias("experts", "champion", "2")
    register(other, "experts")
    assert "other splits" in capsys.readouterr().out
    assert champion_of("experts") == copy.info.run_id
    assert "champion/difference" not in other.metrics


def test_a_champion_in_a_store_that_fails_is_challenged_later(
    experts_copy, champion_of, monkeypatch, caplog
):
    """It is not taken for one whose run is gone."""
    runs = {loss: Run(experts_copy[loss]) for loss in ("ce", "logit_adjust")}
    judged(runs, ce=0.3, logit_adjust=0.4)
    register(runs["ce"], "experts")
    get_run = MlflowClient.get_run

    def refuse(client, run_id):
        if run_id == experts_copy["ce"]:
            raise MlflowException("403: not you", error_code=PERMISSION_DENIED)
        return get_run(client, run_id)

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "get_run", refuse)
        register(runs["logit_adjust"], "experts")
    assert "403: not you" in caplog.text
    assert champion_of("experts") == experts_copy["ce"]
    register(runs["logit_adjust"], "experts")
    assert champion_of("experts") == experts_copy["logit_adjust"]


def test_what_is_registered_under_two_names_is_left_alone_under_both(experts_copy, capsys):
    run, client = Run(experts_copy["ce"]), MlflowClient()
    names = ("mine", "shared")
    for name in names:
        register(run, name)
        client.delete_registered_model_alias(name, "champion")  # a person decides otherwise
    capsys.readouterr()
    for name in names:
        register(run, name)
        assert not client.get_registered_model(name).aliases
    assert capsys.readouterr().out == ""
    assert run.tags["registered_as"] == "shared/1"


@pytest.mark.parametrize("reigns", [False, True])
def test_another_model_of_the_run_under_the_name_is_not_taken_for_the_expert(
    experts_copy, champion_of, reigns
):
    """Whether it is registered before the expert or after it, and champion or not."""
    run, client = Run(experts_copy["ce"]), MlflowClient()
    client.create_registered_model("shared")
    theirs = client.create_model_version("shared", "file:///tmp/none", run.run_id)
    if reigns:
        client.set_registered_model_alias("shared", "champion", theirs.version)
    register(run, "shared")
    client.create_model_version("shared", "file:///tmp/none", run.run_id)
    register(run, "shared")
    versions = {int(v.version): v for v in client.search_model_versions("name = 'shared'")}
    assert len(versions) == 3
    assert model_id_of(run) in versions[2].source
    assert [n for n, v in versions.items() if "champion_when_registered" in v.tags] == [2]
    champion = client.get_model_version_by_alias("shared", "champion")
    assert int(champion.version) == (1 if reigns else 2)


def test_a_store_that_cannot_register_does_not_fail_the_expert(experts_copy, monkeypatch, caplog):
    def refuse(*arguments, **more):
        raise MlflowException("no registry here")

    monkeypatch.setattr("mlflow.register_model", refuse)
    register(Run(experts_copy["ce"]), "my experts")
    assert "no registry here" in caplog.text
    assert f"-P resume={experts_copy['ce']} -P register_as='my experts'" in caplog.text


def test_main_registers_what_it_was_asked_to(store, tiny_arguments):
    arguments = [*tiny_arguments, "--epochs=1", "--milestones=none", "--register_as=my experts"]
    assert main(["main", "--loss", "ce", *arguments]) == 0
    client = MlflowClient()
    (version,) = client.search_model_versions("name = 'my experts'")
    assert version.run_id == client.get_model_version_by_alias("my experts", "champion").run_id
    expert = load_expert_logits(version.run_id)
    import mlflow

    model = mlflow.pytorch.load_model("models:/my experts@champion")
    with torch.no_grad():
        assert model(torch.zeros(2, 32, 32, 3, dtype=torch.uint8)).shape == (2, 5)
    assert len(expert.class_names) == 5


@pytest.mark.parametrize("again", ["calibrate", "resume"])
def test_a_registration_cut_off_is_done_by_asking_again(experts_copy, capsys, again):
    run = Run(experts_copy["ce"])
    if again == "calibrate":
        config = recorded_config(run).replace(register_as="experts")
        run.write_text("config.yaml", config.to_yaml())
        command = ["calibrate", "--run_id", run.run_id]
    else:
        command = ["main", "--resume", run.run_id, "--register_as", "experts"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "registered as experts: version 1" in out
    assert "already; nothing else was changed" in out
    assert run.tags["registered_as"] == "experts/1"
    assert main(command) == 0
    assert "registered as" not in capsys.readouterr().out
    MlflowClient().delete_registered_model("experts")
    assert main(command) == 0
    assert "registered as experts: version 1" in capsys.readouterr().out
    assert MlflowClient().get_model_version_by_alias("experts", "champion").run_id == run.run_id


def test_one_process_at_a_time_decides_who_is_champion(monkeypatch):
    """Two that were compared with the same champion would both follow it."""
    places = []

    def _register(run, name):
        places.append(host_lock(f"{mlflow.get_registry_uri()} {name}"))
        with pytest.raises(Timeout):
            places[0].acquire(timeout=0)

    monkeypatch.setattr(registry, "_register", _register)
    register(None, "shared")
    with places[0].acquire(timeout=0):
        pass
