"""What the run of one expert is given, in the names that other programs read."""

import csv
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

import numpy as np
from torch import Tensor

from longtail_experts.config import Config, to_text
from longtail_experts.data.batches import derive_seed
from longtail_experts.data.dataset import Dataset
from longtail_experts.data.splits import SPLITS, manifest
from longtail_experts.learning.calibration import deployment_scores
from longtail_experts.learning.evaluation import label_frequencies, uniform
from longtail_experts.learning.metrics import balanced_accuracy_standard_error, reliability
from longtail_experts.tracking import figures, report
from longtail_experts.tracking.checkpoints import read_checkpoint
from longtail_experts.tracking.logits import load_expert_logits
from longtail_experts.tracking.runs import Run, RunError, link_to, start_run

SYNTHETIC_NOTICE = (
    "**Synthetic images.** This is a demonstration on generated pictures; its numbers say "
    "nothing about CIFAR-100 or any real data."
)


def notice(config: Config) -> str:
    """What a description opens with where nobody must mistake the run for a real one."""
    return f"{SYNTHETIC_NOTICE}\n\n" if config.source == "synthetic" else ""


def run_name(config: Config) -> str:
    what = "DEMO synthetic" if config.source == "synthetic" else config.source
    return f"{config.loss} {what} seed {config.seed}"


def start_expert_run(
    config: Config, stage: str, parent: Run | None = None
) -> AbstractContextManager[Run]:
    tags = {"stage": stage, "expert": config.loss, **machine_tags(config)}
    return start_run(run_name(config), tags, parent)


def machine_tags(config: Config) -> dict[str, str]:
    return {
        "data.source": config.source,
        "device": config.device,
        "precision": config.precision,
    }


def record_inputs(run: Run, config: Config, data: Dataset, num_parameters: int) -> None:
    """Config, params, splits and data sets: all that is known before the first step."""
    run.describe(f"{notice(config)}Training {config.loss}; results appear here at the end.")
    run.write_text("config.yaml", config.to_yaml())
    record_splits(run, data)
    run.log_params(
        config.as_text()
        | {"splits_sha256": data.splits.sha256, "num_parameters": str(num_parameters)}
    )


def record_splits(run: Run, data: Dataset) -> None:
    """splits/*.json and what `mlflow ui` shows under *Datasets used*."""
    description = manifest(data.splits, data.images)
    for split in SPLITS:
        indices = data.splits.indices[split].tolist()
        run.write_json(f"splits/{split}_indices.json", indices)
    run.write_json("splits/manifest.json", description)
    run.log_datasets(
        (split, data.splits.sha256, data.images.source, {"num_rows": data.size(split)})
        for split in SPLITS
    )


def record_schedule(
    run: Run, epochs: int, steps_per_epoch: int, lr_of: Callable[[int], float]
) -> None:
    """tables/lr_schedule.csv, every step, and the same as a figure."""
    rates = [lr_of(step) for step in range(epochs * steps_per_epoch)]
    with run.artifact("tables/lr_schedule.csv") as path, path.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["step", "epoch", "lr"])
        for step, rate in enumerate(rates):
            table.writerow([step, step // steps_per_epoch, f"{rate:.10g}"])
    with run.artifact("figures/lr_schedule.png") as path:
        figures.lr_schedule(rates, steps_per_epoch, path)


# --- stages other than an expert's own --------------------------------------------------------


def start_data_run(config: Config) -> AbstractContextManager[Run]:
    return start_run(f"data {config.source}", {"stage": "data", "data.source": config.source})


def start_parent_run(config: Config) -> AbstractContextManager[Run]:
    name = run_name(config).replace("all", "all experts", 1)
    return start_run(name, {"stage": "all", **machine_tags(config)})


def start_calibration_run(source: Run) -> AbstractContextManager[Run]:
    return start_run(f"calibrate {source.name}", {"stage": "calibrate"} | pointer_to(source))


def pointer_to(source: Run) -> dict[str, str]:
    note = f"Calibrated run [{source.name}]({link_to(source)}); everything is there."
    return {"source_run_id": source.run_id, "mlflow.note.content": note}


def is_calibrated(run: Run) -> bool:
    return run.tags.get("calibrated") == "true"


def require_trained(run: Run) -> None:
    """Raises RunError for a run that is still training, or has no checkpoint."""
    if not run.has_artifact("checkpoints/best.pt"):
        stage = run.tags.get("stage", "none")
        raise RunError(
            f"run {run.run_id}: has no checkpoints/best.pt (its stage is {stage}); give the id "
            "of a train run"
        )
    if run.status == "RUNNING":
        raise RunError(f"run {run.run_id}: is still RUNNING; calibrate it when it has ended")


# --- after calibration ------------------------------------------------------------------------


def record_per_class(run: Run, data: Dataset, recalls: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """tables/per_class.json, and recall over class frequency as a figure.

    recalls: split -> (recall float64 [C], images int64 [C]) of argmax f.
    """
    train_counts, pool_counts = data.class_counts("train").tolist(), data.splits.pool_counts
    groups = data.groups
    rows = []
    for c, name in enumerate(data.images.class_names):
        row = {
            "class": c,
            "name": name,
            "train_images": train_counts[c],
            "pool_images": pool_counts[c],
            "head_tail": "head" if groups["head"][c] else "tail",
            "many_medium_few": next(g for g in ("many", "medium", "few") if groups[g][c]),
        }
        for split, (recall, _) in recalls.items():
            value = float(recall[c])
            row[f"recall_{split}"] = None if math.isnan(value) else value
        row |= {f"n_{split}": int(images[c]) for split, (_, images) in recalls.items()}
        rows.append(row)
    run.write_json("tables/per_class.json", rows)
    with run.artifact("figures/per_class_accuracy.png") as path:
        figures.per_class_accuracy(
            recalls["test_balanced"][0].numpy(),
            np.array(pool_counts),
            groups["head"].numpy(),
            path,
        )


def record_figures(
    run: Run,
    data: Dataset,
    logits: Mapping[str, Tensor],
    temperature: float,
    log_offset: Tensor,
    prior: Tensor,
) -> None:
    """Learning curves, and reliability before and after the temperature."""
    curves = ("train/loss", "val/balanced_accuracy", "val/head_accuracy", "val/tail_accuracy")
    with run.artifact("figures/learning_curves.png") as path:
        figures.learning_curves({name: run.history(name) for name in curves}, path)
    deployment = {
        "test_lt": label_frequencies(data.targets("test_lt"), data.num_classes),
        "test_balanced": uniform(data.num_classes),
    }
    panels = {
        split: {
            label: reliability(
                deployment_scores(logits[split], t, log_offset, prior, q).softmax(1),
                data.targets(split),
            )
            for label, t in (("T = 1", 1.0), (f"T = {temperature:.2f}", temperature))
        }
        for split, q in deployment.items()
    }
    with run.artifact("figures/reliability.png") as path:
        figures.reliability(panels, path)


def record_report(run: Run, config: Config, data: Dataset, logits: Mapping[str, Tensor]) -> None:
    """report.md and the description; the tag `calibrated` says that the record is complete."""
    metrics = run.metrics
    checks = success_checklist(run, config, data, logits)
    title = f"{config.loss}: test_balanced balanced accuracy"
    balanced = metrics["test_balanced/balanced_accuracy"]
    text = "\n\n".join(
        [
            f"{notice(config)}## {title} {100 * balanced:.2f} %",
            report.results_markdown(metrics),
            standard_errors(data, logits),
            f"## Success checklist\n\n{report.checklist_markdown(checks)}",
            f"## What was done\n\n{what_was_done(run, config, data)}",
        ]
    )
    run.write_text("report.md", text + "\n")
    run.describe(text)
    run.set_tags({"calibrated": "true"})
    for check in checks:
        print(f"[{'x' if check.passed else ' '}] {check.what} ({check.numbers})")


def standard_errors(data: Dataset, logits: Mapping[str, Tensor]) -> str:
    """Images and standard error of the means over classes, by split and group."""
    groups = {"balanced": None, "head": data.groups["head"], "tail": data.groups["tail"]}
    rows = []
    for split in ("test_balanced", "test_lt", "val_lt"):
        targets, row = data.targets(split), [split]
        for mask in groups.values():
            n = len(targets) if mask is None else int(mask[targets].sum())
            predictions = logits[split].argmax(1)
            error = (
                balanced_accuracy_standard_error(predictions, targets, data.num_classes, mask)
                if n
                else math.nan
            )
            row += [str(n), report.percent(error)]
        rows.append(row)
    header = ["standard error, points"]
    for name in groups:
        header += [f"{name} n", f"{name} s.e."]
    return report.table(header, rows)


def success_checklist(
    run: Run, config: Config, data: Dataset, logits: Mapping[str, Tensor]
) -> list[report.Check]:
    """Every box, computed from what the store gives back."""
    metrics, tags = run.metrics, run.tags
    losses = [value for _, value in run.history("train/loss")]
    validation = run.history("val/balanced_accuracy")
    error = balanced_accuracy_standard_error(
        logits["val_lt"].argmax(1), data.targets("val_lt"), data.num_classes
    )
    expected, rows, problem = {split: data.size(split) for split in SPLITS}, {}, ""
    try:
        stored = load_expert_logits(run.run_id).splits
        rows = {split: len(stored[split].targets) for split in stored}
    except RunError as failure:
        problem = str(failure)
    problems = {}
    for name in ("best", "last", "final_calibrated"):
        try:
            read_checkpoint(run, name)
            problems[name] = ""
        except RunError as failure:
            problems[name] = str(failure)
    return [
        report.trained_to_the_end(
            int(metrics.get("epoch", -1)) + 1,
            config.epochs,
            tags.get("training") == "early_stopped",
            losses,
        ),
        report.validation_improved(
            metrics["best/val_balanced_accuracy"], validation[0][1], data.num_classes, error
        ),
        report.temperature_helps(
            metrics["temperature"],
            bool(metrics["temperature_at_bound"]),
            metrics["test_lt/nll"],
            metrics["test_lt/nll_uncalibrated"],
        ),
        report.logits_complete(rows, expected, problem),
        report.checkpoints_load(problems),
    ]


def what_was_done(run: Run, config: Config, data: Dataset) -> str:
    metrics, tags = run.metrics, run.tags
    images = data.images
    sizes = ", ".join(f"{split} {data.size(split):,}" for split in SPLITS)
    return "\n".join(
        [
            f"- ResNet-32 ({config.shortcut} shortcut) under {config.loss}, {config.epochs} "
            f"epochs; the checkpoint of epoch {int(metrics['best/epoch'])}, best on val_lt "
            f"({100 * metrics['best/val_balanced_accuracy']:.2f} % balanced), gave everything "
            "above",
            f"- images: {images.source}, fingerprint `{images.fingerprint[:12]}`, splits "
            f"`{data.splits.sha256[:12]}` ({sizes})",
            f"- on {tags.get('device')}, {tags.get('precision')}; commit "
            f"`{tags.get('git.commit', 'unknown')[:12]}`"
            f"{' with uncommitted changes' if tags.get('git.dirty') == 'true' else ''}",
            f"- to repeat: `{repeat_command(config)}`",
        ]
    )


def repeat_command(config: Config) -> str:
    """The `mlflow run` line that gives this expert: what differs from the full recipe."""
    skipped = {"loss", "device", "precision"}
    if config.expert_seed == derive_seed(config.seed, config.loss):
        skipped.add("expert_seed")
    given = config.model_dump()
    changed = [
        f" -P {name}={to_text(given[name])}"
        for name, field in Config.model_fields.items()
        if name not in skipped and given[name] != field.default
    ]
    return f"mlflow run . -P loss={config.loss} -P config=cifar100_lt{''.join(changed)}"


def describe_parent(
    parent: Run, config: Config, children: Mapping[str, str], failures: Mapping[str, Exception]
) -> None:
    """The experts of loss=all side by side, on the page of their parent."""
    rows = []
    for loss, run_id in children.items():
        child = Run(run_id)
        metrics = child.metrics
        rows.append(
            [
                f"[{loss}]({link_to(child)})",
                *report.accuracy_row(metrics, "test_balanced"),
                f"{metrics['temperature']:.3f}",
            ]
        )
    rows += [[f"{loss}: FAILED ({error})", *["-"] * 9] for loss, error in failures.items()]
    header = ("test_balanced, %", *report.ACCURACIES, "T")
    parent.describe(f"{notice(config)}{report.table(header, rows)}")


def record_split_report(run: Run, config: Config, data: Dataset) -> None:
    """Sizes, absent classes and identical images of the splits, in words and as a figure."""
    facts = manifest(data.splits, data.images)
    counts = {split: data.class_counts(split).numpy() for split in SPLITS}
    rows = [
        [
            split,
            f"{counts[split].sum():,}",
            str(counts[split].max()),
            str(counts[split].min()),
            str(len(facts["splits"][split]["absent_classes"])),
        ]
        for split in SPLITS
    ]
    header = ("split", "images", "most in a class", "fewest", "classes absent")
    same = facts["identical_images"]
    listed = "".join(f"\n- {', '.join(group)}" for group in same)
    text = (
        f"{notice(config)}{report.table(header, rows)}\n\nSplits `{data.splits.sha256}` of "
        f"{config.source} `{data.images.fingerprint}`; disjoint by index, as checked.\n\n"
        f"Groups of images with identical pixels under different indices: {len(same)} "
        f"(reported, not removed).{listed}\n"
    )
    run.write_text("report.md", text)
    run.describe(text)
    run.log_params(config.as_text() | {"splits_sha256": data.splits.sha256})
    with run.artifact("figures/splits.png") as path:
        figures.split_counts(counts, np.array(data.splits.pool_counts), path)
    print(text)
