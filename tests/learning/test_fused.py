"""The kernels written in Triton equal PyTorch's operators, forward and backward.

On a CPU Triton's interpreter runs them, in a process of its own: it is chosen when they are
imported. It knows no bf16, whose rounding is looked at on a GPU.
"""

import copy
import gc
import os
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from longtail_experts.learning import fused as fused_module
from longtail_experts.learning.fused import (
    NormThenConv,
    fused,
    fusible,
    how_far_from_float64,
    kernel_of,
    require_same_layer,
)
from longtail_experts.learning.layers import Conv, Norm
from longtail_experts.learning.resnet import build_resnet32

NORMS = [(3, 16, 32), (5, 32, 6), (9, 64, 8)]  # images, channels, side: whole parts and others
CONVS = [  # images, channels in and out, side, size of the filter, stride
    *((3, 3, 16, 8, 3, 1), (3, 16, 16, 8, 3, 1), (2, 32, 32, 16, 3, 1), (5, 64, 64, 8, 3, 1)),
    *(
        (2, 3, 16, 8, 1, 1),
        (3, 16, 32, 8, 3, 2),
        (5, 32, 64, 4, 3, 2),
        (3, 16, 32, 8, 1, 2),
        (5, 32, 64, 4, 1, 2),
    ),
]


def kernels_take(dtype: torch.dtype) -> AbstractContextManager:
    """In here convolutions in `dtype` go by them."""
    return mock.patch.object(fused_module, "PRECISIONS", (dtype,))


def require_same_norms(device: str, dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    for num, channels, side in NORMS:
        for relu in (True, False):
            for adds in (True, False):
                norm = Norm(channels, relu=relu)
                with torch.no_grad():
                    norm.weight.copy_(1 + draw(channels) / 4)
                    norm.bias.copy_(draw(channels))
                norm = norm.to(device)
                exact = copy.deepcopy(norm).double()
                shape = (num, channels, side, side)
                x, added, dy = (
                    values.to(device, dtype, memory_format=torch.channels_last)
                    for values in (3 + 2 * draw(*shape), draw(*shape), draw(*shape))
                )
                found = gradients(norm, x, added if adds else None, dy, with_kernels=True)
                expected = gradients(exact, x.double(), added.double() if adds else None, dy)
                for ours, theirs in zip(found, expected, strict=True):
                    require_close(ours, theirs, tolerance)
                for ours, theirs in zip(norm.buffers(), exact.buffers(), strict=True):
                    require_close(ours, theirs, 1e-5)
                assert int(norm.num_batches_tracked) == 1


def gradients(module, x, added, dy, with_kernels=False) -> list[torch.Tensor]:
    leaves = [values.clone().requires_grad_() for values in (x, added) if values is not None]
    if with_kernels:
        module.fused = kernel_of(module)
    y = module(*leaves)
    y.backward(dy.to(y.dtype))
    parameters = [parameter.grad for parameter in module.parameters()]
    return [y.detach(), *(leaf.grad for leaf in leaves), *parameters]


def require_same_convolutions(
    device: str, dtype: torch.dtype, tolerance: float, sizes: Sequence[tuple[int, ...]] = CONVS
) -> None:
    generator = torch.Generator().manual_seed(0)
    for num, c_in, c_out, side, size, stride in sizes:
        conv = Conv(c_in, c_out, size, stride, passes=True)
        conv = conv.to(device, memory_format=torch.channels_last)
        x = torch.randn(num, c_in, side, side, generator=generator)
        dy = torch.randn(num, c_out, side // stride, side // stride, generator=generator)
        x, dy = (v.to(device, dtype, memory_format=torch.channels_last) for v in (x, dy))
        ours, theirs = x.clone().requires_grad_(), x.double().requires_grad_()
        with kernels_take(dtype):
            y, passed = kernel_of(conv)(ours, conv.weight, conv)
        also = torch.randn(x.shape, generator=generator).to(x)
        assert torch.equal(passed, x)
        torch.autograd.backward((y, passed), (dy, also))
        weight = conv.weight.detach().to(dtype).double().requires_grad_()
        expected = F.conv2d(theirs, weight, stride=stride, padding=size // 2)
        expected.backward(dy.double())
        require_close(y, expected, tolerance)
        values = y.detach().double()
        require_close(y.moments[0], values.mean((0, 2, 3)), 1e-5)
        require_close(y.moments[1], values.var((0, 2, 3), unbiased=False), 1e-5)
        require_close(ours.grad, theirs.grad + also.double(), tolerance)
        require_close(conv.weight.grad, weight.grad, 1e-5)  # summed in float32 in any case
        assert conv.weight.grad.dtype == torch.float32


def require_same_pairs(device: str, dtype: torch.dtype, tolerance: float, side: int) -> None:
    """Batch norm and the convolution after it, which sums up gradients for it; and the norm after
    that, which gets its moments."""
    for c_out, size, stride, relu in ((16, 3, 1, True), (32, 3, 2, True), (16, 1, 1, False)):
        torch.manual_seed(0)
        conv = Conv(16, c_out, size, stride, passes=True)
        pair = NormThenConv(Norm(16, relu), conv).to(device, memory_format=torch.channels_last)
        torch.nn.init.normal_(pair.norm.bias)
        x, added = (
            torch.randn(6, 16, side, side).to(device, dtype, memory_format=torch.channels_last)
            for _ in range(2)
        )
        for inputs in ([x], [x, added]):
            kernels = counting_kernels()
            with kernels_take(dtype), kernels as ran:
                apart = how_far_from_float64(pair, inputs, fused)
            assert {"the gradient of norm.weight", "the gradient of norm.bias"} <= set(apart)
            assert max(apart.values()) <= tolerance, apart
            assert ran == ["_moments"]  # of x; nothing sums up gradients a second time


def require_other_gradients_are_summed_up_again(device: str, dtype: torch.dtype) -> None:
    """Where a norm's output goes elsewhere as well, its gradient is not what one convolution
    made."""
    torch.manual_seed(0)
    norm, conv = Norm(16), Conv(16, 16)
    network = nn.ModuleList([norm, conv]).to(device, memory_format=torch.channels_last)
    x = torch.randn(3, 16, 8, 8).to(device, dtype, memory_format=torch.channels_last)
    exact = copy.deepcopy(network).double()

    def run(norm: nn.Module, conv: nn.Module, x: torch.Tensor) -> None:
        y = norm(x)
        (conv(y).square().sum() + (3 * y).square().sum()).backward()

    with (
        kernels_take(dtype),
        fused(network),
        counting_kernels() as ran,
    ):
        run(*network, x)
    run(*exact, x.double())
    assert ran == ["_moments", "_gradient_sums"]
    for ours, theirs in zip(network.parameters(), exact.parameters(), strict=True):
        require_close(ours.grad, theirs.grad, 1e-5)


@contextmanager
def counting_kernels() -> Iterator[list[str]]:
    """Names of those that sum up for a norm what no convolution did, as they run."""
    from longtail_experts.learning import fused_norm

    ran: list[str] = []

    class Counting:
        def __init__(self, name: str):
            self.name, self.kernel = name, getattr(fused_norm, name)

        def __getitem__(self, grid):
            ran.append(self.name)
            return self.kernel[grid]

    kernels = {name: Counting(name) for name in ("_moments", "_gradient_sums")}
    with mock.patch.multiple(fused_norm, **kernels):
        yield ran


def require_close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> None:
    apart = (ours.detach().double() - theirs.detach().double()).norm()
    assert float(apart / theirs.detach().double().norm()) <= tolerance


def interpreted_layers() -> None:
    require_same_norms("cpu", torch.float32, 1e-5)
    require_same_convolutions("cpu", torch.float32, 1e-5)
    require_same_convolutions("cpu", torch.float16, 1e-3, CONVS[::3])  # stands in for bf16
    require_same_pairs("cpu", torch.float32, 1e-5, side=8)
    require_other_gradients_are_summed_up_again("cpu", torch.float32)


def interpreted_networks() -> None:
    require_the_network_sums_up_what_it_must()
    require_a_wrong_kernel_is_found()
    require_recorded_steps_take_them()
    model = build_resnet32(10, "pad", seed=0).to(memory_format=torch.channels_last)
    assert len(fusible(model)) == 31 + 31
    images = torch.randn(4, 3, 8, 8)
    plain = copy.deepcopy(model)
    with fused(model):
        logits = model(images)
    assert all(module.fused is None for module in fusible(model))
    require_close(logits, plain(images), 1e-4)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    kept = copy.deepcopy(model.eval().state_dict())
    with fused(model):
        require_close(model(images), copy.deepcopy(model)(images), 1e-6)
    assert all(torch.equal(kept[name], x) for name, x in model.state_dict().items())


def require_the_network_sums_up_what_it_must() -> None:
    """All moments come from convolutions; of the gradients' sums, those of the last norm and of
    the two shortcuts, behind which there is none, take a kernel of their own. In two blocks a stage
    is all that comes after each other."""
    with mock.patch("longtail_experts.learning.resnet.BLOCKS_PER_STAGE", 2):
        model = build_resnet32(10, "projection", seed=0).to(memory_format=torch.channels_last)
    images = torch.randn(4, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    plain, weights = copy.deepcopy(model), torch.randn(4, 10)
    with (
        kernels_take(torch.float32),
        fused(model),
        counting_kernels() as ran,
    ):
        (model(images) * weights).sum().backward()
    (plain(images) * weights).sum().backward()
    assert ran == ["_gradient_sums"] * 3
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        require_close(ours.grad, theirs.grad, 1e-4)
    for ours, theirs in zip(model.buffers(), plain.buffers(), strict=True):
        require_close(ours, theirs, 1e-5)


def require_a_wrong_kernel_is_found() -> None:
    """Each is wrong in one of what comes out of it."""
    from longtail_experts.learning import fused_conv, fused_norm

    conv = Conv(16, 16, passes=True).to(memory_format=torch.channels_last)
    x = torch.randn(2, 16, 8, 8).contiguous(memory_format=torch.channels_last)
    norm, real = Norm(16), fused_norm.FusedNorm

    def off(result, part=...):
        result = result.clone()
        result[part] *= 1.2
        return result

    def without_a_corner(*arguments, whole=fused_conv._weight_gradient):
        return off(whole(*arguments), (slice(None), slice(None), 0, 0))

    def without_an_image(*arguments, whole=fused_conv._input_gradient):
        return off(whole(*arguments), 0)

    real_conv = fused_conv.FusedConv

    class PassesWrong(real_conv):
        @staticmethod
        def forward(ctx, *arguments):
            y, passed = real_conv.forward(ctx, *arguments)
            return y, off(passed, 0)

    wrong_norm = SimpleNamespace(apply=lambda *arguments: real.apply(*arguments) * 1.02)
    with kernels_take(torch.float32):
        require_same_layer(conv, [x])
        for name, wrong, part in (
            ("_weight_gradient", without_a_corner, "weight"),
            ("_input_gradient", without_an_image, "input 0"),
        ):
            with (
                mock.patch.object(fused_conv, name, wrong),
                pytest.raises(ValueError, match=f"the gradient of {part} of Conv.* away from"),
            ):
                require_same_layer(conv, [x])
    with (
        kernels_take(torch.float32),
        mock.patch.object(fused_conv, "FusedConv", PassesWrong),
        pytest.raises(ValueError, match=r"output 1 of Conv.* away from"),
    ):
        require_same_layer(conv, [x])

    def with_less(normed, dy, whole=fused_norm.Normed.take_sums):
        dweight, dbias = whole(normed, dy)
        return dweight * 0.98, dbias

    def without_variance(*arguments, whole=fused_conv._convolved):
        y, moments = whole(*arguments)
        return y, off(moments, 1)

    pair = NormThenConv(Norm(16), conv)
    for owner, name, wrong, part in (
        (fused_norm.Normed, "take_sums", with_less, "the gradient of norm.weight"),
        (fused_conv, "_convolved", without_variance, "the moments of output 0"),
    ):
        with kernels_take(torch.float32):
            require_same_layer(pair, [x, x])
            with (
                mock.patch.object(owner, name, wrong),
                pytest.raises(ValueError, match=f"{part} of NormThenConv"),
            ):
                require_same_layer(pair, [x, x])
    require_same_layer(norm, [x, x])
    with (
        mock.patch.object(fused_norm, "FusedNorm", wrong_norm),
        pytest.raises(ValueError, match=r"output 0 of Norm\(16, .*relu=True\) is 0.02 of"),
    ):
        require_same_layer(norm, [x, x])
    assert int(norm.num_batches_tracked) == 0  # left as it is


def require_recorded_steps_take_them() -> None:
    from test_fast_step import NUM_CLASSES, call_again, start, train

    from longtail_experts.learning import fused_norm

    def build() -> nn.Module:
        torch.manual_seed(0)
        head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, NUM_CLASSES))
        return nn.Sequential(Conv(3, 16), Norm(16), Conv(16, 16), Norm(16), *head)

    plain, recorded = start(build, None), start(build, call_again, fuses=True)
    taken = mock.Mock(side_effect=fused_norm.FusedNorm.apply)
    with mock.patch.object(fused_norm, "FusedNorm", SimpleNamespace(apply=taken)):
        losses = train(recorded, range(1), lr=0.01)
    assert recorded.path == "fused"
    assert copy.deepcopy(recorded).recorded._fuses
    assert taken.call_count > 2 * 4  # norms, times three to warm up and one to record
    assert losses == pytest.approx(train(plain, range(1), lr=0.01), rel=1e-3)

    real = fused_norm.FusedNorm.apply

    def wrong(*arguments):
        return 1.02 * real(*arguments)

    fused_module._same.clear()
    broken = start(build, call_again, fuses=True)
    with (
        mock.patch.object(fused_norm, "FusedNorm", SimpleNamespace(apply=wrong)),
        pytest.warns(UserWarning, match="kernels are not fused, and slower: output 0 of") as caught,
    ):
        assert train(broken, range(1), lr=0.01) == train(start(build, None), range(1), lr=0.01)
    assert len(caught) == 1
    assert broken.path == "graph"


needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="PyTorch comes without Triton here"
)


@needs_triton
@pytest.mark.parametrize("part", ["layers", pytest.param("networks", marks=pytest.mark.slow)])
def test_interpreted_kernels_equal_pytorchs_operators(part):
    subprocess.run(
        [sys.executable, "-c", f"import test_fused; test_fused.interpreted_{part}()"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parent,
        check=True,
        timeout=600,
    )


def without_a_pixel(layer: Norm, y: torch.Tensor) -> torch.Tensor:
    there = torch.ones_like(y)
    there[3, :, 5, 7] = 0
    return y * there


def without_a_part_of_the_variance(layer: Norm, y: torch.Tensor) -> torch.Tensor:
    layer.running_var = layer.running_var - layer.momentum * 9 / 256  # of 3 ** 2, one of 256 parts
    return y


def a_little_larger(layer: Norm, y: torch.Tensor) -> torch.Tensor:
    return 1.001 * y


@pytest.mark.parametrize(
    ("spoil", "dtype", "says"),
    [
        (without_a_pixel, torch.bfloat16, r"^a value of output 0 .* \(at most 0\.25\)$"),
        (without_a_pixel, torch.float32, "^output 0 of "),
        (without_a_part_of_the_variance, torch.bfloat16, "^running_var of "),
        (a_little_larger, torch.float32, "^output 0 of "),
    ],
)
def test_what_is_a_hundredth_of_a_result_is_found(spoil, dtype, says):
    """A pixel, or one of the parts that are summed up, in what length alone takes for rounding."""
    layer, random = Norm(16, relu=False), torch.Generator().manual_seed(1)
    x = 1 + 3 * torch.randn(32, 16, 32, 32, generator=random)
    inputs = [x.to(dtype, memory_format=torch.channels_last)]

    @contextmanager
    def spoiled(trial: Norm) -> Iterator[None]:
        with mock.patch.object(trial, "forward", lambda x: spoil(trial, trial.plain(x, None))):
            yield

    require_same_layer(layer, inputs, nullcontext)
    apart = how_far_from_float64(layer, inputs, spoiled)
    assert max(apart.values()) <= fused_module.LAYER_APART
    with pytest.raises(ValueError, match=says):
        require_same_layer(layer, inputs, spoiled)


def compiled_for_a_gpu_that_is_not_here() -> None:
    """Triton needs none to compile, only to start what it compiled: that would raise here."""
    import triton.compiler
    from triton.backends.compiler import GPUTarget
    from triton.runtime import _async_compile, driver
    from triton.runtime._async_compile import AsyncCompileMode, active_mode

    gpu = {"target": GPUTarget("cuda", 90, 32), "device": 0}
    driver.set_active(
        SimpleNamespace(
            **{f"get_current_{name}": lambda value=value: value for name, value in gpu.items()},
            get_current_stream=lambda device: 0,
        )
    )
    seen, compile_it, submit = [], triton.compiler.compile, AsyncCompileMode.submit
    interruption = threading.Event()

    def fail(*arguments, **settings):
        raise RuntimeError("PTX is not what it was")

    def fail_late(*arguments, **settings):
        interruption.wait(60)
        time.sleep(0.5)
        fail()

    compiles = [fail]  # what is patched is kept by Triton from its first kernel on

    def noting(*arguments, **settings):
        seen.append((threading.current_thread().name.rstrip("_0123456789"), gc.isenabled()))
        return compiles[0](*arguments, **settings)

    def interrupted(futures):
        interruption.set()
        raise KeyboardInterrupt

    def keeping_failures(mode, key, compile_it, finish, *clean_up):  # as Triton 3.7 and 3.8 do
        return submit(mode, key, compile_it, finish, *(lambda failed: None for _ in clean_up))

    def kernels(model):
        return {m: kernel_of(m) for m in model.modules() if kernel_of(m) is not None}

    def pair_of(channels):
        pair = NormThenConv(Norm(channels), Conv(channels, channels))
        images = torch.randn(2, channels, 8, 8).to(torch.bfloat16)
        images = images.to(memory_format=torch.channels_last)
        images.moments = fused_module.moments_of(images)
        return pair.to(memory_format=torch.channels_last), [images]

    num_kernels = 6  # a layer's output, gradient of its input; of weights, in two
    with (
        mock.patch.object(fused_module, "fusible", kernels),
        mock.patch.object(triton.compiler, "compile", noting),
        mock.patch.object(AsyncCompileMode, "submit", keeping_failures),
        warnings.catch_warnings(action="error"),
    ):
        rounds = (fail, num_kernels), (compile_it, num_kernels), (compile_it, 0)
        for compiles[0], expected in rounds:
            seen.clear()
            fused_module.compile_together([pair_of(16)])
            assert seen == [("compile", False)] * expected
            assert active_mode.get() is None
            assert gc.isenabled()

        compiles[0] = fail_late
        with (
            mock.patch.object(fused_module, "COMPILERS", 1),
            mock.patch.object(_async_compile, "as_completed", interrupted),
            pytest.raises(KeyboardInterrupt),
        ):
            fused_module.compile_together([pair_of(32)])
        assert seen == [("compile", False)]  # the others are not waited for


@needs_triton
@pytest.mark.slow
def test_kernels_are_compiled_in_threads_and_not_started_there(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run(
        [sys.executable, "-c", "import test_fused as t; t.compiled_for_a_gpu_that_is_not_here()"],
        env={
            **environment,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "TRITON_CACHE_DIR": str(tmp_path),
        },
        cwd=Path(__file__).parent,
        check=True,
        timeout=600,
    )


def test_a_convolution_is_compared_on_what_autocast_makes_of_its_input(monkeypatch):
    """The first one gets images in float32."""
    model = build_resnet32(10, "pad", seed=0)
    convs = {module: None for module in model.modules() if isinstance(module, Conv)}
    monkeypatch.setattr(fused_module, "fusible", lambda model: convs)

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            model(torch.randn(2, 3, 8, 8))

    layers_seen = fused_module.layers_in(model, run).values()
    assert {inputs[0].shape[1] for _, inputs in layers_seen} == {3, 16, 32, 64}
    assert {inputs[0].dtype for _, inputs in layers_seen} == {torch.bfloat16}


@pytest.mark.parametrize("hands_on", [True, False])
def test_a_convolution_is_compared_with_the_norm_before_it_and_a_norm_with_given_moments(
    monkeypatch, hands_on
):
    """Where that one's kernel hands them on: else the norm's own makes them."""
    model = build_resnet32(10, "projection", seed=0)
    layers = {m: None for m in model.modules() if isinstance(m, Conv | Norm)}
    monkeypatch.setattr(fused_module, "fusible", lambda model: layers)
    with kernels_take(torch.float32 if hands_on else torch.bfloat16):
        seen = fused_module.layers_in(model, lambda: model(torch.randn(2, 3, 8, 8))).values()
    kinds = [type(module).__name__ for module, _ in seen]
    assert Counter(kinds) == {"NormThenConv": 9, "Conv": 3, "Norm": 3}
    for module, (x, *_) in seen:
        if not isinstance(module, Conv):
            assert hasattr(x, "moments") == hands_on
        if hasattr(x, "moments"):
            torch.testing.assert_close(x.moments[0], x.mean((0, 2, 3)))
            torch.testing.assert_close(x.moments[1], x.var((0, 2, 3), unbiased=False))


@pytest.mark.parametrize("factor", [1, 1.003])
def test_moments_are_those_of_the_output_as_it_is_rounded(factor):
    """Of two images rounding moves them by more than what a kernel is allowed."""
    torch.manual_seed(0)
    pair = NormThenConv(Norm(16), Conv(16, 16)).to(memory_format=torch.channels_last)
    x = torch.randn(2, 16, 4, 4).to(torch.bfloat16, memory_format=torch.channels_last)

    def convolve(x: torch.Tensor, weight: torch.Tensor, conv: Conv) -> torch.Tensor:
        y = conv.plain(x)
        y.moments = factor * fused_module.moments_of(y)
        return y

    @contextmanager
    def handing_on(pair: NormThenConv) -> Iterator[None]:
        pair.conv.fused = convolve
        yield

    is_wrong = pytest.raises(ValueError, match=r"^the moments of output 0 of ")
    with nullcontext() if factor == 1 else is_wrong:
        require_same_layer(pair, [x], handing_on)


def test_a_value_at_its_channels_mean_is_not_taken_for_a_wrong_one():
    """At first weights a ReLU is closed there, and open where rounding leaves something."""
    layer, random = Norm(16), torch.Generator().manual_seed(0)
    x = torch.randint(0, 3, (2, 16, 4, 4), generator=random).to(torch.bfloat16)
    x[1] = 2 - x[0]  # so that every mean is 1, as a third of all values

    @contextmanager
    def rounding(trial: Norm) -> Iterator[None]:
        trial.fused = lambda x, added, weight, bias, norm, relu: F.relu(
            nn.BatchNorm2d.forward(norm, x.float()) + 1e-7
        ).to(x.dtype)
        yield

    require_same_layer(layer, [x.to(memory_format=torch.channels_last)], rounding)


def test_layers_are_compared_as_a_step_takes_them(monkeypatch):
    """Not in TF32: cuDNN's convolutions would be 3e-4 away, and float32 is allowed a third."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    allowed = []

    @contextmanager
    def noting(conv: Conv) -> Iterator[None]:
        conv.fused = lambda x, weight, conv: (
            allowed.append(torch.backends.cudnn.allow_tf32) or conv.plain(x)
        )
        yield

    require_same_layer(Conv(3, 16), [torch.randn(2, 3, 4, 4)], noting)
    assert allowed == [False]


def test_on_a_cpu_nothing_is_fused():
    model = build_resnet32(10, "pad", seed=0).to(memory_format=torch.channels_last)
    assert fusible(model) == {}


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-3)])
def test_on_a_gpu_kernels_equal_pytorchs_operators(dtype, tolerance):
    """bf16 rounds to 2^-9 of a value, which is what is left between them."""
    require_same_norms("cuda", dtype, tolerance)
    if dtype == torch.bfloat16:  # the only one that takes them
        require_same_convolutions("cuda", dtype, tolerance)
        require_same_pairs("cuda", dtype, fused_module.LAYER_APART, side=16)


@pytest.mark.gpu
def test_on_a_gpu_kernels_compiled_in_threads_equal_pytorchs_operators():
    """Of a size that no other test takes."""
    pair = NormThenConv(Norm(32), Conv(32, 32)).to("cuda", memory_format=torch.channels_last)
    images = torch.randn(3, 32, 24, 24, device="cuda")
    images = images.to(torch.bfloat16, memory_format=torch.channels_last)
    images.moments = fused_module.moments_of(images)
    fused_module.compile_together([(pair, [images])])
    require_same_layer(pair, [images])
