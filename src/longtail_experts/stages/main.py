"""Entry point `main`: train, then calibrate, in one run; with loss=all one child run a loss.

The one stage made of others: it is `train` followed by `calibrate`, and for loss=all `compare`.
"""

import logging
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from longtail_experts.config import LOSS_NAMES, Config
from longtail_experts.data.dataset import Dataset
from longtail_experts.data.sources import first_line
from longtail_experts.learning.at_once import at_once, beside_the_others
from longtail_experts.learning.step import NonFiniteLossError
from longtail_experts.stages import compare
from longtail_experts.stages.calibrate import calibrate_expert, load_trained
from longtail_experts.stages.checks import require_ready
from longtail_experts.stages.inputs import build_network, for_one_expert, trains_at_once
from longtail_experts.stages.train import train_expert
from longtail_experts.tracking import expert_report, experts
from longtail_experts.tracking.drawing import drawing_processes
from longtail_experts.tracking.interrupts import delayed_signals, heed, stop_if_heeded
from longtail_experts.tracking.logits import is_calibrated
from longtail_experts.tracking.model import prepare_expert_model
from longtail_experts.tracking.registry import register
from longtail_experts.tracking.runs import Run, RunError
from longtail_experts.tracking.stale import offer_to_resume

log = logging.getLogger(__name__)


class Outcome(NamedTuple):
    """Of an expert, in words: an exception kept would keep what it had in the GPU's memory."""

    run_id: str = ""
    failure: str = ""


class ExpertsFailedError(RuntimeError):
    """Some experts of loss=all failed; the message names them."""


def run(config: Config, data: Dataset) -> str:
    """One expert, or all three; returns the run id (of the parent for loss=all).

    Raises NotReadyError, before any run is started, where `preflight` has something blocking.
    """
    if config.preflight:
        require_ready(config, data)
    if config.loss == "all":
        return run_all(config, data)
    return run_one(config, data, config.loss)


def resume(existing: Run, config: Config, data: Dataset) -> str:
    """Go on with a run that `run` began; experts of loss=all that are finished are left alone."""
    if config.loss == "all":
        return run_all(config, data, existing)
    return run_one(config, data, config.loss, existing=existing)


def run_one(
    config: Config,
    data: Dataset,
    loss: str,
    parent: Run | None = None,
    existing: Run | None = None,
) -> str:
    config = for_one_expert(config, loss)
    with experts.start_expert_run(config, "main", parent, existing) as run_:
        if parent is None:
            offer_to_resume(run_)
        if "training" not in run_.tags:
            train_expert(run_, config, data)
        stop_if_heeded(f"trained, in run {run_.run_id}: -P resume={run_.run_id} calibrates it")
        with beside_the_others():
            trained = load_trained(run_, config, data)
        calibrate_expert(run_, config, data, trained)
    return run_.run_id


def run_all(config: Config, data: Dataset, existing: Run | None = None) -> str:
    """A parent run with one child an expert. A failed child does not stop the others; the
    parent then fails, naming it."""
    num_drawing = len(LOSS_NAMES) if trains_at_once(config) else 0
    with (
        experts.start_parent_run(config, existing) as parent,
        drawing_processes(num_drawing),
    ):
        offer_to_resume(parent)
        if existing is None:
            experts.describe_begun_parent(parent, config)
        begun = experts.children_of(parent)

        def child_of(loss: str) -> Outcome:
            try:
                return Outcome(run_child(config, data, loss, parent, begun.get(loss)))
            except Exception as error:
                foreseen = isinstance(error, NonFiniteLossError | RunError)
                log.error("%s failed: %s", loss, error, exc_info=not foreseen)
                return Outcome(failure=first_line(error))

        outcomes = for_each_loss(child_of, config, data)
        failures = {name: o.failure for name, o in outcomes.items() if not o.run_id}
        children = {name: o.run_id for name, o in outcomes.items() if o.run_id}
        if len(children) > 1:
            try:
                compare.into(parent, list(children.values()))
            except Exception as error:  # the experts are finished all the same
                log.error("compare failed: %s", error, exc_info=not isinstance(error, RunError))
                failures["compare"] = first_line(error)
        expert_report.describe_parent(parent, config, children, failures)
        if failures:
            named = "; ".join(f"{loss} failed: {reason}" for loss, reason in failures.items())
            raise ExpertsFailedError(f"loss=all: {named}")
    return parent.run_id


def run_child(
    config: Config, data: Dataset, loss: str, parent: Run, existing: Run | None = None
) -> str:
    """One expert of loss=all; one that is finished already is left alone."""
    if existing is None or not is_calibrated(existing) or existing.status != "FINISHED":
        return run_one(config, data, loss, parent, existing)
    if config.register_as:
        register(existing, config.register_as)
    return existing.run_id


def for_each_loss(
    child_of: Callable[[str], Outcome], config: Config, data: Dataset
) -> dict[str, Outcome]:
    """At the same time where `trains_at_once`, else one after another."""
    if not trains_at_once(config):
        print(f"{len(LOSS_NAMES)} experts, one after another: multiply the time of one")
        return {loss: child_of(loss) for loss in LOSS_NAMES}
    print(f"{len(LOSS_NAMES)} experts, at the same time")
    with delayed_signals() as arrived:

        def heeding(loss: str) -> Outcome:
            heed(arrived)
            stop_if_heeded(f"before {loss} began")
            return child_of(loss)

        work = {loss: partial(heeding, loss) for loss in LOSS_NAMES}
        return at_once(work, config.device, meanwhile=model_preparation(config, data))


def model_preparation(config: Config, data: Dataset) -> Callable[[], None]:
    """What traces the network that the experts have in common, for the thread that waits for them.
    After training the first of them would do it, and the others wait for their turn."""
    # Here, before there are threads: to seed a network puts the random state of the process aside.
    network = build_network(for_one_expert(config, LOSS_NAMES[0]), data)

    def prepare() -> None:
        try:
            prepare_expert_model(network, data.num_classes)
        except Exception as error:  # an expert meets it again, and says so
            log.debug("the model could not be prepared: %s", error)

    return prepare
