"""Second moment of all patches of a stride-1 convolution, without forming patches.

The block of A between kernel offsets k and k' is Σ_u x[u] x[u + δ]ᵀ over the inputs u that offset
k reads, δ = k' - k. Up to the border it depends on δ alone, so a 3×3 kernel needs 13 products of
C×C instead of 81 (δ and -δ are transposes), each over the whole image:

    A[k, k + δ] = F_δ - Σ_{rows not read} - Σ_{columns not read} + Σ_{both not read}.

F_δ is had in one of two ways: as a product for each δ, or for all δ together from the images'
Fourier transforms (see `correlations`), which pays where there are several examples.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from .correlations import Shift, correlations
from .patches import DimensionGeometry


@dataclass(frozen=True)
class _Axis:
    """One spatial dimension. `first`: the input that offset 0 reads first, negative in padding."""

    kernel: int
    dilation: int
    first: int
    size: int
    outputs: int

    @classmethod
    def of(cls, geometry: DimensionGeometry, size: int) -> _Axis:
        outputs = geometry.output_size(size)
        return cls(geometry.kernel, geometry.dilation, -geometry.padding[0], size, outputs)

    def unread(self, offset: int) -> tuple[int, ...]:
        """Inputs that kernel offset `offset` does not read."""
        first = self.first + offset * self.dilation
        return tuple(u for u in range(self.size) if not first <= u < first + self.outputs)


def is_applicable(geometry: tuple[DimensionGeometry, ...]) -> bool:
    """Whether `second_moment` handles a convolution: 1-d or 2-d, stride 1, zero padding."""
    return len(geometry) <= 2 and all(
        g.is_dense and max(g.padding) <= g.dilation * (g.kernel - 1) for g in geometry
    )


def second_moment(x: Tensor, geometry: tuple[DimensionGeometry, ...], groups: int) -> Tensor:
    """Σ over examples and positions of patch patchᵀ: [N, C, *spatial] -> [groups, d, d]."""
    d = x.shape[1] // groups * math.prod(g.kernel for g in geometry)
    moment = x.new_zeros(groups, d, d)
    add_second_moment(moment, x, geometry)
    return moment


def add_second_moment(moment: Tensor, x: Tensor, geometry: tuple[DimensionGeometry, ...]) -> None:
    """Adds the second moment of all patches of x to a moment [groups, d, d], in place."""
    if len(geometry) == 1:
        flat = DimensionGeometry(1, 1, 1, (0, 0))
        add_second_moment(moment, x.unsqueeze(2), (flat, geometry[0]))
        return
    rows, columns = (_Axis.of(g, s) for g, s in zip(geometry, x.shape[2:], strict=True))
    groups = len(moment)
    channels = x.shape[1] // groups
    kernel = (rows.kernel, columns.kernel)
    shifts = list(_shifts(*kernel))
    pixels = [(dy * rows.dilation, dx * columns.dilation) for dy, dx in shifts]
    for group in range(groups):
        part = x[:, group * channels : (group + 1) * channels]
        whole = correlations(part, pixels)
        strips = _Strips(part)
        blocks = x.new_empty(*kernel, *kernel, channels, channels)
        for shift, offset, total in zip(shifts, pixels, whole, strict=True):
            _fill_blocks(blocks, _BorderProducts(strips, offset), rows, columns, shift, total)
        by_channel = moment[group].view(channels, *kernel, channels, *kernel)
        by_channel += blocks.permute(4, 0, 1, 5, 2, 3)


def _shifts(rows: int, columns: int) -> Iterator[Shift]:
    """One of each pair δ, -δ of differences of kernel offsets."""
    for dy, dx in itertools.product(range(rows), range(1 - columns, columns)):
        if dy > 0 or dx >= 0:
            yield dy, dx


def _fill_blocks(
    blocks: Tensor,
    borders: _BorderProducts,
    rows: _Axis,
    columns: _Axis,
    shift: Shift,
    total: Tensor,
) -> None:
    """Fills all blocks (k, k + δ) of blocks [Ky, Kx, Ky, Kx, C, C], and those mirrored."""
    dy, dx = shift
    for ky, kx in itertools.product(range(rows.kernel - dy), range(columns.kernel)):
        if not 0 <= kx + dx < columns.kernel:
            continue
        block = blocks[ky, kx, ky + dy, kx + dx]
        block.copy_(total)
        unread_rows, unread_columns = rows.unread(ky), columns.unread(kx)
        for y in unread_rows:
            borders.subtract_row(block, y)
        for x in unread_columns:
            borders.subtract_column(block, x)
        for y, x in itertools.product(unread_rows, unread_columns):
            borders.add_corner(block, y, x)
        if shift != (0, 0):
            blocks[ky + dy, kx + dx, ky, kx].copy_(block.mT)


class _Strips:
    """Rows and columns of images [N, C, H, W], in an order in which all shifts of them are views.

    Each is brought into it once.
    """

    def __init__(self, images: Tensor) -> None:
        self._images = images
        self.size = (images.shape[2], images.shape[3])
        self._known: dict[tuple[int, int], Tensor] = {}

    def along(self, dim: int, index: int) -> Tensor:
        """Row `index` for dim 0, column `index` for dim 1: [pixels, N, C]."""
        if (dim, index) not in self._known:
            strip = self._images.select(2 + dim, index)
            self._known[dim, index] = strip.permute(2, 0, 1).contiguous()
        return self._known[dim, index]


class _BorderProducts:
    """Σ x[u] x[u + shift]ᵀ over rows, columns and corners of images, each made once.

    Where u + shift is outside of the image there is nothing to add or subtract.
    """

    def __init__(self, strips: _Strips, shift: Shift) -> None:
        self._strips, self._shift = strips, shift
        self._products: dict[tuple[int | None, int | None], Tensor] = {}

    def subtract_row(self, block: Tensor, y: int) -> None:
        """Takes the sum over row y away from a block [C, C]."""
        if self._is_inside(0, y):
            block.sub_(self._product(y, None))

    def subtract_column(self, block: Tensor, x: int) -> None:
        """Takes the sum over column x away."""
        if self._is_inside(1, x):
            block.sub_(self._product(None, x))

    def add_corner(self, block: Tensor, y: int, x: int) -> None:
        """Adds the sum over the pixel (y, x)."""
        if self._is_inside(0, y) and self._is_inside(1, x):
            block.add_(self._product(y, x))

    def _is_inside(self, dim: int, index: int) -> bool:
        return 0 <= index + self._shift[dim] < self._strips.size[dim]

    def _product(self, y: int | None, x: int | None) -> Tensor:
        if (y, x) not in self._products:
            dim, index, other = (1, x, y) if y is None else (0, y, x)
            assert index is not None
            along, across = self._shift[1 - dim], self._shift[dim]
            here, there = _overlap(other, along, self._strips.size[1 - dim])
            first = self._strips.along(dim, index)[here].flatten(0, 1)
            second = self._strips.along(dim, index + across)[there].flatten(0, 1)
            self._products[y, x] = first.mT @ second
        return self._products[y, x]


def _overlap(index: int | None, shift: int, size: int) -> tuple[slice, slice]:
    """Positions u of one index, or of all (None), such that u + shift is inside; and u + shift."""
    if index is not None:
        return slice(index, index + 1), slice(index + shift, index + shift + 1)
    first = max(0, -shift)
    stop = max(first, min(size, size - shift))
    return slice(first, stop), slice(first + shift, stop + shift)
