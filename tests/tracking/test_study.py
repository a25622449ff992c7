"""Which trainings a study holds, how it groups and pairs them, and what its tables say."""

import csv
import dataclasses
import io
import json
import re

import numpy as np
import pytest
from fake_trials import add_sweep, add_trial
from hypothesis import given
from hypothesis import strategies as st
from mlflow import MlflowClient
from scipy import stats

from longtail_experts.config import make_config
from longtail_experts.data.batches import derive_seed
from longtail_experts.learning import rules
from longtail_experts.learning.losses import KNOBS_OF, LOSSES, Knobs
from longtail_experts.tracking import study_report
from longtail_experts.tracking.report import SIGNATURE
from longtail_experts.tracking.runs import RunError, start_run
from longtail_experts.tracking.study import (
    KNOBS,
    SPLITS_TOO,
    TRAINING,
    Trial,
    differing_facts,
    differing_settings,
    interval,
    make_study,
    read_study,
)

BALANCED = "test_balanced/balanced_accuracy"
ALL_METRICS = {
    f"test_balanced/{name}": 0.5
    for name in ("accuracy", "head_accuracy", "tail_accuracy", "ece", "ece_uncalibrated", "nll")
}
number = iter(range(10**9))


def trial(value: float = 0.5, *, splits="", tags=None, metrics=None, started=None, **fields):
    config = make_config({"loss": "ce", **fields})
    if config.expert_seed is None:
        config = config.replace(expert_seed=derive_seed(config.seed, config.loss))
    here = next(number)
    return Trial(
        run_id=f"run{here}",
        run_name="",
        started=here if started is None else started,
        fields=config.as_text(),
        metrics={BALANCED: value, **(metrics or {})},
        tags=tags or {},
        splits_sha256=splits or f"splits of {config.split_seed}",
    )


def study(*trials):
    return make_study("a sweep", ["id"], trials)


def labels(*trials) -> list[str]:
    return [group.label for group in study(*trials).groups]


# --- groups -----------------------------------------------------------------------------------


def test_seeds_and_where_it_ran_make_no_group():
    others = [
        trial(seed=1, data_dir="elsewhere", checkpoint_every=3, preflight="false"),
        trial(split_seed=7, precision="bf16", device="cuda", fast="false"),
        trial(expert_seed=5, register_as="name"),
    ]
    found = study(trial(), *others)
    assert [group.label for group in found.groups] == ["ce"]
    assert len(found.groups[0].trials) == 4
    assert found.num_replaced == 0
    assert not differing_settings(found)
    facts = differing_facts(found)
    assert facts["precision"] == {"auto": 3, "bf16": 1}
    assert "data_dir" not in facts


def test_natural_counts_have_no_imbalance_factor():
    natural = {"source": "images", "imbalance_profile": "natural"}
    trials = [trial(imbalance_factor=10, **natural), trial(imbalance_factor=50, seed=1, **natural)]
    (group,) = study(*trials).groups
    assert len(group.trials) == 2


@pytest.mark.parametrize(
    ("differences", "is_marked"),
    [((0.1, 0.11), True), ((1 / 30, 1 / 30), False), ((6e-17, 5e-17), False), ((0.1, -0.1), False)],
)
def test_differences_that_do_not_vary_are_not_marked(differences, is_marked):
    """Two that are the same are so by chance: classes have few images."""
    found = interval({("splits", str(i)): value for i, value in enumerate(differences)}, TRAINING)
    assert study_report.is_apart_from_0(found) is is_marked


@pytest.mark.parametrize(
    ("loss", "name", "values"),
    [
        ("ce", "fused", ("false", "true")),
        ("ce", "batch_size", (64, 128)),
        ("ce", "epochs", (200, 256)),
        ("ce", "lr", (0.1, 0.4)),
        ("logit_adjust", "tau", (1, 2)),
        ("class_balanced", "beta", (0.9, 0.99)),
        ("focal", "gamma", (1, 2)),
        ("ldam_drw", "beta", (0.9, 0.99)),
        ("ldam_drw", "reweight_from", (100, 160)),
    ],
)
def test_trainings_of_other_seeds_and_another_setting_are_two_groups(loss, name, values):
    first, second = values
    trials = [trial(loss=loss, **{name: first}), trial(loss=loss, seed=1, **{name: second})]
    assert labels(*trials) == [f"{loss} {name} {first}", f"{loss} {name} {second}"]
    assert list(differing_settings(study(*trials))) == [name]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"loss": ["ce", "logit_adjust"]}, ["ce", "logit_adjust"]),
        ({"epochs": [2, 10]}, ["ce epochs 2", "ce epochs 10"]),
        (
            {"loss": ["balanced_softmax", "ce"], "imbalance_factor": [100, 10]},
            ["ce IF 10", "balanced_softmax IF 10", "ce IF 100", "balanced_softmax IF 100"],
        ),
        (
            {"loss": ["ce", "logit_adjust"], "tau": [0, 1]},
            ["ce", "logit_adjust tau 0", "logit_adjust tau 1"],
        ),
        ({"tau": [0, 1, 2], "lr": [0.1, 0.4]}, ["ce lr 0.1", "ce lr 0.4"]),
    ],
)
def test_labels_are_the_loss_and_what_differs(settings, told):
    grid = [{}]
    for name, values in settings.items():
        grid = [{**point, name: value} for point in grid for value in values]
    assert labels(*(trial(**point) for point in grid)) == told


def test_a_label_does_not_list_every_field_of_a_recipe():
    recipe = {"epochs": 200, "lr": 0.1, "milestones": "160,180", "shortcut": "pad"}
    found = study(trial(), trial(**recipe))
    assert [group.label for group in found.groups] == ["ce epochs 200", "ce epochs 256"]
    assert set(differing_settings(found)) == set(recipe)


@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "loss": st.sampled_from(["ce", "logit_adjust", "balanced_softmax"]),
                "tau": st.sampled_from([0, 1, 2]),
                "epochs": st.sampled_from([1, 2]),
                "lr": st.sampled_from([0.1, 0.2]),
                "momentum": st.sampled_from([0.5, 0.9]),
                "seed": st.integers(0, 2),
                "split_seed": st.integers(0, 1),
            }
        ),
        min_size=1,
        max_size=12,
    )
)
def test_labels_are_unique_and_no_training_is_lost(points):
    found = study(*(trial(**point) for point in points))
    told = [group.label for group in found.groups]
    assert len(set(told)) == len(told)
    assert len(found.trials) + found.num_replaced == len(points)
    for group in found.groups:
        keys = [t.key for t in group.trials]
        assert len(set(keys)) == len(keys)
        assert {t.loss for t in group.trials} == {group.loss}


def test_of_the_same_training_twice_the_newest_counts():
    found = study(trial(0.9, started=5), trial(0.1, started=9), trial(0.4, started=7))
    assert found.num_replaced == 2
    assert list(found.groups[0].values(BALANCED).values()) == [0.1]
    assert "2 left out" in study_report.summary(found)


def test_numbers_are_in_order_however_they_are_written():
    decays = [0.0005, 0.00005, 0.0001]
    found = study(*(trial(weight_decay=decay) for decay in decays))
    assert [g.settings["weight_decay"] for g in found.groups] == ["5e-05", "0.0001", "0.0005"]


@pytest.mark.parametrize("num_groups", [3, 60])
def test_a_page_opens_with_what_it_is_of_however_many_groups_there_are(
    store, blank_figures, num_groups
):
    trials = [
        trial(seed=seed, source="synthetic", weight_decay=1e-4 * (1 + group), metrics=ALL_METRICS)
        for group in range(num_groups)
        for seed in range(2)
    ]
    found = dataclasses.replace(study(*trials), status="KILLED", unfinished=("a | b",))
    with start_run("a study", {"stage": "compare"}) as run:
        study_report.record_study(run, found)
    page = run.tags["mlflow.note.content"]
    assert page.startswith("**Synthetic images.**")
    assert "[With the figure, on one page](" in page
    assert "The sweep's own run is KILLED." in page
    assert SIGNATURE.search(page)
    html = run.read_text(study_report.PAGE)
    assert "The sweep&#x27;s own run is KILLED." in html
    assert "1 left out, not calibrated: a | b." in html


def test_what_a_grid_compares_is_a_setting_though_it_says_where_a_run_computed():
    """A grid over precision: not the same training twice, of which the newest would count."""
    values = {("ce", "fp32"): 0.3, ("ce", "bf16"): 0.4}
    values |= {("logit_adjust", "fp32"): 0.5, ("logit_adjust", "bf16"): 0.7}
    trials = [
        trial(value, loss=loss, precision=precision, seed=seed, fast=seed == 0)
        for (loss, precision), value in values.items()
        for seed in (0, 1)
    ]
    found = study(*trials)
    assert found.num_replaced == 0
    assert {g.label: set(g.values(BALANCED).values()) for g in found.groups} == {
        f"{loss} precision {precision}": {value} for (loss, precision), value in values.items()
    }
    gains = {g.label: found.differences(g, BALANCED) for g in found.groups}
    assert list(gains["logit_adjust precision fp32"].values()) == pytest.approx([0.2, 0.2])
    assert list(gains["logit_adjust precision bf16"].values()) == pytest.approx([0.3, 0.3])
    assert set(differing_settings(found)) == {"precision"}
    assert set(differing_facts(found)) == {"fast"}  # between seeds, which it does not tell apart


def test_cross_entropy_has_no_tau():
    """The same training at any tau: not two values of one mean."""
    found = study(trial(tau=0), trial(tau=1), trial(seed=1))
    assert found.num_replaced == 1
    assert [len(group.trials) for group in found.groups] == [2]


def test_equal_splits_under_two_split_seeds_are_one_split():
    """As of LDAM's subset, which does not depend on split_seed."""
    found = study(
        trial(0.1, split_seed=1, splits="same"),
        trial(0.2, split_seed=2, splits="same"),
        trial(0.3, split_seed=2, seed=1, splits="same"),
    )
    assert found.num_replaced == 1
    assert found.kinds == (TRAINING,)
    assert sorted(found.groups[0].values(BALANCED).values()) == [0.2, 0.3]


def test_unequal_splits_under_one_split_seed_are_refused():
    first, second = trial(splits="a" * 64), trial(seed=1, splits="b" * 64)
    with pytest.raises(RunError, match="at split_seed 42") as refused:
        study(first, second)
    assert first.run_id in str(refused.value)
    assert second.run_id in str(refused.value)


@pytest.mark.parametrize(
    "other",
    [
        {"protocol": "literature"},
        {"source": "images"},
        {"imbalance_profile": "step"},
        {"imbalance_factor": 10},
        {"images_per_class": 100},
        {"subset_rule": "ldam"},
        {"split_seed": 7},
    ],
)
def test_unequal_splits_of_another_pool_are_another_group(other):
    found = study(trial(splits="a" * 64), trial(seed=1, splits="b" * 64, **other))
    assert len(found.groups) == (1 if "split_seed" in other else 2)


# --- intervals and pairs ----------------------------------------------------------------------


def test_seeds_on_one_split_give_training_noise_only():
    values = [0.38, 0.39, 0.41, 0.40]
    found = study(*(trial(v, seed=i) for i, v in enumerate(values)))
    assert found.kinds == (TRAINING,)
    of_group = interval(found.groups[0].values(BALANCED), TRAINING)
    expected = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    assert (of_group.low, of_group.high) == pytest.approx(expected)


def test_where_splits_vary_both_intervals_are_told():
    table = {(s, k): 0.4 + 0.02 * k + 0.001 * s**2 for s in range(3) for k in range(4)}
    found = study(*(trial(v, seed=s, split_seed=k) for (s, k), v in table.items()))
    assert found.kinds == (TRAINING, SPLITS_TOO)
    values = found.groups[0].values(BALANCED)
    means = [np.mean([table[s, k] for s in range(3)]) for k in range(4)]
    expected = stats.t.interval(0.95, 3, np.mean(means), stats.sem(means))
    over = interval(values, SPLITS_TOO)
    assert (over.low, over.high) == pytest.approx(expected)
    assert (over.n, over.num_groups) == (12, 4)
    assert interval(values, TRAINING).half_width < over.half_width / 5


def test_one_seed_a_split_cannot_tell_training_noise():
    assert study(trial(split_seed=1), trial(split_seed=2)).kinds == (SPLITS_TOO,)


def test_differences_pair_by_seed_and_splits_under_the_same_settings():
    ce = {
        (s, k, e): 0.3 + 0.1 * s + 0.01 * k + e / 1000
        for s in (0, 1)
        for k in (0, 1)
        for e in (2, 3)
    }
    trials = [trial(v, seed=s, split_seed=k, epochs=e) for (s, k, e), v in ce.items()]
    gains = {}
    for (s, k, e), v in reversed(ce.items()):
        gains[f"splits of {k}", str(s), str(e)] = 0.01 * (s + 2 * k) + e / 100
        trials.append(
            trial(
                v + 0.01 * (s + 2 * k) + e / 100,
                loss="logit_adjust",
                tau=2,
                seed=s,
                split_seed=k,
                epochs=e,
            )
        )
    trials.append(trial(0.9, loss="logit_adjust", tau=2, seed=9, split_seed=0, epochs=2))
    found = study(*trials)
    for group in found.groups:
        differences = found.differences(group, BALANCED)
        if group.loss == "ce":
            assert not differences
            assert found.reference_of(group) is None
            continue
        e = group.settings["epochs"]
        assert differences == pytest.approx(
            {(k, s): g for (k, s, of), g in gains.items() if of == e}
        )


def test_without_cross_entropy_under_the_same_settings_there_is_no_difference():
    found = study(trial(epochs=2), trial(loss="balanced_softmax", epochs=3))
    assert all(not found.differences(group, BALANCED) for group in found.groups)


def test_an_explicit_expert_seed_is_a_seed_of_its_own():
    found = study(trial(0.1), trial(0.2, expert_seed=7), trial(0.3, expert_seed=8))
    assert found.num_replaced == 0
    assert interval(found.groups[0].values(BALANCED), TRAINING).n == 3


# --- tables -----------------------------------------------------------------------------------


def cells(sections, title: str, row: str) -> dict[str, str]:
    (section,) = [s for s in sections if s.title == title]
    (found,) = [r for r in section.rows if r.name == row]
    return dict(zip(section.header[1:], found.cells, strict=True))


def losses_over_seeds(**more):
    random = np.random.RandomState(0)
    for loss, mean in (("ce", 0.35), ("logit_adjust", 0.42)):
        for seed in range(4):
            values = {
                "test_balanced/head_accuracy": mean + 0.1,
                "test_balanced/nll": 2.5,
                "test_balanced/nll_uncalibrated": 3.5,
                "temperature": 2 + 0.1 * seed,
            }
            value = mean + 0.01 * random.randn()
            yield trial(value, loss=loss, seed=seed, metrics=values, **more)


def test_the_tables_hold_mean_interval_and_n():
    found = study(*losses_over_seeds())
    sections = study_report.sections_of(found)
    values = list(found.groups[1].values(BALANCED).values())
    half = stats.t.ppf(0.975, 3) * stats.sem(values)
    row = cells(sections, f"Accuracy on test_balanced, {TRAINING}", "logit_adjust")
    assert row["balanced"] == f"{100 * np.mean(values):.2f} ± {100 * half:.2f}"
    assert row["n"] == "4"
    assert "tail" not in row  # no run recorded it
    row = cells(sections, f"Calibration on test_balanced, {TRAINING}", "ce")
    assert row["NLL, T = 1"] == "3.500 ± 0.000"
    assert row["T"].startswith("2.150 ± ")
    ce = found.groups[0].values(BALANCED)
    gains = [values[i] - value for i, value in enumerate(ce.values())]
    half = stats.t.ppf(0.975, 3) * stats.sem(gains)
    title = f"Accuracy on test_balanced: paired differences from ce, {TRAINING}"
    row = cells(sections, title, "logit_adjust")
    assert row["balanced"] == f"{100 * np.mean(gains):+.2f} ± {100 * half:.2f}"
    assert "training noise only" in next(s.words for s in sections)
    assert not any("test_lt" in s.title for s in sections)


@pytest.mark.parametrize("split", ["test_balanced", "test_lt"])
def test_every_figure_of_a_split_stands_in_its_column(split):
    recorded = {
        "accuracy": 0.01,
        "balanced_accuracy": 0.02,
        "head_accuracy": 0.03,
        "tail_accuracy": 0.04,
        "many_accuracy": 0.05,
        "medium_accuracy": 0.06,
        "few_accuracy": 0.07,
        "adjusted_accuracy": 0.08,
        "adjusted_balanced_accuracy": 0.09,
        "nll_uncalibrated": 3.1,
        "nll": 2.9,
        "ece_uncalibrated": 0.11,
        "ece": 0.12,
    }
    metrics = {f"{split}/{name}": value for name, value in recorded.items()}
    sections = study_report.sections_of(study(trial(metrics=metrics | {"temperature": 2.5})))
    assert cells(sections, f"Accuracy on {split}, {TRAINING}", "ce") == {
        "n": "1",
        "balanced": "2.00",
        "head": "3.00",
        "tail": "4.00",
        "many": "5.00",
        "medium": "6.00",
        "few": "7.00",
        "overall": "1.00",
        "adjusted balanced": "9.00",
    }
    found = cells(sections, f"Calibration on {split}, {TRAINING}", "ce")
    assert found.pop("T", None) == ("2.500" if split == "test_balanced" else None)
    assert found == {
        "n": "1",
        "NLL, T = 1": "3.100",
        "NLL, calibrated": "2.900",
        "ECE %, T = 1": "11.00",
        "ECE %, calibrated": "12.00",
    }


def test_the_picture_holds_the_figures_and_in_its_differences_the_gains(monkeypatch, tmp_path):
    figures = {"balanced": 0.01, "head": 0.02, "tail": 0.05}  # a seed more
    trials = [
        trial(
            loss=loss,
            seed=seed,
            metrics={
                f"test_balanced/{group}_accuracy": start + seed * step + (loss != "ce") * 2 * step
                for group, step in figures.items()
            }
            | {"temperature": start + seed, "test_balanced/ece": 0.03},
        )
        for loss, start in (("ce", 0.3), ("logit_adjust", 0.4))
        for seed in (0, 1)
    ]
    drawn = []
    monkeypatch.setattr(study_report.study_figures, "intervals", lambda *given: drawn.append(given))
    study_report.draw(study(*trials), "a study", tmp_path / "intervals.png")
    ((groups, panels, *_),) = drawn
    assert groups == ["ce", "logit_adjust"]
    expected = {
        f"{group} accuracy, %": ([30, 30 + 100 * step], [40 + 200 * step, 40 + 300 * step])
        for group, step in figures.items()
    }
    for group, step in figures.items():
        gain = 10 + 200 * step
        expected[f"{group}: paired difference from ce, points"] = ([], [gain, gain])
    expected["temperature"] = ([0.3, 1.3], [0.4, 1.4])
    expected["ECE calibrated, %"] = ([3, 3], [3, 3])
    assert [panel.title for panel in panels] == list(expected)
    for panel, of_groups in zip(panels, expected.values(), strict=True):
        for (values, by_kind), told in zip(panel.rows, of_groups, strict=True):
            assert values == pytest.approx(told)
            mean = by_kind[TRAINING].mean if told else by_kind[TRAINING]
            assert mean == (pytest.approx(np.mean(told)) if told else None)


def test_a_difference_is_marked_where_its_interval_does_not_hold_zero():
    gains = {"balanced_softmax": (0.1, 0.11), "logit_adjust": (-0.1, 0.11)}
    trials = [trial(0.5, seed=s) for s in (0, 1)]
    trials += [
        trial(0.5 + g, loss=loss, seed=s) for loss in gains for s, g in enumerate(gains[loss])
    ]
    sections = study_report.sections_of(study(*trials))
    (section,) = [s for s in sections if "paired" in s.title]
    assert {r.name: r.best for r in section.rows} == {
        "balanced_softmax": {1},
        "logit_adjust": set(),
    }


def test_one_training_has_no_interval():
    sections = study_report.sections_of(study(trial(0.3), trial(0.4, loss="logit_adjust")))
    row = cells(sections, f"Accuracy on test_balanced, {TRAINING}", "ce")
    assert row == {"n": "1", "balanced": "30.00"}
    row = cells(
        sections,
        f"Accuracy on test_balanced: paired differences from ce, {TRAINING}",
        "logit_adjust",
    )
    assert row["balanced"] == "+10.00"


def test_a_temperature_at_the_bound_of_its_search_says_so():
    bound = {"temperature": 54.6, "temperature_at_bound": 1.0}
    inside = {"temperature": 2.0, "temperature_at_bound": 0.0}
    trials = [trial(seed=s, metrics=inside) for s in range(3)]
    trials += [trial(seed=s, loss="focal", metrics=m) for s, m in enumerate((bound, inside, bound))]
    sections = study_report.sections_of(study(*trials))
    told = [
        s.title
        for s in sections
        if "bound of its search, and no estimate: focal 2 of 3." in s.words
    ]
    assert [title.split(",")[0] for title in told] == [
        "Calibration on test_balanced",
        "Calibration on test_balanced: paired differences from ce",
    ]
    assert not any("bound" in s.words for s in study_report.sections_of(study(*trials[:3])))
    half = {"temperature": 2.0, "temperature_at_bound": 1.0, "temperature_half_0": 0.0183}
    halves = study_report.sections_of(study(trial(metrics=half), trial(seed=1, metrics=inside)))
    words = " ".join(section.words for section in halves)
    assert "T of a half of the test images at the bound of its search, and no" in words
    assert " T at the bound" not in words


def test_that_nothing_differs_is_said_of_what_is_recorded_alone():
    here = {"processor": "one", "torch": "2", "mlflow.user": "me"}
    *_, last = study_report.sections_of(study(trial(tags=here), trial(seed=1, tags=here)))
    assert "nothing of what the runs record of themselves (checkpoint_every, " in last.words
    assert "processor" in last.words
    assert "user" not in last.words
    elsewhere = trial(seed=1, tags=here | {"processor": "other"})
    *_, last = study_report.sections_of(study(trial(tags=here), elsewhere))
    assert last.words.endswith("in brackets: processor: one (1), other (1).")


def test_a_figure_that_some_runs_lack_says_its_own_n():
    missing = trial(0.5, seed=2)
    missing = Trial(**{**missing.__dict__, "metrics": {"test_balanced/accuracy": 0.6}})
    also = {"test_balanced/accuracy": 0.5}
    found = study(trial(0.3, metrics=also), trial(0.4, seed=1, metrics=also), missing)
    title = f"Accuracy on test_balanced, {TRAINING}"
    row = cells(study_report.sections_of(found), title, "ce")
    assert row["n"] == "3"
    assert row["balanced"].endswith("(n = 2)")
    assert "(n" not in row["overall"]


def test_what_is_approximate_says_so():
    assert "Approximate" not in study_report.how_to_read(study(trial(), trial(loss="logit_adjust")))
    told = study_report.how_to_read(study(trial(), trial(loss="focal"), trial(loss="ldam_drw")))
    assert "the logits of focal, ldam_drw a log-posterior" in told


def test_a_knob_counts_only_under_the_losses_that_have_it():
    swept = [trial(loss=loss, gamma=g) for loss in ("ce", "focal") for g in (1, 2)]
    assert labels(*swept) == ["ce", "focal gamma 1", "focal gamma 2"]
    found = study(*swept)
    assert found.num_replaced == 1
    assert [found.reference_of(group) is not None for group in found.groups] == [False, True, True]


def test_every_loss_says_which_knobs_it_has():
    assert set(KNOBS_OF) == set(LOSSES)
    assert set(KNOBS) == set(Knobs._fields) | {"reweight_from"}
    used_by = {"beta": {"class_balanced", "ldam_drw"}, "gamma": {"focal"}}
    for name, losses in used_by.items():
        assert {n for n in LOSSES if rules.knob_rule(name, 0.5, 0.9, n).verdict == "ok"} == losses


def test_latex_is_balanced_and_escaped():
    text = study_report.as_latex(study_report.sections_of(study(*losses_over_seeds())))
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") >= 3
    assert text.count(r"\toprule") == text.count(r"\bottomrule") == text.count(r"\midrule")
    assert not re.search(r"(?<!\\)[_#]", text)
    assert re.sub(r"\\[{}]", "", text).count("{") == re.sub(r"\\[{}]", "", text).count("}")
    for block in text.split(r"\begin{tabular}")[1:]:
        columns = len(re.match(r"\{(\w+)\}", block).group(1))
        lines = [line for line in block.splitlines() if line.endswith(r"\\")]
        assert len(lines) >= 2
        assert {len(re.findall(r"(?<!\\)&", line)) + 1 for line in lines} == {columns}
    assert r"logit\_adjust" in text
    assert r"$\pm$" in text


def test_csv_has_the_intervals_in_full():
    found = study(*losses_over_seeds())
    rows = list(csv.DictReader(io.StringIO(study_report.as_csv(found))))
    (row,) = [
        r
        for r in rows
        if (r["what"], r["group"], r["metric"]) == ("value", "logit_adjust", BALANCED)
    ]
    expected = interval(found.groups[1].values(BALANCED), TRAINING)
    assert [float(row[name]) for name in ("mean", "low", "high")] == list(expected[:3])
    assert (row["n"], row["splits"], row["interval"]) == ("4", "1", TRAINING)
    assert {r["group"] for r in rows if r["what"] == "difference from ce"} == {"logit_adjust"}
    single = list(csv.DictReader(io.StringIO(study_report.as_csv(study(trial(0.3))))))
    assert [(r["mean"], r["low"], r["high"]) for r in single] == [("0.3", "", "")]
    runs = list(csv.DictReader(io.StringIO(study_report.runs_as_csv(found))))
    assert {r["run_id"]: float(r[f"metrics.{BALANCED}"]) for r in runs} == {
        t.run_id: t.metrics[BALANCED] for t in found.trials
    }


# --- the store --------------------------------------------------------------------------------


def test_a_sweep_is_read_from_the_store(store):
    sweep = add_sweep(store)
    mine = [add_trial(store, sweep, {BALANCED: 0.3}, seed=seed) for seed in (0, 1)]
    add_trial(store, add_sweep(store), {BALANCED: 0.9}, seed=2)
    add_trial(store, sweep, {}, seed=3, tags={"calibrated": None})
    found = read_study(sweep)
    assert sorted(t.run_id for t in found.trials) == sorted(mine)
    assert found.unfinished == ("ce seed 3 (FINISHED)",)
    assert "1 left out, not calibrated: ce seed 3 (FINISHED)" in study_report.summary(found)
    assert found.name == "sweep of losses"
    again = add_trial(store, sweep, {}, seed=3, lr=9, tags={"calibrated": None})
    assert f"ce seed 3 {again[:6]} (FINISHED)" in read_study(sweep).unfinished


def test_what_was_deleted_is_in_no_mean(store):
    """Though trials.json still names it; nor is it an error where nothing is left of it."""
    sweep = add_sweep(store)
    ids = [add_trial(store, sweep, {BALANCED: 0.3 + s / 10}, seed=s) for s in range(3)]
    trials = [{"run_id": run_id, "state": "finished"} for run_id in [*ids, "f" * 32]]
    client = MlflowClient()
    client.log_text(sweep, json.dumps(trials), "trials.json")
    client.delete_run(ids[1])
    found = read_study(sweep)
    assert sorted(found.groups[0].values(BALANCED).values()) == pytest.approx([0.3, 0.5])
    assert f"2 left out, deleted: ce seed 1, {'f' * 32}." in study_report.summary(found)


def test_a_sweep_that_was_cut_off_says_what_never_ran(store):
    sweep = add_sweep(store)
    mine = add_trial(store, sweep, {BALANCED: 0.3})
    assert "sweep" not in study_report.summary(read_study(sweep))
    states = {"finished": mine, "waiting": None, "failed": None}
    trials = [{"run_id": run_id, "state": state} for state, run_id in states.items()]
    MlflowClient().log_text(sweep, json.dumps([*trials, trials[1]]), "trials.json")
    MlflowClient().set_terminated(sweep, "KILLED")
    told = study_report.summary(read_study(sweep))
    assert "1 trainings in 1 groups" in told
    assert "Trials of the sweep that have no run: 2 waiting, 1 failed." in told
    assert told.endswith("The sweep's own run is KILLED.")


def test_fields_of_another_version_are_kept_and_told_apart(store):
    """protocol and whatever comes later, whether or not Config knows it."""
    sweep = add_sweep(store)
    add_trial(store, sweep, {BALANCED: 0.3})
    literature = {"protocol": "literature", "subset_rule": "ldam"}
    add_trial(store, sweep, {BALANCED: 0.4}, splits="l" * 64, extra=literature)
    add_trial(store, sweep, {BALANCED: 0.5}, extra={"of_tomorrow": [1, 2]})
    assert [group.label for group in read_study(sweep).groups] == [
        "ce protocol experts",
        "ce protocol experts, of_tomorrow 1,2",
        "ce protocol literature",
    ]


@pytest.mark.parametrize("what", ["nothing", "unknown"])
def test_what_is_no_sweep_is_refused(store, what):
    sweep = add_sweep(store) if what == "nothing" else "0" * 32
    with pytest.raises(RunError, match=r"none of its 0 child runs|not found in the store"):
        read_study(sweep)
