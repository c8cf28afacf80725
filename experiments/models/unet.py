"""The U-Net of AlgoPerf's fastMRI workload, with any number of levels.

Ronneberger et al. 2015 (arXiv 1505.04597) as in Zbontar et al. 2018 (arXiv 1811.08839): two 3 x 3
convolutions with instance normalisation and leaky ReLU a level, average pooling, and transposed
convolutions on the way up.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SLOPE = 0.2


def _block(channels: int, width: int) -> nn.Sequential:
    def half(into: int) -> list[nn.Module]:
        convolution = nn.Conv2d(into, width, 3, padding=1, bias=False)
        return [convolution, nn.InstanceNorm2d(width), nn.LeakyReLU(SLOPE)]

    return nn.Sequential(*half(channels), *half(width))


class UNet(nn.Module):
    """Maps images [N, H, W] to images; H and W are multiples of 2 to the number of levels.

    Args:
        width: channels of the first level; each next one has twice as many.
        levels: how often the image is halved.
    """

    def __init__(self, width: int, levels: int) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(levels + 1)]
        self.down = nn.ModuleList(
            _block(before, after) for before, after in zip([1, *widths], widths[:-1], strict=False)
        )
        self.bottom = _block(widths[-2], widths[-1])
        upwards = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.grow = nn.ModuleList(
            nn.Sequential(
                nn.ConvTranspose2d(below, above, 2, stride=2, bias=False),
                nn.InstanceNorm2d(above),
                nn.LeakyReLU(SLOPE),
            )
            for below, above in upwards
        )
        self.up = nn.ModuleList(_block(2 * above, above) for _, above in upwards)
        self.head = nn.Conv2d(width, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        """The images of the same size."""
        x, kept = images.unsqueeze(1), []
        for block in self.down:
            kept.append(block(x))
            x = F.avg_pool2d(kept[-1], 2)
        x = self.bottom(x)
        for grow, block in zip(self.grow, self.up, strict=True):
            x = block(torch.cat([grow(x), kept.pop()], 1))
        result: Tensor = self.head(x).squeeze(1)
        return result
