import math

import pytest
import torch

from longtail_experts.data.longtail import head_mask, share_at_least_one
from longtail_experts.learning import loss_behaviour as behaviour
from longtail_experts.learning.loss_behaviour import loss_behaviour
from longtail_experts.learning.losses import LOSSES

POOL = [int(500 * 100 ** (-c / 99) + 1e-9) for c in range(100)]
TRAIN = torch.tensor(share_at_least_one(8677, POOL))
HEAD = torch.from_numpy(head_mask(POOL))


@pytest.fixture(scope="module")
def rows() -> dict:
    return {(row.loss, row.target): row for row in loss_behaviour(TRAIN, HEAD, 1.0)}


@pytest.mark.parametrize("loss", ["logit_adjust", "balanced_softmax"])
@pytest.mark.parametrize(
    ("target", "difference"),
    [
        ("largest class", -1.53),
        ("smallest class", 3.08),
        ("head, mean over classes", 0.06),
        ("tail, mean over classes", 2.42),
    ],
)
def test_differences_at_imbalance_100(rows, loss, target, difference):
    row = rows[loss, target]
    assert row.uniform == pytest.approx(difference, abs=0.005)
    assert row.random == pytest.approx(difference, abs=0.05)
    assert row.as_theory


def test_uniform_logits_by_hand(rows):
    for target, n in (("largest class", 400), ("smallest class", 4)):
        assert rows["logit_adjust", target].uniform_theory == pytest.approx(
            -math.log(100 * n / 8677), abs=1e-12
        )


def test_random_logits_by_hand():
    """Every term written out, from no tensor operation of ours."""
    counts, tau = [30, 5, 1], 0.7
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(behaviour.NUM_LOGITS, 3, generator=generator).tolist()
    prior = [n / 36 for n in counts]

    def expected(y: int) -> float:
        total = 0.0
        for f in logits:
            plain = f[y] - math.log(sum(map(math.exp, f)))
            shifted = [v + tau * math.log(p) for v, p in zip(f, prior, strict=True)]
            total += plain - (shifted[y] - math.log(sum(map(math.exp, shifted))))
        return total / len(logits)

    found = loss_behaviour(torch.tensor(counts), torch.tensor([True, False, False]), tau, seed=3)
    rows = {row.target: row for row in found if row.loss == "logit_adjust"}
    tail = (expected(1) + expected(2)) / 2
    for target, value in (
        ("largest class", expected(0)),
        ("smallest class", expected(2)),
        ("tail, mean over classes", tail),
    ):
        assert rows[target].random == pytest.approx(value, abs=1e-5)
        assert rows[target].random_theory == pytest.approx(value, abs=1e-9)


def test_cross_entropy_differs_by_nothing(rows):
    ours = [row for (loss, _), row in rows.items() if loss == "ce"]
    assert len(ours) == 4
    assert all(row.random == row.uniform == 0 for row in ours)
    assert all(abs(row.random_theory) < 1e-12 for row in ours)
    # log sum e^f of 100 standard-normal logits is log 100 + 1/2, less (e - 1) / 200
    assert all(row.nats == pytest.approx(math.log(100) + 0.49, abs=0.2) for row in ours)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda counts: -(counts / counts.sum()).log(),
        lambda counts: (counts / counts.sum()).log() * 1.01,
        lambda counts: (counts + 1.0).log(),
    ],
)
def test_a_wrong_loss_is_not_as_theory(monkeypatch, wrong):
    terms = {"terms": lambda counts, knobs: {"shift": wrong(counts)}}
    monkeypatch.setitem(LOSSES, "logit_adjust", LOSSES["logit_adjust"]._replace(**terms))
    found = loss_behaviour(TRAIN, HEAD, 1.0)
    assert {row.loss for row in found if not row.as_theory} == {"logit_adjust"}


def test_a_group_without_classes_has_no_row():
    found = loss_behaviour(torch.tensor([30, 25]), torch.tensor([True, True]), 1.0)
    assert "tail, mean over classes" not in {row.target for row in found}
