"""The exact GGN in float64 by torch.func: the truth that the engine is tested against."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev


def output_jacobian(model: nn.Module, names: list[str], forward: Callable[..., Tensor]) -> Tensor:
    """Jacobian of the flattened output with respect to the named parameters: [outputs, P].

    `forward(call)` runs the model through `call(*inputs)`.
    """
    parameters = {name: dict(model.named_parameters())[name].detach() for name in names}
    rest = {
        name: p.detach() for name, p in model.named_parameters() if name not in parameters
    } | dict(model.named_buffers())

    def outputs(values: dict[str, Tensor]) -> Tensor:
        return forward(lambda *a: functional_call(model, {**rest, **values}, a)).flatten()

    jacobians = jacrev(outputs)(parameters)
    return torch.cat([jacobians[name].reshape(-1, parameters[name].numel()) for name in names], 1)


def loss_hessian(logits: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """Hessian of the (mean) loss with respect to the flattened logits."""
    flat = logits.detach().flatten()
    return torch.func.hessian(lambda f: loss(f.view_as(logits)))(flat)


def exact_ggn(
    model: nn.Module,
    names: list[str],
    inputs: tuple,
    loss: Callable[[Tensor], Tensor],
) -> Tensor:
    """GGN block of the named parameters, in the order of their flattened concatenation."""
    jacobian = output_jacobian(model, names, lambda call: call(*inputs))
    hessian = loss_hessian(model(*inputs), loss)
    return jacobian.T @ hessian @ jacobian


def matrix_order(module: nn.Module) -> Tensor:
    """Index that sorts (weight, bias) into matrices [groups, P_out, P_in (+1)], flattened.

    Written out here independently of the engine's own view of layers.
    """
    weight = torch.arange(module.weight.numel()).reshape(module.weight.shape)
    groups = getattr(module, "groups", 1)
    if isinstance(module, nn.Embedding):
        matrix = weight.T.unsqueeze(0)
    elif getattr(module, "transposed", False):  # [C_in, C_out / groups, *kernel]
        matrix = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
        matrix = matrix.transpose(1, 2).flatten(2)
    else:
        matrix = weight.reshape(groups, weight.shape[0] // groups, -1)
    if getattr(module, "bias", None) is not None:
        bias = weight.numel() + torch.arange(module.bias.numel())
        matrix = torch.cat([matrix, bias.reshape(*matrix.shape[:2], 1)], -1)
    return matrix.flatten(1)


def layer_ggn(
    model: nn.Module, layer: str, inputs: tuple, loss: Callable[[Tensor], Tensor]
) -> Tensor:
    """GGN block of a layer, per group, ordered as the matrix [P_out, P_in (+1)]."""
    module = model.get_submodule(layer)
    prefix = f"{layer}." if layer else ""
    names = [prefix + "weight"]
    if getattr(module, "bias", None) is not None:
        names.append(prefix + "bias")
    block = exact_ggn(model, names, inputs, loss)
    blocks = [block[order][:, order] for order in matrix_order(module)]
    return blocks[0] if len(blocks) == 1 else torch.stack(blocks)


def relative_error(estimate: Tensor, truth: Tensor) -> float:
    """Frobenius norm of the difference over that of the truth."""
    assert estimate.shape == truth.shape
    return float((estimate - truth).norm() / truth.norm())
