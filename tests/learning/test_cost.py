from itertools import repeat

import psutil
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from longtail_experts.learning.cost import (
    Pace,
    Work,
    activation_bytes,
    measure_pace,
    peak_memory_bytes,
    time_steps,
    training_memory,
)
from longtail_experts.learning.resnet import build_resnet32
from longtail_experts.learning.step import start_training


class Two(nn.Module):
    """A network whose kept tensors can be counted by hand."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(3 * 32 * 32, 50), nn.Linear(50, 10)

    def forward(self, x):
        return self.two(self.one(x.flatten(1)).relu())


def test_activations_by_hand():
    """Kept an image: the input (3072), the rectified layer (50, once for relu and linear), and
    the log-probabilities (10), float32, with the target, int64."""
    assert activation_bytes(Two(), "fp32", "cpu") == 4 * (3072 + 50 + 10) + 8


def test_activations_of_the_network_are_its_maps():
    """Four maps a block are kept: what enters the two convolutions and the two batch norms. At
    float32 a map of the first stage is 64 KiB, and each later stage has half."""
    maps = 5 * 4 * 65536 * (1 + 1 / 2 + 1 / 4)
    model = build_resnet32(100, "projection", 0)
    assert activation_bytes(model, "fp32", "cpu") == pytest.approx(maps, rel=0.1)


def test_training_memory():
    model = build_resnet32(100, "projection", 0)
    memory = training_memory(model, batch_size=128, num_images=8677, precision="fp32", device="cpu")
    assert memory.gradients == memory.momentum == 4 * 472_756
    assert memory.weights > memory.gradients  # running statistics
    assert memory.images == 8677 * 40 * 40 * 3
    assert memory.activations == 128 * activation_bytes(model, "fp32", "cpu")
    assert memory.workspace == memory.activations // 2
    assert memory.total == sum(memory)


def test_pace_leaves_weights_alone():
    model = Two()
    state = start_training(
        model, lr=1.0, momentum=0.0, weight_decay=0.0, device="cpu", precision="fp32"
    )
    before = model.one.weight.clone()
    images, targets, loaded = torch.rand(4, 3, 32, 32), torch.arange(4), []

    def load(*batch):
        loaded.append(batch)
        return batch

    batches, predicted = repeat((images, targets)), torch.rand(9, 3, 32, 32)
    pace = measure_pace(state, batches, predicted, F.cross_entropy, "fp32", load)
    assert pace.training > 0
    assert len(loaded) == 8
    assert pace.predicting > 0
    assert torch.equal(model.one.weight, before)
    assert time_steps(state, [(images, targets)], F.cross_entropy, "fp32") > 0


def test_peak_memory_is_that_of_this_process():
    before = peak_memory_bytes("cpu")
    now = psutil.Process().memory_info().rss
    assert before >= 0.9 * now
    block = torch.ones(before - now + 200_000_000, dtype=torch.uint8)
    assert 150_000_000 < peak_memory_bytes("cpu") - before < 400_000_000
    assert int(block[-1]) == 1


def test_seconds_are_images_times_pace():
    seconds = Work(training=1000, validation=20, export=300).seconds(Pace(0.01, 0.002))
    assert seconds == pytest.approx((10.0, 0.04, 0.6))
    assert seconds.total == pytest.approx(10.64)
