"""Inverses that are made in the background: the same ones, a step later."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from submission.kfac import KFAC as Preconditioner
from submission.kfac import KFACConfig, renewal


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
        self.model, self.kfac = model, Preconditioner(model, KFACConfig(**{**settings, **options}))

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


def test_a_state_is_loaded_whatever_the_background_does(monkeypatch, caplog):
    training, data = Training(net(), background_inverses=True), batches(4)
    training.step(*data[0])
    saved = copy.deepcopy(training.kfac.state_dict())
    training.step(*data[1])

    def wrong(*args):
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(renewal, "invert_all", wrong)
        training.step(*data[2])
        training.kfac.load_state_dict(saved)
    assert "not needed any more" in caplog.text
    assert_same(training.inverses(), saved["inverses"])
    training.step(*data[3])


def test_after_an_error_inverses_are_made_again(monkeypatch):
    training, data = Training(net()), batches(3)
    training.step(*data[0])
    training.kfac.damping = 0.5
    before = training.inverses()

    def wrong(*args):
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(renewal, "invert_all", wrong)
        with pytest.raises(ZeroDivisionError):
            training.step(*data[1])
    training.step(*data[2])
    now = training.inverses()["0"]
    assert any(not torch.equal(value, before["0"][key]) for key, value in now.items())


def test_corrected_eigenvalues_are_of_the_basis_in_use():
    options = {"damping_kind": "exact", "eigenvalue_correction": True, "background_inverses": True}
    training = Training(net(), **options)
    for x, y in batches(5):
        training.step(x, y)
        assert "corrected" in training.inverses()["0"]


def test_a_state_with_another_seed_stops_to_wait_for_a_loss():
    options = {"fisher_type": "empirical"}
    training, other = Training(net(), **options), Training(net(), seed=5, **options)
    x, y = batches(1)[0]
    saved = copy.deepcopy(other.kfac.state_dict())
    with training.kfac.record():
        logits = training.model(x)
    loss = F.cross_entropy(logits, y)
    training.kfac.update(logits, "categorical", targets=y, loss=loss)
    assert training.kfac._statistics.waits_for_loss
    training.kfac.load_state_dict(saved)
    loss.backward()
    assert not training.kfac._statistics.waits_for_loss
    assert not training.kfac._statistics.is_begun
    assert training.kfac.config.seed == training.kfac._statistics.config.seed == 5
