"""An expert on its page: tables, pictures, the success checklist, what was done."""

import math
import shlex
from collections.abc import Mapping
from functools import partial

import numpy as np
import torch
from torch import Tensor

from longtail_experts.config import MLFLOW_RUN, Config, to_text
from longtail_experts.data.batches import derive_seed
from longtail_experts.data.dataset import Dataset
from longtail_experts.data.splits import MOST_UNEVEN
from longtail_experts.learning.at_once import beside_the_others
from longtail_experts.learning.calibration import deployment_scores
from longtail_experts.learning.evaluation import deployment_priors
from longtail_experts.learning.losses import LOSSES
from longtail_experts.learning.metrics import (
    accuracies,
    balanced_accuracy_standard_error,
    reliability,
)
from longtail_experts.tracking import charts, figures, report
from longtail_experts.tracking.checkpoints import read_checkpoint
from longtail_experts.tracking.drawing import draw
from longtail_experts.tracking.experts import notice, recorded_config
from longtail_experts.tracking.identity import shortened
from longtail_experts.tracking.logits import read_logits
from longtail_experts.tracking.runs import (
    Run,
    RunError,
    address_of_picture,
    link_to,
    link_to_artifact,
)

CURVES = "figures/learning_curves.png"
PRIOR_OF = {"test_lt": "its own prior", "test_balanced": "the uniform prior"}
MAX_LISTED = 30  # groups of identical images on a page; MLflow cuts long descriptions


def record_per_class(run: Run, data: Dataset, recalls: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """tables/per_class.json, and recall over class frequency as a figure.

    recalls: split -> (recall float64 [C], images int64 [C]) of argmax f.
    """
    train_counts, pool_counts = data.class_counts("train").tolist(), data.splits.pool_counts
    groups, num_classes = data.groups, data.num_classes
    nothing = (torch.full((num_classes,), math.nan), torch.zeros(num_classes, dtype=torch.int64))
    every = {split: recalls.get(split, nothing) for split in ("val_lt", "test_lt", "test_balanced")}
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
        for split, (recall, _) in every.items():
            value = float(recall[c])
            row[f"recall_{split}"] = None if math.isnan(value) else value
        row |= {f"n_{split}": int(images[c]) for split, (_, images) in every.items()}
        rows.append(row)
    run.write_json("tables/per_class.json", rows)
    with run.artifact("figures/per_class_accuracy.png") as path:
        recall, is_head = recalls["test_balanced"][0].numpy(), groups["head"].numpy()
        draw(partial(figures.per_class_accuracy, recall, np.array(pool_counts), is_head, path))


def record_figures(
    run: Run,
    data: Dataset,
    logits: Mapping[str, Tensor],
    temperature: float | Tensor,
    log_offset: Tensor,
    prior: Tensor,
) -> None:
    """Learning curves, and reliability before and after the temperature (one, or one a row)."""
    record_curves(run, data)
    deployment = deployment_priors(data.targets_if_any("test_lt"), data.num_classes)
    after = report.name_of_temperature(temperature)
    panels = {
        f"{split} under {PRIOR_OF[split]}": {
            label: reliability(
                deployment_scores(logits[split], t, log_offset, prior, q).softmax(1),
                data.targets(split),
            )
            for label, t in (("T = 1", 1.0), (after, temperature))
        }
        for split, q in deployment.items()
    }
    with run.artifact("figures/reliability.png") as path:
        draw(partial(figures.reliability, panels, path))


def record_curves(run: Run, data: Dataset) -> None:
    num_images = {}
    if "val_lt" in data.split_names:
        targets = data.targets("val_lt")
        num_images = {name: int(mask[targets].sum()) for name, mask in data.groups.items()}
        num_images["balanced"] = len(targets)
    curves = ["lr", "train/loss", *(f"val/{name}_accuracy" for name in num_images)]
    histories = {name: run.history(name) for name in curves}
    with run.artifact(CURVES) as path:
        best = run.metrics.get("best/step")
        draw(partial(figures.learning_curves, histories, num_images, best, path))


def describe_trained(run: Run, config: Config, data: Dataset) -> None:
    """The page of a run that `train` has finished and nothing has calibrated yet."""
    run.describe(
        f"{notice(config)}Trained under {config.loss}, not calibrated. The expert is "
        f"{which_checkpoint(run.metrics, data)}.\n\n"
        f"Next: `{MLFLOW_RUN} -e calibrate -P run_id={run.run_id}`"
    )


def approximation_notice(loss: str) -> str:
    if LOSSES[loss].is_exact:
        return ""
    return (
        f"\n\n**Approximate:** no constant makes the logits of {loss} a log-posterior. log_offset "
        "is that of the loss without focusing or margins; adjusted accuracies, NLL, Brier and ECE "
        "use it."
    )


def uneven_notice(class_counts: Tensor) -> str:
    """Of test images whose classes are too unequal for the uniform prior to be theirs: CIFAR's
    without val_lt are 80 to 99 a class."""
    least, most = int(class_counts.min()), int(class_counts.max())
    if most <= MOST_UNEVEN * least:
        return ""
    return (
        f"\n\n**Uneven:** the classes of test_balanced have {least:,} to {most:,} images. NLL, "
        "Brier and ECE on it are of scores under the uniform prior but means over images, in which "
        "classes with more of them weigh more; `balanced` is a mean over classes."
    )


def which_checkpoint(metrics: Mapping[str, float], data: Dataset) -> str:
    if "best/epoch" not in metrics:
        return f"the last checkpoint, of epoch {int(metrics['epoch'])}; nothing was selected"
    return (
        f"the checkpoint of epoch {int(metrics['best/epoch'])}, best on val_lt "
        f"({100 * metrics['best/val_balanced_accuracy']:.2f} % balanced, n = "
        f"{data.size('val_lt'):,})"
    )


def record_report(run: Run, data: Dataset, logits: Mapping[str, Tensor]) -> None:
    """report.md and the description; the tag `calibrated` says that the record is complete."""
    metrics, config = run.metrics, recorded_config(run)
    checks = success_checklist(run, config, data, logits)
    balanced = metrics["test_balanced/balanced_accuracy"]
    result = [
        f"{notice(config)}## {config.loss}: test_balanced balanced accuracy {100 * balanced:.2f} %",
        accuracy_table(metrics, data, logits),
        report.calibration_markdown(metrics)
        + approximation_notice(config.loss)
        + uneven_notice(data.class_counts("test_balanced")),
    ]
    rest = [
        f"## Success checklist\n\n{report.checklist_markdown(checks)}",
        f"## What was done\n\n{what_was_done(run, config, data)}",
    ]
    run.write_text("report.md", "\n\n".join([*result, *rest]) + "\n")
    run.describe("\n\n".join([*result, curves_markdown(run), *rest]))
    run.set_tags({"calibrated": "true"})
    for check in checks:
        print(report.box(check))


def curves_markdown(run: Run) -> str:
    """The picture, and the way to the curves that can be zoomed."""
    return (
        f"![learning curves]({address_of_picture(run, CURVES)})\n\n"
        f"[Learning curves of all experts]({charts.link_to_curves(run)}) · [figures]"
        f"({link_to_artifact(run, 'figures')})"
    )


def accuracy_table(
    metrics: Mapping[str, float], data: Dataset, logits: Mapping[str, Tensor]
) -> str:
    """Accuracies of argmax f in percent, means over classes with their standard error and n."""
    groups, columns = data.groups, {}
    for split in ("test_balanced", "test_lt", "val_lt"):
        if split not in data.split_names:
            continue
        targets, predictions = data.targets(split), logits[split].argmax(1)
        values = accuracies(predictions, targets, groups, data.num_classes)
        cells = columns[split] = []
        for name in ("balanced", *groups):
            mask = groups.get(name, torch.ones(data.num_classes, dtype=torch.bool))
            value, n = values.get(f"{name}_accuracy"), int(mask[targets].sum())
            error = balanced_accuracy_standard_error(predictions, targets, data.num_classes, mask)
            cells.append("-" if value is None else report.with_error(value, error, n))
        cells.append(report.percent(values["accuracy"]))
        cells.append(report.percent(metrics.get(f"{split}/adjusted_balanced_accuracy")))
    names = ("balanced", *groups, "overall", "adjusted balanced")
    rows = [[name, *cells] for name, *cells in zip(names, *columns.values(), strict=True)]
    return (
        f"{report.table(('accuracy, %', *columns), rows)}\n\n"
        "Means over classes ± standard error (n images); overall: over images."
    )


def success_checklist(
    run: Run, config: Config, data: Dataset, logits: Mapping[str, Tensor]
) -> list[report.Check]:
    """Every box, computed from what the store gives back."""
    metrics, tags = run.metrics, run.tags
    losses = [value for _, value in run.history("train/loss")]
    selected, split = "val_lt" in data.split_names, "test_lt"
    if split not in data.split_names:
        split = "test_balanced"
    expected, rows, problem = {name: data.size(name) for name in data.split_names}, {}, ""
    problems = {}
    with beside_the_others():
        try:
            stored = read_logits(run).splits
            rows = {name: len(of_split.targets) for name, of_split in stored.items()}
        except RunError as failure:
            problem = str(failure)
        for name in ("best", "last", "final_calibrated")[not selected :]:
            try:
                read_checkpoint(run, name)
                problems[name] = ""
            except RunError as failure:
                problems[name] = str(failure)
    checks = [
        report.trained_to_the_end(
            int(metrics.get("epoch", -1)) + 1,
            config.epochs,
            tags.get("training") == "early_stopped",
            losses,
        )
    ]
    if selected:
        error = balanced_accuracy_standard_error(
            logits["val_lt"].argmax(1), data.targets("val_lt"), data.num_classes
        )
        first = run.history("val/balanced_accuracy")[0][1]
        best = metrics["best/val_balanced_accuracy"]
        checks.append(report.validation_improved(best, first, data.num_classes, error))
    return [
        *checks,
        report.temperature_helps(
            metrics["temperature"],
            report.at_bound_notice(metrics) if metrics["temperature_at_bound"] else "",
            metrics[f"{split}/nll"],
            metrics[f"{split}/nll_uncalibrated"],
            split,
        ),
        report.logits_complete(rows, expected, problem),
        report.checkpoints_load(problems),
    ]


def what_was_done(run: Run, config: Config, data: Dataset) -> str:
    metrics, tags = run.metrics, run.tags
    images, epochs = data.images, int(metrics["epoch"]) + 1
    sizes = ", ".join(f"{split} {data.size(split):,}" for split in data.split_names)
    subset = ""
    if config.protocol == "literature":
        subset = "LDAM's subset; " if config.subset_rule == "ldam" else "own subset; "
    return "\n".join(
        [
            f"- ResNet-32 ({config.shortcut} shortcut) under {config.loss}, "
            f"{epochs} epochs; {which_checkpoint(metrics, data)}, gave everything above",
            f"- protocol {config.protocol}: {subset}images: {images.source}, fingerprint "
            f"`{images.fingerprint[:12]}`, splits "
            f"`{data.splits.sha256[:12]}` ({sizes}); "
            f"{data.manifest['num_identical_groups']} groups of identical pixels, see "
            "splits/manifest.json",
            machine_and_commit(tags),
            f"- to repeat: `{repeat_command(config)}`",
        ]
    )


def machine_and_commit(tags: Mapping[str, str]) -> str:
    """Those of its start, and what was different where it was gone on with."""
    words = (
        f"- on {tags.get('device')}, {tags.get('precision')}; commit "
        f"`{tags.get('git.commit', 'unknown')[:12]}`"
        f"{' with uncommitted changes' if tags.get('git.dirty') == 'true' else ''}"
    )
    if count := tags.get("resumed"):
        words += f"; resumed {'once' if count == '1' else f'{count} times'}{later('resumed', tags)}"
    calibrated = later("calibrated", tags)
    return f"{words}; calibrated{calibrated}" if calibrated else words


def later(stage: str, tags: Mapping[str, str]) -> str:
    """What tags say was different when the stage went on."""
    names = sorted(name for name in tags if name.startswith(f"{stage}."))
    told = ", ".join(
        f"{name.removeprefix(f'{stage}.')} `{shortened(name, tags[name]).replace(', ', '`, `')}`"
        for name in names
    )
    return f" with {told}" if told else ""


def repeat_command(config: Config) -> str:
    """The `mlflow run` line that gives this expert: what differs from the full recipe."""
    skipped = {"loss", "device", "preflight"}
    if config.expert_seed == derive_seed(config.seed, config.loss):
        skipped.add("expert_seed")
    given = config.model_dump()
    changed = [
        f" -P {shlex.quote(f'{name}={to_text(given[name])}')}"
        for name, field in Config.model_fields.items()
        if name not in skipped and given[name] != field.default
    ]
    return f"{MLFLOW_RUN} -P loss={config.loss} -P config=cifar100_lt{''.join(changed)}"


def describe_parent(
    parent: Run, config: Config, children: Mapping[str, str], failures: Mapping[str, str]
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
    for loss, reason in failures.items():
        rows.append([f"{loss}: FAILED ({reason.replace('|', '/')})", *["-"] * 9])
    header = ("test_balanced, %", *report.ACCURACIES, "T")
    parts = [f"{notice(config)}{report.table(header, rows)}"]
    if len(children) > 1 and "compare" not in failures:
        page = link_to_artifact(parent, "comparison/index.html")
        parts.append(f"[The experts compared, and their ensembles, with figures]({page})")
    parts.append(f"[Learning curves of all experts]({charts.link_to_curves(parent)})")
    parts.append(f"## What was done\n\n{machine_and_commit(parent.tags)}")
    for run_id in list(children.values())[:1]:
        parts[-1] += f"\n- splits `{Run(run_id).params['splits_sha256'][:12]}`"
    parts[-1] += f"\n- to repeat: `{repeat_command(config)}`"
    parent.describe("\n\n".join(parts))


def split_table(data: Dataset) -> str:
    """Sizes of the splits, and how many classes each lacks."""
    rows = []
    for split in data.split_names:
        counts = data.class_counts(split)
        numbers = (int(counts.max()), int(counts.min()), int((counts == 0).sum()))
        rows.append([split, f"{data.size(split):,}", *map(str, numbers)])
    return report.table(("split", "images", "most in a class", "fewest", "classes absent"), rows)


def record_split_report(run: Run, config: Config, data: Dataset) -> None:
    """Sizes, absent classes and identical images of the splits, in words and as a figure."""
    counts = {split: data.class_counts(split).numpy() for split in data.split_names}
    same = data.manifest["identical_images"]
    listed = "\n".join(f"- {', '.join(group)}" for group in same[:MAX_LISTED])
    parts = [
        f"{notice(config)}{split_table(data)}\n\nSplits `{data.splits.sha256}` of "
        f"{config.source} `{data.images.fingerprint}`; disjoint by index, as checked.\n\n"
        f"Groups of images with identical pixels under different indices: {len(same)} "
        "(reported, not removed; all in splits/manifest.json).",
        *([listed] if listed else []),
    ]
    text = "\n\n".join(parts) + "\n"
    run.write_text("report.md", text)
    run.describe(report.fitting(parts, "The first of them are in report.md."))
    run.log_params(config.as_text() | {"splits_sha256": data.splits.sha256})
    with run.artifact("figures/splits.png") as path:
        figures.split_counts(counts, np.array(data.splits.pool_counts), path)
    print(text)
