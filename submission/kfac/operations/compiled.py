"""Models that torch.compile has compiled: their operations are seen by running them uncompiled."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

INSIDE = (
    "record() is inside a function that torch.compile compiles: compile the model, or what comes "
    "before and after record(), in place of the whole step"
)


class CompiledModelError(RuntimeError):
    """The step that records is compiled as a whole: its operations cannot be seen."""


_lock = threading.Lock()
_stances: list[Any] = []  # one for each recording that is going on, in any thread


@contextmanager
def uncompiled() -> Iterator[None]:
    """Inside, compiled modules and functions run as they were before.

    Raises:
        CompiledModelError: a function that is compiled itself has called this.
    """
    if "torch._dynamo" not in sys.modules:
        yield  # nothing is compiled
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
    if hasattr(torch.compiler, "set_stance"):
        return torch.compiler.set_stance("force_eager")
    # PyTorch 2.5: a compiled function first asks for its frames to be compiled; nobody hears it.
    frames = sys.modules["torch._dynamo.eval_frame"]
    return mock.patch.object(frames, "_maybe_set_eval_frame", return_value=None)


def _undo(stance: Any) -> None:
    torch.compiler.disable(stance.__exit__)(None, None, None)  # type: ignore[no-untyped-call]
