"""Records one forward pass for K-FAC, with settings from its configuration."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from . import distributed
from .capture import Recording
from .config import KFACConfig
from .sharing import SharingError, SharingRule, unknown_names
from .statistics import Part


class CompiledModelError(RuntimeError):
    """The model that was recorded is compiled: the calls of its layers cannot be seen."""


def keeps_rows(config: KFACConfig) -> bool:
    """Whether factors may stay sums of few rows: not if averaged over time or added over ranks,
    nor if they are to be diagonalised."""
    averaged = config.factor_decay > 0 or distributed.world_size() > 1
    return not averaged and config.damping_kind != "exact"


@contextmanager
def record(
    model: nn.Module,
    config: KFACConfig,
    parts: Mapping[str, Sequence[Part]],
    *,
    sharing: SharingRule,
    watched: Iterable[Part],
    examples_share: float,
    compiled: bool,
    called: Callable[[str], None],
) -> Iterator[dict[str, Recording]]:
    """Records the forward pass inside, once for each list of parts (name -> recording).

    Compiled modules run uncompiled inside, where PyTorch can do that (2.6 and newer).

    Args:
        compiled: whether the model is known to be compiled.
        watched, examples_share, called: see `Recording`.

    Raises:
        SharingError: `sharing` names a layer that there is not.
        CompiledModelError: the model is compiled, and no layer was seen.
    """
    watched = list(watched)
    recordings = {
        name: Recording(
            model,
            own,
            sharing,
            config.ragged_scaling,
            uses=config.inverse_update_steps if keeps_rows(config) else None,
            keep_rows=config.eigenvalue_correction,
            watched=watched,
            examples_share=examples_share,
            called=called,
            precision=config.factor_precision,
        )
        for name, own in parts.items()
    }
    for recording in recordings.values():
        check_names(sharing, recording)
    with ExitStack() as stack:
        stack.enter_context(_uncompiled())
        for recording in recordings.values():
            stack.enter_context(recording)
        yield recordings
    for recording in recordings.values():
        lost = recording.out_of_memory is not None
        if compiled and not lost and recording.calls and not any(recording.calls.values()):
            raise CompiledModelError(
                "the model is compiled, so the calls of its layers cannot be seen: call the "
                "uncompiled module inside record() (`model._orig_mod` of torch.compile's result), "
                "or use PyTorch 2.6 or newer"
            )


def is_compiled(model: nn.Module) -> bool:
    """Whether a module was compiled: in place, in parts, or wrapped by the caller."""
    return any(
        getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod")
        for module in model.modules()
    )


def _uncompiled() -> Any:
    """Runs compiled modules as they were before, where this PyTorch can."""
    set_stance = getattr(torch.compiler, "set_stance", None)  # since 2.6
    if set_stance is None or "torch._dynamo" not in sys.modules:  # nothing is compiled then
        return nullcontext()
    return set_stance("force_eager")


def check_names(rule: SharingRule, recording: Recording) -> None:
    """Whether all names of a mapping are those of layers.

    Raises:
        SharingError: one is not.
    """
    if not isinstance(rule, Mapping):
        return
    names = recording.names
    for name in unknown_names(rule, names):
        near = difflib.get_close_matches(name, names, n=3) or names[:5]
        raise SharingError(
            f"sharing names '{name}', which is no layer of the model (nor the beginning of the "
            f"name of one, up to a dot); there are {', '.join(near)}, ..."
        )
