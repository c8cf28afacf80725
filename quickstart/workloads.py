"""The two small workloads: molecules with a GraphNetwork, images with a ViT."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quickstart import images, molecules
from quickstart.base_workload import Batch, QuickstartWorkload
from quickstart.graphs import BatchBudget, GraphBatcher, TrainingQueue
from quickstart.metrics import mean_average_precision
from quickstart.models import GraphNetwork, ViT
from submission.algoperf_compat import spec


class MoleculesWorkload(QuickstartWorkload):
    """Activity of molecules in 30 tasks, AlgoPerf's ogbg at laptop size.

    Args:
        data_dir: folder prepared by `quickstart.molecules`, None for the default one.
        width: width of the GraphNetwork.
        num_message_passing_steps: rounds of the GraphNetwork.

    Raises:
        QuickstartError: if the folder holds no usable molecules.
    """

    default_batch_size = 128
    target_metric_name = "mean_average_precision"
    output_layer = "decoder"

    def __init__(
        self, data_dir: Path | None = None, width: int = 64, num_message_passing_steps: int = 2
    ) -> None:
        super().__init__()
        self.data = molecules.load(data_dir or molecules.DEFAULT_DATA_DIR)
        self.width = width
        self.num_message_passing_steps = num_message_passing_steps

    @property
    def data_checksum(self) -> str:
        """Names the data set."""
        return self.data.checksum

    @property
    def splits(self) -> dict[str, npt.NDArray[np.int64]]:
        """Numbers of the molecules of 'train', 'validation' and 'test'."""
        return self.data.splits

    @property
    def loss_type(self) -> Any:
        """As AlgoPerf's ogbg says it, although the loss is a masked sigmoid cross-entropy."""
        return spec.LossType.SOFTMAX_CROSS_ENTROPY

    @property
    def default_targets(self) -> dict[str, float]:
        """Mean average precision to reach."""
        return {"validation": 0.60, "test": 0.60}

    @property
    def step_hint(self) -> int:
        """Number of steps of the quickstart's study."""
        return 500

    def _build_input_queue(
        self, data_rng: Any, split: str, data_dir: Any, global_batch_size: int
    ) -> TrainingQueue:
        del data_dir
        if split != "train":
            raise ValueError(f"the input queue serves the split 'train', not {split!r}")
        return TrainingQueue(
            self._batcher(global_batch_size),
            self.splits["train"],
            [int(part) for part in data_rng],
        )

    def _build_eval_batches(
        self, members: npt.NDArray[np.int64], batch_size: int
    ) -> Iterator[Batch]:
        return self._batcher(batch_size).one_pass(members)

    def _batcher(self, batch_size: int) -> GraphBatcher:
        graphs = self.data.graphs
        return GraphBatcher(graphs, BatchBudget.from_averages(graphs, batch_size), self.device)

    def _build_model(self) -> nn.Module:
        return GraphNetwork(self.data.graphs.num_tasks, self.width, self.num_message_passing_steps)

    def _per_example_loss(
        self, labels: Tensor, logits: Tensor, mask: Tensor | None, label_smoothing: float
    ) -> Tensor:
        """Masked binary cross-entropy, (graphs, tasks), with AlgoPerf's label smoothing."""
        if mask is None:
            mask = torch.ones_like(labels, dtype=torch.bool)
        if not (labels.shape == logits.shape == mask.shape and logits.ndim == 2):
            raise ValueError(
                f"labels {tuple(labels.shape)}, logits {tuple(logits.shape)} and mask "
                f"{tuple(mask.shape)} must have one two-dimensional shape"
            )
        mask = mask.to(torch.bool)
        # A label that is NaN must not reach the product with the logit: its gradient would be NaN.
        labels = torch.where(mask, labels, 0.0)
        smoothed = (1 - label_smoothing) * labels + label_smoothing / labels.shape[1]
        losses = F.binary_cross_entropy_with_logits(logits, smoothed, reduction="none")
        return torch.where(mask, losses, 0.0)

    def _metrics(self, logits: Tensor, labels: Tensor, weights: Tensor) -> dict[str, float]:
        losses = self._per_example_loss(labels, logits, weights, 0.0)
        correct = (logits > 0) == (labels == 1)
        return {
            "accuracy": float(correct[weights].float().mean()),
            "loss": float(losses.sum() / weights.sum()),
            "mean_average_precision": mean_average_precision(
                logits.cpu().numpy(), labels.cpu().numpy(), weights.cpu().numpy()
            ),
        }


class ImagesWorkload(QuickstartWorkload):
    """Classes of small images, AlgoPerf's imagenet_vit at laptop size.

    Args:
        data_dir: folder with CIFAR-10 (see `quickstart.images.load`), None for the digits.

    Raises:
        QuickstartError: if the folder holds no CIFAR-10.
    """

    default_batch_size = 128
    target_metric_name = "accuracy"
    output_layer = "head"

    def __init__(self, data_dir: Path | None = None) -> None:
        super().__init__()
        self.data = images.load(data_dir)

    @property
    def data_checksum(self) -> str:
        """Names the data set."""
        return self.data.checksum

    @property
    def splits(self) -> dict[str, npt.NDArray[np.int64]]:
        """Numbers of the images of 'train', 'validation' and 'test'."""
        return self.data.splits

    @property
    def loss_type(self) -> Any:
        """Categorical cross-entropy."""
        return spec.LossType.SOFTMAX_CROSS_ENTROPY

    @property
    def default_targets(self) -> dict[str, float]:
        """Accuracy to reach."""
        value = 0.95 if self.data.name == "digits" else 0.60
        return {"validation": value, "test": value}

    @property
    def step_hint(self) -> int:
        """Number of steps for schedules."""
        return 300 if self.data.name == "digits" else 3000

    def _build_input_queue(
        self, data_rng: Any, split: str, data_dir: Any, global_batch_size: int
    ) -> images.ImageQueue:
        del data_dir
        if split != "train":
            raise ValueError(f"the input queue serves the split 'train', not {split!r}")
        seed = [int(part) for part in data_rng]
        return images.ImageQueue(self.data, global_batch_size, seed, self.device)

    def _build_eval_batches(
        self, members: npt.NDArray[np.int64], batch_size: int
    ) -> Iterator[Batch]:
        for start in range(0, len(members), batch_size):
            chosen = members[start : start + batch_size]
            batch = images.image_batch(
                self.data.images[chosen], self.data.classes[chosen], self.device
            )
            yield {**batch, "weights": torch.ones(len(chosen), device=self.device)}

    def _build_model(self) -> nn.Module:
        patch_size = 2 if self.data.name == "digits" else 4
        return ViT(10, self.data.images.shape[1], patch_size)

    def _per_example_loss(
        self, labels: Tensor, logits: Tensor, mask: Tensor | None, label_smoothing: float
    ) -> Tensor:
        """Cross-entropy, (images,)."""
        losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)
        return losses if mask is None else losses * mask

    def _metrics(self, logits: Tensor, labels: Tensor, weights: Tensor) -> dict[str, float]:
        losses = self._per_example_loss(labels, logits, weights, 0.0)
        correct = (logits.argmax(dim=1) == labels) * weights
        total = weights.sum()
        return {"accuracy": float(correct.sum() / total), "loss": float(losses.sum() / total)}


WORKLOADS: dict[str, type[MoleculesWorkload] | type[ImagesWorkload]] = {
    "molecules": MoleculesWorkload,
    "images": ImagesWorkload,
}
"""The workloads by the name that `--workload` takes."""


def build_workload(name: str, data_dir: Path | None) -> QuickstartWorkload:
    """The workload called `name`, on the data in `data_dir` (None: its default data)."""
    return WORKLOADS[name](data_dir)


__all__ = ["WORKLOADS", "ImagesWorkload", "MoleculesWorkload", "build_workload"]
