"""FSDP2 (`fully_shard`): two and four real processes over gloo for 50 steps.

Against DistributedDataParallel on as many ranks, and, where neither samples nor eigenvectors of
equal eigenvalues differ, against one process.
"""

import io
from contextlib import contextmanager, nullcontext

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from processes import joined
from surroundings import SHARDS_RUN_ON_CPU, sharding
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from submission.kfac import KFAC, curvature

EXAMPLES = 8
TWICE = {"factor_update_steps": 2, "inverse_update_steps": 4, "factor_decay": 0.8}
OF_ONE = {"the paper's", "one rank has an inverse"}  # as one process trains
CASES = {
    "the defaults": {"lr": 0.01, **TWICE},
    "samples": {
        "lr": 0.01, "direction": "preconditioned", "damping": 0.1, "fisher_type": "mc",
        "damping_kind": "pi", **TWICE,
    },
    "Adam in the eigenbasis": {"lr": 0.01, "direction": "eigenbasis_adam", **TWICE},
    # All outputs instead of samples: the draws of several ranks cannot be those of one.
    "the paper's": {
        "fisher_type": "type-2", "damping": 0.1, "kfac_approx": "expand", **TWICE,
        "base": lambda groups: torch.optim.SGD(groups, lr=0.01, momentum=0.5),
    },
    "one rank has an inverse": {
        "fisher_type": "type-2", "damping": 0.1, "kfac_approx": "reduce", **TWICE,
        "base": lambda groups: torch.optim.SGD(groups, lr=0.01),
        "inverse_placement": "one_rank",
    },
}  # fmt: skip


class Net(nn.Module):
    """Tokens looked up, attention-like blocks, a norm, a scale, an output tied to the table."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 6)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 6))
            for _ in range(2)
        )
        self.scale = nn.Parameter(torch.ones(6))
        self.output = nn.Linear(6, 7, bias=False)
        self.output.weight = self.table.weight

    def forward(self, tokens):
        x = self.table(tokens)
        for block in self.blocks:
            x = x + block(x)
        return self.output(x * self.scale)


def net(shard=False):
    torch.manual_seed(1)
    model = Net()
    if shard:
        fully_shard = sharding()
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
    return model


def batch(step):
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(7, (EXAMPLES, 4), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def take_steps(model, optimizer, steps, own=slice(None)):
    for number in steps:
        tokens, labels = (t[own] for t in batch(number))
        with optimizer.record():
            loss = F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def whole(model):
    values = [p.detach() for p in model.parameters()]
    return [v.full_tensor() if hasattr(v, "full_tensor") else v.clone() for v in values]


def check(found, wanted, words, tolerance=1e-10):
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(
            one, other, rtol=tolerance, atol=tolerance, msg=lambda m: f"{words}: {m}"
        )


def rank_of_several(rank, ranks, folder, steps, full):
    torch.set_default_dtype(torch.float64)
    of_one = torch.load(f"{folder}/of_one.pt", weights_only=True)
    with joined(rank, ranks, folder):
        own = slice(rank * EXAMPLES // ranks, (rank + 1) * EXAMPLES // ranks)
        for name, settings in CASES.items():
            plain = net()
            take_steps(parallel := DistributedDataParallel(plain), KFAC(parallel, **settings),
                       range(steps), own)  # fmt: skip
            model = net(shard=True)
            assert all(p.to_local().numel() < p.numel() for p in model.parameters())
            optimizer = KFAC(model, **settings)
            take_steps(model, optimizer, range(steps // 2), own)
            if name == "the defaults":
                model, optimizer = reloaded(model, optimizer, settings, f"{folder}/{ranks}")
            take_steps(model, optimizer, range(steps // 2, steps), own)
            assert all(type(p).__name__ == "DTensor" for p in model.parameters())
            found = whole(model)
            # Sums over ranks are rounded in another order. Where eigenvalues are nearly equal the
            # basis shows it: there two ranks and one differ by 7e-5 with whole parameters, too.
            rounded = 1e-7 if settings.get("direction") != "preconditioned" else 1e-10
            rounded = 1e-10 if name in OF_ONE else rounded
            check(found, whole(plain), f"{name}, {ranks} ranks", rounded)
            if name in OF_ONE:
                check(found, of_one[name], f"{name}, {ranks} ranks against one")
        if not full:
            accumulated(own)
            in_half_precision(own)
            without_an_optimizer()


def accumulated(own):
    """Gradients of two passes, sent with the second one, beside DistributedDataParallel's."""
    parallel, shards = DistributedDataParallel(net()), net(shard=True)
    check(
        two_passes_a_step(shards, own, lambda: unsent(shards)),
        two_passes_a_step(parallel, own, parallel.no_sync),
        "accumulated",
    )


@contextmanager
def unsent(model):
    """As `no_sync` of DistributedDataParallel."""
    model.set_requires_gradient_sync(False)
    yield
    model.set_requires_gradient_sync(True)


def two_passes_a_step(model, own, not_sent):
    compiled = torch.compile(model, backend="eager")
    optimizer = KFAC(compiled, lr=0.01)
    for number in range(4):
        tokens, labels = (t[own] for t in batch(number))
        for half, sent in ((slice(0, 2), not_sent()), (slice(2, 4), nullcontext())):
            with sent:
                with optimizer.record():
                    logits = compiled(tokens[half]).flatten(0, 1)
                    loss = F.cross_entropy(logits, labels[half].flatten()) / 2
                loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return whole(model)


def in_half_precision(own):
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = sharding()(Net().float(), mp_policy=policy)
    optimizer = KFAC(model, lr=0.01)
    losses = []
    for _ in range(10):
        tokens, labels = (t[own] for t in batch(0))
        with optimizer.record():
            loss = F.cross_entropy(model(tokens).flatten(0, 1).float(), labels.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0], losses
    kept = optimizer.curvature()["blocks.0.1"].gradient_covariance
    assert kept.dtype == torch.float32


def without_an_optimizer():
    chosen = {"likelihood": "categorical", "kfac_approx": "expand", "fisher_type": "type-2"}
    found, expected = (curvature(net(shard=s), batch(0)[0], **chosen) for s in (True, False))
    assert found.keys() == expected.keys()
    one, other = (c["blocks.1.1"] for c in (found, expected))
    check(
        [one.input_covariance, one.gradient_covariance],
        [other.input_covariance, other.gradient_covariance],
        "without an optimizer",
    )


def reloaded(model, optimizer, settings, folder):
    """Another model and optimizer with the state that torch.distributed.checkpoint has saved."""
    import torch.distributed.checkpoint as dcp

    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    dcp.save({"model": model.state_dict(), "optimizer": buffer}, checkpoint_id=folder)
    dist.barrier()
    again = net(shard=True)
    state = {"model": again.state_dict(), "optimizer": io.BytesIO()}
    dcp.load(state, checkpoint_id=folder)
    again.load_state_dict(state["model"])
    other = KFAC(again, **settings)
    state["optimizer"].seek(0)
    other.load_state_dict(torch.load(state["optimizer"], weights_only=True))
    return again, other


pytestmark = pytest.mark.skipif(not SHARDS_RUN_ON_CPU, reason="FSDP2 needs CUDA before PyTorch 2.6")
SLOW = [pytest.param(2, 50, marks=pytest.mark.slow), pytest.param(4, 50, marks=pytest.mark.slow)]


@pytest.mark.parametrize(("ranks", "steps"), [(2, 10), *SLOW])
def test_sharded_parameters_are_trained_as_whole_ones(tmp_path, ranks, steps):
    of_one = {}
    torch.set_default_dtype(torch.float64)
    try:
        for name in OF_ONE:
            model = net()
            take_steps(model, KFAC(model, **CASES[name]), range(steps))
            of_one[name] = whole(model)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.save(of_one, tmp_path / "of_one.pt")
    mp.spawn(rank_of_several, (ranks, str(tmp_path), steps, steps == 50), nprocs=ranks)
