"""Damped inverses of curvature blocks, and how they act on gradients.

An inverse is a plain dict of tensors, so that it can be stored and restored as it is; it shares
no memory with the averages, which change in place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import damping as damping_rules
from .curvature import FactorForm, factor_of, unitwise_blocks
from .factor_inverses import (
    FactorInverse,
    apply_left,
    apply_right,
    eigendecomposition,
    invert_factor,
)
from .statistics import KroneckerPart, Part, Sums, UnitwisePart, statistics_dtype

Inverse = dict[str, Tensor]


def invert(
    part: Part, averages: Sums, *, kind: str, damping: float, relative: bool, uses: int
) -> Inverse | None:
    """The damped inverse of a part's curvature, or None where it cannot be had.

    Args:
        averages: see `curvature.average_sums`.
        kind: see `damping.DAMPING_KINDS`; parts without factors are damped on their product.
        damping, relative: λ, and whether it is in units of the mean eigenvalue.
        uses: how often it will be applied before it is renewed.
    """
    if not isinstance(part, KroneckerPart):
        f = averages["F"]
        mean = f[[0, -1]].mean() if isinstance(part, UnitwisePart) else f.mean()
        strength = damping * mean if relative else torch.full_like(mean, damping)
        return {"F": f.clone(), "damping": torch.where(strength > 0, strength, damping)}
    a, b = factor_of(part, averages, "A"), factor_of(part, averages, "B")
    mean_a, mean_b = a.mean_eigenvalue(), b.mean_eigenvalue()
    if relative:
        strength = damping_rules.relative(damping, mean_a, mean_b)
    else:
        strength = torch.full_like(mean_a, damping)
    if kind == "exact":
        return _invert_product(a, b, strength)
    add_a, add_b = damping_rules.split(kind, strength, mean_a, mean_b)
    inverse: Inverse = {}
    out_side, in_side = part.sides
    # A gradient [P_out, P_in] is P_out vectors for A and P_in for B.
    for side, factor, added, vectors in (("A", a, add_a, out_side), ("B", b, add_b, in_side)):
        found = invert_factor(
            factor.values, added,
            diagonal=factor.diagonal, low_rank=factor.low_rank, vectors=uses * vectors,
        )  # fmt: skip
        if found is None:
            return None
        inverse.update({f"{side}.{form}": tensor for form, tensor in found.items()})
    return inverse


def _invert_product(a: FactorForm, b: FactorForm, strength: Tensor) -> Inverse | None:
    inverse: Inverse = {"damping": strength}
    for side, factor in (("A", a), ("B", b)):
        dense = factor.values if factor.diagonal else factor.dense()
        decomposition = eigendecomposition(dense, factor.diagonal)
        if decomposition is None:
            return None
        inverse[f"{side}.eigenvalues"] = decomposition[0]
        if decomposition[1] is not None:
            inverse[f"{side}.eigenvectors"] = decomposition[1]
    return inverse


def empty_inverse(part: KroneckerPart, kind: str) -> Inverse:
    """Tensors of the shapes of a layer's inverse, in the form that is applied many times."""
    weight = part.slices[0].data
    groups = part.kind.groups(part.module)
    out_side, in_side = part.sides

    def empty(*shape: int) -> Tensor:
        return torch.empty(groups, *shape, dtype=statistics_dtype(weight), device=weight.device)

    inverse: Inverse = {"damping": empty()} if kind == "exact" else {}
    for side, length, diagonal in (
        ("A", in_side, part.diagonal_input),
        ("B", out_side, part.diagonal_gradient),
    ):
        if kind == "exact":
            inverse[f"{side}.eigenvalues"] = empty(length)
            if not diagonal:
                inverse[f"{side}.eigenvectors"] = empty(length, length)
        elif diagonal:
            inverse[f"{side}.reciprocal"] = empty(length)
        else:
            inverse[f"{side}.inverse"] = empty(length, length)
    return inverse


def precondition(part: Part, inverse: Inverse, gradient: Tensor) -> Tensor:
    """Applies a damped inverse to a gradient.

    gradient: [groups, P_out, P_in (+1)] for linear layers, [1 or 2, units] for normalisation
    layers, the parameter's shape otherwise. The result has the same shape.
    """
    if not isinstance(part, KroneckerPart):
        return _precondition_small(part, inverse, gradient)
    if "A.eigenvalues" in inverse:
        return _precondition_product(inverse, gradient)
    return apply_right(apply_left(_side(inverse, "B"), gradient), _side(inverse, "A"))


def _side(inverse: Inverse, side: str) -> FactorInverse:
    prefix = side + "."
    return {k[len(prefix) :]: v for k, v in inverse.items() if k.startswith(prefix)}


def _precondition_product(inverse: Inverse, gradient: Tensor) -> Tensor:
    q_a, q_b = inverse.get("A.eigenvectors"), inverse.get("B.eigenvectors")
    rotated = gradient if q_b is None else q_b.mT @ gradient
    rotated = rotated if q_a is None else rotated @ q_a
    if "corrected" in inverse:
        product = inverse["corrected"]
    else:
        product = inverse["B.eigenvalues"].unsqueeze(-1) * inverse["A.eigenvalues"].unsqueeze(-2)
    rotated = rotated / (product + inverse["damping"].reshape(-1, 1, 1))
    rotated = rotated if q_b is None else q_b @ rotated
    return rotated if q_a is None else rotated @ q_a.mT


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
