"""Families whose attention has to be led to the packed one by hand.

T5 and MPNet add a bias to the scores that depends on how far apart two tokens are. Their code makes
it for one sequence of all tokens, [1, H, N, N]; packed rows need no more than that of the longest
row. MPNet's attention takes no function by name either. What is replaced here does as before
whenever the model does not run packed.
"""

from __future__ import annotations

__all__ = ["lead_to_packed"]

from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import Tensor, nn


def lead_to_packed(model: nn.Module, packing: Callable[[], Any], attention: Any) -> bool:
    """Change the modules of these families in place; return True if all attention is led by hand.

    packing: returns the `Packing` of the packed pass that is under way, or None. attention: the
    attention function of packed rows.
    """
    by_hand = False
    for module in model.modules():
        if type(module).__name__ == "MPNetSelfAttention":
            module.forward = MethodType(_mpnet(module.forward, packing, attention), module)
            by_hand = True
        for name in ("compute_bias", "compute_position_bias"):
            if callable(getattr(module, name, None)):
                setattr(module, name, _narrow(getattr(module, name), packing))
    return by_hand


def _narrow(compute: Any, packing: Callable[[], Any]) -> Any:
    """Make a bias for the longest row instead of for all tokens."""

    def narrow(first: Any, *args: Any, **kwargs: Any) -> Any:
        rows = packing()
        if rows is None:
            return compute(first, *args, **kwargs)
        if isinstance(first, Tensor):  # MPNet: hidden states [1, N, D]
            return compute(first[:, : rows.longest])
        return compute(rows.longest, rows.longest, **kwargs)  # T5: lengths of queries and keys

    return narrow


def _mpnet(plain: Any, packing: Callable[[], Any], attention: Any) -> Any:
    def forward(
        self: Any, hidden_states: Tensor, mask: Any = None, position_bias: Any = None, **kwargs: Any
    ) -> Any:
        rows = packing()
        if rows is None:
            return plain(hidden_states, mask, position_bias, **kwargs)
        shape = (*hidden_states.shape[:-1], -1, self.attention_head_size)
        q, k, v = (
            part(hidden_states).view(shape).transpose(1, 2) for part in (self.q, self.k, self.v)
        )
        states, _ = attention(self, q, k, v, None, packing=rows, position_bias=position_bias)
        return (self.o(states.flatten(2)),)

    return forward
