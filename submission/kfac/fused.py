"""Fused modules, unrolled while recording.

nn.MultiheadAttention and the recurrent layers apply their weights inside one operation, where no
hook sees them. While a forward pass is recorded, their `forward` is replaced by one from here,
which computes the same values with every linear map visible: it hands the map's input and output
to `tap`. Add a `Fused` to `FUSED` to support another module.

Inside an activation checkpoint the module stays as it is: its forward pass is run again later, when
nothing is recorded, and must then be the same.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from .graph import inside_checkpoint
from .parameters import LinearView, ParameterSlice


class Tap(Protocol):
    """Is shown a linear map and returns what stands for its output.

    Args: which map; its input and output; a mask of the rows that exist, [N, R]; the dimension that
    counts the examples; which of the module's positions the input is, where it is one of them.
    """

    def __call__(
        self,
        which: str,
        x: Tensor,
        y: Tensor,
        *,
        mask: Tensor | None = None,
        batch_dim: int = 0,
        position: int | None = None,
    ) -> Tensor:
        """The output, or something with the same values."""


class Fused(ABC):
    """One type of fused module."""

    module_types: tuple[type[nn.Module], ...]

    def unsupported(self, module: Any) -> str | None:
        """Why this particular module cannot be handled, or None."""
        if "forward" in module.__dict__ and not isinstance(module.__dict__["forward"], Unrolled):
            return "its forward was replaced on the instance"
        missing = [name for name in self.weights(module) if name not in module._parameters]
        return "its weight is computed from other parameters (parametrisation)" if missing else None

    @abstractmethod
    def weights(self, module: Any) -> list[str]:
        """Names of the parameters that the maps' weights are (rows of)."""

    @abstractmethod
    def views(self, module: Any, prefix: str) -> dict[str, LinearView]:
        """The linear maps of the module: name within the module -> view. `prefix` ends in a dot."""

    @abstractmethod
    def forward(self, module: Any, tap: Tap, *args: Any, **kwargs: Any) -> Any:
        """What module.forward computes, with `tap` called on every linear map."""


class Unrolled:
    """Stands in for a fused module's `forward` while recording; several recordings may share it."""

    def __init__(self, fused: Fused, module: nn.Module) -> None:
        self._fused, self._module = fused, module
        self.taps: list[Tap] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output."""
        if inside_checkpoint():
            return type(self._module).forward(self._module, *args, **kwargs)
        return self._fused.forward(self._module, self._tap, *args, **kwargs)

    def _tap(self, which: str, x: Tensor, y: Tensor, **known: Any) -> Tensor:
        for tap in self.taps:
            y = tap(which, x, y, **known)
        return y


def unroll(module: nn.Module, tap: Tap) -> None:
    """Shows the maps of a fused module to `tap` until `roll_up`."""
    fused = fused_of(module)
    assert fused is not None
    # An attribute of the instance hides the class's method until it is deleted.
    unrolled = module.__dict__.setdefault("forward", Unrolled(fused, module))
    unrolled.taps.append(tap)


def roll_up(module: nn.Module, tap: Tap) -> None:
    """Takes back what `unroll` did."""
    unrolled = module.__dict__["forward"]
    unrolled.taps.remove(tap)
    if not unrolled.taps:
        del module.__dict__["forward"]


def _slice(module: nn.Module, prefix: str, name: str, *rows: int) -> ParameterSlice | None:
    parameter = module._parameters.get(name)
    return None if parameter is None else ParameterSlice(prefix + name, parameter, *rows)


def _view(module: nn.Module, prefix: str, weight: str, bias: str | None) -> LinearView:
    weight_slice = _slice(module, prefix, weight)
    assert weight_slice is not None
    return LinearView(weight_slice, None if bias is None else _slice(module, prefix, bias))


class MultiheadAttention(Fused):
    """nn.MultiheadAttention: q, k and v are maps of their own; out_proj is called as a module."""

    module_types = (nn.MultiheadAttention,)

    def weights(self, module: Any) -> list[str]:
        if module._qkv_same_embed_dim:
            return ["in_proj_weight"]
        return [f"{name}_proj_weight" for name in "qkv"]

    def views(self, module: Any, prefix: str) -> dict[str, LinearView]:
        e = module.embed_dim
        views = {}
        for i, name in enumerate(("q", "k", "v")):
            if module._qkv_same_embed_dim:
                weight = _slice(module, prefix, "in_proj_weight", i * e, (i + 1) * e)
            else:
                weight = _slice(module, prefix, f"{name}_proj_weight")
            assert weight is not None
            bias = _slice(module, prefix, "in_proj_bias", i * e, (i + 1) * e)
            views[f"in_proj.{name}"] = LinearView(weight, bias)
        return views

    def forward(
        self,
        module: Any,
        tap: Tap,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """The attention of torch itself, between projections that are made visible here.

        torch's function insists on projecting: it is given identities.
        """
        unbatched, batch_first = query.dim() == 2, module.batch_first and query.dim() == 3
        q, k, v = (self._batch_second(x, unbatched, batch_first) for x in (query, key, value))
        e = module.embed_dim
        if module._qkv_same_embed_dim:
            weights = module.in_proj_weight.chunk(3)
        else:
            weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
        biases = (None,) * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
        projected = [
            tap(f"in_proj.{name}", x, F.linear(x, weight, bias), batch_dim=1)
            for name, x, weight, bias in zip("qkv", (q, k, v), weights, biases, strict=True)
        ]
        if unbatched and key_padding_mask is not None:
            key_padding_mask = key_padding_mask.unsqueeze(0)
        identity = torch.eye(e, dtype=projected[0].dtype, device=query.device)
        attended, attention = F.multi_head_attention_forward(
            projected[0],
            projected[1],
            projected[2],
            embed_dim_to_check=e,
            num_heads=module.num_heads,
            in_proj_weight=None,
            in_proj_bias=None,
            bias_k=module.bias_k,
            bias_v=module.bias_v,
            add_zero_attn=module.add_zero_attn,
            dropout_p=module.dropout,
            out_proj_weight=identity,
            out_proj_bias=None,
            training=module.training,
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
            attn_mask=attn_mask,
            use_separate_proj_weight=True,
            q_proj_weight=identity,
            k_proj_weight=identity,
            v_proj_weight=identity,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
        )
        output = module.out_proj(attended.transpose(0, 1))
        if unbatched:
            return output.squeeze(0), None if attention is None else attention.squeeze(0)
        return output if batch_first else output.transpose(0, 1), attention

    @staticmethod
    def _batch_second(x: Tensor, unbatched: bool, batch_first: bool) -> Tensor:
        if unbatched:
            return x.unsqueeze(1)
        return x.transpose(0, 1) if batch_first else x


class Recurrent(Fused):
    """nn.RNN, nn.GRU, nn.LSTM, unrolled over time: the steps share the weights.

    The map of the inputs sees all steps at once; that of the hidden state is called once a step.
    """

    module_types = (nn.RNN, nn.GRU, nn.LSTM)

    def unsupported(self, module: Any) -> str | None:
        if module.proj_size:
            return "LSTM with projections (proj_size)"
        return super().unsupported(module)

    def weights(self, module: Any) -> list[str]:
        suffixes = [s for layer in self._suffixes(module) for s in layer]
        return [f"weight_{which}{suffix}" for suffix in suffixes for which in ("ih", "hh")]

    @staticmethod
    def _suffixes(module: Any) -> list[list[str]]:
        """Per layer, the suffix of the parameters of each direction."""
        directions = ["", "_reverse"] if module.bidirectional else [""]
        return [[f"_l{k}{d}" for d in directions] for k in range(module.num_layers)]

    def views(self, module: Any, prefix: str) -> dict[str, LinearView]:
        views = {}
        for suffix in (s for layer in self._suffixes(module) for s in layer):
            for which in ("ih", "hh"):
                bias = f"bias_{which}{suffix}" if module.bias else None
                weight = f"weight_{which}{suffix}"
                views[weight] = _view(module, prefix, weight, bias)
        return views

    def forward(self, module: Any, tap: Tap, input: Any, hx: Any = None) -> Any:  # noqa: A002
        """Steps through time explicitly; padded steps of packed sequences keep the state."""
        if isinstance(input, PackedSequence):
            x, lengths = pad_packed_sequence(input, batch_first=True)
            steps = torch.arange(x.shape[1], device=x.device)
            mask = steps.unsqueeze(0) < lengths.to(x.device).unsqueeze(1)
            output, state = self._layers(module, tap, x, hx, mask)
            packed = pack_padded_sequence(
                output, lengths, batch_first=True, enforce_sorted=input.sorted_indices is None
            )
            return packed, state
        unbatched = input.dim() == 2
        if unbatched:
            x = input.unsqueeze(0)
            if hx is not None:
                hx = _map_state(lambda h: h.unsqueeze(1), hx)
        else:
            x = input if module.batch_first else input.transpose(0, 1)
        output, state = self._layers(module, tap, x, hx, None)
        if unbatched:
            return output.squeeze(0), _map_state(lambda h: h.squeeze(1), state)
        return output if module.batch_first else output.transpose(0, 1), state

    def _layers(
        self, module: Any, tap: Tap, x: Tensor, hx: Any, mask: Tensor | None
    ) -> tuple[Tensor, Any]:
        is_lstm = isinstance(module, nn.LSTM)
        suffixes = self._suffixes(module)
        count = sum(map(len, suffixes))
        if hx is None:
            zeros = x.new_zeros(count, x.shape[0], module.hidden_size)
            hx = (zeros, zeros) if is_lstm else zeros
        states = list(zip(*hx, strict=True)) if is_lstm else [(h,) for h in hx]
        final: list[tuple[Tensor, ...]] = []
        for k, layer in enumerate(suffixes):
            outputs = []
            for suffix in layer:
                output, state = self._direction(module, tap, suffix, x, states[len(final)], mask)
                outputs.append(output)
                final.append(state)
            x = torch.cat(outputs, -1)
            if module.dropout and k + 1 < len(suffixes):
                x = F.dropout(x, module.dropout, module.training)
        stacked = tuple(torch.stack(parts) for parts in zip(*final, strict=True))
        return x, stacked if is_lstm else stacked[0]

    def _direction(
        self,
        module: Any,
        tap: Tap,
        suffix: str,
        x: Tensor,
        state: tuple[Tensor, ...],
        mask: Tensor | None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """One layer in one direction: x [N, T, inputs] -> ([N, T, hidden], last state)."""

        def parameter(name: str) -> Tensor | None:
            return getattr(module, name + suffix, None)

        weight_ih, weight_hh = parameter("weight_ih"), parameter("weight_hh")
        assert weight_ih is not None
        assert weight_hh is not None
        bias_ih, bias_hh = (
            (parameter("bias_ih"), parameter("bias_hh")) if module.bias else (None, None)
        )
        from_input = tap(f"weight_ih{suffix}", x, F.linear(x, weight_ih, bias_ih), mask=mask)
        outputs: list[Tensor] = []
        steps = range(x.shape[1])
        for t in reversed(steps) if suffix.endswith("_reverse") else steps:
            here = None if mask is None else mask[:, t : t + 1]
            hidden = state[0]
            from_hidden = tap(
                f"weight_hh{suffix}",
                hidden,
                F.linear(hidden, weight_hh, bias_hh),
                mask=here,
                position=t,
            )
            new = _cell(module, from_input[:, t], from_hidden, state)
            if here is None:
                outputs.append(new[0])
                state = new
            else:
                outputs.append(torch.where(here, new[0], 0))
                state = tuple(torch.where(here, n, o) for n, o in zip(new, state, strict=True))
        if suffix.endswith("_reverse"):
            outputs.reverse()
        return torch.stack(outputs, 1), state


def _cell(
    module: Any, from_input: Tensor, from_hidden: Tensor, state: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """One step: pre-activations [N, gates · hidden] and the old state -> the new state."""
    if isinstance(module, nn.LSTM):
        i, f, g, o = (from_input + from_hidden).chunk(4, -1)
        cell = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
        return o.sigmoid() * cell.tanh(), cell
    if isinstance(module, nn.GRU):
        r_in, z_in, n_in = from_input.chunk(3, -1)
        r_hidden, z_hidden, n_hidden = from_hidden.chunk(3, -1)
        r, z = (r_in + r_hidden).sigmoid(), (z_in + z_hidden).sigmoid()
        n = (n_in + r * n_hidden).tanh()
        return (n + z * (state[0] - n),)
    pre = from_input + from_hidden
    return (pre.tanh() if module.nonlinearity == "tanh" else pre.relu(),)


def _map_state(function: Callable[[Tensor], Tensor], state: Any) -> Any:
    return tuple(map(function, state)) if isinstance(state, tuple) else function(state)


FUSED: list[Fused] = [MultiheadAttention(), Recurrent()]


def fused_of(module: nn.Module) -> Fused | None:
    """The Fused of a module, or None; subclasses count unless they change the forward pass."""
    for fused in FUSED:
        for module_type in fused.module_types:
            if isinstance(module, module_type) and type(module).forward is module_type.forward:
                return fused
    return None
