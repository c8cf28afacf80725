"""Recurrent networks, unrolled over time: the steps share the weights.

The map of the inputs sees all steps at once. That of the hidden state is applied step by step, and
recorded as one call of all steps: the gradients of its outputs are those of a tensor that is added
to them, which has them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from ..handlers import handles, inside_checkpoint
from ..sharing import Positions
from .products import linear

if TYPE_CHECKING:
    from ..record import Recording

State = tuple[Tensor, ...]


def _gates(kind: str, from_input: Tensor, from_hidden: Tensor, state: State) -> State:
    """One step: pre-activations [N, gates · hidden] and the old state -> the new state."""
    if kind == "lstm":
        i, f, g, o = (from_input + from_hidden).chunk(4, -1)
        cell = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
        return o.sigmoid() * cell.tanh(), cell
    if kind == "gru":
        r_in, z_in, n_in = from_input.chunk(3, -1)
        r_hidden, z_hidden, n_hidden = from_hidden.chunk(3, -1)
        r, z = (r_in + r_hidden).sigmoid(), (z_in + z_hidden).sigmoid()
        n = (n_in + r * n_hidden).tanh()
        return (n + z * (state[0] - n),)
    pre = from_input + from_hidden
    return (pre.tanh() if kind == "rnn_tanh" else pre.relu(),)


@handles("lstm", "gru", "rnn_tanh", "rnn_relu", spaces=(torch._C._VariableFunctions,))
def recurrent(rec: Recording, func: Any, *args: Any) -> Any:
    """A whole recurrent network, on padded or packed sequences."""
    kind = func.__name__
    packed = isinstance(args[3], tuple | list)  # the weights, behind sizes and state
    hx, weights = (args[2], args[3]) if packed else (args[1], args[2])
    if not any(rec.alias(weight) is not None for weight in weights) or inside_checkpoint():
        return NotImplemented  # a checkpoint's second run must find the same operations
    options = args[4:] if packed else args[3:]
    has_biases, layers, dropout, training, bidirectional = options[:5]
    batch_first = False if packed else options[5]
    network = _Network(rec, kind, weights, has_biases, layers, bidirectional)
    state: State = tuple(hx) if kind == "lstm" else (hx,)
    mask = None
    if packed:
        sequence = PackedSequence(args[0], args[1])
        x, lengths = pad_packed_sequence(sequence, batch_first=True)
        mask = torch.arange(x.shape[1], device=x.device) < lengths.to(x.device).unsqueeze(1)
    else:
        x = args[0] if batch_first else args[0].transpose(0, 1)
    output, final = network.run(x, state, mask, dropout if training else 0.0)
    if packed:
        output = pack_padded_sequence(output, lengths, batch_first=True).data
    elif not batch_first:
        output = output.transpose(0, 1)
    return (output, *final)


@handles(
    "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell",
    spaces=(torch._C._VariableFunctions,),
)  # fmt: skip
def cell(
    rec: Recording, func: Any, x: Tensor, hx: Any, w_ih: Tensor, w_hh: Tensor, b_ih: Any = None,
    b_hh: Any = None,
) -> Any:  # fmt: skip
    """One step of a recurrent network."""
    if (rec.alias(w_ih) is None and rec.alias(w_hh) is None) or inside_checkpoint():
        return NotImplemented
    kind = func.__name__.removesuffix("_cell")
    state: State = tuple(hx) if kind == "lstm" else (hx,)
    from_input = rec.apply(F.linear, x, w_ih, b_ih)
    from_hidden = rec.apply(F.linear, state[0], w_hh, b_hh)
    new = _gates(kind, from_input, from_hidden, state)
    return new if kind == "lstm" else new[0]


class _Network:
    """The weights of a recurrent network, in torch's flat order."""

    def __init__(
        self, rec: Recording, kind: str, weights: Sequence[Tensor], has_biases: bool, layers: int,
        bidirectional: bool,
    ) -> None:  # fmt: skip
        self._rec, self._kind, self._layers = rec, kind, layers
        self._directions = 2 if bidirectional else 1
        count = len(weights) // (layers * self._directions)
        self._weights = [weights[i : i + count] for i in range(0, len(weights), count)]
        self._has_biases = has_biases

    def run(
        self, x: Tensor, state: State, mask: Tensor | None, dropout: float
    ) -> tuple[Tensor, State]:
        """x [N, T, inputs], state [layers · directions, N, hidden] each -> outputs, last states."""
        final: list[State] = []
        for layer in range(self._layers):
            outputs = []
            for direction in range(self._directions):
                number = layer * self._directions + direction
                own = tuple(part[number] for part in state)
                output, last = self._direction(number, x, own, mask, bool(direction))
                outputs.append(output)
                final.append(last)
            x = torch.cat(outputs, -1)
            if dropout and layer + 1 < self._layers:
                x = F.dropout(x, dropout, True)
        return x, tuple(torch.stack(parts) for parts in zip(*final, strict=True))

    def _direction(
        self, number: int, x: Tensor, state: State, mask: Tensor | None, backwards: bool
    ) -> tuple[Tensor, State]:
        """One layer in one direction: x [N, T, inputs] -> ([N, T, hidden], last state)."""
        w_ih, w_hh, *more = self._weights[number]
        b_ih, b_hh = more[:2] if self._has_biases else (None, None)
        projection = more[2:] if self._has_biases else more
        known: dict[str, Any] = {"batch_dim": 0}
        if mask is not None:
            known["sharing"] = Positions(mask=mask)
        from_input: Tensor = linear(self._rec, F.linear, x, w_ih, b_ih, **known)
        if from_input is NotImplemented:  # neither is tracked
            from_input = F.linear(x, w_ih, b_ih)
        adds = self._kind != "gru" and from_input.requires_grad and not from_input._is_view()
        hidden = _StepMap(self._rec, w_hh, b_hh, from_input if adds else None, x.shape[1])
        projected = [_StepMap(self._rec, weight, None, None, x.shape[1]) for weight in projection]
        parts = from_input.unbind(1)
        outputs: list[Tensor] = []
        steps = range(x.shape[1])
        for t in reversed(steps) if backwards else steps:
            new = _gates(self._kind, parts[t], hidden(state[0], t), state)
            for each in projected:
                new = (each(new[0], t), *new[1:])
            if mask is None:
                outputs.append(new[0])
                state = new
            else:
                here = mask[:, t : t + 1]
                outputs.append(torch.where(here, new[0], 0))
                state = tuple(torch.where(here, n, o) for n, o in zip(new, state, strict=True))
        if backwards:
            outputs.reverse()
        for each in (hidden, *projected):
            each.record(known)
        return torch.stack(outputs, 1), state


class _StepMap:
    """A linear map that is applied at each step, recorded as one call.

    Args:
        rec: where to.
        weight, bias: of the map.
        added: a tensor [N, T, P_out] that the outputs enter nothing but a sum with; None where
            there is none, and zeros are added.
        steps: T.
    """

    def __init__(
        self, rec: Recording, weight: Tensor, bias: Any, added: Tensor | None, steps: int
    ) -> None:
        self._rec, self._weight, self._bias = rec, weight, bias
        self._inputs: dict[int, Tensor] = {}
        self._added, self._steps = added, steps
        self._zeros: Sequence[Tensor] = ()

    def __call__(self, x: Tensor, t: int) -> Tensor:
        """The outputs of step t; x [N, P_in]."""
        y = F.linear(x, self._weight, self._bias)
        self._rec.pass_by(y, x)
        self._inputs[t] = x.detach()
        if self._added is None:
            self._added = y.new_zeros(len(y), self._steps, y.shape[-1], requires_grad=True)
            self._zeros = self._added.unbind(1)
        return y + self._zeros[t] if self._zeros else y

    def record(self, known: dict[str, Any]) -> None:
        """Records all steps; `known`: fields of the call."""
        inputs = torch.stack([self._inputs[t] for t in range(self._steps)], 1)
        linear(self._rec, lambda *_: self._added, inputs, self._weight, self._bias, **known)
