"""Correlations of images with themselves: F_δ = Σ_n Σ_u x[n, u] x[n, u + δ]ᵀ for several shifts δ.

By the correlation theorem all of them come from one quantity. With X the Fourier transform of the
images, padded with zeros so that no shift wraps around, to P pixels,

    F_δ = 1/P Σ_f G_f exp(i f·δ),    G_f = Σ_n conj(X[n, f]) X[n, f]ᵀ  (C×C).

G_f for the half of the frequencies that real images need costs as much as the products of about two
shifts, however many shifts are asked for; a 3×3 kernel asks for 13.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Shift = tuple[int, int]

FEWEST_SHIFTS = 6  # from here on and with so many examples the transform is faster (on a CPU)
FEWEST_EXAMPLES = 12
CHUNK_ELEMENTS = 1 << 22  # of the spectrum, and of G, at a time


def correlations(x: Tensor, shifts: Sequence[Shift]) -> Tensor:
    """F_δ for all shifts.

    Args:
        x: images [N, C, H, W].
        shifts: (rows, columns) each, such that rows > 0, or rows = 0 and columns >= 0.

    Returns:
        [shifts, C, C].
    """
    if len(shifts) >= FEWEST_SHIFTS and x.shape[0] >= FEWEST_EXAMPLES:
        return by_transform(x, shifts)
    return by_products(x, shifts)


def by_products(x: Tensor, shifts: Sequence[Shift]) -> Tensor:
    """One product for each shift.

    Images are laid out channels last, with enough zeros behind every row and image that a shift is
    one of the flattened images, a view, that never meets a neighbouring row or image.
    """
    down = max(dy for dy, _ in shifts)
    right = max(abs(dx) for _, dx in shifts)
    image = F.pad(x.permute(0, 2, 3, 1), (0, 0, 0, right, 0, down)).contiguous()
    width, flat = image.shape[2], image.flatten(0, 2)
    result = x.new_empty(len(shifts), x.shape[1], x.shape[1])
    for (dy, dx), out in zip(shifts, result, strict=True):
        shift = dy * width + dx
        torch.mm(flat[: len(flat) - shift].mT, flat[shift:], out=out)
    return result


def by_transform(x: Tensor, shifts: Sequence[Shift]) -> Tensor:
    """All shifts from the images' Fourier transforms."""
    examples, channels, height, width = x.shape
    rows = fast_length(height + max(dy for dy, _ in shifts))
    columns = fast_length(width + max(abs(dx) for _, dx in shifts))
    spectrum = torch.view_as_real(torch.fft.rfft2(x, s=(rows, columns)))
    half = spectrum.shape[3]
    cosines, sines = _weights(shifts, rows, columns, x)
    result = x.new_zeros(len(shifts), channels * channels)
    crossed = torch.zeros_like(result)
    per_row = half * channels * max(2 * examples, 2 * channels)
    step = max(1, CHUNK_ELEMENTS // per_row)
    for first in range(0, rows, step):
        part = spectrum[:, :, first : first + step]
        count = part.shape[2] * half
        # [frequencies, real and imaginary parts of all examples, C]
        values = part.permute(2, 3, 4, 0, 1).reshape(count, 2 * examples, channels)
        here = slice(first * half, first * half + count)
        symmetric = torch.bmm(values.mT, values).view(count, -1)
        result.addmm_(cosines[:, here], symmetric)
        cross = torch.bmm(values[:, :examples].mT, values[:, examples:]).view(count, -1)
        crossed.addmm_(sines[:, here], cross)
    result, crossed = (t.view(-1, channels, channels) for t in (result, crossed))
    return result.sub_(crossed).add_(crossed.mT)


def _weights(
    shifts: Sequence[Shift], rows: int, columns: int, like: Tensor
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of f·δ over P, [shifts, frequencies]; frequencies that stand for two twice.

    In float64 first: a float32 angle would cost digits.
    """
    half = columns // 2 + 1
    vertical = torch.arange(rows, dtype=torch.float64).repeat_interleave(half) / rows
    horizontal = torch.arange(half, dtype=torch.float64).repeat(rows) / columns
    steps = torch.tensor(shifts, dtype=torch.float64)
    turns = steps[:, :1] * vertical + steps[:, 1:] * horizontal
    twice = torch.full((half,), 2.0, dtype=torch.float64)
    twice[0] = 1.0
    if columns % 2 == 0:
        twice[-1] = 1.0
    weight = twice.repeat(rows) / (rows * columns)
    angles = 2 * math.pi * turns
    return (angles.cos() * weight).to(like), (angles.sin() * weight).to(like)


def fast_length(length: int) -> int:
    """The next length whose only prime factors are 2, 3 and 5, for which transforms are fast."""
    while True:
        rest = length
        for factor in (2, 3, 5):
            while rest % factor == 0:
                rest //= factor
        if rest == 1:
            return length
        length += 1
