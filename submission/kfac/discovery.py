"""What recorded passes have shown of a model, and the blocks that follow from it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from torch import nn
from torch.autograd.graph import Node

from .blocks.structure import Options, Structure, structure_of
from .config import KFACConfig
from .fisher.graph import leaves_beside
from .fisher.losses import LossTerms, have_other_rows
from .operations.operation import UnitOperation
from .operations.record import Recording
from .operations.sharing import Positions, SharingRule, example_dim, is_stated
from .operations.uses import Call, Use
from .ranks import collectives
from .ranks.sharded import check_supported

logger = logging.getLogger(__name__)
OTHER_DIMENSION = "an operation whose first dimension does not count the examples"
PARTIAL_BIAS = "an addition to an output that is used without it, too"
LOW_COVERAGE = 0.9  # share of the parameters in factors or exact blocks: below it, a warning is due


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel, DataParallel and torch.compile wrappers.

    Raises:
        ValueError: see `sharded.check_supported`.
    """
    check_supported(model)
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        else:
            inner = getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter.

    Raises:
        ValueError: there is none, or one has no shape yet; or see `sharded.check_supported`.
    """
    check_supported(model)
    found = {}
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ValueError(
                f"parameter '{name}' has no shape yet: run one forward pass before making K-FAC"
            )
        if parameter.requires_grad and parameter.numel():
            found[name] = parameter
    if not found:
        raise ValueError("the model has no trainable parameter")
    return found


def tracked(
    parameters: Mapping[str, nn.Parameter], exclude: Sequence[str]
) -> dict[str, nn.Parameter]:
    """The parameters whose uses are looked at: excluded modules run as they are."""
    return {
        name: parameter
        for name, parameter in parameters.items()
        if not any(name.startswith(key + ".") for key in exclude)
    }


def options_of(config: KFACConfig, approx: str) -> Options:
    """The settings that decide about blocks."""
    return Options(
        approx=approx,
        bias=config.bias,
        norm_rows=config.norm_rows,
        max_factor_side=config.max_factor_side,
        exclude=config.exclude,
    )


def place_examples(
    recording: Recording, losses: Sequence[LossTerms], sharing: SharingRule
) -> list[Call]:
    """Sets which dimension counts the examples of calls of which no rule says it.

    Returns:
        Calls of scales and shifts where it cannot be told: every row would count as an example.
    """
    # Chunks of outputs have other numbers of rows than there are examples.
    chunks = {
        id(one): one.logits._base
        for one in losses
        if any(have_other_rows(one.logits, other.logits) for other in losses if other is not one)
    }
    examples = {len(whole) for whole in chunks.values() if whole is not None}
    apart = [loss for loss in losses if id(loss) not in chunks]
    examples |= {loss.logits.shape[loss.likelihood.example_dim(loss.logits)] for loss in apart}
    # Of outputs with positions of their own, these may be in front of the examples.
    in_front = examples.union(*(loss.likelihood.term_shape(loss.logits)[:2] for loss in apart))
    unplaced = []
    for call in recording.calls:
        labels = [piece.label for piece in call.use.pieces]
        known = call.batch_dim is not None or call.sharing is not None
        if known or any(is_stated(sharing, label) for label in labels):
            continue
        operation, dim = call.operation, None
        if isinstance(operation, UnitOperation):
            dim = example_dim(operation.sizes, operation.row_dims, examples, in_front)
            if dim is None:
                unplaced.append(call)
        elif operation.has_rows_in_front and call.inputs is not None and call.inputs.dim() > 2:
            sizes = call.inputs.shape[:-1]
            dim = example_dim(sizes, range(len(sizes)), examples, in_front)
        if dim:
            call.sharing = Positions(batch_dim=dim)
        elif call.inputs is not None and call.inputs.shape[:1] == (1,) and 1 not in examples:
            recording.mixes_examples = True  # its output is broadcast: the gradients arrive summed
    return unplaced


def found_in(
    recording: Recording,
    losses: Sequence[LossTerms],
    parameters: Mapping[str, nn.Parameter],
    unplaced: Sequence[Call] = (),
) -> tuple[dict[Use, None], dict[str, str]]:
    """The uses of parameters in a recorded pass, and how parameters reach the outputs besides.

    Args:
        losses: all that the pass has.
        unplaced: see `place_examples`.
    """
    below: dict[Node, list[Node | None]] = {n: list(b) for n, b in recording.passed_by.items()}
    entered: dict[Node, set[Node | None]] = {}
    for call in recording.calls:
        assert call.edge is not None
        below.setdefault(call.edge.node, []).extend(call.below)
    below.update({node: [call] for node, call in recording.bias_nodes.items()})
    beside = leaves_beside([loss.logits.grad_fn for loss in losses], below, entered)
    others = {
        name: recording.others.get(name, f"the operation {beside[id(parameter)] or 'itself'}")
        for name, parameter in parameters.items()
        if id(parameter) in beside
    }
    for node, output in recording.bias_nodes.items():
        if entered.get(output, {node}) != {node}:
            for bias in recording.separate_bias(output):
                others.setdefault(bias.parameter, PARTIAL_BIAS)
    for call in unplaced:
        for piece in call.use.pieces:
            others.setdefault(piece.parameter, OTHER_DIMENSION)
    return dict.fromkeys(call.use for call in recording.calls), others


def merged_over_ranks(
    uses: Mapping[Use, None], others: Mapping[str, str]
) -> tuple[dict[Use, None], dict[str, str]]:
    """What any rank has found, the same on all of them."""
    all_uses: dict[Use, None] = {}
    all_others: dict[str, str] = {}
    for some_uses, some_others in collectives.gathered((list(uses), dict(others))):
        all_uses.update(dict.fromkeys(some_uses))
        all_others = {**some_others, **all_others}
    return all_uses, all_others


def structure_from(
    uses: Mapping[Use, None] | None,
    others: Mapping[str, str],
    parameters: Mapping[str, nn.Parameter],
    config: KFACConfig,
    approx: str,
) -> Structure:
    """The blocks of a model; before the first recorded pass every parameter is one of its own."""
    return structure_of(uses or {}, others, parameters, options_of(config, approx))


def warn_of_low_coverage(structure: Structure) -> None:
    """Says once which large parameters have neither factors nor exact blocks, and why."""
    sizes = {b.name: sum(piece.numel for piece in b.pieces) for b in structure.blocks}
    rest = [block.name for block in structure.blocks if block.needs_own_gradients]
    lacking, total = sum(sizes[name] for name in rest), sum(sizes.values())
    if lacking > (1 - LOW_COVERAGE) * total:
        largest = sorted(rest, key=lambda name: -sizes[name])[:3]
        logger.warning(
            "K-FAC: %.1f %% of the parameters have neither Kronecker factors nor exact blocks; the "
            "largest: %s",
            100 * lacking / total,
            "; ".join(f"{name} ({sizes[name]:,}: {structure.reasons[name]})" for name in largest),
        )
