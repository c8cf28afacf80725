"""A device that is not the CPU where there is no GPU: `torch.device("simulated")`.

It computes on the CPU (simulated_device.cpp, which a C++ compiler builds once), but PyTorch takes
it for another device: a tensor on the wrong one is an error, as on a GPU, and what a GPU would have
to be waited for is counted.
"""

import types
from collections import Counter
from pathlib import Path

import torch
from torch.utils import cpp_extension

NAME = "simulated"
_built = []


def register():
    """Builds it if need be. Autograd knows the devices that there are at its first backward pass.

    Raises:
        RuntimeError, OSError: it cannot be built: it needs a C++ compiler and ninja.
    """
    extension = cpp_extension.load(
        f"kfac_{NAME}_device", [str(Path(__file__).with_suffix(".cpp"))], extra_cflags=["-O1"]
    )
    torch.utils.rename_privateuse1_backend(NAME)
    module = types.ModuleType(f"torch.{NAME}")
    module.is_available = module.is_initialized = lambda: True
    module._is_in_bad_fork = lambda: False
    module.device_count, module.current_device = lambda: 1, lambda: 0
    module.set_device = module.manual_seed_all = lambda _: None
    module.get_amp_supported_dtype = lambda: [torch.bfloat16]
    torch._register_device_module(NAME, module)
    torch.utils.generate_methods_for_privateuse1_backend()
    extension.register_hooks()
    _built.append(extension)


def may_wait(may):
    """Whether it is no error where a GPU would be waited for."""
    _built[0].may_wait(may)


def waits():
    """Name of an operation -> how often a GPU would have been waited for; begins to count anew."""
    found = Counter(_built[0].waits())
    _built[0].forget_waits()
    return found
