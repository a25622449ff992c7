"""Finished experts beside each other: which ones, what their runs hold, and what follows."""

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import mlflow
import numpy as np
import torch
from mlflow.exceptions import MlflowException
from torch import Tensor

from longtail_experts.config import MLFLOW_RUN, Config, to_text
from longtail_experts.data.longtail import class_groups
from longtail_experts.data.splits import POOL_SPLITS
from longtail_experts.learning.calibration import deployment_scores, of_the_other_half
from longtail_experts.learning.ensembles import ENSEMBLES, disagreement, error_overlap
from longtail_experts.learning.evaluation import (
    deployment_priors,
    evaluate_scores,
    posthoc_accuracies,
)
from longtail_experts.learning.losses import KNOBS_OF
from longtail_experts.learning.metrics import (
    balanced_accuracy_standard_error,
    per_class_recall,
    reliability,
)
from longtail_experts.tracking import report
from longtail_experts.tracking.experts import recorded_config
from longtail_experts.tracking.logits import ExpertLogits, read_logits, require_calibrated
from longtail_experts.tracking.runs import (
    NOT_THERE,
    Run,
    RunError,
    launched_run_id,
    malformed,
    open_run,
    require_not_deleted,
    store_to_read,
)

DEPLOYMENTS = {"uniform": "test_balanced", "test_lt": "test_lt"}  # prior q -> split scored under it
POSTHOC_TAUS = tuple(step / 4 for step in range(9))  # 0 ... 2
MOST = 28  # experts in one comparison: seven colours in four line styles
WHERE_TRAINED = (
    "device",
    "processor",
    "precision",
    "step_path",
    "torch",
    "git.commit",
    "git.dirty",
    "code_sha256",
)
NOT_A_DIFFERENCE = ("loss", "data_dir", "preflight", "register_as")
# With this value of a field another is not looked at.
IDLE = {("imbalance_profile", "natural"): "imbalance_factor", ("lr_schedule", "cosine"): "lr_decay"}
KNOBS = tuple(dict.fromkeys(knob for knobs in KNOBS_OF.values() for knob in knobs))


@dataclass(frozen=True)
class Member:
    """One expert of a comparison, as its run records it."""

    label: str
    run_id: str
    run_name: str
    loss: str
    metrics: Mapping[str, float]
    facts: Mapping[str, str]  # config, and where and how it was trained
    splits_sha256: str
    pool_counts: tuple[int, ...]
    seconds: float  # from the run's start to its end
    training_seconds: float  # of training steps
    expert: ExpertLogits

    def scores(self, split: str, deployment: Tensor, temperature: float | None = None) -> Tensor:
        """Log-posterior under the deployment prior q [C], float64 [N, C]; T of the expert."""
        return deployment_scores(
            self.logits(split),
            self.temperature_on(split) if temperature is None else temperature,
            torch.tensor(self.expert.log_offset),
            torch.tensor(self.expert.prior),
            deployment,
        )

    def temperature_on(self, split: str) -> float | Tensor:
        """T; where it was cross-fitted on these very images (protocol=literature), for each row
        that of the half it is not in, float64 [N, 1]."""
        halves = [self.metrics.get(f"temperature_half_{half}") for half in (0, 1)]
        if split != "test_balanced" or None in halves:
            return self.expert.temperature
        seed = int(self.facts["split_seed"])
        return of_the_other_half(tuple(halves), self.targets(split), seed)

    def logits(self, split: str) -> Tensor:
        return torch.tensor(self.expert.splits[split].logits)

    def targets(self, split: str) -> Tensor:
        return torch.tensor(self.expert.splits[split].targets)

    @property
    def groups(self) -> dict[str, Tensor]:
        masks = class_groups(self.pool_counts)
        return {name: torch.from_numpy(mask) for name, mask in masks.items()}


# --- which runs -------------------------------------------------------------------------------


def chosen_runs(
    run_ids: Sequence[str], experiment: str, tags: Mapping[str, str], last: int | None
) -> list[Run]:
    """The runs named, or those of an experiment that carry `tags`: the newest `last` of them, or
    where that is not given either, the newest of each expert. Only calibrated experts."""
    if run_ids:
        runs = [open_run(run_id) for run_id in run_ids]
        for run in runs:
            require_calibrated(run)
        return runs
    launched = launched_run_id()
    here = open_run(launched).experiment_id if launched and not experiment else ""
    with store_to_read() as client:
        in_experiment = client.search_runs(
            [here or experiment_id(client, experiment)],
            "tags.calibrated = 'true'",
            order_by=["attributes.start_time DESC"],
            max_results=10_000,
        )
    asked = {"calibrated": "true", **tags}
    found = [
        run
        for run in in_experiment
        if "expert" in run.data.tags
        and all(run.data.tags.get(name) == value for name, value in asked.items())
    ]
    if last is not None:
        found = found[:last]
    elif not tags:
        newest: dict[str, mlflow.entities.Run] = {}
        for run in found:
            newest.setdefault(run.data.tags.get("expert", ""), run)
        found = list(newest.values())
    if not found:
        raise RunError(
            "no calibrated expert is in the experiment"
            + (" with these tags" if tags else "")
            + f": train one first ({MLFLOW_RUN} -P loss=ce), or give -P run_ids=a,b,c"
        )
    return [Run(run.info.run_id) for run in reversed(found)]


def experiment_id(client: mlflow.MlflowClient, name: str) -> str:
    """Of the experiment named, or of that into which a run started now would go."""
    asked = (
        ("experiment", name),
        ("MLFLOW_EXPERIMENT_ID", os.environ.get("MLFLOW_EXPERIMENT_ID")),
        ("MLFLOW_EXPERIMENT_NAME", os.environ.get("MLFLOW_EXPERIMENT_NAME")),
        ("experiment", "Default"),
    )
    field, value = next((field, value) for field, value in asked if value)
    said = f"{field}={value[:60]}"
    find = client.get_experiment if field.endswith("_ID") else client.get_experiment_by_name
    try:
        found = find(value)
    except MlflowException as error:
        if error.error_code not in NOT_THERE:
            raise
        found = None
    if found is None:
        names = [e.name for e in client.search_experiments(max_results=11)]
        known = ", ".join([*names[:10], *["..."] * (len(names) > 10)])
        raise RunError(f"{said}: not in the store; there are: {known}")
    require_not_deleted(found, f"{said}:")
    return found.experiment_id


# --- what they hold ---------------------------------------------------------------------------


def read_members(runs: Sequence[Run]) -> list[Member]:
    """Logits, metrics and settings of each; RunError where something is missing or altered."""
    if len(runs) > MOST:
        raise RunError(f"{len(runs)} experts at once; {MOST} can be told apart, as in last={MOST}")
    tags = [run.tags for run in runs]
    configs = [recorded_config(run) for run in runs]
    ids = [run.run_id for run in runs]
    for run_id, times in Counter(ids).items():
        if times > 1:
            raise RunError(f"run_ids: {run_id} is given {times} times")
    labels = distinct_labels([(c.loss, knobs_of(c), str(c.seed)) for c in configs], ids)
    members = []
    for run, config, tag, label in zip(runs, configs, tags, labels, strict=True):
        with malformed(f"run {run.run_id}: splits/manifest.json"):
            manifest = run.read_json("splits/manifest.json")
            pool_counts = tuple(int(n) for n in manifest["pool_counts"])
            num_train = int(manifest["splits"]["train"]["size"])
            of_pool = [of for name, of in manifest["splits"].items() if name in POOL_SPLITS]
            if np.sum([of["class_counts"] for of in of_pool], axis=0).tolist() != [*pool_counts]:
                raise ValueError("pool_counts are not those of its splits")
        rates = [rate for _, rate in run.history("train/images_per_second")]
        members.append(
            Member(
                label=label,
                run_id=run.run_id,
                run_name=run.name,
                loss=config.loss,
                metrics=run.metrics,
                facts=config.as_text() | where_trained(tag),
                splits_sha256=run.params.get("splits_sha256", "unknown"),
                pool_counts=pool_counts,
                seconds=run.seconds,
                training_seconds=sum(num_train / rate for rate in rates if rate > 0),
                expert=read_logits(run),
            )
        )
    return members


def knobs_of(config: Config) -> dict[str, str]:
    """Those that the loss has; it is the same expert at any value of the others."""
    return {knob: to_text(getattr(config, knob)) for knob in KNOBS_OF.get(config.loss, ())}


def distinct_labels(
    names: Sequence[tuple[str, Mapping[str, str], str]], run_ids: Sequence[str]
) -> list[str]:
    """(loss, knobs, seed) as `loss`, with the knobs that differ, the seed, or else a part of the
    run id, where that is not enough."""
    values: dict[tuple[str, str], set[str]] = {}
    for loss, knobs, _ in names:
        for knob, value in knobs.items():
            values.setdefault((loss, knob), set()).add(value)
    with_knobs = [
        " ".join([loss, *(f"{k} {v}" for k, v in knobs.items() if len(values[loss, k]) > 1)])
        for loss, knobs, _ in names
    ]
    of_seed = list(zip(with_knobs, (seed for *_, seed in names), strict=True))
    experts, seeds = Counter(with_knobs), Counter(of_seed)
    labels = []
    for (label, seed), run_id in zip(of_seed, run_ids, strict=True):
        if experts[label] == 1:
            labels.append(label)
        elif seeds[label, seed] == 1:
            labels.append(f"{label} seed {seed}")
        else:
            labels.append(f"{label} {run_id[:6]}")
    return labels


def require_comparable(members: Sequence[Member], different_splits: bool) -> bool:
    """Whether all were trained and tested on the same splits; RunError where they were not and
    that was not asked for, or where they know different classes."""
    first = members[0]
    for member in members[1:]:
        if member.expert.class_names != first.expert.class_names:
            raise RunError(
                f"run {member.run_id} (of {member.facts.get('source')}): has other classes than "
                f"{first.run_id} (of {first.facts.get('source')}); experts of different classes "
                "cannot be compared: name those of one with -P run_ids=a,b,c"
            )
    hashes = {member.splits_sha256 for member in members}
    if len(hashes) == 1:
        for member in members[1:]:
            for split, of_first in first.expert.splits.items():
                if not np.array_equal(member.expert.splits[split].targets, of_first.targets):
                    raise RunError(
                        f"run {member.run_id}: {split} has other targets than in {first.run_id}, "
                        "under the same splits_sha256: one of the two was altered"
                    )
        return True
    if not different_splits:
        listed = ", ".join(f"{m.label} {m.run_id}: {m.splits_sha256[:12]}" for m in members)
        raise RunError(
            f"experts of different splits ({listed}): name runs of one with -P run_ids=a,b,c, or "
            "add -P different_splits=true for the table alone"
        )
    return False


# --- what follows -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Together:
    """Members and ensembles under one deployment prior; rows in the order of `labels`."""

    deployment: str
    split: str
    labels: list[str]  # members, then ensembles
    metrics: dict[str, dict[str, float]]
    errors: dict[str, dict[str, float]]  # standard error of <group>_accuracy
    disagreement: np.ndarray  # [M, M], of members
    error_overlap: np.ndarray  # [M, M]


def together(members: Sequence[Member], deployment: str) -> Together:
    """Every member converted to the deployment prior, then combined; same splits only."""
    first, split = members[0], DEPLOYMENTS[deployment]
    q, targets = prior_of_deployment(first, deployment), first.targets(split)
    scores = {member.label: member.scores(split, q) for member in members}
    predictions = [values.argmax(1) for values in scores.values()]
    if len(members) > 1:
        of_members = list(scores.values())
        scores |= {name: combine(of_members) for name, combine in ENSEMBLES.items()}
    return Together(
        deployment=deployment,
        split=split,
        labels=list(scores),
        metrics={n: evaluate_scores(s, targets, first.groups) for n, s in scores.items()},
        errors={n: standard_errors(s.argmax(1), targets, first.groups) for n, s in scores.items()},
        disagreement=disagreement(predictions).numpy(),
        error_overlap=error_overlap(predictions, targets).numpy(),
    )


def prior_of_deployment(member: Member, deployment: str) -> Tensor:
    """q, float64 [C]."""
    lt = member.targets("test_lt") if "test_lt" in member.expert.splits else None
    priors = deployment_priors(lt, len(member.expert.class_names))
    if DEPLOYMENTS[deployment] not in priors:
        raise RunError(
            f"deployment={deployment}: run {member.run_id} has no split test_lt (protocol="
            "literature); give uniform"
        )
    return priors[DEPLOYMENTS[deployment]]


def standard_errors(
    predictions: Tensor, targets: Tensor, groups: Mapping[str, Tensor]
) -> dict[str, float]:
    num_classes = len(groups["head"])
    masks = {"balanced": torch.ones(num_classes, dtype=torch.bool), **groups}
    return {
        f"{name}_accuracy": balanced_accuracy_standard_error(
            predictions, targets, num_classes, mask
        )
        for name, mask in masks.items()
        if bool(mask[targets].any())
    }


def recall_of(member: Member) -> np.ndarray:
    """Recall of argmax f on test_balanced, [C]; nan for a class without images."""
    logits, targets = member.logits("test_balanced"), member.targets("test_balanced")
    return per_class_recall(logits.argmax(1), targets, logits.shape[1])[0].numpy()


def posthoc_of(member: Member) -> dict[float, dict[str, float]]:
    """tau -> accuracies on test_balanced under post-hoc logit adjustment; nothing is trained."""
    return posthoc_accuracies(
        member.logits("test_balanced"),
        member.targets("test_balanced"),
        temperature=member.temperature_on("test_balanced"),
        log_offset=torch.tensor(member.expert.log_offset),
        prior=torch.tensor(member.expert.prior),
        groups=member.groups,
        taus=POSTHOC_TAUS,
    )


def reliability_panels(
    members: Sequence[Member], deployment: str
) -> dict[str, dict[str, np.ndarray]]:
    """Bins before and after scaling, by a title for each member."""
    split, panels = DEPLOYMENTS[deployment], {}
    for member in members:
        q = prior_of_deployment(member, deployment)
        panels[f"{member.label} on {split}"] = {
            label: reliability(member.scores(split, q, t).softmax(1), member.targets(split))
            for label, t in (("T = 1", 1.0), (name_of_temperature(member, split), None))
        }
    return panels


def name_of_temperature(member: Member, split: str) -> str:
    at_bound = " (bound)" if member.metrics.get("temperature_at_bound") else ""
    return report.name_of_temperature(member.temperature_on(split)) + at_bound


def where_trained(tags: Mapping[str, str]) -> dict[str, str]:
    """Of a run's tags: on what, and by which code, it was trained and calibrated."""
    later = ("resumed", "calibrated.")
    return {n: v for n, v in tags.items() if n in WHERE_TRAINED or n.startswith(later)}


def differences(members: Sequence[Member]) -> dict[str, list[str]]:
    """Settings beside the loss that are not the same in all members: name -> value of each, "-"
    where a loss does not look at it."""
    without = [{*NOT_A_DIFFERENCE, *unused_fields(m.loss, m.facts)} for m in members]
    seen = [
        {n: v for n, v in m.facts.items() if n not in fields}
        for m, fields in zip(members, without, strict=True)
    ]
    names = dict.fromkeys(name for one in seen for name in one)
    return that_differ(seen, names, usual=Config().as_text())


def unused_fields(loss: str, fields: Mapping[str, str]) -> set[str]:
    """Fields that a training does not look at: it is the same at any value of them."""
    unused = set(KNOBS) - set(KNOBS_OF.get(loss, KNOBS))  # an unknown loss may have any knob
    for (field, value), idle in IDLE.items():
        unused |= {idle} if fields.get(field) == value else set()
    return unused


def that_differ(
    settings: Sequence[Mapping[str, str]],
    names: Iterable[str],
    usual: Mapping[str, str] | None = None,
) -> dict[str, list[str]]:
    """Of the names, those that are not the same everywhere: name -> value in each of `settings`.

    A knob among the losses that have it; where `usual` says what knobs are by default, also one
    that is something else and that not all losses have."""
    values = {name: [one.get(name, "-") for one in settings] for name in names}

    def differs(name: str, of_each: set[str]) -> bool:
        if name not in KNOBS:
            return len(of_each) > 1
        told = of_each - {"-"}
        is_as_usual = usual is None or told <= {usual[name]}
        return len(told) > 1 or (len(of_each) > 1 and not is_as_usual)

    return {name: of_each for name, of_each in values.items() if differs(name, {*of_each})}
