"""Which rows of a padded batch exist: text and speech, whose examples differ in length.

Nothing here knows a workload. Two ways in which a batch says what is padding are understood:

- a pair, (inputs [N, T, ...], paddings [N, T]) with 1 for padding, as speech pipelines hand it to
  the model. Modules that shorten the sequence hand on such a pair of their own; from the moment
  that one was seen, the padding of all sequences of its length is known.
- a segmentation, `<field>_segmentation` [N, T] beside `<field>` [N, T], with 0 for padding, as
  pipelines that pack texts give it. Which layer works on which field is found out once, by a
  forward pass in which the first field is one token shorter.

A batch that says neither has no padding that could be told from data, and none is guessed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .kfac.discovery import unwrap
from .kfac.operations.sharing import Positions, SharingRule

logger = logging.getLogger(__name__)

SEGMENTATION = "_segmentation"
UNKNOWN = "-"  # the rows of a call belong to no field

Forward = Callable[[nn.Module, Mapping[str, Any]], Any]


def has_paddings(inputs: Any) -> bool:
    """Whether the inputs are a pair of sequences and their paddings."""
    return isinstance(inputs, tuple | list) and len(inputs) == 2 and paddings_in(inputs) is not None


def paddings_in(pair: Any) -> Tensor | None:
    """The paddings [N, T] of a pair (rows, paddings), or None where it is something else.

    The rows have N examples and a dimension of T.
    """
    if not (isinstance(pair, tuple | list) and len(pair) == 2):
        return None
    rows, paddings = pair
    if not (isinstance(rows, Tensor) and isinstance(paddings, Tensor)) or paddings.dim() != 2:
        return None
    fits = rows.dim() >= 2 and rows.shape[0] == paddings.shape[0]
    if not fits or paddings.shape[1] not in rows.shape[1:]:
        return None
    binary = ((paddings == 0) | (paddings == 1)).all()
    return paddings if bool(binary) else None


def segmented_fields(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Field -> mask [N, T] of its tokens that exist, for fields with a segmentation."""
    masks = {}
    for name, segmentation in batch.items():
        field = name.removesuffix(SEGMENTATION)
        tokens = batch.get(field)
        if field == name or not isinstance(tokens, Tensor) or not isinstance(segmentation, Tensor):
            continue
        if tokens.dim() == 2 and tokens.shape == segmentation.shape:
            masks[field] = segmentation > 0
    return masks


@contextmanager
def padded_rows(
    model: nn.Module, batch: Mapping[str, Any], known: dict[str, str], forward: Forward
) -> Iterator[SharingRule]:
    """Follows the forward pass inside, and says how the rows of its layers share their weights.

    Args:
        model: whose forward pass is followed; wrappers are looked through.
        batch: as the workload gives it.
        known: layer name -> fields of its calls, kept by the caller over batches.
        forward: runs a model on a batch without leaving a trace in either; for the one pass that
            finds out which layer works on which field.

    Yields:
        The rule, filled in layer by layer as the forward pass goes on; None without padding.
    """
    inner = unwrap(model)
    if has_paddings(batch.get("inputs")):
        with _following_pairs(inner, batch["inputs"]) as rule:
            yield rule
        return
    masks = segmented_fields(batch)
    if not masks:
        yield None
        return
    if not known:
        known.update(fields_by_probe(inner, batch, masks, forward))
    with _following_fields(inner, masks, known) as rule:
        yield rule


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The layers whose rows are those of sequences, one by one: the last dimension is theirs."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            yield name, module


@contextmanager
def _following_pairs(model: nn.Module, inputs: Any) -> Iterator[dict[str, Positions]]:
    masks: dict[tuple[int, int], Tensor] = {}
    rule: dict[str, Positions] = {}

    def learn(pair: Any) -> None:
        paddings = paddings_in(pair)
        if paddings is not None:
            masks[(paddings.shape[0], paddings.shape[1])] = paddings == 0

    def before(name: str, x: Tensor) -> None:
        mask = masks.get((x.shape[0], x.shape[1])) if x.dim() == 3 else None
        if mask is None:
            rule.pop(name, None)
        else:
            rule[name] = Positions(mask=mask)

    learn(inputs)
    with ExitStack() as stack:
        for module in model.modules():
            if not isinstance(module, nn.Linear | nn.Embedding):
                handle = module.register_forward_hook(lambda _module, _args, out: learn(out))
                stack.callback(handle.remove)
        stack.enter_context(_calling_before(model, before))
        yield rule


@contextmanager
def _following_fields(
    model: nn.Module, masks: Mapping[str, Tensor], known: Mapping[str, str]
) -> Iterator[dict[str, Positions]]:
    rule: dict[str, Positions] = {}
    calls: dict[str, int] = {}

    def before(name: str, x: Tensor) -> None:
        number = calls.get(name, 0)
        calls[name] = number + 1
        fields = known.get(name, "").split(",")
        mask = masks.get(fields[number]) if number < len(fields) else None
        if mask is None or x.shape[:2] != mask.shape:
            rule.pop(name, None)
        else:
            rule[name] = Positions(mask=mask)

    with _calling_before(model, before):
        yield rule


@contextmanager
def _calling_before(model: nn.Module, before: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Calls `before` with name and input of a layer ahead of each of its calls."""
    with ExitStack() as stack:
        for name, module in _layers(model):

            def hook(_: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                x = args[0] if args else kwargs.get("input")
                if isinstance(x, Tensor) and x.dim() >= 2:
                    before(name, x)

            handle = module.register_forward_pre_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        yield


def fields_by_probe(
    model: nn.Module, batch: Mapping[str, Any], masks: Mapping[str, Tensor], forward: Forward
) -> dict[str, str]:
    """Layer name -> the fields that its calls work on, joined by commas.

    All fields get different lengths, the first one less than the shortest and so on, together with
    what belongs to them by name and shape (positions, segmentation).
    """
    lengths = {}
    probe = dict(batch)
    shortest = min(mask.shape[1] for mask in masks.values())
    for order, (field, mask) in enumerate(masks.items()):
        length = shortest - order
        if length < 1:
            return {}
        lengths[length] = field
        for name, value in batch.items():
            belongs = name == field or name.startswith(field + "_")
            if belongs and isinstance(value, Tensor) and value.shape == mask.shape:
                probe[name] = value[:, :length]
    seen: dict[str, list[str]] = {}

    def before(name: str, x: Tensor) -> None:
        field = lengths.get(x.shape[1], UNKNOWN) if x.shape[0] == len(mask) else UNKNOWN
        seen.setdefault(name, []).append(field)

    training = model.training
    try:
        with torch.no_grad(), _calling_before(model, before):
            forward(model, probe)
    except (RuntimeError, ValueError, IndexError) as error:
        logger.warning(
            "padding tokens count as tokens in the K-FAC factors: the model does not run on fields "
            "of different lengths, so which layer works on which is not known (%s)",
            error,
        )
        return {"": UNKNOWN}
    finally:
        model.train(training)
    return {name: ",".join(fields) for name, fields in seen.items()}
