"""The average of late parameters that evaluations may take."""

import copy
import io

import pytest
import torch
from torch import nn
from workload import GraphNet, GraphWorkload, graph_batch

from submission import submission
from submission.averaging import TailAverage

POINT = {
    "kfac_approx": "reduce", "update_rule": "nesterov", "learning_rate": 0.05, "dropout_rate": 0.0,
    "factor_update_steps": 2, "inverse_update_steps": 2,
}  # fmt: skip


def test_a_share_of_one_is_the_mean_of_all_steps_and_less_forgets_the_first():
    model = nn.Linear(1, 1, bias=False)
    mean, tail = TailAverage(model, 1.0), TailAverage(model, 0.1)
    for step in range(1, 1001):
        model.weight.data.fill_(step)
        mean.take_in(model, step)
        tail.take_in(model, step)
    for average, expected in ((mean, 500.5), (tail, 1000 * 10 / 11)):
        average.put_in(model)
        assert model.weight.item() == pytest.approx(expected, rel=2e-3)
        average.take_out(model)
        assert model.weight.item() == 1000


def test_running_statistics_are_averaged_and_counters_are_not():
    model = nn.BatchNorm1d(2)
    average = TailAverage(model, 1.0)
    for step in range(1, 5):
        model.running_mean.fill_(step)
        model.num_batches_tracked.fill_(step)
        average.take_in(model, step)
    average.put_in(model)
    assert model.running_mean.tolist() == pytest.approx([2.5, 2.5])
    assert model.num_batches_tracked == 4


def train(state, model, numbers, point, evaluate_at=()):
    workload = GraphWorkload()
    for t in numbers:
        state, model, _ = submission.update_params(
            workload, model, None, None, point, graph_batch([3, 1, 4], [4, 0, 6], seed=t),
            workload.loss_type, state, [], t, [t, 1],
        )  # fmt: skip
        if t in evaluate_at:
            submission.prepare_for_eval(
                workload, model, None, None, point, workload.loss_type, state, [], t + 1, [t, 2]
            )
    return {name: value.clone() for name, value in model.state_dict().items()}


def begin(point):
    torch.manual_seed(0)
    model = GraphNet()
    state = submission.init_optimizer_state(GraphWorkload(), model, None, point, [0, 0])
    return state, model


def test_training_does_not_notice_evaluations_and_a_resumed_run_goes_on_to_the_bit():
    plain = train(*begin(POINT), range(10), POINT)
    point = {**POINT, "average_share": 0.5}
    averaged = train(*begin(point), range(10), point, evaluate_at=(2, 3, 6))
    state, model = begin(point)
    evaluated = train(state, model, range(7), point, evaluate_at=(2, 3, 6))
    saved = io.BytesIO()
    torch.save({key: value.state_dict() for key, value in state.items()}, saved)
    parameters = copy.deepcopy(model.state_dict())
    saved.seek(0)

    state, model = begin(point)
    model.load_state_dict(parameters)
    for key, value in torch.load(saved, weights_only=True).items():
        state[key].load_state_dict(value)
    resumed = train(state, model, range(7, 10), point)
    assert any(not torch.equal(evaluated[name], plain[name]) for name in plain)
    for name, value in plain.items():
        assert torch.equal(averaged[name], value)
        assert torch.equal(resumed[name], value)


def test_the_evaluated_parameters_are_the_average():
    point = {**POINT, "average_share": 1.0}
    passed = [train(*begin(POINT), range(t + 1), POINT) for t in range(4)]
    state, model = begin(point)
    evaluated = train(state, model, range(4), point, evaluate_at=(3,))
    for name, value in evaluated.items():
        torch.testing.assert_close(value, torch.stack([one[name] for one in passed]).mean(0))
