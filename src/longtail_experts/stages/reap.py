"""Entry point `reap`: mark runs whose process is gone as FAILED, and deliver what they left."""

from longtail_experts.tracking import stale
from longtail_experts.tracking.runs import launched_run


def run(run_id: str | None) -> None:
    """The one run, wherever its process was; or every such run of this host."""
    with launched_run("reap", {"stage": "reap"}):
        runs = [stale.named_run(run_id)] if run_id else stale.stale_runs()
        for run_ in runs:
            print(stale.reap(run_))
        if not runs:
            print("no run of this host is RUNNING without a process")
