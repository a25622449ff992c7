"""Entry point `compare`: finished experts beside each other, and together; or a sweep of them."""

from collections.abc import Sequence

from longtail_experts.tracking import comparison, comparison_report, study, study_report
from longtail_experts.tracking.experts import SYNTHETIC_NOTICE
from longtail_experts.tracking.runs import Run, RunError, start_run


def run(runs: Sequence[Run], deployment: str, different_splits: bool) -> str:
    """Compare in a run of its own; returns its id. RunError before any is started."""
    members = comparison.read_members(runs)
    same_splits = comparison.require_comparable(members, different_splits)
    if same_splits:
        comparison.prior_of_deployment(members[0], deployment)
    elif deployment != "uniform":
        raise RunError(
            f"deployment={deployment}: experts of different splits are not scored under one prior, "
            "and their table has the figures of their runs; leave deployment out"
        )
    name = f"compare {', '.join(m.label for m in members)}"
    if deployment != "uniform":
        name = f"{deployment}: {name}"
    with start_run(name[:200], {"stage": "compare"}) as run_:
        parts = record(run_, members, deployment, same_splits)
        comparison_report.describe_comparison(run_, parts)
    print("\n\n".join(parts))
    return run_.run_id


def run_study(sweep_id: str) -> str:
    """Means and intervals over the trainings of a sweep, in a run of its own; returns its id.
    RunError before any is started."""
    found = study.read_study(sweep_id)
    tags = {"stage": "compare", "sweep": sweep_id}
    with start_run(f"study of {found.name}"[:200], tags) as run_:
        parts = study_report.record_study(run_, found)
    print("\n\n".join(parts))
    return run_.run_id


def into(parent: Run, run_ids: Sequence[str]) -> None:
    """The comparison of the experts of one parent, into the parent."""
    members = comparison.read_members([Run(run_id) for run_id in run_ids])
    record(parent, members, "uniform", comparison.require_comparable(members, False))


def record(
    run_: Run, members: Sequence[comparison.Member], deployment: str, same_splits: bool
) -> list[str]:
    run_.set_tags({"deployment": deployment})
    result = comparison.together(members, deployment) if same_splits else None
    synthetic = any(member.facts.get("source") == "synthetic" for member in members)
    notice = SYNTHETIC_NOTICE if synthetic else ""
    return comparison_report.record_comparison(run_, members, result, notice)
