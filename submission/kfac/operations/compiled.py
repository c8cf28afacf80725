"""Models that torch.compile has compiled, in recorded passes.

Where the statistics are sums over positions, compiled modules run compiled with the statistics in
their graph (see `traced`). Others run uncompiled there, and `CompiledModules.refusals` says why.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock
from weakref import WeakKeyDictionary

import torch
from torch import fx, nn

from .traced import TracedGraph
from .uses import Use

logger = logging.getLogger(__name__)
INSIDE = (
    "record() is inside a function that torch.compile compiles: compile the model, or what comes "
    "before and after record(), in place of the whole step"
)


class CompiledModelError(RuntimeError):
    """The step that records is compiled as a whole: its operations cannot be seen."""


CAN_SWITCH = hasattr(torch.compiler, "set_stance")  # from PyTorch 2.6
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


@contextmanager
def compiled_inside() -> Iterator[None]:
    """Inside `uncompiled`, compiled functions run compiled again."""
    with torch.compiler.set_stance("default"):
        yield


@contextmanager
def modules_run_by(run: Callable[[Any, Any, Any], Any] | None) -> Iterator[None]:
    """Inside, `run(module, arguments, keywords)` is called in place of compiled modules."""
    if run is None or "torch._dynamo" not in sys.modules or not CAN_SWITCH:
        yield
        return
    from torch._dynamo import OptimizedModule

    plain, thread = OptimizedModule.__call__, threading.get_ident()

    def call(module: Any, *arguments: Any, **keywords: Any) -> Any:
        if threading.get_ident() != thread or torch.compiler.is_compiling():
            return plain(module, *arguments, **keywords)
        return run(module, arguments, keywords)

    with mock.patch.object(OptimizedModule, "__call__", call):
        yield


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
    if CAN_SWITCH:
        return torch.compiler.set_stance("force_eager")
    # PyTorch 2.5: a compiled function first asks for its frames to be compiled; nobody hears it.
    frames = sys.modules["torch._dynamo.eval_frame"]
    return mock.patch.object(frames, "_maybe_set_eval_frame", return_value=None)


def _undo(stance: Any) -> None:
    torch.compiler.disable(stance.__exit__)(None, None, None)  # type: ignore[no-untyped-call]


@dataclass(eq=False)
class _Module:
    """A compiled module, in recorded passes."""

    run: Callable[..., Any]
    refusal: str = ""


class CompiledModules:
    """Runs compiled modules in recorded passes.

    Args:
        is_wanted: whether statistics of a use are wanted; raises a RefusalError for those that a
            graph cannot give.
        dtype_of: the dtype of the sums of a use.

    Attributes:
        recording: what the present pass is recorded by.
        may_compile: whether the present pass may take sums in place of rows.
        structure_key: changes when other statistics are wanted.
    """

    def __init__(
        self, is_wanted: Callable[[Use], bool], dtype_of: Callable[[Use], torch.dtype]
    ) -> None:
        self.is_wanted, self.dtype_of = is_wanted, dtype_of
        self.recording: Any = None
        self.may_compile = False
        self.structure_key: Any = None
        self.compiled = 0  # graphs with statistics
        self._modules: WeakKeyDictionary[nn.Module, _Module] = WeakKeyDictionary()
        self._later = ""

    @property
    def refusals(self) -> list[str]:
        """Why compiled modules run uncompiled in recorded passes."""
        return [module.refusal for module in self._modules.values() if module.refusal]

    def refuse_later(self, problem: str) -> None:
        """The module that runs is not to be run here again."""
        self._later = problem

    def run(self, module: Any, arguments: Any, keywords: Any) -> Any:
        """The forward pass of a compiled module under the recording."""
        entry = self._modules.get(module)
        if entry is None:
            entry = self._modules[module] = _Module(self._traced(module))
        if entry.refusal:
            return module._orig_mod(*arguments, **keywords)
        self._later = ""
        calls = len(self.recording.calls)
        try:
            with self.recording.paused(), compiled_inside():
                outputs = entry.run(*arguments, **keywords)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a compiler raises; an error of the model comes again
            self._later = str(error).partition("\n")[0] or type(error).__name__
            self.recording.forget_from(calls)
            outputs = module._orig_mod(*arguments, **keywords)
        if self._later:
            entry.refusal = self._later
            logger.info("K-FAC: a compiled module is recorded uncompiled: %s", self._later)
        return outputs

    def _traced(self, module: Any) -> Callable[..., Any]:
        backend = _backend_of(module)

        def make(graph: fx.GraphModule, _: Any) -> Any:
            return torch.compiler.disable(TracedGraph(self, graph, backend))  # type: ignore[no-untyped-call]

        inner = module._orig_mod

        def forward(*arguments: Any, **keywords: Any) -> Any:
            return inner(*arguments, **keywords)

        # Code of its own, since what was compiled of one code object is limited to eight.
        forward.__code__ = forward.__code__.replace()
        made: Callable[..., Any] = torch.compile(forward, backend=make, fullgraph=True)
        return made


def _backend_of(module: Any) -> Callable[..., Any]:
    """The backend that a module was compiled with."""
    found = module.dynamo_ctx.callback
    for name in ("_torchdynamo_orig_backend", "_torchdynamo_orig_callable"):
        while hasattr(found, name):
            found = getattr(found, name)
    backend: Callable[..., Any] = found
    return backend
