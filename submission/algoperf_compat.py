"""The one file that knows AlgoPerf's package names.

`spec` has `LossType`, `ForwardPassMode`, `ParameterType` and `TrainingCompleteError`, taken from
AlgoPerf (`algoperf`, or `algorithmic_efficiency` up to v0.5) where it is installed; otherwise
stand-ins with the same names and values, so that the submission also runs without AlgoPerf.
"""

from __future__ import annotations

import enum
import importlib
import importlib.util
from types import SimpleNamespace
from typing import Any


class _LossType(enum.Enum):
    SOFTMAX_CROSS_ENTROPY = 0
    SIGMOID_CROSS_ENTROPY = 1
    MEAN_SQUARED_ERROR = 2
    CTC_LOSS = 3
    MEAN_ABSOLUTE_ERROR = 4


class _ForwardPassMode(enum.Enum):
    TRAIN = 0
    EVAL = 1


class _ParameterType(enum.Enum):
    WEIGHT = 0
    BIAS = 1
    CONV_WEIGHT = 2
    BATCH_NORM_SCALE = 3
    BATCH_NORM_BIAS = 4
    LAYER_NORM_SCALE = 5
    LAYER_NORM_BIAS = 6
    EMBEDDING = 7
    ATTENTION_Q = 8
    ATTENTION_K = 9
    ATTENTION_V = 10
    ATTENTION_OUT = 11
    ATTENTION_QKV = 12
    ATTENTION_KV = 13
    ATTENTION_BIAS = 14


class _TrainingCompleteError(Exception):
    """Raised by a submission that has finished training."""


def _load_spec() -> Any:
    for package in ("algoperf", "algorithmic_efficiency"):
        # find_spec, not a bare try: an AlgoPerf that is installed but broken must say so.
        if importlib.util.find_spec(package) is not None:
            return importlib.import_module(f"{package}.spec")
    return SimpleNamespace(
        LossType=_LossType,
        ForwardPassMode=_ForwardPassMode,
        ParameterType=_ParameterType,
        TrainingCompleteError=_TrainingCompleteError,
    )


spec: Any = _load_spec()
