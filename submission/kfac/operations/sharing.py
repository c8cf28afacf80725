"""How the rows of a layer share its weight: explicit positions, or ragged segments with padding.

A linear layer is applied to many *rows*. The rows of one example share the weight, so the
curvature approximations need to know which rows belong together:

- `Positions`: the rows of example n are x[n, ..., :]; every example has the same number R of
  them, or a mask says which of them exist (padding tokens of text and speech).
- `Segments`: the rows of all examples are concatenated and an index says to which example each
  belongs (graphs: nodes, edges). Padding rows are in neither the sums nor the counts.
- `RaggedBatch`: several kinds of segments in one batch (edges, nodes, graphs), of which each
  layer uses one.

All functions here are free of host synchronisation: counts stay tensors.
"""

from __future__ import annotations

import difflib
import itertools
import math
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor


class SharingError(ValueError):
    """The rows of a layer cannot be assigned to examples."""


@dataclass(frozen=True)
class Positions:
    """Rows x[n, r1, ..., rk, :] of example n: explicit weight-sharing dimensions.

    Args:
        batch_dim: which dimension of the layer's input counts the examples (0 unless a model
            puts, say, time first).
        mask: optional bool [N, R]; False marks rows that do not exist (padding). R is the product
            of the sharing dimensions in their order. With a mask the number of rows varies over
            the examples, so the ragged scaling applies.
    """

    batch_dim: int = 0
    mask: Tensor | None = None

    @property
    def is_ragged(self) -> bool:
        """Whether examples may differ in their number of rows."""
        return self.mask is not None


@dataclass(frozen=True)
class Segments:
    """Concatenated rows of examples of different sizes.

    Args:
        ids: int64 [rows], the example of each row, in 0 .. num_segments - 1.
        num_segments: number of examples, padding examples included.
        segment_mask: optional bool [num_segments]; False marks padding examples, whose rows are
            ignored however they are filled. Empty examples are legal.
    """

    ids: Tensor
    num_segments: int
    segment_mask: Tensor | None = None

    is_ragged = True

    def __post_init__(self) -> None:
        if self.ids.dim() != 1:
            raise SharingError(f"segment ids must have shape [rows], not {list(self.ids.shape)}")
        if self.segment_mask is not None and self.segment_mask.shape != (self.num_segments,):
            raise SharingError(
                f"segment_mask must have shape [{self.num_segments}], not "
                f"{list(self.segment_mask.shape)}"
            )
        if self.ids.device.type == "cpu" and self.ids.numel():  # elsewhere it would synchronise
            low, high = int(self.ids.min()), int(self.ids.max())
            if low < 0 or high >= self.num_segments:
                raise SharingError(
                    f"segment ids must be in 0 .. {self.num_segments - 1} (num_segments - 1), but "
                    f"range from {low} to {high}"
                )

    @classmethod
    def from_sizes(
        cls, sizes: Tensor, rows: int | None = None, segment_mask: Tensor | None = None
    ) -> Segments:
        """Builds the index from the number of rows of each example, int [num_segments].

        `rows` is the total; giving it spares a device a synchronisation.
        """
        index = torch.arange(sizes.shape[0], device=sizes.device)
        ids = torch.repeat_interleave(index, sizes.long(), output_size=rows)
        return cls(ids, sizes.shape[0], segment_mask)

    @property
    def rows(self) -> int:
        """Number of rows, padding included."""
        return self.ids.shape[0]

    @cached_property
    def sizes(self) -> Tensor:
        """Number of rows of each example, int64 [num_segments]; 0 for padding examples."""
        sizes = self.ids.new_zeros(self.num_segments)
        sizes.index_add_(0, self.ids, torch.ones_like(self.ids))
        return sizes if self.segment_mask is None else sizes * self.segment_mask

    @cached_property
    def rows_before_padding(self) -> int | None:
        """How many rows come before those of padding examples, which are all that comes after.

        None where others come after them, or where finding out would wait for a device.
        """
        mask = self.row_mask()
        if mask is None:
            return self.rows
        if mask.device.type != "cpu":
            return None
        before = int(mask.sum())
        return before if bool(mask[:before].all()) else None

    def row_mask(self) -> Tensor | None:
        """Bool [rows], False for rows of padding examples; None without padding."""
        return None if self.segment_mask is None else self.segment_mask.bool()[self.ids]


Sharing = Positions | Segments


@dataclass
class RaggedBatch:
    """The kinds of rows of one ragged batch, for example edges, nodes and graphs.

    A layer's kind is told by its number of rows. Where two kinds have the same number of rows in
    this batch, a kind seen earlier for the layer decides (`known`, filled as layers are resolved
    and kept by the caller between batches); otherwise `probe`, if given, is asked once for the
    kinds of all layers. Nothing is guessed.

    Args:
        kinds: name of a kind -> its segments.
        known: layer name -> kind, from earlier batches; updated in place.
        probe: returns layer name -> kind for every layer, from a batch made unambiguous.
    """

    kinds: Mapping[str, Segments]
    known: dict[str, str] = field(default_factory=dict)
    probe: Callable[[], Mapping[str, str]] | None = None

    def resolve(self, layer: str, rows: int) -> Segments:
        """The segments of the rows that `layer` was applied to.

        Raises:
            SharingError: the number of rows fits no kind, or several.
        """
        fits = [kind for kind, segments in self.kinds.items() if segments.rows == rows]
        if not fits:
            sizes = ", ".join(f"{k} {s.rows}" for k, s in self.kinds.items())
            raise SharingError(
                f"layer '{layer}' was applied to {rows} rows, but this batch has {sizes}. "
                "Say how its rows share the weight: sharing={'" + layer + "': Segments(...)}."
            )
        if len(fits) > 1 and layer not in self.known and self.probe is not None:
            self.known.update(self.probe())
        kind = fits[0] if len(fits) == 1 else self.known.get(layer)
        if kind not in fits:
            raise SharingError(
                f"layer '{layer}' was applied to {rows} rows, which may be "
                f"{' or '.join(fits)} in this batch. Take a batch in which their numbers differ "
                "first, or say it: sharing={'" + layer + "': Segments(...)}."
            )
        self.known[layer] = kind
        return self.kinds[kind]


SharingRule = Sharing | RaggedBatch | Mapping[str, "Sharing | RaggedBatch"] | None


def resolve(rule: SharingRule, layer: str, leading_size: int) -> Sharing:
    """How the rows of one call of `layer` share its weight.

    A mapping may name a layer, or a prefix of names that ends at a dot; the longest match counts,
    and the key '' is the default for all others.
    """
    if isinstance(rule, Mapping):
        matches = [key for key in rule if key in ("", layer) or layer.startswith(key + ".")]
        rule = rule[max(matches, key=len)] if matches else None
    if rule is None:
        return Positions()
    if isinstance(rule, RaggedBatch):
        return rule.resolve(layer, leading_size)
    return rule


def is_stated(rule: SharingRule, layer: str) -> bool:
    """Whether a rule says how the rows of a layer share its weight."""
    if isinstance(rule, Mapping):
        return any(key in ("", layer) or layer.startswith(key + ".") for key in rule)
    return rule is not None


def check_names(rule: SharingRule, known: Sequence[str]) -> None:
    """Whether all names of a mapping are those of layers or modules, or prefixes of them.

    Raises:
        SharingError: one is not.
    """
    if not isinstance(rule, Mapping):
        return
    for key in rule:
        if key != "" and not any(name == key or name.startswith(key + ".") for name in known):
            near = difflib.get_close_matches(key, known, n=3) or list(known[:5])
            raise SharingError(
                f"sharing names '{key}', which is no layer of the model (nor the beginning of the "
                f"name of one, up to a dot); there are {', '.join(near)}, ..."
            )


def example_dim(
    sizes: Sequence[int],
    allowed: Sequence[int],
    examples: Collection[int],
    in_front: Collection[int],
) -> int | None:
    """Which dimension of a tensor counts the examples, where no rule says it.

    The first one, if the outputs are for as many examples, or for some positions of as many;
    otherwise the only one of that size. None where there is none, or where rows of several
    examples may be folded into the first one.

    Args:
        sizes: of its dimensions.
        allowed: those that may count the examples.
        examples: how many examples the outputs of each loss are for.
        in_front: sizes of a first dimension that is one of the outputs.
    """
    if 0 in allowed and set(in_front) & set(itertools.accumulate(sizes, operator.mul)):
        return 0
    if any(n > 1 and sizes[0] % n == 0 for n in examples):
        return None
    same = [dim for dim in allowed if sizes[dim] in examples]
    if len(same) == 1:
        return same[0]
    in_some = sizes[0] > 0 and any(n % sizes[0] == 0 for n in examples)
    return 0 if 0 in allowed and in_some else None


def number_of_examples(sharing: Sharing, rows: Tensor) -> int:
    """N of a layer's input [.., N at batch_dim, ..], or of segments."""
    if isinstance(sharing, Segments):
        return sharing.num_segments
    return rows.shape[sharing.batch_dim] if rows.dim() > sharing.batch_dim else 1


def check_segments(rows: int, sharing: Sharing) -> None:
    """Whether segments have an id for every row.

    Raises:
        SharingError: they have not.
    """
    if isinstance(sharing, Segments) and sharing.rows != rows:
        raise SharingError(f"Segments has {sharing.rows} ids for {rows} rows")


def flatten_positions(rows: Tensor, sharing: Positions) -> Tensor:
    """[.., N at batch_dim, .., d] -> [N, R, d] (R = 1 where there is no sharing dimension)."""
    if sharing.batch_dim:
        rows = rows.movedim(sharing.batch_dim, 0)
    return rows.unsqueeze(1) if rows.dim() == 2 else rows.flatten(1, -2)


def zero_padding(rows: Tensor, sharing: Sharing) -> Tensor:
    """Rows with padding replaced by zeros (`where`: NaN in padding does not spread).

    rows: [N, R, d] for Positions, [rows, d] for Segments.
    """
    if isinstance(sharing, Positions):
        if sharing.mask is None:
            return rows
        if sharing.mask.shape != rows.shape[:2]:
            raise SharingError(
                f"the mask of Positions has shape {list(sharing.mask.shape)}, the rows have "
                f"[N, R] = {list(rows.shape[:2])}"
            )
        return torch.where(sharing.mask.bool().unsqueeze(-1), rows, 0)
    mask = sharing.row_mask()
    return rows if mask is None else torch.where(mask.unsqueeze(-1), rows, 0)


def without_padding(rows: Tensor, sharing: Sharing) -> Tensor:
    """Rows without padding, a view, where all of it is at the end; otherwise `zero_padding`.

    For sums over all rows. Rows that this was done to are to be paired with such rows only.
    """
    check_segments(rows.shape[0], sharing)
    if isinstance(sharing, Segments) and sharing.rows_before_padding is not None:
        return rows[: sharing.rows_before_padding]
    return zero_padding(rows, sharing)


def count_rows(leading: torch.Size, sharing: Sharing) -> Tensor | int:
    """Number of rows that exist. leading: [N, R] for Positions, [rows] for Segments."""
    if isinstance(sharing, Positions):
        return leading.numel() if sharing.mask is None else sharing.mask.sum()
    check_segments(leading[0], sharing)
    mask = sharing.row_mask()
    return sharing.rows if mask is None else mask.sum()


def sum_rows(rows: Tensor, sharing: Sharing) -> Tensor:
    """Sum of the rows of each example: [N, R, d] or [rows, d] -> [N, d]; padding contributes 0."""
    check_segments(rows.shape[0], sharing)
    if isinstance(sharing, Positions):
        return zero_padding(rows, sharing).sum(1)
    total = rows.new_zeros(sharing.num_segments, rows.shape[-1])
    total.index_add_(0, sharing.ids, rows)
    if sharing.segment_mask is None:
        return total
    # The rows of padding are in no other example's sum.
    return torch.where(sharing.segment_mask.bool().unsqueeze(-1), total, 0)


def rows_per_example(leading: torch.Size, sharing: Sharing, like: Tensor) -> Tensor:
    """R_n, the number of rows of each example, [N], in the dtype of `like`; 0 for padding."""
    if isinstance(sharing, Positions):
        if sharing.mask is None:
            return like.new_full((leading[0],), leading[1])
        return sharing.mask.sum(1).to(like.dtype)
    return sharing.sizes.to(like.dtype)


def first_examples(sharing: Sharing, total: int, share: float) -> tuple[Sharing, int, float]:
    """Restricts a call to a share of its examples, where their number is the first dimension's.

    Returns:
        (the sharing of these, how many, what gradients are multiplied by: √(total / how many)).
    """
    if share >= 1 or not isinstance(sharing, Positions) or sharing.batch_dim or total < 2:
        return sharing, total, 1.0
    used = max(1, int(total * share))
    if sharing.mask is not None:
        sharing = replace(sharing, mask=sharing.mask[:used])
    return sharing, used, math.sqrt(total / used)
