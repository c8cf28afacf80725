"""One application of parameters: as rows times a matrix, or entry by entry.

An operation translates between what a torch function saw and the canonical view: its input and the
gradient of its output as rows, its weight as [groups, P_out, P_in]. It holds the geometry of one
call and no tensors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ..linalg.kfac import expand
from ..linalg.moments import (
    SecondMoment,
    append_ones,
    border_with_ones,
    write_outer_products,
)
from .sharing import (
    Positions,
    Segments,
    Sharing,
    SharingError,
    check_segments,
    count_rows,
    flatten_positions,
    sum_rows,
    without_padding,
    zero_padding,
)

NO_EXAMPLES = (
    "the input has shape {}, without a dimension of examples: give it one, or exclude the layer "
    "(exclude=...)"
)


def own_copy(rows: Tensor, x: Tensor) -> Tensor:
    """The rows, copied if they are a view of x, which its owner may write into before their use."""
    shares = rows.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    return rows.clone() if shares else rows


class LinearOperation(ABC):
    """How one call of a linear map is rows times a matrix.

    Attributes:
        shape: (groups, P_out, P_in), without the column of ones.
    """

    shape: tuple[int, int, int]

    @property
    def has_rows_in_front(self) -> bool:
        """Whether all dimensions of the input but the last are rows, in any order."""
        return False

    def diagonal_input(self, approx: str) -> bool:
        """Whether A is diagonal, or too large to be kept as anything else."""
        del approx
        return False

    def existing_rows(self, x: Tensor, sharing: Positions) -> Tensor | None:
        """Which rows of an input exist, [N, R] of bool; None for all."""
        del x, sharing
        return None

    @abstractmethod
    def leading(self, x: Tensor, sharing: Sharing) -> torch.Size:
        """[N, R] of the rows of an input for Positions, [rows] for Segments."""

    @abstractmethod
    def add_second_moment(
        self, moment: SecondMoment, x: Tensor, sharing: Sharing, ones: bool
    ) -> None:
        """Adds Σ a aᵀ over all rows (eq. 7); the moment's last side is that of the ones, or zero.

        `ones`: whether the rows end in a one; the moment has a side for it.
        """

    @abstractmethod
    def input_rows(self, x: Tensor, sharing: Sharing, ones: bool) -> Tensor:
        """All rows of an input, materialised, in the order of `gradient_rows`.

        [groups, rows, P_in (+ 1)]; padding is zero or left out.
        """

    @abstractmethod
    def summed_inputs(self, x: Tensor, sharing: Sharing, dtype: torch.dtype) -> Tensor:
        """Σ over the positions of each example: [groups, N, P_in]."""

    @abstractmethod
    def gradient_rows(self, g: Tensor, sharing: Sharing) -> Tensor:
        """Gradients of the outputs as rows: [groups, rows, P_out]; padding is zero or left out."""

    def add_gradient_moment(self, moment: SecondMoment, g: Tensor, sharing: Sharing) -> None:
        """Adds Σ g gᵀ over all rows (eq. 7)."""
        moment.add_rows(self.gradient_rows(g, sharing).to(moment.dtype))

    @abstractmethod
    def summed_gradients(self, g: Tensor, sharing: Sharing, dtype: torch.dtype) -> Tensor:
        """Σ over the positions of each example: [groups, N, P_out]."""


@dataclass(frozen=True)
class Rows(LinearOperation):
    """Linear layers and matrix products: rows are vectors of the input.

    Attributes:
        shape: see `LinearOperation`.
        x_order, y_order: permutations of the dimensions of input and output to (rows..., groups...,
            features...); None where they are in this order.
        row_dims: how many dimensions of rows there are; None for all but the last.
        no_out: whether the output lacks the dimension of P_out = 1 (a product with a vector).
        folded: the dimensions [N, R] that were flattened into the first one before the operation.
    """

    shape: tuple[int, int, int]
    x_order: tuple[int, ...] | None = None
    y_order: tuple[int, ...] | None = None
    row_dims: int | None = None
    no_out: bool = False
    folded: tuple[int, ...] | None = None

    @property
    def has_rows_in_front(self) -> bool:
        return self.x_order is None and self.y_order is None

    def _canonical(self, tensor: Tensor, order: tuple[int, ...] | None, side: int) -> Tensor:
        """[rows..., groups · side]."""
        if order is not None:
            tensor = tensor.permute(order)
        count = tensor.dim() - 1 if self.row_dims is None else self.row_dims
        if count < 1:
            raise SharingError(NO_EXAMPLES.format(list(tensor.shape)))
        return tensor.reshape(*tensor.shape[:count], self.shape[0] * side)

    def _of_input(self, x: Tensor, sharing: Sharing, ones: bool) -> Tensor:
        groups, _, side = self.shape
        rows = self._canonical(x, self.x_order, side)
        if ones:
            rows = append_ones(rows.reshape(*rows.shape[:-1], groups, side)).flatten(-2)
        return self._shared(rows, sharing)

    def _of_gradient(self, g: Tensor, sharing: Sharing) -> Tensor:
        g = g.unsqueeze(-1) if self.no_out else g
        return self._shared(self._canonical(g, self.y_order, self.shape[1]), sharing)

    def _shared(self, rows: Tensor, sharing: Sharing) -> Tensor:
        if isinstance(sharing, Segments):
            return rows.flatten(0, -2)
        if self.folded is not None and rows.dim() == 2:
            rows = rows.reshape(*self.folded, rows.shape[-1])
        return flatten_positions(rows, sharing)

    def _grouped(self, rows: Tensor) -> Tensor:
        """[rows..., groups · side] -> [groups, rows, side]."""
        rows = expand(rows)
        if self.shape[0] == 1:
            return rows.unsqueeze(0)
        return rows.reshape(len(rows), self.shape[0], -1).movedim(1, 0)

    def leading(self, x: Tensor, sharing: Sharing) -> torch.Size:
        return self._of_input(x, sharing, False).shape[:-1]

    def input_rows(self, x: Tensor, sharing: Sharing, ones: bool) -> Tensor:
        return self._grouped(without_padding(self._of_input(x, sharing, ones), sharing))

    def gradient_rows(self, g: Tensor, sharing: Sharing) -> Tensor:
        return self._grouped(without_padding(self._of_gradient(g, sharing), sharing))

    def add_second_moment(
        self, moment: SecondMoment, x: Tensor, sharing: Sharing, ones: bool
    ) -> None:
        rows = self._of_input(x.to(moment.dtype), sharing, False)
        count = count_rows(rows.shape[:-1], sharing)
        if moment.keeps(rows.shape[:-1].numel()) and moment.side == self.shape[2] + int(ones):
            moment.add_rows(own_copy(self.input_rows(x.to(moment.dtype), sharing, ones), x))
            return
        rows = self._grouped(without_padding(rows, sharing))
        d = rows.shape[-1]
        if moment.side == d and not ones:
            moment.add_rows(rows)
            return
        if moment.is_empty and self.shape[0] == 1 and not moment.diagonal:
            # Written once, in place of added to zeros.
            matrix = rows.new_empty(1, moment.side, moment.side)
            write_outer_products(matrix[0, :d, :d], rows[0])
            matrix[0, -1] = 0
            matrix[0, :, -1] = 0
            moment.replace(matrix)
        else:
            moment.add_to_corner(rows)
        if ones:
            border_with_ones(moment.matrix(), rows.sum(1), count)

    def summed_inputs(self, x: Tensor, sharing: Sharing, dtype: torch.dtype) -> Tensor:
        return self._per_example(self._of_input(x, sharing, False), sharing, dtype)

    def summed_gradients(self, g: Tensor, sharing: Sharing, dtype: torch.dtype) -> Tensor:
        return self._per_example(self._of_gradient(g, sharing), sharing, dtype)

    def _per_example(self, rows: Tensor, sharing: Sharing, dtype: torch.dtype) -> Tensor:
        return self._grouped(sum_rows(rows.to(dtype), sharing))


class UnitOperation(ABC):
    """How one call of a scale γ or shift β acts on units, each of which has one entry of them.

    y = γ ⊙ x̂ + β. The would-be gradient of one example is Σ_r g ⊙ x̂ for γ and Σ_r g for β, cheap
    enough to keep per example; so the GGN's blocks of one unit, (γ_i, β_i), are exact, with no
    Kronecker approximation.

    Attributes:
        sizes: of the output.
    """

    sizes: tuple[int, ...]

    @property
    @abstractmethod
    def row_dims(self) -> tuple[int, ...]:
        """The dimensions of the output that may count the examples."""

    @abstractmethod
    def rows(self, x: Tensor, sharing: Sharing) -> Tensor:
        """[N, R, units] for Positions, [rows, units] for Segments."""

    @abstractmethod
    def gradients(
        self, x: Tensor | None, g: Tensor, sharing: Sharing, dtype: torch.dtype
    ) -> tuple[Tensor | None, Tensor]:
        """Would-be gradients of γ (None without) and of β, of each example: [N, units] each."""

    def normalised(self, x: Tensor) -> Tensor:
        """x̂."""
        return x

    def row_gradients(
        self, x: Tensor | None, g: Tensor, sharing: Sharing, dtype: torch.dtype
    ) -> tuple[Tensor | None, Tensor]:
        """As `gradients`, at each position by itself: [rows, units] each."""
        g_rows = zero_padding(self.rows(g, sharing).to(dtype), sharing)
        if x is None:
            return None, g_rows.flatten(0, -2)
        x_rows = self.rows(self.normalised(x).expand(g.shape), sharing).to(dtype)
        scale = zero_padding(g_rows * x_rows, sharing)
        return scale.flatten(0, -2), g_rows.flatten(0, -2)

    def check(self, x: Tensor, sharing: Sharing) -> None:
        """Raises a SharingError where the rows do not fit the sharing."""
        check_segments(self.rows(x, sharing).shape[0], sharing)
