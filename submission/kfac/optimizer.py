"""KFAC as a `torch.optim.Optimizer`: an ordinary training loop with three changed lines.

optimizer = KFAC(model, lr=1e-2)
with optimizer.record():
    loss = F.cross_entropy(model(x), y)
loss.backward(); optimizer.step(); optimizer.zero_grad()
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .blocks.public import Curvature
from .config import KFACConfig
from .operations.sharing import SharingRule
from .preconditioner import Preconditioner
from .report import ReportRow

# The best single setting of the study of optimizers (docs/optimizers.md). The first
# eigendecomposition of side 2,304 takes seconds on a CPU, of 4,608 half a minute: larger sides keep
# their diagonal.
DEFAULTS: dict[str, Any] = {
    "kfac_approx": "reduce",
    "fisher_type": "empirical",
    "factor_decay": 0.9,
    "factor_update_steps": 10,
    "inverse_update_steps": 10,
    "renewal": "in_turns",
    "direction": "eigenbasis_polar",
    "damping_kind": "exact",
    "betas": (0.9, 0.95),
    "max_factor_side": 2048,
}
WITH_BASE: dict[str, Any] = {**DEFAULTS, "direction": "preconditioned", "damping_kind": "pi"}
BaseRule = Callable[[list[dict[str, Any]]], Optimizer]


class KFAC(Optimizer):
    """K-FAC for any model.

    By default the polar factor of Adam's update in the eigenbasis of K-FAC-reduce's factors: its
    steps are as large as Adam's at the same learning rate. With `base` the paper's method: the
    gradient is preconditioned by (curvature + damping)⁻¹, and another optimizer steps along it.

    Args:
        model: a module, or (name, parameter) pairs; wrappers of DDP and torch.compile are looked
            through. Parameters that need no gradient are left out.
        lr: learning rate (default: 1e-3); not with `base`, which has its own.
        weight_decay: decoupled (AdamW's); not with `base`, which has its own.
        base: makes the optimizer that steps along the preconditioned gradient, from parameter
            groups: `lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9)`.
        groups: parameter groups, as other optimizers take them, with settings of their own (lr,
            weight_decay); they must have all trainable parameters. None for one group of all.
        **settings: of `KFACConfig`; those of DEFAULTS (with `base`, WITH_BASE) are other than
            there.

    Raises:
        ValueError: a setting that is not one, out of its range, or without effect on this rule.
    """

    _checked: Mapping[str, Tensor] | None = None  # the parameters that the groups have

    def __init__(
        self,
        model: nn.Module | Iterable[tuple[str, nn.Parameter]],
        lr: float | None = None,
        *,
        weight_decay: float = 0.0,
        base: BaseRule | None = None,
        groups: Iterable[dict[str, Any]] | None = None,
        **settings: Any,
    ) -> None:
        for name, value in (("lr", lr), ("weight_decay", weight_decay or None)):
            if value is not None and not value >= 0:
                raise ValueError(f"{name} must be at least 0, not {value}")
            if base is not None and value is not None:
                raise ValueError(f"{name} belongs to the base optimizer: give it there")
        self.preconditioner = Preconditioner(_as_module(model), _config(base, settings))
        everything = [{"params": list(self.preconditioner.parameters.values())}]
        given = everything if groups is None else list(groups)
        if base is not None and not callable(base):
            raise ValueError(
                "base makes an optimizer from parameter groups, as `lambda groups: "
                f"torch.optim.SGD(groups, lr=0.1)` does; it is no {type(base).__name__}"
            )
        self.base = None if base is None else base(given)
        if self.base is None:
            super().__init__(
                given, {"lr": 1e-3 if lr is None else lr, "weight_decay": weight_decay}
            )
        else:
            super().__init__(self.base.param_groups, self.base.defaults)
            self.base.param_groups = self.param_groups
        self._check_groups()
        self._check_known(self.param_groups)

    def _check_known(self, groups: Iterable[dict[str, Any]]) -> None:
        """Whether what the groups train is the model's."""
        known = {id(p) for p in self.preconditioner.parameters.values()}
        trained = [p for group in groups for p in group["params"] if p.requires_grad]
        if any(id(p) not in known for p in trained):
            raise ValueError("a parameter group has a parameter that is not one of the model's")

    def _check_groups(self) -> None:
        """Whether the groups have all trainable parameters of the model."""
        self._checked = self.preconditioner.parameters
        given = {id(p) for group in self.param_groups for p in group["params"]}
        missing = [name for name, p in self._checked.items() if id(p) not in given]
        if missing:
            raise ValueError(
                f"no parameter group has {missing[:5]}; give every parameter one, by `groups`, or "
                "by add_param_group where it was added, replaced or unfrozen later"
            )

    # ---- one step -----------------------------------------------------------------------------

    def record(self, sharing: SharingRule = None) -> AbstractContextManager[None]:
        """Put the forward pass and the loss inside. See `Preconditioner.record`."""
        return self.preconditioner.record(sharing)

    def update(self, logits: Tensor, likelihood: Any, **keywords: Any) -> None:
        """States a loss that is not one of torch's. See `Preconditioner.update`."""
        self.preconditioner.update(logits, likelihood, **keywords)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step along the update.

        After it `.grad` holds what was stepped along, not the gradient.

        Args:
            closure: records a forward pass and runs the backward pass, and returns the loss.

        Raises:
            RuntimeError, KFACError: see `Preconditioner.precondition`.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.preconditioner.parameters is not self._checked:
            self._check_groups()
        if self.base is not None:
            self.preconditioner.precondition()
            self.base.step()
            return loss
        self._step()
        return loss

    @torch.no_grad()
    def _step(self) -> None:
        self.preconditioner.precondition()
        for group in self.param_groups:
            mine = [p for p in group["params"] if p.grad is not None]
            if not mine:
                continue
            if group["weight_decay"]:
                torch._foreach_mul_(mine, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(mine, [p.grad for p in mine], alpha=-float(group["lr"]))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters of the model that it got, or that need gradients, since.

        Raises:
            ValueError: one of them is not the model's; nothing is added then.
        """
        super().add_param_group(param_group)
        if self._checked is not None:  # not while the base class is made
            self.preconditioner.follow_parameters()
            try:
                self._check_known(self.param_groups[-1:])
            except ValueError:
                self.param_groups.pop()
                raise

    # ---- state --------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which need the model beside it in one call, as for any other."""
        return {**super().__getstate__(), "preconditioner": self.preconditioner, "base": self.base}

    def state_dict(self) -> dict[str, Any]:
        """As other optimizers', with K-FAC's state as "kfac" and the base's as "base"."""
        base = {} if self.base is None else {"base": self.base.state_dict()}
        return {**super().state_dict(), "kfac": self.preconditioner.state_dict(), **base}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores a state.

        Raises:
            ValueError: it belongs to another model, version or kind of optimizer.
        """
        if ("base" in state_dict) != (self.base is not None):
            raise ValueError("the state is of a KFAC with another update rule: `base` differs")
        if "kfac" not in state_dict:
            raise ValueError("the state is not of KFAC: it has no entry 'kfac'")
        self.preconditioner.load_state_dict(state_dict["kfac"])
        super().load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
        if self.base is not None:
            self.base.load_state_dict(state_dict["base"])
            self.base.param_groups = self.param_groups

    # ---- what it holds --------------------------------------------------------------------------

    def curvature(self) -> dict[str, Curvature]:
        """Name of a block -> its curvature. See `Preconditioner.curvature`."""
        return self.preconditioner.curvature()

    def report(self) -> list[ReportRow]:
        """What trains every parameter."""
        return self.preconditioner.report()

    def describe(self) -> str:
        """The report as a text table."""
        return self.preconditioner.describe()


def _config(base: BaseRule | None, settings: Mapping[str, Any]) -> KFACConfig:
    try:
        config = KFACConfig(**{**(DEFAULTS if base is None else WITH_BASE), **settings})
    except TypeError as error:
        known = ", ".join(KFACConfig.__dataclass_fields__)
        raise ValueError(f"{error}; the settings are {known}") from None
    for name in config.rule.ignores:
        if name in settings:
            raise ValueError(
                f"{name} has no part in direction {config.direction!r}, the rule of KFAC "
                f"{'with' if base is not None else 'without'} `base`: leave it out, or choose "
                "another `direction`"
            )
    return config


def _as_module(model: nn.Module | Iterable[tuple[str, nn.Parameter]]) -> nn.Module:
    if isinstance(model, nn.Module):
        return model
    root = nn.Module()
    for entry in model:
        if not (isinstance(entry, tuple) and len(entry) == 2):
            raise ValueError(
                "KFAC takes the model, or (name, parameter) pairs as model.named_parameters() "
                "gives them: the names say which block a parameter belongs to"
            )
        name, parameter = entry
        *path, last = name.split(".")
        holder = root
        for step in path:
            if step not in holder._modules:
                holder.add_module(step, nn.Module())
            holder = holder.get_submodule(step)
        holder.register_parameter(last, parameter)
    return root
