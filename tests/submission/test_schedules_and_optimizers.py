"""Schedules and update rules against their definitions."""

import copy
import math

import pytest
import torch
from torch import nn

from submission.optimizers import NAdamW
from submission.schedules import ScheduleShape, schedule_shape, warmup_cosine, warmup_linear

DEFAULTS = {
    "step_hint": 80_000, "training_steps": None, "step_hint_factor": 0.75, "warmup_steps": 3000,
    "warmup_fraction": 0.05, "schedule_factor": 1.0, "decay_steps_factor": 0.861509027839639,
    "end_factor": 0.001,
}  # fmt: skip


def test_linear_schedule_of_the_ogbg_reference():
    shape = schedule_shape(**DEFAULTS)
    assert (shape.total, shape.warmup) == (60_000, 3000)
    assert warmup_linear(0, shape) == 0
    assert warmup_linear(1500, shape) == 0.5
    assert warmup_linear(3000, shape) == 1
    decay_steps = int(57_000 * 0.861509027839639)
    assert warmup_linear(3000 + decay_steps // 2, shape) == pytest.approx(0.5005, abs=1e-4)
    assert warmup_linear(3000 + decay_steps, shape) == pytest.approx(0.001)
    assert warmup_linear(10**6, shape) == pytest.approx(0.001)


def test_the_second_factor_shortens_warm_up_and_schedule():
    shape = schedule_shape(**{**DEFAULTS, "schedule_factor": 0.75})
    assert (shape.total, shape.warmup) == (45_000, 2250)


def test_absolute_length_wins_over_the_step_hint():
    shape = schedule_shape(**{**DEFAULTS, "training_steps": 1000, "warmup_steps": None})
    assert (shape.total, shape.warmup) == (1000, 50)


def test_cosine_schedule():
    shape = ScheduleShape(110, 10)
    assert [warmup_cosine(s, shape) for s in (0, 5, 10)] == [0, 0.5, 1]
    assert warmup_cosine(35, shape) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert warmup_cosine(110, shape) == pytest.approx(0)
    assert warmup_cosine(500, shape) == pytest.approx(0)


def test_a_warm_up_that_does_not_fit():
    with pytest.raises(ValueError, match="does not fit into a schedule of 2250 steps"):
        schedule_shape(**{**DEFAULTS, "step_hint": 3000})


def nadamw_by_definition(parameters, grads, lr, beta1, beta2, eps, weight_decay):
    """A plain loop over steps and parameters."""
    parameters = [p.clone() for p in parameters]
    m = [torch.zeros_like(p) for p in parameters]
    v = [torch.zeros_like(p) for p in parameters]
    for t, step in enumerate(grads, 1):
        for i, g in enumerate(step):
            m[i] = beta1 * m[i] + (1 - beta1) * g
            v[i] = beta2 * v[i] + (1 - beta2) * g * g
            ahead = (beta1 * m[i] + (1 - beta1) * g) / (1 - beta1**t)
            parameters[i] = parameters[i] * (1 - lr * weight_decay)
            parameters[i] = parameters[i] - lr * ahead / ((v[i] / (1 - beta2**t)).sqrt() + eps)
    return parameters


def test_nadamw_follows_its_definition():
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(3, 2).double()), nn.Parameter(torch.randn(4).double())]
    grads = [[torch.randn_like(p) for p in parameters] for _ in range(5)]
    expected = nadamw_by_definition(
        [p.detach() for p in parameters], grads, 0.01, 0.8, 0.95, 1e-6, 0.1
    )
    optimizer = NAdamW(parameters, lr=0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    for step in grads:
        for p, g in zip(parameters, step, strict=True):
            p.grad = g
        optimizer.step()
    for p, e in zip(parameters, expected, strict=True):
        torch.testing.assert_close(p.detach(), e)


def test_nadamw_resumes_and_starts_late_parameters_at_their_first_gradient():
    torch.manual_seed(0)
    first, late = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3))
    optimizer = NAdamW([first, late], lr=0.1)
    first.grad = torch.ones(3)
    optimizer.step()
    unchanged = late.detach().clone()
    assert torch.equal(late, unchanged)
    saved = copy.deepcopy(optimizer.state_dict())
    others = [nn.Parameter(p.detach().clone()) for p in (first, late)]
    resumed = NAdamW(others, lr=0.1)
    resumed.load_state_dict(saved)
    for group in ((first, late), others):
        for p in group:
            p.grad = torch.ones(3)
    optimizer.step()
    resumed.step()
    for p, q in zip((first, late), others, strict=True):
        assert torch.equal(p, q)
    # First step: the moment looks ahead, (0.9 · 0.1 + 0.1) / (1 - 0.9) = 1.9 times a sign.
    torch.testing.assert_close(late.detach(), unchanged - 0.19)


def test_nadamw_refuses_closures():
    with pytest.raises(ValueError, match="no closure"):
        NAdamW([nn.Parameter(torch.ones(1))]).step(lambda: 0.0)
