"""Attention of families that have code of their own for it, led to the packed one.

Each function stands for a method of the module ``self``: the same arguments and the same result,
with ``attend`` between the two. Hidden states x: [1, N, D].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

Attend = Callable[..., Tensor]
"""Packed attention: q, k, v [1, H, N, d] and options -> states [1, N, H d]."""


def heads(x: Tensor, size: int) -> Tensor:
    """View x [1, N, H size] as [1, H, N, size]."""
    view: Tensor = x.unflatten(-1, (-1, size))
    return view.transpose(1, 2)


def bert(self: Any, attend: Attend, x: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    """Attend in full, without biases: RemBERT, Megatron-BERT, BigBird's full attention."""
    q, k, v = (heads(f(x), self.attention_head_size) for f in (self.query, self.key, self.value))
    return attend(q, k, v), None


def roformer(
    self: Any, attend: Attend, x: Tensor, *_: Any, sinusoidal_pos: Tensor, **__: Any
) -> tuple[Tensor, None]:
    """Attend with queries and keys (and values, if so configured) turned by their places."""
    q, k, v = (heads(f(x), self.attention_head_size) for f in (self.query, self.key, self.value))
    turned = (q, k, v) if self.rotary_value else (q, k)
    turned = self.apply_rotary_position_embeddings(sinusoidal_pos, *turned)
    return attend(*turned, *(() if self.rotary_value else (v,))), None


def mpnet(
    self: Any, attend: Attend, x: Tensor, mask: Any = None, position_bias: Any = None, **_: Any
) -> tuple[Tensor]:
    """Attend with one bias of distance for all layers."""
    q, k, v = (heads(part(x), self.attention_head_size) for part in (self.q, self.k, self.v))
    return (self.o(attend(q, k, v, position_bias=position_bias)),)


def xglm(self: Any, attend: Attend, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
    """Attend as BART's decoder does."""
    parts = (self.q_proj, self.k_proj, self.v_proj)
    q, k, v = (heads(part(hidden_states), self.head_dim) for part in parts)
    return self.out_proj(attend(q, k, v, scaling=self.scaling)), None


def core(
    self: Any, attend: Attend, q: Tensor, k: Tensor, v: Tensor, *_: Any, **options: Any
) -> tuple[Tensor, None]:
    """Lead ``_attn(q, k, v)`` [1, H, N, d], which other code of the module surrounds."""
    states = attend(q.to(v.dtype), k.to(v.dtype), v, **options)
    return heads(states, v.shape[-1]), None


def gpt(self: Any, attend: Attend, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> list[Tensor]:
    """Lead ``_attn`` of GPT-1, whose keys come transposed and whose result is a list."""
    scaling = None if self.scale else 1.0
    return [heads(attend(q, k.transpose(2, 3), v, scaling=scaling), v.shape[-1])]


def gpt_neo(
    self: Any, attend: Attend, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, None]:
    """Attend without a scale; layers of local attention know their window from a mask alone."""
    local = self.attention_type == "local"
    window = int(self.bias[0, 0, -1].sum()) if local else None  # what the last place sees
    return core(self, attend, q, k, v, scaling=1.0, sliding_window=window)


def bloom(
    self: Any, attend: Attend, x: Tensor, residual: Tensor, alibi: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, None]:
    """Attend with ALiBi [H, 1, N], slope times place: softmax forgets where a row starts."""
    q, k, v = self._reshape(self.query_key_value(x))
    return self.dense(attend(q, k, v, position_bias=alibi[None])) + residual, None


def falcon(
    self: Any,
    attend: Attend,
    x: Tensor,
    alibi: Tensor | None,
    position_embeddings: Any = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend with ALiBi [1, H, 1, N], or with rotary positions."""
    from transformers.models.falcon.modeling_falcon import apply_rotary_pos_emb

    q, k, v = (part.transpose(1, 2) for part in self._split_heads(self.query_key_value(x)))
    if alibi is not None:  # [1, H, 1, N], scaled as the scores are
        states = attend(q, k, v, position_bias=alibi * self.inv_norm_factor)
    else:
        states = attend(*apply_rotary_pos_emb(q, k, *position_embeddings), v)
    return self.dense(states), None


def mpt(
    self: Any, attend: Attend, x: Tensor, position_bias: Tensor, **_: Any
) -> tuple[Tensor, None]:
    """Attend with ALiBi (`whole.mpt_alibi`)."""
    mixed = self.Wqkv(x)
    if self.clip_qkv:
        mixed = mixed.clamp(min=-self.clip_qkv, max=self.clip_qkv)
    q, k, v = (heads(part, self.head_dim) for part in mixed.chunk(3, dim=2))
    states = attend(q, k, v, scaling=self.softmax_scale, position_bias=position_bias[None])
    return self.out_proj(states), None
