"""Two and four real processes over gloo for 50 steps, against one process on the joined batch.

The examples are split unevenly, and now and then a rank has no valid label at all. All cases run in
one set of processes, whose start takes longest.
"""

import os
import time

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

STEPS, EXAMPLES = 50, 10
SHARES = {1: [10], 2: [7, 3], 4: [4, 1, 3, 2]}


def part_of(rank, ranks):
    """The examples of a rank."""
    start = sum(SHARES[ranks][:rank])
    return range(start, start + SHARES[ranks][rank])


class Explicit:
    """Positions [N, 2, d] with a mean over them; single examples are masked."""

    # All outputs instead of samples: the draws of several ranks cannot be those of one.
    fisher_type = "type-2"

    def net(self):
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.LayerNorm(5), Mean(), nn.Linear(5, 3))

    def step(self, model, kfac, t, examples):
        generator = torch.Generator().manual_seed(t)
        x = torch.randn(EXAMPLES, 2, 4, generator=generator)[examples]
        labels = torch.randint(3, (EXAMPLES,), generator=generator)[examples]
        mask = (torch.rand(EXAMPLES, generator=generator) > 0.3)[examples]
        with kfac.record():
            logits = model(x)
        kfac.update(logits, "categorical", mask=mask)
        losses = F.cross_entropy(logits, labels, reduction="none")
        return torch.where(mask, losses, 0).sum(), mask.sum()


class Ragged:
    """Rows of graphs of different sizes, one of them empty."""

    fisher_type = "type-2"
    sizes = (2, 1, 4, 3, 2, 5, 0, 1, 3, 2)

    def net(self):
        return Pool(None, 0, "sum")

    def step(self, model, kfac, t, examples):
        generator = torch.Generator().manual_seed(t)
        rows = torch.randn(sum(self.sizes), 4, generator=generator)
        start = sum(self.sizes[: examples[0]])
        sizes = [self.sizes[graph] for graph in examples]
        segments = Segments.from_sizes(torch.tensor(sizes))
        inner = model.module if isinstance(model, DistributedDataParallel) else model
        inner.ids, inner.segments = segments.ids, len(sizes)
        with kfac.record({"inner": segments}):
            out = model(rows[start : start + sum(sizes)])
        kfac.update(out, "gaussian")
        return (out - 1).square().sum(), torch.tensor(out.numel())


class MaskedLabels(Ragged):
    """The graphs again, with independent labels of which most are missing."""

    def step(self, model, kfac, t, examples):
        generator = torch.Generator().manual_seed(1000 + t)
        labels = torch.randint(2, (EXAMPLES, 2), generator=generator).double()[examples]
        mask = torch.rand(EXAMPLES, 2, generator=generator) > 0.6
        if t % 3 == 0:
            mask[4:] = False  # nothing is left for some ranks
        mask = mask[examples]
        rows = torch.randn(sum(self.sizes), 4, generator=generator)
        start = sum(self.sizes[: examples[0]])
        sizes = [self.sizes[graph] for graph in examples]
        segments = Segments.from_sizes(torch.tensor(sizes))
        inner = model.module if isinstance(model, DistributedDataParallel) else model
        inner.ids, inner.segments = segments.ids, len(sizes)
        with kfac.record({"inner": segments}):
            out = model(rows[start : start + sum(sizes)])
        losses = F.binary_cross_entropy_with_logits(out, labels, reduction="none")
        summed = torch.where(mask, losses, 0).sum()
        kfac.update(out, "bernoulli", mask=mask, targets=labels, loss=summed)
        return summed, mask.sum()


class FromTheLoss(MaskedLabels):
    """The same with true labels: statistics out of the loss's own backward pass."""

    fisher_type = "empirical"


CASES = {
    "explicit": Explicit(), "ragged": Ragged(), "masked labels": MaskedLabels(),
    "from the loss": FromTheLoss(),
}  # fmt: skip
APPROXES = ("expand", "reduce")


def begin(case, kfac_approx):
    torch.manual_seed(1)
    model = case.net()
    if dist.is_initialized():
        model = DistributedDataParallel(model)
    config = KFACConfig(
        kfac_approx=kfac_approx, fisher_type=case.fisher_type, factor_update_steps=2,
        inverse_update_steps=4, factor_decay=0.5, damping=0.1,
    )  # fmt: skip
    return model, Preconditioner(model, config)


def train(case, model, kfac, numbers, rank=0):
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    for t in numbers:
        summed, valid = case.step(model, kfac, t, list(part_of(rank, ranks)))
        valid = valid.double()
        if ranks > 1:
            dist.all_reduce(valid)
        model.zero_grad()
        kfac.reduce_factors()  # before DDP's own collectives, on all ranks or none
        (summed * ranks / valid).backward()
        kfac.precondition()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.05 * p.grad


def path_of(folder, *words):
    return f"{folder}/{'-'.join(map(str, words))}.pt"


def all_cases(rank, ranks, folder):
    """In the middle the first rank saves, for a run on another number of ranks."""
    for name, case in CASES.items():
        for kfac_approx in APPROXES:
            model, kfac = begin(case, kfac_approx)
            train(case, model, kfac, range(STEPS // 2), rank)
            if rank == 0:
                state = model.module.state_dict(), kfac.state_dict()
                torch.save(state, path_of(folder, "middle", name, kfac_approx, ranks))
            train(case, model, kfac, range(STEPS // 2, STEPS), rank)
            torch.save(model.module.state_dict(), path_of(folder, name, kfac_approx, ranks, rank))


def second_half_of_two_ranks(rank, folder):
    """Goes on, on all ranks there are, from where two ranks have saved."""
    case = CASES["explicit"]
    for kfac_approx in APPROXES:
        model, kfac = begin(case, kfac_approx)
        saved = torch.load(path_of(folder, "middle", "explicit", kfac_approx, 2), weights_only=True)
        model.module.load_state_dict(saved[0])
        kfac.load_state_dict(saved[1])
        train(case, model, kfac, range(STEPS // 2, STEPS), rank)
        torch.save(model.module.state_dict(), path_of(folder, "moved", kfac_approx, rank))


def worker(rank, ranks, folder):
    torch.set_default_dtype(torch.float64)
    with joined(rank, ranks, folder):
        all_cases(rank, ranks, folder)
        if ranks == 4:
            second_half_of_two_ranks(rank, folder)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with the outcome of every case on 2 and on 4 ranks."""
    folder = str(tmp_path_factory.mktemp("ranks"))
    for ranks in (2, 4):
        mp.spawn(worker, (ranks, folder), nprocs=ranks)
    return folder


def assert_equal_to_one_process(name, kfac_approx, paths):
    case = CASES[name]
    model, kfac = begin(case, kfac_approx)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    train(case, model, kfac, range(STEPS))
    for path in paths:
        for key, value in torch.load(path, weights_only=True).items():
            expected = model.state_dict()[key]
            torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)
            assert not torch.allclose(value, before[key], atol=1e-3)  # it did train


@pytest.mark.parametrize("kfac_approx", APPROXES)
@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_are_one_process_on_the_joined_batch_after_50_steps(runs, ranks, name, kfac_approx):
    paths = [path_of(runs, name, kfac_approx, ranks, rank) for rank in range(ranks)]
    assert_equal_to_one_process(name, kfac_approx, paths)


@pytest.mark.parametrize("kfac_approx", APPROXES)
def test_a_run_goes_on_with_another_number_of_ranks(runs, kfac_approx):
    paths = [path_of(runs, "moved", kfac_approx, rank) for rank in range(4)]
    assert_equal_to_one_process("explicit", kfac_approx, paths)


def faulty_worker(rank, folder, fault):
    torch.set_default_dtype(torch.float64)
    with joined(rank, 4, folder, seconds=10):
        case = CASES["explicit"]
        model, kfac = begin(case, "reduce")
        train(case, model, kfac, range(3), rank)
        dist.barrier()
        if rank == 2:
            if fault == "dies":
                os._exit(17)
            time.sleep(600)
        try:
            train(case, model, kfac, range(3, STEPS), rank)
            torch.save("", path_of(folder, "error", rank))
        except RuntimeError as error:
            torch.save(str(error), path_of(folder, "error", rank))
        os._exit(1)  # the barrier at the end would wait for the lost rank


@pytest.mark.parametrize("fault", ["dies", pytest.param("hangs", marks=pytest.mark.slow)])
def test_a_lost_rank_ends_the_others_with_an_error(fault, tmp_path):
    context = mp.get_context("spawn")
    processes = [
        context.Process(target=faulty_worker, args=(rank, str(tmp_path), fault))
        for rank in range(4)
    ]
    for process in processes:
        process.start()
    try:
        others = [process for rank, process in enumerate(processes) if rank != 2]
        for process in others:
            process.join(timeout=300)  # far more than the 10 s of the process group
            assert process.exitcode == 1, "a rank waits for ever"
    finally:
        for process in processes:
            process.kill()
            process.join()
    assert processes[2].exitcode == (17 if fault == "dies" else -9)
    for rank in (0, 1, 3):
        assert torch.load(path_of(str(tmp_path), "error", rank), weights_only=True), "not noticed"
