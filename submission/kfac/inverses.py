"""Damped inverses of curvature blocks, and how they act on gradients.

An inverse is a plain dict of tensors, so that it can be stored and restored as it is; it shares
no memory with the averages, which change in place.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import damping as damping_rules
from .curvature import FactorForm, factor_of
from .factor_inverses import (
    FactorInverse,
    Request,
    apply_left,
    apply_right,
    eigendecomposition,
    invert_factors,
    scale_of,
)
from .statistics import DiagonalPart, KroneckerPart, Part, Sums, UnitwisePart, statistics_dtype

Inverse = dict[str, Tensor]


@dataclass(frozen=True)
class InverseSettings:
    """How curvature is inverted.

    Attributes:
        kind: see `damping.DAMPING_KINDS`; parts without factors are damped on their product.
        damping, relative: λ, and whether it is in units of the mean eigenvalue.
        uses: how often an inverse will be applied before it is renewed.
    """

    kind: str
    damping: float
    relative: bool
    uses: int


def invert_all(
    parts: Sequence[Part], averages: Mapping[str, Sums], settings: InverseSettings
) -> dict[str, Inverse]:
    """The damped inverses of the parts' curvatures; a part whose inverse cannot be had is left out.

    Factors of equal shape are factorised together, and a device is waited for once.

    Args:
        averages: part name -> averages, see `curvature.average_sums`.
    """
    found: dict[str, Inverse] = {}
    asked: list[tuple[str, str]] = []
    requests: list[Request] = []
    for part in parts:
        own = averages[part.name]
        if not isinstance(part, KroneckerPart):
            found[part.name] = _invert_small(part, own["F"], settings)
            continue
        a, b = factor_of(part, own, "A"), factor_of(part, own, "B")
        strength = strength_of(part, own, settings.damping, settings.relative)
        if settings.kind == "exact":
            product = _invert_product(a, b, strength)
            if product is not None:
                found[part.name] = product
            continue
        means = a.mean_eigenvalue(), b.mean_eigenvalue()
        added = damping_rules.split(settings.kind, strength, *means)
        out_side, in_side = part.sides
        # A gradient [P_out, P_in] is P_out vectors for A and P_in for B.
        for side, factor, extra, vectors in zip(
            ("A", "B"), (a, b), added, (out_side, in_side), strict=True
        ):
            asked.append((part.name, side))
            requests.append(
                Request(
                    factor.values, extra, diagonal=factor.diagonal, low_rank=factor.low_rank,
                    vectors=settings.uses * vectors,
                )
            )  # fmt: skip
    failed = set()
    for (name, side), result in zip(asked, invert_factors(requests), strict=True):
        if result is None:
            failed.add(name)
        else:
            inverse = found.setdefault(name, {})
            inverse.update({f"{side}.{form}": tensor for form, tensor in result.items()})
    return {name: inverse for name, inverse in found.items() if name not in failed}


def strength_of(part: Part, averages: Sums, damping: float, relative: bool) -> Tensor:
    """What is added to a part's curvature: λ, or λ times its mean eigenvalue; [groups].

    A dead part keeps the plain λ.
    """
    if isinstance(part, KroneckerPart):
        means = (factor_of(part, averages, side).mean_eigenvalue() for side in ("A", "B"))
        mean_a, mean_b = means
        mean = mean_a * mean_b  # of A ⊗ B
    else:
        f = averages["F"]
        has_blocks = isinstance(part, UnitwisePart)
        mean = (f[[0, -1]] if has_blocks else f).mean().reshape(1)
    plain = torch.full_like(mean, damping)
    return torch.where(mean > 0, damping * mean, plain) if relative else plain


def renewed_damping(
    part: Part, averages: Sums, inverse: Inverse, settings: InverseSettings
) -> Inverse:
    """The inverse of kind "exact" with another damping, in the basis that it has."""
    if not isinstance(part, KroneckerPart):
        return _invert_small(part, averages["F"], settings)
    strength = strength_of(part, averages, settings.damping, settings.relative)
    return {**inverse, "damping": strength}


def _invert_small(part: Part, f: Tensor, settings: InverseSettings) -> Inverse:
    """Of blocks per unit, `blocks` [3, units] (γγ, γβ, ββ) in float64; of a diagonal, `reciprocal`.

    `reciprocal` is one row [1, entries], so that parts can lie side by side; that of a diagonal
    that has been averaged over rows keeps its shape.
    """
    strength = strength_of(part, {"F": f}, settings.damping, settings.relative)
    if isinstance(part, UnitwisePart) and part.has_bias:
        # In float64, and damped by no less than F is accurate to: blocks of few examples have
        # nearly rank one, where the two products below cancel.
        a, b, d = f.double()
        s = torch.maximum(strength.double(), torch.finfo(f.dtype).eps * (a + d))
        determinant = (a + s) * (d + s) - b * b
        return {"blocks": torch.stack([d + s, -b, a + s]) / determinant}
    reciprocal = (f + strength).reciprocal()
    by_row = isinstance(part, DiagonalPart) and part.by_row
    return {"reciprocal": reciprocal if by_row else reciprocal.reshape(1, -1)}


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
    layers, the parameter's shape otherwise; or several of these side by side (see `batches`).
    The result has the same shape.
    """
    if "blocks" in inverse:
        (aa, ab, bb), (first, second) = inverse["blocks"], gradient
        return torch.stack([aa * first + ab * second, ab * first + bb * second])
    if not isinstance(part, KroneckerPart):
        reciprocal = inverse["reciprocal"]
        if reciprocal.numel() == gradient.numel():
            reciprocal = reciprocal.reshape(gradient.shape)
        return reciprocal * gradient
    if "A.eigenvalues" in inverse:
        return _precondition_product(inverse, gradient)
    a, b = _side(inverse, "A"), _side(inverse, "B")
    left = apply_left(b, gradient)
    if part.has_bias and not part.has_ones:
        weight, bias = left[..., :-1], left[..., -1:]
        return torch.cat([_scaled(apply_right(weight, a), a, b), _scaled(bias, b)], -1)
    return _scaled(apply_right(left, a), a, b)


def _scaled(result: Tensor, *sides: FactorInverse) -> Tensor:
    """The result times the scales of the inverses that it was multiplied by, see `scale_of`."""
    scales = [scale for side in sides if (scale := scale_of(side)) is not None]
    if not scales:
        return result
    return result.mul_(math.prod(scales[1:], start=scales[0]).reshape(-1, 1, 1))


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
