"""The parts of a model that are in use: follows which layers are called, and what is frozen."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from . import distributed
from .capture import Recording
from .config import KFACConfig
from .partition import Partition, demote_uncalled, partition
from .placements import owners
from .statistics import DiagonalPart, KroneckerPart, Part, UnitwisePart


class ModelParts:
    """Splits a model into parts, and again when something about it has changed.

    Args:
        model: unwrapped.
        config: what counts as a layer, and where inverses are kept.

    Attributes:
        partition: the parts in use.
        uncalled: layers that were not called as modules so far; `partition` has their parameters
            in their place.
        owners: layer name -> the rank that computes its inverse; empty where every rank does.
    """

    partition: Partition
    uncalled: list[KroneckerPart | UnitwisePart]
    owners: dict[str, int]

    def __init__(self, model: nn.Module, config: KFACConfig) -> None:
        self._model, self._config = model, config
        self._parameters = list(model.parameters())
        self._trainable = self._requires_grad()

    def _requires_grad(self) -> list[bool]:
        return [parameter.requires_grad for parameter in self._parameters]

    @property
    def is_outdated(self) -> bool:
        """Whether parameters were frozen or unfrozen since the last `split`."""
        return self._trainable != self._requires_grad()

    def split(self, approx: str, called: Sequence[str] | None) -> None:
        """Assigns the trainable parameters to parts.

        Args:
            approx: "expand" or "reduce".
            called: names of the layers that were called so far; None if that is not known yet.
        """
        self._trainable = self._requires_grad()
        self._layers = self.whole(approx)
        self.partition, self.uncalled = self._layers, []
        if called is not None:
            self.uncalled = [part for part in self.layers() if part.name not in called]
            names = [part.name for part in self.uncalled]
            self.partition = demote_uncalled(self._layers, names, self._config.max_factor_side)
        self.owners = owners(self.partition.parts, self._config.inverse_placement)

    def whole(self, approx: str) -> Partition:
        """The parts as if all layers were called."""
        return partition(
            self._model,
            approx=approx,
            bias=self._config.bias,
            norm_rows=self._config.norm_rows,
            max_factor_side=self._config.max_factor_side,
            exclude=self._config.exclude,
        )

    def is_observed(self, part: Part) -> bool:
        """Whether a part's curvature is of use: Adam asks for that of layers with a basis only."""
        if isinstance(part, DiagonalPart) and part.sparse:
            return False
        return self._config.direction != "eigenbasis_adam" or isinstance(part, KroneckerPart)

    @property
    def observed(self) -> list[Part]:
        """The parts in use whose statistics are collected."""
        return [part for part in self.partition.parts if self.is_observed(part)]

    @property
    def watched(self) -> list[Part]:
        """Layers of which a recording counts the calls only."""
        ignored = [part for part in self.layers() if not self.is_observed(part)]
        return [*self.uncalled, *(part for part in ignored if part not in self.uncalled)]

    def layers(self) -> list[KroneckerPart | UnitwisePart]:
        """All parts that are modules, called or not."""
        parts: Sequence[Part] = self._layers.parts
        return [part for part in parts if isinstance(part, KroneckerPart | UnitwisePart)]

    def called_on_any_rank(self, recording: Recording) -> list[str] | None:
        """Names of the layers that a recorded pass has called, on any rank.

        None if no rank can tell, since memory ran out on all of them.
        """
        names = [part.name for part in self.layers()]
        counts = [recording.calls.get(name, 0) for name in names]
        known = recording.out_of_memory is None
        totals = torch.tensor([*counts, 1] if known else [0] * (len(names) + 1))
        totals = totals.to(self._parameters[0].device)
        distributed.all_reduce_sums([totals])
        *calls, ranks = totals.tolist()
        return [name for name, count in zip(names, calls, strict=True) if count] if ranks else None

    @property
    def names(self) -> list[str]:
        """Names of the parts in use."""
        return [part.name for part in self.partition.parts]
