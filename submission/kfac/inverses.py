"""Damped inverses of curvature blocks, and how they act on gradients.

An inverse is a plain dict of tensors, so that it can be stored and restored as it is; it shares
no memory with the averages, which change in place. When a factorisation fails, it is repeated in
float64, then with the damping raised to the accuracy to which the factor is known at all; if that
fails too, `None` says so and the caller keeps the previous inverse.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import damping as damping_rules
from .curvature import unitwise_blocks
from .statistics import KroneckerPart, Part, Sums, UnitwisePart

Inverse = dict[str, Tensor]


def invert(part: Part, averages: Sums, kind: str, damping: float, relative: bool) -> Inverse | None:
    """The damped inverse of a part's curvature, or None where it cannot be had.

    Args:
        averages: see `curvature.average_sums`.
        kind: see `damping.DAMPING_KINDS`; parts without factors are damped on their product.
        damping, relative: λ, and whether it is in units of the mean eigenvalue.
    """
    if not isinstance(part, KroneckerPart):
        f = averages["F"]
        mean = f[[0, -1]].mean() if isinstance(part, UnitwisePart) else f.mean()
        strength = damping * mean if relative else torch.full_like(mean, damping)
        return {"F": f.clone(), "damping": torch.where(strength > 0, strength, damping)}
    a, b = averages["A"], averages["B"]
    mean_a = damping_rules.mean_eigenvalue(a, part.diagonal_input)
    mean_b = damping_rules.mean_eigenvalue(b, part.diagonal_gradient)
    if relative:
        strength = damping_rules.relative(damping, mean_a, mean_b)
    else:
        strength = torch.full_like(mean_a, damping)
    if kind == "exact":
        eigen_a = eigendecomposition(a, part.diagonal_input)
        eigen_b = eigendecomposition(b, part.diagonal_gradient)
        if eigen_a is None or eigen_b is None:
            return None
        inverse = {"eigenvalues_A": eigen_a[0], "eigenvalues_B": eigen_b[0], "damping": strength}
        if eigen_a[1] is not None:
            inverse["eigenvectors_A"] = eigen_a[1]
        if eigen_b[1] is not None:
            inverse["eigenvectors_B"] = eigen_b[1]
        return inverse
    add_a, add_b = damping_rules.split(kind, strength, mean_a, mean_b)
    inverse_a = damped_inverse(a, add_a, part.diagonal_input)
    inverse_b = damped_inverse(b, add_b, part.diagonal_gradient)
    if inverse_a is None or inverse_b is None:
        return None
    return {"A": inverse_a, "B": inverse_b}


def damped_inverse(factor: Tensor, added: Tensor, diagonal: bool) -> Tensor | None:
    """(factor + added·I)⁻¹ for [groups, d, d] (Cholesky), or [groups, d] where diagonal."""
    if diagonal:
        return (factor + added.unsqueeze(-1)).reciprocal()
    # Rounding moves eigenvalues of a sum of outer products by about this much.
    largest = factor.diagonal(dim1=-2, dim2=-1).amax(-1)
    resolution = torch.finfo(factor.dtype).eps * factor.shape[-1] * largest
    attempts = (
        (factor.dtype, added),
        (torch.float64, added),
        (torch.float64, torch.maximum(added, resolution)),
    )
    for dtype, extra in attempts:
        damped = factor.to(dtype, copy=True)
        damped.diagonal(dim1=-2, dim2=-1).add_(extra.to(dtype).unsqueeze(-1))
        lower, info = torch.linalg.cholesky_ex(damped)
        if not bool((info == 0).all()):
            continue
        inverse = torch.cholesky_inverse(lower)
        if bool(inverse.isfinite().all()):
            return inverse.to(factor.dtype)
    return None


def eigendecomposition(factor: Tensor, diagonal: bool) -> tuple[Tensor, Tensor | None] | None:
    """(eigenvalues [groups, d], clamped at 0; eigenvectors [groups, d, d], None if diagonal)."""
    if diagonal:
        return factor.clone(), None
    for dtype in (factor.dtype, torch.float64):
        try:
            values, vectors = torch.linalg.eigh(factor.to(dtype))
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            continue
        if bool(values.isfinite().all()) and bool(vectors.isfinite().all()):
            return values.clamp(min=0).to(factor.dtype), vectors.to(factor.dtype)
    return None


def precondition(part: Part, inverse: Inverse, gradient: Tensor) -> Tensor:
    """Applies a damped inverse to a gradient.

    gradient: [groups, P_out, P_in (+1)] for linear layers, [1 or 2, units] for normalisation
    layers, the parameter's shape otherwise. The result has the same shape.
    """
    if not isinstance(part, KroneckerPart):
        return _precondition_small(part, inverse, gradient)
    if "A" in inverse:
        return _apply_right(_apply_left(inverse["B"], gradient), inverse["A"])
    q_a, q_b = inverse.get("eigenvectors_A"), inverse.get("eigenvectors_B")
    rotated = gradient if q_b is None else q_b.mT @ gradient
    rotated = rotated if q_a is None else rotated @ q_a
    product = inverse["eigenvalues_B"].unsqueeze(-1) * inverse["eigenvalues_A"].unsqueeze(-2)
    rotated = rotated / (product + inverse["damping"].reshape(-1, 1, 1))
    rotated = rotated if q_b is None else q_b @ rotated
    return rotated if q_a is None else rotated @ q_a.mT


def _apply_left(inverse: Tensor, gradient: Tensor) -> Tensor:
    return inverse.unsqueeze(-1) * gradient if inverse.dim() == 2 else inverse @ gradient


def _apply_right(gradient: Tensor, inverse: Tensor) -> Tensor:
    return gradient * inverse.unsqueeze(-2) if inverse.dim() == 2 else gradient @ inverse


def _precondition_small(part: Part, inverse: Inverse, gradient: Tensor) -> Tensor:
    f, strength = inverse["F"], inverse["damping"]
    if not isinstance(part, UnitwisePart) or f.shape[0] == 1:
        return gradient / (f + strength)
    blocks = unitwise_blocks(f)
    (a, b), d = (blocks[:, 0, 0] + strength, blocks[:, 0, 1]), blocks[:, 1, 1] + strength
    determinant = a * d - b * b
    return torch.stack([d * gradient[0] - b * gradient[1], a * gradient[1] - b * gradient[0]]) / (
        determinant
    )
