"""Torch's losses: seen, so that nobody has to state a likelihood. `fisher.losses` reads them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F

from ..handlers import Handler, handles

if TYPE_CHECKING:
    from ..record import Recording

LOSSES = (
    "cross_entropy", "nll_loss", "binary_cross_entropy_with_logits", "mse_loss", "ctc_loss"
)  # fmt: skip


def _seen(name: str, function: Callable[..., Any]) -> Handler:
    signature = inspect.signature(function)

    def see(rec: Recording, func: Any, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        output = func(*args, **kwargs)
        rec.see_loss(name, dict(bound.arguments), output)
        return output

    return see


for _name in LOSSES:
    handles(_name, spaces=(F,))(_seen(_name, getattr(F, _name)))


@handles("log_softmax")
def log_softmax(rec: Recording, func: Any, input: Any, *args: Any, **kwargs: Any) -> Any:
    """Log-probabilities, which `nll_loss` may take."""
    output = func(input, *args, **kwargs)
    dim = kwargs.get("dim", args[0] if args else None)
    if isinstance(dim, int):
        rec.see_log_probabilities(output, input, dim)
    return output
