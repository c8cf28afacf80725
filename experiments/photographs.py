"""Real pixels of CIFAR-10's shape where CIFAR-10 is not at hand: crops of photographs.

scikit-learn carries two, of 427×640 pixels. For timings, which need images but no meaning: a crop's
class is the band of the photograph that it comes from.
"""

from __future__ import annotations

import torch
from torch import Tensor

SIDE, STEP, CLASSES = 32, 8, 10
DATA = "32x32 crops of scikit-learn's two photographs"


def crops(number: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The first crops in a fixed random order: [number, 3, 32, 32] in -1 .. 1, and their classes.

    Raises:
        ValueError: there are fewer.
    """
    from sklearn.datasets import load_sample_images

    found, classes = [], []
    for picture in load_sample_images().images:
        pixels = torch.from_numpy(picture.copy()).permute(2, 0, 1).float() / 127.5 - 1
        windows = pixels.unfold(1, SIDE, STEP).unfold(2, SIDE, STEP)  # [3, rows, columns, 32, 32]
        rows, columns = windows.shape[1:3]
        found.append(windows.permute(1, 2, 0, 3, 4).flatten(0, 1))
        classes.append((torch.arange(rows) * CLASSES // rows).repeat_interleave(columns))
    images, labels = torch.cat(found), torch.cat(classes)
    if number > len(images):
        raise ValueError(f"there are {len(images)} crops of photographs, not {number}")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:number]
    return images[order].contiguous().to(device), labels[order].to(device)
