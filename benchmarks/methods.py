"""One training step, or one computation of factors, by plain SGD and by this project."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch.optim import Optimizer

from benchmarks.models import Case
from benchmarks.timing import Step
from submission.kfac import KFACConfig, Preconditioner, kronecker_factors
from submission.optimizers import UPDATE_RULES

APPROXES = ("expand", "reduce")
FISHERS = ("mc", "empirical")
DAMPING = 1e-3
LEARNING_RATE = 1e-5  # small: the weights hardly move, however many steps are measured


def update_rule(case: Case, name: str | None = None) -> Optimizer:
    """The base optimizer: the case's own rule, or another one of UPDATE_RULES."""
    settings = SimpleNamespace(
        learning_rate=LEARNING_RATE, beta1=0.9, beta2=0.999, epsilon=1e-8, weight_decay=0.0
    )
    return UPDATE_RULES[name or case.update_rule](case.model.parameters(), settings)


def sgd_step(case: Case) -> Step:
    """Forward, backward, SGD with momentum: what all others are compared with."""
    return reference_step(case, "nesterov")


def reference_step(case: Case, rule: str | None = None) -> Step:
    """Forward, backward, update by the case's own rule or the one that is given."""
    optimizer = update_rule(case, rule)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(case.loss(case.model(case.inputs)))
        optimizer.step()

    return step


def make_kfac(case: Case, approx: str, fisher: str, interval: int = 1) -> Preconditioner:
    """This project's K-FAC as the benchmarks configure it: defaults, updates every `interval`."""
    config = KFACConfig(
        kfac_approx=approx,
        fisher_type=fisher,
        damping=DAMPING,
        factor_update_steps=interval,
        inverse_update_steps=interval,
        early_updates=False,
    )
    return Preconditioner(case.model, config)


def ours_step(case: Case, approx: str, fisher: str) -> Step:
    """One step with factors and inverses renewed in it, then SGD with momentum."""
    return kfac_step(case, make_kfac(case, approx, fisher), "nesterov")


def kfac_step(case: Case, kfac: Preconditioner, rule: str | None = None) -> Step:
    """One step of training with this project's K-FAC; what is due in it, `kfac` decides."""
    optimizer = update_rule(case, rule)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with kfac.record(case.sharing() if kfac.factors_due else None):
            logits = case.model(case.inputs)
        loss = case.loss(logits)
        kfac.update(logits, case.likelihood, mask=case.weights, targets=case.targets, loss=loss)
        torch.autograd.backward(loss)
        kfac.precondition()
        optimizer.step()

    return step


def ours_factors(case: Case, approx: str, fisher: str) -> Step:
    """Factors of all linear layers, nothing else."""
    generator = torch.Generator(case.targets.device).manual_seed(0)

    def step() -> None:
        kronecker_factors(
            case.model,
            case.inputs,
            likelihood=case.likelihood,
            kfac_approx=approx,
            fisher_type=fisher,
            mask=case.weights,
            sharing=case.sharing(),
            targets=case.targets,
            generator=generator,
        )

    return step


MakeStep = Callable[[Case, str, str], Step]
