"""Symmetric matrices by panels: blocks of rows, from the diagonal to the right.

What is to the left of the diagonal is the mirror image of what is to the right, so it need be
neither computed nor sent.
"""

from __future__ import annotations

import itertools

from torch import Tensor

Panel = tuple[int, int]  # its first row, and the row after its last one


def panels(side: int, width: int) -> list[Panel]:
    """Panels of about the same width, about `width`, that cover a side."""
    count = max(1, round(side / width))
    edges = [side * i // count for i in range(count + 1)]
    return list(itertools.pairwise(edges))


def views(matrix: Tensor, parts: list[Panel]) -> list[Tensor]:
    """The panels of a matrix [..., d, d]."""
    return [matrix[..., first:end, first:] for first, end in parts]


def mirror(matrix: Tensor, parts: list[Panel]) -> None:
    """Fills what is left of the panels of a matrix [..., d, d], in place."""
    for first, end in parts[:-1]:
        matrix[..., end:, first:end] = matrix[..., first:end, end:].mT
