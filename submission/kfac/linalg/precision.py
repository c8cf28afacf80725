"""Precision of the products behind the factors."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch

PRECISIONS = {
    "float32": "as the statistics are, float64 for float64 parameters",
    "tf32": "float32 sums of products of TF32 numbers (10 bits), on GPUs that have them",
    "bfloat16": "float32 sums of products of bfloat16 numbers (8 bits), of linear layers' rows",
}
_precision: ContextVar[str] = ContextVar("kfac_precision", default="float32")


@contextmanager
def products_in(precision: str) -> Iterator[None]:
    """Inside, products of float32 rows are computed as `PRECISIONS` says, in this thread.

    Whatever the global switch for TF32 says: AlgoPerf, for one, turns it on.
    """
    token = _precision.set(precision)
    try:
        with _tf32(precision == "tf32"):
            yield
    finally:
        _precision.reset(token)


@contextmanager
def own_products(precision: str, device_type: str) -> Iterator[None]:
    """As `products_in`, without autocast, which is for the model's passes alone."""
    cast = torch.amp.is_autocast_available(device_type)
    plain = torch.autocast(device_type, enabled=False) if cast else nullcontext()
    with plain, products_in(precision):
        yield


def rounds_to_bfloat16() -> bool:
    """Whether products are to be those of bfloat16 numbers."""
    return _precision.get() == "bfloat16"


_lock = threading.Lock()
_before: list[Any] = []  # what the switch was, once for each thread that is inside


@contextmanager
def _tf32(on: bool) -> Iterator[None]:
    """By the switch that this PyTorch has; the old one may not even be read beside the new one.

    The switch is the whole process's: while several threads are inside, the last one decides, and
    the last to leave puts it back.
    """
    matmul: Any = torch.backends.cuda.matmul
    new = _has_new_switch()
    name = "fp32_precision" if new else "allow_tf32"
    with _lock:
        _before.append(_before[0] if _before else getattr(matmul, name))
        setattr(matmul, name, ("tf32" if on else "ieee") if new else on)
    try:
        yield
    finally:
        with _lock:
            before = _before.pop()
            if not _before:
                setattr(matmul, name, before)


def _has_new_switch() -> bool:
    try:
        return isinstance(torch.backends.cuda.matmul.fp32_precision, str)
    except (AttributeError, RuntimeError):
        return False
