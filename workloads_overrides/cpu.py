"""What AlgoPerf's PyTorch workloads take for granted of CUDA, and what stands in for it on a CPU.

Without a GPU `torch.cuda.device_count()` is 0: ogbg's input pipeline divides by it. ImageNet's
loader opens a CUDA stream, the process group is nccl, and models are wrapped in DDP with a GPU's
index. Each process then counts as one device, `WORLD_SIZE` of them. Everything is replaced in
memory, in this order: `torch_replacements` before AlgoPerf is imported (its modules read the
device count when they are), `algoperf_replacements` after.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Replacement:
    """An attribute of a module or class, and what to put in its place."""

    owner: Any
    name: str
    value: Any

    def apply(self) -> None:
        """Puts the value in place, for the rest of the process."""
        setattr(self.owner, self.name, self.value)


def torch_replacements(world_size: int) -> list[Replacement]:
    """Stand-ins inside torch for a machine where each of `world_size` processes is a device."""
    init_ddp = DistributedDataParallel.__init__
    init_process_group = dist.init_process_group

    def without_devices(
        self: DistributedDataParallel,
        module: torch.nn.Module,
        device_ids: object = None,
        output_device: object = None,
        **kwargs: Any,
    ) -> None:
        init_ddp(self, module, **kwargs)

    def over_gloo(backend: object = None, **kwargs: Any) -> None:
        init_process_group("gloo", **kwargs)

    return [
        Replacement(torch.cuda, "device_count", lambda: world_size),
        Replacement(torch.cuda, "set_device", lambda device: None),
        Replacement(torch.cuda, "synchronize", lambda device=None: None),
        Replacement(dist, "init_process_group", over_gloo),
        Replacement(DistributedDataParallel, "__init__", without_devices),
    ]


def algoperf_replacements(data_utils: Any) -> list[Replacement]:
    """Stand-ins inside `algoperf.data_utils`."""
    return [Replacement(data_utils.PrefetchedWrapper, "prefetched_loader", load_without_stream)]


def load_without_stream(self: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """One pass over a wrapped data loader's (inputs, targets), without a CUDA stream.

    Raises:
        ValueError: The loader has no batch; AlgoPerf would start it again and again, for ever.
    """
    if len(self.dataloader) == 0:
        raise ValueError(
            "the data set has fewer examples than one batch: use a smaller --batch-size"
        )
    for inputs, targets in self.dataloader:
        yield inputs.to(self.device, dtype=torch.float), targets.to(self.device)


def apply_all(replacements: Iterable[Replacement]) -> None:
    """Applies replacements in order."""
    for replacement in replacements:
        replacement.apply()
