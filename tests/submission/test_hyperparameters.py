"""Tuning points: what is read, and that whatever is wrong is named before training."""

import collections
import json
import random
import string
from dataclasses import fields

import pytest

from submission.hyperparameters import HyperparameterError, Hyperparameters

MINIMAL = {"kfac_approx": "reduce", "update_rule": "nadamw", "learning_rate": 1e-3}


def test_reads_mappings_and_namedtuples_and_integral_floats():
    point = {**MINIMAL, "factor_update_steps": 5.0, "inverse_update_steps": 10, "grad_clip": None}
    as_tuple = collections.namedtuple("Hyperparameters", point)(**point)
    for given in (point, as_tuple):
        read = Hyperparameters.from_tuning_point(given)
        assert read.factor_update_steps == 5
        assert isinstance(read.factor_update_steps, int)
        assert read.grad_clip is None
    assert Hyperparameters.from_tuning_point(json.loads(json.dumps(point))) == read


def test_engine_settings_carry_over():
    read = Hyperparameters.from_tuning_point(
        {**MINIMAL, "damping": 0.02, "damping_kind": "exact", "ragged_scaling": "mean_sum"}
    )
    config = read.kfac_config(seed=7)
    assert (config.damping, config.damping_kind, config.ragged_scaling, config.seed) == (
        0.02,
        "exact",
        "mean_sum",
        7,
    )
    assert (
        Hyperparameters.from_tuning_point({**MINIMAL, "kfac_approx": "none"}).kfac_config(0) is None
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 0}, "'learning_rate' is 0; it must be a finite number > 0"),
        ({"learning_rate": "fast"}, "'learning_rate' is 'fast'"),
        ({"learning_rate": float("nan")}, "'learning_rate' is nan"),
        ({"beta1": 1.0}, "'beta1' is 1.0; it must be a finite number >= 0 and < 1"),
        ({"mc_samples": 1.5}, "'mc_samples' is 1.5; it must be an integer >= 1"),
        ({"mc_samples": True}, "'mc_samples' is True"),
        ({"early_updates": 1}, "'early_updates' is 1; it must be true or false"),
        ({"kfac_approx": "Reduce"}, "it must be one of 'expand', 'reduce', 'auto', 'none'"),
        ({"grad_clip": -1}, "it must be a finite number > 0 or null"),
        ({"dampening": 0.1}, "unknown hyperparameter 'dampening'; known are: .*damping"),
        ({"inverse_update_steps": 15}, "must be a multiple of 'factor_update_steps'"),
        ({"warmup_steps": 10, "training_steps": 10}, "must be below 'training_steps'"),
    ],
)
def test_what_is_wrong_is_named_with_what_is_allowed(change, message):
    with pytest.raises(HyperparameterError, match=message):
        Hyperparameters.from_tuning_point({**MINIMAL, **change})


@pytest.mark.parametrize("name", list(MINIMAL))
def test_missing_names_are_named(name):
    point = {k: v for k, v in MINIMAL.items() if k != name}
    with pytest.raises(HyperparameterError, match=f"'{name}' is missing; it must be"):
        Hyperparameters.from_tuning_point(point)


def test_no_point_at_all():
    with pytest.raises(HyperparameterError, match="tuning_search_space"):
        Hyperparameters.from_tuning_point(None)


def test_two_hundred_random_bad_points_give_the_one_kind_of_error():
    generator = random.Random(0)
    names = [f.name for f in fields(Hyperparameters)]
    junk = ["", "x", -1, 1e400, float("nan"), [], {}, -0.5, "1", b"", object()]
    for _ in range(200):
        point = dict(MINIMAL)
        if generator.random() < 0.3:
            point["".join(generator.choices(string.ascii_lowercase, k=9))] = 1
        else:
            point[generator.choice(names)] = generator.choice(junk)
        with pytest.raises(HyperparameterError, match="hyperparameter"):
            Hyperparameters.from_tuning_point(point)


@pytest.mark.parametrize("name", ["eigenvalue_correction", "adaptive_damping", "kfac_approx"])
def test_eigenbasis_adam_refuses_what_it_has_no_use_for(name):
    value = "none" if name == "kfac_approx" else True
    point = {
        "kfac_approx": "reduce", "update_rule": "eigenbasis_adam", "learning_rate": 0.01,
        "damping_kind": "exact", name: value,
    }  # fmt: skip
    with pytest.raises(HyperparameterError, match=rf"'{name}'.*eigenbasis"):
        Hyperparameters.from_tuning_point(point)


def test_eigenbasis_adam_sets_what_it_needs():
    point = {
        "kfac_approx": "reduce", "update_rule": "eigenbasis_adam", "learning_rate": 0.01,
        "beta1": 0.8, "beta2": 0.9, "epsilon": 1e-6,
    }  # fmt: skip
    config = Hyperparameters.from_tuning_point(point).kfac_config(seed=0)
    assert config.direction == "eigenbasis_adam"
    assert config.damping_kind == "exact"
    assert (config.betas, config.epsilon) == ((0.8, 0.9), 1e-6)
