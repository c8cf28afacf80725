"""Correlations of images with themselves: F_δ = Σ_n Σ_u x[n, u] x[n, u + δ]ᵀ for several shifts δ.

By the correlation theorem all of them come from one quantity. With X the Fourier transform of the
images, padded with zeros so that no shift wraps around, to P×Q pixels,

    F_δ = 1/(P Q) Σ_f G_f exp(i f·δ),    G_f = Σ_n conj(X[n, f]) X[n, f]ᵀ  (C×C).

G_f for the half of the frequencies that real images need costs as much as the products of about two
shifts, however many shifts are asked for; a 3×3 kernel asks for 13. The transforms are products
with matrices of cosines and sines: images are small, and the spectrum comes out in the order in
which G needs it, which takes longer than the transform to be brought about afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import tuning

Shift = tuple[int, int]


def correlations(x: Tensor, shifts: Sequence[Shift]) -> Tensor:
    """F_δ for all shifts.

    Args:
        x: images [N, C, H, W].
        shifts: (rows, columns) each, such that rows > 0, or rows = 0 and columns >= 0.

    Returns:
        [shifts, C, C].
    """
    return by_transform(x, shifts) if prefers_transform(x.shape, shifts) else by_products(x, shifts)


def prefers_transform(shape: Sequence[int], shifts: Sequence[Shift]) -> bool:
    """Whether the transform takes fewer multiplications (as measured on a CPU)."""
    examples, channels, height, width = shape
    down, right = _reach(shifts)
    rows, columns = height + down, width + right
    frequencies = rows * (columns // 2 + 1)
    # 3 N for an entry of G, 2 for each shift that it enters, and 50 to have it in memory.
    entries = frequencies * channels**2 * (3 * examples + 2 * len(shifts) + 50)
    transform = 1.75 * (rows + columns) * examples * channels * height * width
    products = len(shifts) * examples * height * width * channels**2
    return entries + transform < products


def by_products(x: Tensor, shifts: Sequence[Shift]) -> Tensor:
    """One product for each shift.

    Images are laid out channels last, with enough zeros behind every row and image that a shift is
    one of the flattened images, a view, that never meets a neighbouring row or image.
    """
    down, right = _reach(shifts)
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
    down, right = _reach(shifts)
    rows, columns = height + down, width + right
    half = columns // 2 + 1  # of the frequencies along rows; the others are their conjugates
    along_rows = _transform(half, columns, width, x)
    from_real, from_imaginary = _complex_transform(rows, height, x)
    cosines, sines = _weights(shifts, rows, columns, x)
    image_rows = x.reshape(-1, width)
    result = x.new_zeros(len(shifts), channels * channels)
    crossed = torch.zeros_like(result)
    per_frequency = rows * channels * max(2 * examples, 2 * channels)
    step = max(1, tuning.SPECTRUM_CHUNK_ELEMENTS // per_frequency)
    for first in range(0, half, step):
        part = along_rows[first : first + step]
        count = len(part)
        part = (part.flatten(0, 1) @ image_rows.mT).view(count, 2, examples * channels, height)
        # [columns' frequencies, rows' frequencies × (real, imaginary), N C]
        spectrum = torch.bmm(from_real.expand(count, -1, -1), part[:, 0].mT)
        spectrum.baddbmm_(from_imaginary.expand(count, -1, -1), part[:, 1].mT)
        values = spectrum.view(count * rows, 2 * examples, channels)
        here = slice(first * rows, (first + count) * rows)
        symmetric = torch.bmm(values.mT, values).view(count * rows, -1)
        result.addmm_(cosines[:, here], symmetric)
        cross = torch.bmm(values[:, :examples].mT, values[:, examples:]).view(count * rows, -1)
        crossed.addmm_(sines[:, here], cross)
    result, crossed = (t.view(-1, channels, channels) for t in (result, crossed))
    return result.sub_(crossed).add_(crossed.mT)


def _reach(shifts: Sequence[Shift]) -> Shift:
    """The largest shift in each direction."""
    return max(dy for dy, _ in shifts), max(abs(dx) for _, dx in shifts)


def _angles(frequencies: int, period: int, length: int) -> Tensor:
    """2π f u / period, [frequencies, length]; in float64, a float32 angle would cost digits."""
    f = torch.arange(frequencies, dtype=torch.float64).unsqueeze(1)
    # Whole turns are taken out while the numbers are whole.
    return (f * torch.arange(length, dtype=torch.float64) % period) * (2 * math.pi / period)


def _transform(frequencies: int, period: int, length: int, like: Tensor) -> Tensor:
    """What real signals are multiplied by, [frequencies, (real, imaginary), length]."""
    angles = _angles(frequencies, period, length)
    return torch.stack([angles.cos(), -angles.sin()], 1).to(like, non_blocking=True)


def _complex_transform(period: int, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """What real and what imaginary parts of signals are multiplied by.

    Each [period × (real, imaginary), length].
    """
    angles = _angles(period, period, length)
    cosines, sines = angles.cos(), angles.sin()
    from_real = torch.stack([cosines, -sines], 1).flatten(0, 1)
    from_imaginary = torch.stack([sines, cosines], 1).flatten(0, 1)
    return from_real.to(like, non_blocking=True), from_imaginary.to(like, non_blocking=True)


def _weights(
    shifts: Sequence[Shift], rows: int, columns: int, like: Tensor
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of f·δ over P Q, [shifts, frequencies]; those that stand for two twice."""
    half = columns // 2 + 1
    horizontal = torch.arange(half, dtype=torch.float64).repeat_interleave(rows) / columns
    vertical = torch.arange(rows, dtype=torch.float64).repeat(half) / rows
    steps = torch.tensor(shifts, dtype=torch.float64)
    turns = steps[:, :1] * vertical + steps[:, 1:] * horizontal
    twice = torch.full((half,), 2.0, dtype=torch.float64)
    twice[0] = 1.0
    if columns % 2 == 0:
        twice[-1] = 1.0
    weight = twice.repeat_interleave(rows) / (rows * columns)
    angles = 2 * math.pi * turns
    cosines, sines = angles.cos() * weight, angles.sin() * weight
    return cosines.to(like, non_blocking=True), sines.to(like, non_blocking=True)
