"""Low-rank adaptation of the linear maps of a frozen backbone.

Hu et al. LoRA. ICLR '22, https://arxiv.org/abs/2106.09685

    W x + alpha/r B A drop(x)          A uniform, B zero: untrained, nothing changes

The backbone stays Hugging Face's code: hooks on its Linear modules add the update, and only
inside `LoRA.enabled`; outside of it, the backbone is the frozen one.
"""

from __future__ import annotations

__all__ = ["LoRA"]

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle


class LoRA(nn.Module):
    """One pair (A, B) for each of the given modules, by name (`find_linears`).

    Args:
        linears: the frozen modules to adapt.
        rank, alpha: the update is scaled by alpha / rank.
        dropout: of the inputs of A.
    """

    def __init__(
        self,
        linears: dict[str, nn.Linear],
        *,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.names = list(linears)
        self.scaling = alpha / rank
        self.dropout = nn.Dropout(dropout)
        self.a = nn.ParameterList(torch.empty(rank, m.in_features) for m in linears.values())
        self.b = nn.ParameterList(torch.empty(m.out_features, rank) for m in linears.values())
        self._linears = list(linears.values())
        self._handles: list[RemovableHandle] = []
        self._on = False
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A Kaiming-uniform, B zero."""
        for a in self.a:
            bound = 1 / math.sqrt(a.shape[1])
            nn.init.uniform_(a, -bound, bound)
        for b in self.b:
            nn.init.zeros_(b)

    def attach(self) -> None:
        """Hook every adapted Linear: inside `enabled`, its output gains the update."""
        if not self._handles:
            self._handles = [
                linear.register_forward_hook(self._hook(j))
                for j, linear in enumerate(self._linears)
            ]

    def detach(self) -> None:
        """Take the hooks away: the backbone is what it was."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @contextmanager
    def enabled(self) -> Iterator[None]:
        """Within this context the hooked backbone is the adapted one."""
        before, self._on = self._on, True
        try:
            yield
        finally:
            self._on = before

    def update(self, j: int, x: Tensor) -> Tensor:
        """alpha/r B A drop(x) of matrix j: x [..., d_in] -> [..., d_out], in the dtype of x."""
        low = F.linear(self.dropout(x), self.a[j].to(x.dtype))
        return F.linear(low * self.scaling, self.b[j].to(x.dtype))

    def _hook(self, j: int):  # type: ignore[no-untyped-def]
        def add_update(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            return output + self.update(j, inputs[0]) if self._on else None

        return add_update
