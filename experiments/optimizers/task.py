"""What a task of the study is: a net, data, a loss and a metric behind one interface.

A task's first parameters and its training batches depend on the seed alone, so that all methods
start from the same point and see the same batches.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from submission.kfac import Categorical, Likelihood
from submission.kfac.operations.sharing import SharingRule

Batch = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Length:
    """Steps of a run, steps between evaluations, and examples per batch."""

    steps: int
    eval_every: int
    batch_size: int


class Task(ABC):
    """What training and K-FAC have to know about a task.

    Attributes:
        name: one of `tasks.NAMES`.
        data: names the data set.
        metric: name of what `evaluate` returns.
        higher_is_better: whether a larger value of it is a better one.
        likelihood: of the loss, for K-FAC.
        has_labels: whether every term of the likelihood has one; else true labels mean the loss's
            own gradients.
        output_layer: name of the last layer, which Muon leaves to Adam.
        length: of a run.
        sizes: of the net and of the validation set.
    """

    name: str
    data: str
    metric: str
    higher_is_better: bool
    likelihood: Likelihood = Categorical()
    has_labels: bool = True
    output_layer: str = "head"
    exact_fisher = True  # whether the ablation tries it: a pass for every output of an example

    def __init__(self, length: Length, device: torch.device, sizes: Mapping[str, int]) -> None:
        self.length, self.device, self.sizes = length, device, dict(sizes)

    @property
    def setting(self) -> dict[str, Any]:
        """All that runs of this task have in common, as plain values."""
        return {"data": self.data, **dataclasses.asdict(self.length), **self.sizes}

    def make_model(self, seed: int) -> nn.Module:
        """The net with its first parameters."""
        torch.manual_seed(seed)
        return self._build_model().to(self.device)

    @abstractmethod
    def _build_model(self) -> nn.Module: ...

    @abstractmethod
    def batches(self, seed: int) -> Iterator[Batch]:
        """Endless training batches with 'inputs', 'targets' and, where labels are missing,
        'weights'."""

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """The mean loss."""
        return F.cross_entropy(logits.flatten(0, -2), batch["targets"].flatten())

    def sharing(self, model: nn.Module, batch: Batch) -> SharingRule:
        """How rows share weights, for K-FAC."""
        del model, batch
        return None

    @abstractmethod
    def evaluate(self, model: nn.Module) -> float:
        """The metric on the validation set; the model is left in training mode."""

    def _outputs(self, model: nn.Module, batches: list[Batch]) -> Tensor:
        model.eval()
        with torch.no_grad():
            logits = torch.cat([model(batch["inputs"]) for batch in batches])
        model.train()
        return logits
