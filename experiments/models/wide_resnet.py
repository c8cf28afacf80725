"""Wide ResNet without normalisation layers, by Fixup initialisation.

Zagoruyko and Komodakis 2016 (arXiv 1605.07146): depth 6n + 4, three groups of n blocks with widths
16k, 32k, 64k. Zhang, Dauphin, Ma 2019 (arXiv 1901.09321): a scalar bias before every convolution
and activation, a scalar factor at the end of each branch, the first convolution of a branch scaled
by L^(-1/2) for L blocks, its last one and the classifier zero.

The scalars are bare parameters: in K-FAC they are diagonal parts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FixupBlock(nn.Module):
    """A pre-activation basic block: [N, in, H, W] to [N, out, H / stride, W / stride]."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(1)) for _ in range(5))
        self.scale = nn.Parameter(torch.ones(1))
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        changes = stride != 1 or in_channels != out_channels
        self.shortcut = (
            nn.Conv2d(in_channels, out_channels, 1, stride, bias=False) if changes else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """Adds the branch to the shortcut."""
        b = self.biases
        active = F.relu(x + b[0]) + b[1]
        y = F.relu(self.conv1(active) + b[2]) + b[3]
        y = self.conv2(y) * self.scale + b[4]
        shortcut: Tensor = x if self.shortcut is None else self.shortcut(active)
        total: Tensor = y + shortcut
        return total


class WideResNet(nn.Module):
    """The network; maps [N, channels, H, W] to logits [N, num_classes].

    Args:
        depth: 6n + 4.
        width: the factor k.
        num_classes: number of logits.
        channels: channels of the images.
        fixup_zeros: whether the layers that Fixup starts at zero do so. Timing and curvature at
            initialisation need them filled: with a zero classifier all other layers have B = 0.

    Raises:
        ValueError: the depth is not 6n + 4.
    """

    def __init__(
        self,
        depth: int = 16,
        width: int = 4,
        num_classes: int = 10,
        channels: int = 3,
        fixup_zeros: bool = True,
    ) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 4, 6)
        if rest or blocks < 1:
            raise ValueError(f"the depth of a Wide ResNet is 6n + 4 (10, 16, 22, ...), not {depth}")
        self.stem = nn.Conv2d(channels, 16, 3, 1, 1, bias=False)
        self.stem_bias = nn.Parameter(torch.zeros(1))
        layers: list[FixupBlock] = []
        before = 16
        for group in range(3):
            for index in range(blocks):
                out = 16 * width * 2**group
                layers.append(FixupBlock(before, out, 2 if group and not index else 1))
                before = out
        self.blocks = nn.ModuleList(layers)
        self.head_biases = nn.ParameterList(nn.Parameter(torch.zeros(1)) for _ in range(2))
        self.head = nn.Linear(before, num_classes)
        self._initialise(len(layers), fixup_zeros)

    def _initialise(self, depth: int, fixup_zeros: bool) -> None:
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                with torch.no_grad():
                    if name.endswith("conv1") or (name.endswith("conv2") and not fixup_zeros):
                        module.weight.mul_(depth**-0.5)
                    elif name.endswith("conv2"):
                        module.weight.zero_()
        nn.init.zeros_(self.head.bias)
        if fixup_zeros:
            nn.init.zeros_(self.head.weight)

    def forward(self, images: Tensor) -> Tensor:
        """Logits, [N, num_classes]."""
        x: Tensor = self.stem(images) + self.stem_bias
        for block in self.blocks:
            x = block(x)
        x = F.relu(x + self.head_biases[0]).mean((2, 3)) + self.head_biases[1]
        logits: Tensor = self.head(x)
        return logits
