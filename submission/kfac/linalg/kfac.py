"""K-FAC-expand and K-FAC-reduce, from rows to rows whose outer products make A and B.

A linear map is applied to rows a_nr (position r of example n); g_nr is the would-be gradient of its
output there. Equation numbers are those of Eschenhagen et al. (NeurIPS 2023). Both approximations
are second moments of rows; they differ in what a row is. `blocks.kronecker_sums` calls them
and divides A by the number of rows and B by the number of loss terms:

    A = 1/rows Σ row rowᵀ,      B = 1/terms Σ row rowᵀ.

A joint bias is a column of ones appended to the input rows before anything else.
"""

from __future__ import annotations

from torch import Tensor

from .moments import append_ones

RAGGED_SCALINGS: dict[str, tuple[float, float]] = {
    # exponents (p, q): a summed and divided by R_n^p, g summed and divided by R_n^q; p + q = 1.
    "sqrt": (0.5, 0.5),
    "mean_sum": (1.0, 0.0),
    "sum_mean": (0.0, 1.0),
}


def expand(rows: Tensor) -> Tensor:
    """K-FAC-expand, equation 7: every shared position is a row of its own.

        A = 1/(N R) Σ_n Σ_r a_nr a_nrᵀ,      B = 1/terms Σ_n Σ_r g_nr g_nrᵀ

    Convolutions have the same second moments without forming the rows, see `linalg.convolution`.

    Args:
        rows: a or g, [N, R..., d].

    Returns:
        [N·R, d].
    """
    return rows.flatten(0, -2)


def reduce(
    a_sum: Tensor, g_sum: Tensor, positions: Tensor, *, ragged: bool, scaling: str, ones: bool
) -> tuple[Tensor, Tensor]:
    """K-FAC-reduce, equation 10 (and 55 for ragged rows): an example is one row.

        A = 1/N Σ_n ā_n ā_nᵀ,  ā_n = 1/R Σ_r a_nr,      B = 1/terms Σ_n b̂_n b̂_nᵀ,  b̂_n = Σ_r g_nr

    Equation 55, where example n has R_n rows: â_n = Σ_r a_nr / √R_n and b̂_n = Σ_r g_nr / √R_n;
    `RAGGED_SCALINGS` has the alternatives. N counts the examples that have rows: an example without
    any has no gradient either, and counting it in A as well would shrink the product twice.

    Args:
        a_sum: Σ_r a_nr, [groups, N, P_in].
        g_sum: Σ_r g_nr, [groups, N, P_out].
        positions: R_n, [N]; 0 for examples without rows.
        ragged: whether examples may differ in R_n.
        scaling: a key of RAGGED_SCALINGS.
        ones: whether a has a column of ones, which sums to R_n.

    Returns:
        Rows ā (or â) [groups, N, P_in (+ 1)] and b̂ [groups, N, P_out].
    """
    input_power, gradient_power = RAGGED_SCALINGS[scaling] if ragged else (1.0, 0.0)
    counts = positions.clamp(min=1).unsqueeze(-1)
    input_scale = counts.pow(-input_power)
    a = a_sum * input_scale
    if ones:
        a = append_ones(a, positions.unsqueeze(-1) * input_scale)
    return a, g_sum if gradient_power == 0 else g_sum * counts.pow(-gradient_power)
