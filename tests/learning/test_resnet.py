import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from longtail_experts.learning.resnet import (
    BasicBlock,
    PadShortcut,
    ResNet32,
    build_resnet32,
    num_parameters,
)

SHORTCUTS = ("projection", "pad")
BATCH_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def images(num: int, size: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.randn(num, 3, size, size, generator=torch.Generator().manual_seed(seed))


def expected_names(shortcut: str) -> set[str]:
    convolutions, norms = ["backbone.conv1"], ["backbone.bn1"]
    for layer in (1, 2, 3):
        for i in range(5):
            block = f"backbone.layer{layer}.{i}"
            convolutions += [f"{block}.conv1", f"{block}.conv2"]
            norms += [f"{block}.bn1", f"{block}.bn2"]
            if shortcut == "projection" and layer > 1 and i == 0:
                convolutions.append(f"{block}.shortcut.0")
                norms.append(f"{block}.shortcut.1")
    names = {f"{name}.weight" for name in convolutions}
    names |= {f"{name}.{part}" for name in norms for part in BATCH_NORM}
    return names | {"fc.weight", "fc.bias"}


def reference_logits(state: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """The projection network in evaluation mode, out of nothing but its state dict."""

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        weight, bias, mean, var = (
            state[f"{name}.{part}"][:, None, None] for part in BATCH_NORM[:4]
        )
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    def convolve(x: torch.Tensor, name: str, stride: int = 1) -> torch.Tensor:
        weight = state[f"{name}.weight"]
        return F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)

    x = norm(convolve(x, "backbone.conv1"), "backbone.bn1").clamp(min=0)
    for layer in (1, 2, 3):
        for i in range(5):
            block = f"backbone.layer{layer}.{i}"
            stride = 2 if layer > 1 and i == 0 else 1
            out = norm(convolve(x, f"{block}.conv1", stride), f"{block}.bn1").clamp(min=0)
            out = norm(convolve(out, f"{block}.conv2"), f"{block}.bn2")
            if stride == 2:
                x = norm(convolve(x, f"{block}.shortcut.0", 2), f"{block}.shortcut.1")
            x = (out + x).clamp(min=0)
    return x.flatten(2).mean(2) @ state["fc.weight"].T + state["fc.bias"]


@pytest.mark.parametrize(
    ("shortcut", "num_classes", "parameters"),
    [
        ("projection", 100, 472_756),
        ("pad", 100, 470_004),
        ("projection", 10, 466_906),
        ("pad", 10, 464_154),
    ],
)
def test_parameter_count_is_pinned(shortcut, num_classes, parameters):
    assert num_parameters(ResNet32(num_classes, shortcut)) == parameters


@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_state_dict_names_are_the_contract(shortcut):
    assert set(ResNet32(100, shortcut).state_dict()) == expected_names(shortcut)


def test_state_dict_shapes():
    shapes = {name: tuple(x.shape) for name, x in ResNet32(100).state_dict().items()}
    assert shapes["backbone.conv1.weight"] == (16, 3, 3, 3)
    assert shapes["backbone.layer1.4.conv2.weight"] == (16, 16, 3, 3)
    assert shapes["backbone.layer2.0.conv1.weight"] == (32, 16, 3, 3)
    assert shapes["backbone.layer2.0.shortcut.0.weight"] == (32, 16, 1, 1)
    assert shapes["backbone.layer3.0.shortcut.0.weight"] == (64, 32, 1, 1)
    assert shapes["backbone.layer3.4.bn2.running_var"] == (64,)
    assert shapes["fc.weight"] == (100, 64)
    assert shapes["fc.bias"] == (100,)


@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_each_stage_halves_the_image_and_doubles_the_width(shortcut):
    model, shapes = build_resnet32(7, shortcut, seed=0).eval(), []
    for layer in (model.backbone.layer1, model.backbone.layer2, model.backbone.layer3):
        layer.register_forward_hook(lambda _, __, out: shapes.append(tuple(out.shape)))
    with torch.inference_mode():
        logits = model(images(2, size=32))
    assert shapes == [(2, 16, 32, 32), (2, 32, 16, 16), (2, 64, 8, 8)]
    assert logits.shape == (2, 7)
    assert logits.dtype == torch.float32


def test_logits_equal_a_forward_pass_written_from_the_state_dict():
    model = build_resnet32(10, "projection", seed=3)
    with torch.no_grad():
        model(images(8))  # moves the batch norm statistics off 0 and 1
        model.eval()
        state = {name: x.double() for name, x in model.state_dict().items()}
        expected = reference_logits(state, images(4, seed=1).double())
        torch.testing.assert_close(model.double()(images(4, seed=1).double()), expected)


@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_the_seed_decides_every_weight(shortcut):
    first, again, other = (build_resnet32(10, shortcut, seed) for seed in (1, 1, 2))
    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True)
    )
    assert not torch.equal(first.fc.weight, other.fc.weight)
    assert not torch.equal(first.fc.bias, other.fc.bias)
    assert not torch.equal(first.backbone.conv1.weight, other.backbone.conv1.weight)


def test_building_leaves_the_global_random_state_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    weights = build_resnet32(10, "projection", seed=1).fc.weight
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert torch.equal(build_resnet32(10, "projection", seed=1).fc.weight, weights)


@pytest.mark.parametrize(
    "name", ["backbone.layer1.2.conv1.weight", "backbone.layer3.4.conv2.weight", "fc.weight"]
)
def test_initial_weights_are_kaiming_normal(name):
    weight = build_resnet32(100, "projection", seed=0).state_dict()[name]
    fan_in = weight[0].numel()
    assert float(weight.std()) == pytest.approx(math.sqrt(2 / fan_in), rel=0.05)
    assert abs(float(weight.mean())) < 4 * math.sqrt(2 / fan_in / weight.numel())


@pytest.mark.parametrize(("new_channels", "before"), [(2, 1), (3, 1), (16, 8)])
def test_pad_shortcut_by_hand(new_channels, before):
    x = torch.arange(2 * 2 * 4 * 6).reshape(2, 2, 4, 6).float()
    expected = np.zeros((2, 2 + new_channels, 2, 3), np.float32)
    for n, c, row, column in np.ndindex(2, 2, 2, 3):
        expected[n, before + c, row, column] = x[n, c, 2 * row, 2 * column]
    assert np.array_equal(PadShortcut(new_channels)(x).numpy(), expected)


def test_block_adds_the_pad_shortcut():
    block = BasicBlock(2, 4, 2, "pad").eval()
    torch.nn.init.zeros_(block.bn2.weight)  # silences the residual branch
    x = images(1)[:, :2]
    with torch.no_grad():
        out = block(x)
    assert torch.equal(out[:, 1:3], x[:, :, ::2, ::2].clamp(min=0))
    assert not out[:, [0, 3]].any()


@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_weights_without_batch_norm_counters_load_strictly(shortcut):
    source, target = (build_resnet32(10, shortcut, seed) for seed in (1, 2))
    weights = {name: x for name, x in source.state_dict().items() if x.is_floating_point()}
    assert not any("num_batches_tracked" in name for name in weights)
    target.load_state_dict(weights, strict=True)
    with torch.inference_mode():
        assert torch.equal(target.eval()(images(2)), source.eval()(images(2)))


def test_unknown_shortcut_is_refused():
    with pytest.raises(ValueError, match="'projection' or 'pad'"):
        ResNet32(10, "identity")


def test_the_cosine_head_begins_as_in_ldams_code():
    """uniform_(-1, 1).renorm_(2, 1, 1e-5).mul_(1e5) of a matrix [64, classes]."""
    weight = build_resnet32(100, "pad", 0, "cosine").fc.weight.detach()
    drawn = torch.empty(100, 64).uniform_(-1, 1, generator=torch.Generator().manual_seed(1))
    theirs = drawn.T.renorm(2, 1, 1e-5).mul(1e5)
    torch.testing.assert_close(weight.norm(dim=1), theirs.norm(dim=0), rtol=1e-4, atol=0)
    assert float(weight.mean()) == pytest.approx(0, abs=0.005)  # 3 standard errors
    assert float(weight.std()) == pytest.approx(float(theirs.std()), rel=0.01)
