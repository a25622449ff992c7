"""What tests of layers in C++ share."""

import shutil
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
BF16 = torch.bfloat16


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


def assert_same_bits_for_any_number_of_threads(layer: Callable[[], nn.Module], *inputs: Tensor):
    """Of a new `layer` for each."""
    outcomes = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        outcomes.append(outcome(layer(), *inputs))
    torch.set_num_threads(1)
    for other in outcomes[1:]:
        assert all(torch.equal(other[name], values) for name, values in outcomes[0].items())


def outcome(layer: nn.Module, *inputs: Tensor) -> dict[str, Tensor]:
    """All that comes out of a training pass, forward and backward."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    outputs = layer(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    incoming = [draw(*y.shape, seed=9 + i, mean=0.0, dtype=y.dtype) for i, y in enumerate(outputs)]
    torch.autograd.backward(outputs, incoming)
    found = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    gradients = {f"gradient {i}": x.grad for i, x in enumerate([*leaves, *layer.parameters()])}
    return {**found, **gradients, **dict(layer.named_buffers())}
