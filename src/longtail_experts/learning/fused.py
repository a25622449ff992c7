"""Which modules of a network take the kernels that were written for them, and when."""

import copy
import logging
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from longtail_experts.learning.backend import exact_float32
from longtail_experts.learning.layers import Conv, Norm, as_autocast_has_it

log = logging.getLogger(__name__)

WIDTHS = (16, 32, 64)  # channels that convolutions have kernels for, and 3 going in
PRECISIONS = (torch.bfloat16,)  # that these take: in float32 cuDNN's are as exact, and faster
# How far a result may be from that of the same inputs in float64, lengths as in Euclid. bf16
# rounds a value to 2^-9; a tap that is left out, or a row of pixels, is ten times as much away.
LAYER_APART = 1e-2
FLOAT32_APART = 1e-4  # of outputs in float32; of gradients a ReLU may let another one through
STATISTICS_APART = 1e-3  # summed up in 256 parts: without one of them they are 4e-3 away
VALUE_APART = 0.25  # of one value of an output, as a share of their root mean square
NO_TIE = 1e-3  # added to biases, of which no value of few bits is likely to be the negative
MOMENTS = "the moments of output 0"
COMPILERS = 8  # threads
_same: set[tuple] = set()  # kinds of module, and of input, that were found to agree


Kernel = Callable[..., Any]  # of a layer
Kernels = Callable[[nn.Module], AbstractContextManager]  # of a network, inside a context


def fusible(model: nn.Module) -> dict[nn.Module, Kernel]:
    """Modules with kernels of their own that can run where the model is."""
    parameter = next(model.parameters())
    if not (parameter.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
        return {}
    if find_spec("triton") is None:  # PyTorch without CUDA, or not on Linux
        return {}
    kernels = {module: kernel_of(module) for module in model.modules()}
    return {module: kernel for module, kernel in kernels.items() if kernel is not None}


def kernel_of(module: nn.Module) -> Kernel | None:
    from longtail_experts.learning import fused_conv, fused_norm  # they import Triton

    if isinstance(module, Norm):  # a program holds whole rows: a power of two
        channels = module.num_features
        return None if channels > 256 or channels & (channels - 1) else fused_norm.FusedNorm.apply
    if not isinstance(module, Conv):
        return None
    in_order = module.weight.is_contiguous(memory_format=torch.channels_last)
    fits = module.out_channels in WIDTHS and module.in_channels in (3, *WIDTHS)
    return fused_conv.fused_conv if in_order and fits else None


def takes(x: Tensor) -> bool:
    """Whether a convolution's kernels take x, and make its output's moments: in bf16, with even
    sides."""
    return x.dtype in PRECISIONS and not (x.shape[2] % 2 or x.shape[3] % 2)


@contextmanager
def fused(model: nn.Module) -> Iterator[None]:
    """In here training passes of `model` take these kernels."""
    kernels = fusible(model)
    try:
        for module, kernel in kernels.items():
            module.fused = kernel
        yield
    finally:
        for module in kernels:
            module.fused = None


Layer = tuple[nn.Module, list[Tensor]]  # and what came to it


class NormThenConv(nn.Module):
    """They belong together: the one sums up gradients for the other."""

    def __init__(self, norm: nn.Module, conv: nn.Module):
        super().__init__()
        self.norm, self.conv = norm, conv

    def forward(self, *inputs: Tensor) -> Any:
        return self.conv(self.norm(*inputs))


def require_same_layers(model: nn.Module, run: Callable[[], None]) -> None:
    """ValueError unless the kernels do what PyTorch does, forward and backward, with what comes to
    each kind of layer while `run` takes a training step of `model`. Once a process."""
    layers = layers_in(model, run, known=_same)
    if next(model.parameters()).is_cuda:
        try:
            compile_together(layers.values())
        except Exception as error:  # they are compiled when they are started, as ever
            log.debug("kernels are not compiled together: %s", error)
    for kind, (module, inputs) in layers.items():
        require_same_layer(module, inputs)
        _same.add(kind)


def compile_together(layers: Iterable[Layer]) -> None:
    """In threads what their comparison on a GPU compiles else, one kernel after another, when it
    starts them: half a minute where none is in Triton's cache."""
    from longtail_experts.learning.fused_norm import compiled_together

    # Backward passes in this thread too, which is the one that starts nothing.
    with compiled_together(COMPILERS), torch.autograd.set_multithreading_enabled(False):
        for module, inputs in layers:
            trial = copy.deepcopy(module)
            with fused(trial):
                _results(trial, inputs, torch.Generator(inputs[0].device))


def layers_in(
    model: nn.Module, run: Callable[[], None], known: Collection[tuple] = ()
) -> dict[tuple, Layer]:
    """One layer that has kernels of each kind, beside the known ones, and what comes to it: a
    convolution with the batch norm before it, where there is one; else either alone."""
    seen: dict[tuple, Layer] = {}
    made_by: dict[int, tuple[nn.Module, Tensor]] = {}  # outputs, by id: kept, so that it is theirs
    with_moments: set[nn.Module] = set()  # convolutions that hand on those of their output
    # That no convolution has followed yet: what came to them, and whether with moments.
    norms: dict[nn.Module, tuple[tuple[Tensor, ...], bool]] = {}

    def note(module: nn.Module, inputs: tuple[Tensor, ...], has_moments: bool = False) -> None:
        kind = (str(module), has_moments, *((x.device, x.dtype, x.shape) for x in inputs))
        if kind not in seen and kind not in known:
            copies = [x.detach().clone() for x in inputs]
            if has_moments:
                copies[0].moments = moments_of(copies[0])
            seen[kind] = module, copies

    def look(module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        made = output[0] if isinstance(output, tuple) else output
        before, _ = made_by.get(id(inputs[0]), (None, None))
        made_by[id(made)] = module, made
        if isinstance(module, Conv) and takes(as_autocast_has_it(inputs[0])):
            with_moments.add(module)
        if isinstance(module, Norm):
            norms[module] = inputs, before in with_moments
        elif before in norms:
            note(NormThenConv(before, module), *norms.pop(before))
        else:
            note(module, tuple(map(as_autocast_has_it, inputs)))

    hooks = [module.register_forward_hook(look) for module in fusible(model)]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    for norm, came in norms.items():
        note(norm, *came)
    return seen


def moments_of(x: Tensor) -> Tensor:
    """[2, C], mean and variance of a layer's output: those that were computed with it, or as its
    values say."""
    if hasattr(x, "moments"):
        return x.moments
    x = x.detach() if x.dtype == torch.float64 else x.detach().float()
    return torch.stack([x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)])


def require_same_layer(module: nn.Module, inputs: list[Tensor], kernels: Kernels = fused) -> None:
    """`require_same_layers` of one module, which is left as it is."""
    for name, (found, exact) in _beside_float64(module, inputs, kernels).items():
        apart, at_most = _apart(found, exact), _at_most(name, inputs[0].dtype)
        if not apart <= at_most:
            raise ValueError(
                f"{name} of {module} is {apart:.2g} of its length away from PyTorch's (at most "
                f"{at_most:g})"
            )
        if not name.startswith("output"):
            continue
        worst = float((found - exact).abs().max() / (exact.square().mean().sqrt() + 1e-12))
        if not worst <= VALUE_APART:
            raise ValueError(
                f"a value of {name} of {module} is {worst:.2g} of their root mean square away from "
                f"PyTorch's (at most {VALUE_APART:g})"
            )


def _at_most(name: str, dtype: torch.dtype) -> float:
    """How far a result of that name may be away, of a layer that takes `dtype`."""
    if name == MOMENTS or "running" in name:
        return STATISTICS_APART
    return FLOAT32_APART if name.startswith("output") and dtype == torch.float32 else LAYER_APART


def how_far_from_float64(
    module: nn.Module,
    inputs: list[Tensor],
    kernels: Kernels = nullcontext,
) -> dict[str, float]:
    """Of all that comes out of a training pass of the module, forward and backward: how far it is
    from that of the same inputs in float64, as a share of its length. PyTorch's, or that of
    `kernels`."""
    results = _beside_float64(module, inputs, kernels)
    return {name: _apart(found, exact) for name, (found, exact) in results.items()}


def _apart(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / (exact.norm() + 1e-12))


def _beside_float64(
    module: nn.Module, inputs: list[Tensor], kernels: Kernels
) -> dict[str, tuple[Tensor, Tensor]]:
    """What `how_far_from_float64` compares, in float64."""
    trial = copy.deepcopy(module)
    for layer in trial.modules():
        if isinstance(layer, Norm):  # else what equals its mean is at a ReLU's 0, as biases begin
            layer.bias.data += NO_TIE
    exact = copy.deepcopy(trial)
    for layer in exact.modules():
        if isinstance(layer, Conv):  # autocast rounds its weights, as the kernels do
            layer.weight.data = layer.weight.data.to(inputs[0].dtype)
    random = torch.Generator(inputs[0].device).manual_seed(0)
    with kernels(trial), exact_float32():  # as in a step
        found = _results(trial, inputs, random)
    exact, exactly = exact.double(), [x.double() for x in inputs]
    expected = _results(exact, exactly, random.manual_seed(0), inputs[0].dtype)
    if MOMENTS in found:  # of the values that it has, rounded as they are
        expected[MOMENTS] = moments_of(found["output 0"].double())
    return {name: (found[name].double(), exact.double()) for name, exact in expected.items()}


def _results(
    module: nn.Module,
    inputs: list[Tensor],
    random: torch.Generator,
    gradients_in: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Output, and the gradients for a random one of it, which has values of the inputs' type or
    another; statistics as they are then, and those that a convolution hands on."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    if hasattr(inputs[0], "moments"):
        leaves[0].moments = inputs[0].moments
    dtype = inputs[0].dtype
    with torch.autocast(leaves[0].device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        out = module.train()(*leaves)
        outputs = out if isinstance(out, tuple) else (out,)
        gradients = [torch.randn(y.shape, generator=random, device=y.device) for y in outputs]
        # In the memory order that the next layer's would have.
        order = {"dtype": gradients_in or dtype, "memory_format": torch.channels_last}
        torch.autograd.backward(
            outputs, [dy.to(**order).to(y.dtype) for dy, y in zip(gradients, outputs, strict=True)]
        )
    found = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    found |= {f"the gradient of input {i}": x.grad for i, x in enumerate(leaves)}
    found |= {f"the gradient of {name}": p.grad for name, p in module.named_parameters()}
    if not isinstance(module, Norm):
        found[MOMENTS] = moments_of(outputs[0])
    return found | {name: x.detach().clone() for name, x in module.named_buffers()}
