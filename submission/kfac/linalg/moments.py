"""Sums of outer products of rows: the second moments behind A and B."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import tuning
from .factor import Factor
from .precision import rounds_to_bfloat16
from .symmetric import mirror, panels, views


class SecondMoment:
    """Σ row rowᵀ over rows [groups, n, side] that come in portions.

    Kept as matrices [groups, side, side], as their diagonals [groups, side], or as the rows
    themselves as long as these are few (see `low_rank`).

    Args:
        shape: (groups, side).
        like: a tensor of the dtype and device of the sums.
        diagonal: whether only the diagonals are kept.
        most_rows: up to how many rows are kept as rows.
    """

    def __init__(
        self, shape: tuple[int, int], like: Tensor, *, diagonal: bool = False, most_rows: int = 0
    ) -> None:
        self.groups, self.side = shape
        self.diagonal = diagonal
        self._most_rows = 0 if diagonal else most_rows
        self._like = like
        self._rows: Tensor | None = None
        self._matrix: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of the sums."""
        return self._like.dtype

    @property
    def is_empty(self) -> bool:
        """Whether nothing was added so far."""
        return self._rows is None and self._matrix is None

    def keeps(self, rows: int) -> bool:
        """Whether so many more rows would be kept as rows."""
        kept = 0 if self._rows is None else self._rows.shape[-2]
        return self._matrix is None and kept + rows <= self._most_rows

    def add_rows(self, rows: Tensor) -> None:
        """Adds the outer products of rows [groups, n, side]."""
        if self.keeps(rows.shape[-2]):
            self._rows = rows if self._rows is None else torch.cat([self._rows, rows], -2)
        elif self.is_empty:
            self._matrix = outer_products(rows, self.diagonal)
        else:
            add_outer_products(self.matrix(), rows)

    def matrix(self) -> Tensor:
        """The sum [groups, side, side], or [groups, side] where diagonal, to be added to."""
        if self._matrix is None:
            shape = (self.groups, self.side) if self.diagonal else (self.groups,) + 2 * (self.side,)
            self._matrix = self._like.new_zeros(shape)
            if self._rows is not None:
                add_outer_products(self._matrix, self._rows)
                self._rows = None
        return self._matrix

    def replace(self, matrix: Tensor) -> None:
        """Takes over a sum that was written elsewhere, in place of nothing."""
        assert self.is_empty
        self._matrix = matrix

    def add_to_corner(self, rows: Tensor) -> None:
        """Adds the outer products of rows [groups, n, d] with d at most the side."""
        d, matrix = rows.shape[-1], self.matrix()
        if self.diagonal:
            add_outer_products(matrix[:, :d], rows)
        elif self.groups == 1:
            add_outer_products(matrix[0, :d, :d], rows[0])
        else:
            matrix[:, :d, :d] += rows.mT @ rows

    def add_corner(self, product: Tensor) -> None:
        """Adds a sum of outer products [groups, d, d] with d at most the side."""
        d = product.shape[-1]
        if self.diagonal:
            self.matrix()[:, :d] += product.diagonal(dim1=-2, dim2=-1)
        elif self.is_empty and d == self.side:
            self._matrix = product
        else:
            self.matrix()[:, :d, :d] += product

    def rescale(self, factor: Tensor) -> None:
        """Makes the sum that of `factor` times the rows."""
        if self._rows is not None:
            self._rows = self._rows * factor.to(self._rows.dtype)  # may be somebody's memory
        if self._matrix is not None:
            self._matrix *= factor.to(self._matrix.dtype) ** 2

    def merge(self, other: SecondMoment) -> None:
        """Adds another sum of the same kind."""
        if other._rows is not None:
            most = self._most_rows
            self._most_rows = min(most, self.side // 2)
            self.add_rows(other._rows)
            self._most_rows = most
        elif other._matrix is not None:
            if self.is_empty:
                self._matrix = other._matrix
            else:
                self.matrix().add_(other._matrix)

    def factor(self, divisor: Tensor | None) -> Factor:
        """The mean as a factor; the sum's memory is used, and the sum must not be used again.

        Args:
            divisor: what the sum is divided by, a scalar; None for 1.
        """
        if self._rows is not None:
            rows = self._rows if divisor is None else self._rows / divisor.to(self._rows).sqrt()
            return Factor(rows, "rows")
        matrix = self.matrix()
        if divisor is not None:
            matrix.div_(divisor.to(matrix.dtype))
        return Factor(matrix, "diagonal" if self.diagonal else "dense")

    def tensor(self) -> Tensor:
        """What holds the sum: the rows, or the matrix (zeros where nothing was added)."""
        return self._rows if self._rows is not None else self.matrix()

    def where_faults_show(self) -> Tensor:
        """Entries of which one is not finite if any entry of the sum is not.

        In a sum of outer products these are the squares: a fault in a row is in its own square, and
        no other product is larger (|a b| <= max(a², b²)).
        """
        if self._rows is not None or self.diagonal:
            return self.tensor()
        return self.matrix().diagonal(dim1=-2, dim2=-1)


def outer_products(rows: Tensor, diagonal: bool) -> Tensor:
    """Σ row rowᵀ of rows [groups, n, d]: [groups, d, d], or [groups, d] where diagonal."""
    if diagonal:
        return rows.square().sum(-2)
    groups, _, d = rows.shape
    # Not zeros that are added to: a factor of few rows costs as much as its memory is touched.
    moment = rows.new_empty(groups, d, d)
    _write_outer_products(moment, rows, keep=False)
    return moment


def add_outer_products(moment: Tensor, rows: Tensor) -> None:
    """moment += Σ row rowᵀ in place; moment [..., d, d] or diagonal [..., d], rows [..., n, d]."""
    if moment.dim() == rows.dim() - 1:
        moment.add_(rows.square().sum(-2))
    else:
        _write_outer_products(moment, rows, keep=True)


def write_outer_products(moment: Tensor, rows: Tensor) -> None:
    """moment [d, d] = Σ row rowᵀ of rows [n, d], whatever the memory held before."""
    _write_symmetric(moment, rows, keep=False)


def _write_outer_products(moment: Tensor, rows: Tensor, keep: bool) -> None:
    """moment += Σ row rowᵀ (= where not `keep`), not diagonal."""
    if moment.dim() == 2:
        _write_symmetric(moment, rows, keep)
    elif moment.shape[0] == 1:
        _write_symmetric(moment[0], rows[0], keep)
    else:
        moment.baddbmm_(rows.mT, rows, beta=int(keep))


def _write_symmetric(moment: Tensor, rows: Tensor, keep: bool) -> None:
    """moment [d, d] += rowsᵀ rows (= where not `keep`): the lower left is copied, not computed."""
    if rounds_to_bfloat16() and moment.dtype == torch.float32:
        rows = rows.bfloat16()
    side = moment.shape[0]
    width = tuning.PANEL_WIDTH.get(moment.device.type, tuning.PANEL_WIDTH_ELSEWHERE)
    parts = panels(side, side if len(rows) < tuning.FEWEST_SPLIT_ROWS else width)
    for (first, end), panel in zip(parts, views(moment, parts), strict=True):
        _add_product(panel, rows[:, first:end], rows[:, first:], keep)
    mirror(moment, parts)


def _add_product(moment: Tensor, left: Tensor, right: Tensor, keep: bool) -> None:
    """moment += leftᵀ right in place (= where not `keep`), for rows [n, d] and [n, e]."""
    if left.dtype == moment.dtype:
        moment.addmm_(left.mT, right, beta=int(keep))
        return
    if not keep:
        moment.zero_()
    for first in range(0, len(left), tuning.ROWS_PER_BFLOAT16_SUM):
        rows = slice(first, first + tuning.ROWS_PER_BFLOAT16_SUM)
        moment += left[rows].mT @ right[rows]


def border_with_ones(moment: Tensor, row_sum: Tensor, count: Tensor | float) -> None:
    """Fills the row and column that a column of ones adds to a sum of outer products, in place.

    moment [..., d + 1, d + 1] (or diagonal [..., d + 1]): its leading d×d part is not touched;
    row_sum [..., d] = Σ row, count = number of rows. Both are added.
    """
    if moment.dim() == row_sum.dim():
        moment[..., -1] += count
        return
    moment[..., :-1, -1] += row_sum
    moment[..., -1, :-1] += row_sum
    moment[..., -1, -1] += count


def append_ones(rows: Tensor, value: Tensor | float = 1.0) -> Tensor:
    """[..., d] -> [..., d + 1] with `value` (broadcast over the rows) as the last column."""
    if not isinstance(value, Tensor):
        value = rows.new_full((), value)
    return torch.cat([rows, value.to(rows.dtype).expand(*rows.shape[:-1], 1)], -1)
