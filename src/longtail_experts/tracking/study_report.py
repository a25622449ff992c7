"""A study in words, as Markdown, LaTeX and CSV, on one HTML page, and as a picture."""

import csv
import io
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from longtail_experts.learning.statistics import Interval
from longtail_experts.tracking import report, study_figures
from longtail_experts.tracking.comparison_report import (
    Picture,
    Row,
    Section,
    html_page,
    markdown,
    plain,
)
from longtail_experts.tracking.experts import SYNTHETIC_NOTICE
from longtail_experts.tracking.identity import shortened
from longtail_experts.tracking.runs import Run, link_to_artifact
from longtail_experts.tracking.study import (
    REFERENCE,
    SPLITS_TOO,
    TRAINING,
    Group,
    Key,
    Study,
    differing_facts,
    differing_settings,
    interval,
    names_of_facts,
)
from longtail_experts.tracking.study_figures import count

FOLDER = "study"
PAGE, PICTURE = f"{FOLDER}/index.html", "intervals.png"
INTERVAL = {
    TRAINING: "Mean ± half of the 95 % interval over seeds on these splits: training noise only.",
    SPLITS_TOO: "Mean ± half of the 95 % interval over splits, each with the mean of its seeds.",
}
HOW_TO_READ = {
    TRAINING: "Training noise only: by Student's t over seeds on the splits at hand (pooled over "
    "splits where there are several). It says nothing about what other splits would give.",
    SPLITS_TOO: "Splits and training: by Student's t over splits, the mean of each split being one "
    "value; what other splits and other seeds would give.",
}
PAIRED = (
    f"Paired differences: of each training, its figure less that of {REFERENCE} with the same seed "
    "on the same splits under the same settings. Marked where they vary and the interval does not "
    "hold 0, with no allowance for how many there are. Losses draw independently from a seed "
    "(expert_seed), so that pairs share their splits alone: on one split the interval is a valid "
    "one, but which trainings are paired is arbitrary, and one without pairs may be narrower."
)
MEASURED = (
    "Accuracies are in percent, of argmax f: means over classes, overall: over images; adjusted is "
    "of the calibrated scores under the split's own deployment prior, as are NLL (nats) and ECE "
    "(15 bins) at T = 1 and calibrated. One training has no interval; one of two or three may "
    "reach beyond what is possible, which says that there are too few."
)


class Measure(NamedTuple):
    metric: str
    label: str
    scale: float = 100.0
    digits: int = 2


def accuracies_on(split: str) -> list[Measure]:
    names = [
        ("balanced_accuracy", "balanced"),
        *((f"{group}_accuracy", group) for group in ("head", "tail", "many", "medium", "few")),
        ("accuracy", "overall"),
        ("adjusted_balanced_accuracy", "adjusted balanced"),
    ]
    return [Measure(f"{split}/{metric}", label) for metric, label in names]


def calibration_on(split: str) -> list[Measure]:
    temperature = [Measure("temperature", "T", 1.0, 3)] if split == "test_balanced" else []
    return [
        *temperature,
        Measure(f"{split}/nll_uncalibrated", "NLL, T = 1", 1.0, 3),
        Measure(f"{split}/nll", "NLL, calibrated", 1.0, 3),
        Measure(f"{split}/ece_uncalibrated", "ECE %, T = 1"),
        Measure(f"{split}/ece", "ECE %, calibrated"),
    ]


# --- tables -----------------------------------------------------------------------------------


def is_apart_from_0(of: Interval) -> bool:
    """Not where all values are the same, but for rounding: that they do not vary is chance."""
    return of.is_known and of.half_width > 1e-9 and not of.low <= 0 <= of.high


def show(found: Interval | None, measure: Measure, num_trials: int, signed: bool = False) -> str:
    """mean ± half width; the mean alone where there is no interval; n where it is another."""
    if found is None:
        return "-"
    sign = "+" if signed else ""
    text = f"{measure.scale * found.mean:{sign}.{measure.digits}f}"
    if found.is_known:
        text += f" ± {measure.scale * found.half_width:.{measure.digits}f}"
    return text if found.n == num_trials else f"{text} (n = {found.n})"


def tabulated(
    study: Study,
    measures: Sequence[Measure],
    kind: str,
    values_of: Callable[[Group, str], Mapping[Key, float]],
    signed: bool = False,
) -> tuple[list[str], list[Row]]:
    """A row a group that has values, a column a measure that any group has.

    signed: of differences; those whose interval does not hold 0 are marked.
    """
    header, rows = ["loss", "n"], []
    found = {
        group.label: [interval(values_of(group, m.metric), kind) for m in measures]
        for group in study.groups
    }
    columns = [i for i in range(len(measures)) if any(of[i] for of in found.values())]
    header += [measures[i].label for i in columns]
    for group in study.groups:
        values = values_of(group, measures[columns[0]].metric) if columns else {}
        of_group = [found[group.label][i] for i in columns]
        if not any(of_group):
            continue
        num_trials = max(of.n for of in of_group if of) if signed else len(group.trials)
        num_splits = len({splits for splits, _ in values}) if signed else group.num_splits
        cells = [
            show(of, measures[i], num_trials, signed)
            for i, of in zip(columns, of_group, strict=True)
        ]
        marked = {
            number + 1
            for number, of in enumerate(of_group)
            if signed and of and is_apart_from_0(of)
        }
        rows.append(Row(group.label, [count(num_trials, num_splits), *cells], marked))
    return header, rows


def sections_of(
    study: Study, splits: Sequence[str] = ("test_balanced", "test_lt")
) -> list[Section]:
    """Every table of a study; those for which it has no values are left out."""
    sections = []
    for split in splits:
        for kind in study.kinds:
            for what, measures in (
                ("Accuracy", accuracies_on(split)),
                ("Calibration", calibration_on(split)),
            ):
                title, words = f"{what} on {split}", INTERVAL[kind]
                if any(measure.metric == "temperature" for measure in measures):
                    words += at_bound(study)
                table = tabulated(study, measures, kind, Group.values)
                sections.append(Section(f"{title}, {kind}", words, *table))
                table = tabulated(study, measures, kind, study.differences, signed=True)
                title = f"{title}: paired differences from {REFERENCE}, {kind}"
                sections.append(Section(title, words, *table))
    return [*(section for section in sections if section.rows), *about_runs(study)]


def at_bound(study: Study) -> str:
    """Which temperatures are where the search for them ended; nothing where none is."""
    words = ""
    for of_a_half, what in ((False, "T"), (True, "T of a half of the test images")):
        told = []
        for group in study.groups:
            found = [t.metrics for t in group.trials if t.metrics.get("temperature_at_bound")]
            number = sum(report.is_of_a_half(metrics) == of_a_half for metrics in found)
            told += [f"{group.label} {number} of {len(group.trials)}"] if number else []
        if told:
            listed = ", ".join(told)
            words += f" {what} at the bound of its search, and no estimate: {listed}."
    return words


def about_runs(study: Study) -> list[Section]:
    """What differs beside the loss, between groups and inside them."""
    sections = []
    settings = differing_settings(study)
    if settings:
        rows = [
            Row(group.label, [values[i] for values in settings.values()], set())
            for i, group in enumerate(study.groups)
        ]
        sections.append(Section("Settings that differ", "", ("loss", *settings), rows))
    facts = differing_facts(study)
    counted = [
        f"{name}: " + ", ".join(f"{shortened(name, v)} ({n})" for v, n in values.most_common())
        for name, values in facts.items()
    ]
    recorded = ", ".join(names_of_facts(study))
    words = "Beside loss, seeds and the settings above, nothing of what the runs record of "
    words += f"themselves ({recorded})."
    if counted:
        words = "Beside loss, seeds and the settings above, number of trainings in brackets: "
        words += "; ".join(counted) + "."
    sections.append(Section("What differs between the runs", words, (), ()))
    return sections


def how_to_read(study: Study) -> str:
    words = [*map(HOW_TO_READ.get, study.kinds), PAIRED, MEASURED]
    losses = dict.fromkeys(group.loss for group in study.groups)
    if approximate := report.approximations(losses):
        words.append(approximate)
    return "\n".join(f"- {line}" for line in words)


def summary(study: Study, name: Callable[[str], str] = plain) -> str:
    """How many trainings there are, on what, and what was left out; `name` makes what people have
    named things into text."""
    trials = study.trials
    seeds = list(dict.fromkeys(trial.seed for trial in trials))
    split_seeds = list(dict.fromkeys(trial.fields["split_seed"] for trial in trials))
    words = [
        f"{len(trials)} trainings in {len(study.groups)} groups: seeds {', '.join(seeds)}; "
        f"split_seed {', '.join(split_seeds)}."
    ]
    if study.num_replaced:
        words.append(
            f"{study.num_replaced} left out: of the same splits, seed and settings as a newer one."
        )
    for why, names in (("not calibrated", study.unfinished), ("deleted", study.deleted)):
        if names:
            listed = ", ".join(names[:10]) + ", ..." * (len(names) > 10)
            words.append(f"{len(names)} left out, {why}: {name(listed)}.")
    if study.without_run:
        states = ", ".join(f"{number} {state}" for state, number in study.without_run.items())
        words.append(f"Trials of the sweep that have no run: {name(states)}.")
    if study.status != "FINISHED":
        words.append(f"The sweep's own run is {study.status}.")
    return " ".join(words)


LATEX = {
    "\\": r"\textbackslash{}",
    "±": r"$\pm$",
    **{c: f"\\{c}" for c in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": "$<$",
    ">": "$>$",
}


def latex(text: str) -> str:
    return "".join(LATEX.get(c, c) for c in text)


def as_latex(sections: Sequence[Section]) -> str:
    """A table environment a section that has rows; needs the package booktabs."""
    parts = ["% needs \\usepackage{booktabs}"]
    for section in sections:
        if not section.rows:
            continue
        caption = latex(f"{section.title}. {section.words}")
        lines = [
            r"\begin{table}",
            r"  \centering",
            f"  \\caption{{{caption}}}",
            f"  \\begin{{tabular}}{{l{'r' * (len(section.header) - 1)}}}",
            r"    \toprule",
            f"    {' & '.join(map(latex, section.header))} \\\\",
            r"    \midrule",
        ]
        for name, cells, marked in section.rows:
            shown = [
                f"\\textbf{{{latex(c)}}}" if i in marked else latex(c) for i, c in enumerate(cells)
            ]
            lines.append(f"    {' & '.join([latex(name), *shown])} \\\\")
        lines += [r"    \bottomrule", r"  \end{tabular}", r"\end{table}"]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def as_csv(study: Study) -> str:
    """A line an interval, full precision, under the names of the metrics; empty where there is
    none."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["what", "group", "loss", "metric", "interval", "n", "splits", "mean", "low", "high"]
    )
    of_splits = ("test_balanced", "test_lt")
    measures = [m for split in of_splits for m in (*accuracies_on(split), *calibration_on(split))]
    metrics = dict.fromkeys(m.metric for m in measures)
    for what, values_of in (
        ("value", Group.values),
        (f"difference from {REFERENCE}", study.differences),
    ):
        for group in study.groups:
            for metric in metrics:
                values = values_of(group, metric)
                for kind in study.kinds:
                    found = interval(values, kind)
                    if found is None:
                        continue
                    ends = [found.low, found.high] if found.is_known else ["", ""]
                    known = [what, group.label, group.loss, metric, kind]
                    writer.writerow([*known, found.n, found.num_groups, found.mean, *ends])
    return text.getvalue()


def runs_as_csv(study: Study) -> str:
    """A line a training: what the intervals were computed from."""
    metrics = sorted({name for trial in study.trials for name in trial.metrics})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    head = ["group", "run_id", "name", "seed", "split_seed", "splits_sha256"]
    writer.writerow([*head, *(f"metrics.{name}" for name in metrics)])
    for group in study.groups:
        for t in group.trials:
            values = [t.metrics.get(name, "") for name in metrics]
            split_seed = t.fields["split_seed"]
            known = [group.label, t.run_id, t.run_name, t.seed, split_seed, t.splits_sha256]
            writer.writerow([*known, *values])
    return text.getvalue()


# --- the picture ------------------------------------------------------------------------------


def draw(study: Study, title: str, path: Path) -> Picture:
    """Accuracies, their paired differences and the calibration on test_balanced; a measure that
    no run has is left out."""
    by_class = {
        group: Measure(f"test_balanced/{group}_accuracy", group)
        for group in ("balanced", "head", "tail")
    }
    panels = [
        study_figures.Panel(f"{group} accuracy, %", group, panel_rows(study, measure, Group.values))
        for group, measure in by_class.items()
    ]
    panels += [
        study_figures.Panel(
            f"{group}: paired difference from {REFERENCE}, points",
            group,
            panel_rows(study, measure, study.differences),
            is_difference=True,
        )
        for group, measure in by_class.items()
    ]
    panels += [
        study_figures.Panel(name, mark, panel_rows(study, measure, Group.values))
        for name, mark, measure in (
            (
                f"temperature{', some at the bound of the search' if at_bound(study) else ''}",
                "after",
                Measure("temperature", "T", 1.0),
            ),
            ("ECE at T = 1, %", "before", Measure("test_balanced/ece_uncalibrated", "")),
            ("ECE calibrated, %", "after", Measure("test_balanced/ece", "")),
        )
    ]
    study_figures.intervals(
        [group.label for group in study.groups],
        [panel for panel in panels if any(values for values, _ in panel.rows)],
        study.kinds,
        f"{title}: test_balanced",
        path,
    )
    return Picture(path.name, f"{title}: means with 95 % intervals ({', '.join(study.kinds)}).")


def panel_rows(
    study: Study, measure: Measure, values_of: Callable[[Group, str], Mapping[Key, float]]
) -> list[tuple[list[float], dict[str, Interval | None]]]:
    rows = []
    for group in study.groups:
        scaled = {k: measure.scale * v for k, v in values_of(group, measure.metric).items()}
        rows.append((list(scaled.values()), {kind: interval(scaled, kind) for kind in study.kinds}))
    return rows


# --- the record -------------------------------------------------------------------------------


def notice_of(study: Study) -> str:
    """What a page opens with where nobody must mistake the runs for real ones."""
    synthetic = any(trial.fields.get("source") == "synthetic" for trial in study.trials)
    return SYNTHETIC_NOTICE if synthetic else ""


def record_study(run: Run, study: Study) -> list[str]:
    """study/{report.md, table.tex, table.csv, runs.csv, intervals.png, index.html} into `run`,
    whose description opens with the first table, where that fits; returns the report in parts."""
    title, notice = f"Study of {study.name}", notice_of(study)
    sections = sections_of(study)
    how = how_to_read(study)
    if any(trial.fields["protocol"] == "literature" for trial in study.trials):
        how += f"\n- {report.CROSS_FITTED}"
    with tempfile.TemporaryDirectory() as scratch:
        picture = draw(study, title, Path(scratch) / PICTURE)
        run.upload(Path(scratch) / PICTURE, FOLDER)
        reading = Section("How to read", how.replace("\n- ", " ")[2:], (), ())
        about = Section("Trainings", summary(study, str), (), ())
        page = html_page(title, notice, [*sections, about, reading], [picture], Path(scratch))
    parts = markdown(plain(title), notice, sections)
    parts[0] = f"{parts[0]}\n\n{summary(study)}\n\n{how}"
    run.write_text(f"{FOLDER}/report.md", "\n\n".join(parts) + "\n")
    run.write_text(f"{FOLDER}/table.tex", as_latex(sections))
    run.write_text(f"{FOLDER}/table.csv", as_csv(study))
    run.write_text(f"{FOLDER}/runs.csv", runs_as_csv(study))
    run.write_text(PAGE, page)
    link = f"[With the figure, on one page]({link_to_artifact(run, PAGE)})"
    first, *others = parts[1:]
    more, opening = f"More in {FOLDER}/report.md.", [f"{notice}{first}", summary(study), link]
    page_of_run = report.fitting([*opening, how, *others], more)
    if link not in page_of_run:
        page_of_run = report.fitting([f"{notice}{summary(study)}", link, how, first], more)
    run.describe(page_of_run)
    return parts
