"""The readiness report: sections of Markdown, and where they go."""

import platform
from collections.abc import Mapping, Sequence

import torch

from longtail_experts.config import LOSS_NAMES, Config
from longtail_experts.data.dataset import Dataset
from longtail_experts.learning.cost import Pace, TrainingMemory, Work
from longtail_experts.learning.loss_behaviour import LossBehaviour
from longtail_experts.learning.rules import Finding, blocking, megabytes
from longtail_experts.tracking import expert_report, experts, report
from longtail_experts.tracking.runs import Run

NUM_LOSSES = len(LOSS_NAMES)


def record(
    run: Run, config: Config, data: Dataset, opening: str, sections: Mapping[str, str]
) -> None:
    """report.md, the description (as many sections as fit whole) and the terminal."""
    parts = [opening, *(f"## {title}\n\n{text}" for title, text in sections.items())]
    whole = "\n\n".join(parts)
    run.write_text("report.md", whole + "\n")
    run.describe(report.fitting(parts, "More in report.md."))
    run.log_params(config.as_text() | {"splits_sha256": data.splits.sha256})
    print(whole)


def verdict(
    config: Config, findings: Sequence[Finding], pace: Pace | None, work: Work, num_experts: int
) -> str:
    """READY or NOT READY, the hours, and everything that is not simply ok, the worst first."""
    ready = not blocking(findings)
    title = f"## {'READY' if ready else 'NOT READY'}: {config.loss} on {config.source}"
    if pace is not None:
        hours = duration(num_experts * work.seconds(pace).total)
        title += f", about {hours} for {num_experts} expert{'s' if num_experts > 1 else ''}"
    lines = [
        f"- **{f.verdict}** {f.field} = {f.value}: {f.message}"
        for level in ("blocking", "warning", "note")
        for f in findings
        if f.verdict == level
    ]
    return f"{experts.notice(config)}{title}\n\n" + "\n".join(lines or ["Nothing to remark."])


def findings_table(findings: Sequence[Finding]) -> str:
    rows = [[f.field, cell(f.value), f.verdict, cell(f.message)] for f in findings]
    return report.table(("knob", "value", "verdict", "why"), rows, text=4)


def cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")


def time_section(
    pace: Pace | None, work: Work, config: Config, data: Dataset, path: str, batch_size: int
) -> str:
    """batch_size: images of a step that was measured."""
    if pace is None:
        return "Not measured: something blocking comes first."
    seconds = work.seconds(pace)
    rows = [
        [
            name,
            f"{images:,}",
            duration(part),
            duration(NUM_LOSSES * part),
            f"{100 * part / seconds.total:.1f} %",
        ]
        for name, images, part in zip(Work._fields, work, seconds, strict=True)
    ]
    total = seconds.total
    rows.append(
        ["in all", f"{sum(work):,}", duration(total), duration(NUM_LOSSES * total), "100 %"]
    )
    threads = f", {torch.get_num_threads()} threads" if config.device == "cpu" else ""
    return (
        f"{report.table(('', 'images', 'one expert', 'three in turn', 'share'), rows)}\n\n"
        f"An epoch of {data.size('train'):,} images: "
        f"{duration(pace.training * data.size('train'))} "
        f"({1 / pace.training:,.0f} images/s in training, {1 / pace.predicting:,.0f} in "
        f"prediction). Measured on this machine in a few steps of {batch_size} images "
        f"({config.device}, {config.precision}, {path} steps{threads}, {platform.machine()}); "
        "what else runs here slows it. Starting up, compiling, the bootstrap of the temperature "
        "and recording come on top: about a minute an expert."
    )


def duration(seconds: float) -> str:
    """Two to three digits in the unit that suits."""
    if seconds < 90:
        return f"{seconds:.3g} s"
    if seconds < 5400:
        return f"{seconds / 60:.{0 if seconds >= 600 else 1}f} min"
    return f"{seconds / 3600:.1f} h"


def machine_section(
    memory: TrainingMemory, free: int, output: Mapping[str, int], config: Config, batch_size: int
) -> str:
    """output: bytes of one expert by what they are; batch_size: images that memory is for."""
    needed = [[name, megabytes(value)] for name, value in memory._asdict().items()]
    needed.append(["in all", megabytes(memory.total)])
    written = [
        [name, megabytes(value), megabytes(NUM_LOSSES * value)] for name, value in output.items()
    ]
    return (
        f"{report.table((f'memory on {config.device}', 'needed'), needed)}\n\n"
        f"{megabytes(free)} are free. Activations at batch {batch_size}, {config.precision}, "
        "measured on this network as what the backward pass keeps; the libraries' workspace is "
        "taken as half of that.\n\n"
        f"{report.table(('on disk', 'one expert', 'all three'), written)}"
    )


def loss_section(behaviour: Sequence[LossBehaviour], data: Dataset) -> str:
    counts = data.class_counts("train")
    rows = [
        [
            row.loss,
            row.target,
            "as theory" if row.as_theory else "NOT AS THEORY",
            f"{row.nats:.3f}",
            *(signed(v) for v in (row.random, row.random_theory)),
            *(signed(v) for v in (row.uniform, row.uniform_theory)),
        ]
        for row in behaviour
    ]
    header = ("loss", "target", "", "nats", "- ce", "theory", "- ce, uniform logits", "theory")
    return (
        f"{report.table(header, rows, text=3)}\n\n"
        f"Largest class: {int(counts.max())} images in train, smallest: {int(counts.min())}. "
        "Nats: mean loss over standard-normal logits. Theory on a target y: log(sum_j w_j e^f_j / "
        "sum_j e^f_j) - log w_y, with w = prior^tau (logit_adjust) or counts (balanced_softmax); "
        "for uniform logits at tau 1 that is -log(C prior_y)."
    )


def signed(value: float) -> str:
    return f"{round(value, 3) + 0.0:+.3f}"  # + 0.0: no minus before a zero


def schedule_section(rows: Sequence[tuple[int, int, float, float]]) -> str:
    """rows: (first epoch, last epoch, rate at its first step, at its last)."""
    table = [
        [str(first) if first == last else f"{first}-{last}", f"{start:.4g}", f"{end:.4g}"]
        for first, last, start, end in rows
    ]
    return (
        f"{report.table(('epochs', 'at their first step', 'at their last'), table)}\n\n"
        "Every step: tables/lr_schedule.csv, figures/lr_schedule.png."
    )


def data_section(config: Config, data: Dataset) -> str:
    images = data.images
    return (
        f"{len(images.train_labels):,} training and {len(images.test_labels):,} test images of "
        f"{data.num_classes} classes from {config.source}, data_dir `{config.data_dir}`, "
        f"fingerprint `{images.fingerprint[:12]}`; pool {sum(data.splits.pool_counts):,} images, "
        f"splits `{data.splits.sha256[:12]}`, disjoint by index as checked.\n\n"
        f"{expert_report.split_table(data)}"
    )
