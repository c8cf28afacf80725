"""The damped inverse (factor + ε I)⁻¹ of one Kronecker factor, in the form that is cheapest.

| form | tensors | used for |
|---|---|---|
| explicit | `inverse` [groups, d, d] | a dense factor whose inverse is applied to many vectors |
| Cholesky | `cholesky` [groups, d, d] | a dense factor whose inverse is applied to few vectors |
| low rank | `rows` [groups, n, d], `scale` [groups]; or also `gram` [groups, n, n] | n < d rows |
| diagonal | `reciprocal` [groups, d] | a diagonal factor |

A factor of n rows, RᵀR, is never formed: by Woodbury, (RᵀR + εI)⁻¹ = (I - Rᵀ(LLᵀ)⁻¹R) / ε with
LLᵀ = RRᵀ + εI, an n×n matrix, `gram` being L; for many vectors W = L⁻¹R is kept instead of both.

When a factorisation fails, it is repeated in float64, then with the damping raised to the accuracy
to which the factor is known at all; if that fails too, the result is None.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .low_rank import VECTORS_FOR_EXPLICIT_INVERSE

FactorInverse = dict[str, Tensor]

# PyTorch walks through a triangle column by column, which takes as long as the factorisation itself
# where all of a row's memory falls into the same places of a CPU's cache: padding moves it.
SLOW_SIDE, PADDING = 512, 16
MOST_ROWS_IN_FLOAT64 = 256  # a Gram matrix of more costs too much in it


# Dense factors up to this side are factorised together, by type of device: on a CPU a larger one
# fills the cores by itself, and on a GPU too.
LARGEST_BATCHED_SIDE = {"cpu": 128}
LARGEST_BATCHED_SIDE_ELSEWHERE = 1024


@dataclass(frozen=True)
class Request:
    """A factor to be inverted: (factor + added·I)⁻¹.

    Attributes:
        factor: [groups, d, d]; [groups, d] where `diagonal`; rows R [groups, n, d] where
            `low_rank`.
        added: ε, [groups].
        vectors: how many it will be applied to, over all steps until it is renewed.
    """

    factor: Tensor
    added: Tensor
    diagonal: bool = False
    low_rank: bool = False
    vectors: int = 1

    @property
    def form(self) -> str:
        """Which of the forms of the table above it gets."""
        if self.diagonal or self.low_rank:
            return "diagonal" if self.diagonal else "low rank"
        few = self.vectors < VECTORS_FOR_EXPLICIT_INVERSE * self.factor.shape[-1]
        return "cholesky" if few else "inverse"


def invert_factors(requests: Sequence[Request]) -> list[FactorInverse | None]:
    """The inverses of all requests; None for those that cannot be had."""
    found: list[FactorInverse | None] = [None] * len(requests)
    together: dict[object, list[int]] = {}
    for i, request in enumerate(requests):
        if request.form == "diagonal":
            reciprocal = (request.factor + request.added.unsqueeze(-1)).reciprocal()
            found[i] = {"reciprocal": reciprocal}
        elif request.form == "low rank":
            found[i] = _invert_low_rank(request)
        else:
            together.setdefault(_batch_key(i, request), []).append(i)
    groups = list(together.values())
    tried = [_try_dense([requests[i] for i in group]) for group in groups]
    # The only place that waits for the device.
    good = torch.stack([ok.to(tried[0][1].device) for _, ok in tried]).tolist() if tried else []
    for group, (results, _), fine in zip(groups, tried, good, strict=True):
        for i, result in zip(group, results, strict=True):
            found[i] = result if fine else _invert_with_care(requests[i])
    return found


def _batch_key(number: int, request: Request) -> object:
    """Requests with the same key are factorised together."""
    factor = request.factor
    side, device = factor.shape[-1], factor.device
    if side > LARGEST_BATCHED_SIDE.get(device.type, LARGEST_BATCHED_SIDE_ELSEWHERE):
        return number
    return side, factor.dtype, device, request.form


def _try_dense(requests: Sequence[Request]) -> tuple[list[FactorInverse], Tensor]:
    """Inverses of dense factors of one side, and whether all of them are good, a scalar tensor.

    If memory runs out they are not.
    """
    try:
        return _factorised(requests)
    except torch.OutOfMemoryError:
        return [{} for _ in requests], torch.zeros(
            (), dtype=torch.bool, device=requests[0].factor.device
        )


def _factorised(requests: Sequence[Request]) -> tuple[list[FactorInverse], Tensor]:
    form = requests[0].form
    factors, added = [r.factor for r in requests], [r.added for r in requests]
    single = len(requests) == 1
    lower, info = (
        _cholesky(factors[0], added[0])
        if single
        else _cholesky(torch.cat(factors), torch.cat(added))
    )
    # A zero on the diagonal of a failed attempt would be an error of its own.
    lower.diagonal(dim1=-2, dim2=-1).masked_fill_((info != 0).unsqueeze(-1), 1)
    result = torch.cholesky_inverse(lower) if form == "inverse" else lower
    # What is not finite in a row reaches the row's end, on the diagonal; and no entry of a positive
    # definite inverse is larger than its diagonal's largest.
    ok = (info == 0).all()
    for matrix in (lower, result):
        ok &= matrix.diagonal(dim1=-2, dim2=-1).isfinite().all()
    pieces = torch.split(result, [len(factor) for factor in factors])
    return [{form: piece} for piece in pieces], ok


def _cholesky(matrix: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
    """L of matrix + added·I, and LAPACK's info (0: good); the matrix is left as it is."""
    side = matrix.shape[-1]
    if matrix.device.type == "cpu" and side % SLOW_SIDE == 0:
        damped = F.pad(matrix, (0, PADDING, 0, PADDING))
    else:
        damped = matrix.clone()
    diagonal = damped.diagonal(dim1=-2, dim2=-1)
    diagonal[..., :side].add_(added.unsqueeze(-1))
    diagonal[..., side:] = 1
    lower, info = torch.linalg.cholesky_ex(damped)
    return lower[..., :side, :side], info


def _invert_with_care(request: Request) -> FactorInverse | None:
    """What is done where the first factorisation has failed; the result is explicit."""
    try:
        lower = _damped_cholesky(request.factor, request.added)
        if lower is None:
            return None
        inverse = torch.cholesky_inverse(lower)
        return {"inverse": inverse.to(request.factor.dtype)} if _is_finite(inverse) else None
    except torch.OutOfMemoryError:
        return None


def _is_finite(inverse: Tensor) -> bool:
    return bool(inverse.diagonal(dim1=-2, dim2=-1).isfinite().all())


def _damped_cholesky(factor: Tensor, added: Tensor) -> Tensor | None:
    """L in float64, the damping raised to the factor's own accuracy if it must be."""
    # Rounding moves eigenvalues of a sum of outer products by about this much.
    largest = factor.diagonal(dim1=-2, dim2=-1).amax(-1)
    resolution = torch.finfo(factor.dtype).eps * factor.shape[-1] * largest
    for extra in (added, torch.maximum(added, resolution)):
        lower, info = _cholesky(factor.double(), extra.double())
        # What is not finite in a row reaches the row's end, on the diagonal.
        if bool((info == 0).all()) and _is_finite(lower):
            return lower
    return None


def _invert_low_rank(request: Request) -> FactorInverse | None:
    rows, (n, d) = request.factor, request.factor.shape[-2:]
    # What lies in the rows is cancelled by I - WᵀW up to rounding, which 1/ε makes large: a damping
    # below the accuracy of the factor would return noise.
    trace = rows.square().sum((-2, -1))
    added = torch.maximum(request.added, torch.finfo(rows.dtype).eps * trace)
    few = n <= MOST_ROWS_IN_FLOAT64
    try:
        wide = rows.double() if few else rows
        lower = _damped_gram(wide @ wide.mT, added)
        if lower is None:
            return None
        if request.vectors < d / 2:
            found = {"rows": rows, "gram": lower.to(rows.dtype)}
        else:
            whitened = torch.linalg.solve_triangular(lower.to(wide.dtype), wide, upper=False)
            found = {"rows": whitened.to(rows.dtype)}
    except torch.OutOfMemoryError:
        return None
    return {**found, "scale": added.reciprocal()}


def _damped_gram(gram: Tensor, added: Tensor) -> Tensor | None:
    """L, in float64 where it cannot be had in the matrix's own type."""
    lower, info = _cholesky(gram, added.to(gram.dtype))
    if bool((info == 0).all()) and _is_finite(lower):
        return lower
    return _damped_cholesky(gram, added)


def apply_left(inverse: FactorInverse, gradient: Tensor) -> Tensor:
    """(factor + εI)⁻¹ · gradient, times ε where the factor is low rank (see `scale_of`).

    gradient: [groups, d, k].
    """
    if "inverse" in inverse:
        return inverse["inverse"] @ gradient
    if "cholesky" in inverse:
        return torch.cholesky_solve(gradient, inverse["cholesky"])
    if "reciprocal" in inverse:
        return inverse["reciprocal"].unsqueeze(-1) * gradient
    rows = inverse["rows"]
    inner = rows @ gradient
    if "gram" in inverse:
        inner = torch.cholesky_solve(inner, inverse["gram"])
    return torch.baddbmm(gradient, rows.mT, inner, alpha=-1)


def apply_right(gradient: Tensor, inverse: FactorInverse) -> Tensor:
    """gradient · (factor + εI)⁻¹, times ε where the factor is low rank; gradient [groups, k, d].

    The inverse is symmetric. Not by `apply_left` of the transpose: the result is to lie in memory
    as the gradient does.
    """
    if "inverse" in inverse:
        return gradient @ inverse["inverse"]
    if "cholesky" in inverse:
        return torch.cholesky_solve(gradient.mT, inverse["cholesky"]).mT
    if "reciprocal" in inverse:
        return gradient * inverse["reciprocal"].unsqueeze(-2)
    rows = inverse["rows"]
    inner = gradient @ rows.mT
    if "gram" in inverse:
        inner = torch.cholesky_solve(inner.mT, inverse["gram"]).mT
    return torch.baddbmm(gradient, inner, rows, alpha=-1)


def scale_of(inverse: FactorInverse) -> Tensor | None:
    """What results of `apply_left` and `apply_right` are to be multiplied by, [groups], or None.

    Left to the end, so that both sides together take one pass over the gradient.
    """
    return inverse.get("scale")


def eigendecomposition(factor: Tensor, diagonal: bool) -> tuple[Tensor, Tensor | None] | None:
    """(eigenvalues [groups, d], clamped at 0; eigenvectors [groups, d, d], None if diagonal)."""
    if diagonal:
        return factor.clone(), None
    for dtype in (factor.dtype, torch.float64):
        try:
            values, vectors = torch.linalg.eigh(factor.to(dtype))
        except (torch.linalg.LinAlgError, torch.OutOfMemoryError):  # type: ignore[attr-defined]
            continue
        # What is not finite shows in the sums.
        if bool((values.sum() + vectors.sum()).isfinite()):
            return values.clamp(min=0).to(factor.dtype), vectors.to(factor.dtype)
    return None
