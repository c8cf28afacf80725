"""The optimizers of the study and the points that each is tuned with.

Ours, Nesterov and NAdamW are described by tuning points of the submission. SOAP, Muon, Shampoo and
schedule-free AdamW come unmodified from the package `pytorch_optimizer`, KL-SOAP from `heavyball`;
their points are arguments of those classes. Every method has eight points. SOAP, KL-SOAP and Adam
in the eigenbasis of K-FAC's factors, which are close relatives, have the same learning rates.

Fixed for all: a linear warm-up over 5 % of the steps, then, but for the schedule-free, a linear
decay to zero; no weight decay.
Whatever is renewed at intervals (factors, inverses, bases, roots) is renewed every 10 steps.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from experiments.optimizers.task import Task
from quickstart.errors import QuickstartError
from submission.hyperparameters import Hyperparameters
from submission.kfac import Preconditioner
from submission.optimizers import UPDATE_RULES

Point = Mapping[str, Any]
INTERVAL = 10
WARMUP_FRACTION = 0.05
POINTS = 8
MISSING = (
    "SOAP, KL-SOAP, Muon, Shampoo and schedule-free AdamW come from the packages pytorch_optimizer "
    "and heavyball, which are not there: run ./run.sh experiments optimizers, which installs them"
)


@dataclass
class Stepper:
    """What changes the parameters of a model: an optimizer, and K-FAC in front of it or not.

    A schedule-free optimizer has no decay of its learning rate, and other parameters for
    evaluations than for training.
    """

    optimizer: Optimizer
    kfac: Preconditioner | None = None
    is_schedule_free: bool = False
    _peaks: list[float] = field(init=False)

    def __post_init__(self) -> None:
        self._peaks = [group["lr"] for group in self.optimizer.param_groups]

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Inside, the model has the parameters that evaluations are made with."""
        if self.is_schedule_free:
            self.optimizer.eval()  # type: ignore[attr-defined]
        yield
        if self.is_schedule_free:
            self.optimizer.train()  # type: ignore[attr-defined]

    def scale_learning_rates(self, factor: float) -> None:
        """Sets every group's learning rate to its peak times the schedule's factor."""
        for group, peak in zip(self.optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = factor * peak


@dataclass(frozen=True)
class Method:
    """An optimizer and its points; `build(model, task, point, seed)` makes it."""

    name: str
    label: str
    source: str
    points: tuple[Point, ...]
    build: Callable[[nn.Module, Task, Point, int], Stepper]

    def __post_init__(self) -> None:
        distinct = {point_key(point) for point in self.points}
        if len(distinct) != POINTS or len(self.points) != POINTS:
            raise ValueError(f"{self.name} has {len(distinct)} distinct points, not {POINTS}")


def point_key(point: Point) -> str:
    """The same text for the same point."""
    return json.dumps(dict(point), sort_keys=True)


def build_submission(model: nn.Module, task: Task, point: Point, seed: int) -> Stepper:
    """K-FAC and its update rule, or the rule alone, from a tuning point of the submission."""
    del task
    settings = Hyperparameters.from_tuning_point(point)
    optimizer = UPDATE_RULES[settings.update_rule](model.parameters(), settings)
    config = settings.kfac_config(seed)
    return Stepper(optimizer, None if config is None else Preconditioner(model, config))


def build_soap(model: nn.Module, task: Task, point: Point, seed: int) -> Stepper:
    """SOAP on all parameters."""
    del task, seed
    return Stepper(_package().SOAP(model.parameters(), weight_decay=0.0, **point))


def build_schedule_free(model: nn.Module, task: Task, point: Point, seed: int) -> Stepper:
    """Schedule-free AdamW (Defazio et al. 2024) on all parameters."""
    del task, seed
    optimizer = _package().ScheduleFreeAdamW(model.parameters(), weight_decay=0.0, **point)
    return Stepper(optimizer, is_schedule_free=True)


def build_kl_soap(model: nn.Module, task: Task, point: Point, seed: int) -> Stepper:
    """KL-SOAP (Lin et al. 2025) on all parameters, not compiled."""
    del task, seed
    try:
        import heavyball
        import heavyball.utils
    except ImportError as error:
        raise QuickstartError(f"{MISSING} ({error})") from error
    heavyball.utils.compile_mode = None
    optimizer = heavyball.KLSOAP(list(model.parameters()), weight_decay=0.0, **point)
    return Stepper(optimizer)


def build_muon(model: nn.Module, task: Task, point: Point, seed: int) -> Stepper:
    """Muon on matrices between the first and the last layer's; AdamW on all else, as its authors
    advise."""
    del seed
    muon, adam = split_for_muon(model, task.output_layer)
    groups: list[dict[str, Any]] = [
        {"params": muon, "use_muon": True, "lr": point["lr"], "momentum": point["momentum"]},
        {"params": adam, "use_muon": False, "lr": point["adamw_lr"], "betas": (0.9, 0.99)},
    ]
    return Stepper(_package().Muon(groups))


def split_for_muon(model: nn.Module, output_layer: str) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters for Muon, and the others: vectors, embeddings and the output layer."""
    outside = {
        id(p)
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) or name == output_layer
        for p in module.parameters()
    }
    muon: list[Tensor] = []
    adam: list[Tensor] = []
    for p in model.parameters():
        (muon if p.dim() >= 2 and id(p) not in outside else adam).append(p)
    return muon, adam


def build_shampoo(model: nn.Module, task: Task, point: Point, seed: int) -> Stepper:
    """Shampoo (2018), or the later one with grafting (`ScalableShampoo`)."""
    del task, seed
    package, arguments = _package(), dict(point)
    if arguments.pop("variant") == "plain":
        return Stepper(
            package.Shampoo(model.parameters(), preconditioning_compute_steps=INTERVAL, **arguments)
        )
    return Stepper(
        package.ScalableShampoo(
            model.parameters(),
            betas=(0.9, 0.99),
            start_preconditioning_step=INTERVAL,
            preconditioning_compute_steps=INTERVAL,
            graft_type=_grafting().RMSPROP,
            moving_average_for_momentum=True,
            **arguments,
        )
    )


def _grafting() -> Any:
    from pytorch_optimizer.optimizer.utils.graft import LayerWiseGrafting

    return LayerWiseGrafting


def _package() -> Any:
    try:
        import pytorch_optimizer
    except ImportError as error:
        raise QuickstartError(f"{MISSING} ({error})") from error
    return pytorch_optimizer


def _grid(fixed: Point, first: tuple[str, list[Any]], second: tuple[str, list[Any]]) -> Any:
    return tuple(
        {**fixed, first[0]: a, second[0]: b} for a in first[1] for b in second[1]
    )  # fmt: skip


def kfac_point(approx: str, rule: str, **others: Any) -> dict[str, Any]:
    """A tuning point of the submission with the study's intervals."""
    return {
        "kfac_approx": approx,
        "update_rule": rule,
        "beta2": 0.99,
        "factor_update_steps": INTERVAL,
        "inverse_update_steps": INTERVAL,
        **others,
    }


def _kfac(name: str, label: str, point: Point, rates: list[float], second: Any) -> Method:
    points = _grid(point, ("learning_rate", rates), second)
    return Method(name, label, "submission", points, build_submission)


_PLAIN = {"kfac_approx": "none"}
_RATES = [3e-3, 1e-2, 2e-2, 4e-2]
_BETAS = ("beta2", [0.95, 0.99])
_DAMPINGS = ("damping", [1e-4, 1e-3])

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            "nesterov", "Nesterov", "submission",
            _grid({**_PLAIN, "update_rule": "nesterov"},
                  ("learning_rate", [0.03, 0.1, 0.3, 1.0]), ("beta1", [0.9, 0.97])),
            build_submission,
        ),
        Method(
            "nadamw", "NAdamW", "submission",
            _grid({**_PLAIN, "update_rule": "nadamw"},
                  ("learning_rate", [1e-3, 3e-3, 1e-2, 3e-2]), ("beta2", [0.99, 0.999])),
            build_submission,
        ),
        Method(
            "schedule_free", "Schedule-free AdamW", "pytorch_optimizer",
            _grid({}, ("lr", [3e-3, 1e-2, 3e-2, 1e-1]), ("betas", [[0.9, 0.99], [0.95, 0.99]])),
            build_schedule_free,
        ),
        Method(
            "soap", "SOAP", "pytorch_optimizer",
            _grid({"precondition_frequency": INTERVAL},
                  ("lr", [3e-3, 1e-2, 2e-2, 4e-2]), ("betas", [[0.9, 0.99], [0.95, 0.95]])),
            build_soap,
        ),
        Method(
            "kl_soap", "KL-SOAP", "heavyball",
            _grid({"precondition_frequency": INTERVAL},
                  ("lr", [3e-3, 1e-2, 2e-2, 4e-2]), ("betas", [[0.9, 0.99], [0.95, 0.95]])),
            build_kl_soap,
        ),
        Method(
            "muon", "Muon", "pytorch_optimizer",
            _grid({"momentum": 0.95},
                  ("lr", [3e-3, 1e-2, 3e-2, 1e-1]), ("adamw_lr", [3e-3, 1e-2])),
            build_muon,
        ),
        Method(
            "shampoo", "Shampoo", "pytorch_optimizer",
            (*({"variant": "plain", "momentum": 0.9, "lr": lr} for lr in (0.01, 0.03, 0.1)),
             *({"variant": "grafting", "lr": lr} for lr in (1e-3, 3e-3, 1e-2, 3e-2, 0.1))),
            build_shampoo,
        ),
        _kfac("kfac_expand_nesterov", "K-FAC-expand, Nesterov",
              kfac_point("expand", "nesterov"), [3e-3, 1e-2, 3e-2, 1e-1],
              ("damping", [1e-3, 1e-2])),
        _kfac("kfac_reduce_nesterov", "K-FAC-reduce, Nesterov",
              kfac_point("reduce", "nesterov"), [3e-3, 1e-2, 3e-2, 1e-1],
              ("damping", [1e-3, 1e-2])),
        _kfac("kfac_expand_nadamw", "K-FAC-expand, NAdamW",
              kfac_point("expand", "nadamw"), [1e-3, 3e-3, 1e-2, 3e-2], _DAMPINGS),
        _kfac("kfac_reduce_nadamw", "K-FAC-reduce, NAdamW",
              kfac_point("reduce", "nadamw"), [1e-3, 3e-3, 1e-2, 3e-2], _DAMPINGS),
        _kfac("kfac_expand_eigenbasis", "K-FAC-expand, Adam in the eigenbasis",
              kfac_point("expand", "eigenbasis_adam", factor_decay=0.9), _RATES, _BETAS),
        _kfac("kfac_reduce_eigenbasis", "K-FAC-reduce, Adam in the eigenbasis",
              kfac_point("reduce", "eigenbasis_adam", factor_decay=0.9), _RATES, _BETAS),
        _kfac("kfac_reduce_eigenbasis_empirical",
              "K-FAC-reduce, Adam in the eigenbasis, true labels",
              kfac_point("reduce", "eigenbasis_adam", factor_decay=0.9, fisher_type="empirical"),
              _RATES, _BETAS),
        _kfac("kfac_reduce_polar", "K-FAC-reduce, polar factor",
              kfac_point("reduce", "eigenbasis_polar", factor_decay=0.9, fisher_type="empirical"),
              _RATES, _BETAS),
    )
}  # fmt: skip


def find(name: str) -> Method:
    """The method of that name.

    Raises:
        QuickstartError: there is none.
    """
    if name not in METHODS:
        raise QuickstartError(f"no method {name!r}; there are: {', '.join(METHODS)}")
    return METHODS[name]
