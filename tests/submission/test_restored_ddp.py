"""Several ranks go on from a checkpoint although AlgoPerf's restore drops the DDP wrapper."""

import pytest
import torch
import torch.multiprocessing as mp
from processes import joined
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from workload import GraphNet, GraphWorkload, graph_batch

from submission import submission
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
