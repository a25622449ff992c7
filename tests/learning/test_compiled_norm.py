"""Batch norm in C++ equals PyTorch's, forward and backward, as closely as values are rounded."""

import copy
import shutil
import sys
from functools import partial
from itertools import count

import pytest
import torch
from torch import Tensor, nn

from longtail_experts.learning import compiled_norm as module
from longtail_experts.learning.compiled_norm import (
    CHANNELS,
    VALUES,
    CompiledNorm,
    compile_norms,
    compiled_norm,
)
from longtail_experts.learning.fused import how_far_from_float64
from longtail_experts.learning.layers import Conv, Norm
from longtail_experts.learning.resnet import build_resnet32
from longtail_experts.learning.step import (
    COMPILE_REPAID_AFTER,
    DTYPES,
    TrainState,
    start_training,
    train_step,
)

LISTED = module.FLAGS
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
BF16 = torch.bfloat16
# Of a value in bf16: twice what it is moved by at most. Sums, and what is float32, are far closer.
ROUNDING = {BF16: 2**-8, torch.float32: 1e-6}
FLIPPED = 5e-3  # where a ReLU's input next to 0 comes out on the other side, among thousands


@pytest.fixture
def compiles_anew(monkeypatch):
    """What a test changes is compiled, fast, and forgotten."""
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(module, "FLAGS", ("-std=c++17", "-fopenmp"))
    forget()
    yield
    forget()


def forget() -> None:
    module._library.cache_clear()
    module._why_not.cache_clear()


def draw(
    *shape: int,
    seed: int = 1,
    mean: float = 3.0,
    std: float = 2.0,
    dtype: torch.dtype = BF16,
) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=random) * std + mean
    return values.to(dtype).contiguous(memory_format=torch.channels_last)


def a_norm(channels: int, relu: bool = True, dtype: torch.dtype | None = BF16) -> Norm:
    """With code for `dtype`; None: PyTorch's."""
    random = torch.Generator().manual_seed(channels)
    norm = Norm(channels, relu=relu)
    norm.weight.data = torch.rand(channels, generator=random) + 0.5
    norm.bias.data = torch.randn(channels, generator=random)
    norm.running_mean.normal_(generator=random)
    norm.fused = None if dtype is None else partial(compiled_norm, dtype)
    return norm


def outcome(norm: Norm, *inputs: Tensor) -> dict[str, Tensor]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    y = norm(*leaves)
    y.backward(draw(*y.shape, seed=9, mean=0.0, dtype=y.dtype))
    gradients = {f"gradient {i}": x.grad for i, x in enumerate([*leaves, *norm.parameters()])}
    return {"output": y.detach(), **gradients, **dict(norm.named_buffers())}


@needs_compiler
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("dtype", VALUES, ids=str)
@pytest.mark.parametrize(
    ("channels", "images", "side"),
    # Whole blocks of every part, parts that end within one, and fewer pixels than there are parts.
    [(16, 128, 32), (16, 37, 19), (32, 5, 6), (32, 1, 5), (64, 9, 8), (64, 2, 2)],
)
def test_equals_float64_but_for_rounding(channels, images, side, adds, relu, dtype):
    shape = (images, channels, side, side)
    inputs = [draw(*shape, seed=1 + i, dtype=dtype) for i in range(1 + adds)]
    apart = how_far_from_float64(a_norm(channels, relu, dtype), inputs)
    assert len(apart) == 7 + adds
    for name, value in apart.items():
        rounded = "output" in name or "input" in name
        flipped = relu and "gradient" in name
        assert value < (FLIPPED if flipped else ROUNDING[dtype] if rounded else 1e-6), name


@needs_compiler
@pytest.mark.parametrize("first_pixel", [None, 1000.0])
@pytest.mark.parametrize("dtype", VALUES, ids=str)
def test_variance_of_values_far_from_zero(dtype, first_pixel):
    """Squares of 100 in float32 would lose a part in a thousand of a variance of 1."""
    x = draw(64, 16, 32, 32, mean=100.0, std=1.0, dtype=dtype)
    if first_pixel is not None:
        x[0, :, 0, 0] = first_pixel
    norm = a_norm(16, dtype=dtype)
    norm.momentum = 1.0
    norm(x)
    exact = x.double()
    torch.testing.assert_close(norm.running_mean.double(), exact.mean((0, 2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(norm.running_var.double(), exact.var((0, 2, 3)), rtol=3e-5, atol=0)


@needs_compiler
@pytest.mark.parametrize("dtype", VALUES, ids=str)
def test_the_same_bits_for_any_number_of_threads(dtype):
    inputs = [draw(37, 16, 19, 19, seed=seed, dtype=dtype) for seed in (1, 2)]
    outcomes = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        outcomes.append(outcome(a_norm(16, dtype=dtype), *inputs))
    torch.set_num_threads(1)
    for other in outcomes[1:]:
        assert all(torch.equal(other[name], values) for name, values in outcomes[0].items())


@needs_compiler
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("dtype", VALUES, ids=str)
def test_what_is_not_finite_is_not_hidden_by_the_relu(dtype, value, adds):
    inputs = [draw(4, 16, 8, 8, seed=1 + i, dtype=dtype) for i in range(1 + adds)]
    inputs[0][1, 5, 2, 2] = value
    found, expected = (outcome(a_norm(16, dtype=kind), *inputs) for kind in (dtype, None))
    assert found["output"].isnan()[:, 5].all()
    for name in expected:
        assert torch.equal(found[name].isnan(), expected[name].isnan()), name


@needs_compiler
def test_other_passes_are_pytorchs():
    x, added = (draw(4, 16, 8, 8, seed=seed) for seed in (1, 2))
    for dtype, *inputs in (
        (BF16, x.float()),
        (BF16, x.float(), added.float()),
        (BF16, x, added.float()),
        (torch.float32, x),
    ):
        found, expected = (outcome(a_norm(16, dtype=kind), *inputs) for kind in (dtype, None))
        assert all(torch.equal(found[name], values) for name, values in expected.items())
    evaluated = [a_norm(16, dtype=dtype).eval()(x, added) for dtype in (BF16, None)]
    assert torch.equal(*evaluated)
    of_one_pixel = added[:1, :, :1, :1].contiguous()
    broadcast = [a_norm(16, dtype=dtype)(x, of_one_pixel) for dtype in (BF16, None)]
    assert torch.equal(*broadcast)
    in_bf16 = [a_norm(16, dtype=dtype).bfloat16()(x) for dtype in (BF16, None)]
    assert torch.equal(*in_bf16)
    assert a_norm(16)(x[:0]).shape == (0, 16, 8, 8)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        a_norm(16)(of_one_pixel)
    with pytest.raises(RuntimeError, match="16"):
        a_norm(16)(draw(4, 32, 8, 8))
    leaf = x.clone().requires_grad_()
    squares = a_norm(16)(leaf).float().square().sum()
    (gradient,) = torch.autograd.grad(squares, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


# --- in a network -----------------------------------------------------------------------------


def start(model: nn.Module | None = None, **changes) -> TrainState:
    settings = {"planned_images": COMPILE_REPAID_AFTER, "precision": "bf16", **changes}
    state = start_training(
        build_resnet32(5, "projection", seed=0) if model is None else model,
        **{"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4, "device": "cpu", **settings},
    )
    state.model.train()
    return state


def all_weights(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])


def of_logits(logits: Tensor, targets: Tensor) -> Tensor:
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return nn.functional.cross_entropy(logits, targets)


def losses_of(state: TrainState, num_steps: int = 4, precision: str = "bf16") -> list[float]:
    random = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(num_steps):
        images = torch.randn(16, 3, 16, 16, generator=random).to(state.model.fc.weight.dtype)
        targets = torch.randint(5, (16,), generator=random)
        loss = train_step(state, images, targets, of_logits, 0.01, precision)
        losses.append(float(loss))
    return losses


@needs_compiler
@pytest.mark.parametrize(("precision", "apart"), [("bf16", 0.02), ("fp32", 1e-6)])
def test_a_training_takes_them(precision, apart, monkeypatch):
    taken = []
    real = CompiledNorm.forward
    monkeypatch.setattr(
        CompiledNorm, "forward", lambda *given: taken.append(given[1].dtype) or real(*given)
    )
    state, plain = (start(precision=precision, fast=fast) for fast in (True, False))
    assert (state.path, plain.path) == ("compiled", "plain")
    taken.clear()
    losses = losses_of(state, precision=precision)
    norms = [layer for layer in state.model.modules() if isinstance(layer, Norm)]
    assert taken == [DTYPES[precision]] * len(losses) * len(norms)
    expected = losses_of(plain, precision=precision)
    assert losses[0] == pytest.approx(expected[0], rel=apart)
    assert losses == pytest.approx(expected, rel=0.02)  # activations next to 0 flip
    images = torch.randn(2, 3, 32, 32)
    again = start(fast=False).model
    again.load_state_dict(state.model.state_dict())
    assert torch.equal(state.model.eval()(images), again.eval()(images))


@needs_compiler
@pytest.mark.parametrize("precision", DTYPES)
def test_a_step_is_about_as_far_from_one_in_float64_as_pytorchs(precision):
    states = [start(precision=precision, fast=fast) for fast in (True, False, False)]
    states[2].model.double()
    for state, kind in zip(states, (precision, precision, "fp32"), strict=True):
        losses_of(state, 1, kind)
    compiled, plain, exact = (all_weights(state.model).double() for state in states)
    assert 0 < (compiled - exact).norm() < 1.25 * (plain - exact).norm()


class OneReLU(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.fc = Conv(3, 16), Norm(16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(self.conv(x)).mean((2, 3)))


@needs_compiler
def test_fifty_steps_in_fp32_equal_plain_ones():
    """Losses within 1e-5, weights and statistics within 1e-4 of their largest value; the last batch
    of each ten is short.

    On a network with one ReLU: in a ResNet-32 a rounding error flips some of the millions of
    activations that are next to zero, and either path's gradient is 0.2 to 1.4 % off float64's.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = OneReLU()
    states = [start(copy.deepcopy(model), precision="fp32", fast=fast) for fast in (True, False)]
    assert [state.path for state in states] == ["compiled", "plain"]
    random = torch.Generator().manual_seed(1)
    for size in 5 * [*9 * [16], 5]:
        images = torch.randn(size, 3, 32, 32, generator=random)
        targets = torch.randint(5, (size,), generator=random)
        losses = [train_step(s, images, targets, of_logits, 0.02, "fp32") for s in states]
        torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    weights = states[0].model.state_dict()
    for name, value in states[1].model.state_dict().items():
        scale = max(float(value.abs().max()), 1e-3)
        torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-4 * scale)


@needs_compiler
@pytest.mark.parametrize("precision", DTYPES)
def test_two_trainings_of_one_seed_are_bit_identical(precision):
    one, other = start(precision=precision), start(precision=precision)
    assert losses_of(one, precision=precision) == losses_of(other, precision=precision)
    weights = other.model.state_dict()
    assert all(
        torch.equal(values, weights[name]) for name, values in one.model.state_dict().items()
    )


def refusal(precision: str = "bf16") -> str:
    """Why a training goes on with PyTorch's."""
    with pytest.warns(UserWarning, match="steps are not compiled, and slower: ") as caught:
        state = start(precision=precision)
    assert state.path == "plain"
    assert all(m.fused is None for m in state.model.modules() if isinstance(m, Norm))
    (warning,) = caught
    return str(warning.message).split("slower: ")[1]


def test_without_a_compiler(compiles_anew, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler -v")
    assert refusal() == "no C++ compiler 'no-such-compiler'; CXX names another"


def test_with_a_compiler_that_fails(compiles_anew, monkeypatch, tmp_path):
    compiler = tmp_path / "compiler.py"
    compiler.write_text("import sys; sys.exit('in file x:\\nx.cpp:1: error: no such flag\\nmore')")
    monkeypatch.setenv("CXX", f"{sys.executable} {compiler}")
    assert refusal() == f"{sys.executable} failed: x.cpp:1: error: no such flag"


def test_with_a_compiler_that_hangs(compiles_anew, monkeypatch):
    monkeypatch.setattr(module, "COMPILER_SECONDS", 0.5)
    monkeypatch.setenv("CXX", f"{sys.executable} -c 'import time; time.sleep(60)'")
    assert refusal().endswith("timed out after 0.5 seconds")


@needs_compiler
def test_with_one_that_takes_what_is_not_a_number_for_one(compiles_anew, monkeypatch):
    monkeypatch.setattr(module, "FLAGS", ("-O1", *LISTED))
    monkeypatch.setenv("CXX", "c++ -ffast-math")
    test_what_is_not_finite_is_not_hidden_by_the_relu(BF16, float("nan"), adds=False)


@needs_compiler
def test_with_one_that_brings_threads_of_its_own(compiles_anew, monkeypatch):
    looks = count()
    monkeypatch.setattr(
        module,
        "_openmp_libraries",
        lambda: {"libgomp.so.1", "libomp.so"} if next(looks) else {"libgomp.so.1"},
    )
    for _ in range(2):  # it stays there: the next look finds nothing new
        assert refusal() == "what c++ compiles brings threads of its own: libomp.so"


@pytest.mark.skipif(sys.platform != "linux", reason="Linux says which libraries there are")
def test_libraries_of_threads_are_found():
    assert any("omp" in library for library in module._openmp_libraries())


@needs_compiler
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("value <= 0.f ? 0.f : value", "value"),
        ("value <= 0.f ? 0.f : gradient", "gradient"),
        ("if (ADDS) value += wide(also[c]);", ""),
        ("if (ADDS) put(d, masked[c]);", "if (ADDS) masked[c] = gradient[c];"),
        ("squares[c] / rows - mean * mean", "squares[c] / rows"),
        ("momentum * (moments[c]", "0.2 * (moments[c]"),
        ("- of_x[c] * affine.mean[c]", ""),
        ("row < begin_of(rows, part + 1)", "row < begin_of(rows, part + 1) - 1"),
        ("bits + 0x7fff + ((bits >> 16) & 1)", "bits + 0x7ffff"),
        ("float& at) { at = value; }", "float& at) { at = 1.02f * value; }"),
    ],
)
def test_what_computes_something_else_is_refused(
    right, wrong, compiles_anew, monkeypatch, tmp_path
):
    precision = "fp32" if "float& at" in right else "bf16"
    text = module.SOURCE.read_text()
    assert text.count(right) == 1
    source = tmp_path / "wrong.cpp"
    source.write_text(text.replace(right, wrong))
    monkeypatch.setattr(module, "SOURCE", source)
    assert "of its length away from PyTorch's (at most 0.01)" in refusal(precision)


@needs_compiler
def test_only_what_it_is_written_for_takes_it():
    layers = nn.Sequential(*(Norm(channels) for channels in (8, *CHANNELS)), nn.BatchNorm2d(16))
    compile_norms(layers, BF16)
    for network in (layers, copy.deepcopy(layers)):
        kernels = [getattr(layer, "fused", None) for layer in network]
        assert [kernels[0], kernels[4]] == [None, None]
        assert all((k.func, k.args) == (compiled_norm, (BF16,)) for k in kernels[1:4])
