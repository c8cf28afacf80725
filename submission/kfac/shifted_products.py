"""Second moment of all patches of a stride-1 convolution, without forming patches.

The block of A between kernel offsets k and k' is Σ_u x[u] x[u + δ]ᵀ over the inputs u that offset
k reads, δ = k' - k. Up to the border it depends on δ alone, so a 3×3 kernel needs 13 products of
C×C instead of 81 (δ and -δ are transposes), each over the whole image:

    A[k, k + δ] = F_δ - Σ_{rows not read} - Σ_{columns not read} + Σ_{both not read}.

Images are laid out channels last and padded with enough zeros that a shift by δ is a shift of the
flattened image, a view, that never meets a neighbouring row or image.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from .convolution import DimensionGeometry


@dataclass(frozen=True)
class _Axis:
    """One spatial dimension. `left`: where the real inputs begin in the padded image."""

    kernel: int
    dilation: int
    left: int
    size: int
    padded: int
    outputs: int

    @classmethod
    def of(cls, geometry: DimensionGeometry, size: int) -> _Axis:
        reach = geometry.dilation * (geometry.kernel - 1)
        padded = max(size + reach, size + sum(geometry.padding))
        outputs = geometry.output_size(size)
        return cls(geometry.kernel, geometry.dilation, geometry.padding[0], size, padded, outputs)

    def unread(self, offset: int) -> tuple[int, ...]:
        """Real inputs, as padded indices, that kernel offset `offset` does not read."""
        first = offset * self.dilation
        real = range(self.left, self.left + self.size)
        return tuple(u for u in real if not first <= u < first + self.outputs)


def is_applicable(geometry: tuple[DimensionGeometry, ...]) -> bool:
    """Whether `second_moment` handles a convolution: 1-d or 2-d, stride 1, zero padding."""
    return len(geometry) <= 2 and all(
        g.is_dense and max(g.padding) <= g.dilation * (g.kernel - 1) for g in geometry
    )


def second_moment(x: Tensor, geometry: tuple[DimensionGeometry, ...], groups: int) -> Tensor:
    """Σ over examples and positions of patch patchᵀ: [N, C, *spatial] -> [groups, d, d]."""
    if len(geometry) == 1:
        flat = DimensionGeometry(1, 1, 1, (0, 0), "zeros")
        return second_moment(x.unsqueeze(2), (flat, geometry[0]), groups)
    rows, columns = (_Axis.of(g, s) for g, s in zip(geometry, x.shape[2:], strict=True))
    channels = x.shape[1] // groups
    image = _padded_channels_last(x, rows, columns)
    shape = (channels, rows.kernel, columns.kernel)
    moment = x.new_zeros(groups, *shape, *shape)
    for group in range(groups):
        part = image[..., group * channels : (group + 1) * channels]
        for shift in _shifts(rows.kernel, columns.kernel):
            _add_blocks(moment[group], part, rows, columns, *shift)
    d = channels * rows.kernel * columns.kernel
    return moment.reshape(groups, d, d)


def _padded_channels_last(x: Tensor, rows: _Axis, columns: _Axis) -> Tensor:
    right = columns.padded - columns.size - columns.left
    bottom = rows.padded - rows.size - rows.left
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, columns.left, right, rows.left, bottom))
    return padded.contiguous()


def _shifts(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """One of each pair δ, -δ of differences of kernel offsets."""
    for dy, dx in itertools.product(range(rows), range(1 - columns, columns)):
        if dy > 0 or dx >= 0:
            yield dy, dx


def _add_blocks(
    moment: Tensor, image: Tensor, rows: _Axis, columns: _Axis, dy: int, dx: int
) -> None:
    """Fills all blocks (k, k + δ) of one group's moment [C, Ky, Kx, C, Ky, Kx], and mirrors."""
    products = _ShiftedProducts(image, dy * rows.dilation, dx * columns.dilation)
    whole = products.whole()
    for ky, kx in itertools.product(range(rows.kernel - dy), range(columns.kernel)):
        if not 0 <= kx + dx < columns.kernel:
            continue
        block = whole
        unread_rows, unread_columns = rows.unread(ky), columns.unread(kx)
        if unread_rows or unread_columns:
            block = whole.clone()
        for y in unread_rows:
            block -= products.row(y)
        for x in unread_columns:
            block -= products.column(x)
        for y, x in itertools.product(unread_rows, unread_columns):
            block += products.corner(y, x)
        moment[:, ky, kx, :, ky + dy, kx + dx] = block
        if (dy, dx) != (0, 0):
            moment[:, ky + dy, kx + dx, :, ky, kx] = block.mT


class _ShiftedProducts:
    """Σ image[u] image[u + shift]ᵀ over parts of an image [N, H, W, C], each computed once."""

    def __init__(self, image: Tensor, dy: int, dx: int) -> None:
        self._image, self._dy, self._dx = image, dy, dx
        self._rows: dict[int, Tensor] = {}
        self._columns: dict[int, Tensor] = {}

    def whole(self) -> Tensor:
        """The sum over all u: [C, C]."""
        flat = self._image.flatten(0, 2)
        shift = self._dy * self._image.shape[2] + self._dx
        return flat[: len(flat) - shift].mT @ flat[shift:]

    def row(self, y: int) -> Tensor:
        """The sum over row y."""
        if y not in self._rows:
            there, left = y + self._dy, max(0, -self._dx)
            length = self._image.shape[2] - abs(self._dx)
            inside = there < self._image.shape[1]
            self._rows[y] = self._product(
                self._image[:, y].narrow(1, left, length),
                self._image[:, there].narrow(1, left + self._dx, length) if inside else None,
            )
        return self._rows[y]

    def column(self, x: int) -> Tensor:
        """The sum over column x."""
        if x not in self._columns:
            height = self._image.shape[1]
            there = x + self._dx
            self._columns[x] = self._product(
                self._image[:, : height - self._dy, x],
                self._image[:, self._dy :, there] if 0 <= there < self._image.shape[2] else None,
            )
        return self._columns[x]

    def corner(self, y: int, x: int) -> Tensor:
        """The sum over the pixel (y, x) of all images."""
        y2, x2 = y + self._dy, x + self._dx
        inside = y2 < self._image.shape[1] and 0 <= x2 < self._image.shape[2]
        return self._product(self._image[:, y, x], self._image[:, y2, x2] if inside else None)

    def _product(self, a: Tensor, b: Tensor | None) -> Tensor:
        if b is None:
            channels = self._image.shape[-1]
            return self._image.new_zeros(channels, channels)
        return a.reshape(-1, a.shape[-1]).mT @ b.reshape(-1, b.shape[-1])
