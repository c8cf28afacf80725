"""Inverses that are made in the background: the same ones, a step later."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from submission.kfac import KFAC, KFACConfig, renewal


def net():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 3))


class Training:
    def __init__(self, model, **options):
        settings = {
            "factor_update_steps": 1,
            "inverse_update_steps": 2,
            "early_updates": False,
            "factor_decay": 0.9,
            "damping": 0.1,
        }
        self.model, self.kfac = model, KFAC(model, KFACConfig(**{**settings, **options}))

    def step(self, x, y, learning_rate=0.1):
        self.model.zero_grad()
        with self.kfac.record():
            logits = self.model(x)
        self.kfac.update(logits, "categorical")
        F.cross_entropy(logits, y).backward()
        self.kfac.precondition()
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter -= learning_rate * parameter.grad

    def inverses(self):
        """What is in use now; `state_dict` would wait for what is under way."""
        return copy.deepcopy(self.kfac._state.inverses)

    def values(self):
        return [parameter.detach().clone() for parameter in self.model.parameters()]


def batches(count):
    return [(torch.randn(9, 4), torch.randint(3, (9,))) for _ in range(count)]


def assert_same(inverses, others):
    assert inverses.keys() == others.keys()
    for name, inverse in inverses.items():
        assert inverse.keys() == others[name].keys()
        for key, value in inverse.items():
            assert torch.equal(value, others[name][key]), (name, key)


@pytest.mark.parametrize("damping_kind", ["both_factors", "exact"])
@pytest.mark.parametrize("every", [1, 2])
def test_inverses_come_into_use_one_step_later(every, damping_kind):
    model = net()
    at_once = Training(copy.deepcopy(model), inverse_update_steps=every, damping_kind=damping_kind)
    later = Training(
        model, inverse_update_steps=every, damping_kind=damping_kind, background_inverses=True
    )
    history = []
    for step, (x, y) in enumerate(batches(6)):
        for training in (at_once, later):
            training.step(x, y, learning_rate=0.0)
        history.append(at_once.inverses())
        assert_same(later.inverses(), history[max(0, step - 1)])
        gradients = [p.grad for p in later.model.parameters()]
        assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize(
    "options", [{}, {"direction": "eigenbasis_adam", "damping_kind": "exact"}], ids=str
)
@pytest.mark.parametrize("steps", [2, 3])
def test_a_checkpoint_waits_and_a_resumed_run_goes_on_the_same(steps, options):
    data = batches(7)
    whole = Training(net(), background_inverses=True, **options)
    broken = Training(copy.deepcopy(whole.model), background_inverses=True, **options)
    for x, y in data[:steps]:
        whole.step(x, y)
        broken.step(x, y)
    resumed = Training(copy.deepcopy(broken.model), background_inverses=True, **options)
    resumed.kfac.load_state_dict(copy.deepcopy(broken.kfac.state_dict()))
    for x, y in data[steps:]:
        whole.step(x, y)
        resumed.step(x, y)
    assert all(map(torch.equal, whole.values(), resumed.values()))


def test_it_is_another_thread_that_makes_them(monkeypatch):
    seen = []

    def watched(*args):
        seen.append(threading.current_thread() is threading.main_thread())
        return invert_all(*args)

    invert_all = renewal.invert_all
    monkeypatch.setattr(renewal, "invert_all", watched)
    training = Training(net(), background_inverses=True)
    for x, y in batches(4):
        training.step(x, y)
    training.kfac.state_dict()
    assert seen == [True, False]  # there are none before the first


def test_what_fails_in_the_background_is_counted_in_the_next_step(monkeypatch):
    training, data = Training(net(), background_inverses=True), batches(5)
    for x, y in data[:2]:
        training.step(x, y)
    before = training.inverses()

    def out(*args, **options):
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(torch.linalg, "cholesky_ex", out)
    training.step(*data[2])
    assert training.kfac.failures["inverse"] == 0
    training.step(*data[3])
    assert training.kfac.failures["inverse"] == 1
    for name in ("0", "3"):
        assert_same({name: training.inverses()[name]}, {name: before[name]})


def test_an_error_in_the_background_is_raised_in_the_next_step(monkeypatch):
    training, data = Training(net(), background_inverses=True), batches(4)
    for x, y in data[:2]:
        training.step(x, y)

    def wrong(*args):
        raise ZeroDivisionError

    monkeypatch.setattr(renewal, "invert_all", wrong)
    training.step(*data[2])
    with pytest.raises(ZeroDivisionError):
        training.step(*data[3])


def test_parts_that_change_meanwhile_get_new_inverses():
    training, data = Training(net(), background_inverses=True), batches(6)
    for x, y in data[:3]:
        training.step(x, y)
    training.model[0].requires_grad_(False)
    training.step(*data[3])
    assert set(training.inverses()) == {"2", "3"}
    training.model[0].requires_grad_(True)
    training.step(*data[4])
    assert set(training.inverses()) == {"0", "2", "3"}
    assert training.kfac.failures == {"statistics": 0, "inverse": 0, "memory": 0}
