import json
import random
from collections import namedtuple
from types import SimpleNamespace

import pytest

from workloads_overrides.errors import LaunchError
from workloads_overrides.search import register_search, require_same_points

Point = namedtuple("Point", ["learning_rate"])


def shuffling_halton():
    """AlgoPerf's search: the points in an order of Python's own generator."""

    def generate_search(search_space, num_trials):
        points = [Point(rate) for rate in search_space[:num_trials]]
        random.shuffle(points)
        return points

    return SimpleNamespace(generate_search=generate_search)


def test_every_process_draws_the_same_points_in_the_same_order(tmp_path):
    drawn = []
    for seed in (1, 2, 3):  # each process would start with a generator of its own
        random.seed(seed)
        halton = shuffling_halton()
        register_search(halton, tmp_path)
        drawn.append(halton.generate_search(list(range(20)), 20))
    assert drawn[0] == drawn[1] == drawn[2]
    assert sorted(point.learning_rate for point in drawn[0]) == list(range(20))


def test_the_callers_generator_goes_on_as_if_nothing_had_been_drawn():
    halton = shuffling_halton()
    register_search(halton, None)
    random.seed(5)
    expected = random.random()
    random.seed(5)
    halton.generate_search([1.0, 2.0], 2)
    assert random.random() == expected


def begin(trials, number, text):
    folder = trials / f"trial_{number}"
    folder.mkdir(parents=True)
    (folder / "hparams.json").write_text(text)


def test_a_trial_that_goes_on_with_its_own_hyperparameters_passes(tmp_path):
    begin(tmp_path, 1, json.dumps({"learning_rate": 0.1}))
    require_same_points([{"learning_rate": 0.1}, {"learning_rate": 0.2}], tmp_path)


@pytest.mark.parametrize("now", [{"learning_rate": 0.2}, {}, {"learning_rate": 0.1, "damping": 1}])
def test_changed_hyperparameters_are_refused_by_name_and_value(tmp_path, now):
    begin(tmp_path, 2, json.dumps({"learning_rate": 0.1}))
    with pytest.raises(LaunchError, match=r"trial_2 was begun with other .*now .*--overwrite"):
        require_same_points([{"learning_rate": 0.1}, now], tmp_path)


def test_a_half_written_file_is_another_process_starting(tmp_path):
    begin(tmp_path, 1, '{"learning')
    require_same_points([{"learning_rate": 0.1}], tmp_path)
