"""Convolutions of 1 to 3 dimensions, transposed ones too: rows are patches."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ... import tuning
from ...linalg.convolution import patches, shifted_products
from ...linalg.convolution.patches import DimensionGeometry
from ...linalg.moments import SecondMoment, append_ones, border_with_ones
from ..handlers import handles
from ..operation import NO_EXAMPLES, LinearOperation
from ..pieces import Alias
from ..sharing import Positions, Sharing, SharingError
from ..uses import LinearUse
from .products import shifted

if TYPE_CHECKING:
    from ..record import Recording


@dataclass(frozen=True)
class Convolution(LinearOperation):
    """One call of a convolution.

    Attributes:
        shape: see `LinearOperation`.
        geometry: of each spatial dimension.
    """

    shape: tuple[int, int, int]
    geometry: tuple[DimensionGeometry, ...]

    @classmethod
    def of(
        cls,
        weight: torch.Size,
        *,
        stride: Any,
        padding: Any,
        dilation: Any,
        groups: int,
        output_padding: Any = 0,
        transposed: bool = False,
    ) -> Convolution:
        """From the arguments of torch's functions; weight [C_out, C_in / groups, *kernel].

        Transposed: [C_in, C_out / groups, *kernel].
        """
        kernel = tuple(weight[2:])
        dims = len(kernel)
        strides, dilations = _each(stride, dims), _each(dilation, dims)
        if padding == "same":
            totals = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
            pads = [(total // 2, total - total // 2) for total in totals]
        elif padding == "valid":
            pads = [(0, 0)] * dims
        elif transposed:
            extra = _each(output_padding, dims)
            pads = list(zip(_each(padding, dims), extra, strict=True))
        else:
            pads = [(p, p) for p in _each(padding, dims)]
        geometry = tuple(
            DimensionGeometry(k, s, d, p, transposed)
            for k, s, d, p in zip(kernel, strides, dilations, pads, strict=True)
        )
        if transposed:
            shape = (groups, weight[1], weight[0] // groups * math.prod(kernel))
        else:
            shape = (groups, weight[0] // groups, weight[1] * math.prod(kernel))
        return cls(shape, geometry)

    def _check(self, x: Tensor, sharing: Sharing) -> None:
        if x.dim() != len(self.geometry) + 2:
            raise SharingError(NO_EXAMPLES.format(list(x.shape)))
        if not isinstance(sharing, Positions) or sharing.batch_dim or sharing.mask is not None:
            raise SharingError("a convolution shares its weight over all its output positions")

    def leading(self, x: Tensor, sharing: Sharing) -> torch.Size:
        self._check(x, sharing)
        return torch.Size((x.shape[0], patches.output_positions(self.geometry, x.shape[2:])))

    def add_second_moment(
        self, moment: SecondMoment, x: Tensor, sharing: Sharing, ones: bool
    ) -> None:
        geometry, (groups, _, d) = self.geometry, self.shape
        x = x.to(moment.dtype)
        few = x.shape[1] // groups < tuning.FEWEST_SHIFTED_CHANNELS
        if few or not shifted_products.is_applicable(geometry):
            moment.add_corner(patches.patch_second_moment(x, geometry, groups))
        elif moment.diagonal:
            moment.add_corner(shifted_products.second_moment(x, geometry, groups))
        else:
            shifted_products.add_second_moment(moment.matrix()[:, :d, :d], x, geometry)
        if ones:
            count = self.leading(x, sharing).numel()
            row_sum = patches.patch_sum(x, geometry, groups).sum(1)
            border_with_ones(moment.matrix(), row_sum, count)

    def input_rows(self, x: Tensor, sharing: Sharing, ones: bool) -> Tensor:
        groups, _, d = self.shape
        rows = patches.patches(x, self.geometry)
        rows = rows.reshape(rows.shape[0], groups, d, rows.shape[-1])
        rows = rows.permute(1, 0, 3, 2).flatten(1, 2)
        return append_ones(rows) if ones else rows

    def summed_inputs(self, x: Tensor, sharing: Sharing, dtype: torch.dtype) -> Tensor:
        return patches.patch_sum(x.to(dtype), self.geometry, self.shape[0])

    def add_gradient_moment(self, moment: SecondMoment, g: Tensor, sharing: Sharing) -> None:
        groups, side, positions = self.shape[0], self.shape[1], math.prod(g.shape[2:])
        if moment.diagonal or positions < tuning.POSITIONS_PER_CHANNEL * side:
            super().add_gradient_moment(moment, g, sharing)
            return
        # Image by image: the gradients need not be brought into another order first.
        rows = g.to(moment.dtype).reshape(len(g) * groups, side, positions)
        products = torch.bmm(rows, rows.mT).view(len(g), groups, side, side).sum(0)
        moment.add_corner(products)

    def gradient_rows(self, g: Tensor, sharing: Sharing) -> Tensor:
        rows = g.flatten(2).movedim(1, 0).flatten(1)
        return rows.reshape(*self.shape[:2], rows.shape[-1]).mT

    def summed_gradients(self, g: Tensor, sharing: Sharing, dtype: torch.dtype) -> Tensor:
        total = g.flatten(2).sum(-1, dtype=dtype)
        return total.reshape(g.shape[0], *self.shape[:2]).movedim(1, 0)


def _each(value: Any, dims: int) -> tuple[int, ...]:
    """One number for each dimension."""
    if isinstance(value, int):
        return (value,) * dims
    values = tuple(int(v) for v in value)
    return values * dims if len(values) == 1 else values


@handles("conv1d", "conv2d", "conv3d")
def convolution(
    rec: Recording, func: Any, input: Tensor, weight: Tensor, bias: Any = None, stride: Any = 1,
    padding: Any = 0, dilation: Any = 1, groups: int = 1,
) -> Any:  # fmt: skip
    """Rows are patches."""
    found = rec.alias(weight)

    def compute(x: Tensor) -> Tensor:
        y: Tensor = func(x, weight, bias, stride, padding, dilation, groups)
        return y

    if found is None:
        return shifted(
            rec, bias, (input, weight), lambda: compute(input), {}, trailing=input.dim() - 2
        )
    operation = Convolution.of(
        weight.shape, stride=stride, padding=padding, dilation=dilation, groups=groups
    )
    view = torch.unflatten(found.view, 0, (groups, -1))
    dims = view.dim()
    matrix = Alias(found.name, view, found.numel).matrix((0,), (1,), tuple(range(2, dims)))
    use, below = LinearUse(matrix, rec.piece(bias)), rec.nodes_below(input, bias)
    return rec.call(use, operation, input, compute, below=below)


@handles("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def transposed_convolution(
    rec: Recording, func: Any, input: Tensor, weight: Tensor, bias: Any = None, stride: Any = 1,
    padding: Any = 0, output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
) -> Any:  # fmt: skip
    """Rows are what each output reads."""
    found = rec.alias(weight)

    def compute(x: Tensor) -> Tensor:
        y: Tensor = func(x, weight, bias, stride, padding, output_padding, groups, dilation)
        return y

    if found is None:
        return shifted(
            rec, bias, (input, weight), lambda: compute(input), {}, trailing=input.dim() - 2
        )
    operation = Convolution.of(
        weight.shape, stride=stride, padding=padding, dilation=dilation, groups=groups,
        output_padding=output_padding, transposed=True,
    )  # fmt: skip
    view = torch.unflatten(
        found.view, 0, (groups, -1)
    )  # [groups, C_in / groups, C_out / groups, *kernel]
    into = (1, *range(3, view.dim()))
    matrix = Alias(found.name, view, found.numel).matrix((0,), (2,), into)
    use, below = LinearUse(matrix, rec.piece(bias)), rec.nodes_below(input, bias)
    return rec.call(use, operation, input, compute, below=below)
