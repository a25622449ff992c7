"""Which modules of a network take the kernels that were written for them, and when."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from longtail_experts.learning.fused_conv import Conv3x3
from longtail_experts.learning.fused_norm import Norm


def fusible(model: nn.Module) -> list[nn.Module]:
    """Modules with kernels of their own that can run where the model is."""
    parameter = next(model.parameters())
    if not parameter.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return []
    return [m for m in model.modules() if isinstance(m, Conv3x3 | Norm) and m.is_fusible]


@contextmanager
def fused(model: nn.Module) -> Iterator[None]:
    """In here training passes of `model` take these kernels."""
    modules = fusible(model)
    try:
        for module in modules:
            module.is_fused = True
        yield
    finally:
        for module in modules:
            module.is_fused = False
