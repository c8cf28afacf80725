"""Assigns every trainable parameter to blocks, from the uses of parameters that were seen.

A matrix that rows are multiplied by is a Kronecker block, with its bias where all its uses add the
same one; seen both as it is and transposed, it is a tied block. Scales and shifts are unit-wise
blocks. What is used in any other way, or in overlapping pieces, or not at all so far, is a diagonal
block, and the reason is kept. The result depends on the set of uses alone.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from ..operations.pieces import Matrix, Piece
from ..operations.uses import LinearUse, UnitUse, Use
from .block import Block
from .diagonal import DiagonalBlock, UnitBlock
from .kronecker import KroneckerBlock
from .tied import TiedBlock

UNSEEN = "not used in the recorded passes so far"


@dataclass(frozen=True)
class Options:
    """What counts as a Kronecker block.

    Attributes:
        approx: "expand" or "reduce".
        bias: a key of `kronecker.BIASES`.
        norm_rows: a key of `diagonal.NORM_ROWS`.
        max_factor_side: larger sides keep only the diagonal of their factor; other parameters with
            more entries than its square a mean for each row.
        exclude: names of modules whose parameters are in no block with factors.
    """

    approx: str
    bias: str = "joint"
    norm_rows: str = "examples"
    max_factor_side: int = 8192
    exclude: tuple[str, ...] = ()


@dataclass(frozen=True)
class Role:
    """What a use is to its block."""

    block: str
    transposed: bool = False


@dataclass
class Structure:
    """The blocks of a model.

    Attributes:
        blocks: in the order of the parameters; those without a known use last.
        roles: use -> its block; a use whose parameters are in no block of their own has none.
        reasons: name of a block -> why it has no factors.
    """

    blocks: tuple[Block, ...] = ()
    roles: dict[Use, Role] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    @property
    def by_name(self) -> dict[str, Block]:
        """Name -> block."""
        return {block.name: block for block in self.blocks}


def check_excluded(exclude: Iterable[str], parameters: Iterable[str]) -> None:
    """Whether all names are those of modules with parameters.

    Raises:
        ValueError: one is not.
    """
    modules = {
        name[:end] for name in parameters for end, letter in enumerate(name) if letter == "."
    }
    for key in exclude:
        if key not in modules:
            near = difflib.get_close_matches(key, sorted(modules), n=3)
            raise ValueError(
                f"exclude names '{key}', which is no module of the model"
                + (f"; did you mean {' or '.join(near)}?" if near else "")
            )


def structure_of(
    uses: Iterable[Use],
    others: Mapping[str, str],
    parameters: Mapping[str, nn.Parameter],
    options: Options,
) -> Structure:
    """The blocks of a model.

    Args:
        uses: all that were seen.
        others: name of a parameter -> the way in which it is used besides.
        parameters: name -> trainable parameter.
    """
    rejected = {name: f"used in {how}" for name, how in others.items() if name in parameters}
    for name, parameter in parameters.items():
        if parameter.is_complex():
            rejected[name] = "complex parameters"
        if any(name.startswith(key + ".") for key in options.exclude):
            rejected[name] = "excluded"
    uses = [  # of parameters that are trained
        use
        for use in dict.fromkeys(uses)
        if all(piece.parameter in parameters for piece in use.pieces)
    ]
    while True:
        attempt = _Attempt(parameters, options, rejected)
        attempt.add_all(uses)
        if not attempt.conflicts:
            return attempt.finished()
        rejected = {**attempt.conflicts, **rejected}


class _Attempt:
    """One try to assign all uses to blocks; finds parameters that cannot be."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        options: Options,
        rejected: Mapping[str, str],
    ) -> None:
        self._parameters, self._options, self._rejected = parameters, options, rejected
        self._order = {name: number for number, name in enumerate(parameters)}
        self._covered: dict[str, torch.Tensor] = {}
        self._found: list[tuple[Block, list[tuple[Use, bool]]]] = []
        self.conflicts: dict[str, str] = {}

    def add_all(self, uses: list[Use]) -> None:
        """Makes the blocks of all uses."""
        linear: dict[object, list[LinearUse]] = {}
        units: dict[object, list[UnitUse]] = {}
        for use in uses:
            if isinstance(use, LinearUse):
                if use.matrix.piece.parameter not in self._rejected:
                    linear.setdefault(use.matrix.piece.entries, []).append(use)
            else:
                kept = _without_rejected(use, self._rejected)
                if kept is not None:
                    key = tuple(piece.entries for piece in kept.pieces)
                    units.setdefault(key, []).append(use)
        biases = self._biases(linear, units)
        for same in linear.values():
            self._add_linear(same, biases)
        for several in units.values():
            self._add_units(several)

    def _biases(
        self, linear: Mapping[object, list[LinearUse]], units: Mapping[object, list[UnitUse]]
    ) -> set[Piece]:
        """Biases that belong to one matrix, in all of its uses, and to nothing else."""
        owners: dict[Piece, set[object]] = {}
        for key, same in linear.items():
            for use in same:
                if use.bias is not None:
                    owners.setdefault(use.bias, set()).add(key)
        elsewhere = {piece.parameter for some in units.values() for u in some for piece in u.pieces}
        found = set()
        for bias, keys in owners.items():
            same = linear[next(iter(keys))]
            direct = [use for use in same if not use.one_hot]
            always = all(use.bias == bias for use in direct)
            rejected = bias.parameter in self._rejected
            if rejected or (len(keys) == 1 and always and bias.parameter not in elsewhere):
                if not rejected:
                    found.add(bias)
            else:
                self.conflicts[bias.parameter] = "a bias that is not always added to one matrix"
        return found

    def _cover(self, *pieces: Piece) -> bool:
        """Marks pieces as assigned; whether none of their entries was before."""
        free = True
        for piece in pieces:
            name = piece.parameter
            if name not in self._covered:
                self._covered[name] = torch.zeros(self._parameters[name].numel(), dtype=torch.bool)
            if not piece.mark(self._covered[name]):
                self.conflicts[name] = "overlapping parts of it are used in different ways"
                free = False
        return free

    def _add_linear(self, same: list[LinearUse], biases: set[Piece]) -> None:
        direct = [use for use in same if not use.one_hot]
        first = direct[0] if direct else same[0]
        if not direct:
            transposed = [use for use in same if use.matrix != first.matrix]
        else:
            transposed = [use for use in same if use.one_hot or use.matrix != first.matrix]
        name = first.matrix.piece.parameter
        if transposed and not _is_transpose(first.matrix, transposed[0].matrix):
            self.conflicts[name] = "the same entries are used as different matrices"
            return
        if len({use.matrix for use in transposed}) > 1:
            self.conflicts[name] = "the same entries are used as different matrices"
            return
        bias = next((u.bias for u in direct if u.bias in biases), None)
        if any(use.bias is not None for use in transposed) and direct:
            self.conflicts[name] = "it is used with its transpose, to which a bias is added"
            return
        block = self._kronecker(first, bias)
        if not self._cover(*block.pieces):
            return
        uses: list[tuple[Use, bool]] = [(use, use in transposed) for use in same]
        if not transposed:
            self._found.append((block, uses))
            return
        other = self._kronecker(transposed[0], None)
        if block.diagonal_input:
            self.conflicts[name] = "it is tied, and its inputs are too wide for a factor"
            return
        self._found.append((TiedBlock(block, other), uses))

    def _kronecker(self, use: LinearUse, bias: Piece | None) -> KroneckerBlock:
        options = self._options
        block = KroneckerBlock(
            _name(use.matrix.piece), use.matrix, bias, options.bias, options.approx
        )
        wide = block.input_shape[1] > options.max_factor_side
        return replace(
            block,
            diagonal_input=wide or options.approx in use.diagonal_input,
            diagonal_gradient=block.gradient_shape[1] > options.max_factor_side,
        )

    def _add_units(self, several: list[UnitUse]) -> None:
        kept = _without_rejected(several[0], self._rejected)
        assert kept is not None
        if self._cover(*kept.pieces):
            names = [_name(piece) for piece in kept.pieces]
            name = names[0]
            if len(names) == 1 and kept.scale is None:
                name = kept.pieces[0].label
            by_position = self._options.norm_rows == "positions"
            block = UnitBlock(name, kept.scale, kept.shift, by_position)
            self._found.append((block, [(use, False) for use in several]))

    def finished(self) -> Structure:
        """The structure, once there is no conflict."""
        self._found.sort(key=lambda one: self._order[one[0].pieces[0].parameter])
        structure = Structure()
        blocks: list[Block] = []
        for block, uses in self._found:
            blocks.append(block)
            for use, transposed in uses:
                structure.roles[use] = Role(block.name, transposed)
            if not block.has_factors:
                structure.reasons[block.name] = "a scale or shift of single units: exact blocks"
        for name, parameter in self._parameters.items():
            for piece in self._left_over(name, parameter):
                block = DiagonalBlock(
                    piece.label,
                    piece,
                    by_row=parameter.dim() > 1 and piece.numel > self._options.max_factor_side**2,
                    is_complex=parameter.is_complex(),
                )
                blocks.append(block)
                structure.reasons[block.name] = self._rejected.get(name, UNSEEN)
        structure.blocks = tuple(blocks)
        return structure

    def _left_over(self, name: str, parameter: nn.Parameter) -> list[Piece]:
        """What no block covers, as runs of rows."""
        flat = torch.empty(parameter.shape, device="meta")
        covered = self._covered.get(name)
        if covered is None or not bool(covered.any()):
            return [Piece.of_view(name, flat, parameter.numel())]
        if bool(covered.all()):
            return []
        rows = covered.reshape(parameter.shape[0], -1)
        whole, none = rows.all(1), ~rows.any(1)
        if not bool((whole | none).all()):
            runs = _runs((~covered).tolist())
            flat = flat.flatten()
        else:
            runs = _runs(none.tolist())
        return [Piece.of_view(name, flat[start:stop], parameter.numel()) for start, stop in runs]


def _runs(marks: list[bool]) -> list[tuple[int, int]]:
    """(start, stop) of the runs of True."""
    found: list[tuple[int, int]] = []
    for i, mark in enumerate(marks):
        if mark and found and found[-1][1] == i:
            found[-1] = (found[-1][0], i + 1)
        elif mark:
            found.append((i, i + 1))
    return found


def _is_transpose(one: Matrix, other: Matrix) -> bool:
    groups, out, into = one.shape
    return groups == 1 and other.shape == (1, into, out)


def _name(piece: Piece) -> str:
    """The module's name for its weight."""
    label = piece.label
    return "" if label == "weight" else label.removesuffix(".weight")


def _without_rejected(use: UnitUse, rejected: Mapping[str, str]) -> UnitUse | None:
    scale = None if use.scale is None or use.scale.parameter in rejected else use.scale
    shift = None if use.shift is None or use.shift.parameter in rejected else use.shift
    return None if scale is None and shift is None else UnitUse(scale, shift)
