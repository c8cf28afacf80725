"""Torch function -> what it does with parameters. To support another function, add a handler.

A handler is called as `handler(recording, function, *args, **kwargs)` with the arguments of the
function, while gradients are computed. It returns the output, or NotImplemented where the function
is not used on a parameter in the way that it knows; then the function runs as it is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor

Handler = Callable[..., Any]
HANDLERS: dict[Any, Handler] = {}
SPACES: tuple[Any, ...] = (torch, Tensor, F, torch._C._VariableFunctions, torch._C._nn)


def handles(*names: str, spaces: tuple[Any, ...] = SPACES) -> Callable[[Handler], Handler]:
    """Registers a handler for all functions of these names in torch's name spaces."""

    def register(handler: Handler) -> Handler:
        for name in names:
            for space in spaces:
                if hasattr(space, name):
                    HANDLERS[getattr(space, name)] = handler
        return handler

    return register


def inside_checkpoint() -> bool:
    """Whether `torch.utils.checkpoint` is among the callers."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_filename == torch.utils.checkpoint.__file__:
            return True
        frame = frame.f_back
    return False
