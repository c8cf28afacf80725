"""Models that torch.compile has compiled: their operations are seen by running them uncompiled."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

NOT_SEEN = (
    "the model is compiled, so its operations cannot be seen: call the uncompiled module inside "
    "record() (`model._orig_mod` of torch.compile's result), or use PyTorch 2.6 or newer"
)
INSIDE = (
    "record() is inside a function that torch.compile compiles: compile the model, or what comes "
    "before and after record(), in place of the whole step"
)


class CompiledModelError(RuntimeError):
    """What is to be recorded is compiled: its operations cannot be seen."""


def is_compiled(model: nn.Module) -> bool:
    """Whether a module was compiled: in place, in parts, or wrapped by the caller."""
    return any(
        getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod")
        for module in model.modules()
    )


_lock = threading.Lock()
_stances: list[Any] = []  # one for each recording that is going on, in any thread


@contextmanager
def uncompiled() -> Iterator[None]:
    """Inside, compiled modules run as they were before, where this PyTorch can (since 2.6).

    Raises:
        CompiledModelError: a function that is compiled itself has called this.
    """
    if not hasattr(torch.compiler, "set_stance") or "torch._dynamo" not in sys.modules:
        yield  # nothing can be done, or nothing is compiled
        return
    with _lock:  # the stance is the whole process's
        _stances.append(_force_eager() if not _stances else None)
    try:
        yield
    finally:
        with _lock:
            stance = _stances.pop(0)
            if _stances:
                _stances[0] = stance
            else:
                _undo(stance)


def _force_eager() -> Any:
    # Without `disable` a compiled function would not even get here to be refused.
    stance = torch.compiler.disable(_stance)()  # type: ignore[no-untyped-call]
    try:
        stance.__enter__()
    except RuntimeError:  # as PyTorch says it where a function is being compiled
        _undo(stance)
        raise CompiledModelError(INSIDE) from None
    return stance


def _stance() -> Any:
    return torch.compiler.set_stance("force_eager")


def _undo(stance: Any) -> None:
    torch.compiler.disable(stance.__exit__)(None, None, None)  # type: ignore[no-untyped-call]
