"""Disentangled attention of DeBERTa (He et al., ICLR '21) and of its later versions, packed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from l2rec.modules.families.attentions import Attend, heads


def deberta(
    self: Any,
    attend: Attend,
    x: Tensor,
    *_: Any,
    rel_embeddings: Any = None,
    **__: Any,
) -> tuple[Tensor, None]:
    """Attend with scores c2c + c2p + p2c of contents and positions (Eq. 4 of the paper).

    Positions go through the frozen matrices, also where they share them with the tokens
    (``share_att_key``): experts adapt what is made of tokens.
    """
    size = self.attention_head_size
    if hasattr(self, "in_proj"):  # the first version: [q | k | v] of each head
        q, k, v = heads(self.in_proj(x), 3 * size).chunk(3, dim=-1)
        q, v = (y + heads(b[None, None], size) for y, b in ((q, self.q_bias), (v, self.v_bias)))
        names = ("pos_proj", "pos_q_proj")
    else:
        parts = (self.query_proj, self.key_proj, self.value_proj)
        q, k, v = (heads(part(x), size) for part in parts)
        shared = self.share_att_key
        names = ("key_proj", "query_proj") if shared else ("pos_key_proj", "pos_query_proj")
    kinds = [kind for kind in ("c2p", "p2c") if kind in self.pos_att_type]
    scaling: float = (size * (1 + len(kinds))) ** -0.5
    if not self.relative_attention:
        return attend(q, k, v, scaling=scaling), None
    span = getattr(self, "pos_ebd_size", self.max_relative_positions)
    buckets = getattr(self, "position_buckets", -1)
    places = {}  # of keys for c2p, of queries for p2c: [1, H, d, 2 span]
    for kind, name in zip(("c2p", "p2c"), names, strict=True):
        if kind in kinds:
            linear = getattr(self, name)
            frozen = type(linear).forward  # an adapter has replaced that of the instance
            embedded = frozen(linear, rel_embeddings[: 2 * span])
            places[kind] = heads(embedded[None], size).transpose(2, 3)

    def bias(queries: Tensor, keys: Tensor) -> Tensor:
        apart = _apart(queries, buckets, self.max_relative_positions)
        reach = min(len(apart), span)  # no row needs places further away than it is long
        scores: Tensor = torch.zeros((), dtype=queries.dtype, device=queries.device)
        for kind, content, sign in (("c2p", queries, 1), ("p2c", keys, -1)):
            if kind in kinds:
                place = (sign * apart + reach).clamp(0, 2 * reach - 1)
                near = places[kind][..., span - reach : span + reach]
                every = content @ near  # [rows, H, w, 2 reach]
                found = every.gather(-1, place.expand(*every.shape[:3], -1))
                scores = scores + (found if kind == "c2p" else found.transpose(2, 3))
        return scores * scaling

    return attend(q, k, v, scaling=scaling, position_bias=bias), None


def _apart(queries: Tensor, buckets: int, most: int) -> Tensor:
    """Return how far apart two places of [..., w, d] are, in log buckets if there are: [w, w]."""
    from transformers.models.deberta_v2.modeling_deberta_v2 import build_relative_position

    apart: Tensor = build_relative_position(queries, queries, buckets, most)[0]
    return apart
