"""What each loss does to frequent and to rare targets before anything is learnt.

Of the losses that shift logits: each is -log(w_y e^{f_y} / sum_j w_j e^{f_j}) with weights w: 1
for cross-entropy, prior^tau for logit adjustment (Menon et al., ICLR 2021, eq. 10), counts for
balanced softmax (Ren et al., NeurIPS 2020, eqs. 3, 4). So the difference to cross-entropy on y is

    log(sum_j w_j e^{f_j} / sum_j e^{f_j}) - log w_y,

and for uniform logits log(mean w) - log w_y, which at tau 1 is -log(C prior_y). At imbalance
factor 100 that is -1.53 nats for the largest class and +3.08 for the smallest.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from longtail_experts.learning.losses import SHIFTED, Knobs, objective_of

NUM_LOGITS = 256
TOLERANCE = 1e-4  # nats; the losses are float32, the equation float64


class LossBehaviour(NamedTuple):
    """Mean loss over standard-normal logits, and its difference to that of cross-entropy there
    and over uniform logits, measured and by theory; all in nats."""

    loss: str
    target: str
    nats: float
    random: float
    random_theory: float
    uniform: float
    uniform_theory: float

    @property
    def as_theory(self) -> bool:
        pairs = ((self.random, self.random_theory), (self.uniform, self.uniform_theory))
        return all(abs(measured - theory) < TOLERANCE for measured, theory in pairs)


def loss_behaviour(
    class_counts: Tensor, is_head: Tensor, tau: float, seed: int = 0
) -> list[LossBehaviour]:
    """Each loss on the largest and smallest class, and on head and tail as means over classes.

    class_counts int64 [C] of the train split, is_head bool [C].
    """
    num_classes = len(class_counts)
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(NUM_LOGITS, num_classes, generator=generator)
    uniform = torch.zeros(1, num_classes)
    classes = torch.arange(num_classes)
    groups = {
        "largest class": classes == class_counts.argmax(),
        "smallest class": classes == class_counts.argmin(),
        "head, mean over classes": is_head,
        "tail, mean over classes": ~is_head,
    }
    plain = [mean_losses("ce", logits, class_counts, tau) for logits in (random, uniform)]
    rows = []
    for loss in SHIFTED:
        ours = [mean_losses(loss, logits, class_counts, tau) for logits in (random, uniform)]
        theory = [
            theoretical_difference(loss, logits, class_counts, tau) for logits in (random, uniform)
        ]
        by_class = (ours[0], ours[0] - plain[0], theory[0], ours[1] - plain[1], theory[1])
        for target, mask in groups.items():
            if mask.any():
                rows.append(LossBehaviour(loss, target, *(float(d[mask].mean()) for d in by_class)))
    return rows


def mean_losses(loss: str, logits: Tensor, class_counts: Tensor, tau: float) -> Tensor:
    """float64 [C]: the loss of logits [N, C] on each class as the target of all of them."""
    objective = objective_of(loss, class_counts, Knobs(tau=tau))
    return torch.stack(
        [
            objective(logits, torch.full((len(logits),), c)).double()
            for c in range(len(class_counts))
        ]
    )


def theoretical_difference(loss: str, logits: Tensor, class_counts: Tensor, tau: float) -> Tensor:
    """float64 [C]: minus cross-entropy, by the equations of the papers, from counts alone."""
    counts = class_counts.double()
    weights = {
        "ce": torch.ones_like(counts),
        "logit_adjust": (counts / counts.sum()) ** tau,
        "balanced_softmax": counts,
    }[loss]
    e = logits.double().exp()  # [N, C]
    return ((e @ weights) / e.sum(1)).log().mean() - weights.log()
