"""Draws labels from a model's own predictions: their seeds, and draws out of many classes."""

from __future__ import annotations

import hashlib
import math

import torch
import torch.nn.functional as F
from torch import Tensor


def sampled_indices(weights: Tensor, generator: torch.Generator | None) -> Tensor:
    """An index for each row of weights [n, classes], by its share of the row's sum: [n].

    By inverting the distribution function: first that over blocks of about √classes, then that
    inside a block. It reads all weights once and takes one random number for each row, where
    `torch.multinomial` takes one for each class: on a CPU six to thirteen times as long from 512
    classes on. Sums are in float64: those of float32 would move the probabilities of rare classes.
    """
    if weights.is_cuda and torch.are_deterministic_algorithms_enabled():
        # The running sum of a GPU is not.
        return torch.multinomial(weights, 1, generator=generator).squeeze(1)
    n, classes = weights.shape
    wide = torch.float32 if weights.device.type == "mps" else torch.float64  # which mps lacks
    width = math.isqrt(classes - 1) + 1
    blocks = F.pad(weights, (0, -classes % width)).reshape(n, -(-classes // width), width)
    below = blocks.sum(-1, dtype=wide).cumsum(-1)
    uniform = torch.rand(n, 1, dtype=wide, device=weights.device, generator=generator)
    target = uniform * below[:, -1:]
    block = torch.searchsorted(below, target, right=True).clamp_(max=below.shape[1] - 1)
    start = torch.where(block > 0, below.gather(1, (block - 1).clamp(min=0)), 0)
    inside = blocks.gather(1, block.unsqueeze(-1).expand(-1, 1, width)).squeeze(1)
    index = torch.searchsorted(inside.cumsum(-1, dtype=wide), target - start, right=True)
    return (block * width + index.clamp_(max=width - 1)).clamp_(max=classes - 1).squeeze(1)


def sampling_seed(seed: int, step: int, rank: int) -> int:
    """The seed of the labels that a rank samples in a step, 32 bits.

    It follows from these three alone: a restored run samples the same labels, on any number of
    ranks, and ranks never the same as each other.
    """
    digest = hashlib.blake2b(f"{seed} {step} {rank}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")
