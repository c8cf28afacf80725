"""The interface that an AlgoPerf submission sees, for the small workloads.

Deviations from AlgoPerf, on purpose: an evaluation covers every example of a split exactly once,
and it happens at fixed steps (see `quickstart.runner`).
"""

import abc
import contextlib
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from quickstart.parameter_types import ShapeTuple, parameter_shapes, parameter_types
from submission.algoperf_compat import spec

Batch = dict[str, Any]


def choose_device() -> torch.device:
    """The first GPU if there is one, else the CPU."""
    return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")


class QuickstartWorkload(abc.ABC):
    """What both workloads share.

    Attributes:
        metrics_logger: where a submission may log scalars, None outside a run.
        recent_loss: summed loss and number of valid examples of the latest training call of
            `loss_fn`; for display only, kept as tensors so that reading costs the clock nothing.
    """

    default_batch_size: ClassVar[int]
    target_metric_name: ClassVar[str]
    output_layer: ClassVar[str]
    max_allowed_runtime_sec: ClassVar[int] = 24 * 3600
    eval_period_steps: ClassVar[int] = 25

    def __init__(self) -> None:
        self.device = choose_device()
        self.metrics_logger: Any = None
        self.recent_loss: tuple[Tensor, Any] | None = None
        self._targets: dict[str, float] = {}
        self._shapes: dict[str, ShapeTuple] | None = None
        self._types: dict[str, Any] | None = None
        self._eval_batches: dict[tuple[str, int], list[Batch]] = {}

    # What differs between the workloads.

    @property
    @abc.abstractmethod
    def data_checksum(self) -> str:
        """Names the data set."""

    @property
    @abc.abstractmethod
    def splits(self) -> dict[str, npt.NDArray[np.int64]]:
        """Numbers of the examples of 'train', 'validation' and 'test'."""

    @property
    @abc.abstractmethod
    def loss_type(self) -> Any:
        """The type of loss function."""

    @property
    @abc.abstractmethod
    def default_targets(self) -> dict[str, float]:
        """Metric values to reach on 'validation' and 'test'."""

    @property
    @abc.abstractmethod
    def step_hint(self) -> int:
        """Number of steps that a tuned reference needs, for schedules."""

    @abc.abstractmethod
    def _build_input_queue(
        self, data_rng: Any, split: str, data_dir: Any, global_batch_size: int
    ) -> Any:
        """Endless iterator of training batches with `position` and `skip_to(position)`."""

    @abc.abstractmethod
    def _build_eval_batches(
        self, members: npt.NDArray[np.int64], batch_size: int
    ) -> Iterator[Batch]:
        """Batches that hold each of `members` once."""

    @abc.abstractmethod
    def _build_model(self) -> nn.Module:
        """The model with its initial parameters, drawn from torch's global generator."""

    @abc.abstractmethod
    def _per_example_loss(
        self, labels: Tensor, logits: Tensor, mask: Tensor | None, label_smoothing: float
    ) -> Tensor:
        """Losses, 0 where masked."""

    @abc.abstractmethod
    def _metrics(self, logits: Tensor, labels: Tensor, weights: Tensor) -> dict[str, float]:
        """Metrics of a whole split."""

    # AlgoPerf's interface.

    @property
    def num_train_examples(self) -> int:
        """Size of the training set."""
        return len(self.splits["train"])

    @property
    def num_eval_train_examples(self) -> int:
        """Number of training examples that metrics are evaluated on."""
        return min(1024, self.num_train_examples)

    @property
    def num_validation_examples(self) -> int:
        """Size of the validation set."""
        return len(self.splits["validation"])

    @property
    def num_test_examples(self) -> int:
        """Size of the test set."""
        return len(self.splits["test"])

    @property
    def eval_batch_size(self) -> int:
        """Batch size of an evaluation; small batches stay in a CPU's cache."""
        return 128

    @property
    def eval_period_time_sec(self) -> int:
        """Not used: evaluations come every `eval_period_steps` steps."""
        return 0

    @property
    def validation_target_value(self) -> float:
        """Value of the metric to reach on the validation set."""
        return self._targets.get("validation", self.default_targets["validation"])

    @property
    def test_target_value(self) -> float:
        """Value of the metric to reach on the test set."""
        return self._targets.get("test", self.default_targets["test"])

    def set_targets(self, validation: float | None, test: float | None) -> None:
        """Replaces target values; None keeps the workload's own."""
        given = {"validation": validation, "test": test}
        self._targets = {split: value for split, value in given.items() if value is not None}

    def has_reached_validation_target(self, eval_result: dict[str, float]) -> bool:
        """Whether an evaluation is above the validation target."""
        return eval_result[f"validation/{self.target_metric_name}"] > self.validation_target_value

    def has_reached_test_target(self, eval_result: dict[str, float]) -> bool:
        """Whether an evaluation is above the test target."""
        return eval_result[f"test/{self.target_metric_name}"] > self.test_target_value

    @property
    def param_shapes(self) -> dict[str, ShapeTuple]:
        """Shape of each parameter, once the model is built."""
        if self._shapes is None:
            raise ValueError("call init_model_fn() before reading param_shapes")
        return self._shapes

    @property
    def model_params_types(self) -> dict[str, Any]:
        """Type of each parameter, once the model is built."""
        if self._types is None:
            raise ValueError("call init_model_fn() before reading model_params_types")
        return self._types

    def is_output_params(self, param_key: str) -> bool:
        """Whether a parameter belongs to the output layer."""
        return param_key in (f"{self.output_layer}.weight", f"{self.output_layer}.bias")

    def attach_metrics_logger(self, metrics_logger: Any) -> None:
        """Sets the logger that submissions may use."""
        self.metrics_logger = metrics_logger

    def init_model_fn(self, rng: Any) -> tuple[nn.Module, None]:
        """The initial model and its (empty) auxiliary state."""
        torch.manual_seed(int(rng[0]))
        model = self._build_model()
        self._shapes = parameter_shapes(model)
        self._types = parameter_types(model)
        return model.to(self.device), None

    def model_fn(
        self,
        params: nn.Module,
        augmented_and_preprocessed_input_batch: Batch,
        model_state: Any,
        mode: Any,
        rng: Any,
        update_batch_norm: bool,
        dropout_rate: float | None = None,
    ) -> tuple[Tensor, None]:
        """Logits of a batch, and the (empty) auxiliary state."""
        del rng, update_batch_norm  # Neither model draws from `rng` or has batch norm.
        if model_state is not None:
            raise ValueError(f"model_state must be None, it is {type(model_state).__name__}")
        training = mode == spec.ForwardPassMode.TRAIN
        params.train(training)
        given = {} if dropout_rate is None else {"dropout_rate": dropout_rate}
        with contextlib.nullcontext() if training else torch.no_grad():
            logits = params(augmented_and_preprocessed_input_batch["inputs"], **given)
        return logits, None

    def loss_fn(
        self,
        label_batch: Tensor,
        logits_batch: Tensor,
        mask_batch: Tensor | None = None,
        label_smoothing: float = 0.0,
    ) -> dict[str, Tensor]:
        """Summed loss, number of valid examples (of valid labels where the mask is per label)."""
        losses = self._per_example_loss(label_batch, logits_batch, mask_batch, label_smoothing)
        count: Any = len(losses) if mask_batch is None else mask_batch.sum()
        summed = losses.sum()
        if logits_batch.requires_grad:
            self.recent_loss = (summed.detach(), count)
        return {
            "summed": summed,
            "n_valid_examples": torch.as_tensor(count, device=self.device),
            "per_example": losses,
        }

    def eval_model(
        self,
        global_batch_size: int,
        params: nn.Module,
        model_state: Any,
        rng: Any,
        data_dir: Any,
        imagenet_v2_data_dir: Any,
        global_step: int,
    ) -> dict[str, float]:
        """Metrics on 1,024 training examples, on the validation and on the test set."""
        del data_dir, imagenet_v2_data_dir, global_step
        result: dict[str, float] = {}
        for name, split in (("train", "eval_train"), ("validation",) * 2, ("test",) * 2):
            metrics = self._eval_split(split, global_batch_size, params, model_state, rng)
            result.update({f"{name}/{metric}": value for metric, value in metrics.items()})
        result["validation/num_examples"] = self.num_validation_examples
        result["test/num_examples"] = self.num_test_examples
        return result

    def _eval_split(
        self, split: str, batch_size: int, params: nn.Module, model_state: Any, rng: Any
    ) -> dict[str, float]:
        if (split, batch_size) not in self._eval_batches:
            if split == "eval_train":
                # The same examples in all runs, whatever their seed.
                shuffled = np.random.default_rng(0).permutation(self.splits["train"])
                members = shuffled[: self.num_eval_train_examples]
            else:
                members = self.splits[split]
            batches = list(self._build_eval_batches(members, batch_size))
            self._eval_batches[split, batch_size] = batches
        batches = self._eval_batches[split, batch_size]
        mode = spec.ForwardPassMode.EVAL
        logits = [
            self.model_fn(params, batch, model_state, mode, rng, update_batch_norm=False)[0]
            for batch in batches
        ]
        return self._metrics(
            torch.cat(logits),
            torch.cat([batch["targets"] for batch in batches]),
            torch.cat([batch["weights"] for batch in batches]),
        )
