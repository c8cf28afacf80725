"""Recording leaves no trace, and copes with what real models do to activations."""

import copy

import pytest
import torch
from nets import Mean
from torch import nn

from submission.kfac import KFACConfig, Preconditioner, curvature, kronecker_factors


def net(inplace=False):
    return nn.Sequential(
        nn.Linear(4, 6), nn.ReLU(inplace), nn.Linear(6, 5), nn.LayerNorm(5), nn.ReLU(inplace),
        nn.Linear(5, 3),
    )  # fmt: skip


def snapshot(model):
    hooks = [
        (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
        for m in model.modules()
    ]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    flags = [(m.training) for m in model.modules()]
    needs = [p.requires_grad for p in model.parameters()]
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    return hooks, state, flags, needs, grads


def assert_same(before, after):
    assert before[0] == after[0]
    assert before[1].keys() == after[1].keys()
    assert all(torch.equal(before[1][k], after[1][k]) for k in before[1])
    assert before[2:4] == after[2:4]
    for a, b in zip(before[4], after[4], strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("with_gradients", [True, False])
def test_kronecker_factors_change_nothing(training, with_gradients):
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Dropout(0.3),
        nn.Linear(16, 3),
    ).train(training)  # fmt: skip
    x = torch.randn(5, 2, 4, 4)
    if with_gradients:
        model(x).sum().backward()
    before, rng = snapshot(model), torch.get_rng_state()
    kronecker_factors(model, x, likelihood="categorical", kfac_approx="reduce")
    assert_same(before, snapshot(model))
    assert torch.equal(rng, torch.get_rng_state())


def test_the_gradient_is_the_same_with_and_without_recording():
    model, x = net(inplace=True), torch.randn(7, 4)
    reference = copy.deepcopy(model)
    reference(x).square().mean().backward()
    kfac = Preconditioner(model, KFACConfig(factor_update_steps=1, inverse_update_steps=1))
    rng = torch.get_rng_state()
    with kfac.record():
        logits = model(x)
    kfac.update(logits, "gaussian")
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(rng, torch.get_rng_state())
    logits.square().mean().backward()
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-14, atol=0)


@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
@pytest.mark.parametrize("shape", [(7, 4), (7, 2, 4)])
def test_in_place_activations_give_the_same_factors(kfac_approx, shape):
    model, x = net(), torch.randn(shape)
    in_place = net(inplace=True)
    in_place.load_state_dict(model.state_dict())
    options = {"likelihood": "categorical", "kfac_approx": kfac_approx, "fisher_type": "type-2"}
    expected = curvature(model, x, **options)
    for name, block in curvature(in_place, x, **options).items():
        for field, value in vars(expected[name]).items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(getattr(block, field), value, rtol=1e-13, atol=1e-15)


def test_hooks_are_gone_after_an_error_in_the_forward_pass():
    model = net()
    kfac = Preconditioner(model)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="mat1 and mat2"), kfac.record():
        model(torch.randn(3, 5))
    assert_same(before, snapshot(model))
    with pytest.raises(RuntimeError, match="was not recorded"):
        kfac.update(torch.randn(3, 3), "categorical")


def test_steps_without_updates_record_nothing():
    model = net()
    kfac = Preconditioner(model, KFACConfig(factor_update_steps=2, inverse_update_steps=2))
    seen = []
    for _ in range(4):
        with kfac.record():
            seen.append(torch._C._len_torch_function_stack() > 0)
            logits = model(torch.randn(3, 4))
        kfac.update(logits, "categorical")
        logits.sum().backward()
        kfac.precondition()
    assert seen == [True, True, True, False]  # 0, 1 (early), 2, 3


def test_layers_that_are_used_functionally_are_layers_all_the_same():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.used = nn.Linear(4, 3)
            self.borrowed = nn.Linear(3, 3)

        def forward(self, x):
            return self.used(x) @ self.borrowed.weight.T + self.borrowed.bias

    model, x = Functional(), torch.randn(6, 4)
    options = {"likelihood": "gaussian", "kfac_approx": "expand", "fisher_type": "type-2"}
    blocks = curvature(model, x, **options)
    assert list(blocks) == ["used", "borrowed"]
    plain = nn.Sequential(model.used, model.borrowed)
    for block, expected in zip(
        blocks.values(), curvature(plain, x, **options).values(), strict=True
    ):
        torch.testing.assert_close(block.input_covariance, expected.input_covariance)
        torch.testing.assert_close(block.gradient_covariance, expected.gradient_covariance)


def test_unused_outputs_and_frozen_layers():
    model = nn.Sequential(nn.Linear(4, 3), Mean(), nn.Linear(3, 2))
    model[0].requires_grad_(False)
    blocks = curvature(model, torch.randn(5, 2, 4), likelihood="gaussian", kfac_approx="reduce")
    assert set(blocks) == {"2"}


def test_a_thousand_updates_leave_memory_flat():
    model, x = net(inplace=True), torch.randn(7, 4)
    kfac = Preconditioner(
        model, KFACConfig(factor_update_steps=1, inverse_update_steps=1, factor_decay=0.9)
    )

    def step():
        with kfac.record():
            logits = model(x)
        kfac.update(logits, "categorical")
        logits.sum().backward()
        kfac.precondition()

    import gc

    def tensors():
        gc.collect()
        return sum(1 for o in gc.get_objects() if isinstance(o, torch.Tensor))

    for _ in range(10):
        step()
    before = tensors()
    for _ in range(1000):
        step()
    assert tensors() <= before


def test_would_be_gradients_of_half_precision_keep_their_digits():
    """Of a large batch whose labels are almost certain."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).half()
    x = torch.randn(4096, 4).half()
    with torch.no_grad():
        model[2].bias.copy_(torch.tensor([9.0, 0.0, 0.0]))
    options = {"likelihood": "categorical", "kfac_approx": "expand", "fisher_type": "type-2"}
    exact = kronecker_factors(copy.deepcopy(model).double(), x.double(), **options)
    for name, block in kronecker_factors(model, x, **options).items():
        truth = exact[name].gradient_covariance
        assert (block.gradient_covariance - truth).norm() < 0.02 * truth.norm()
