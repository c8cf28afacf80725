"""What the updates of one step have collected, until `KFAC.precondition` takes it in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .capture import Recording
from .statistics import KroneckerPart, Part, RowPairs, Sums, add_sums, empty_sums


@dataclass
class Accumulated:
    """Sums over the micro-batches of a step, of this rank.

    Attributes:
        sums: part name -> sums.
        calls: part name -> how often its module was called.
        rows: layer name -> row pairs, for the eigenvalue correction.
        terms: number of loss terms, a scalar.
        out_of_memory: what was being done when memory ran out, or None.
    """

    sums: dict[str, Sums] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    rows: dict[str, RowPairs] = field(default_factory=dict)
    terms: Tensor | None = None
    out_of_memory: str | None = None
    watched: list[str] = field(default_factory=list)
    watched_calls: Tensor | None = None

    def add(self, recording: Recording, terms: Tensor) -> None:
        """Adds what one recording has collected."""
        self.terms = terms if self.terms is None else self.terms + terms
        self.out_of_memory = self.out_of_memory or recording.out_of_memory
        for name, count in recording.calls.items():
            self.calls[name] = self.calls.get(name, 0) + count
        for name, sums in recording.sums.items():
            if name in self.sums:
                add_sums(self.sums[name], sums)
            else:
                self.sums[name] = sums
        for name, pairs in recording.row_pairs().items():
            self.rows.setdefault(name, []).extend(pairs)

    def complete(self, parts: Sequence[Part], watched: Sequence[Part]) -> None:
        """Gives every part its sums, zeros where there are none, and drops all others.

        So all ranks have the same. The calls of the watched become a tensor. After memory ran out
        the number of terms is minus infinity: no rank will use the sum over ranks, and all know.
        """
        if self.out_of_memory is not None:
            self.sums.clear()
            self.terms = None if self.terms is None else torch.full_like(self.terms, -torch.inf)
        self.watched = [part.name for part in watched]
        assert self.terms is not None
        counts = [float(self.calls.get(name, 0)) for name in self.watched]
        self.watched_calls = torch.tensor(counts, device=self.terms.device)
        self.sums = {part.name: completed(part, self.sums.get(part.name, {})) for part in parts}

    def tensors(self) -> tuple[list[Tensor], list[bool]]:
        """All that is added over ranks, in order, and which of it are symmetric matrices."""
        assert self.terms is not None
        assert self.watched_calls is not None
        pairs = [
            (tensor, is_symmetric(key, tensor))
            for sums in self.sums.values()
            for key, tensor in sorted(sums.items())
        ]
        pairs += [(self.terms, False), (self.watched_calls, False)]
        return [tensor for tensor, _ in pairs], [mark for _, mark in pairs]

    def is_out_of_memory_on_a_rank(self) -> bool:
        """Whether memory ran out on any rank, once the sums have been added up over them."""
        return self.terms is not None and bool(self.terms == -torch.inf)

    def newly_called(self) -> list[str]:
        """Names of the watched that were called, on any rank."""
        assert self.watched_calls is not None
        if not self.watched:
            return []
        calls = self.watched_calls.tolist()
        return [name for name, count in zip(self.watched, calls, strict=True) if count]


def completed(part: Part, sums: Sums) -> Sums:
    """The sums of a part, with zeros for those that it lacks."""
    if not isinstance(part, KroneckerPart):
        return sums or empty_sums(part)
    present = {key.removesuffix("_rows") for key in sums}
    if {"A", "B", "count"} <= present:
        return sums
    missing = {k: v for k, v in empty_sums(part).items() if k not in present}
    return {**sums, **missing}


def is_symmetric(key: str, tensor: Tensor) -> bool:
    """Whether the sum of this key is a batch of symmetric matrices, not diagonals."""
    return (key in ("A", "B") and tensor.dim() == 3) or key == "E_d"
