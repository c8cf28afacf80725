"""The same steps by other libraries, where they are installed.

- ASDL (`asdfghjkl`), the library of the paper's experiments. Its releases have K-FAC-expand only;
  in the place of reduce stands its `swift` variant (SKFAC), which sums over a convolution's
  positions, too, and keeps few rows as rows.
- `curvlinops-for-pytorch`: covers linear layers and 2-d convolutions only; the raw gradient trains
  the rest. It runs a forward and a full backward pass of its own.

Both are imported by name at run time, so that nothing here depends on them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.methods import DAMPING, update_rule
from benchmarks.models import Case
from benchmarks.timing import Step

PACKAGES = {"asdl": "asdfghjkl", "curvlinops": "curvlinops-for-pytorch"}


class PeerError(RuntimeError):
    """A library is not installed, or cannot do what is asked."""


def peer_version(name: str) -> str | None:
    """Installed version of a peer, or None."""
    try:
        return version(PACKAGES[name])
    except PackageNotFoundError:
        return None


def _load(name: str) -> Any:
    if peer_version(name) is None:
        raise PeerError(f"{PACKAGES[name]} is not installed: ./run.sh benchmarks installs it")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return import_module(name)


def asdl_step(case: Case, approx: str, fisher: str) -> Step:
    """One step with ASDL's KfacGradientMaker.

    With the empirical Fisher it uses the loss's own backward pass; then ours is the one to compare
    with that has `fisher="empirical"`.
    """
    asdl = _load("asdl")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # names every module that it leaves alone
        config = asdl.PreconditioningConfig(data_size=case.batch_size, damping=DAMPING)
        maker = asdl.KfacGradientMaker(
            case.model, config, fisher_type=_asdl_fisher(fisher), swift=approx == "reduce"
        )
    optimizer = update_rule(case, "nesterov")

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        outputs = maker.setup_model_call(case.model, case.inputs)
        maker.setup_loss_call(F.cross_entropy, outputs, case.targets, reduction="sum")
        _quietly(maker.forward_and_backward)
        optimizer.step()

    return step


def asdl_factors(case: Case, approx: str, fisher: str) -> Step:
    """ASDL's factors of the linear layers."""
    asdl = _load("asdl")
    fishers = import_module("asdl.fisher")
    shape = "swift_kron" if approx == "reduce" else "kron"
    config = fishers.FisherConfig(
        fisher_type=_asdl_fisher(fisher),
        fisher_shapes=[shape],
        loss_type=asdl.LOSS_CROSS_ENTROPY,
        ignore_modules=[nn.LayerNorm, nn.Embedding],
        data_size=case.batch_size,
    )
    maker = fishers.get_fisher_maker(case.model, config)

    def loss(logits: Tensor, targets: Tensor, reduction: str) -> Tensor:
        return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction=reduction)

    def step() -> None:
        case.model.zero_grad(set_to_none=True)
        outputs = maker.setup_model_call(case.model, case.inputs)
        maker.setup_loss_call(loss, outputs, case.targets, reduction="sum")
        _quietly(maker.forward_and_backward)

    return step


def _asdl_fisher(fisher: str) -> str:
    return {"mc": "fisher_mc", "empirical": "fisher_emp"}[fisher]


def _quietly(function: Callable[[], Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        function()


class _ClassesSecond(nn.Module):
    """Logits of sequences as curvlinops wants them: [sequences, classes, tokens]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Any) -> Tensor:
        logits: Tensor = self.model(x)
        return logits.movedim(-1, 1) if logits.dim() > 2 else logits


def _curvlinops_operator(
    curvlinops: Any, case: Case, parameters: list[nn.Parameter], approx: str, fisher: str
) -> Any:
    return curvlinops.KFACLinearOperator(
        _ClassesSecond(case.model),
        nn.CrossEntropyLoss(),
        parameters,
        [(case.inputs, case.targets)],
        check_deterministic=False,
        fisher_type=fisher,
        mc_samples=1,
        kfac_approx=approx,
        num_per_example_loss_terms=case.terms_per_example,
        separate_weight_and_bias=False,
        num_data=case.batch_size,
    )


def _covered(model: nn.Module) -> list[nn.Parameter]:
    return [
        parameter
        for module in model.modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
        for parameter in module.parameters()
    ]


def curvlinops_step(case: Case, approx: str, fisher: str) -> Step:
    """One step with curvlinops' KFACLinearOperator and its inverse."""
    curvlinops = _load("curvlinops")
    parameters = _covered(case.model)
    optimizer = update_rule(case, "nesterov")

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        kfac = _curvlinops_operator(curvlinops, case, parameters, approx, fisher)
        kfac.compute_kronecker_factors()
        torch.autograd.backward(case.loss(case.model(case.inputs)))
        inverse = curvlinops.KFACInverseLinearOperator(
            kfac, damping=DAMPING, use_heuristic_damping=True
        )
        with torch.no_grad():
            gradients = [p.grad for p in parameters if p.grad is not None]
            for gradient, better in zip(gradients, inverse @ gradients, strict=True):
                gradient.copy_(better)
        optimizer.step()

    return step


def curvlinops_factors(case: Case, approx: str, fisher: str) -> Step:
    """curvlinops' factors of the linear layers."""
    curvlinops = _load("curvlinops")
    parameters = _covered(case.model)

    def step() -> None:
        _curvlinops_operator(
            curvlinops, case, parameters, approx, fisher
        ).compute_kronecker_factors()

    return step
