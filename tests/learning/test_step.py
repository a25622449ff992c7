import copy
from functools import partial
from itertools import starmap

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from longtail_experts.data.batches import batches_of, draw_epoch, loader_of
from longtail_experts.learning import step as step_module
from longtail_experts.learning.losses import shifted_cross_entropy
from longtail_experts.learning.resnet import build_resnet32
from longtail_experts.learning.step import (
    COMPILE_REPAID_AFTER,
    DTYPES,
    NonFiniteLossError,
    predict_logits,
    start_training,
    train_epoch,
)

NUM_CLASSES = 5
SHIFT = torch.tensor([0.0, -0.5, -1.0, -2.0, -3.0])


def tiny() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, NUM_CLASSES),
        )


def linear() -> nn.Module:
    """Without batch norm, an image's loss does not depend on its neighbours."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, NUM_CLASSES))


def resnet() -> nn.Module:
    return build_resnet32(NUM_CLASSES, "projection", seed=0)


def make_batches(*sizes: int, side: int = 8, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(n, 3, side, side, generator=generator),
            torch.randint(NUM_CLASSES, (n,), generator=generator),
        )
        for n in sizes
    ]


def start(model: nn.Module, precision: str = "fp32", device: str = "cpu", **changes):
    settings = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4, **changes}
    return start_training(model, **settings, device=device, precision=precision)


def falling_lr(step: int) -> float:
    return 0.1 / (1 + step)


def train(state, batches, *, lr_at=falling_lr, precision="fp32", **rest) -> float:
    return train_epoch(
        state,
        batches,
        objective=partial(shifted_cross_entropy, shift=SHIFT.to(batches[0][0].device)),
        lr_at=lr_at,
        precision=precision,
        **rest,
    )


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def plain_loop(model: nn.Module, batches, momentum: float, weight_decay: float) -> list[float]:
    """The loop of any PyTorch tutorial, with the shift added to the logits."""
    model = model.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(
        model.parameters(), lr=1.0, momentum=momentum, weight_decay=weight_decay
    )
    losses = []
    for step, (images, targets) in enumerate(batches):
        optimizer.param_groups[0]["lr"] = falling_lr(step)
        loss = F.cross_entropy(model(images) + SHIFT, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("build", [tiny, resnet])
@pytest.mark.parametrize(("momentum", "weight_decay"), [(0.9, 1e-4), (0.0, 0.0), (0.5, 0.1)])
def test_training_equals_a_plain_loop_bit_for_bit(build, momentum, weight_decay):
    batches = make_batches(8, 8, 8, 3)
    plain = build()
    expected = plain_loop(plain, batches, momentum, weight_decay)
    state = start(build(), momentum=momentum, weight_decay=weight_decay)
    losses = [train(state, [batch]) for batch in batches]
    assert losses == expected
    assert same_weights(state.model, plain)
    assert state.step == 4


def test_momentum_and_weight_decay_by_hand():
    """v <- momentum v + (gradient + decay w); w <- w - lr v, without dampening or Nesterov."""
    momentum, decay, batches = 0.9, 0.05, make_batches(8, 8, 8)
    model = linear()
    weights = [p.detach().double().requires_grad_() for p in model.parameters()]
    velocity = [torch.zeros_like(w) for w in weights]
    for step, (images, targets) in enumerate(batches):
        logits = images.flatten(1).double() @ weights[0].T + weights[1]
        loss = F.cross_entropy(logits + SHIFT.double(), targets)
        gradients = torch.autograd.grad(loss, weights)
        for i, gradient in enumerate(gradients):
            velocity[i] = momentum * velocity[i] + gradient + decay * weights[i].detach()
            weights[i] = (weights[i].detach() - falling_lr(step) * velocity[i]).requires_grad_()
    state = start(model, momentum=momentum, weight_decay=decay)
    train(state, batches)
    for parameter, expected in zip(state.model.parameters(), weights, strict=True):
        torch.testing.assert_close(parameter.double(), expected, rtol=1e-5, atol=1e-6)


def test_mean_loss_weighs_a_short_last_batch_by_its_images():
    batches = make_batches(8, 8, 1)
    images, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    model = linear()
    with torch.no_grad():
        expected = float(F.cross_entropy(model(images) + SHIFT, targets))
        of_batches = [float(F.cross_entropy(model(x) + SHIFT, y)) for x, y in batches]
    assert abs(sum(of_batches) / 3 - expected) > 0.01  # the batches tell the two means apart
    assert train(start(model), batches, lr_at=lambda step: 0.0) == pytest.approx(expected, rel=1e-6)


def test_the_loss_of_a_batch_is_taken_before_its_own_step():
    images, targets = make_batches(8)[0]
    model = linear()
    before = F.cross_entropy(model(images) + SHIFT, targets).item()
    assert train(start(model), [(images, targets)]) == pytest.approx(before, rel=1e-6)
    assert F.cross_entropy(model(images) + SHIFT, targets).item() < before


def test_steps_go_on_counting_in_the_next_epoch():
    state, asked, seen = start(tiny()), [], []

    def lr_at(step: int) -> float:
        asked.append(step)
        return 0.01

    for _ in range(2):
        train(state, make_batches(4, 4, 4), lr_at=lr_at, on_step=lambda: seen.append(state.step))
    assert asked == [0, 1, 2, 3, 4, 5]
    assert seen == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_trainings_of_one_seed_are_bit_identical(precision):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (24, 8, 8, 3), dtype=torch.uint8, generator=generator)
    targets = torch.randint(NUM_CLASSES, (24,), generator=generator)
    load = loader_of(pixels, targets, "cpu")

    def training(seed: int) -> tuple[nn.Module, list[float]]:
        torch.rand(seed)  # the global generator plays no part
        state = start(build_resnet32(NUM_CLASSES, "pad", seed), precision)
        losses = []
        for epoch in range(2):
            batches = starmap(load, batches_of(draw_epoch(24, seed, epoch), 16))
            losses.append(train(state, list(batches), precision=precision))
        return state.model, losses

    (model, losses), (again, losses_again), (other, _) = (training(seed) for seed in (3, 3, 4))
    assert losses == losses_again
    assert same_weights(model, again)
    assert not same_weights(model, other)


@pytest.mark.parametrize("poison", [float("inf"), float("nan")])
def test_a_loss_that_is_not_finite_stops_at_its_step(poison):
    batches = make_batches(4, 4, 4, 4)
    batches[2][0][1, 0, 0, 0] = poison
    state, taken, done = start(tiny()), [], []
    state.step = 10

    def feed():
        for batch in batches:
            taken.append(batch)
            yield batch

    with pytest.raises(NonFiniteLossError, match=r"step 12 \(lr 0\.0012\)") as error:
        train_epoch(
            state,
            feed(),
            objective=partial(shifted_cross_entropy, shift=SHIFT),
            lr_at=lambda step: step / 10_000,
            precision="fp32",
            on_step=lambda: done.append(1),
        )
    assert len(taken) == 3
    assert len(done) == 2
    assert "warmup_steps" in str(error.value)


def test_bf16_computes_in_bf16_and_keeps_weights_and_momentum_in_float32():
    state, kinds = start(tiny(), "bf16"), set()
    state.model[0].register_forward_hook(lambda _, __, out: kinds.add(out.dtype))
    batches = make_batches(8, 8)
    loss = train(state, batches, precision="bf16")
    assert kinds == {torch.bfloat16}
    weights = [x for x in state.model.state_dict().values() if x.is_floating_point()]
    momenta = [entry["momentum_buffer"] for entry in state.optimizer.state.values()]
    assert {x.dtype for x in weights + momenta} == {torch.float32}
    assert loss == pytest.approx(train(start(tiny()), batches), rel=0.02)


def test_fp32_computes_in_float32():
    state, kinds = start(tiny()), set()
    state.model[0].register_forward_hook(lambda _, __, out: kinds.add(out.dtype))
    train(state, make_batches(4))
    assert kinds == {torch.float32}


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """A ResNet-32 whose batch norm statistics have left 0 and 1, still in training mode."""
    state = start(resnet())
    train(state, make_batches(16, 16), lr_at=lambda step: 0.01)
    return state.model


def test_predicting_changes_nothing_in_the_model(trained):
    before = copy.deepcopy(trained)
    trained.train()
    logits = predict_logits(trained, [images for images, _ in make_batches(6, 2)])
    assert same_weights(trained, before)
    assert logits.shape == (8, NUM_CLASSES)
    assert logits.dtype == torch.float32
    assert not logits.requires_grad


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_batch_size_and_neighbours_do_not_matter_to_logits(trained, batch_size):
    images = make_batches(7, seed=1)[0][0]
    trained.eval()
    with torch.no_grad():
        expected = torch.cat([trained(image[None]) for image in images])
    trained.train()
    logits = predict_logits(trained, images.split(batch_size))
    scale = float(expected.abs().max())
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * scale)


def test_logits_keep_the_order_of_the_images(trained):
    images = make_batches(6, seed=2)[0][0]
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    logits = predict_logits(trained, images.split(4))
    shuffled = predict_logits(trained, images[order].split(4))
    scale = float(logits.abs().max())
    torch.testing.assert_close(shuffled, logits[order], rtol=0, atol=1e-5 * scale)
    assert (logits - shuffled).abs().max() > 1e-2 * scale


def test_training_goes_on_in_training_mode_after_predicting():
    state = start(tiny())
    predict_logits(state.model, [make_batches(4)[0][0]])
    statistics = state.model[1].running_mean.clone()
    train(state, make_batches(4))
    assert not torch.equal(state.model[1].running_mean, statistics)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cpu_and_gpu_losses_agree(monkeypatch):
    # TF32 rounds the factors of a convolution to ten bits; without it both devices do float32.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    batches = make_batches(16, 16, 16, 16)
    losses = {}
    for device in ("cpu", "cuda"):
        state = start(resnet(), device=device)
        on_device = [(x.to(device), y.to(device)) for x, y in batches]
        losses[device] = [train(state, [batch], lr_at=lambda step: 0.01) for batch in on_device]
    # Rounding of a millionth in the convolutions grows to 0.7 % in four steps.
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=2e-2)
    assert losses["cuda"][0] == pytest.approx(losses["cpu"][0], rel=1e-5)


def test_an_epoch_that_was_stopped_counts_its_seconds_and_names_its_own_steps():
    state = start(linear())
    state.losses, state.sizes, state.seconds = [torch.tensor(1.0)], [4], 100.0
    train(state, make_batches(4))
    assert state.seconds > 100
    state.step, state.sizes = 10, [4, 4]
    state.losses = [torch.tensor(1.0), torch.tensor(float("nan"))]
    with pytest.raises(NonFiniteLossError, match=r"step 9\b"):
        train_epoch(state, [], objective=None, lr_at=falling_lr, precision="fp32")


def test_autocast_keeps_no_weights_of_the_step_before():
    with step_module.autocast("cpu", "bf16"):
        assert not torch.is_autocast_cache_enabled()


# --- compiled steps ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("missing_images", "fast", "path"),
    [(0, True, "compiled"), (0, False, "plain"), (1, True, "plain")],
)
@pytest.mark.parametrize("precision", DTYPES)
def test_only_a_run_that_repays_it_is_compiled(precision, missing_images, fast, path, monkeypatch):
    compiled = []
    monkeypatch.setattr(step_module, "compile_layers", lambda model, dtype: compiled.append(dtype))
    planned = COMPILE_REPAID_AFTER[precision] - missing_images
    state = start(resnet(), precision, planned_images=planned, fast=fast)
    assert state.path == path
    assert compiled == ([DTYPES[precision]] if path == "compiled" else [])
    kernels = state.model.backbone.conv1.weight
    assert kernels.is_contiguous(memory_format=torch.channels_last)


def test_where_compiling_fails_steps_are_plain_and_a_warning_says_why(monkeypatch):
    def broken(model, dtype):
        raise RuntimeError("No working C++ compiler\nand much more")

    monkeypatch.setattr(step_module, "compile_layers", broken)
    with pytest.warns(UserWarning, match=r"not compiled, and slower: No working C\+\+ compiler$"):
        state = start(resnet(), planned_images=10**6)
    assert state.path == "plain"
