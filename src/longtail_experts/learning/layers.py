"""Convolution, and batch norm with what follows it: PyTorch's, or other kernels for training."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

PRECISIONS = (torch.bfloat16,)  # in float32 cuDNN's are as exact, and faster


class Conv(nn.Conv2d):
    """A 1x1 or 3x3 convolution that keeps the size of images or halves it, without bias."""

    fused: Callable[..., Tensor] | None = None  # takes training passes in bf16, where there is one

    def __init__(self, in_channels: int, out_channels: int, size: int = 3, stride: int = 1):
        super().__init__(in_channels, out_channels, size, stride, padding=size // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.fused is not None and self.training and _fits(x):
            return self.fused(x.contiguous(memory_format=torch.channels_last), self.weight)
        return super().forward(x)


def _fits(x: Tensor) -> bool:
    return x.dtype in PRECISIONS and x.shape[2] % 2 == x.shape[3] % 2 == 0


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
        out = super().forward(x)
        if added is not None:
            out += added
        # In place where the backward pass needs no batch norm's output: a pass over memory less.
        return nn.functional.relu(out, inplace=True) if self.relu else out
