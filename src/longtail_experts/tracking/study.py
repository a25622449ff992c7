"""A study: many trainings, grouped by everything but chance, with what follows for each group.

Read from what the runs recorded (config.yaml, metrics, tags): no logits are downloaded.

Two trainings belong to one group where their configs differ by seeds alone. A group holds them by
(splits, seed). Its intervals (learning/statistics.py) are around the mean over its splits:

training noise only   on the splits at hand: what other seeds would give. All there is where
                      split_seed does not vary; it says nothing about other splits
splits and training   what other splits and seeds would give: the mean of each split is one value
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import mlflow
from mlflow.exceptions import MlflowException

from longtail_experts.config import CHANGES_NO_FIGURE, Config, parse_recipe, to_text
from longtail_experts.data.batches import derive_seed
from longtail_experts.data.sources import first_line
from longtail_experts.learning.losses import KNOBS_OF
from longtail_experts.learning.statistics import (
    Interval,
    between_interval,
    paired_differences,
    within_interval,
)
from longtail_experts.tracking.comparison import (
    KNOBS,
    that_differ,
    unused_fields,
    where_trained,
)
from longtail_experts.tracking.runs import Run, RunError, malformed, open_run, store_to_read

TRAINING, SPLITS_TOO = "training noise only", "splits and training"
REFERENCE = "ce"
CHANCE = ("seed", "expert_seed", "split_seed")
# Where a run computed and what was done around it; what of it differs is listed. Where it can
# change a figure and is all that tells two trainings apart, as in a grid over it, it is a setting.
NOT_A_DIFFERENCE = (
    "data_dir",
    "device",
    "precision",
    "fast",
    "preflight",
    "register_as",
    "checkpoint_every",
)
SPLITS_FOLLOW_FROM = (
    "protocol",
    "source",
    "imbalance_profile",
    "imbalance_factor",
    "images_per_class",
    "subset_rule",
    "split_seed",
)
SHORT = {"imbalance_factor": "IF", "imbalance_profile": "profile"}
IN_LABELS = (*KNOBS, "source", "imbalance_profile", "imbalance_factor", "protocol", "epochs")

Key = tuple[str, str]  # (splits_sha256, seed)


@dataclass(frozen=True)
class Trial:
    """One training, as its run records it."""

    run_id: str
    run_name: str
    started: int  # ms
    fields: Mapping[str, str]  # the config
    metrics: Mapping[str, float]
    tags: Mapping[str, str]
    splits_sha256: str

    @property
    def loss(self) -> str:
        return self.fields["loss"]

    @property
    def seed(self) -> str:
        """What chance in its training came from, the same for every loss."""
        given, seed = self.fields["expert_seed"], self.fields["seed"]
        derived = given == "none" or given == str(derive_seed(int(seed), self.loss))
        return seed if derived else f"expert_seed {given}"

    @property
    def key(self) -> Key:
        return self.splits_sha256, self.seed

    @property
    def settings(self) -> dict[str, str]:
        """What decides it beside chance."""
        unused = unused_fields(self.loss, self.fields)
        without = {*CHANCE, *NOT_A_DIFFERENCE, *unused}
        return {name: value for name, value in self.fields.items() if name not in without}

    @property
    def facts(self) -> dict[str, str]:
        """What does not count as a difference, without where the images lay."""
        around = [name for name in NOT_A_DIFFERENCE if name != "data_dir"]
        return {n: self.fields[n] for n in around if n in self.fields} | where_trained(self.tags)


@dataclass(frozen=True)
class Group:
    """Trainings that differ by chance alone, one of each (splits, seed)."""

    label: str
    settings: Mapping[str, str]
    trials: tuple[Trial, ...]

    @property
    def loss(self) -> str:
        return self.settings["loss"]

    def values(self, metric: str) -> dict[Key, float]:
        """Of the trainings that recorded it as a number."""
        found = {trial.key: trial.metrics.get(metric, math.nan) for trial in self.trials}
        return {key: value for key, value in found.items() if math.isfinite(value)}

    @property
    def num_splits(self) -> int:
        return len({trial.splits_sha256 for trial in self.trials})


@dataclass(frozen=True)
class Study:
    name: str
    run_ids: tuple[str, ...]  # the sweeps it was read from
    groups: tuple[Group, ...]
    num_replaced: int  # trainings of which there is a newer one
    unfinished: tuple[str, ...]  # runs that are no calibrated expert, by name and status
    deleted: tuple[str, ...] = ()  # by name, or by id where nothing else is left of them
    without_run: Mapping[str, int] = field(default_factory=dict)  # trials of the sweep, by state
    status: str = "FINISHED"  # of the sweep's own run

    @property
    def trials(self) -> list[Trial]:
        return [trial for group in self.groups for trial in group.trials]

    @property
    def kinds(self) -> tuple[str, ...]:
        """The intervals that can be told."""
        kinds = []
        if any(len(group.trials) > group.num_splits for group in self.groups):
            kinds.append(TRAINING)
        if any(group.num_splits > 1 for group in self.groups):
            kinds.append(SPLITS_TOO)
        return tuple(kinds) or (TRAINING,)

    def reference_of(self, group: Group) -> Group | None:
        """Cross-entropy under the same settings; None where there is none, or it is this."""
        others = without_loss(group)
        found = [g for g in self.groups if g.loss == REFERENCE and without_loss(g) == others]
        return found[0] if found and group.loss != REFERENCE else None

    def differences(self, group: Group, metric: str) -> dict[Key, float]:
        """From cross-entropy on the same splits with the same seed."""
        reference = self.reference_of(group)
        if reference is None:
            return {}
        return paired_differences(group.values(metric), reference.values(metric))


def without_loss(group: Group) -> dict[str, str]:
    return {n: v for n, v in group.settings.items() if n != "loss" and n not in KNOBS}


def interval(values: Mapping[Key, float], kind: str) -> Interval | None:
    """The interval of that kind, around the mean over splits; None without values."""
    by_split: dict[str, list[float]] = {}
    for (splits, _), value in values.items():
        by_split.setdefault(splits, []).append(value)
    if not by_split:
        return None
    of_kind = between_interval if kind == SPLITS_TOO else within_interval
    return of_kind(list(by_split.values()))


# --- which runs -------------------------------------------------------------------------------


def read_study(sweep_id: str, field: str = "sweep") -> Study:
    """All calibrated experts of a sweep: children of its run, and those that its trials.json
    names because they were finished before it. RunError, naming `field`, where there are none."""
    parent = open_run(sweep_id, field)
    listed, without_run = listed_trials(parent)
    deleted: list[str] = []
    with store_to_read() as client:
        children = client.search_runs(
            [parent.experiment_id],
            f"tags.mlflow.parentRunId = '{parent.run_id}'",
            order_by=["attributes.start_time ASC"],
            max_results=10_000,
        )
        experts = {run.info.run_id: run for run in children if "expert" in run.data.tags}
        for run_id in listed:
            if run_id in experts:
                continue
            try:
                run = client.get_run(run_id)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                deleted.append(run_id)
                continue
            if run.info.lifecycle_stage == "deleted":
                deleted.append(run.info.run_name)
            else:
                experts[run_id] = run
    done = [run for run in experts.values() if run.data.tags.get("calibrated") == "true"]
    if not done:
        raise RunError(
            f"{field}={sweep_id}: none of its {len(children)} child runs is a calibrated expert; "
            "give the id of a sweep's own run, once it has some"
        )
    left_out = [run.info for run in experts.values() if run not in done]
    times = Counter(info.run_name for info in left_out)
    unfinished = [
        f"{info.run_name}{f' {info.run_id[:6]}' * (times[info.run_name] > 1)} ({info.status})"
        for info in left_out
    ]
    found = make_study(parent.name, [sweep_id], [read_trial(run) for run in done], unfinished)
    return replace(found, deleted=tuple(deleted), without_run=without_run, status=parent.status)


def listed_trials(parent: Run) -> tuple[list[str], Counter]:
    """Of the sweep's trials.json, where it has one: run ids, and states of trials without a run."""
    if not parent.has_artifact("trials.json"):
        return [], Counter()
    with malformed(f"run {parent.run_id}: trials.json"):
        trials = parent.read_json("trials.json")
        run_ids = [str(trial["run_id"]) for trial in trials if trial["run_id"]]
        return run_ids, Counter(str(trial["state"]) for trial in trials if not trial["run_id"])


def read_trial(run: mlflow.entities.Run) -> Trial:
    return Trial(
        run_id=run.info.run_id,
        run_name=run.info.run_name,
        started=run.info.start_time,
        fields=recorded_fields(Run(run.info.run_id)),
        metrics=dict(run.data.metrics),
        tags=dict(run.data.tags),
        splits_sha256=run.data.params.get("splits_sha256", "unknown"),
    )


def recorded_fields(run: Run) -> dict[str, str]:
    """config.yaml as text, and today's default of every field that came later.

    A field that is unknown here is kept: the run may be of a newer version.
    """
    fields = {name: to_text(field.default) for name, field in Config.model_fields.items()}
    try:
        given = parse_recipe(run.read_text("config.yaml"), "config.yaml")
        fields |= {n: to_text(tuple(v) if isinstance(v, list) else v) for n, v in given.items()}
        for name in ("seed", "epochs"):  # which are reckoned with
            int(fields[name])
    except ValueError as error:  # ConfigError, or no UTF-8
        raise RunError(f"run {run.run_id}: config.yaml: {first_line(error)}") from None
    return fields


# --- groups -----------------------------------------------------------------------------------


def make_study(
    name: str, run_ids: Sequence[str], trials: Sequence[Trial], unfinished: Sequence[str] = ()
) -> Study:
    """Trials in groups; of several with the same splits and seed, the newest counts.

    Raises RunError where one split_seed stands for unequal splits.
    """
    require_one_split_a_seed(trials)
    apart = telling_apart(trials)
    grouped: dict[tuple, tuple[dict[str, str], dict[Key, Trial]]] = {}
    for trial in sorted(trials, key=lambda t: t.started):
        settings = trial.settings | {name: trial.fields.get(name, "-") for name in apart}
        _, newest = grouped.setdefault(tuple(sorted(settings.items())), (settings, {}))
        newest[trial.key] = trial
    kept = [
        Group("", settings, tuple(in_order(by_key.values())))
        for settings, by_key in grouped.values()
    ]
    kept = sorted(kept, key=lambda group: order_of(group, kept))
    labels = labels_of([group.settings for group in kept])
    groups = tuple(
        Group(label, group.settings, group.trials)
        for label, group in zip(labels, kept, strict=True)
    )
    num_replaced = len(trials) - sum(len(group.trials) for group in groups)
    return Study(name, tuple(run_ids), groups, num_replaced, tuple(unfinished))


def telling_apart(trials: Iterable[Trial]) -> list[str]:
    """Fields of NOT_A_DIFFERENCE that trainings of the same settings, splits and seed differ in,
    as far as these can change a figure."""
    same: dict[tuple, list[Trial]] = {}
    for trial in trials:
        same.setdefault((trial.key, *sorted(trial.settings.items())), []).append(trial)
    return [
        name
        for name in NOT_A_DIFFERENCE
        if name not in CHANGES_NO_FIGURE
        and any(len({t.fields.get(name) for t in alike}) > 1 for alike in same.values())
    ]


def require_one_split_a_seed(trials: Iterable[Trial]) -> None:
    first: dict[tuple, Trial] = {}
    for trial in trials:
        same = tuple(trial.fields.get(name, "") for name in SPLITS_FOLLOW_FROM)
        other = first.setdefault(same, trial)
        if other.splits_sha256 != trial.splits_sha256:
            raise RunError(
                f"run {trial.run_id}: has splits {trial.splits_sha256[:12]} where run "
                f"{other.run_id} has {other.splits_sha256[:12]}, both at split_seed "
                f"{trial.fields['split_seed']}: their images differ, and no interval over both "
                "means anything; study them in two sweeps"
            )


def in_order(trials: Iterable[Trial]) -> list[Trial]:
    return sorted(trials, key=lambda t: (natural(t.fields["split_seed"]), natural(t.seed)))


def natural(text: str) -> list[tuple[float, str]]:
    """A sort key by which 2 comes before 10, and 5e-05 before 0.0001."""
    parts = re.findall(r"[0-9]+(?:\.[0-9]+)?(?:e[-+]?[0-9]+)?|[^0-9]+", text)
    return [(float(p), "") if p[0] in "0123456789" else (-1.0, p) for p in parts]


def order_of(group: Group, among: Sequence[Group]) -> list:
    """Settings that differ, then losses as KNOBS_OF has them, then knobs."""
    varying = [name for name in all_fields(g.settings for g in among) if name not in KNOBS]
    losses = list(KNOBS_OF)
    place = losses.index(group.loss) if group.loss in losses else len(losses)
    others = [natural(group.settings.get(name, "")) for name in varying]
    knobs = [natural(group.settings.get(name, "")) for name in KNOBS]
    return [others, place, group.loss, knobs]


def all_fields(settings: Iterable[Mapping[str, str]]) -> list[str]:
    """Beside the loss, those of IN_LABELS first."""
    names = dict.fromkeys(name for one in settings for name in one if name != "loss")
    return [*(n for n in IN_LABELS if n in names), *(n for n in names if n not in IN_LABELS)]


def labels_of(settings: Sequence[Mapping[str, str]]) -> list[str]:
    """The loss, and what tells groups apart.

    Fields of IN_LABELS appear wherever groups differ in them (a knob: groups of the same loss),
    others where equal labels would remain; the table of settings has them all.
    """
    told = [(one["loss"],) for one in settings]
    for name in all_fields(settings):
        values = [one.get(name, "") for one in settings]
        # Groups among which a difference counts.
        if name in KNOBS:
            among = [(one["loss"],) for one in settings]
        elif name in IN_LABELS:
            among = [()] * len(settings)
        else:
            among = told
        of_each: dict[tuple, set[str]] = {}
        for kin, value in zip(among, values, strict=True):
            of_each.setdefault(kin, set()).add(value)
        told = [
            (*label, f"{SHORT.get(name, name)} {value}")
            if value and len(of_each[kin]) > 1
            else label
            for label, kin, value in zip(told, among, values, strict=True)
        ]
    return [f"{loss} {', '.join(fields)}".strip() for loss, *fields in told]


# --- what differs -----------------------------------------------------------------------------


def differing_settings(study: Study) -> dict[str, list[str]]:
    """Settings beside the loss that are not the same in all groups that have them: name -> value
    of each group."""
    settings = [group.settings for group in study.groups]
    return that_differ(settings, all_fields(settings))


def differing_facts(study: Study) -> dict[str, Counter]:
    """Code, device and the like that are not the same in all trainings: name -> value -> how
    many."""
    facts = [trial.facts for trial in study.trials]
    counted = {name: Counter(one.get(name, "-") for one in facts) for name in names_of_facts(study)}
    return {name: values for name, values in counted.items() if len(values) > 1}


def names_of_facts(study: Study) -> list[str]:
    """What the runs record of code, device and the like, beside what is a setting here."""
    settings = {name for group in study.groups for name in group.settings}
    return sorted({name for trial in study.trials for name in trial.facts} - settings)
