"""Inverses of many blocks at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..linalg.inverses import Request, invert_factors
from .block import BlockCurvature, Inverse, InverseSettings


def invert_all(
    curvatures: Mapping[str, BlockCurvature],
    settings: InverseSettings,
    before: Mapping[str, Inverse | None],
) -> dict[str, Inverse]:
    """Name of a block -> its damped inverse; a block whose inverse cannot be had is left out.

    Factors of equal shape are factorised together, and a device is waited for once.

    Args:
        before: of blocks whose basis may follow the eigenvectors, the inverse until now.
    """
    asked: list[Request] = []
    spans: dict[str, slice] = {}
    for name, curvature in curvatures.items():
        requests = curvature.requests(settings)
        spans[name] = slice(len(asked), len(asked) + len(requests))
        asked += requests
    found: Sequence[object] = invert_factors(asked)
    inverses: dict[str, Inverse] = {}
    for name, curvature in curvatures.items():
        own: list[object] = list(found[spans[name]])
        inverse = curvature.inverse(settings, own, before.get(name))  # type: ignore[arg-type]
        if inverse is not None:
            inverses[name] = inverse
    return inverses
