"""What users put around the engine: each surrounding is a function that tries it.

A function returns nothing where training in the surrounding is the same as without it (it has
asserted that), or the text of the error with which the engine refuses the surrounding. The tests
compare with `REFUSED`; run as a script this file prints the table of docs/surroundings.md.
"""

from __future__ import annotations

import copy
import functools
import io
import pickle
import tempfile
import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from processes import joined
from torch import nn
from torch.distributed import fsdp
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from submission.kfac import KFAC, KFACConfig, Preconditioner, curvature

STEPS = 4
EVERY_STEP: dict[str, Any] = {"factor_update_steps": 1, "inverse_update_steps": 1}
PAPER: dict[str, Any] = {  # the preconditioned gradient; no sampling, so that ranks can be compared
    "kfac_approx": "expand", "fisher_type": "type-2", "damping": 0.1, "factor_decay": 0.5,
    **EVERY_STEP,
}  # fmt: skip
SURROUNDINGS: dict[str, Callable[[], str | None]] = {}
KINDS: dict[str, str] = {}
Step = Callable[[nn.Module, KFAC, torch.Tensor, torch.Tensor], None]


def surrounding(name: str, kind: str) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Registers what tries a surrounding."""

    def register(function: Callable[[], Any]) -> Callable[[], Any]:
        SURROUNDINGS[name], KINDS[name] = function, kind
        return function

    return register


def net() -> nn.Sequential:
    """A linear net with a norm."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3))


def batch(step: int, size: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs [size, 4] and labels."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(size, 4, generator=generator), torch.randint(3, (size,), generator=generator)


def paper(model: nn.Module, **settings: Any) -> KFAC:
    """The paper's preconditioned gradient in front of SGD."""
    base = lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9)  # noqa: E731
    return KFAC(model, base=base, **{**PAPER, **settings})


def plain_step(model: nn.Module, optimizer: KFAC, x: torch.Tensor, y: torch.Tensor) -> None:
    """The loop of README."""
    with optimizer.record():
        loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def train(
    model: nn.Module, optimizer: KFAC, step: Step = plain_step, steps: int = STEPS
) -> list[torch.Tensor]:
    """The parameters after some steps."""
    for number in range(steps):
        step(model, optimizer, *batch(number))
    return [p.detach().clone() for p in model.parameters()]


@functools.cache
def expected(steps: int = STEPS) -> list[torch.Tensor]:
    """Those of plain training."""
    model = net()
    return train(model, paper(model), steps=steps)


def assert_same(
    found: list[torch.Tensor], wanted: list[torch.Tensor], tolerance: float = 1e-10
) -> None:
    """Equal up to rounding."""
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def refusal(function: Callable[[], Any], *errors: type[Exception]) -> str:
    """The text of the error that is raised."""
    try:
        function()
    except errors as error:
        return str(error)
    raise AssertionError("nothing was raised")


# ---- several processes -------------------------------------------------------------------------


def _no_sync(model: Any, optimizer: KFAC, x: torch.Tensor, y: torch.Tensor) -> None:
    for last, some_x, some_y in ((False, x[:2], y[:2]), (True, x[2:], y[2:])):
        with nullcontext() if last else model.no_sync():
            with optimizer.record():
                loss = F.cross_entropy(model(some_x), some_y) * len(some_x) / len(x)
            loss.backward()
    optimizer.step()
    optimizer.zero_grad()


DATA_PARALLEL: dict[str, tuple[dict[str, Any], Step]] = {
    "as it comes": ({}, plain_step),
    "static_graph": ({"static_graph": True}, plain_step),
    "gradient_as_bucket_view": ({"gradient_as_bucket_view": True}, plain_step),
    "find_unused_parameters": ({"find_unused_parameters": True}, plain_step),
    "no_sync accumulation": ({}, _no_sync),
    "of a compiled module": ({"compiled": "inside"}, plain_step),
    "compiled": ({"compiled": "outside"}, plain_step),
}


SHARDS = "FSDP2 (`fully_shard`)"
SHARDS_RUN_ON_CPU = hasattr(fsdp, "fully_shard")  # since PyTorch 2.6


def _rank(rank: int, folder: str, wanted: list[torch.Tensor]) -> None:
    torch.set_default_dtype(torch.float64)
    found: dict[str, str] = {}
    with joined(rank, 2, folder):
        for name, (options, step) in DATA_PARALLEL.items():
            options = dict(options)
            compiled = options.pop("compiled", None)
            plain = net()
            compile_ = functools.partial(torch.compile, backend="eager")
            inner: Any = compile_(plain) if compiled == "inside" else plain
            model: Any = DistributedDataParallel(inner, **options)
            optimizer = paper(model)
            model = compile_(model) if compiled == "outside" else model
            for number in range(STEPS):
                x, y = batch(number)
                own = slice(4 * rank, 4 * rank + 4)
                step(model, optimizer, x[own], y[own])
            try:
                assert_same([p.detach() for p in plain.parameters()], wanted)
            except AssertionError as error:
                found[name] = str(error)
        if SHARDS_RUN_ON_CPU:
            model = sharding()(net())
            optimizer = paper(model)
            for number in range(STEPS):
                x, y = batch(number)
                plain_step(model, optimizer, *(t[4 * rank : 4 * rank + 4] for t in (x, y)))
            try:
                assert_same([p.detach().full_tensor() for p in model.parameters()], wanted)
            except AssertionError as error:
                found[SHARDS] = str(error)
        found["sharded"] = _sharded()
        torch.save(found, f"{folder}/{rank}.pt")


def sharding() -> Any:
    """FSDP2's `fully_shard`."""
    try:
        from torch.distributed.fsdp import fully_shard
    except ImportError:  # before torch 2.6
        from torch.distributed._composable.fsdp import fully_shard
    return fully_shard


def _sharded() -> str:
    """What is said about parameters in parts, a line each."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    lines = {}
    both = init_device_mesh("cpu", (1, 2), mesh_dim_names=("shards", "tensor"))
    mesh = both["tensor"]
    mixed = parallelize_module(net(), mesh, {"3": RowwiseParallel()})
    sharding()(mixed, mesh=both["shards"])
    lines["FSDP2 and tensor parallel"] = refusal(lambda: KFAC(mixed), ValueError)
    for original in (False, True):
        wrapped = FullyShardedDataParallel(
            net(), device_id=torch.device("cpu"), use_orig_params=original
        )
        lines["FSDP1"] = refusal(functools.partial(KFAC, wrapped), ValueError)
    parallel = parallelize_module(net(), mesh, {"3": ColwiseParallel()})
    lines["tensor parallel"] = refusal(lambda: KFAC(parallel), ValueError)
    return "\n".join(f"{key}: {value}" for key, value in lines.items())


@functools.cache
def _on_ranks() -> dict[str, str]:
    wanted = expected()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (folder, wanted), nprocs=2)
        first, second = (torch.load(f"{folder}/{rank}.pt", weights_only=True) for rank in range(2))
    assert first.keys() == second.keys()
    return first


def _data_parallel(name: str) -> None:
    assert name not in _on_ranks(), _on_ranks()[name]


surrounding(SHARDS, "data parallel")(functools.partial(_data_parallel, SHARDS))
for _name in DATA_PARALLEL:
    surrounding(f"DistributedDataParallel, {_name}", "data parallel")(
        functools.partial(_data_parallel, _name)
    )


def _said_of(name: str) -> str:
    lines = dict(line.split(": ", 1) for line in _on_ranks()["sharded"].splitlines())
    return lines[name]


for _name, _words in (
    ("FSDP2 and tensor parallel", "FSDP2 over tensor parallelism"),
    ("FSDP1", "FSDP1 (`FullyShardedDataParallel`)"),
    ("tensor parallel", "tensor parallelism (DTensor)"),
):
    surrounding(_words, "data parallel")(functools.partial(_said_of, _name))


@surrounding("DataParallel on one device", "data parallel")
def data_parallel_on_one_device() -> None:
    model = net()
    wrapped: Any = DataParallel(model)
    optimizer = paper(wrapped)
    train(wrapped, optimizer)
    assert_same([p.detach() for p in model.parameters()], expected())


@surrounding("DataParallel on several devices", "data parallel")
def data_parallel_on_several_devices() -> str:
    model: Any = DataParallel(net())
    model.device_ids = [0, 1]  # as on a machine with two
    return refusal(lambda: KFAC(model), ValueError)


@surrounding("a pipeline stage that does not compute the loss", "data parallel")
def pipeline_stage() -> str:
    stage = net()
    optimizer = paper(stage)

    def step() -> None:
        with optimizer.record():
            y = stage(batch(0)[0])
        y.backward(torch.ones_like(y))  # what a later stage sends
        optimizer.step()

    return refusal(step, RuntimeError)


# ---- parameters that change hands ---------------------------------------------------------------


def _continues(change: Callable[[nn.Module], nn.Module]) -> None:
    """Half of the training, a change, the other half: every parameter is followed and trained."""
    model = net()
    optimizer = paper(model)
    for number in range(STEPS // 2):
        plain_step(model, optimizer, *batch(number))
    model = change(model)
    for number in range(STEPS // 2, STEPS):
        x, y = batch(number)
        with optimizer.record():
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.preconditioner.precondition()
        new = {id(p) for p in model.parameters()}
        assert all(id(p) in new for p in optimizer.preconditioner.parameters.values())
        assert all(row.preconditioner != "raw gradient" for row in optimizer.report())
        model.zero_grad()


@surrounding("`load_state_dict(assign=True)`", "parameters")
def assigned() -> None:
    def change(model: nn.Module) -> nn.Module:
        model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
        return model

    _continues(change)


@surrounding("a layer replaced", "parameters")
def replaced() -> None:
    def change(model: Any) -> nn.Module:
        model[3] = nn.Linear(6, 5)
        return model  # type: ignore[no-any-return]

    _continues(change)


@surrounding("a layer added", "parameters")
def added() -> None:
    def change(model: Any) -> nn.Module:
        model.append(nn.Linear(3, 3))
        return model  # type: ignore[no-any-return]

    _continues(change)


@surrounding("weight_norm added", "parameters")
def weight_normed() -> None:
    model: Any = net()
    kfac = Preconditioner(model, KFACConfig(**PAPER))
    for number in range(3):
        if number == 1:
            nn.utils.parametrizations.weight_norm(model[3])
        x, y = batch(number)
        with kfac.record():
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        kfac.precondition()
        model.zero_grad()
    rows = {row.name: row for row in kfac.report()}
    assert rows["0"].preconditioner == "K-FAC-expand"
    names = [name for name in rows if "original" in name]
    assert len(names) == 2
    assert all(rows[name].reason for name in names)


@surrounding("LoRA that is merged (parametrisations removed)", "parameters")
def merged() -> None:
    class Low(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.up = nn.Parameter(torch.randn(1, 6)), nn.Parameter(torch.zeros(3, 1))

        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return weight + self.up @ self.down

    model: Any = net()
    nn.utils.parametrize.register_parametrization(model[3], "weight", Low())
    kfac = Preconditioner(model, KFACConfig(**PAPER))
    for number in range(4):
        if number == 2:
            nn.utils.parametrize.remove_parametrizations(model[3], "weight")
        x, y = batch(number)
        with kfac.record():
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        kfac.precondition()
        model.zero_grad()
    assert {row.name: row.preconditioner for row in kfac.report()}["3"] == "K-FAC-expand"


@surrounding("`requires_grad` switched", "parameters")
def switched() -> None:
    model: Any = net()
    optimizer = paper(model)
    for number in range(6):
        model[0].requires_grad_(number not in (2, 3))
        frozen = model[0].weight.detach().clone()
        plain_step(model, optimizer, *batch(number))
        assert torch.equal(frozen, model[0].weight) == (number in (2, 3))
    assert "raw" not in {row.name: row.preconditioner for row in optimizer.report()}["0"]


@surrounding("`.to(dtype)` after the optimizer was made", "parameters")
def converted() -> None:
    torch.set_default_dtype(torch.float32)
    try:
        model = net()
        optimizer = paper(model)
        model.double()
        for number in range(STEPS):
            x, y = batch(number)
            plain_step(model, optimizer, x.double(), y)
        factors = optimizer.curvature()["0"]
        assert factors.gradient_covariance.dtype == torch.float64  # type: ignore[union-attr]
    finally:
        torch.set_default_dtype(torch.float64)


@surrounding("`add_param_group`", "parameters")
def group_added() -> None:
    model: Any = net()
    model[3].requires_grad_(False)
    optimizer = KFAC(model, lr=1e-2, **EVERY_STEP)
    train(model, optimizer, steps=2)
    model[3].requires_grad_(True)
    optimizer.add_param_group({"params": list(model[3].parameters()), "lr": 1e-3})
    before = model[3].weight.detach().clone()
    train(model, optimizer, steps=2)
    assert not torch.equal(before, model[3].weight)


# ---- what the loss does not reach ---------------------------------------------------------------


class TwoHeads(nn.Module):
    """A trunk with two heads."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.trunk, self.head, self.aux = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = self.trunk(x).tanh()
        return self.head(h), self.aux(h.detach())


def _two_heads(losses: Callable[..., torch.Tensor]) -> tuple[TwoHeads, KFAC, dict[str, Any]]:
    model = TwoHeads()
    optimizer = paper(model)
    x, y = batch(0)
    with optimizer.record():
        loss = losses(*model(x), y)
    loss.backward()
    raw = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    optimizer.preconditioner.precondition()
    return model, optimizer, raw


@surrounding("a head that the loss does not reach", "loss")
def unused_head() -> None:
    model, optimizer, _ = _two_heads(lambda out, aux, y: F.cross_entropy(out, y))
    assert model.aux.weight.grad is None
    rows = {row.name: row for row in optimizer.report()}
    assert "aux" not in optimizer.curvature()
    assert "not reached" in rows["aux"].reason


@surrounding("a probe on detached features, with a loss of its own", "loss")
def probe() -> None:
    model, _optimizer, _raw = _two_heads(
        lambda out, aux, y: F.cross_entropy(out, y) + F.mse_loss(aux, torch.zeros_like(aux))
    )
    alone = nn.Linear(6, 2)
    alone.load_state_dict(model.aux.state_dict())
    kfac = Preconditioner(alone, KFACConfig(**PAPER))
    features = model.trunk(batch(0)[0]).tanh().detach()
    with kfac.record():
        loss = F.mse_loss(alone(features), torch.zeros(8, 2))
    loss.backward()
    kfac.precondition()
    torch.testing.assert_close(alone.weight.grad, model.aux.weight.grad)


@surrounding("an auxiliary loss that the curvature is not told of", "loss")
def untold() -> None:
    model = TwoHeads()
    optimizer = paper(model)
    x, y = batch(0)
    with optimizer.record():
        out, aux = model(x)
    optimizer.update(out, "categorical")
    (F.cross_entropy(out, y) + aux.square().mean()).backward()
    raw = model.aux.weight.grad.clone()
    optimizer.preconditioner.precondition()
    assert torch.equal(model.aux.weight.grad, raw)  # not divided by the damping
    assert {r.name: r.preconditioner for r in optimizer.report()}["aux"] == "raw gradient"


@surrounding("a call whose output is detached", "loss")
def detached_call() -> None:
    model: Any = net()
    found = []
    for calls in (1, 2):
        kfac = Preconditioner(model, KFACConfig(**PAPER))
        x, y = batch(0)
        with kfac.record():
            if calls == 2:
                model(100 * x).detach().sum()
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        kfac.precondition()
        found.append(kfac.curvature()["0"].input_covariance)  # type: ignore[union-attr]
        model.zero_grad()
    torch.testing.assert_close(*found)


# ---- forgotten or misstated ---------------------------------------------------------------------


@surrounding("`record` forgotten", "stated")
def no_record() -> str:
    model = net()
    optimizer = paper(model)
    x, y = batch(0)
    F.cross_entropy(model(x), y).backward()
    return refusal(optimizer.step, RuntimeError)


@surrounding("no loss inside `record`, and none stated", "stated")
def no_loss() -> str:
    model = net()
    optimizer = paper(model)
    with optimizer.record():
        out = model(batch(0)[0])
    out.square().sum().backward()
    return refusal(optimizer.step, RuntimeError)


@surrounding("a likelihood that the loss seen contradicts", "stated")
def contradiction() -> str:
    model = net()
    optimizer = paper(model)
    x, y = batch(0)
    with optimizer.record():
        out = model(x)
        F.cross_entropy(out, y)
    return refusal(lambda: optimizer.update(out, "gaussian"), ValueError)


def _pixels() -> tuple[nn.Module, KFAC, torch.Tensor, torch.Tensor]:
    model = nn.Sequential(nn.Conv2d(2, 3, 1))
    x = torch.randn(4, 2, 5, 3)
    return model, paper(model), x, torch.randint(3, (4, 5, 3))


@surrounding("classes in another dimension, targets given", "stated")
def other_classes() -> str:
    model, optimizer, x, y = _pixels()
    with optimizer.record():
        out = model(x)
    return refusal(lambda: optimizer.update(out, "categorical", targets=y), ValueError)


@surrounding("classes in another dimension, no targets", "stated")
def other_classes_without_targets() -> str:
    model, optimizer, x, y = _pixels()
    with optimizer.record():
        out = model(x)
    optimizer.update(out, "categorical")
    return refusal(F.cross_entropy(out, y).backward, ValueError)


class Named(nn.Module):
    """Its output is a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = net()

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.inner(x)}


@surrounding("an output that is a dict, in a training loop", "stated")
def dict_output() -> None:
    model = Named()
    optimizer = paper(model)
    for number in range(STEPS):
        x, y = batch(number)
        with optimizer.record():  # a loop needs nothing but the loss
            loss = F.cross_entropy(model(x)["logits"], y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_same([p.detach() for p in model.parameters()], expected())


@surrounding("an output that is a dict, given to `curvature`", "stated")
def dict_output_of_curvature() -> str:
    x, _ = batch(0)
    return refusal(
        lambda: curvature(Named(), x, likelihood="categorical", kfac_approx="expand"), TypeError
    )


# ---- contexts -----------------------------------------------------------------------------------


def _steps(step: Step, wanted: list[torch.Tensor] | None = None) -> None:
    model = net()
    found = train(model, paper(model), step)
    assert_same(found, expected() if wanted is None else wanted)


@surrounding("autocast around everything", "contexts")
def autocast() -> None:
    """The passes are in bfloat16; what the engine computes from them is not."""

    def loss_of(model: nn.Module, optimizer: KFAC, outside: bool) -> list[torch.Tensor]:
        x, y = batch(0)
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with optimizer.record():
                loss = F.cross_entropy(model(x).float(), y)
            loss.backward()
            if not outside:
                optimizer.preconditioner.precondition()
        if outside:
            optimizer.preconditioner.precondition()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    torch.set_default_dtype(torch.float32)
    try:
        found = [loss_of(model := net(), paper(model), outside) for outside in (True, False)]
    finally:
        torch.set_default_dtype(torch.float64)
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@surrounding("`GradScaler`, unscaled before the step", "contexts")
def scaler() -> None:
    scale = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def step(model: nn.Module, optimizer: KFAC, x: torch.Tensor, y: torch.Tensor) -> None:
        with optimizer.record():
            loss = F.cross_entropy(model(x), y)
        scale.scale(loss).backward()
        scale.unscale_(optimizer)
        scale.step(optimizer)
        scale.update()
        optimizer.zero_grad()

    _steps(step)


@surrounding("`GradScaler`, unscaled by its step", "contexts")
def scaler_alone() -> None:
    scale = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def step(model: nn.Module, optimizer: KFAC, x: torch.Tensor, y: torch.Tensor) -> None:
        with optimizer.record():
            loss = F.cross_entropy(model(x), y)
        scale.scale(loss).backward()
        scale.step(optimizer)
        scale.update()
        optimizer.zero_grad()

    _steps(step)


@surrounding("gradients clipped before the step", "contexts")
def clipped() -> None:
    def step(model: nn.Module, optimizer: KFAC, x: torch.Tensor, y: torch.Tensor) -> None:
        with optimizer.record():
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1e6)
        optimizer.step()
        optimizer.zero_grad()

    _steps(step)


@surrounding("updates clipped after preconditioning", "contexts")
def clipped_after() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    kfac = Preconditioner(model, KFACConfig(**PAPER))
    for number in range(STEPS):
        x, y = batch(number)
        with kfac.record():
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        kfac.precondition()
        nn.utils.clip_grad_norm_(model.parameters(), 1e6)
        optimizer.step()
        optimizer.zero_grad()
    assert_same([p.detach() for p in model.parameters()], expected())


@surrounding("a `forward` under `no_grad`, given to `curvature`", "contexts")
def forward_without_graph() -> str:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 3)

        @torch.no_grad()
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x)

    def call() -> None:
        x = torch.randn(4, 6)
        curvature(Frozen(), x, likelihood="categorical", kfac_approx="expand")

    return refusal(call, RuntimeError)


@surrounding("`torch.inference_mode` around `curvature`", "contexts")
def inference_mode() -> str:
    def call() -> None:
        with torch.inference_mode():
            curvature(net(), batch(0)[0], likelihood="categorical", kfac_approx="expand")

    return refusal(call, RuntimeError)


@surrounding("`torch.no_grad` around `step`", "contexts")
def no_grad_around_step() -> None:
    def step(model: nn.Module, optimizer: KFAC, x: torch.Tensor, y: torch.Tensor) -> None:
        with optimizer.record():
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        with torch.no_grad():
            optimizer.step()
        optimizer.zero_grad()

    _steps(step)


@surrounding("a pass without gradients inside `record` (teacher, target network)", "contexts")
def teacher() -> None:
    def step(model: nn.Module, optimizer: KFAC, x: torch.Tensor, y: torch.Tensor) -> None:
        with optimizer.record():
            with torch.no_grad():
                F.cross_entropy(model(7 * x), y)
            with torch.inference_mode():
                model(5 * x)
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    _steps(step)


def _compiled(how: str) -> None:
    torch._dynamo.reset()
    model: Any = net()
    compile_ = functools.partial(torch.compile, backend="eager")
    called: Any = model
    if how == "part":
        model[3] = compile_(model[3])
    elif how == "model":
        called = compile_(model)
    elif how == "in place":
        model.compile(backend="eager")
    elif how == "function":
        called = compile_(lambda x: model(x))
    optimizer = paper(model)
    called(batch(0)[0])  # compiled before the first recorded pass
    for number in range(STEPS):
        plain_step(called, optimizer, *batch(number))
    assert_same([p.detach() for p in model.parameters()], expected())


for _how, _words in {
    "part": "`torch.compile` of a layer",
    "model": "`torch.compile` of the model",
    "in place": "`model.compile()`",
    "function": "`torch.compile` of a function that calls the model",
}.items():
    surrounding(_words, "contexts")(functools.partial(_compiled, _how))


@surrounding("`torch.compile` of the whole step", "contexts")
def compiled_step() -> str:
    torch._dynamo.reset()
    model = net()
    optimizer = paper(model)
    said = refusal(
        lambda: torch.compile(plain_step, backend="eager")(model, optimizer, *batch(0)),
        RuntimeError,
    )
    # Nothing is left behind: it trains, compiled or not.
    assert_same(train(model, optimizer), expected())
    again = net()
    assert_same(train(torch.compile(again, backend="eager"), paper(again)), expected())
    return said


@surrounding("`torch.func.functional_call`", "contexts")
def functional_call() -> None:
    def step(model: nn.Module, optimizer: KFAC, x: torch.Tensor, y: torch.Tensor) -> None:
        with optimizer.record():
            out = torch.func.functional_call(model, dict(model.named_parameters()), (x,))
            loss = F.cross_entropy(out, y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    _steps(step)


@surrounding("`torch.func` transforms inside `record`", "contexts")
def transforms() -> None:
    def step(model: nn.Module, optimizer: KFAC, x: torch.Tensor, y: torch.Tensor) -> None:
        values = {name: p.detach() for name, p in model.named_parameters()}

        def alone(state: Any, one: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = torch.func.functional_call(model, state, (one.unsqueeze(0),))
            return out.square().sum()

        with optimizer.record():
            torch.func.vmap(torch.func.grad(alone), (None, 0))(values, x)
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    _steps(step)


def _checkpointed(reentrant: bool) -> None:
    def step(model: Any, optimizer: KFAC, x: torch.Tensor, y: torch.Tensor) -> None:
        with optimizer.record():
            h = checkpoint(model[:3], x.requires_grad_(), use_reentrant=reentrant)
            loss = F.cross_entropy(model[3](h), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    _steps(step)


@surrounding("activation checkpointing (`use_reentrant=False`)", "contexts")
def checkpointed() -> None:
    _checkpointed(False)


@surrounding("activation checkpointing (`use_reentrant=True`)", "contexts")
def checkpointed_reentrant() -> str:
    return refusal(lambda: _checkpointed(True), RuntimeError)


@surrounding("several trainers in threads", "contexts")
def threads() -> None:
    precisions = ("float32", "bfloat16")

    def run(precision: str) -> list[torch.Tensor]:
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).float()
        state = {k: torch.full_like(v, 0.1) for k, v in model.state_dict().items()}
        model.load_state_dict(state)
        optimizer = paper(model, factor_precision=precision)
        for number in range(10):
            x, y = batch(number)
            plain_step(model, optimizer, x.float(), y)
        return [p.detach().clone() for p in model.parameters()]

    alone = {precision: run(precision) for precision in precisions}
    found: dict[int, list[torch.Tensor]] = {}

    def work(number: int) -> None:
        found[number] = run(precisions[number % 2])

    workers = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 4
    for number, values in found.items():
        for one, other in zip(values, alone[precisions[number % 2]], strict=True):
            assert torch.equal(one, other)


@surrounding("inference of the same model in another thread", "contexts")
def serving() -> None:
    model = net()
    over, failed = threading.Event(), []

    def serve() -> None:
        try:
            while not over.is_set():
                with torch.no_grad():
                    model(torch.randn(5, 4))
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        found = train(model, paper(model))
    finally:
        over.set()
        thread.join()
    assert not failed
    assert_same(found, expected())


@surrounding("deepcopy, pickle and saving inside `record`", "contexts")
def copied_inside() -> None:
    copies = []

    def step(model: nn.Module, optimizer: KFAC, x: torch.Tensor, y: torch.Tensor) -> None:
        with optimizer.record():
            copies.append(copy.deepcopy(model))
            copies.append(pickle.loads(pickle.dumps(model)))
            torch.save(model, io.BytesIO())
            loss = F.cross_entropy(model(x), y)
            copies[-1](x)  # not counted
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    _steps(step)
    for copied in copies:
        assert not any(module._forward_hooks for module in copied.modules())
        copied(batch(0)[0]).sum().backward()
        assert all(p.grad is not None for p in copied.parameters())


@surrounding("deepcopy and pickle of the optimizer and its model", "contexts")
def copied_between() -> None:
    for copier in (copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))):
        model = net()
        optimizer = KFAC(model, lr=1e-2, **EVERY_STEP)
        train(model, optimizer, steps=3)
        other, other_optimizer = copier((model, optimizer))
        for number in range(3, 6):
            plain_step(model, optimizer, *batch(number))
            plain_step(other, other_optimizer, *batch(number))
        for one, two in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(one, two)


@surrounding("hooks of modules that change outputs", "contexts")
def hooks() -> None:
    def run(hooked: bool) -> list[torch.Tensor]:
        class Doubled(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = net()

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                y: torch.Tensor = self.inner(x)
                return y if hooked else 2 * y

        model = Doubled()
        if hooked:
            model.inner[3].register_forward_hook(lambda _m, _i, y: 2 * y)
        return train(model, paper(model))

    assert_same(run(True), run(False))


# ---- layouts ------------------------------------------------------------------------------------


def _sparse_rows(layout: str) -> None:
    torch.manual_seed(1)
    weight = nn.Parameter(torch.randn(4, 3))

    class Map(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(weight.detach().clone())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.sparse.mm(x, self.weight)

    model = Map()
    optimizer = paper(model)
    x, y = batch(0)
    x = x.to_sparse_coo() if layout == "COO" else x.to_sparse_csr()
    with optimizer.record():
        loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    (row,) = optimizer.report()
    assert row.preconditioner == "diagonal"
    assert row.reason


for _layout in ("COO", "CSR"):
    surrounding(f"sparse inputs of a linear map ({_layout}): the diagonal, reported", "layouts")(
        functools.partial(_sparse_rows, _layout)
    )


def assert_written_alike(make: Callable[[bool], nn.Module], x: torch.Tensor) -> None:
    """Two ways of writing a net, with the same parameters, have the same directions."""
    y = torch.randint(3, (len(x),))
    for approx in ("expand", "reduce"):
        found = []
        for way in (True, False):
            model = make(way)
            kfac = Preconditioner(model, KFACConfig(**{**PAPER, "kfac_approx": approx}))
            with kfac.record():
                loss = F.cross_entropy(model(x), y)
            loss.backward()
            kfac.precondition()
            found.append([p.grad for p in model.parameters()])
        assert_same(found[0], found[1])


@surrounding("norms with time in front", "layouts")
def time_first() -> None:
    class Encoder(nn.Module):
        def __init__(self, batch_first: bool) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.first = batch_first
            self.into = nn.Linear(4, 8)
            self.encoder = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=batch_first)
            self.out = nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:  # [N, T, 4]
            x = x if self.first else x.transpose(0, 1)
            return self.out(self.encoder(self.into(x)).mean(1 if self.first else 0))

    assert_written_alike(Encoder, torch.randn(6, 5, 4))


@surrounding("positions looked up once for all examples ([1, T] indices)", "layouts")
def shared_positions() -> None:
    class Words(nn.Module):
        def __init__(self, expanded: bool) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.expanded = expanded
            self.word, self.position = nn.Embedding(7, 6), nn.Embedding(5, 6)
            self.out = nn.Linear(6, 3)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            index = torch.arange(tokens.shape[1]).unsqueeze(0)
            index = index.expand_as(tokens) if self.expanded else index
            return self.out((self.word(tokens) + self.position(index)).tanh().mean(1))

    assert_written_alike(Words, torch.randint(7, (6, 5)))


REFUSED = {
    "FSDP2 over tensor parallelism", "FSDP1 (`FullyShardedDataParallel`)",
    "tensor parallelism (DTensor)",
    "DataParallel on several devices", "a pipeline stage that does not compute the loss",
    "`record` forgotten", "no loss inside `record`, and none stated",
    "a likelihood that the loss seen contradicts", "classes in another dimension, targets given",
    "classes in another dimension, no targets", "an output that is a dict, given to `curvature`",
    "`torch.compile` of the whole step",
    "`torch.inference_mode` around `curvature`",
    "a `forward` under `no_grad`, given to `curvature`",
    "activation checkpointing (`use_reentrant=True`)",
}  # fmt: skip


def table() -> str:
    """docs/surroundings.md."""
    lines = [
        "# What may stand around the engine",
        "",
        "Made by `python tests/kfac/surroundings.py`: every row was tried. Supported: the"
        " parameters are those of plain training to 1e-10 in float64; where the "
        "surrounding changes the model itself (rows `parameters`), every parameter is "
        "followed and trained. Refused: an error that says what to do, before a parameter"
        " is changed.",
        "",
        "| | surrounding | |",
        "|---|---|---|",
    ]
    for name, function in SURROUNDINGS.items():
        said = function()
        verdict = "supported" if said is None else f"refused: {said}"
        lines.append(f"| {KINDS[name]} | {name} | {verdict} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    Path(__file__).parents[2].joinpath("docs/surroundings.md").write_text(table())
