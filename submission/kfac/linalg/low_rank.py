"""When a factor that is a sum over n rows is better kept as these rows than formed.

A = RᵀR with R [n, d]. Formed, it takes n d² to add up, d³ to factorise and d² per vector that its
inverse is applied to. By the rows, (RᵀR + εI)⁻¹ = (I - Rᵀ(RRᵀ + εI)⁻¹R) / ε (Woodbury) takes n² d,
n³ and 2 n d + n² per vector, and nothing of size d² is ever made.
"""

from __future__ import annotations

from functools import lru_cache

from ..tuning import FACTORISATION, SOLVE, VECTORS_FOR_EXPLICIT_INVERSE


@lru_cache(maxsize=4096)
def most_rows(side: int, vectors: int) -> int:
    """Up to how many rows a factor of this side is kept as rows, if it meets so many vectors.

    `vectors` is over all steps until the factor is renewed.
    """
    low, high = 0, side
    while low < high:  # the difference of the two costs changes its sign once
        middle = (low + high + 1) // 2
        if _cost_of_rows(middle, side, vectors) < _cost_of_factor(middle, side, vectors):
            low = middle
        else:
            high = middle - 1
    return low


def _cost_of_rows(n: int, d: int, vectors: int) -> float:
    gram = n * n * d + FACTORISATION * n**3 / 6
    by_solving = (2 * n * d + SOLVE * n * n) * vectors
    by_products = SOLVE * n * n * d / 2 + 2 * n * d * vectors
    return gram + min(by_solving, by_products)


def _cost_of_factor(n: int, d: int, vectors: int) -> float:
    formed = 0.6 * n * d * d + FACTORISATION * d**3 / 6  # a symmetric product costs about 0.6
    if vectors < VECTORS_FOR_EXPLICIT_INVERSE * d:
        return formed + SOLVE * d * d * vectors
    return formed + FACTORISATION * d**3 / 3 + d * d * vectors
