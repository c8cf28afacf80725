"""Convolutions as linear layers whose rows are patches.

Output position o reads, at kernel offset k, the input index source[k, o] (or nothing, in the
padding). These tables, one per spatial dimension, are all that distinguishes strides, dilation,
padding and transposed convolutions; everything below works on them. Padding modes other than zeros
are operations of their own, in front of the convolution.

A patch is a row of C_in / groups · prod(kernel) entries in the order of the weight's dimensions.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ... import tuning
from ..moments import add_outer_products


def _table(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Made once for all calls; of real numbers, also while a compiler traces."""

    @functools.lru_cache(maxsize=512)
    def made(*arguments: Any) -> Tensor:
        with _disable_current_modes():
            return function(*arguments)

    return functools.wraps(function)(made)


@dataclass(frozen=True)
class DimensionGeometry:
    """One spatial dimension of a convolution. Hashable, so that tables are made once."""

    kernel: int
    stride: int
    dilation: int
    padding: tuple[int, int]  # before, after; of a transposed convolution (padding, output_padding)
    transposed: bool = False

    def output_size(self, size: int) -> int:
        """Number of output positions for an input of `size`."""
        span = self.dilation * (self.kernel - 1) + 1
        if self.transposed:
            padding, output_padding = self.padding
            return (size - 1) * self.stride - 2 * padding + span + output_padding
        return (size + sum(self.padding) - span) // self.stride + 1

    @property
    def is_dense(self) -> bool:
        """Whether neighbouring outputs read neighbouring inputs, with nothing beyond the border."""
        return not self.transposed and self.stride == 1


@_table
def source_table(geometry: DimensionGeometry, size: int) -> Tensor:
    """Input index read at kernel offset k by output o: int64 [kernel, outputs], -1 for nothing."""
    g = geometry
    outputs = torch.arange(g.output_size(size))
    offsets = torch.arange(g.kernel).unsqueeze(1) * g.dilation
    if g.transposed:
        numerator = outputs + g.padding[0] - offsets
        source = torch.div(numerator, g.stride, rounding_mode="floor")
        exists = (numerator % g.stride == 0) & (source >= 0) & (source < size)
        return torch.where(exists, source, -1)
    position = outputs * g.stride + offsets
    index = F.pad(torch.arange(size), g.padding, value=-1)
    return index[position]


@_table
def read_counts(geometry: DimensionGeometry, size: int) -> Tensor:
    """How often kernel offset k reads input h over all outputs: float64 [kernel, size]."""
    source = source_table(geometry, size)
    counts = torch.zeros(geometry.kernel, size + 1, dtype=torch.float64)
    index = torch.where(source < 0, size, source)
    counts.scatter_add_(1, index, torch.ones_like(index, dtype=torch.float64))
    return counts[:, :size]


@_table
def joint_read_counts(geometry: tuple[DimensionGeometry, ...], sizes: tuple[int, ...]) -> Tensor:
    """How often each kernel offset reads each input, over all dimensions: float64, [Πk, Πsizes]."""
    counts = [read_counts(g, size) for g, size in zip(geometry, sizes, strict=True)]
    return functools.reduce(torch.kron, counts)


def output_positions(geometry: tuple[DimensionGeometry, ...], spatial: torch.Size) -> int:
    """R, the number of shared positions of an input of this spatial size."""
    return math.prod(g.output_size(s) for g, s in zip(geometry, spatial, strict=True))


def patches(x: Tensor, geometry: tuple[DimensionGeometry, ...]) -> Tensor:
    """All patches, materialised: [N, C, *spatial] -> [N, C·prod(kernel), R].

    The plain path, and the reference that the faster ones are tested against.
    """
    dims = len(geometry)
    x = F.pad(x, (0, 1) * dims)  # an extra slot of zeros, for what is read from outside
    index: list[Tensor] = []
    for i, g in enumerate(geometry):
        size = x.shape[2 + i] - 1
        source = source_table(g, size).to(x.device, non_blocking=True)
        shape = [1] * (2 * dims)
        shape[i], shape[dims + i] = source.shape
        index.append(torch.where(source < 0, size, source).reshape(shape))
    everything: list[Any] = [slice(None), slice(None), *index]
    gathered = x[tuple(everything)]
    return gathered.flatten(1, 1 + dims).flatten(2)


def _chunks(x: Tensor, geometry: tuple[DimensionGeometry, ...]) -> Iterator[Tensor]:
    """Splits the examples so that the patches of one part stay small."""
    per_example = x.shape[1] * math.prod(g.kernel for g in geometry)
    per_example *= output_positions(geometry, x.shape[2:])
    yield from torch.split(x, max(1, tuning.PATCH_CHUNK_ELEMENTS // max(1, per_example)))


def patch_second_moment(x: Tensor, geometry: tuple[DimensionGeometry, ...], groups: int) -> Tensor:
    """Σ over examples and positions of patch patchᵀ: [N, C, *spatial] -> [groups, d, d]."""
    channels = x.shape[1] // groups
    d = channels * math.prod(g.kernel for g in geometry)
    moment = x.new_zeros(groups, d, d)
    if not any(g.transposed for g in geometry) and channels >= tuning.FEWEST_SLICED_CHANNELS:
        for part in _chunks(x, geometry):
            _add_sliced(moment, part, geometry)
        kernel = [g.kernel for g in geometry]
        by_offset = moment.view(groups, *kernel, channels, *kernel, channels)
        dims = len(kernel)
        one, two = list(range(1, dims + 1)), list(range(dims + 2, 2 * dims + 2))
        order = [0, dims + 1, *one, 2 * dims + 2, *two]
        return by_offset.permute(order).reshape(groups, d, d)
    for part in _chunks(x, geometry):
        rows = patches(part, geometry)
        rows = rows.reshape(rows.shape[0], groups, d, rows.shape[-1])
        rows = rows.permute(1, 2, 0, 3).flatten(2)
        moment.baddbmm_(rows, rows.mT)
    return moment


def _add_sliced(moment: Tensor, x: Tensor, geometry: tuple[DimensionGeometry, ...]) -> None:
    """moment [groups, d, d] += Σ patch patchᵀ, patches ordered (kernel offset, channel).

    What a kernel offset reads is a strided slice of the padded images.
    """
    groups, dims = len(moment), len(geometry)
    pads = [p for g in reversed(geometry) for p in g.padding]
    padded = F.pad(x.transpose(0, 1), pads)
    outputs = [g.output_size(s) for g, s in zip(geometry, x.shape[2:], strict=True)]
    channels = x.shape[1] // groups
    kernel = [g.kernel for g in geometry]
    rows = x.new_empty(math.prod(kernel), channels, x.shape[0], *outputs)
    for group in range(groups):
        own = padded[group * channels : (group + 1) * channels]
        for row, offsets in zip(rows, itertools.product(*map(range, kernel)), strict=True):
            read: list[Any] = [slice(None)] * 2
            for g, offset, count in zip(geometry, offsets, outputs, strict=True):
                first = offset * g.dilation
                read.append(slice(first, first + (count - 1) * g.stride + 1, g.stride))
            row.copy_(own[tuple(read)])
        add_outer_products(moment[group], rows.flatten(0, 1).flatten(1).mT)
    assert rows.dim() == dims + 3


def patch_sum(x: Tensor, geometry: tuple[DimensionGeometry, ...], groups: int) -> Tensor:
    """Σ over positions of the patches, without forming them: [N, C, *spatial] -> [groups, N, d].

    Offset k's sum over the outputs is a weighted sum of the inputs that it reads; the weights are
    the product over dimensions of `read_counts`: one matrix product where they are few, otherwise
    one per dimension.
    """
    n, channels = x.shape[0], x.shape[1] // groups
    offsets = math.prod(g.kernel for g in geometry)
    if offsets * math.prod(x.shape[2:]) <= tuning.MOST_JOINT_COUNTS:
        counts = joint_read_counts(geometry, x.shape[2:]).to(x, non_blocking=True)
        x = x.flatten(2).flatten(0, 1) @ counts.mT
    else:
        for i in reversed(range(len(geometry))):
            counts = read_counts(geometry[i], x.shape[2 + i]).to(x, non_blocking=True)
            x = (x.movedim(2 + i, -1) @ counts.mT).movedim(-1, 2 + i)
    return x.reshape(n, groups, channels * offsets).movedim(1, 0)
