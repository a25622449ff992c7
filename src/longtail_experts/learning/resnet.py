"""ResNet-32 for 32x32 images.

He, Zhang, Ren, Sun, *Deep Residual Learning for Image Recognition* (CVPR 2016), section 4.2:
a 3x3 convolution, three stages of five basic blocks at widths 16-32-64, global average
pooling, a linear head. Kaiming-normal initialisation of every convolution and of the head.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longtail_experts.learning.layers import Conv, Norm

WIDTHS = (16, 32, 64)
BLOCKS_PER_STAGE = 5
COSINE_SCALE = 30.0  # of the cosine head: Cao et al. (NeurIPS 2019), the authors' code


class PadShortcut(nn.Module):
    """The parameter-free shortcut ("option A"): every second pixel, zeros for the new channels."""

    def __init__(self, new_channels: int):
        super().__init__()
        self.before, self.after = new_channels // 2, new_channels - new_channels // 2

    def forward(self, x: Tensor) -> Tensor:  # [N, C, H, W] -> [N, C + new, H / 2, W / 2]
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.before, self.after))


def _shortcut(kind: str, in_channels: int, channels: int, stride: int) -> nn.Module:
    if stride == 1 and in_channels == channels:
        return nn.Sequential()
    if kind == "pad":
        return PadShortcut(channels - in_channels)
    return nn.Sequential(Conv(in_channels, channels, 1, stride), Norm(channels, relu=False))


class BasicBlock(nn.Module):
    def __init__(self, in_channels: int, channels: int, stride: int, shortcut: str):
        super().__init__()
        self.conv1 = Conv(in_channels, channels, 3, stride, passes=True)
        self.bn1 = Norm(channels)
        self.conv2 = Conv(channels, channels)
        self.bn2 = Norm(channels)
        self.shortcut = _shortcut(shortcut, in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        out, x = self.conv1(x)
        return self.bn2(self.conv2(self.bn1(out)), self.shortcut(x))


class Backbone(nn.Module):
    def __init__(self, shortcut: str):
        super().__init__()
        self.conv1 = Conv(3, WIDTHS[0])
        self.bn1 = Norm(WIDTHS[0])
        in_channels = WIDTHS[0]
        for number, channels in enumerate(WIDTHS, start=1):
            blocks = []
            for i in range(BLOCKS_PER_STAGE):
                stride = 2 if number > 1 and i == 0 else 1
                blocks.append(BasicBlock(in_channels, channels, stride, shortcut))
                in_channels = channels
            self.add_module(f"layer{number}", nn.Sequential(*blocks))

    def forward(self, x: Tensor) -> Tensor:  # [N, 3, 32, 32] -> [N, 64]
        x = self.bn1(self.conv1(x))
        x = self.layer3(self.layer2(self.layer1(x)))
        return x.mean((2, 3))


class CosineLinear(nn.Module):
    """30 cos(x, w_c): the head that LDAM's margins are measured on.

    Every w_c begins with length 1, as in the authors' code: the longer it is, the more slowly the
    same rate turns it.
    """

    def __init__(self, in_features: int, num_classes: int):
        super().__init__()
        drawn = torch.empty(num_classes, in_features).uniform_(-1, 1)
        self.weight = nn.Parameter(F.normalize(drawn))

    def forward(self, x: Tensor) -> Tensor:  # [N, in_features] -> [N, num_classes]
        return COSINE_SCALE * F.linear(F.normalize(x), F.normalize(self.weight))


class ResNet32(nn.Module):
    """Normalised images [N, 3, 32, 32] -> logits [N, num_classes].

    `shortcut` is "projection" (1x1 convolution and batch norm; 472,756 parameters for 100
    classes) or "pad" (parameter-free; 470,004). `head` is "linear", or "cosine" for losses with
    margins. The names in its state dict are a contract: `backbone.conv1 ...
    backbone.layer3.4.bn2`, `fc.weight`, and `fc.bias` of the linear head.
    """

    def __init__(self, num_classes: int, shortcut: str = "projection", head: str = "linear"):
        if shortcut not in ("projection", "pad"):
            raise ValueError(f"shortcut={shortcut!r}: must be 'projection' or 'pad'")
        super().__init__()
        self.backbone = Backbone(shortcut)
        self.fc = {"linear": nn.Linear, "cosine": CosineLinear}[head](WIDTHS[-1], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.backbone(x))


def build_resnet32(num_classes: int, shortcut: str, seed: int, head: str = "linear") -> ResNet32:
    """The network with the initial weights that `seed` decides; global random state untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ResNet32(num_classes, shortcut, head)


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
