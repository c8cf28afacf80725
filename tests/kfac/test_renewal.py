"""Inverses that are renewed in turns: each block once in an interval."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from submission.kfac import KFACConfig, Preconditioner
from submission.kfac.linalg import tree
from submission.kfac.ranks import collectives
from submission.kfac.ranks.placement import owners, turns_of
from submission.kfac.updates.directions import EigenbasisAdam

RULES = [
    {"damping_kind": "pi"},
    {"damping_kind": "pi", "factor_decay": 0.0},  # whose factors may stay a few rows
    {"damping_kind": "both_factors"},
    {"damping_kind": "exact"},
    {"damping_kind": "exact", "direction": "eigenbasis_adam"},
    {"damping_kind": "exact", "direction": "eigenbasis_polar"},
]


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def net():
    torch.manual_seed(0)
    layers = [nn.Linear(6, 6) for _ in range(5)]
    return nn.Sequential(*layers, nn.LayerNorm(6), nn.Linear(6, 9), nn.Linear(9, 3))


def preconditioner(model, **settings):
    return Preconditioner(
        model,
        KFACConfig(**{
            "fisher_type": "empirical", "factor_update_steps": 2, "inverse_update_steps": 4,
            "factor_decay": 0.5, "damping": 0.1, "renewal": "in_turns", **settings,
        }),
    )  # fmt: skip


def train(model, kfac, steps, after=None):
    for t in steps:
        generator = torch.Generator().manual_seed(t)
        x = torch.randn(16, 6, generator=generator)
        y = torch.randint(3, (16,), generator=generator)
        model.zero_grad()
        with kfac.record():
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        kfac.precondition()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.01 * p.grad
        if after is not None:
            after(t)


def tensors_of(kfac):
    """Name of a block with an inverse -> a copy of the inverse's tensors."""
    return {
        name: torch.cat([tensor.flatten() for tensor in tree.leaves(own.inverse).values()])
        for name, own in kfac.state.blocks.items()
        if own.inverse is not None
    }


@pytest.mark.parametrize("rule", RULES)
def test_every_block_is_renewed_once_in_an_interval(rule):
    model = net()
    kfac = preconditioner(model, **rule)
    before, changed = {}, {}

    def look(t):
        now = tensors_of(kfac)
        changed[t] = {n for n in now if n not in before or not torch.equal(now[n], before[n])}
        before.update(now)

    train(model, kfac, range(12), look)
    blocks = set(before)
    assert changed[0] == changed[1] == changed[2] == blocks  # the first interval's updates
    assert not changed[3]
    for first in (4, 8):
        some = [changed[t] for t in range(first, first + 4)]
        assert set().union(*some) == blocks
        assert sum(map(len, some)) == len(blocks)
        assert all(some)


@pytest.mark.parametrize("rule", RULES)
def test_its_inverses_are_those_of_the_averages_of_that_step(rule, monkeypatch):
    monkeypatch.setattr(EigenbasisAdam, "follows_basis", False)  # a basis from scratch
    model = net()
    kfac = preconditioner(model, **rule)
    train(model, kfac, range(7))
    now = tensors_of(kfac)
    renewed = [name for name in now if kfac._seen.turns[name] == 6 % 4]
    again = copy.deepcopy(kfac)  # all anew, from the averages of step 6
    again._state.inverses_stale = True
    again.refresh()
    everything = tensors_of(again)
    assert renewed
    for name in renewed:
        torch.testing.assert_close(now[name], everything[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("at", [5, 6])
def test_a_run_goes_on_bit_for_bit(rule, at):
    model = net()
    kfac = preconditioner(model, **rule)
    train(model, kfac, range(at))
    saved, parameters = copy.deepcopy(kfac.state_dict()), copy.deepcopy(model.state_dict())
    train(model, kfac, range(at, 11))
    other = net()
    other.load_state_dict(parameters)
    again = preconditioner(other, **rule)
    again.load_state_dict(saved)
    train(other, again, range(at, 11))
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])


@pytest.mark.parametrize("renewal", ["together", "in_turns"])
def test_renewed_inverses_are_written_where_the_old_ones_were(renewal):
    model = net()
    kfac = preconditioner(model, damping_kind="exact", direction="eigenbasis_adam", renewal=renewal)
    train(model, kfac, range(5))

    def places():
        return {
            (name, which): tensor.data_ptr()
            for name, own in kfac.state.blocks.items()
            if own.inverse is not None and own.moments is not None
            for which, tensor in enumerate((own.inverse.eigenbasis().a, own.moments.first))
            if tensor is not None
        }  # fmt: skip

    before, rule = places(), kfac._rule
    train(model, kfac, range(5, 14))
    assert before
    assert places() == before
    assert kfac._rule is rule


def test_the_steps_of_an_interval_cost_about_the_same_on_each_rank(monkeypatch):
    costs = {f"{i}": float(1 + i % 7) for i in range(90)}
    turns = turns_of(costs, 5)
    monkeypatch.setattr(collectives, "world_size", lambda: 3)
    for given in (turns, None):
        owner = owners(costs, "exchanged", given)
        loads = [
            sum(c for n, c in costs.items() if owner[n] == rank and (given or turns)[n] == step)
            for step in range(5)
            for rank in range(3)
        ]
        assert given is None or max(loads) <= 1.2 * min(loads)
        totals = [sum(c for name, c in costs.items() if owner[name] == rank) for rank in range(3)]
        assert max(totals) <= 1.05 * min(totals)


def test_the_eigenvalue_correction_needs_all_at_once():
    with pytest.raises(ValueError, match="needs renewal 'together'"):
        KFACConfig(eigenvalue_correction=True, damping_kind="exact", renewal="in_turns")
