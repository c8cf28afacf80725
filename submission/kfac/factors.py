"""K-FAC-expand and K-FAC-reduce: pure functions from rows to the sums behind A and B.

Both turn rows a (inputs) and g (would-be gradients of the outputs) into sums of outer products;
they differ in what a row is. Equation numbers are those of Eschenhagen et al. (NeurIPS 2023).

- expand (eq. 7): every shared position is a row of its own,
      A = 1/(N R) Σ_n Σ_r a_nr a_nrᵀ,      B = 1/terms Σ_n Σ_r g_nr g_nrᵀ.
- reduce (eq. 10): an example is one row, inputs averaged and gradients summed over positions,
      A = 1/N Σ_n ā_n ā_nᵀ,  ā_n = 1/R Σ_r a_nr,      B = 1/terms Σ_n b̂_n b̂_nᵀ,  b̂_n = Σ_r g_nr.
- ragged reduce (eq. 55): with R_n rows in example n, â_n = Σ_r a_nr / √R_n and
  b̂_n = Σ_r g_nr / √R_n; `RAGGED_SCALINGS` has the alternatives. N counts the examples that have
  rows: an example without any has no gradient either, and counting it in A as well as in B would
  shrink the product twice.

A joint bias is a column of ones appended to the rows before anything else.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .symmetric import mirror, panels, views

PRECISIONS = {
    "float32": "as the statistics are, float64 for float64 parameters",
    "tf32": "float32 sums of products of TF32 numbers (10 bits), on GPUs that have them",
    "bfloat16": "float32 sums of products of bfloat16 numbers (8 bits), of linear layers' rows",
}
ROWS_PER_SUM = 1024  # of bfloat16 products, where the device cannot give their sum in float32
_rounds_to_bfloat16 = False

RAGGED_SCALINGS: dict[str, tuple[float, float]] = {
    # exponents (p, q): a summed and divided by R_n^p, g summed and divided by R_n^q; p + q = 1.
    "sqrt": (0.5, 0.5),
    "mean_sum": (1.0, 0.0),
    "sum_mean": (0.0, 1.0),
}


@contextmanager
def products_in(precision: str) -> Iterator[None]:
    """Inside, products of float32 rows are computed as `PRECISIONS` says."""
    global _rounds_to_bfloat16
    before = _rounds_to_bfloat16
    _rounds_to_bfloat16 = precision == "bfloat16"
    try:
        with _tf32() if precision == "tf32" else nullcontext():
            yield
    finally:
        _rounds_to_bfloat16 = before


@contextmanager
def _tf32() -> Iterator[None]:
    """By the switch that this PyTorch has; the old one may not even be read beside the new one."""
    matmul: Any = torch.backends.cuda.matmul
    name, on = ("fp32_precision", "tf32") if _has_new_switch() else ("allow_tf32", True)
    before = getattr(matmul, name)
    setattr(matmul, name, on)
    try:
        yield
    finally:
        setattr(matmul, name, before)


def _has_new_switch() -> bool:
    try:
        return isinstance(torch.backends.cuda.matmul.fp32_precision, str)
    except (AttributeError, RuntimeError):
        return False


def _add_product(moment: Tensor, left: Tensor, right: Tensor, keep: bool) -> None:
    """moment += leftᵀ right in place (= where not `keep`), for rows [n, d] and [n, e]."""
    if left.dtype == moment.dtype:
        moment.addmm_(left.mT, right, beta=int(keep))
        return
    if not keep:
        moment.zero_()
    for first in range(0, len(left), ROWS_PER_SUM):
        rows = slice(first, first + ROWS_PER_SUM)
        moment += left[rows].mT @ right[rows]


def add_outer_products(moment: Tensor, rows: Tensor) -> None:
    """moment += Σ row rowᵀ in place; moment [..., d, d] or diagonal [..., d], rows [..., n, d]."""
    if moment.dim() == rows.dim() - 1:
        moment.add_(rows.square().sum(-2))
    else:
        _write_outer_products(moment, rows, keep=True)


def outer_products(rows: Tensor, diagonal: bool) -> Tensor:
    """Σ row rowᵀ of rows [groups, n, d]: [groups, d, d], or [groups, d] where diagonal."""
    if diagonal:
        return rows.square().sum(-2)
    groups, _, d = rows.shape
    # Not zeros that are added to: a factor of few rows costs as much as its memory is touched.
    moment = rows.new_empty(groups, d, d)
    _write_outer_products(moment, rows, keep=False)
    return moment


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


# A product of fewer rows takes no longer than its entries to be written, and is not split. On a CPU
# these panels were the fastest; a GPU needs larger ones to be busy (not measured).
FEWEST_SPLIT_ROWS = 64
PANEL_WIDTH, PANEL_WIDTH_ELSEWHERE = {"cpu": 128}, 1024


def _write_symmetric(moment: Tensor, rows: Tensor, keep: bool) -> None:
    """moment [d, d] += rowsᵀ rows (= where not `keep`): the lower left is copied, not computed."""
    if _rounds_to_bfloat16 and moment.dtype == torch.float32:
        rows = rows.bfloat16()
    side = moment.shape[0]
    width = PANEL_WIDTH.get(moment.device.type, PANEL_WIDTH_ELSEWHERE)
    parts = panels(side, side if len(rows) < FEWEST_SPLIT_ROWS else width)
    for (first, end), panel in zip(parts, views(moment, parts), strict=True):
        _add_product(panel, rows[:, first:end], rows[:, first:], keep)
    mirror(moment, parts)


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


def reduce_scales(
    rows_per_example: Tensor, ragged: bool, ragged_scaling: str
) -> tuple[Tensor, Tensor | None]:
    """Factors that turn sums over an example's rows into â_n and b̂_n (eq. 10, eq. 55).

    Args:
        rows_per_example: R_n, [N]; an empty example has 0.
        ragged: whether examples may differ in R_n; otherwise a is averaged and g summed.
        ragged_scaling: a key of RAGGED_SCALINGS.

    Returns:
        (scale of Σ a, [N, 1]; scale of Σ g, [N, 1], or None for 1).
    """
    input_power, gradient_power = RAGGED_SCALINGS[ragged_scaling] if ragged else (1.0, 0.0)
    counts = rows_per_example.clamp(min=1).unsqueeze(-1)
    input_scale = counts.pow(-input_power)
    return input_scale, None if gradient_power == 0 else counts.pow(-gradient_power)


def append_ones(rows: Tensor, value: Tensor | float = 1.0) -> Tensor:
    """[..., d] -> [..., d + 1] with `value` (broadcast over the rows) as the last column."""
    column = torch.as_tensor(value, dtype=rows.dtype, device=rows.device)
    return torch.cat([rows, column.expand(*rows.shape[:-1], 1)], -1)
