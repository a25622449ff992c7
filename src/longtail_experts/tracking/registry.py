"""The calibrated expert in the model registry; the alias `champion` on the best of its name."""

import logging
import math
import shlex
from typing import NamedTuple

import mlflow
import numpy as np
from mlflow.entities import LoggedModelStatus

from longtail_experts.config import MLFLOW_RUN
from longtail_experts.data.locks import host_lock
from longtail_experts.data.sources import first_line
from longtail_experts.tracking.interrupts import delayed_signals
from longtail_experts.tracking.logits import SplitLogits, read_logits
from longtail_experts.tracking.runs import Run, RunError, open_run
from longtail_experts.tracking.stores import require_answer

log = logging.getLogger(__name__)

CHAMPION = "champion"
JUDGED_BY = "best/val_balanced_accuracy"  # never a figure of the test images
JUDGED = "champion_when_registered"  # the tag that ends a registration


class Difference(NamedTuple):
    """Of two balanced accuracies on the same images, in [-1, 1]."""

    value: float
    standard_error: float


def register(run: Run, name: str) -> None:
    """A new version of the registered model `name`, made of the run's expert; champion where it
    is the first, or better on val_lt than the champion on the same splits.

    A run whose registration was completed before is left alone; one that was cut off goes on.
    Whatever fails, a warning says how to repeat it: a finished expert does not fail for that.
    """
    try:
        registry = mlflow.get_registry_uri()
        require_answer(registry)
        with host_lock(f"{registry} {name}"):  # two would both challenge the third
            outcome = _register(run, name)
    except Exception as error:
        log.warning(
            "register_as=%s: not registered (%s); to repeat it: %s -P resume=%s -P register_as=%s",
            name,
            first_line(error)[:200],
            MLFLOW_RUN,
            run.run_id,
            shlex.quote(name),
        )
        return
    if outcome:
        print(f"registered as {name}: {outcome}")


def _register(run: Run, name: str) -> str | None:
    """What came of it, in words; nothing where the run was registered before."""
    client = run.client
    model_id, of_run = model_id_of(run), f"name = '{name}' and run_id = '{run.run_id}'"
    # The run's owner may have registered another model of it under this name.
    begun = [v for v in client.search_model_versions(of_run) if model_id in v.source]
    last_name = run.tags.get("registered_as", "").rpartition("/")[0]
    if begun and (any(JUDGED in v.tags for v in begun) or last_name == name):
        return None  # where the model was deleted since, it is registered anew
    if begun:
        version = begun[0].version
    else:
        model = f"models:/{model_id}"
        with delayed_signals():
            version = mlflow.register_model(model, name, await_registration_for=0).version
    outcome, difference = challenge(run, name, version)
    if difference is not None:  # first: as champion it would have nothing to differ from
        names = ("champion/difference", "champion/difference_standard_error")
        values = dict(zip(names, difference, strict=True))  # under another name it had others
        run.replace_metrics(values, int(run.metrics["best/step"]))
    if outcome.is_champion:
        client.set_registered_model_alias(name, CHAMPION, version)
    is_champion = str(outcome.is_champion).lower()
    run.set_tags({"registered_as": f"{name}/{version}", JUDGED: is_champion})
    client.set_model_version_tag(name, version, JUDGED, is_champion)  # a run may have many names
    return f"version {version}, {outcome.words}"


class Outcome(NamedTuple):
    is_champion: bool
    words: str


def challenge(run: Run, name: str, version: str) -> tuple[Outcome, Difference | None]:
    """Whether the run's expert, of this version, is to be champion, in words, and by how much it
    differs."""
    aliases = run.client.get_registered_model(name).aliases
    if CHAMPION not in aliases:
        return Outcome(True, f"its first {CHAMPION}"), None
    reigning = run.client.get_model_version(name, aliases[CHAMPION])
    if str(reigning.version) == str(version):
        return Outcome(True, f"its {CHAMPION} already"), None
    try:
        if not reigning.run_id:
            raise RunError("it was registered without one")
        champion = open_run(reigning.run_id)
        same_splits = champion.params.get("splits_sha256") == run.params.get("splits_sha256")
        theirs = champion.metrics[JUDGED_BY]
        of_champion = read_logits(champion).splits["val_lt"] if same_splits else None
    except (RunError, KeyError) as error:
        words = f"version {reigning.version} stays {CHAMPION}, its run cannot be read ({error})"
        return Outcome(False, words), None
    if of_champion is None:
        return Outcome(
            False,
            f"version {reigning.version} stays {CHAMPION}: it was selected on other splits, so "
            "that the two cannot be compared",
        ), None
    ours = run.metrics[JUDGED_BY]
    difference = paired_difference(read_logits(run).splits["val_lt"], of_champion)
    by = (
        f"{100 * ours:.2f} % balanced on val_lt against {100 * theirs:.2f} % of version "
        f"{reigning.version} (difference {100 * difference.value:+.2f} ± "
        f"{100 * difference.standard_error:.2f} points)"
    )
    if ours > theirs:
        return Outcome(True, f"{CHAMPION} with {by}"), difference
    return Outcome(False, f"version {reigning.version} stays {CHAMPION}, {by}"), difference


def paired_difference(ours: SplitLogits, theirs: SplitLogits) -> Difference:
    """Balanced accuracy of argmax f, ours - theirs on the same images, and its standard error.

    With d_i = [ours right] - [theirs right] and n_c images of class c out of C present:
    sum_c (sum_i d_i / n_c) / C, with standard error sqrt(sum_i (d_i / n_c)^2) / C. Squares about
    zero, not about the class mean: a class of one image, where the two differ, has an error too.
    """
    targets = ours.targets
    d = (ours.logits.argmax(1) == targets).astype(float) - (theirs.logits.argmax(1) == targets)
    counts = np.bincount(targets, minlength=ours.logits.shape[1])
    weighted = d / counts[targets] / np.count_nonzero(counts)
    return Difference(float(weighted.sum()), math.sqrt(float((weighted**2).sum())))


def model_id_of(run: Run) -> str:
    """Of the expert that the run logged last."""
    whole = [model for model in run.logged_experts if model.status == LoggedModelStatus.READY]
    if not whole:
        raise RunError(f"run {run.run_id}: holds no logged expert to register")
    return whole[-1].model_id
