"""Which layers of a network are compiled for a CPU, and what a training makes of them."""

import copy
import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from itertools import count
from pathlib import Path

import pytest
import torch
from learning.compiled_layers import BF16, draw, needs_compiler, outcome
from torch import Tensor, nn

from longtail_experts.learning import compiled_conv as conv_module
from longtail_experts.learning import compiled_norm as norm_module
from longtail_experts.learning import compiler
from longtail_experts.learning.compiled import CHANNELS, compile_layers
from longtail_experts.learning.compiled_conv import CompiledConv, compiled_conv
from longtail_experts.learning.compiled_norm import CompiledNorm, compiled_norm
from longtail_experts.learning.fused import FLOAT32_APART, LAYER_APART, STATISTICS_APART
from longtail_experts.learning.layers import Conv, Norm
from longtail_experts.learning.resnet import build_resnet32
from longtail_experts.learning.step import (
    COMPILE_REPAID_AFTER,
    DTYPES,
    TrainState,
    prepare_training,
    start_training,
    train_step,
)

LISTED = compiler.FLAGS
BEGINS = """
import time
from pathlib import Path
import torch
from longtail_experts.learning.compiler import compile_ahead
compile_ahead(Path("x.cpp"), torch.float32)
"""


def start(model: nn.Module | None = None, **changes) -> TrainState:
    settings = {"planned_images": max(COMPILE_REPAID_AFTER.values()), "precision": "bf16"}
    state = start_training(
        build_resnet32(5, "projection", seed=0) if model is None else model,
        **{"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4, "device": "cpu"},
        **{**settings, **changes},
    )
    state.model.train()
    return state


def all_weights(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])


def of_logits(logits: Tensor, targets: Tensor) -> Tensor:
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return nn.functional.cross_entropy(logits, targets)


def losses_of(
    state: TrainState,
    num_steps: int = 4,
    precision: str = "bf16",
    size: int = 16,
    lr: float = 0.01,
) -> list[float]:
    random = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(num_steps):
        images = torch.randn(size, 3, 16, 16, generator=random).to(state.model.fc.weight.dtype)
        targets = torch.randint(5, (size,), generator=random)
        loss = train_step(state, images, targets, of_logits, lr, precision)
        losses.append(float(loss))
    return losses


@needs_compiler
@pytest.mark.parametrize(("precision", "apart"), [("bf16", 0.02), ("fp32", 1e-6)])
def test_a_training_takes_them(precision, apart, monkeypatch):
    """In steps so small, of so many images, that what flips is little: in bf16 the losses of either
    path are up to 7 % from float64's with 16 images and a rate of 0.01 (eight networks)."""
    taken = []

    def noted(kind: type[torch.autograd.Function]) -> None:
        real = kind.forward
        note = lambda *given: taken.append((kind, given[1].dtype)) or real(*given)  # noqa: E731
        monkeypatch.setattr(kind, "forward", note)

    noted(CompiledNorm)
    noted(CompiledConv)
    state, plain = (start(precision=precision, fast=fast) for fast in (True, False))
    assert (state.path, plain.path) == ("compiled", "plain")
    taken.clear()
    steps = {"precision": precision, "size": 64, "lr": 0.003}
    losses = losses_of(state, **steps)
    norms, convs = ((kind, DTYPES[precision]) for kind in (CompiledNorm, CompiledConv))
    assert Counter(taken) == {norms: len(losses) * 33, convs: len(losses) * 28}
    expected = losses_of(plain, **steps)
    assert losses[0] == pytest.approx(expected[0], rel=apart)
    assert losses == pytest.approx(expected, rel=0.02)  # activations next to 0 flip
    images = torch.randn(2, 3, 32, 32)
    again = start(fast=False).model
    again.load_state_dict(state.model.state_dict())
    assert torch.equal(state.model.eval()(images), again.eval()(images))


@needs_compiler
@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_a_step_is_about_as_far_from_one_in_float64_as_pytorchs(precision):
    """Of several networks: a rounding error is nothing beside an activation that it takes to the
    other side of a ReLU, of which there may be none."""
    outcomes = []
    for seed in range(6):
        models = [build_resnet32(5, "projection", seed=seed) for _ in range(3)]
        models[2].double()
        kinds = (True, precision), (False, precision), (False, "fp32")
        for model, (fast, kind) in zip(models, kinds, strict=True):
            losses_of(start(model, precision=precision, fast=fast), 1, kind)
        outcomes.append([all_weights(model).double() for model in models])
    compiled, plain, exact = map(torch.cat, zip(*outcomes, strict=True))
    assert 0 < (compiled - exact).norm() < 1.25 * (plain - exact).norm()


class OneReLU(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.norm = Conv(3, 16), Conv(16, 16), Norm(16)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(self.conv2(self.conv1(x))).mean((2, 3)))


@needs_compiler
def test_fifty_steps_in_fp32_equal_plain_ones():
    """Losses within 1e-5, weights and statistics within 1e-3 of their largest value; the last batch
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
        torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-3 * scale)


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
    assert all(m.fused is None for m in state.model.modules() if isinstance(m, Norm | Conv))
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
    monkeypatch.setattr(compiler, "COMPILER_SECONDS", 0.5)
    monkeypatch.setenv("CXX", f"{sys.executable} -c 'import time; time.sleep(60)'")
    assert refusal().endswith("timed out after 0.5 seconds")


@needs_compiler
def test_what_is_compiled_ahead_is_not_compiled_again(compiles_anew, monkeypatch, tmp_path):
    log, compiler = tmp_path / "log", tmp_path / "compiler.py"
    compiler.write_text(
        "import os, sys\n"
        f"open({str(log)!r}, 'a').write(sys.argv[-3] + '\\n')\n"
        "os.execvp('c++', ['c++', *sys.argv[1:]])\n"
    )
    monkeypatch.setenv("CXX", f"{sys.executable} {compiler}")
    how = {"planned_images": COMPILE_REPAID_AFTER["fp32"], "precision": "fp32"}
    prepare_training(**how, device="cuda", fast=True)
    prepare_training(**how, device="cpu", fast=False)
    assert not compiled_sources(log)
    prepare_training(**how, device="cpu", fast=True)
    assert start(**how).path == "compiled"
    assert compiled_sources(log) == ["compiled_conv.cpp", "compiled_norm.cpp"]


def compiled_sources(log: Path) -> list[str]:
    return sorted(Path(line).name for line in log.read_text().split()) if log.exists() else []


@pytest.mark.skipif(os.name != "posix", reason="POSIX says which processes there are")
def test_what_is_compiled_ahead_and_not_needed_ends_with_the_process(tmp_path):
    """A run that is refused meanwhile leaves nothing behind, and waits for nothing."""
    room, number = tmp_path / "room", tmp_path / "number"
    room.mkdir()
    compiler = f"import os, time; open({str(number)!r}, 'w').write(f'{{os.getpid()}}\\n')"
    program = BEGINS + (
        f"while not Path({str(number)!r}).exists() or not Path({str(number)!r}).read_text():\n"
        "    time.sleep(0.05)\n"
    )
    how = {"CXX": shlex.join([sys.executable, "-c", f"{compiler}; time.sleep(600)"])}
    run_program(program, {**how, "TMPDIR": str(room)})
    assert not list(room.iterdir())
    with pytest.raises(ProcessLookupError):
        os.kill(int(number.read_text()), 0)


def test_a_compiler_that_is_missing_is_not_missed_ahead(tmp_path):
    run_program(BEGINS, {"CXX": "no-such-compiler", "TMPDIR": str(tmp_path)})
    assert not list(tmp_path.iterdir())


def run_program(program: str, environment: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stderr == ""


@needs_compiler
def test_with_one_that_takes_what_is_not_a_number_for_one(compiles_anew, monkeypatch):
    monkeypatch.setattr(compiler, "FLAGS", (*LISTED, "-O1"))
    monkeypatch.setenv("CXX", "c++ -ffast-math")
    norm, x = Norm(16), draw(4, 16, 8, 8)
    compile_layers(norm, BF16)
    x[1, 5, 2, 2] = float("nan")
    assert outcome(norm, x)["output 0"].isnan()[:, 5].all()


@needs_compiler
def test_with_one_that_brings_threads_of_its_own(compiles_anew, monkeypatch):
    looks = count()
    monkeypatch.setattr(
        compiler,
        "openmp_libraries",
        lambda: {"libgomp.so.1", "libomp.so"} if next(looks) else {"libgomp.so.1"},
    )
    for precision in DTYPES:  # it stays there: the next look finds nothing new
        assert refusal(precision) == "what c++ compiles brings threads of its own: libomp.so"


@pytest.mark.skipif(sys.platform != "linux", reason="Linux says which libraries there are")
def test_libraries_of_threads_are_found():
    assert any("omp" in library for library in compiler.openmp_libraries())


WRONG = {  # each in one value, edge or sum
    "bf16": [
        ("value <= 0.f ? 0.f : value", "value"),
        ("value <= 0.f ? 0.f : gradient", "gradient"),
        ("if (ADDS) value += wide(also[c]);", ""),
        ("if (ADDS) put(d, masked[c]);", "if (ADDS) masked[c] = gradient[c];"),
        ("squares[c] / rows - mean * mean", "squares[c] / rows"),
        ("momentum * (moments[c]", "0.2 * (moments[c]"),
        ("- of_x[c] * affine.mean[c]", ""),
        (
            "(Words)values, up = bits + 0x7fff + ((bits >> 16) & 1)",
            "(Words)values, up = bits + 0x7ffff",
        ),
        ("row < begin_of(rows, part + 1)", "row < begin_of(rows, part + 1) - 1"),
        ("uint32_t up = bits + 0x7fff + ((bits >> 16) & 1)", "uint32_t up = bits + 0x7ffff"),
        ("(halves, Words) << 16)", "(halves, Words) << 16 | 0x80000)"),
    ],
    "fp32": [
        ("float& at) { at = value; }", "float& at) { at = 1.02f * value; }"),
        ("bool above = row > 0", "bool above = row > TILE"),
        ("below = row + TILE < images.height", "below = row + 2 * TILE < images.height"),
        ("j == 0 && left == 0", "j == 0 && left <= TILE"),
        ("left + TILE == images.width", "left + 2 * TILE >= images.width"),
        ("row = row + 1 < down ? row + 1 : 0;", "row++;"),
        ("out[5] = d[5] - (PP + QQ) * d[3]", "out[5] = d[5] - PP * d[3]"),
        ("out[3] = PP * odd_p + QQ * odd_q + m[5];", "out[3] = PP * odd_p + QQ * odd_q;"),
        ("out[2] = PP * even_p + QQ * even_q + u[5];", "out[2] = PP * even_p + QQ * even_q;"),
        ("Vector even_q = dy[0] + QQ * dy[2]", "Vector even_q = dy[0] + PP * dy[2]"),
        ("odd_p = AT_P * P * g[1];", "odd_p = AT_P * g[1];"),
        ("added ? sum + load(added + at) : sum", "sum"),
        ("tile < count; tile += ROWS<C>", "tile + ROWS<C> <= count; tile += ROWS<C>"),
        ("store(adds ? load(at) + sums", "store(adds ? sums"),
        ("part < PARTS; part++) sum +=", "part < PARTS - 1; part++) sum +="),
        ("(backward ? o * C + i : i * C + o)", "(i * C + o)"),
        ("backward ? 8 - tap : tap", "backward ? 6 - 3 * y + x : tap"),
        ("(backward ? 8 - tap : tap)", "(backward ? 3 * y + 2 - x : tap)"),
    ],
}


@needs_compiler
@pytest.mark.parametrize(
    ("precision", "right", "wrong"),
    [
        pytest.param(precision, *pair, marks=[] if number % 7 == 0 else pytest.mark.slow)
        for precision, pairs in WRONG.items()
        for number, pair in enumerate(pairs)
    ],
)
def test_what_computes_something_else_is_refused(
    precision, right, wrong, compiles_one_anew, monkeypatch, tmp_path
):
    (module,) = (m for m in (norm_module, conv_module) if right in m.SOURCE.read_text())
    text = module.SOURCE.read_text()
    assert text.count(right) == 1
    source = tmp_path / "wrong.cpp"
    source.write_text(text.replace(right, wrong))
    monkeypatch.setattr(module, "SOURCE", source)
    limits = "|".join(f"{limit:g}" for limit in (LAYER_APART, STATISTICS_APART, FLOAT32_APART))
    says = rf"of its length away from PyTorch's \(at most ({limits})\)$"
    assert re.search(says, refusal(precision))


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_only_what_it_is_written_for_takes_it(dtype):
    norms = [*(Norm(channels) for channels in (8, *CHANNELS)), nn.BatchNorm2d(16)]
    convs = [Conv(3, 16), Conv(16, 32), Conv(8, 8), Conv(16, 16, stride=2), Conv(16, 16, 1)]
    convs += [nn.Conv2d(16, 16, 3, padding=1), *(Conv(channels, channels) for channels in CHANNELS)]
    layers = nn.ModuleList([*norms, *convs])
    compile_layers(layers, dtype)
    for network in (layers, copy.deepcopy(layers)):
        kernels = [getattr(layer, "fused", None) for layer in network]
        for taken, kernel in ((kernels[1:4], compiled_norm), (kernels[-3:], compiled_conv)):
            assert all((k.func, k.args) == (kernel, (dtype,)) for k in taken)
        assert not any([kernels[0], *kernels[4:-3]])


@needs_compiler
def test_random_numbers_to_come_stay_the_same(compiles_one_anew):
    """Those of a training are not drawn otherwise because layers were compared before it."""
    before = torch.get_rng_state()
    for dtype in DTYPES.values():
        compile_layers(nn.Sequential(Norm(16)), dtype)
    assert torch.equal(torch.get_rng_state(), before)
