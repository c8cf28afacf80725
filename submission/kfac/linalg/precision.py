"""Precision of the products behind the factors."""

from __future__ import annotations

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
    """Inside, products of float32 rows are computed as `PRECISIONS` says, in this thread."""
    token = _precision.set(precision)
    try:
        with _tf32() if precision == "tf32" else nullcontext():
            yield
    finally:
        _precision.reset(token)


def without_autocast(device_type: str) -> Any:
    """A context without autocast, which is for the model's passes alone."""
    if not torch.amp.is_autocast_available(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def rounds_to_bfloat16() -> bool:
    """Whether products are to be those of bfloat16 numbers."""
    return _precision.get() == "bfloat16"


@contextmanager
def _tf32() -> Iterator[None]:
    """By the switch that this PyTorch has; the old one may not even be read beside the new one."""
    matmul: Any = torch.backends.cuda.matmul
    name, on = ("fp32_precision", "tf32") if _has_new_switch() else ("allow_tf32", True)
    before = getattr(matmul, name)
    setattr(matmul, name, on)
    try:
        yield
    finally:
        setattr(matmul, name, before)


def _has_new_switch() -> bool:
    try:
        return isinstance(torch.backends.cuda.matmul.fp32_precision, str)
    except (AttributeError, RuntimeError):
        return False
