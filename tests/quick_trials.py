"""What Ray's workers run in tests of sweeps: they do not know what pytest has changed."""

import pytest
from conftest import use_blank_figures, use_small_network

from longtail_experts.stages.trial import Order, Outcome, run_trial


def quick_trial(order: Order) -> Outcome:
    """A trial of a small network, with blank figures."""
    with pytest.MonkeyPatch.context() as patch:
        use_small_network(patch)
        use_blank_figures(patch)
        return run_trial(order)
