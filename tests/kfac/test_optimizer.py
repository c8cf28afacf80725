"""KFAC as an optimizer: against steps that are computed from the curvature it shows."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from submission.kfac import KFAC, KFACConfig, Preconditioner

SETTINGS = {
    "kfac_approx": "expand", "fisher_type": "type-2", "damping": 0.1, "damping_kind": "exact",
    "factor_decay": 0.5, "factor_update_steps": 1, "inverse_update_steps": 1,
}  # fmt: skip


def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def batch(step=0):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 4, generator=generator), torch.randint(3, (8,), generator=generator)


def sgd(lr=0.1, **options):
    return lambda groups: torch.optim.SGD(groups, lr=lr, **options)


def backward(model, optimizer, step=0):
    x, y = batch(step)
    optimizer.zero_grad()
    with optimizer.record():
        loss = F.cross_entropy(model(x), y)
    loss.backward()
    return loss


def train(model, optimizer, steps, first=0):
    for step in range(first, first + steps):
        backward(model, optimizer, step)
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def assert_same_parameters(model, other):
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


def preconditioned_gradients(model, **settings):
    """Of the first step, without an optimizer."""
    copied = copy.deepcopy(model)
    kfac = Preconditioner(copied, KFACConfig(**settings))
    x, y = batch()
    with kfac.record():
        loss = F.cross_entropy(copied(x), y)
    loss.backward()
    kfac.precondition()
    return [p.grad for p in copied.parameters()]


def test_with_sgd_a_step_goes_along_the_solution_of_the_damped_system():
    model = net()
    optimizer = KFAC(model, base=sgd(0.1), **SETTINGS)
    before = [p.detach().clone() for p in model.parameters()]
    backward(model, optimizer)
    plain = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    for i, name in enumerate(("0", "2")):
        joint = torch.cat([plain[2 * i], plain[2 * i + 1][:, None]], 1)
        dense = optimizer.curvature()[name].to_dense()
        step = torch.linalg.solve(dense + 0.1 * torch.eye(len(dense)), joint.flatten())
        step = step.view_as(joint)
        weight, bias = model.get_submodule(name).parameters()
        torch.testing.assert_close(weight, before[2 * i] - 0.1 * step[:, :-1])
        torch.testing.assert_close(bias, before[2 * i + 1] - 0.1 * step[:, -1])


def test_groups_have_learning_rates_and_weight_decays_of_their_own():
    model = net()
    rule = {"direction": "eigenbasis_polar", "damping_kind": "exact", "kfac_approx": "expand"}
    directions = preconditioned_gradients(model, **rule, fisher_type="type-2")
    before = [p.detach().clone() for p in model.parameters()]
    groups = [
        {"params": model[0].parameters(), "lr": 0.01},
        {"params": model[2].parameters(), "weight_decay": 0.5},
    ]
    optimizer = KFAC(
        model, lr=0.02, groups=groups, weight_decay=0.1, kfac_approx="expand", fisher_type="type-2"
    )
    train(model, optimizer, 1)
    factors = [(0.01, 0.1), (0.01, 0.1), (0.02, 0.5), (0.02, 0.5)]
    for p, old, direction, (lr, decay) in zip(
        model.parameters(), before, directions, factors, strict=True
    ):
        torch.testing.assert_close(p, (1 - lr * decay) * old - lr * direction)


@pytest.mark.parametrize("base", [None, sgd(0.3, momentum=0.9)], ids=["Adam", "SGD"])
def test_a_scheduler_sets_the_learning_rate(base):
    model = net()
    optimizer = KFAC(model, base=base, **{} if base is None else SETTINGS)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step == 0))
    train(model, optimizer, 1)
    scheduler.step()  # to zero
    before = [p.detach().clone() for p in model.parameters()]
    after = train(model, optimizer, 2, first=1)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_closure_is_a_step_like_any_other():
    model, other = net(), net()
    optimizer, reference = KFAC(model, lr=0.01), KFAC(other, lr=0.01)
    for step in range(3):
        with torch.no_grad():
            loss = optimizer.step(lambda step=step: backward(model, optimizer, step))
        expected = backward(other, reference, step)
        reference.step()
        torch.testing.assert_close(loss, expected)
    assert_same_parameters(model, other)


def test_hooks_of_a_step_are_called():
    model, seen = net(), []
    optimizer = KFAC(model, lr=0.01)
    optimizer.register_step_pre_hook(lambda *args: seen.append("before"))
    optimizer.register_step_post_hook(lambda *args: seen.append("after"))
    train(model, optimizer, 2)
    assert seen == ["before", "after"] * 2


def test_a_scaled_loss_gives_the_step_of_the_plain_one():
    model, plain = net(), net()
    # The scaler's test for faults needs float32.
    model, plain = model.float(), plain.float()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer, reference = (
        KFAC(m, base=sgd(), **{**SETTINGS, "fisher_type": "empirical"}) for m in (model, plain)
    )
    for step in range(3):
        x, y = batch(step)
        optimizer.zero_grad()
        with optimizer.record():
            loss = F.cross_entropy(model(x.float()), y)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        reference.zero_grad()
        with reference.record():
            loss = F.cross_entropy(plain(x.float()), y)
        loss.backward()
        reference.step()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("base", [None, sgd(0.1, momentum=0.9)], ids=["Adam", "SGD"])
def test_a_run_goes_on_from_its_state_as_if_it_had_not_stopped(base, tmp_path):
    settings = {} if base is None else SETTINGS
    model = net()
    optimizer = KFAC(model, base=base, **settings)
    optimizer.param_groups[0]["lr"] = 0.02  # as a scheduler would
    train(model, optimizer, 3)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "s")
    saved = torch.load(tmp_path / "s", weights_only=True)
    other = net()
    other.load_state_dict(saved["model"])
    resumed = KFAC(other, base=base, **settings)
    resumed.load_state_dict(saved["optimizer"])
    assert resumed.param_groups[0]["lr"] == 0.02
    train(model, optimizer, 4, first=3)
    train(other, resumed, 4, first=3)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
    wrong = KFAC(net(), base=sgd() if base is None else None)
    with pytest.raises(ValueError, match="another update rule"):
        wrong.load_state_dict(saved["optimizer"])


def test_wide_layers_keep_the_diagonal_of_their_factor_unless_asked_otherwise():
    for settings, diagonal in (({}, True), ({"max_factor_side": 4096}, False)):
        model = nn.Linear(2500, 2)
        optimizer = KFAC(model, lr=1e-3, **settings)
        with optimizer.record():
            F.cross_entropy(model(torch.randn(4, 2500)), torch.tensor([0, 1, 0, 1]))
        (row,) = optimizer.report()
        assert row.sides.startswith("diag 2501" if diagonal else "2501")


def test_pairs_of_names_and_parameters_are_a_model():
    model, other = net(), net()
    optimizer, named = KFAC(model, lr=0.01), KFAC(list(other.named_parameters()), lr=0.01)
    train(model, optimizer, 3)
    train(other, named, 3)
    assert_same_parameters(model, other)
    assert named.curvature().keys() == optimizer.curvature().keys() == {"0", "2"}


def test_parameters_that_thaw_are_added_as_a_group():
    model = net()
    model[0].requires_grad_(False)
    optimizer = KFAC(model, lr=0.01)
    frozen = model[0].weight.detach().clone()
    train(model, optimizer, 2)
    assert torch.equal(model[0].weight, frozen)
    model[0].requires_grad_(True)
    optimizer.add_param_group({"params": model[0].parameters(), "lr": 0.05})
    train(model, optimizer, 2, first=2)
    assert optimizer.curvature().keys() == {"0", "2"}
    assert not torch.equal(model[0].weight, frozen)


def test_training_lowers_the_loss():
    model = net()
    optimizer = KFAC(model, lr=0.05)
    first = float(backward(model, optimizer))
    for _ in range(40):
        loss = float(backward(model, optimizer))
        optimizer.step()
    assert loss < 0.2 * first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must be at least 0"),
        ({"lr": math.nan}, "lr must be at least 0"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0"),
        ({"weight_decay": 0.1, "base": sgd()}, "weight_decay belongs to the base optimizer"),
        ({"lr": 0.1, "base": sgd()}, "lr belongs to the base optimizer: give it there"),
        ({"damping": 0.1}, "damping has no part in direction 'eigenbasis_polar'.*without `base`"),
        ({"betas": (0.9, 0.9), "base": sgd()}, "betas has no part in direction 'preconditioned'"),
        ({"momentum": 0.9}, "momentum.*the settings are kfac_approx"),
        ({"damping": 0.0}, "damping must be positive"),
        ({"groups": [{"params": []}]}, "no parameter group has"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        KFAC(net(), **options)


def test_parameters_without_names_or_of_another_model_are_refused():
    with pytest.raises(ValueError, match=r"\(name, parameter\) pairs"):
        KFAC(net().parameters())
    model = net()
    groups = [{"params": [*model.parameters(), nn.Parameter(torch.zeros(2))]}]
    with pytest.raises(ValueError, match="not one of the model's"):
        KFAC(model, groups=groups)


def test_a_step_that_was_not_recorded_is_refused():
    model = net()
    optimizer = KFAC(model)
    x, y = batch()
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(RuntimeError, match="was not recorded"):
        optimizer.step()
    with optimizer.record():
        logits = model(x)
    F.cross_entropy(logits, y).backward()
    with pytest.raises(RuntimeError, match="no loss is known"):
        optimizer.step()


def test_the_learning_rate_is_that_of_the_base():
    model = net()
    optimizer = KFAC(model, base=sgd(0.5, weight_decay=0.1), **SETTINGS)
    assert optimizer.param_groups is optimizer.base.param_groups
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.5, 0.1)]
    assert [g["lr"] for g in KFAC(net()).param_groups] == [1e-3]
    groups = [{"params": model[0].parameters(), "lr": 0.2}, {"params": model[2].parameters()}]
    optimizer = KFAC(model, base=sgd(0.5), groups=groups, **SETTINGS)
    assert [g["lr"] for g in optimizer.param_groups] == [0.2, 0.5]


def test_a_layer_that_was_replaced_is_not_left_out_without_a_word():
    model = net()
    optimizer = KFAC(model, lr=0.01)
    model[2] = nn.Linear(model[2].in_features, 3)
    backward(model, optimizer)
    with pytest.raises(ValueError, match=r"no parameter group has \['2.weight', '2.bias'\].*repla"):
        optimizer.step()
    optimizer.add_param_group({"params": model[2].parameters()})
    before = model[2].weight.detach().clone()
    optimizer.step()
    assert not torch.equal(model[2].weight, before)


@pytest.mark.parametrize("base", [None, lambda groups: torch.optim.SGD(groups, lr=0.1)])
def test_a_group_of_another_models_parameters_is_not_added(base):
    model = net()
    optimizer = KFAC(model, base=base)
    with pytest.raises(ValueError, match="not one of the model's"):
        optimizer.add_param_group({"params": net()[0].parameters()})
    assert len(optimizer.param_groups) == 1
    backward(model, optimizer)
    optimizer.step()


def test_what_belongs_behind_record_says_so():
    model = net()
    optimizer, (x, y) = KFAC(model, lr=0.01), batch()

    def inside(step):
        with optimizer.record():
            F.cross_entropy(model(x), y).backward()
            step()

    with pytest.raises(RuntimeError, match="belong the forward pass and the loss alone"):
        inside(lambda: None)
    with pytest.raises(RuntimeError, match="the step ends inside"):
        inside(optimizer.step)
    backward(model, optimizer)
    optimizer.step()
