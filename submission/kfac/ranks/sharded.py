"""Parameters that FSDP2 (`fully_shard`) keeps in parts, one on each rank.

Its modules hold whole parameters while they run, which is when operations are seen; what is kept,
and what an optimizer changes, are the parts (DTensors). K-FAC works with whole gradients: they are
gathered on every rank, and each takes its part of what they are replaced by.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from . import collectives

REMEDY = (
    "K-FAC needs whole parameters on every rank, or FSDP2's shards. Use DistributedDataParallel or "
    "fully_shard over all ranks; inverse_placement='one_rank' shares the memory of the inverses out"
)


def _of(module: str, name: str) -> Any:
    """A class of a module that may not be loaded, as isinstance takes it."""
    return getattr(sys.modules.get(module), name, ())


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor."""
    return isinstance(tensor, _of("torch.distributed.tensor", "DTensor"))


def check_supported(model: nn.Module) -> None:
    """Whether parameters are whole or in FSDP2's parts, and every rank runs the module itself.

    Raises:
        ValueError: they are not, or replicas run in other threads.
    """
    fsdp1 = _of("torch.distributed.fsdp", "FullyShardedDataParallel")
    what = None
    for name, module in model.named_modules():
        if isinstance(module, fsdp1):
            what = f"module '{name}' is a FullyShardedDataParallel"
        elif isinstance(module, nn.DataParallel) and len(module.device_ids) > 1:
            what = f"module '{name}' is a DataParallel, whose replicas run in other threads"
    for name, parameter in model.named_parameters():
        if what is None and is_sharded(parameter):
            what = _why_not(model, name, parameter)
    if what is not None:
        raise ValueError(f"{what}: {REMEDY}")


def _why_not(model: nn.Module, name: str, parameter: Any) -> str | None:
    *kept, last = parameter.placements
    *path, _ = name.split(".")
    holders = [model.get_submodule(".".join(path[:end])) for end in range(len(path) + 1)]
    places = ("torch.distributed.fsdp", "torch.distributed._composable.fsdp")  # the latter in 2.5
    if not any(isinstance(m, _of(place, "FSDPModule")) for m in holders for place in places):
        return f"parameter '{name}' is a DTensor, but fully_shard was given no module it is in"
    if not last.is_shard() or not all(placement.is_replicate() for placement in kept):
        return f"parameter '{name}' is a DTensor with other placements than FSDP2's"
    if parameter.device_mesh.size() != collectives.world_size():
        return f"parameter '{name}' is shared out over some of the ranks only"
    return None


@contextmanager
def wholes_seen(model: nn.Module, see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Inside, `see` is given the names of parameters that are in parts, and the whole ones.

    It is called before each module's forward pass, of the module and those inside it.
    """
    owned: dict[nn.Module, list[tuple[str, str]]] = {
        module: [
            (key, f"{name}.{key}" if name else key)
            for key, parameter in module.named_parameters(recurse=False)
            if is_sharded(parameter)
        ]
        for name, module in model.named_modules()
    }
    if not any(owned.values()):
        yield
        return

    def look(module: nn.Module, _: Any) -> None:
        for inner in module.modules():
            for key, name in owned.get(inner, ()):
                parameter = getattr(inner, key)
                if not is_sharded(parameter):
                    see(name, parameter)

    # After FSDP2's own hooks, which make the parameters whole.
    handles = [module.register_forward_pre_hook(look) for module in owned]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """A tensor of which each rank may have a part; together on all ranks."""
    if not is_sharded(tensor):
        return tensor
    dtensor: Any = tensor
    gathered: Tensor = dtensor.full_tensor()
    return gathered


def whole_gradients(parameters: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
    """Name of a parameter -> its gradient, as `whole`."""
    return {n: None if p.grad is None else whole(p.grad) for n, p in parameters.items()}


@torch.no_grad()
def take_parts(parameters: Mapping[str, Tensor], gradients: Mapping[str, Tensor | None]) -> None:
    """Makes whole gradients the gradients of parameters that are in parts."""
    for name, parameter in parameters.items():
        gradient = gradients[name]
        if gradient is None or not is_sharded(parameter):
            continue
        from torch.distributed.tensor import DTensor, Replicate

        sharded: Any = parameter
        everywhere = [Replicate()] * sharded.device_mesh.ndim
        replicated: Any = DTensor.from_local(
            gradient, sharded.device_mesh, everywhere, run_check=False
        )
        parameter.grad = replicated.redistribute(placements=sharded.placements)
