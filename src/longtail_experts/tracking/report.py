"""The success checklist, and the words of report.md and of run descriptions."""

import hashlib
import html
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from longtail_experts.learning.calibration import LOG_T_BOUND
from longtail_experts.learning.losses import LOSSES

KEPT_OF_A_TAG = 8000  # characters, by MLflow
LONGEST_DESCRIPTION = KEPT_OF_A_TAG - 30  # of ours, and its signature
SIGNATURE = re.compile(r"\n\n<!-- ([0-9a-f]{16}) -->")  # at the end of a description of ours
CROSS_FITTED = (
    "Under protocol literature there is no calibration split: T is fitted on the test images, and "
    "calibrated scores are of T cross-fitted in two halves of them, each used on the other."
)
ENDINGS = ("_uncalibrated", "")
ACCURACIES = ("accuracy", "balanced", "head", "tail", "many", "medium", "few", "adjusted balanced")


class Check(NamedTuple):
    """One box of the success checklist; `numbers` is what was compared."""

    what: str
    passed: bool
    numbers: str


def trained_to_the_end(
    epochs_done: int, epochs: int, early: bool, losses: Sequence[float]
) -> Check:
    finite = bool(losses) and all(map(math.isfinite, losses))
    ended = "stopped early, as asked" if early else f"{epochs_done} of {epochs} epochs"
    last = f"{losses[-1]:.4g}" if losses else "none logged"
    return Check(
        "trained to the end, loss finite",
        finite and (early or epochs_done == epochs),
        f"{ended}; last training loss {last}",
    )


def validation_improved(
    best: float, first: float, num_classes: int, standard_error: float
) -> Check:
    margin = 3 * standard_error
    return Check(
        "best validation exceeds the first one and chance by 3 standard errors",
        best > first + margin and best > 1 / num_classes + margin,
        f"best {100 * best:.2f} %, first {100 * first:.2f} %, chance {100 / num_classes:.2f} %, "
        f"standard error {100 * standard_error:.2f} points",
    )


def temperature_helps(
    temperature: float, bound: str, nll: float, uncalibrated: float, split: str = "test_lt"
) -> Check:
    """bound: what of the temperature is at the bound of its search, in words; empty for nothing."""
    return Check(
        f"temperature interior, and NLL on {split} lower than at T = 1",
        not bound and nll < uncalibrated,
        f"T = {temperature:.4f}{bound}, NLL {nll:.4f} against {uncalibrated:.4f} nats",
    )


def logits_complete(
    rows: Mapping[str, int], expected: Mapping[str, int], problem: str = ""
) -> Check:
    """rows a split as read back; problem: why they could not be read, if so."""
    wrong = [name for name, n in expected.items() if rows.get(name) != n]
    detail = f"{sum(rows.values()):,} rows in {len(rows)} splits"
    if wrong:
        detail = f"missing or short: {', '.join(wrong)}"
    return Check(
        "logits of all splits present and finite", not wrong and not problem, problem or detail
    )


def checkpoints_load(problems: Mapping[str, str]) -> Check:
    """problems: checkpoint name -> what is wrong, empty where it loads."""
    broken = [f"{name}: {problem}" for name, problem in problems.items() if problem]
    names = ", ".join(problems)
    return Check("checkpoints load", not broken, "; ".join(broken) or names)


def checklist_markdown(checks: Sequence[Check]) -> str:
    """Boxes as characters: `mlflow ui` drops those of Markdown's task lists."""
    return "\n".join(f"- {box(check)}" for check in checks)


def box(check: Check) -> str:
    return f"{'☑' if check.passed else '☐'} {check.what} ({check.numbers})"


def percent(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{100 * value:.2f}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], text: int = 1) -> str:
    """A Markdown table; the first columns are `text`, the others numbers."""
    lines = [header, ["---"] * text + ["---:"] * (len(header) - text), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def with_air(markdown: str) -> str:
    """Space before the cells of tables: `mlflow ui` draws descriptions without any."""
    return "\n".join(
        line.replace(" | ", " | &emsp;") if line.startswith("| ") and "| ---" not in line else line
        for line in markdown.split("\n")
    )


def signed(page: str) -> str:
    """A description of ours, which `typed_by_hand` knows again by its end; nobody sees that."""
    return f"{page}\n\n<!-- {digest(page)} -->"


def typed_by_hand(description: str) -> str:
    """What people have written into a description: below ours, or all where they changed ours."""
    end = SIGNATURE.search(description)
    if end and end[1] == digest(description[: end.start()]):
        return description[end.end() :].strip()
    return SIGNATURE.sub("", description).strip()


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def plain(text: str) -> str:
    """Text of whoever named a run, as itself: no cell, link, picture or tag begins in it."""
    one_line = " ".join(text.split()).replace("|", "/")
    return re.sub(r"([\\`*\[\]!])", r"\\\1", html.escape(one_line, quote=False))


def accuracy_row(metrics: Mapping[str, float], split: str) -> list[str]:
    """Cells of ACCURACIES, percent, for one split of a run's metrics."""
    keys = ["accuracy", *(f"{n.replace(' ', '_')}_accuracy" for n in ACCURACIES[1:])]
    return [percent(metrics.get(f"{split}/{key}")) for key in keys]


def with_error(value: float, error: float, n: int) -> str:
    return f"{100 * value:.2f} ± {100 * error:.2f} ({n:,})"


def calibration_markdown(metrics: Mapping[str, float]) -> str:
    """NLL, Brier and ECE before and after, and the temperature, from the metrics of a run."""
    rows = [
        [f"{split} {label}", *(show(metrics[f"{split}/{key}{end}"]) for end in ENDINGS)]
        for split in ("test_balanced", "test_lt")
        if f"{split}/nll" in metrics
        for key, label, show in (
            ("nll", "NLL, nats", lambda v: f"{v:.4f}"),
            ("brier", "Brier", lambda v: f"{v:.4f}"),
            ("ece", "ECE, %", lambda v: f"{100 * v:.2f}"),
        )
    ]
    halves = ""
    if "temperature_half_0" in metrics:
        of_halves = (metrics["temperature_half_0"], metrics["temperature_half_1"])
        halves = (
            " There is no calibration split: it is fitted on the test images, under the uniform "
            "prior. The scores above are cross-fitted in two halves of them: T = "
            f"{of_halves[0]:.4f} and {of_halves[1]:.4f}, each used on the other half."
        )
    return (
        f"{table(('calibration', 'T = 1', 'calibrated'), rows)}\n\n"
        f"Temperature {metrics['temperature']:.4f} (95 % interval "
        f"{metrics['temperature_low']:.3f} to {metrics['temperature_high']:.3f})"
        f"{at_bound_notice(metrics)}.{halves}"
    )


def at_bound_notice(metrics: Mapping[str, float]) -> str:
    """Of a T that is where the search ends, so that neither it nor its interval is an estimate; or
    of an end of the interval that is."""
    if metrics.get("temperature_at_bound"):
        of_a_half = ", that of a half at the bound of the search"
        return of_a_half if is_of_a_half(metrics) else " at the bound of the search"
    ends = (metrics[f"temperature_{end}"] for end in ("low", "high"))
    if not all(_is_inside(end) for end in ends if end > 0):
        return ", of which an end is the bound of the search"
    return ""


def is_of_a_half(metrics: Mapping[str, float]) -> bool:
    """Whether what is at the bound is the T of a half of the test images alone."""
    return "temperature_half_0" in metrics and _is_inside(metrics["temperature"])


def _is_inside(temperature: float) -> bool:
    return abs(math.log(temperature)) <= LOG_T_BOUND - 1e-6


def name_of_temperature(temperature: float | Tensor) -> str:
    """Of one T, or of one for each row."""
    return f"T = {temperature:.2f}" if isinstance(temperature, float) else "T cross-fitted"


def approximations(losses: Iterable[str]) -> str:
    """Which of these have no exact offset; empty where all have."""
    approximate = [loss for loss in losses if loss in LOSSES and not LOSSES[loss].is_exact]
    if not approximate:
        return ""
    return (
        f"Approximate: no constant makes the logits of {', '.join(approximate)} a "
        "log-posterior; adjusted accuracies, NLL and ECE of these use that of the loss without "
        "focusing or margins."
    )


def fitting(parts: Sequence[str], more: str) -> str:
    """As many whole parts, from the first on, as MLflow keeps of a description; then `more`
    where some are left out."""
    kept = list(parts)
    while len(with_air("\n\n".join([*kept, more]))) > LONGEST_DESCRIPTION:
        kept.pop()
    return "\n\n".join(kept if len(kept) == len(parts) else [*kept, more])
