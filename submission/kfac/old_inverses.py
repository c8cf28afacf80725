"""Inverses that are about to be renewed, packed: they are needed again only if that fails.

In a step that renews, old inverses and new factors are in memory together while the Fisher pass
needs most of it. Symmetric and triangular matrices lose nothing in half of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from . import symmetric
from .inverses import Inverse

PANEL_WIDTH = 128
SMALLEST_SIDE = 512  # there is little to gain below


@dataclass(frozen=True)
class _Packed:
    inverse: Inverse
    key: str
    shape: torch.Size
    flat: Tensor

    @classmethod
    def taken_from(cls, inverse: Inverse, key: str) -> _Packed:
        matrix = inverse.pop(key)
        # A lower triangle, stored by columns, is an upper one by rows.
        upper = matrix.mT if _is_triangle(key) else matrix
        return cls(inverse, key, matrix.shape, symmetric.pack(upper, PANEL_WIDTH))

    def put_back(self) -> None:
        upper = symmetric.unpack(self.flat, self.shape, PANEL_WIDTH)
        if not _is_triangle(self.key):
            symmetric.mirror(upper, symmetric.panels(self.shape[-1], PANEL_WIDTH))
        self.inverse[self.key] = upper.mT if _is_triangle(self.key) else upper


def _is_triangle(key: str) -> bool:
    return key.endswith(".cholesky")


class OldInverses:
    """Takes matrices out of inverses, and puts them back."""

    def __init__(self) -> None:
        self._packed: list[_Packed] = []

    def pack(self, inverses: Mapping[str, Inverse]) -> None:
        """Takes out the large matrices, and leaves the inverses without until `restore`."""
        for inverse in inverses.values():
            for key in ("A.inverse", "B.inverse", "A.cholesky", "B.cholesky"):
                if key in inverse and inverse[key].shape[-1] >= SMALLEST_SIDE:
                    self._packed.append(_Packed.taken_from(inverse, key))

    def restore(self, inverses: Mapping[str, Inverse]) -> None:
        """Puts back what is missing in inverses that have not been replaced, drops the rest."""
        used = {id(inverse) for inverse in inverses.values()}
        packed, self._packed = self._packed, []
        for one in packed:
            if id(one.inverse) in used:
                one.put_back()
