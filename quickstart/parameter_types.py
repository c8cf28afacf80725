"""Shapes and AlgoPerf types of a model's parameters, read off its modules."""

from typing import Any

from torch import nn

from submission.algoperf_compat import spec


class ShapeTuple:
    """A shape that tree utilities treat as a leaf, as in AlgoPerf."""

    def __init__(self, shape_tuple: tuple[int, ...]) -> None:
        self.shape_tuple = shape_tuple

    def __repr__(self) -> str:
        return f"ShapeTuple({self.shape_tuple})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ShapeTuple) and self.shape_tuple == other.shape_tuple

    def __hash__(self) -> int:
        return hash(self.shape_tuple)


def parameter_shapes(model: nn.Module) -> dict[str, ShapeTuple]:
    """Shape of each parameter by name."""
    return {name: ShapeTuple(tuple(p.shape)) for name, p in model.named_parameters()}


def parameter_types(model: nn.Module) -> dict[str, Any]:
    """AlgoPerf's `ParameterType` of each parameter by name."""
    kinds = spec.ParameterType
    attention = {
        "query": kinds.ATTENTION_Q,
        "key": kinds.ATTENTION_K,
        "value": kinds.ATTENTION_V,
        "out": kinds.ATTENTION_OUT,
    }
    types: dict[str, Any] = {}
    for module_name, module in model.named_modules():
        for name, _ in module.named_parameters(recurse=False):
            is_bias = name == "bias"
            path = module_name.split(".")
            if isinstance(module, nn.LayerNorm):
                kind = kinds.LAYER_NORM_BIAS if is_bias else kinds.LAYER_NORM_SCALE
            elif "attention" in path and path[-1] in attention:
                kind = kinds.ATTENTION_BIAS if is_bias else attention[path[-1]]
            elif is_bias:
                kind = kinds.BIAS
            elif isinstance(module, nn.Conv2d):
                kind = kinds.CONV_WEIGHT
            elif path[-1].endswith("embedder"):
                kind = kinds.EMBEDDING
            else:
                kind = kinds.WEIGHT
            types[f"{module_name}.{name}"] = kind
    return types
