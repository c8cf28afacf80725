"""Metric, direction and target of every workload."""

import math

import pytest

from steps_to_target.errors import CompareError
from steps_to_target.targets import builtin_target, lower_is_better, parse_override, run_target


@pytest.mark.parametrize(
    ("metric", "lower"),
    [
        ("wer", True),
        ("loss", True),
        ("ctc_loss", True),
        ("l1_loss", True),
        ("error_rate", True),
        ("accuracy", False),
        ("mean_average_precision", False),
        ("ssim", False),
        ("bleu", False),
        ("answer", False),  # contains "wer", but is no word error rate
    ],
)
def test_direction(metric, lower):
    assert lower_is_better(metric) is lower


@pytest.mark.parametrize(
    ("workload", "metric", "better", "worse"),
    [
        ("criteo1tb", "loss", 0.1237, 0.1238),
        ("fastmri", "ssim", 0.7237, 0.7236),
        ("imagenet_resnet", "accuracy", 0.7744, 0.7743),
        ("imagenet_vit", "accuracy", 0.7731, 0.7730),
        ("librispeech_conformer", "wer", 0.0858, 0.0859),
        ("librispeech_deepspeech", "wer", 0.1199, 0.1200),
        ("ogbg", "mean_average_precision", 0.281, 0.2809),
        ("wmt", "bleu", 30.85, 30.84),
    ],
)
def test_base_workloads(workload, metric, better, worse):
    target = builtin_target(workload)
    assert target.metric == metric
    assert target.met(better, target.validation)
    assert not target.met(worse, target.validation)


def test_a_tie_meets_the_target_and_nan_does_not():
    for name in ("ogbg", "librispeech_conformer"):
        target = builtin_target(name)
        assert target.met(target.validation, target.validation)
        assert not target.met(math.nan, target.validation)
        assert not target.met(1.0, None)


def test_meta_data_come_before_the_table():
    meta = {
        "workload.target_metric_name": "accuracy",
        "workload.validation_target_value": 0.5,
        "workload.test_target_value": 0.4,
    }
    target = run_target("ogbg", meta)
    assert (target.metric, target.validation, target.test) == ("accuracy", 0.5, 0.4)
    assert run_target("ogbg", {}).validation == 0.28098


def test_incomplete_meta_data_are_completed_from_the_table():
    target = run_target("ogbg", {"workload.validation_target_value": 0.25})
    assert (target.metric, target.validation, target.test) == (
        "mean_average_precision",
        0.25,
        0.268729,
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, "0.3", True, None, 10**400])
def test_unusable_target_values_are_not_taken(value):
    assert run_target("ogbg", {"workload.validation_target_value": value}).validation == 0.28098
    meta = {"workload.target_metric_name": "f1", "workload.validation_target_value": value}
    assert run_target("mine", meta) is None


def test_override():
    workload, target = parse_override("mine:wer=0.25")
    assert workload == "mine"
    assert target.lower_is_better
    assert run_target("mine", {}, {workload: target}).validation == 0.25


@pytest.mark.parametrize("text", ["", "mine", "mine:wer", "mine=0.2", ":wer=1", "a:b=c", "a:b=nan"])
def test_wrong_override(text):
    with pytest.raises(CompareError, match="expected WORKLOAD:METRIC=NUMBER"):
        parse_override(text)
