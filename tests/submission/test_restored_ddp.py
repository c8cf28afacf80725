"""Several ranks go on from a checkpoint although AlgoPerf's restore drops the DDP wrapper."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from processes import joined
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from workload import GraphNet, GraphWorkload, Squares, graph_batch

from submission import submission
from submission.kfac.fisher.sampling import sampling_seed
from submission.run import UnwrappedModelError

RANKS, STEPS, STOP = 2, 6, 3
POINT = {
    "kfac_approx": "reduce", "update_rule": "nesterov", "learning_rate": 0.05,
    "factor_update_steps": 2, "inverse_update_steps": 2, "factor_decay": 0.5, "dropout_rate": 0.0,
}  # fmt: skip


def begin(wrap=True):
    torch.manual_seed(0)
    model = DistributedDataParallel(GraphNet()) if wrap else GraphNet()
    state = submission.init_optimizer_state(GraphWorkload(), model, None, POINT, [0, 0])
    return model, state


def train(model, state, numbers, rank):
    workload = GraphWorkload()
    for t in numbers:
        sizes = ([3, 1, 4 + rank], [4, 0, 6]) if rank == 0 else ([2, 5, 3, 1], [2, 3, 1, 5])
        state, model, _ = submission.update_params(
            workload, model, None, None, POINT, graph_batch(*sizes, seed=10 * t + rank),
            workload.loss_type, state, [], t, [t, 1],
        )  # fmt: skip
    return model


def restore_as_algoperf_does(path, model, state):
    """What algoperf.checkpoint_utils.maybe_restore_checkpoint does, wrapper and all."""
    saved = torch.load(path, weights_only=True)
    if isinstance(model, DistributedDataParallel):
        model = model.module
    model.load_state_dict(saved["model_params"])
    for key in state:
        state[key].load_state_dict(saved["optimizer_state"][key])
    return model


def worker(rank, folder):
    with joined(rank, RANKS, folder):
        model = train(*begin(), range(STEPS), rank)
        undisturbed = {k: v.clone() for k, v in model.module.state_dict().items()}

        model, state = begin()
        train(model, state, range(STOP), rank)
        torch.save(
            {
                "model_params": model.module.state_dict(),
                "optimizer_state": {key: value.state_dict() for key, value in state.items()},
            },
            f"{folder}/checkpoint_{rank}",
        )
        model, state = begin()
        bare = restore_as_algoperf_does(f"{folder}/checkpoint_{rank}", model, state)
        assert not isinstance(bare, DistributedDataParallel)
        returned = train(bare, state, range(STOP, STEPS), rank)
        assert returned is model
        torch.save((undisturbed, bare.state_dict()), f"{folder}/{rank}.pt")


def test_ranks_that_resume_stay_together(tmp_path):
    mp.spawn(worker, (str(tmp_path),), nprocs=RANKS)
    runs = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]
    expected = runs[0][0]
    for undisturbed, resumed in runs:
        for name, value in expected.items():
            assert torch.equal(undisturbed[name], value), name
            assert torch.equal(resumed[name], value), name


def test_another_model_than_that_of_the_beginning_is_refused_on_several_ranks(monkeypatch):
    model, state = begin(wrap=False)
    monkeypatch.setattr("submission.run.world_size", lambda: 2)
    with pytest.raises(UnwrappedModelError, match="on 2 ranks, but got a GraphNet"):
        train(GraphNet(), state, [0], rank=0)
    assert state["run"].rewrapped(model) is model


def test_wrappers_that_come_back_are_taken_as_they_are():
    model, state = begin(wrap=False)
    compiled = torch.compile(model)
    assert state["run"].rewrapped(model) is model
    assert state["run"].rewrapped(compiled) is compiled

    parallel = nn.DataParallel(model)
    state = submission.init_optimizer_state(GraphWorkload(), parallel, None, POINT, [0, 0])
    assert state["run"].rewrapped(model) is parallel
    assert state["run"].rewrapped(parallel) is parallel
    both = torch.compile(parallel)
    assert state["run"].rewrapped(both) is both


# ---- ranks that see different things decide alike ------------------------------------------------


def overflowing_worker(rank, folder):
    """The loss of rank 0 overflows in one step, though its gradient does not."""
    with joined(rank, RANKS, folder):
        torch.manual_seed(0)
        model = DistributedDataParallel(nn.Linear(4, 2).float())
        workload, given = Squares(), {**POINT, "learning_rate": 1e-3}
        state = submission.init_optimizer_state(workload, model, None, given, [0, 0])
        for t in range(4):
            generator = torch.Generator().manual_seed(10 * t + rank)
            x, y = (torch.randn(8, n, generator=generator).float() for n in (4, 2))
            if t == 2 and rank == 0:
                y[0, 0] = 2e19
            submission.update_params(
                workload, model, None, None, given, {"inputs": x, "targets": y},
                workload.loss_type, state, [], t, [t, 1],
            )  # fmt: skip
        torch.save((model.module.state_dict(), state["run"].skipped), f"{folder}/rank_{rank}")


def test_ranks_skip_a_step_together(tmp_path):
    mp.spawn(overflowing_worker, (str(tmp_path),), nprocs=RANKS)
    (first, skipped), (second, other) = (
        torch.load(tmp_path / f"rank_{rank}", weights_only=True) for rank in range(RANKS)
    )
    assert skipped == other == 1
    for key, value in first.items():
        assert torch.equal(value, second[key])


def sampling_worker(rank, folder):
    """Sampled labels: an undisturbed run, and one restored from what rank 0 has saved."""
    with joined(rank, RANKS, folder):
        ends = []  # POINT samples labels, the default
        for restored in (False, True):
            model, state = begin()
            model = train(model, state, range(STOP), rank)
            if restored:
                saved = [state["kfac"].state_dict()]
                dist.broadcast_object_list(saved)
                state["kfac"].load_state_dict(saved[0])
            model = train(model, state, range(STOP, STEPS), rank)
            ends.append({k: v.clone() for k, v in model.module.state_dict().items()})
        torch.save(ends, f"{folder}/rank_{rank}")


def test_restored_ranks_go_on_sampling_labels_of_their_own(tmp_path):
    mp.spawn(sampling_worker, (str(tmp_path),), nprocs=RANKS)
    undisturbed, restored = torch.load(tmp_path / "rank_1", weights_only=True)
    for key, value in undisturbed.items():
        assert torch.equal(value, restored[key])


def test_no_two_ranks_or_steps_sample_with_the_same_seed():
    seeds = {sampling_seed(7, step, rank) for step in range(100) for rank in range(16)}
    assert len(seeds) == 1600
    assert all(0 <= seed < 2**32 for seed in seeds)
