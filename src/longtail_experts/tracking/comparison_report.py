"""A comparison in words, as CSV, and as one HTML page that opens without a network."""

import base64
import csv
import html
import io
import math
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from longtail_experts.config import Config
from longtail_experts.tracking import comparison_figures, figures, report
from longtail_experts.tracking.comparison import (
    POSTHOC_TAUS,
    Member,
    Together,
    differences,
    posthoc_of,
    recall_of,
    reliability_panels,
    standard_errors,
)
from longtail_experts.tracking.drawing import draw
from longtail_experts.tracking.identity import shortened
from longtail_experts.tracking.report import percent, plain
from longtail_experts.tracking.runs import Run, link_to_artifact

PAGE = "comparison/index.html"
GROUPS = ("balanced", "head", "tail", "many", "medium", "few")
POSTHOC_GROUPS = ("balanced", "head", "tail")
Posthoc = Mapping[str, Mapping[float, Mapping[str, float]]]  # label -> tau -> accuracies


class Row(NamedTuple):
    """One measure: a cell for each column, and which cells are the best."""

    name: str
    cells: list[str]
    best: set[int]


class Section(NamedTuple):
    title: str
    words: str
    header: Sequence[str]
    rows: Sequence[Row]


class Picture(NamedTuple):
    name: str  # of the file
    caption: str


def four_digits(value: float) -> str:
    return f"{value:.4f}"


def row(
    name: str,
    values: Sequence[float | None],
    show: Callable[[float], str],
    better: Callable[[Sequence[float]], float] | None,
    errors: Sequence[float | None] | None = None,
) -> Row:
    """Equal cells, as shown, share the mark; it means nothing where there is but one column."""
    values = [None if v is None or math.isnan(v) else v for v in values]
    cells = ["-" if v is None else show(v) for v in values]
    best: set[int] = set()
    known = [v for v in values if v is not None]
    if better and len(known) > 1:
        shown = show(better(known))
        best = {i for i, cell in enumerate(cells) if cell == shown}
    for i, error in enumerate(errors or ()):
        if error is not None and values[i] is not None:
            cells[i] += f" ± {show(error)}"
    return Row(name, cells, best)


# --- tables -----------------------------------------------------------------------------------


def expert_rows(members: Sequence[Member], marks: bool = True) -> list[Row]:
    """What the runs recorded: argmax f, adjusted, scores before and after T; best values marked
    where `marks` says that they are of the same images."""

    def of(key: str) -> list[float | None]:
        return [m.metrics.get(key) for m in members]

    rows = []
    for split in ("test_balanced", "test_lt"):
        if any(split not in m.expert.splits for m in members):
            continue
        errors = [
            standard_errors(m.logits(split).argmax(1), m.targets(split), m.groups) for m in members
        ]
        rows.append(row(f"{split}: accuracy, %", of(f"{split}/accuracy"), percent, max))
        for group in GROUPS:
            key = f"{group}_accuracy"
            spread = [error.get(key) for error in errors]
            rows.append(row(f"{split}: {group}, %", of(f"{split}/{key}"), percent, max, spread))
        for name in ("accuracy", "balanced_accuracy"):
            label = f"{split}: adjusted {name.replace('_', ' ')}, %"
            rows.append(row(label, of(f"{split}/adjusted_{name}"), percent, max))
        for key, label, show in (("nll", "NLL, nats", four_digits), ("ece", "ECE, %", percent)):
            for end, when in (("_uncalibrated", "at T = 1"), ("", "calibrated")):
                values = of(f"{split}/{key}{end}")
                rows.append(row(f"{split}: {label}, {when}", values, show, min))
    intervals = [
        f"{m.expert.temperature:.3f} ({m.metrics['temperature_low']:.3f} to "
        f"{m.metrics['temperature_high']:.3f}){report.at_bound_notice(m.metrics)}"
        if "temperature_low" in m.metrics
        else f"{m.expert.temperature:.3f}"
        for m in members
    ]
    rows.append(Row("T (95 % interval)", intervals, set()))
    for name, seconds in (
        ("wall time of the run, pauses and all, minutes", [m.seconds for m in members]),
        ("of which training steps", [m.training_seconds for m in members]),
    ):
        rows.append(row(name, [s / 60 for s in seconds], lambda v: f"{v:.1f}", None))
    found = [r for r in rows if any(cell != "-" for cell in r.cells)]
    return found if marks else [r._replace(best=set()) for r in found]


def ensemble_rows(result: Together) -> list[Row]:
    """Members and ensembles under one deployment prior."""
    rows = [
        row("accuracy, %", [result.metrics[n]["accuracy"] for n in result.labels], percent, max)
    ]
    for group in GROUPS:
        key = f"{group}_accuracy"
        values = [result.metrics[n].get(key) for n in result.labels]
        spread = [result.errors[n].get(key) for n in result.labels]
        rows.append(row(f"{group}, %", values, percent, max, spread))
    for key, label, show in (
        ("nll", "NLL, nats", four_digits),
        ("brier", "Brier", four_digits),
        ("ece", "ECE, %", percent),
    ):
        rows.append(row(label, [result.metrics[n][key] for n in result.labels], show, min))
    return [r for r in rows if any(cell != "-" for cell in r.cells)]


def posthoc_rows(found: Posthoc) -> list[Row]:
    """A column a tau; no cell is marked: to take the best would be to select on test images."""
    return [
        row(
            f"{label}: {group}, %",
            [of_tau.get(f"{group}_accuracy") for of_tau in by_tau.values()],
            percent,
            None,
        )
        for label, by_tau in found.items()
        for group in POSTHOC_GROUPS
    ]


def as_markdown(header: Sequence[str], rows: Sequence[Row]) -> str:
    return report.table(
        [plain(h) for h in header],
        [
            [
                r.name,
                *(f"**{plain(c)}**" if i in r.best else plain(c) for i, c in enumerate(r.cells)),
            ]
            for r in rows
        ],
    )


def as_html(header: Sequence[str], rows: Sequence[Row]) -> str:
    head = "".join(f"<th>{html.escape(h)}</th>" for h in header)
    body = ""
    for r in rows:
        cells = "".join(
            f"<td{' class=best' if i in r.best else ''}>{html.escape(c)}</td>"
            for i, c in enumerate(r.cells)
        )
        body += f"<tr><th>{html.escape(r.name)}</th>{cells}</tr>\n"
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table>"


def as_csv(members: Sequence[Member]) -> str:
    """A line a run, full precision: run, label, then settings and metrics under the names that
    `mlflow.search_runs` gives them."""
    settings = list(dict.fromkeys(name for m in members for name in m.facts))
    columns = [f"params.{n}" if n in Config.model_fields else f"tags.{n}" for n in settings]
    metrics = sorted({name for m in members for name in m.metrics})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        [
            "run_id",
            "label",
            "splits_sha256",
            "training_seconds",
            *columns,
            *(f"metrics.{n}" for n in metrics),
        ]
    )
    for m in members:
        start = [m.run_id, m.label, m.splits_sha256, f"{m.training_seconds:.1f}"]
        values = [repr(m.metrics[name]) if name in m.metrics else "" for name in metrics]
        writer.writerow([*start, *(m.facts.get(name, "") for name in settings), *values])
    return text.getvalue()


# --- pictures ---------------------------------------------------------------------------------


def pictures(
    members: Sequence[Member], result: Together | None, posthoc: Posthoc, folder: Path
) -> list[Picture]:
    """The figures as files in `folder`, with their captions."""
    first, drawn, drawings = members[0], [], []

    def picture(name: str, caption: str, figure: Callable[..., None], *content: Any) -> None:
        drawn.append(Picture(name, caption))
        drawings.append(partial(figure, *content, folder / name))

    picture(
        "per_class.png",
        "Recall of argmax f on test_balanced over class frequency.",
        comparison_figures.per_class,
        {m.label: (recall_of(m), np.array(m.pool_counts)) for m in members},
    )
    if len({m.pool_counts for m in members}) == 1:  # else head and tail are other classes
        plane, stars, title = head_tail_points(members, result)
        if plane:
            picture(
                "head_tail.png",
                "The trade-off between head and tail; up and to the right is better.",
                comparison_figures.head_tail_plane,
                plane,
                stars,
                float(
                    first.groups["head"][first.targets("test_balanced").unique()].double().mean()
                ),
                title,
            )
    picture(
        "posthoc.png",
        "Post-hoc logit adjustment on test_balanced: argmax of f / T + log_offset - tau log prior "
        "over tau. Tau 0 is the training prior, tau 1 the uniform one; none is selected.",
        comparison_figures.posthoc,
        posthoc,
    )
    if result is not None:
        titled = f"{result.deployment} prior, {result.split}"
        picture(
            "reliability.png",
            f"Reliability under the deployment prior ({titled}).",
            figures.reliability,
            reliability_panels(members, result.deployment),
        )
    if result is not None and len(members) > 1:
        picture(
            "pairs.png",
            f"Disagreement and error overlap of experts ({titled}).",
            comparison_figures.pairs,
            [m.label for m in members],
            result.disagreement,
            result.error_overlap,
            f"Experts in pairs ({titled})",
        )
        picture(
            "ensemble.png",
            f"Every expert converted to the {result.deployment} prior, then combined.",
            comparison_figures.ensemble,
            {n: result.metrics[n] for n in result.labels},
            {n: result.errors[n] for n in result.labels},
            len(members),
            f"Calibrated experts and their ensembles ({titled})",
        )
    draw(*drawings)
    return drawn


def head_tail_points(
    members: Sequence[Member], result: Together | None
) -> tuple[dict[str, list[tuple[float, float]]], dict[str, tuple[float, float]], str]:
    """Points of members and of ensembles, those that have both figures, and the title."""

    def point(metrics: Mapping[str, float], prefix: str = "") -> list[tuple[float, float]]:
        head, tail = (metrics.get(f"{prefix}{group}_accuracy") for group in ("head", "tail"))
        return [] if head is None or tail is None else [(head, tail)]

    title = "Head against tail on test_balanced"
    plane = {m.label: point(m.metrics, "test_balanced/") for m in members}
    stars = {}
    if result is not None and result.deployment == "uniform":
        title += " (adjusted and ensembles: uniform prior)"
        plane = {label: p + point(result.metrics[label]) for label, p in plane.items()}
        ensembles = {n: point(result.metrics[n]) for n in result.labels[len(members) :]}
        stars = {n: p[0] for n, p in ensembles.items() if p}
    return {label: p for label, p in plane.items() if p}, stars, title


# --- the record -------------------------------------------------------------------------------


def record_comparison(
    run: Run, members: Sequence[Member], result: Together | None, notice: str
) -> list[str]:
    """comparison/{report.md, table.csv, index.html, figures/*.png} and the metrics of the
    ensembles, into `run`; returns the report in parts.

    result is None where the experts are of different splits: then there is the table alone, with
    the figures that need no common rows.
    """
    posthoc = {member.label: posthoc_of(member) for member in members}
    sections = described(members, result, posthoc)
    experts = "expert" if len(members) == 1 else "experts"
    title = f"Comparison of {len(members)} {experts}: {', '.join(m.label for m in members)}"
    with tempfile.TemporaryDirectory() as scratch:
        drawn = pictures(members, result, posthoc, Path(scratch))
        for picture in drawn:
            run.upload(Path(scratch) / picture.name, "comparison/figures")
        page = html_page(title, notice, sections, drawn, Path(scratch))
    parts = markdown(title, notice, sections)
    run.write_text("comparison/report.md", "\n\n".join(parts) + "\n")
    run.write_text("comparison/table.csv", as_csv(members))
    run.write_text(PAGE, page)
    if result is not None:
        run.replace_metrics(  # a parent that was resumed held those of fewer experts
            {
                f"ensemble_{name.split()[0]}/{key}": value
                for name in result.labels[len(members) :]
                for key, value in result.metrics[name].items()
            },
            step=0,
        )
    return parts


def how_to_read(members: Sequence[Member], result: Together | None) -> str:
    words = []
    if result is not None and len(members) > 1:
        words.append("The best of a row is marked.")
    if any(member.facts.get("protocol") == "literature" for member in members):
        words.append(report.CROSS_FITTED)
    if approximate := report.approximations(dict.fromkeys(member.loss for member in members)):
        words.append(approximate)
    return " ".join(words)


def described(
    members: Sequence[Member], result: Together | None, posthoc: Posthoc
) -> list[Section]:
    """Everything but the pictures."""
    labels = [m.label for m in members]
    sections = [
        Section(
            "Experts",
            "Accuracies are of argmax f, which T does not touch: over images in the first row of "
            "a split, below it means over classes ± standard error of the test images. Adjusted "
            "ones, NLL and ECE are of the calibrated scores under the split's own deployment "
            f"prior. {how_to_read(members, result)}",
            ("measure", *labels),
            expert_rows(members, marks=result is not None),
        )
    ]
    if result is None:
        sections.append(
            Section(
                "Different splits",
                "These experts were trained and tested on different images: no figure that needs "
                "the same images is drawn, and differences may come from the splits alone.",
                (),
                (),
            )
        )
    elif len(members) > 1:
        sections.append(
            Section(
                f"Ensembles under the {result.deployment} prior, on {result.split}",
                "Every expert's scores f / T + log_offset + log q - log prior under the "
                f"deployment prior q ({result.deployment}), then combined; the members' own "
                "figures are of the same scores.",
                ("measure", *result.labels),
                ensemble_rows(result),
            )
        )
    sections.append(
        Section(
            "Post-hoc logit adjustment",
            "Accuracies on test_balanced of the argmax of f / T + log_offset - tau log prior "
            "(Menon et al., ICLR 2021, section 4.1), an evaluation of the finished experts: "
            "nothing is trained. Tau 0 is the posterior under the training prior, tau 1 under the "
            "uniform one, whose balanced accuracy is the adjusted one above. No tau is selected, "
            "on these images or others: all are shown.",
            ("tau", *(f"{tau:g}" for tau in POSTHOC_TAUS)),
            posthoc_rows(posthoc),
        )
    )
    unlike = differences(members)
    sections.append(
        Section(
            "What differs between the runs",
            "Everything in their configurations, code and device beside the loss that could "
            "explain a difference." + ("" if unlike else " Nothing does."),
            ("setting", *labels),
            [Row(n, [shortened(n, v) for v in values], set()) for n, values in unlike.items()],
        )
    )
    sections.append(
        Section(
            "Runs",
            "",
            ("expert", "name", "run", "splits"),
            [Row(m.label, [m.run_name, m.run_id, m.splits_sha256[:12]], set()) for m in members],
        )
    )
    return sections


def markdown(title: str, notice: str, sections: Sequence[Section]) -> list[str]:
    """The title, then a part a section."""
    parts = [f"{notice}## {title}"]
    for name, words, header, rows in sections:
        pieces = [f"### {name}", words, as_markdown(header, rows) if rows else ""]
        parts.append("\n\n".join(piece for piece in pieces if piece))
    return parts


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1100px; margin: 2em auto;
       padding: 0 1em; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 1em 0; }
th, td { padding: 0.25em 0.8em; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child { text-align: left; font-weight: normal; }
thead th { border-bottom: 2px solid #666; font-weight: 600; }
.best { font-weight: 700; background: #e8f2fa; }
.wide { overflow-x: auto; }
figure { margin: 2em 0; }
img { max-width: 100%; height: auto; }
figcaption { color: #555; }
.notice { border: 2px solid #D55E00; padding: 0.6em 1em; }
"""


def html_page(
    title: str,
    notice: str,
    sections: Sequence[Section],
    drawn: Sequence[Picture],
    folder: Path,
) -> str:
    """The whole comparison in one file: pictures inside, no script, nothing fetched."""
    parts = [f"<h1>{html.escape(title)}</h1>"]
    if notice:
        words = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", html.escape(notice.strip()))
        parts.append(f"<p class=notice>{words}</p>")
    for number, (name, words, header, rows) in enumerate(sections):
        parts.append(f"<h2>{html.escape(name)}</h2>")
        parts += [f"<p>{html.escape(words)}</p>"] if words else []
        parts += [f"<div class=wide>{as_html(header, rows)}</div>"] if rows else []
        if number == 0:
            parts += [figure_html(picture, folder) for picture in drawn]
    body = "\n".join(parts)
    return (
        "<!doctype html>\n<html lang=en>\n<head><meta charset=utf-8>"
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style></head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def figure_html(picture: Picture, folder: Path) -> str:
    data = base64.b64encode((folder / picture.name).read_bytes()).decode()
    caption = html.escape(picture.caption)
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="{caption}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def describe_comparison(run: Run, parts: Sequence[str]) -> None:
    """The report as the page of the run, with the way to the pictures."""
    page = f"[With figures, on one page]({link_to_artifact(run, PAGE)})"
    run.describe(report.fitting([page, *parts], "More in comparison/report.md."))
