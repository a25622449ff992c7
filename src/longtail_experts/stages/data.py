"""Entry point `data`: build and verify the splits; log them with their manifest and figures."""

from longtail_experts.config import Config
from longtail_experts.data.dataset import Dataset
from longtail_experts.tracking import expert_report, experts


def run(config: Config, data: Dataset) -> str:
    """Record the splits in a run of their own; returns the run id."""
    with experts.start_data_run(config) as run_:
        experts.record_splits(run_, data)
        expert_report.record_split_report(run_, config, data)
    return run_.run_id
