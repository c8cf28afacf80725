"""What a run has to reach: metric, direction and target of every AlgoPerf workload.

A run's own meta data come first (AlgoPerf writes ``workload.target_metric_name``,
``workload.validation_target_value`` and ``workload.test_target_value`` into
``meta_data_0.json``). The table below stands in where they are missing. Its values are those of
AlgoPerf 2c90454f (September 2025), and for ``finewebedu_lm`` those that runs of 2026 logged.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from steps_to_target.errors import CompareError

# workload -> (metric, validation target, test target). A workload's variants share its metric.
_WORKLOADS: dict[str, tuple[str, float, float | None]] = {
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
    "finewebedu_lm": ("ppl", 22.2995, None),
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

# Directions by a metric's last word: "ctc_loss" falls as "loss" does.
_FALLS = {
    "bpb", "bpc", "bpd", "cer", "cost", "entropy", "err", "error", "fid", "loss", "mae", "mape",
    "mse", "nll", "perplexity", "ppl", "rmse", "wer",
}  # fmt: skip
_RISES = {
    "acc", "accuracy", "ap", "auc", "auprc", "auroc", "bleu", "dice", "f1", "iou", "map",
    "precision", "psnr", "r2", "recall", "ssim",
}  # fmt: skip
# Names that their last word alone does not decide.
_WHOLE = {
    "error_rate": True,
    "character_error_rate": True,
    "word_error_rate": True,
    "negative_log_likelihood": True,
    "log_likelihood": False,
    "reciprocal_rank": False,
    "mean_reciprocal_rank": False,
}
_TURNED = frozenset(["neg", "negative", "minus", "inverse", "inv", "anti", "non"])


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

    @property
    def text(self) -> str:
        """``validation/wer <= 0.0859``: what has to be met."""
        return f"{self.column} {self.sign} {self.validation:.10g}"

    @property
    def key(self) -> tuple[str, float, bool]:
        """What two runs must share for their steps to be comparable."""
        return self.metric, self.validation, self.lower_is_better

    def met(self, values: pd.Series, target: float | None) -> pd.Series:
        """Which values meet a target: a tie does, as in AlgoPerf's scoring; NaN never."""
        if target is None:
            return pd.Series(False, index=values.index)
        return values <= target if self.lower_is_better else values >= target


def lower_is_better(metric: str) -> bool | None:
    """Direction of a metric by its name; None for a name that does not say it."""
    name = re.sub(r"[^a-z0-9]+", "_", metric.lower()).strip("_")
    if name in _WHOLE:
        return _WHOLE[name]
    words = name.split("_")
    if _TURNED.intersection(words):
        return None
    if words[-1] in _FALLS:
        return True
    if words[-1] in _RISES:
        return False
    return None


def builtin_target(workload: str) -> Target | None:
    """The target of an AlgoPerf workload by its name, or None for a name AlgoPerf does not have."""
    entry = _WORKLOADS.get(workload)
    if entry is None:
        return None
    metric, validation, test = entry
    return Target(metric, validation, test, bool(lower_is_better(metric)), "AlgoPerf 2c90454f")


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


@dataclass(frozen=True)
class Override:
    """A target from the command line; ``lower_is_better`` None: the metric's name has to say it."""

    metric: str
    validation: float
    lower_is_better: bool | None = None


def run_target(
    workload: str, meta: Mapping[str, Any], overrides: Mapping[str, Override] | None = None
) -> tuple[Target | None, str]:
    """The target of one run: an override, else its meta data, else the built-in table.

    Args:
        workload: name without framework, e.g. ``"ogbg"``.
        meta: contents of ``meta_data_0.json`` (may be empty).
        overrides: targets by workload, e.g. from ``--target``.

    Returns:
        The target and, where there is none although a metric is named, what is missing. A metric
        whose direction its name does not tell has no target: which way it goes is not guessed.
    """
    known = builtin_target(workload)
    override = (overrides or {}).get(workload)
    if override is not None:
        return _directed(
            workload,
            override.metric,
            override.validation,
            None,
            override.lower_is_better,
            "--target",
        )
    metric = meta.get("workload.target_metric_name")
    if not isinstance(metric, str) or not metric:
        metric = known.metric if known else None
    validation = _number(meta.get("workload.validation_target_value"))
    if metric is None:
        return None, ""
    if validation is None:
        return (known, "") if known and known.metric == metric else (None, "")
    test = _number(meta.get("workload.test_target_value"))
    if test is None and known and known.metric == metric:
        test = known.test
    return _directed(workload, metric, validation, test, None, "the run's meta data")


def _directed(
    workload: str,
    metric: str,
    validation: float,
    test: float | None,
    lower: bool | None,
    source: str,
) -> tuple[Target | None, str]:
    lower = lower_is_better(metric) if lower is None else lower
    if lower is None:
        return None, (
            f"whether {metric} has to fall or to rise is not known: say it with "
            f"--target '{workload}:{metric}<={validation:g}' (or >=)"
        )
    return Target(metric, validation, test, lower, source), ""


_OVERRIDE = re.compile(r"(?P<workload>[^:<>=]+):(?P<metric>[^<>=]+?)(?P<sign><=|>=|=)(?P<value>.+)")


def parse_override(text: str) -> tuple[str, Override]:
    """Read ``WORKLOAD:METRIC=VALUE``, or ``<=`` or ``>=`` in place of ``=``.

    Raises:
        CompareError: the text has another form, the value is no finite number, or neither the sign
            nor the metric's name says in which direction the target lies.
    """
    match = _OVERRIDE.fullmatch(text)
    try:
        value = float(match["value"]) if match else math.nan
    except ValueError:
        value = math.nan
    if match is None or not math.isfinite(value):
        raise CompareError(
            f"--target {text!r}: expected WORKLOAD:METRIC=NUMBER, for example "
            "ogbg:mean_average_precision=0.28098 (or >= or <= in place of =)"
        )
    workload, metric = match["workload"], match["metric"]
    known = lower_is_better(metric)
    lower = {"<=": True, ">=": False}.get(match["sign"], known)
    if known is not None and lower is not known:
        raise CompareError(f"--target {text!r}: {metric} has to {'fall' if known else 'rise'}")
    _, missing = _directed(workload, metric, value, None, lower, "--target")
    if missing:
        raise CompareError(f"--target {text!r}: {missing}")
    return workload, Override(metric, value, lower)
