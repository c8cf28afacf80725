"""What a run has to reach: metric, direction and target of every AlgoPerf workload.

A run's own meta data come first (AlgoPerf writes ``workload.target_metric_name``,
``workload.validation_target_value`` and ``workload.test_target_value`` into
``meta_data_0.json``). The table below stands in where they are missing. Its values are those of
AlgoPerf 2c90454f (September 2025).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from steps_to_target.errors import CompareError

# workload -> (metric, validation target, test target). A workload's variants share its metric.
_WORKLOADS: dict[str, tuple[str, float, float]] = {
    "cifar": ("accuracy", 0.85, 0.85),
    "criteo1tb": ("loss", 0.123735, 0.126041),
    "criteo1tb_test": ("loss", 0.123735, 0.126041),
    "criteo1tb_layernorm": ("loss", 0.123757, 0.126152),
    "criteo1tb_resnet": ("loss", 0.12415, 0.12648),
    "criteo1tb_embed_init": ("loss", 0.129657, 0.131967),
    "fastmri": ("ssim", 0.723653, 0.740633),
    "fastmri_model_size": ("ssim", 0.723559, 0.740726),
    "fastmri_tanh": ("ssim", 0.717840, 0.734505),
    "fastmri_layernorm": ("ssim", 0.723284, 0.739996),
    "imagenet_resnet": ("accuracy", 0.77431, 0.6560),
    "imagenet_resnet_silu": ("accuracy", 0.75445, 0.6323),
    "imagenet_resnet_gelu": ("accuracy", 0.76765, 0.6519),
    "imagenet_resnet_large_bn_init": ("accuracy", 0.76526, 0.6423),
    "imagenet_vit": ("accuracy", 0.77309, 0.6519),
    "imagenet_vit_glu": ("accuracy", 0.75738, 0.6359),
    "imagenet_vit_post_ln": ("accuracy", 0.75312, 0.6286),
    "imagenet_vit_map": ("accuracy", 0.77113, 0.6523),
    "librispeech_conformer": ("wer", 0.085884, 0.052981),
    "librispeech_conformer_attention_temperature": ("wer", 0.109977, 0.068065),
    "librispeech_conformer_layernorm": ("wer", 0.09731, 0.05996),
    "librispeech_conformer_gelu": ("wer", 0.094114, 0.056629),
    "librispeech_deepspeech": ("wer", 0.119936, 0.074143),
    "librispeech_deepspeech_tanh": ("wer", 0.150883, 0.098613),
    "librispeech_deepspeech_no_resnet": ("wer", 0.131564, 0.079297),
    "librispeech_deepspeech_norm_and_spec_aug": ("wer", 0.14342, 0.090976),
    "mnist": ("accuracy", 0.97, 0.97),
    "ogbg": ("mean_average_precision", 0.28098, 0.268729),
    "ogbg_gelu": ("mean_average_precision", 0.27771, 0.262926),
    "ogbg_silu": ("mean_average_precision", 0.282178, 0.272144),
    "ogbg_model_size": ("mean_average_precision", 0.269446, 0.253051),
    "wmt": ("bleu", 30.8491, 30.7219),
    "wmt_post_ln": ("bleu", 30.0779, 29.8982),
    "wmt_attention_temp": ("bleu", 29.3379, 29.4143),
    "wmt_glu_tanh": ("bleu", 29.5779, 29.0515),
}

_LOWER_IS_BETTER = ("loss", "error", "wer", "cer", "perplexity", "mse", "mae", "rmse", "cost")
_LOWER_EXACT = ("wer", "cer", "mse", "mae", "rmse")


@dataclass(frozen=True)
class Target:
    """The metric that decides, in which direction, and its two targets (None: not known)."""

    metric: str
    validation: float
    test: float | None
    lower_is_better: bool
    source: str

    @property
    def column(self) -> str:
        """The validation column of the log files."""
        return f"validation/{self.metric}"

    @property
    def test_column(self) -> str:
        """The test column of the log files."""
        return f"test/{self.metric}"

    @property
    def sign(self) -> str:
        """``<=`` or ``>=``, for messages."""
        return "<=" if self.lower_is_better else ">="

    def met(self, value: float, target: float | None) -> bool:
        """Whether ``value`` meets ``target``: a tie does, as in AlgoPerf's scoring; NaN never."""
        if target is None:
            return False
        return value <= target if self.lower_is_better else value >= target


def lower_is_better(metric: str) -> bool:
    """Direction of a metric by its name: losses and error rates fall, everything else rises."""
    name = metric.lower()
    parts = name.replace("-", "_").split("_")
    return any(word in parts for word in _LOWER_EXACT) or any(
        word in name for word in _LOWER_IS_BETTER if word not in _LOWER_EXACT
    )


def builtin_target(workload: str) -> Target | None:
    """The target of an AlgoPerf workload by its name, or None for a name AlgoPerf does not have."""
    entry = _WORKLOADS.get(workload)
    if entry is None:
        return None
    metric, validation, test = entry
    return Target(metric, validation, test, lower_is_better(metric), "AlgoPerf 2c90454f")


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def run_target(
    workload: str, meta: Mapping[str, Any], overrides: Mapping[str, Target] | None = None
) -> Target | None:
    """The target of one run: an override, else its meta data, else the built-in table.

    Args:
        workload: name without framework, e.g. ``"ogbg"``.
        meta: contents of ``meta_data_0.json`` (may be empty).
        overrides: targets by workload, e.g. from ``--target``.

    Returns:
        The target, or None when neither the meta data nor the table know one.
    """
    if overrides and workload in overrides:
        return overrides[workload]
    known = builtin_target(workload)
    metric = meta.get("workload.target_metric_name")
    if not isinstance(metric, str) or not metric:
        metric = known.metric if known else None
    validation = _number(meta.get("workload.validation_target_value"))
    if metric is None:
        return None
    if validation is None:
        return known if known and known.metric == metric else None
    test = _number(meta.get("workload.test_target_value"))
    target = Target(metric, validation, test, lower_is_better(metric), "the run's meta data")
    if test is None and known and known.metric == metric:
        return replace(target, test=known.test)
    return target


def parse_override(text: str) -> tuple[str, Target]:
    """Read ``WORKLOAD:METRIC=VALUE`` from the command line.

    Raises:
        CompareError: the text has another form or the value is no finite number.
    """
    name, _, value_text = text.partition("=")
    workload, _, metric = name.partition(":")
    try:
        value = float(value_text)
    except ValueError:
        value = math.nan
    if not workload or not metric or not math.isfinite(value):
        raise CompareError(
            f"--target {text!r}: expected WORKLOAD:METRIC=NUMBER, for example "
            "ogbg:mean_average_precision=0.28098"
        )
    return workload, Target(metric, value, None, lower_is_better(metric), "--target")
