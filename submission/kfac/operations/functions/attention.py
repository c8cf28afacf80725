"""nn.MultiheadAttention: q, k, v and the output are linear maps of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..handlers import handles, inside_checkpoint

if TYPE_CHECKING:
    from ..record import Recording


@handles("multi_head_attention_forward", spaces=(F,))
def multi_head_attention(
    rec: Recording, func: Any, query: Tensor, key: Tensor, value: Tensor,
    embed_dim_to_check: int, num_heads: int, in_proj_weight: Any, in_proj_bias: Any, bias_k: Any,
    bias_v: Any, add_zero_attn: bool, dropout_p: float, out_proj_weight: Tensor,
    out_proj_bias: Any, training: bool = True, key_padding_mask: Any = None,
    need_weights: bool = True, attn_mask: Any = None, use_separate_proj_weight: bool = False,
    q_proj_weight: Any = None, k_proj_weight: Any = None, v_proj_weight: Any = None,
    static_k: Any = None, static_v: Any = None, average_attn_weights: bool = True,
    is_causal: bool = False,
) -> Any:  # fmt: skip
    """The attention of torch itself, between projections that are recorded here.

    Inputs are [time, N, features]. torch's function insists on projecting: it is given identities.
    """
    weights = [in_proj_weight, in_proj_bias, out_proj_weight, q_proj_weight, k_proj_weight]
    weights += [v_proj_weight, out_proj_bias]
    seen = any(rec.alias(weight) is not None for weight in weights)
    if not seen or static_k is not None or static_v is not None or inside_checkpoint():
        return NotImplemented  # a checkpoint's second run must find the same operations
    unbatched = query.dim() == 2
    if unbatched:
        query, key, value = (x.unsqueeze(1) for x in (query, key, value))
        if key_padding_mask is not None:
            key_padding_mask = key_padding_mask.unsqueeze(0)

    def chunk(tensor: Any, number: int) -> Any:
        e = embed_dim_to_check
        own = slice(number * e, (number + 1) * e)
        return None if tensor is None else rec.apply(Tensor.__getitem__, tensor, own)

    def project(x: Tensor, weight: Any, bias: Any) -> Tensor:
        y: Tensor = rec.apply(F.linear, x, weight, bias, batch_dim=1)
        return y

    if use_separate_proj_weight:
        matrices = [q_proj_weight, k_proj_weight, v_proj_weight]
    else:
        matrices = [chunk(in_proj_weight, i) for i in range(3)]
    projected = [
        project(x, matrix, chunk(in_proj_bias, i))
        for i, (x, matrix) in enumerate(zip((query, key, value), matrices, strict=True))
    ]
    identity = torch.eye(embed_dim_to_check, dtype=projected[0].dtype, device=query.device)
    attended, attention = func(
        *projected, embed_dim_to_check, num_heads, None, None, bias_k, bias_v, add_zero_attn,
        dropout_p, identity, None, training, key_padding_mask, need_weights, attn_mask, True,
        identity, identity, identity, None, None, average_attn_weights, is_causal,
    )  # fmt: skip
    output = project(attended, out_proj_weight, out_proj_bias)
    if unbatched:
        return output.squeeze(1), None if attention is None else attention.squeeze(0)
    return output, attention
