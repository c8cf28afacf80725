"""Inverses shared out over ranks, and ranks that do not see the same: two real processes."""

import logging
import logging.handlers
import tempfile
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from observed import NoMemoryFor, curvature_tensors, live_bytes
from processes import joined
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from submission.kfac import KFACConfig, Preconditioner
from submission.kfac.ranks.collectives import Reduction, all_reduce_sums, assign, broadcast_all

KINDS = ["pi", "exact"]
PLACEMENTS = ["every_rank", "exchanged", "one_rank"]


class Net(nn.Module):
    """Dense and diagonal factors, groups, a norm and a bare parameter."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.conv = nn.Conv1d(4, 6, 2, groups=2)
        self.norm = nn.LayerNorm(6)
        self.wide = nn.Linear(6, 9)
        self.last = nn.Linear(9, 3)
        self.scale = nn.Parameter(torch.ones(3))
        self.with_wide = True

    def forward(self, x):
        x = self.norm(self.conv(x).mean(-1))
        x = (self.wide(x) if self.with_wide else torch.cat([x, x[:, :3]], 1)).tanh()
        return self.scale * self.last(x)


def data(step, rank=None):
    x = torch.randn(6, 4, 5, generator=torch.Generator().manual_seed(step))
    return x if rank is None else x[:2] if rank == 0 else x[2:]


def train(model, settings, steps, rank=None, before=None, kfac=None):
    kfac = kfac or Preconditioner(
        model,
        KFACConfig(**{
            "fisher_type": "type-2", "factor_update_steps": 2, "inverse_update_steps": 4,
            "factor_decay": 0.5, "max_factor_side": 9, **settings,
        }),
    )  # fmt: skip
    for t in steps:
        if before is not None:
            before(model, kfac, t)
        with kfac.record():
            out = model(data(t, rank))
        kfac.update(out, "gaussian")
        kfac.reduce_factors()
        model.zero_grad()
        ranks = 1 if rank is None else 2
        (out.square().sum() * ranks / 18).backward()
        kfac.precondition()
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p -= 0.05 * p.grad
    return kfac


def on_two_ranks(function, *arguments):
    """What `function(rank, *arguments)` returns on each of two ranks."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_worker, (function, arguments, folder), nprocs=2)
        return [torch.load(f"{folder}/{rank}.pt", weights_only=True) for rank in range(2)]


def _worker(rank, function, arguments, folder):
    torch.set_default_dtype(torch.float64)
    with joined(rank, 2, folder):
        torch.save(function(rank, *arguments), f"{folder}/{rank}.pt")


def one_placement(rank, kind, placement):
    before = live_bytes()
    model = DistributedDataParallel(Net())
    kfac = train(model, {"damping_kind": kind, "inverse_placement": placement}, range(6), rank)
    model.zero_grad()
    after = live_bytes()
    layers = [row for row in kfac.report() if row.preconditioner.startswith("K-FAC")]
    assert {row.name for row in layers} == {"conv", "wide", "last"}
    return {
        "parameters": {name: p.clone() for name, p in model.module.state_dict().items()},
        "bytes": after - before,
        "inverses": sum(row.memory for row in layers) / 2,  # the other half is the factors'
    }


def all_placements(rank):
    """Parameters, and how many numbers there are in memory, by placement and damping kind."""
    one_placement(rank, KINDS[0], "exchanged")  # fills caches
    return {
        f"{placement} {kind}": one_placement(rank, kind, placement)
        for kind in KINDS
        for placement in PLACEMENTS
    }


def test_all_placements_give_the_parameters_of_one_process():
    ranks = on_two_ranks(all_placements)
    for kind in KINDS:
        model = Net()
        train(model, {"damping_kind": kind}, range(6))
        for placement in PLACEMENTS:
            for found in ranks:
                parameters = found[f"{placement} {kind}"]["parameters"]
                for name, value in model.state_dict().items():
                    torch.testing.assert_close(parameters[name], value, rtol=1e-10, atol=1e-11)
        every, other, one = (
            [found[f"{placement} {kind}"]["bytes"] for found in ranks]
            for placement in ("every_rank", "exchanged", "one_rank")
        )
        assert every == other
        saved = [a - b for a, b in zip(every, one, strict=True)]
        assert min(saved) > 0
        # Each of the layers' inverses is missing on one rank, and on one only.
        inverses = ranks[0][f"one_rank {kind}"]["inverses"]
        assert inverses <= sum(saved) <= 1.2 * inverses


def resumed(rank):
    """By placement: parameters after eight steps, and the checkpoint of rank 0 that was restored on
    all ranks after five."""
    found = {}
    for placement in PLACEMENTS:
        model = DistributedDataParallel(Net())
        settings = {
            "inverse_placement": placement, "inverse_update_steps": 2, "renewal": "in_turns",
        }  # fmt: skip
        kfac = train(model, settings, range(5), rank)
        saved = [kfac.state_dict()] if rank == 0 else [None]
        dist.broadcast_object_list(saved, src=0)
        again = Preconditioner(model, kfac.config)
        again.load_state_dict(saved[0])
        train(model, settings, range(5, 8), rank, kfac=again)
        found[placement] = {"parameters": model.module.state_dict(), "state": saved[0]}
    return found


def test_a_checkpoint_of_rank_0_serves_all_ranks_and_one_process():
    model = Net()
    settings = {"inverse_update_steps": 2, "renewal": "in_turns"}
    train(model, settings, range(8))
    ranks = on_two_ranks(resumed)
    for placement in PLACEMENTS:
        state = ranks[0][placement]["state"]
        alone = Net()
        kfac = train(alone, settings, range(5))
        again = Preconditioner(alone, kfac.config)
        again.load_state_dict(state)
        train(alone, settings, range(5, 8), kfac=again)
        everyone = [found[placement]["parameters"] for found in ranks] + [alone.state_dict()]
        for parameters in everyone:
            for name, value in model.state_dict().items():
                torch.testing.assert_close(parameters[name], value, rtol=1e-10, atol=1e-11)


def different_ranks(rank):
    """Rank 1 does not call a layer at first, later runs out of memory."""

    def before(model, kfac, t):
        model.module.with_wide = rank == 0 or t >= 2

    model = DistributedDataParallel(Net(), find_unused_parameters=True)
    kfac = train(model, {}, range(4), rank, before)
    called = [row.name for row in kfac.report() if row.layer == "matrix"]
    averages, log = curvature_tensors(kfac), logging.handlers.BufferingHandler(100)
    logging.getLogger().addHandler(log)
    refusal = NoMemoryFor(7, 7)  # for A of a layer
    with refusal if rank == 1 else nullcontext():
        with kfac.record():
            logits = model(data(9, rank))
        kfac.update(logits, "gaussian")
    assert refusal.refused == (rank == 1)
    logits.sum().backward()
    kfac.precondition()
    found = curvature_tensors(kfac)
    return {
        "called": sorted(called), "failures": dict(kfac.failures),
        "unchanged": all(torch.equal(value, found[name]) for name, value in averages.items()),
        "log": "".join(record.getMessage() for record in log.buffer),
        "parameters": model.module.state_dict(),
    }  # fmt: skip


def test_ranks_that_see_different_layers_or_run_out_of_memory_stay_together():
    first, second = on_two_ranks(different_ranks)
    assert first["called"] == second["called"] == ["conv", "last", "wide"]
    # Both know that memory ran out on one of them, and both halve their examples.
    assert first["failures"] == {"statistics": 0, "inverse": 0, "memory": 1}
    assert second["failures"] == {"statistics": 0, "inverse": 0, "memory": 1}
    assert "50 % of the examples" in first["log"]
    assert "50 % of the examples" in second["log"]
    assert first["unchanged"]
    assert second["unchanged"]
    for name, value in first["parameters"].items():
        torch.testing.assert_close(second["parameters"][name], value, rtol=0, atol=0)


def collectives(rank):
    generator = torch.Generator().manual_seed(rank)
    root = torch.randn(3, 150, 300, generator=generator)
    symmetric = root @ root.mT
    plain, other = torch.randn(4, generator=generator), torch.tensor([rank + 1.0]).float()
    before = [symmetric.clone(), plain.clone(), other.clone()]
    Reduction([symmetric, plain, other], [True, False, False]).wait()
    mine = [torch.full((2, 2), float(rank)), torch.full((3,), float(10 + rank))]
    theirs = [torch.zeros(2, 2), torch.zeros(3)]
    broadcast_all([mine, theirs] if rank == 0 else [theirs, mine])
    alone = torch.ones(1)
    all_reduce_sums([alone])
    return {
        "before": before,
        "after": [symmetric, plain, other],
        "sent": [mine, theirs],
        "n": alone,
    }


def test_collectives():
    ranks = on_two_ranks(collectives)
    for i in range(3):
        total = ranks[0]["before"][i] + ranks[1]["before"][i]
        for rank in ranks:
            torch.testing.assert_close(rank["after"][i], total, rtol=1e-12, atol=1e-12)
    for rank, found in enumerate(ranks):
        mine, theirs = found["sent"]
        assert torch.equal(mine[0], torch.full((2, 2), float(rank)))
        assert torch.equal(theirs[1], torch.full((3,), float(11 - rank)))
        assert found["n"] == 2


def test_jobs_are_shared_out_largest_first():
    assert assign([1, 8, 3, 3, 2], 2) == [0, 0, 1, 1, 1]
    assert assign([5.0], 3) == [0]
    assert assign([], 2) == []


def test_a_single_process_keeps_everything():
    models = [Net(), Net()]
    for model, placement in zip(models, ("one_rank", "every_rank"), strict=True):
        train(model, {"inverse_placement": placement}, range(3))
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(p, q)


def test_eigenvalue_correction_needs_all_bases():
    with pytest.raises(ValueError, match="eigenvectors on every rank"):
        KFACConfig(eigenvalue_correction=True, damping_kind="exact", inverse_placement="one_rank")


def few_layers(rank):
    """Fewer layers than ranks: one rank has no inverse of its own, ever."""
    torch.manual_seed(1)
    before = live_bytes()
    model = nn.Sequential(nn.Linear(5, 3))
    settings = {"factor_update_steps": 10, "inverse_update_steps": 10, "early_updates": False}
    kfac = Preconditioner(model, KFACConfig(inverse_placement="one_rank", **settings))
    for t in range(4):
        generator = torch.Generator().manual_seed(10 * t + rank)
        with kfac.record():
            out = model(torch.randn(6, 5, generator=generator))
        kfac.update(out, "gaussian")
        model.zero_grad()
        out.square().mean().backward()
        for p in model.parameters():
            dist.all_reduce(p.grad)
        kfac.precondition()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad
    (row,) = kfac.report()
    del out
    held = live_bytes() - before
    return {"parameters": model.state_dict(), "held": held, "inverse": row.memory / 2}


def test_a_rank_that_owns_no_inverse_waits_for_nothing():
    first, second = on_two_ranks(few_layers)
    assert abs(first["held"] - second["held"]) == first["inverse"]
    for key, value in first["parameters"].items():
        assert torch.equal(value, second["parameters"][key])
