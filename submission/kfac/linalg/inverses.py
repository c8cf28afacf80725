"""The damped inverse (factor + ε I)⁻¹ of one Kronecker factor, in the form that is cheapest.

| form | used for |
|---|---|
| `ExplicitInverse` | a dense factor whose inverse is applied to many vectors |
| `CholeskyInverse` | a dense factor whose inverse is applied to few vectors |
| `LowRankInverse` | a factor of n < d rows RᵀR, which is never formed |
| `DiagonalInverse` | a diagonal factor |

By Woodbury, (RᵀR + εI)⁻¹ = (I - Rᵀ(LLᵀ)⁻¹R) / ε with LLᵀ = RRᵀ + εI, an n×n matrix.

When a factorisation fails, it is repeated in float64, then with the damping raised to the accuracy
to which the factor is known at all; if that fails too, the result is None.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import tuning
from .factor import Factor


@dataclass
class ExplicitInverse:
    """`inverse` [groups, d, d]."""

    inverse: Tensor
    scale = None

    def left_times(self, gradient: Tensor) -> Tensor:
        """(factor + εI)⁻¹ · gradient / scale; gradient [groups, d, k]."""
        return self.inverse @ gradient

    def right_times(self, gradient: Tensor) -> Tensor:
        """gradient · (factor + εI)⁻¹ / scale; gradient [groups, k, d]."""
        return gradient @ self.inverse


@dataclass
class CholeskyInverse:
    """`lower` [groups, d, d] with L Lᵀ = factor + εI."""

    lower: Tensor
    scale = None

    def left_times(self, gradient: Tensor) -> Tensor:
        """As `ExplicitInverse.left_times`."""
        return torch.cholesky_solve(gradient, self.lower)

    def right_times(self, gradient: Tensor) -> Tensor:
        """As `ExplicitInverse.right_times`."""
        return torch.cholesky_solve(gradient.mT, self.lower).mT


@dataclass
class LowRankInverse:
    """I - RᵀWR, to be divided by ε.

    Attributes:
        rows: R [groups, n, d]; or L⁻¹R where `gram` is None.
        gram: L [groups, n, n] with L Lᵀ = RRᵀ + εI, or None.
        scale: 1/ε, [groups]: what results are to be multiplied by. Left to the end, so that both
            sides of a gradient together take one pass over it.
    """

    rows: Tensor
    gram: Tensor | None
    scale: Tensor

    def left_times(self, gradient: Tensor) -> Tensor:
        """As `ExplicitInverse.left_times`."""
        inner = self.rows @ gradient
        if self.gram is not None:
            inner = torch.cholesky_solve(inner, self.gram)
        return torch.baddbmm(gradient, self.rows.mT, inner, alpha=-1)

    def right_times(self, gradient: Tensor) -> Tensor:
        """As `ExplicitInverse.right_times`; the result lies in memory as the gradient does."""
        inner = gradient @ self.rows.mT
        if self.gram is not None:
            inner = torch.cholesky_solve(inner.mT, self.gram).mT
        return torch.baddbmm(gradient, inner, self.rows, alpha=-1)


@dataclass
class DiagonalInverse:
    """`reciprocal` [groups, d]."""

    reciprocal: Tensor
    scale = None

    def left_times(self, gradient: Tensor) -> Tensor:
        """As `ExplicitInverse.left_times`."""
        return self.reciprocal.unsqueeze(-1) * gradient

    def right_times(self, gradient: Tensor) -> Tensor:
        """As `ExplicitInverse.right_times`."""
        return gradient * self.reciprocal.unsqueeze(-2)


FactorInverse = ExplicitInverse | CholeskyInverse | LowRankInverse | DiagonalInverse


@dataclass(frozen=True)
class Request:
    """A factor to be inverted: (factor + added·I)⁻¹.

    Attributes:
        added: ε, [groups].
        vectors: how many it will be applied to, over all steps until it is renewed.
    """

    factor: Factor
    added: Tensor
    vectors: int = 1

    @property
    def is_explicit(self) -> bool:
        """Whether a dense factor's inverse is formed, and not its Cholesky factor kept."""
        return self.vectors >= tuning.VECTORS_FOR_EXPLICIT_INVERSE * self.factor.side


def invert_factors(requests: Sequence[Request]) -> list[FactorInverse | None]:
    """The inverses of all requests; None for those that cannot be had.

    Dense factors of equal shape are factorised together, and a device is waited for once.
    """
    found: list[FactorInverse | None] = [None] * len(requests)
    together: dict[object, list[int]] = {}
    for i, request in enumerate(requests):
        if request.factor.is_diagonal:
            reciprocal = (request.factor.values + request.added.unsqueeze(-1)).reciprocal()
            found[i] = DiagonalInverse(reciprocal)
        elif request.factor.form == "rows":
            found[i] = _invert_low_rank(request)
        else:
            together.setdefault(_batch_key(i, request), []).append(i)
    groups = list(together.values())
    tried = [_try_dense([requests[i] for i in group]) for group in groups]
    # The only place that waits for the device.
    good = torch.stack([ok.to(tried[0][1].device) for _, ok in tried]).tolist() if tried else []
    for group, (results, _), fine in zip(groups, tried, good, strict=True):
        for position, i in enumerate(group):
            found[i] = results[position] if fine else _invert_with_care(requests[i])
    return found


def _batch_key(number: int, request: Request) -> object:
    """Requests with the same key are factorised together."""
    values = request.factor.values
    side, device = values.shape[-1], values.device
    limit = tuning.LARGEST_BATCHED_SIDE.get(device.type, tuning.LARGEST_BATCHED_SIDE_ELSEWHERE)
    return number if side > limit else (side, values.dtype, device, request.is_explicit)


def _try_dense(requests: Sequence[Request]) -> tuple[list[FactorInverse], Tensor]:
    """Inverses of dense factors of one side, and whether all of them are good, a scalar tensor.

    If memory runs out they are not.
    """
    try:
        return _factorised(requests)
    except torch.OutOfMemoryError:
        return [], torch.zeros((), dtype=torch.bool, device=requests[0].added.device)


def _factorised(requests: Sequence[Request]) -> tuple[list[FactorInverse], Tensor]:
    explicit = requests[0].is_explicit
    factors, added = [r.factor.values for r in requests], [r.added for r in requests]
    single = len(requests) == 1
    lower, info = (
        _cholesky(factors[0], added[0])
        if single
        else _cholesky(torch.cat(factors), torch.cat(added))
    )
    # A zero on the diagonal of a failed attempt would be an error of its own.
    lower.diagonal(dim1=-2, dim2=-1).masked_fill_((info != 0).unsqueeze(-1), 1)
    result = torch.cholesky_inverse(lower) if explicit else lower
    # What is not finite in a row reaches the row's end, on the diagonal; and no entry of a positive
    # definite inverse is larger than its diagonal's largest.
    ok = (info == 0).all()
    for matrix in (lower, result):
        ok &= matrix.diagonal(dim1=-2, dim2=-1).isfinite().all()
    make = ExplicitInverse if explicit else CholeskyInverse
    return [make(piece) for piece in torch.split(result, [len(f) for f in factors])], ok


def _cholesky(matrix: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
    """L of matrix + added·I, and LAPACK's info (0: good); the matrix is left as it is."""
    side = matrix.shape[-1]
    if matrix.device.type == "cpu" and side % tuning.SLOW_SIDE == 0:
        padding = tuning.SLOW_SIDE_PADDING
        damped = F.pad(matrix, (0, padding, 0, padding))
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
        lower = _damped_cholesky(request.factor.values, request.added)
        if lower is None:
            return None
        inverse = torch.cholesky_inverse(lower)
        found = ExplicitInverse(inverse.to(request.factor.values.dtype))
        return found if _is_finite(inverse) else None
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


def _invert_low_rank(request: Request) -> LowRankInverse | None:
    rows = request.factor.values
    n, d = rows.shape[-2:]
    # What lies in the rows is cancelled by I - WᵀW up to rounding, which 1/ε makes large: a damping
    # below the accuracy of the factor would return noise.
    added = torch.maximum(request.added, torch.finfo(rows.dtype).eps * request.factor.trace())
    try:
        wide = rows.double() if n <= tuning.MOST_ROWS_IN_FLOAT64 else rows
        lower = _damped_gram(wide @ wide.mT, added)
        if lower is None:
            return None
        scale = added.reciprocal()
        if request.vectors < d / 2:
            return LowRankInverse(rows, lower.to(rows.dtype), scale)
        whitened = torch.linalg.solve_triangular(lower.to(wide.dtype), wide, upper=False)
        return LowRankInverse(whitened.to(rows.dtype), None, scale)
    except torch.OutOfMemoryError:
        return None


def _damped_gram(gram: Tensor, added: Tensor) -> Tensor | None:
    """L, in float64 where it cannot be had in the matrix's own type."""
    lower, info = _cholesky(gram, added.to(gram.dtype))
    if bool((info == 0).all()) and _is_finite(lower):
        return lower
    return _damped_cholesky(gram, added)


def followed_eigenvectors(factor: Factor, before: Tensor) -> tuple[Tensor, Tensor]:
    """A step of orthogonal iteration from the eigenvectors of an earlier average of the factor.

    Cheaper than an `eigh` (docs/speed.md). Over the steps of training the vectors follow the
    eigenvectors, as in SOAP (Vyas et al. 2024); their Rayleigh quotients are no eigenvalues, for
    rules that need none. Larger ones come first, to which the iteration turns the vectors anyway.

    Args:
        before: [groups, d, d], the vectors in columns.

    Returns:
        As `eigendecomposition`; the old vectors where the new ones are not finite.
    """
    turned = factor.left_times(before)
    quotients = (before * turned).sum(-2)
    order = quotients.argsort(-1, descending=True)
    turned = turned.gather(-1, order.unsqueeze(-2).expand_as(turned))
    vectors = torch.linalg.qr(turned)[0]
    fine = vectors.sum((-2, -1), keepdim=True).isfinite()  # decided without waiting for a device
    values = torch.where(fine.squeeze(-1), quotients.gather(-1, order).clamp(min=0), 0)
    return values, torch.where(fine, vectors, before)


def eigendecomposition(factor: Factor) -> tuple[Tensor, Tensor | None] | None:
    """(eigenvalues [groups, d], clamped at 0; eigenvectors [groups, d, d], None if diagonal).

    None where it cannot be had.
    """
    if factor.is_diagonal:
        return factor.values.clone(), None
    dense = factor.dense()
    for dtype in (dense.dtype, torch.float64):
        try:
            values, vectors = torch.linalg.eigh(dense.to(dtype))
        except (torch.linalg.LinAlgError, torch.OutOfMemoryError):  # type: ignore[attr-defined]
            continue
        # What is not finite shows in the sums.
        if bool((values.sum() + vectors.sum()).isfinite()):
            return values.clamp(min=0).to(dense.dtype), vectors.to(dense.dtype)
    return None
