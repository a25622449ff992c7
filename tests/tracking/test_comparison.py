"""What a comparison says of experts, cell by cell, from members made by hand."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, logsumexp, softmax

from longtail_experts.config import Config
from longtail_experts.learning.evaluation import evaluate_scores
from longtail_experts.learning.metrics import reliability
from longtail_experts.tracking import comparison, comparison_figures, comparison_report
from longtail_experts.tracking.comparison import Member, Together
from longtail_experts.tracking.logits import ExpertLogits, SplitLogits
from longtail_experts.tracking.runs import RunError

POOL_COUNTS = (400, 150, 60, 20, 15)
GROUPS = {
    "balanced": [0, 1, 2, 3, 4],
    "head": [0, 1, 2],
    "tail": [3, 4],
    "many": [0, 1],
    "medium": [2, 3],
    "few": [4],
}
TEST_COUNTS = {"test_balanced": [12] * 5, "test_lt": [40, 20, 10, 5, 3]}
EXPERT_ROWS = (
    ("accuracy, %", "accuracy", 100, 2, np.argmax),
    *((f"{group}, %", f"{group}_accuracy", 100, 2, np.argmax) for group in GROUPS),
    ("adjusted accuracy, %", "adjusted_accuracy", 100, 2, np.argmax),
    ("adjusted balanced accuracy, %", "adjusted_balanced_accuracy", 100, 2, np.argmax),
    ("NLL, nats, at T = 1", "nll_uncalibrated", 1, 4, np.argmin),
    ("NLL, nats, calibrated", "nll", 1, 4, np.argmin),
    ("ECE, %, at T = 1", "ece_uncalibrated", 100, 2, np.argmin),
    ("ECE, %, calibrated", "ece", 100, 2, np.argmin),
)
ENSEMBLE_ROWS = (
    *EXPERT_ROWS[:7],
    ("NLL, nats", "nll", 1, 4, np.argmin),
    ("Brier", "brier", 1, 4, np.argmin),
    ("ECE, %", "ece", 100, 2, np.argmin),
)


def member(number: int, **metrics: float) -> Member:
    """Every metric of it is another value."""
    random = np.random.RandomState(number)
    splits = {}
    for split, counts in TEST_COUNTS.items():
        targets = np.repeat(np.arange(5), counts)
        logits = random.randn(len(targets), 5) + 1.5 * np.eye(5)[targets]
        splits[split] = SplitLogits(logits.astype(np.float32), targets, np.arange(len(targets)))
    keys = [f"{split}/{row[1]}" for split in TEST_COUNTS for row in EXPERT_ROWS]
    return Member(
        label=f"expert {number}",
        run_id=str(number) * 32,
        run_name="",
        loss="ce",
        metrics=dict(zip(keys, random.rand(len(keys)), strict=True)) | metrics,
        facts={},
        splits_sha256="s" * 64,
        pool_counts=POOL_COUNTS,
        seconds=600.0 * number,
        training_seconds=90.0 * number,
        expert=ExpertLogits(
            run_id=str(number) * 32,
            splits=splits,
            temperature=1 + number / 4,
            tau=0.0,
            log_offset=random.randn(5),
            prior=np.array(POOL_COUNTS) / sum(POOL_COUNTS),
            class_names=tuple("abcde"),
        ),
    )


INTERVAL = {"temperature_low": 1.1, "temperature_high": 1.9}
MEMBERS = [
    member(1, **INTERVAL),
    member(2),
    member(3, **INTERVAL, temperature_at_bound=1.0),
]


def standard_error(predictions: np.ndarray, targets: np.ndarray, classes: list[int]) -> float:
    """Of a mean of recalls, each with Laplace's rule of succession."""
    variance = 0.0
    for c in classes:
        right = predictions[targets == c] == c
        p = (right.sum() + 1) / (len(right) + 2)
        variance += p * (1 - p) / len(right)
    return variance**0.5 / len(classes)


def expected_row(row, values, prefix, errors):
    """(name, cells, best); errors: by group, one a column."""
    name, _, scale, digits, best_of = row
    cells = [f"{scale * value:.{digits}f}" for value in values]
    best = {i for i, cell in enumerate(cells) if cell == cells[best_of(values)]}
    group = name.removesuffix(", %")
    if group in errors:
        cells = [f"{c} ± {100 * e:.2f}" for c, e in zip(cells, errors[group], strict=True)]
    return prefix + name, cells, best


def scores_under(expert: ExpertLogits, split: str, q: np.ndarray, temperature: float):
    f = expert.splits[split].logits.astype(np.float64)
    scores = f / temperature + expert.log_offset + np.log(q) - np.log(expert.prior)
    return log_softmax(scores, axis=1)


def deployment_prior(deployment: str) -> np.ndarray:
    counts = TEST_COUNTS["test_balanced" if deployment == "uniform" else deployment]
    return np.array(counts) / sum(counts)


def test_how_long_an_expert_took_that_has_not_ended_is_not_said():
    members = [dataclasses.replace(MEMBERS[0], seconds=float("nan")), *MEMBERS[1:]]
    (row,) = (r for r in comparison_report.expert_rows(members) if r.name.startswith("wall time"))
    assert row.cells == ["-", "20.0", "30.0"]


def test_every_cell_of_the_experts_table_is_what_the_runs_recorded():
    expected = []
    for split in TEST_COUNTS:
        of_each = [m.expert.splits[split] for m in MEMBERS]
        errors = {
            group: [standard_error(s.logits.argmax(1), s.targets, classes) for s in of_each]
            for group, classes in GROUPS.items()
        }
        for row in EXPERT_ROWS:
            values = [m.metrics[f"{split}/{row[1]}"] for m in MEMBERS]
            expected.append(expected_row(row, values, f"{split}: ", errors))
    temperatures = [
        "1.250 (1.100 to 1.900)",
        "1.500",
        "1.750 (1.100 to 1.900) at the bound of the search",
    ]
    expected += [
        ("T (95 % interval)", temperatures, set()),
        ("wall time of the run, pauses and all, minutes", ["10.0", "20.0", "30.0"], set()),
        ("of which training steps", ["1.5", "3.0", "4.5"], set()),
    ]
    assert comparison_report.expert_rows(MEMBERS) == expected


@pytest.mark.parametrize("deployment", ["uniform", "test_lt"])
def test_every_cell_of_the_ensemble_table_follows_from_the_scores(deployment):
    split, q = comparison.DEPLOYMENTS[deployment], deployment_prior(deployment)
    logs = np.stack([scores_under(m.expert, split, q, m.expert.temperature) for m in MEMBERS])
    columns = [*logs, logsumexp(logs, axis=0) - np.log(3), log_softmax(logs.mean(0), axis=1)]
    targets = np.repeat(np.arange(5), TEST_COUNTS[split])
    masks = {group: torch.tensor(np.isin(range(5), of)) for group, of in GROUPS.items()}
    metrics = [evaluate_scores(*map(torch.tensor, (s, targets)), masks) for s in columns]
    errors = {
        group: [standard_error(s.argmax(1), targets, classes) for s in columns]
        for group, classes in GROUPS.items()
    }
    expected = [
        expected_row(row, [m[row[1]] for m in metrics], "", errors) for row in ENSEMBLE_ROWS
    ]
    found = comparison.together(MEMBERS, deployment)
    assert found.labels[3:] == ["mean of probabilities", "product of experts"]
    assert comparison_report.ensemble_rows(found) == expected


def test_points_of_the_plane_are_head_then_tail_and_the_diagonals_those_of_the_head(
    monkeypatch, tmp_path
):
    accuracies = {
        f"expert {n}": {"head_accuracy": n / 10, "tail_accuracy": n / 100} for n in (1, 2, 3)
    } | {
        "mean of probabilities": {"head_accuracy": 0.6, "tail_accuracy": 0.3},
        "product of experts": {"head_accuracy": 0.61},
    }
    found = Together("uniform", "test_balanced", list(accuracies), accuracies, {}, None, None)
    argmax = {
        m.label: tuple(m.metrics[f"test_balanced/{g}_accuracy"] for g in ("head", "tail"))
        for m in MEMBERS
    }
    plane, stars, title = comparison_report.head_tail_points(MEMBERS, found)
    assert plane == {
        "expert 1": [argmax["expert 1"], (1 / 10, 1 / 100)],
        "expert 2": [argmax["expert 2"], (2 / 10, 2 / 100)],
        "expert 3": [argmax["expert 3"], (3 / 10, 3 / 100)],
    }
    assert stars == {"mean of probabilities": (0.6, 0.3)}
    assert "uniform" in title
    elsewhere = dataclasses.replace(found, deployment="test_lt", split="test_lt")
    alone = {label: [point] for label, point in argmax.items()}
    assert comparison_report.head_tail_points(MEMBERS, elsewhere)[:2] == (alone, {})

    drawn = []
    for name in ("per_class", "posthoc"):
        monkeypatch.setattr(comparison_figures, name, lambda *_: None)
    monkeypatch.setattr(comparison_figures, "head_tail_plane", lambda *given: drawn.append(given))
    comparison_report.pictures(MEMBERS, None, {}, tmp_path)
    assert [given[:3] for given in drawn] == [(alone, {}, 0.6)]
    first, drawn[:] = MEMBERS[0], []
    there = first.expert.splits["test_balanced"].targets != 4  # no image of one tail class
    some = SplitLogits(
        *(a[there] for a in dataclasses.astuple(first.expert.splits["test_balanced"]))
    )
    splits = {**first.expert.splits, "test_balanced": some}
    one = dataclasses.replace(first, expert=dataclasses.replace(first.expert, splits=splits))
    comparison_report.pictures([one], None, {}, tmp_path)
    assert [given[2] for given in drawn] == [0.75]


@pytest.mark.parametrize("deployment", ["uniform", "test_lt"])
def test_reliability_is_that_of_probabilities_at_one_and_at_the_temperature(deployment):
    split, q = comparison.DEPLOYMENTS[deployment], deployment_prior(deployment)
    panels = comparison.reliability_panels(MEMBERS, deployment)
    assert list(panels) == [f"expert {n} on {split}" for n in (1, 2, 3)]
    for one, panel in zip(MEMBERS, panels.values(), strict=True):
        own = one.expert.temperature
        bound = " (bound)" if one is MEMBERS[2] else ""
        assert list(panel) == ["T = 1", f"T = {own:.2f}{bound}"]
        for bins, temperature in zip(panel.values(), (1.0, own), strict=True):
            probabilities = softmax(scores_under(one.expert, split, q, temperature), axis=1)
            targets = torch.tensor(one.expert.splits[split].targets)
            assert bins == pytest.approx(reliability(torch.tensor(probabilities), targets))


def test_what_is_cross_fitted_or_approximate_is_said_to_be():
    halves = {"temperature_half_0": 2.0, "temperature_half_1": 4.0}
    facts = {"protocol": "literature", "split_seed": "0"}
    one = dataclasses.replace(member(4, **halves), facts=facts, loss="focal")
    assert comparison.name_of_temperature(one, "test_balanced") == "T cross-fitted"
    for members, says in ((MEMBERS, False), ([*MEMBERS, one], True)):
        words = comparison_report.how_to_read(members, None)
        assert ("each used on the other" in words) is says
        assert ("no constant makes the logits of focal a log-posterior" in words) is says


def test_nothing_is_the_best_across_different_images():
    marked = comparison_report.expert_rows(MEMBERS)
    assert any(row.best for row in marked)
    plain = comparison_report.expert_rows(MEMBERS, marks=False)
    assert not any(row.best for row in plain)
    assert [(r.name, r.cells) for r in plain] == [(r.name, r.cells) for r in marked]
    together = comparison.together(MEMBERS, "uniform")
    for result, is_marked in ((together, True), (None, False)):
        experts = comparison_report.described(MEMBERS, result, {})[0]
        assert any(row.best for row in experts.rows) is is_marked
        assert ("The best of a row is marked." in experts.words) is is_marked


def test_other_targets_under_the_same_hash_are_refused():
    first, second = MEMBERS[:2]
    assert comparison.require_comparable([first, second], different_splits=False)
    of_lt = second.expert.splits["test_lt"]
    altered = dataclasses.replace(of_lt, targets=of_lt.targets[::-1])
    splits = {**second.expert.splits, "test_lt": altered}
    expert = dataclasses.replace(second.expert, splits=splits)
    with pytest.raises(RunError, match="test_lt has other targets than in 1111"):
        comparison.require_comparable(
            [first, dataclasses.replace(second, expert=expert)], different_splits=False
        )


def test_any_setting_can_be_what_differs_but_those_that_explain_nothing():
    names = [*Config.model_fields, "processor", "git.commit", "code_sha256"]
    nothing = {"loss", "data_dir", "preflight", "register_as"}
    knobs = {"tau", "beta", "gamma", "reweight_from"}
    first, second = (
        dataclasses.replace(m, loss="ce", facts=dict.fromkeys(names, value))
        for m, value in zip(MEMBERS[:2], "ab", strict=True)
    )
    expected = {name: ["a", "b"] for name in names if name not in nothing | knobs}
    assert comparison.differences([first, second]) == expected
    assert comparison.differences([first, first]) == {}


def test_a_knob_differs_among_losses_that_look_at_it():
    losses = ("ce", "logit_adjust", "logit_adjust")
    of = [
        dataclasses.replace(MEMBERS[0], loss=loss, facts={"tau": tau, "gamma": tau})
        for loss, tau in zip(losses, ("1", "1", "1.5"), strict=True)
    ]
    assert comparison.differences(of) == {"tau": ["-", "1", "1.5"]}
    assert comparison.differences(of[:2]) == {}
    assert comparison.differences([of[0], of[2]]) == {"tau": ["-", "1.5"]}  # not its default
    assert comparison.differences([of[2], of[2]]) == {}


def test_code_and_machine_of_every_part_of_a_run_are_told():
    tags = {"device": "cpu", "code_sha256": 64 * "a", "host": "x", "expert": "ce"}
    later = {"resumed": "1", "resumed.git.commit": "c", "calibrated.device": "cuda"}
    later["calibrated.code_sha256"] = 64 * "b"
    expected = {"device": "cpu", "code_sha256": 64 * "a", **later}
    assert comparison.where_trained(tags | later) == expected


def test_pairs_are_held_against_each_other_by_their_predictions():
    found = comparison.together(MEMBERS, "uniform")
    targets = np.repeat(np.arange(5), TEST_COUNTS["test_balanced"])
    uniform = torch.full((5,), 0.2, dtype=torch.float64)
    predicted = [m.scores("test_balanced", uniform).argmax(1).numpy() for m in MEMBERS]
    for i, ours in enumerate(predicted):
        for j, theirs in enumerate(predicted):
            wrong, also_wrong = ours != targets, theirs != targets
            overlap = (wrong & also_wrong).sum() / (wrong | also_wrong).sum()
            assert found.disagreement[i, j] == pytest.approx(np.mean(ours != theirs))
            assert found.error_overlap[i, j] == pytest.approx(overlap)


def test_the_best_cell_of_a_row_is_marked_and_no_other():
    row = comparison_report.Row("measure", ["1", "2", "3"], {1})
    page = comparison_report.as_html(("", "a", "b", "c"), [row])
    assert "<td>1</td><td class=best>2</td><td>3</td>" in page
