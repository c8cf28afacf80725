"""What can be seen of a preconditioner, and done to it, from outside."""

import gc
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


def curvature_tensors(kfac: Any) -> dict[str, Tensor]:
    """ "block.field" -> tensor of its current curvature."""
    return {
        f"{name}.{key}": value
        for name, block in kfac.curvature().items()
        for key, value in vars(block).items()
        if isinstance(value, Tensor)
    }


def assert_same_tensors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Equal to the bit."""
    assert found.keys() == expected.keys() != set()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def state_tensors(kfac: Any) -> list[Tensor]:
    """All tensors of the state that is saved, however it is laid out."""

    def tensors_in(value: Any) -> Iterable[Tensor]:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Mapping):
            for item in value.values():
                yield from tensors_in(item)
        elif isinstance(value, list | tuple):
            for item in value:
                yield from tensors_in(item)

    return list(tensors_in(kfac.state_dict()))


def live_tensors() -> tuple[int, int]:
    """How many tensors there are in this process, and how many numbers they have."""
    gc.collect()
    found = [o for o in gc.get_objects() if type(o) in (Tensor, nn.Parameter)]
    return len(found), sum(t.numel() for t in found)


def live_bytes() -> int:
    """The size of all storages of tensors that there are in this process."""
    gc.collect()
    found = [o for o in gc.get_objects() if type(o) in (Tensor, nn.Parameter)]
    storages = [tensor.untyped_storage() for tensor in found]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def preconditioner_matrix(model: nn.Module, kfac: Any, layer: str) -> Tensor:
    """The matrix that `precondition` multiplies the gradient of a layer by.

    Of its parameters, flattened and joined. Takes a step for each entry; none may be due to update.
    """
    parameters = list(model.get_submodule(layer).parameters())
    sizes = [parameter.numel() for parameter in parameters]
    columns = []
    for unit in torch.eye(sum(sizes)):
        assert not kfac.factors_due
        model.zero_grad()
        for parameter, piece in zip(parameters, unit.split(sizes), strict=True):
            parameter.grad = piece.reshape(parameter.shape).clone()
        kfac.precondition()
        columns.append(torch.cat([parameter.grad.flatten() for parameter in parameters]))
    return torch.stack(columns, 1)


def assert_same_factors(
    found: Mapping[str, Any], expected: Mapping[str, Any], rtol: float = 1e-12
) -> None:
    """Of blocks in the same order, up to rounding."""
    assert len(found) == len(expected) > 0
    for block, other in zip(found.values(), expected.values(), strict=True):
        for key, value in vars(other).items():
            if isinstance(value, Tensor):
                torch.testing.assert_close(getattr(block, key), value, rtol=rtol, atol=1e-14)


class FisherPasses:
    """Counts backward passes through the logits given to `update`, less one for each: its loss's.

    To be asked when the losses' passes are over.
    """

    def __init__(self, patch: Any, preconditioner: type) -> None:
        self._made = self._updates = 0
        update = preconditioner.update

        def watched(kfac: Any, logits: Tensor, *args: Any, **options: Any) -> None:
            self._updates += 1
            logits.grad_fn.register_prehook(self._count)
            update(kfac, logits, *args, **options)

        patch.setattr(preconditioner, "update", watched)

    def _count(self, gradients: tuple[Tensor, ...]) -> None:
        self._made += 1

    def __len__(self) -> int:
        return self._made - self._updates


def out_of_memory(*args: Any, **options: Any) -> Any:
    raise torch.OutOfMemoryError("no memory left")


def not_positive_definite(matrix: Tensor, *args: Any, **options: Any) -> Any:
    """What `torch.linalg.cholesky_ex` says of a matrix that has no factorisation."""
    info = torch.ones(matrix.shape[:-2], dtype=torch.int32)
    return torch.return_types.linalg_cholesky_ex((torch.full_like(matrix, torch.nan), info))


FAILURES: dict[str, Callable[..., Any]] = {
    "out of memory": out_of_memory,
    "not positive definite": not_positive_definite,
}


class NoMemoryFor(TorchDispatchMode):
    """Inside, the first operation whose result ends in these sizes runs out of memory."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.sizes = sizes
        self.refused = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, list | tuple) else [result]:
            fits = isinstance(value, Tensor) and value.shape[-len(self.sizes) :] == self.sizes
            if fits and not self.refused:
                self.refused = True
                raise torch.OutOfMemoryError("no memory left")
        return result
