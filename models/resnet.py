"""The ResNet stem of the hybrid R50-ViT: weight-standardised convolutions and GroupNorm ('BiT', arXiv 1912.11370).

A root (7x7 convolution, stride 2, then max-pool, stride 2) and three blocks of bottleneck units, the last two of
stride 2: (b, c, h, w) -> (b, 16 * width, h / 16, w / 16). Module names follow Google's `.npz` files
(`root.conv`, `block1.unit1.conv1`, `block1.unit1.gn1`, ...). As in jeonsworld/ViT-pytorch, and other than in Google's
code, padding is symmetric and a projected shortcut is normed channel by channel; so Google's weights want fine-tuning.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn


class StdConv2d(nn.Conv2d):
    """Convolution without bias whose kernels have mean 0 and (biased) variance 1 each (arXiv 1903.10520)."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1):
        super().__init__(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        var, mean = torch.var_mean(self.weight, dim=(1, 2, 3), keepdim=True, correction=0)
        return F.conv2d(x, (self.weight - mean) * torch.rsqrt(var + 1e-5), None, self.stride, self.padding)


class Bottleneck(nn.Module):
    """1x1, 3x3 (carries the stride), 1x1 convolution, each with GroupNorm, and a shortcut; activation comes last."""

    def __init__(self, in_channels: int, mid_channels: int, stride: int, project: bool):
        super().__init__()
        out_channels = 4 * mid_channels
        self.conv1 = StdConv2d(in_channels, mid_channels, 1)
        self.gn1 = nn.GroupNorm(32, mid_channels, eps=1e-6)
        self.conv2 = StdConv2d(mid_channels, mid_channels, 3, stride)
        self.gn2 = nn.GroupNorm(32, mid_channels, eps=1e-6)
        self.conv3 = StdConv2d(mid_channels, out_channels, 1)
        self.gn3 = nn.GroupNorm(32, out_channels, eps=1e-6)
        self.project = project
        if project:
            self.conv_proj = StdConv2d(in_channels, out_channels, 1, stride)
            self.gn_proj = nn.GroupNorm(out_channels, out_channels, eps=1e-5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = self.gn_proj(self.conv_proj(x)) if self.project else x
        x = F.relu(self.gn1(self.conv1(x)))
        x = F.relu(self.gn2(self.conv2(x)))
        return F.relu(self.gn3(self.conv3(x)) + shortcut)


class ResNetStem(nn.Module):
    """Root and three blocks of `depths` bottleneck units; (b, channels, h, w) -> (b, 16 * width, h / 16, w / 16).

    `width` is the channels of the root, a multiple of 32; the blocks' bottlenecks have 1, 2 and 4 times as many.
    ValueError: another number of blocks, or a width that doesn't divide.
    """

    stride = 16

    def __init__(self, channels: int, depths: tuple[int, int, int], width: int):
        super().__init__()
        if len(depths) != 3:
            raise ValueError(f"stem depths {' '.join(map(str, depths))} are not three, one a block")
        if width % 32:
            raise ValueError(f"stem width {width} is not a multiple of 32, the groups of its norms")
        conv, gn, pool = StdConv2d(channels, width, 7, 2), nn.GroupNorm(32, width, eps=1e-6), nn.MaxPool2d(3, stride=2)
        self.root = nn.Sequential(OrderedDict(conv=conv, gn=gn, relu=nn.ReLU(), pool=pool))
        in_channels = width
        for i, depth in enumerate(depths):
            mid_channels = width * 2**i
            units = OrderedDict()
            for j in range(depth):
                stride = 2 if i > 0 and j == 0 else 1
                units[f"unit{j + 1}"] = Bottleneck(in_channels, mid_channels, stride, project=j == 0)
                in_channels = 4 * mid_channels
            self.add_module(f"block{i + 1}", nn.Sequential(units))
        self.out_channels = in_channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block3(self.block2(self.block1(self.root(x))))
