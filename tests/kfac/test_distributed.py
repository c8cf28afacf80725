"""Two real processes over gloo against one process on the joined batch."""

import tempfile

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from nets import Mean, Pool
from processes import joined
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from submission.kfac import KFACConfig, Preconditioner, Segments

STEPS = 6


def config(kfac_approx):
    # All outputs instead of samples: the draws of several ranks cannot be those of one.
    return KFACConfig(
        kfac_approx=kfac_approx, fisher_type="type-2", factor_update_steps=2,
        inverse_update_steps=2, factor_decay=0.5,
    )  # fmt: skip


def explicit_net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.LayerNorm(5), Mean(), nn.Linear(5, 3))


def explicit_data(step, rank=None):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(6, 2, 4, generator=generator)
    labels = torch.randint(3, (6,), generator=generator)
    mask = torch.tensor([True, True, False, True, True, True])
    part = slice(None) if rank is None else slice(0, 4) if rank == 0 else slice(4, 6)
    return x[part], labels[part], mask[part]


def explicit_step(model, kfac, step, rank=None):
    x, labels, mask = explicit_data(step, rank)
    with kfac.record():
        logits = model(x)
    kfac.update(logits, "categorical", mask=mask)
    losses = torch.where(mask, F.cross_entropy(logits, labels, reduction="none"), 0)
    finish(model, kfac, losses.sum(), mask.sum())


SIZES = [2, 1, 4, 3, 2]


def ragged_net():
    torch.manual_seed(1)
    ids = Segments.from_sizes(torch.tensor(SIZES)).ids
    return Pool(ids, len(SIZES), "sum")


def ragged_step(model, kfac, step, rank=None):
    """Graphs of different sizes, split unevenly over the ranks."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(sum(SIZES), 4, generator=generator)
    graphs = range(5) if rank is None else range(2) if rank == 0 else range(2, 5)
    start = sum(SIZES[: graphs[0]])
    sizes = [SIZES[g] for g in graphs]
    x = x[start : start + sum(sizes)]
    rows = Segments.from_sizes(torch.tensor(sizes))
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    inner.ids, inner.segments = rows.ids, len(sizes)
    with kfac.record({"inner": rows}):
        out = model(x)
    kfac.update(out, "gaussian")
    finish(model, kfac, out.square().sum(), torch.tensor(out.numel()))


def finish(model, kfac, summed, valid):
    """Gradient of the mean over all ranks, preconditioned, and a plain step."""
    valid = valid.double()
    ranks = 1
    if dist.is_initialized():
        dist.all_reduce(valid)
        ranks = dist.get_world_size()
    model.zero_grad()
    (summed * ranks / valid).backward()
    kfac.precondition()
    with torch.no_grad():
        for p in model.parameters():
            p -= 0.1 * p.grad


CASES = {"explicit": (explicit_net, explicit_step), "ragged": (ragged_net, ragged_step)}


def worker(rank, case, kfac_approx, folder):
    torch.set_default_dtype(torch.float64)
    build, step = CASES[case]
    with joined(rank, 2, folder):
        model = DistributedDataParallel(build())
        kfac = Preconditioner(model, config(kfac_approx))
        for t in range(STEPS):
            step(model, kfac, t, rank)
        torch.save(model.module.state_dict(), f"{folder}/{rank}.pt")


@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
@pytest.mark.parametrize("case", list(CASES))
def test_two_ranks_are_one_process_on_the_joined_batch(case, kfac_approx):
    build, step = CASES[case]
    model = build()
    kfac = Preconditioner(model, config(kfac_approx))
    for t in range(STEPS):
        step(model, kfac, t)
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(worker, (case, kfac_approx, folder), nprocs=2)
        for rank in range(2):
            for name, value in torch.load(f"{folder}/{rank}.pt", weights_only=True).items():
                expected = model.state_dict()[name]
                torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)


def worker_with_two_losses(rank, folder):
    torch.set_default_dtype(torch.float64)
    with joined(rank, 2, folder):
        torch.manual_seed(1)
        model = DistributedDataParallel(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 6)))
        settings = {"fisher_type": "type-2", "inverse_placement": "every_rank"}
        kfac = Preconditioner(model, KFACConfig(**settings))
        for step in range(3):
            x, labels, _ = explicit_data(step, rank)
            model.zero_grad()
            with kfac.record():
                one, two = model(x[:, 0]).split(3, -1)
                loss = 0.5 * F.cross_entropy(one, labels)
                loss = loss + 0.1 * F.cross_entropy(two, labels, reduction="sum")
            loss.backward()
            kfac.precondition()
            with torch.no_grad():
                for p in model.parameters():
                    p -= 0.1 * p.grad
        torch.save(model.module.state_dict(), f"{folder}/{rank}.pt")


def test_weights_of_losses_are_the_same_on_all_ranks(tmp_path):
    """A sum beside a mean has another weight where there are more examples."""
    mp.spawn(worker_with_two_losses, (str(tmp_path),), nprocs=2)
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for name, value in one.items():
        assert torch.equal(value, two[name])
