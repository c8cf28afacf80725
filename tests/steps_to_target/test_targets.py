"""Metric, direction and target of every workload."""

import math

import pandas as pd
import pytest

from steps_to_target.errors import CompareError
from steps_to_target.targets import (
    Override,
    builtin_target,
    lower_is_better,
    parse_override,
    run_target,
)


def _met(target, value, goal):
    return bool(target.met(pd.Series([value]), goal).iloc[0])


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
        ("ppl", True),
        ("perplexity", True),
        ("negative_log_likelihood", True),
        ("log_likelihood", False),
        ("Top1-Accuracy", False),
        ("bits_per_byte_loss", True),
    ],
)
def test_direction(metric, lower):
    assert lower_is_better(metric) is lower


@pytest.mark.parametrize(
    "metric",
    [
        "answer",  # contains "wer", but is no word error rate
        "loss_scale",
        "negative_loss",
        "inverse_accuracy",
        "reward",
        "frechet_distance_to_go",
        "",
    ],
)
def test_direction_of_an_unknown_metric_is_not_guessed(metric):
    assert lower_is_better(metric) is None
    meta = {"workload.target_metric_name": metric, "workload.validation_target_value": 3.5}
    target, missing = run_target("mine", meta)
    assert target is None
    assert not metric or f"--target 'mine:{metric}<=3.5'" in missing


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
    assert _met(target, better, target.validation)
    assert not _met(target, worse, target.validation)


def test_a_tie_meets_the_target_and_nan_does_not():
    for name in ("ogbg", "librispeech_conformer"):
        target = builtin_target(name)
        assert _met(target, target.validation, target.validation)
        assert not _met(target, math.nan, target.validation)
        assert not _met(target, 1.0, None)


def test_meta_data_come_before_the_table():
    meta = {
        "workload.target_metric_name": "accuracy",
        "workload.validation_target_value": 0.5,
        "workload.test_target_value": 0.4,
    }
    target, _ = run_target("ogbg", meta)
    assert (target.metric, target.validation, target.test) == ("accuracy", 0.5, 0.4)
    assert run_target("ogbg", {})[0].validation == 0.28098


def test_incomplete_meta_data_are_completed_from_the_table():
    target, _ = run_target("ogbg", {"workload.validation_target_value": 0.25})
    assert (target.metric, target.validation, target.test) == (
        "mean_average_precision",
        0.25,
        0.268729,
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, "0.3", True, None, 10**400])
def test_unusable_target_values_are_not_taken(value):
    target, _ = run_target("ogbg", {"workload.validation_target_value": value})
    assert target.validation == 0.28098
    meta = {"workload.target_metric_name": "f1", "workload.validation_target_value": value}
    assert run_target("mine", meta) == (None, "")


@pytest.mark.parametrize(
    ("text", "override"),
    [
        ("mine:wer=0.25", Override("wer", 0.25, True)),
        ("mine:wer<=0.25", Override("wer", 0.25, True)),
        ("mine:reward>=-3", Override("reward", -3.0, False)),
    ],
)
def test_override(text, override):
    workload, found = parse_override(text)
    assert (workload, found) == ("mine", override)
    target, _ = run_target("mine", {}, {workload: found})
    assert (target.validation, target.lower_is_better) == (
        override.validation,
        override.lower_is_better,
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        *(
            (text, "expected WORKLOAD:METRIC=NUMBER")
            for text in ("", "mine", "mine:wer", "mine=0.2")
        ),
        *((text, "expected WORKLOAD:METRIC=NUMBER") for text in (":wer=1", "a:b=c", "a:b=nan")),
        ("mine:reward=3", "whether reward has to fall or to rise is not known"),
        ("mine:wer>=0.25", "wer has to fall"),
        ("mine:accuracy<=0.25", "accuracy has to rise"),
    ],
)
def test_wrong_override(text, words):
    with pytest.raises(CompareError, match=words):
        parse_override(text)
