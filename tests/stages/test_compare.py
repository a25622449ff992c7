"""Experts beside each other: which runs, what the tables say, and who is refused."""

import csv
import dataclasses
import io
import re
from contextlib import redirect_stdout
from pathlib import Path

import mlflow
import numpy as np
import pytest
from conftest import arguments_of, use_store
from fake_trials import add_sweep, add_trial
from mlflow import MlflowClient
from scipy.special import log_softmax, logsumexp
from sklearn.metrics import balanced_accuracy_score

from longtail_experts import load_expert_logits
from longtail_experts.cli import main
from longtail_experts.config import make_config
from longtail_experts.stages import compare
from longtail_experts.tracking import comparison, comparison_figures
from longtail_experts.tracking.comparison import distinct_labels
from longtail_experts.tracking.identity import code_sha256
from longtail_experts.tracking.runs import Run, RunError, start_run

LOSSES = ("ce", "logit_adjust", "balanced_softmax")
FIGURES = {"per_class", "head_tail", "posthoc", "reliability", "pairs", "ensemble"}


def read(run_id: str, path: str) -> str:
    file = mlflow.artifacts.download_artifacts(run_id=run_id, artifact_path=f"comparison/{path}")
    return Path(file).read_text()


def newest_comparison():
    experiment = MlflowClient().get_experiment_by_name("tests").experiment_id
    return MlflowClient().search_runs([experiment], "tags.stage = 'compare'")[0]


def converted(expert, split: str, q: np.ndarray) -> np.ndarray:
    """log-posterior of an expert under q, from its exported logits alone."""
    f = expert.splits[split].logits.astype(np.float64)
    scores = f / expert.temperature + expert.log_offset + np.log(q) - np.log(expert.prior)
    return log_softmax(scores, axis=1)


@pytest.mark.parametrize(
    ("combination", "combine"),
    [
        ("mean", lambda logs: logsumexp(logs, axis=0) - np.log(len(logs))),
        ("product", lambda logs: log_softmax(logs.mean(0), axis=1)),
    ],
)
def test_ensembles_on_the_parent_follow_from_the_exported_logits(finished, combination, combine):
    metrics = MlflowClient().get_run(finished["all"]).data.metrics
    members = [load_expert_logits(finished[loss]) for loss in LOSSES]
    targets = members[0].splits["test_balanced"].targets
    logs = combine(np.stack([converted(m, "test_balanced", np.full(5, 0.2)) for m in members]))
    expected = balanced_accuracy_score(targets, logs.argmax(1))
    assert metrics[f"ensemble_{combination}/balanced_accuracy"] == pytest.approx(expected)
    nll = -logs[np.arange(len(targets)), targets].mean()  # scikit-learn's clips at 2e-16
    assert metrics[f"ensemble_{combination}/nll"] == pytest.approx(nll, abs=1e-9)


def test_main_with_all_losses_ends_with_the_comparison(finished):
    page = read(finished["all"], "index.html")
    assert page.count("data:image/png;base64,") == len(FIGURES)
    assert not re.search(r"<script|<link|src=\"(?!data:)|https?://", page)
    client = MlflowClient()
    names = {
        Path(f.path).stem for f in client.list_artifacts(finished["all"], "comparison/figures")
    }
    assert names == FIGURES
    note = client.get_run(finished["all"]).data.tags["mlflow.note.content"]
    assert f"/runs/{finished['all']}/artifacts/comparison/index.html" in note


@pytest.fixture(scope="module")
def compared_once(three_experts, tmp_path_factory) -> dict[str, str]:
    """The finished experts in a copy of their store, compared without a choice."""
    folder, printed = tmp_path_factory.mktemp("compared"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        use_store(folder, Path(three_experts["folder"]) / "mlflow.db", patch)
        assert main(["compare"]) == 0
    return {**three_experts, "database": f"{folder}/mlflow.db", "printed": printed.getvalue()}


@pytest.fixture
def compared(compared_once, monkeypatch) -> dict[str, str]:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{compared_once['database']}")
    return compared_once


def test_without_a_choice_the_newest_of_each_loss_are_compared(compared):
    run = newest_comparison()
    rows = list(csv.DictReader(io.StringIO(read(run.info.run_id, "table.csv"))))
    assert {row["run_id"] for row in rows} == {compared[loss] for loss in LOSSES}
    for row in rows:
        recorded = MlflowClient().get_run(row["run_id"]).data.metrics
        for name, value in recorded.items():
            assert float(row[f"metrics.{name}"]) == value
        assert row["tags.code_sha256"] == code_sha256()
        assert row["params.lr"] == "0.025"
        assert "" not in (row["params.loss"], row["tags.step_path"])
    header = read(run.info.run_id, "table.csv").splitlines()[0].split(",")
    assert len(set(header)) == len(header)
    assert read(run.info.run_id, "report.md") in compared["printed"]
    assert run.info.status == "FINISHED"


def test_the_table_holds_the_recorded_figures_and_marks_the_best(compared):
    text = read(newest_comparison().info.run_id, "report.md")
    (line,) = re.findall(r"^\| test_balanced: balanced, % \|(.*)\|$", text, flags=re.M)
    cells = [cell.strip() for cell in line.split("|")]
    values = [
        MlflowClient().get_run(compared[loss]).data.metrics["test_balanced/balanced_accuracy"]
        for loss in LOSSES
    ]
    for cell, value in zip(cells, values, strict=True):
        assert cell.strip("*").startswith(f"{100 * value:.2f} ± ")
        assert cell.startswith("**") == (f"{value:.4f}" == f"{max(values):.4f}")
    (line,) = re.findall(r"^\| test_lt: NLL, nats, calibrated \|(.*)\|$", text, flags=re.M)
    nlls = [float(cell.strip(" *")) for cell in line.split("|")]
    marked = [float(cell.strip(" *")) for cell in line.split("|") if "**" in cell]
    assert set(marked) == {min(nlls)}


def test_training_seconds_are_images_over_their_rates(finished):
    client = MlflowClient()
    (one,) = comparison.read_members([Run(finished["ce"])])
    rates = client.get_metric_history(finished["ce"], "train/images_per_second")
    num_images = len(one.expert.splits["train"].targets)
    assert len(rates) == 6
    assert one.training_seconds == pytest.approx(sum(num_images / r.value for r in rates))
    run = client.get_run(finished["ce"])
    assert one.seconds == (run.info.end_time - run.info.start_time) / 1000 > one.training_seconds
    assert one.metrics == run.data.metrics


def test_differences_are_listed_and_equal_settings_are_not(compared):
    text = read(newest_comparison().info.run_id, "report.md")
    part = text.split("### What differs")[1].split("###")[0]
    assert "| expert_seed |" in part
    assert "| lr |" not in part
    assert "| loss |" not in part


def test_posthoc_adjustment_is_shown_over_all_tau_and_none_is_chosen(compared):
    text = read(newest_comparison().info.run_id, "report.md")
    part = text.split("### Post-hoc logit adjustment")[1].split("###")[0]
    assert "| tau | 0 | 0.25 | 0.5 | 0.75 | 1 | 1.25 | 1.5 | 1.75 | 2 |" in part
    assert "No tau is selected" in part
    assert "**" not in part
    for loss in LOSSES:
        metrics = MlflowClient().get_run(compared[loss]).data.metrics
        (line,) = re.findall(rf"^\| {loss}: balanced, % \|(.*)\|$", part, flags=re.M)
        at_one = float(line.split("|")[4])
        recorded = metrics["test_balanced/adjusted_balanced_accuracy"]
        assert at_one == pytest.approx(100 * recorded, abs=0.005)


def test_one_expert_alone_has_no_ensemble(experts_copy):
    assert main(["compare", "--run_ids", experts_copy["ce"]]) == 0
    run = newest_comparison()
    assert not [name for name in run.data.metrics if name.startswith("ensemble")]
    assert "### Ensembles" not in read(run.info.run_id, "report.md")


def test_deployment_on_the_long_tailed_split(experts_copy):
    assert main(["compare", "--deployment", "test_lt"]) == 0
    run = newest_comparison()
    members = [load_expert_logits(experts_copy[loss]) for loss in LOSSES]
    targets = members[0].splits["test_lt"].targets
    q = np.bincount(targets, minlength=5) / len(targets)
    logs = np.stack([converted(m, "test_lt", q) for m in members]).mean(0)
    expected = float((logs.argmax(1) == targets).mean())
    assert run.data.metrics["ensemble_product/accuracy"] == pytest.approx(expected)


def ids_compared() -> set[str]:
    table = read(newest_comparison().info.run_id, "table.csv")
    return {row["run_id"] for row in csv.DictReader(io.StringIO(table))}


def test_a_run_of_somebody_elses_is_no_expert_whatever_its_tags(experts_copy):
    import mlflow

    with mlflow.start_run():
        mlflow.set_tag("calibrated", "true")
    found = comparison.chosen_runs([], "", {}, None)
    assert {run.run_id for run in found} == {experts_copy[loss] for loss in LOSSES}


def test_filters_by_tag_and_number(experts_copy):
    assert main(["compare", "--tags", "expert=ce"]) == 0
    assert ids_compared() == {experts_copy["ce"]}
    assert main(["compare", "--last", "2"]) == 0  # trained in the order of LOSSES
    assert ids_compared() == {experts_copy[loss] for loss in LOSSES[1:]}


def test_of_two_experts_of_one_loss_the_newer_is_compared(experts_copy):
    MlflowClient().set_tag(experts_copy["logit_adjust"], "expert", "ce")
    assert main(["compare"]) == 0
    assert ids_compared() == {experts_copy["logit_adjust"], experts_copy["balanced_softmax"]}


@pytest.fixture
def altered_splits(experts_copy, tmp_path, monkeypatch):
    """The run of ce as if it were of other splits."""
    import sqlite3

    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        database.execute(
            "update params set value = ? where key = 'splits_sha256' and run_uuid = ?",
            ("f" * 64, experts_copy["ce"]),
        )
    return experts_copy


def test_different_splits_are_refused_unless_asked_for(altered_splits, capsys):
    before = len(all_runs())
    assert main(["compare"]) == 2
    message = capsys.readouterr().err
    assert "different splits" in message
    assert "ffffffffffff" in message
    assert "different_splits=true" in message
    assert len(all_runs()) == before
    assert main(["compare", "--different_splits", "true"]) == 0
    run = newest_comparison()
    assert not [name for name in run.data.metrics if name.startswith("ensemble")]
    assert "### Different splits" in read(run.info.run_id, "report.md")


def test_experts_of_two_imbalance_factors(store, image_folder, tiny_arguments, capsys):
    """For real: other counts, other training and test images, other priors."""
    few = {
        "imbalance_profile": "exp",
        "images_per_class": "20",
        "epochs": "1",
        "milestones": "none",
    }
    for loss, factor in (("ce", "4"), ("logit_adjust", "5")):
        given = [*tiny_arguments, *arguments_of(few), "--imbalance_factor", factor]
        assert main(["main", "--loss", loss, *given]) == 0
    of_each = {run.data.tags["expert"]: run.data.params for run in all_runs()}
    assert of_each["ce"]["splits_sha256"] != of_each["logit_adjust"]["splits_sha256"]
    capsys.readouterr()
    assert main(["compare"]) == 2
    message = capsys.readouterr().err
    for params in of_each.values():
        assert params["splits_sha256"][:12] in message
    assert len(all_runs()) == 2
    assert main(["compare", "--different_splits", "true"]) == 0
    run = newest_comparison()
    assert not [name for name in run.data.metrics if name.startswith("ensemble")]
    report = read(run.info.run_id, "report.md")
    assert "### Different splits" in report
    assert "| imbalance_factor | 4 | 5 |" in report


def test_experts_of_other_groups_are_still_tabulated(altered_splits, monkeypatch):
    """As of another imbalance factor: one of them has no tail, and none of its figures."""
    read_members = comparison.read_members

    def other_pool(runs):
        first, *others = read_members(runs)
        metrics = {n: v for n, v in first.metrics.items() if "tail" not in n}
        pool = tuple(1000 + n for n in first.pool_counts)
        return [dataclasses.replace(first, metrics=metrics, pool_counts=pool), *others]

    monkeypatch.setattr(comparison, "read_members", other_pool)
    assert main(["compare", "--different_splits", "true"]) == 0
    run_id = newest_comparison().info.run_id
    drawn = {f.path for f in MlflowClient().list_artifacts(run_id, "comparison/figures")}
    assert drawn == {"comparison/figures/per_class.png", "comparison/figures/posthoc.png"}
    (line,) = re.findall(r"^\| test_balanced: tail, % \|(.*)\|$", read(run_id, "report.md"), re.M)
    assert line.split("|")[0].strip() == "-"


def test_a_store_that_cannot_be_read_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "broken.db").write_bytes(b"no database" * 1000)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'broken.db'}")
    assert main(["compare"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert line.startswith("error: the store sqlite:///")
    assert "cannot be read" in line


def all_runs() -> list:
    experiments = [e.experiment_id for e in MlflowClient().search_experiments()]
    return MlflowClient().search_runs(experiments)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--run_ids", "nonsense"], "run_id=nonsense: not found"),
        (["--run_ids", "PARENT"], "is not the run of an expert (its stage is all)"),
        (["--run_ids", "CE,CE"], "is given 2 times"),
        (["--run_ids", "CE", "--last", "2"], "run_ids together with last"),
        (["--last", "0"], "last='0': give a number"),
        (["--tags", "expert"], "tags='expert': give name=value"),
        (["--tags", "expert=ce,expert=focal"], "expert is given twice"),
        (["--tags", "expert=none_such"], "no calibrated expert is in the experiment with these"),
        (["--deployment", "train"], "deployment='train': give one of uniform, test_lt"),
        (["--different_splits", "yes"], "different_splits='yes': give true or false"),
        (["--sweep", "CE"], "none of its 0 child runs is a calibrated expert"),
        (["--sweep", "nonsense"], "sweep=nonsense: not found"),
        (["--sweep", "PARENT", "--last", "2"], "sweep together with last: give one of them"),
        (["--experiment", "elsewhere"], "experiment=elsewhere: not in the store; there are:"),
    ],
)
def test_what_cannot_be_compared_is_said_in_one_line(experts_copy, arguments, says, capsys):
    before = len(all_runs())
    named = {"PARENT": experts_copy["all"], "CE": experts_copy["ce"]}
    arguments = [re.sub("PARENT|CE", lambda m: named[m.group()], a) for a in arguments]
    assert main(["compare", *arguments]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert says in line
    assert len(all_runs()) == before


def test_an_experiment_that_cannot_be_looked_into_is_said_to_be_so(store, monkeypatch, capsys):
    """Rather than to hold no experts."""
    deleted = mlflow.create_experiment("deleted")
    MlflowClient().delete_experiment(deleted)
    absent = "987654321"
    undo = f"mlflow experiments restore --experiment-id {deleted}"
    restore = f"is deleted; restore that first ({undo})"
    for variable, value, says in (
        ("MLFLOW_EXPERIMENT_NAME", "deleted", restore),
        ("MLFLOW_EXPERIMENT_ID", deleted, restore),
        ("MLFLOW_EXPERIMENT_NAME", "x", "MLFLOW_EXPERIMENT_NAME=x: not in the store; there are:"),
        ("MLFLOW_EXPERIMENT_ID", absent, f"EXPERIMENT_ID={absent}: not in the store; there are:"),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(variable, value)
            assert main(["compare"]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert says in line


def labels(*names: tuple[str, str, str], knob: str = "tau") -> list[str]:
    described = [(loss, {knob: value} if value else {}, seed) for loss, value, seed in names]
    return distinct_labels(described, [letter * 32 for letter in "abcdef"[: len(names)]])


def test_labels_are_distinct_and_no_longer_than_needed():
    assert labels(("ce", "", "0"), ("logit_adjust", "1", "0")) == ["ce", "logit_adjust"]
    assert labels(("ce", "", "0"), ("ce", "", "1")) == ["ce seed 0", "ce seed 1"]
    same = labels(("ce", "", "0"), ("ce", "", "0"), ("ce", "", "1"))
    assert same == ["ce aaaaaa", "ce bbbbbb", "ce seed 1"]


def test_any_knob_that_tells_experts_apart_is_in_their_labels():
    """Not the seed alone, as if it were what tells them apart."""
    told = labels(("focal", "0.5", "0"), ("focal", "2", "1"), ("ce", "", "0"), knob="gamma")
    assert told == ["focal gamma 0.5", "focal gamma 2", "ce"]


def test_a_family_by_tau_is_labelled_by_it():
    family = [("logit_adjust", tau, "0") for tau in ("0", "1", "2")]
    told = ["logit_adjust tau 0", "logit_adjust tau 1", "logit_adjust tau 2"]
    assert labels(*family) == told
    assert labels(*family, ("ce", "", "0")) == [*told, "ce"]
    twice = labels(*family, ("logit_adjust", "1", "1"), ("logit_adjust", "2", "0"))
    assert twice == [
        "logit_adjust tau 0",
        "logit_adjust tau 1 seed 0",
        "logit_adjust tau 2 cccccc",
        "logit_adjust tau 1 seed 1",
        "logit_adjust tau 2 eeeeee",
    ]


@pytest.mark.parametrize(("loss", "knobs"), [("ce", {}), ("logit_adjust", {"tau": "0.5"})])
def test_only_a_loss_that_has_a_tau_is_labelled_by_it(loss, knobs):
    assert comparison.knobs_of(make_config({"loss": loss, "tau": "0.50"})) == knobs


def test_names_from_elsewhere_cannot_break_out_of_the_page(experts_copy):
    client = MlflowClient()
    client.update_run(experts_copy["ce"], name="<script>alert(1)</script> | **x**\n![](x)")
    assert main(["compare"]) == 0
    run = newest_comparison()
    assert "<script" not in read(run.info.run_id, "index.html")
    text = read(run.info.run_id, "report.md")
    assert r"&lt;script&gt;alert(1)&lt;/script&gt; / \*\*x\*\* \!\[\](x)" in text
    assert "<script" not in run.data.tags["mlflow.note.content"]


def test_every_expert_that_fits_a_comparison_can_be_told_apart():
    looks = {
        (*comparison_figures.marks(n), comparison_figures.line_style(n))
        for n in range(comparison.MOST)
    }
    assert len(looks) == comparison.MOST
    assert len({look[:2] for look in looks}) == comparison.MOST


def test_more_than_can_be_told_apart_is_refused():
    with pytest.raises(RunError, match="as in last=28"):
        comparison.read_members([None] * 29)


# --- a sweep ----------------------------------------------------------------------------------


def test_a_sweep_is_studied_whatever_its_size(store, capsys):
    """As many as would not fit a comparison, and no logits to read."""
    sweep = add_sweep(store)
    for loss, value in (("ce", 0.35), ("logit_adjust", 0.40)):
        for seed in range(comparison.MOST // 2 + 1):
            metrics = {
                "test_balanced/balanced_accuracy": value + seed / 1000,
                "test_balanced/ece": 0.03,
                "temperature": 2.0,
            }
            add_trial(store, sweep, metrics, loss=loss, seed=seed)
    assert main(["compare", "--sweep", sweep, "--run_ids", "none"]) == 0
    run = newest_comparison()
    files = {f.path for f in MlflowClient().list_artifacts(run.info.run_id, "study")}
    names = {"report.md", "table.tex", "table.csv", "runs.csv", "intervals.png", "index.html"}
    assert files == {f"study/{name}" for name in names}
    assert run.data.tags["sweep"] == sweep
    assert run.info.status == "FINISHED"
    note = run.data.tags["mlflow.note.content"].replace("&emsp;", "")
    assert note.startswith("### Accuracy on test_balanced, training noise only")
    assert "| logit_adjust | 15 | 40.70 ± 0.25 |" in note  # t(14) s / sqrt(15), s = sqrt(20) / 10
    assert "| logit_adjust | 15 | +5.00 ± 0.00 |" in note
    assert f"/runs/{run.info.run_id}/artifacts/study/index.html" in note
    path = mlflow.artifacts.download_artifacts(
        run_id=run.info.run_id, artifact_path="study/report.md"
    )
    assert Path(path).read_text() in capsys.readouterr().out


def test_the_parent_of_loss_all_can_be_studied_too(experts_copy):
    assert main(["compare", "--sweep", experts_copy["all"]]) == 0
    run = newest_comparison()
    path = mlflow.artifacts.download_artifacts(run_id=run.info.run_id, artifact_path="study")
    rows = list(csv.DictReader((Path(path) / "runs.csv").open()))
    assert {row["run_id"] for row in rows} == {experts_copy[loss] for loss in LOSSES}
    assert [row["group"] for row in rows] == list(LOSSES)
    for row in rows:
        metrics = MlflowClient().get_run(row["run_id"]).data.metrics
        balanced = "test_balanced/balanced_accuracy"
        assert float(row[f"metrics.{balanced}"]) == metrics[balanced]


def test_a_parent_compared_again_holds_the_ensembles_of_all_its_experts(experts_copy):
    """As one that was resumed after an expert had failed."""
    with start_run("parent", {"stage": "all"}) as parent:
        compare.into(parent, [experts_copy[loss] for loss in LOSSES[:2]])
        of_two = parent.metrics
        compare.into(parent, [experts_copy[loss] for loss in LOSSES])
    of_three = MlflowClient().get_run(experts_copy["all"]).data.metrics
    assert parent.metrics == of_three
    assert of_two.keys() == of_three.keys()
    assert of_two != of_three


def test_a_deployment_that_experts_cannot_have_is_refused_before_a_run_is_started(
    experts_copy, monkeypatch, capsys
):
    monkeypatch.setattr(comparison, "deployment_priors", lambda targets, num_classes: {})
    before = len(all_runs())
    assert main(["compare", "--deployment", "test_lt"]) == 2
    assert "deployment=test_lt" in capsys.readouterr().err
    assert len(all_runs()) == before
