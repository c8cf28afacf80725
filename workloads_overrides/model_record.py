"""Layer shapes and activations of AlgoPerf's models, recorded once so that they need no AlgoPerf.

    python -m workloads_overrides.model_record --clone=ALGOPERF

builds every base workload's model in an environment with AlgoPerf, runs one small forward pass of
it on fake data, and writes `recorded_models.json`. `skeleton` makes a model with the same layers
from the record, on PyTorch's meta device: shapes without memory. `finewebedu_lm`, which the tested
commit of AlgoPerf does not have, is recorded from its double (`language_model`) at its full size.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from submission.algoperf_compat import spec
from submission.kfac.operations.record import Recording
from workloads_overrides import language_model

LANGUAGE_MODEL = "finewebedu_lm"
RECORD = Path(__file__).with_name("recorded_models.json")

# Layer type -> the arguments that its parameters' shapes depend on.
_CONVOLUTION = ("in_channels", "out_channels", "kernel_size", "groups", "bias")
ARGUMENTS: dict[str, tuple[str, ...]] = {
    "Linear": ("in_features", "out_features", "bias"),
    "Embedding": ("num_embeddings", "embedding_dim"),
    "LSTM": ("input_size", "hidden_size", "num_layers", "bias", "bidirectional"),
    "LayerNorm": ("normalized_shape",),
    "RMSNorm": ("normalized_shape",),
    "GroupNorm": ("num_groups", "num_channels"),
    "BatchNorm2d": ("num_features",),
} | dict.fromkeys(("Conv1d", "Conv2d", "ConvTranspose2d"), _CONVOLUTION)

NODES_PER_GRAPH, EDGES_PER_GRAPH = 26, 56  # what ogbg's input pipeline pads batches to
MEASURED_BATCH = 2  # examples of the forward pass whose activations are measured


def structure_of(model: nn.Module) -> list[list[Any]]:
    """[name, type, arguments] of every module with parameters of its own.

    Of a type that is not in `ARGUMENTS` the parameters' shapes are kept: type "Parameters". A
    parameter that a module before it holds is named among the arguments: "tied".
    """
    rows: list[list[Any]] = []
    first = {parameter: name for name, parameter in model.named_parameters()}
    for name, module in model.named_modules():
        own = {key: p for key, p in module._parameters.items() if p is not None}
        if not own:
            continue
        place = f"{name}." if name else ""
        tied = {key: first[p] for key, p in own.items() if first[p] != place + key}
        kind = type(module).__name__
        if kind in ARGUMENTS and type(module) is getattr(nn, kind):
            values = {key: getattr(module, key) for key in ARGUMENTS[kind]}
            values["bias"] = values["bias"] is not None if "bias" in values else None
            arguments = {k: v for k, v in values.items() if v is not None}
        else:
            kind, arguments = "Parameters", {key: list(p.shape) for key, p in own.items()}
        rows.append([name, kind, arguments | ({"tied": tied} if tied else {})])
    return rows


def skeleton(structure: Sequence[Sequence[Any]]) -> nn.Module:
    """A model on the meta device with the recorded modules; it cannot run."""
    root = nn.Module()
    with torch.device("meta"):
        for name, kind, arguments in structure:
            module = _module(kind, {k: v for k, v in arguments.items() if k != "tied"})
            for key, held in arguments.get("tied", {}).items():
                module.register_parameter(key, root.get_parameter(held))
            if not name:
                for key, parameter in module.named_parameters():
                    root.register_parameter(key, parameter)
                continue
            *path, last = name.split(".")
            parent = root
            for step in path:
                if step not in parent._modules:
                    parent.add_module(step, nn.Module())
                parent = parent.get_submodule(step)
            if last in parent._modules:  # a holder that was made for a module inside it
                module._modules.update(parent._modules[last]._modules)  # type: ignore[union-attr]
            parent.add_module(last, module)
    return root


def _module(kind: str, arguments: Mapping[str, Any]) -> nn.Module:
    if kind == "Parameters":
        module = nn.Module()
        for key, shape in arguments.items():
            module.register_parameter(key, nn.Parameter(torch.empty(shape)))
        return module
    made: nn.Module = getattr(nn, kind)(
        **{key: tuple(v) if isinstance(v, list) else v for key, v in arguments.items()}
    )
    return made


def uses_of(model: nn.Module) -> dict[Any, None]:
    """What the modules of a skeleton do with their parameters: each is run on its own."""
    recording = Recording(dict(model.named_parameters()))
    with recording, torch.device("meta"):
        for module in model.modules():
            if type(module).__name__ in ARGUMENTS:
                module(_input_of(module))
    return dict.fromkeys(call.use for call in recording.calls)


def _input_of(module: Any) -> Tensor:
    """The smallest input that a module takes, and images that no kernel is larger than."""
    dims = len(getattr(module, "kernel_size", ()))
    if dims:
        return torch.empty(1, module.in_channels, *(64,) * dims)
    if isinstance(module, nn.Embedding):
        return torch.zeros(1, 1, dtype=torch.int64)
    if isinstance(module, nn.LSTM):
        return torch.empty(1, 1, module.input_size)
    if isinstance(module, nn.BatchNorm2d):
        return torch.empty(2, module.num_features, 2, 2)
    if isinstance(module, nn.GroupNorm):
        return torch.empty(1, module.num_channels, 2)
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return torch.empty(1, *module.normalized_shape)
    return torch.empty(1, module.in_features)


def saved_bytes(model: nn.Module, run: Any) -> int:
    """Bytes that autograd keeps for the backward pass of what `run()` does, parameters left out."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in parameters:
            kept[pointer] = tensor  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    del result
    return total


def record_workload(test: Any, name: str) -> dict[str, Any]:
    """The record of a base workload, from AlgoPerf's test module with its flags parsed."""
    entry = test.submission_runner.WORKLOADS[name]
    path = (
        f"{test.submission_runner.BASE_WORKLOADS_DIR}{entry['workload_path']}_pytorch/workload.py"
    )
    workload_class = test.workloads.import_workload(
        path, entry["workload_class_name"], return_class=True
    )
    workload = test._make_one_batch_workload(
        workload_class, name, "pytorch", MEASURED_BATCH, True, 1
    )
    model, state = workload.init_model_fn([0, 0])
    batch = next(workload._build_input_queue([0, 0], "train", "", MEASURED_BATCH))
    if name == "ogbg":
        batch = _graphs(MEASURED_BATCH)
    model.train()

    def run() -> Any:
        return workload.model_fn(model, batch, state, spec.ForwardPassMode.TRAIN, [0, 0], True)

    return {
        "modules": structure_of(model),
        "saved_bytes": saved_bytes(model, run),
        "measured_batch": MEASURED_BATCH,
    }


def record_language_model() -> dict[str, Any]:
    """The record of `finewebedu_lm`, from its double at full size."""
    shape = language_model.FULL_SIZE
    model = language_model.LanguageModel(shape)
    workload = language_model.LanguageWorkload()
    batch = language_model.token_batch(
        shape, 0, False, examples=MEASURED_BATCH, length=language_model.FULL_LENGTH
    )

    def run() -> Any:
        logits, _ = workload.model_fn(model, batch, spec.ForwardPassMode.TRAIN)
        return workload.loss_fn(batch["targets"], logits)

    return {
        "modules": structure_of(model),
        "saved_bytes": saved_bytes(model, run),
        "measured_batch": MEASURED_BATCH,
    }


def _graphs(number: int) -> dict[str, Any]:
    """Graphs of the size that ogbg's pipeline pads to."""
    jraph: Any = importlib.import_module("jraph")
    nodes, edges = NODES_PER_GRAPH * number, EDGES_PER_GRAPH * number
    ends = torch.arange(edges) % nodes
    graph = jraph.GraphsTuple(
        nodes=torch.randn(nodes, 9), edges=torch.randn(edges, 3), senders=ends, receivers=ends,
        globals=None, n_node=torch.full((number,), NODES_PER_GRAPH),
        n_edge=torch.full((number,), EDGES_PER_GRAPH),
    )  # fmt: skip
    return {"inputs": graph}


def main(argv: Sequence[str] | None = None) -> None:
    """Records the named workloads, or all of them; keeps the records of others."""
    parser = argparse.ArgumentParser(prog="workloads_overrides.model_record", allow_abbrev=False)
    parser.add_argument("--clone", required=True, type=Path, help="folder of AlgoPerf's repository")
    parser.add_argument("workloads", nargs="*", help="default: all of them")
    arguments = parser.parse_args(argv)
    from workloads_overrides.fake_queue import import_triton_first

    import_triton_first()
    sys.path.insert(0, str(arguments.clone.resolve()))
    test: Any = importlib.import_module("tests.reference_algorithm_tests")
    test.FLAGS(["test", "--framework=pytorch", f"--global_batch_size={MEASURED_BATCH}"])
    base = [*test.workloads.BASE_WORKLOADS, "mnist", "cifar"]
    names = arguments.workloads or list(dict.fromkeys([*base, LANGUAGE_MODEL]))
    records = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    for name in names:
        doubled = name == LANGUAGE_MODEL and name not in base
        records[name] = record_language_model() if doubled else record_workload(test, name)
        print(name, f"{records[name]['saved_bytes'] / 2**20:.0f} MiB", flush=True)
        partial = RECORD.with_suffix(".partial")
        lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in records.items()]
        partial.write_text("{\n" + ",\n".join(lines) + "\n}\n")
        os.replace(partial, RECORD)


if __name__ == "__main__":
    main()
