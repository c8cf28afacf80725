"""An average of late parameters, for evaluations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class TailAverage:
    """An average of the parameters and running statistics of the last part of the steps so far.

    After step t, with weight w = min(1, 1 / (share · t)): average ← (1 - w) average + w θ, which is
    polynomial-decay averaging (Shamir & Zhang 2013): it forgets the beginning at the pace of the
    run, whatever the run's length. For an evaluation average and parameters change places.

    Args:
        model: whose parameters and floating-point buffers are averaged.
        share: of the steps so far, above 0, at most 1.
    """

    def __init__(self, model: nn.Module, share: float) -> None:
        self._share = share
        self._kept = [tensor.detach().clone() for tensor in _tensors(model)]
        self._is_in_model = False

    @torch.no_grad()
    def take_in(self, model: nn.Module, steps: int) -> None:
        """Takes in the parameters after so many steps."""
        weight = min(1.0, 1.0 / (self._share * steps))
        torch._foreach_lerp_(self._kept, _tensors(model), weight)

    def put_in(self, model: nn.Module) -> None:
        """The model gets the average, to be evaluated."""
        if not self._is_in_model:
            self._swap(model)

    def take_out(self, model: nn.Module) -> None:
        """The model gets back the parameters in training, bit for bit."""
        if self._is_in_model:
            self._swap(model)

    @torch.no_grad()
    def _swap(self, model: nn.Module) -> None:
        for tensor, kept in zip(_tensors(model), self._kept, strict=True):
            in_model = tensor.detach().clone()
            tensor.copy_(kept)
            kept.copy_(in_model)
        self._is_in_model = not self._is_in_model

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs; a checkpoint is written while the average is in the model."""
        return {"kept": self._kept, "is_in_model": self._is_in_model}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores it."""
        for own, saved in zip(self._kept, state["kept"], strict=True):
            own.copy_(saved)
        self._is_in_model = bool(state["is_in_model"])


def _tensors(model: nn.Module) -> list[Tensor]:
    found: list[Tensor] = [p.detach() for p in model.parameters()]
    return found + [b.detach() for b in model.buffers() if b.is_floating_point()]
