"""Update rules that consume the (preconditioned) gradient.

| rule | source |
|---|---|
| `nesterov` | SGD with Nesterov momentum, as AlgoPerf's ogbg reference (Sutskever et al. 2013) |
| `eigenbasis_adam` | Adam in the eigenbasis of K-FAC's factors, see `kfac.linalg.eigenbasis` |
| `eigenbasis_polar` | its polar factor, see `kfac.updates.directions` |
| `nadamw` | Adam with Nesterov momentum and decoupled weight decay, as AlgoPerf's ViT reference |
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from .kfac.updates.directions import RULES


class NAdamW(Optimizer):
    """Adam whose first moment looks one step ahead, with decoupled weight decay.

    m ← β₁ m + (1 - β₁) g,  v ← β₂ v + (1 - β₂) g²,
    θ ← (1 - lr·wd) θ - lr · [β₁ m + (1 - β₁) g] / (1 - β₁ᵗ) / (√(v / (1 - β₂ᵗ)) + ε).

    This is the NAdamW of AlgoPerf's references (not torch.optim.NAdam, whose momentum follows a
    schedule). All arithmetic is `torch._foreach`.

    Args:
        parameters: what is trained.
        lr, betas, eps, weight_decay: as in the formula.
    """

    def __init__(
        self,
        parameters: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(
            parameters, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update. `closure` is not supported.

        Raises:
            ValueError: a closure is given.
        """
        if closure is not None:
            raise ValueError("NAdamW takes no closure")
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            for parameter in parameters:
                state = self.state[parameter]
                if not state:
                    state["step"] = 0
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
                state["step"] += 1
            # Parameters that got their first gradient later have other bias corrections.
            for step in sorted({self.state[p]["step"] for p in parameters}):
                same = [p for p in parameters if self.state[p]["step"] == step]
                self._update(same, step, group)

    def _update(self, parameters: list[Tensor], step: int, group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        grads = _as_real([p.grad for p in parameters if p.grad is not None])
        first = _as_real([self.state[p]["exp_avg"] for p in parameters])
        second = _as_real([self.state[p]["exp_avg_sq"] for p in parameters])
        parameters = _as_real(parameters)
        if group["weight_decay"]:
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_lerp_(first, grads, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, grads, grads, 1 - beta2)
        ahead = torch._foreach_lerp(first, grads, 1 - beta1)
        denominator = torch._foreach_sqrt(second)
        torch._foreach_div_(denominator, (1 - beta2**step) ** 0.5)
        torch._foreach_add_(denominator, group["eps"])
        torch._foreach_addcdiv_(parameters, ahead, denominator, -group["lr"] / (1 - beta1**step))


def _as_real(tensors: list[Tensor]) -> list[Tensor]:
    """Complex tensors as pairs of real numbers, each with a moment of its own; views."""
    return [torch.view_as_real(t) if t.is_complex() else t for t in tensors]


def _nesterov(parameters: Iterable[Tensor], hyperparameters: Any) -> Optimizer:
    return SGD(
        parameters,
        lr=hyperparameters.learning_rate,
        momentum=hyperparameters.beta1,
        weight_decay=hyperparameters.weight_decay,
        nesterov=hyperparameters.beta1 > 0,
        foreach=True,
    )


def _nadamw(parameters: Iterable[Tensor], hyperparameters: Any) -> Optimizer:
    return NAdamW(
        parameters,
        lr=hyperparameters.learning_rate,
        betas=(hyperparameters.beta1, hyperparameters.beta2),
        eps=hyperparameters.epsilon,
        weight_decay=hyperparameters.weight_decay,
    )


def _plain(parameters: Iterable[Tensor], hyperparameters: Any) -> Optimizer:
    # Without momentum, SGD's decay of the weights is the decoupled one: θ - lr (grad + wd θ).
    return SGD(
        parameters,
        lr=hyperparameters.learning_rate,
        weight_decay=hyperparameters.weight_decay,
        foreach=True,
    )


UPDATE_RULES: dict[str, Callable[[Iterable[Tensor], Any], Optimizer]] = {
    "nesterov": _nesterov,
    "nadamw": _nadamw,
    # The engine has made the update.
    **{name: _plain for name, rule in RULES.items() if rule.is_finished},
}
