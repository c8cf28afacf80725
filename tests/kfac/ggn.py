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
    return torch.cat([jacobians[name].flatten(1) for name in names], 1)


def loss_hessian(logits: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """Hessian of the (mean) loss with respect to the flattened logits."""
    flat = logits.detach().flatten()
    hessian = torch.func.hessian(lambda f: loss(f.view_as(logits)))(flat)
    return hessian


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


def joint_matrix_order(weight_shape: torch.Size, has_bias: bool) -> Tensor:
    """Index that sorts (weight, bias) flattened into the rows of [P_out, P_in + 1]."""
    out_side, in_side = weight_shape[0], weight_shape[1:].numel()
    weight = torch.arange(out_side * in_side).reshape(out_side, in_side)
    if not has_bias:
        return weight.flatten()
    bias = out_side * in_side + torch.arange(out_side).unsqueeze(1)
    return torch.cat([weight, bias], 1).flatten()


def layer_ggn(
    model: nn.Module, layer: str, inputs: tuple, loss: Callable[[Tensor], Tensor]
) -> Tensor:
    """GGN block of a layer's weight and bias, ordered as the rows of [P_out, P_in (+1)]."""
    module = model.get_submodule(layer)
    names = [f"{layer}.weight"] + ([f"{layer}.bias"] if module.bias is not None else [])
    block = exact_ggn(model, names, inputs, loss)
    order = joint_matrix_order(module.weight.shape, module.bias is not None)
    return block[order][:, order]


def relative_error(estimate: Tensor, truth: Tensor) -> float:
    """Frobenius norm of the difference over that of the truth."""
    return float((estimate - truth).norm() / truth.norm())
