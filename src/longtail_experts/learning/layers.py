"""Convolution, and batch norm with what follows it: PyTorch's, or other kernels for training."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Conv(nn.Conv2d):
    """A 1x1 or 3x3 convolution that keeps the size of images or halves it, without bias.

    With `passes` it returns its input as well, for another branch of a block: so that the gradients
    of both can be added where this one's is computed.
    """

    fused: Callable[..., Any] | None = None  # takes training passes, where there is one

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        size: int = 3,
        stride: int = 1,
        passes: bool = False,
    ):
        super().__init__(in_channels, out_channels, size, stride, padding=size // 2, bias=False)
        self.passes = passes

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, passes={self.passes}"

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if self.fused is not None and self.training:
            return self.fused(x, self.weight, self)
        return self.plain(x)

    def plain(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        out = super().forward(x)
        return (out, x) if self.passes else out


def as_autocast_has_it(x: Tensor) -> Tensor:
    """What a convolution gets of x."""
    device = x.device.type
    enabled = torch.is_autocast_enabled(device)
    return x.to(torch.get_autocast_dtype(device)) if enabled else x


class Norm(nn.BatchNorm2d):
    """Batch norm of x [N, C, H, W], plus `added` if given, then ReLU unless that is turned off."""

    fused: Callable[..., Tensor] | None = None  # takes training passes, where there is one

    def __init__(self, num_features: int, relu: bool = True):
        super().__init__(num_features)
        self.relu = relu

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, relu={self.relu}"

    def forward(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        if self.fused is not None and self.training:
            x = x.contiguous(memory_format=torch.channels_last)
            if added is not None:
                added = added.contiguous(memory_format=torch.channels_last)
            return self.fused(x, added, self.weight, self.bias, self, self.relu)
        return self.plain(x, added)

    def plain(self, x: Tensor, added: Tensor | None) -> Tensor:
        out = super().forward(x)
        if added is not None:
            out += added
        # In place where the backward pass needs no batch norm's output: a pass over memory less.
        return nn.functional.relu(out, inplace=True) if self.relu else out
