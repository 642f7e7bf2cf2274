"""Low-rank adaptation of the linear maps of a frozen backbone.

Hu et al. LoRA. ICLR '22, https://arxiv.org/abs/2106.09685

    W x + alpha/r B A drop(x)          A uniform, B zero: untrained, nothing changes

The update is added inside `LoRA.enabled` only; outside of it, the backbone is the frozen one. There
the ranks may be weighed for each token: alpha/r B diag(g) A drop(x), as experts that are slices of
A and B need it (`l2rec.methods.ilora`).
"""

from __future__ import annotations

__all__ = ["LoRA"]

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from l2rec.modules.adapters import Adapter, Forward
from l2rec.modules.fused import Matrix


class LoRA(Adapter[Tensor | Literal[True]]):
    """Low-rank updates, one pair A [R, d_in] and B [d_out, R] for each adapted matrix.

    Args:
        linears: the frozen matrices to adapt, by name (`find_linears`).
        rank, alpha: R, and the scale: the update is multiplied by alpha / rank.
        dropout: share of the inputs of A that is dropped in training.
    """

    def __init__(
        self,
        linears: Mapping[str, Matrix],
        *,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(linears)
        self._places: list[list[int]] = [[] for _ in self._modules_of]
        for j, number in enumerate(self._module_of):
            self._places[number].append(j)
        self.scaling = alpha / rank
        self.dropout = nn.Dropout(dropout)
        self.a = nn.ParameterList(torch.empty(rank, m.in_features) for m in self._parts)
        self.b = nn.ParameterList(torch.empty(m.out_features, rank) for m in self._parts)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw A as Kaiming-uniform and set B to zero: the update is zero."""
        for a in self.a:
            bound = 1 / math.sqrt(a.shape[1])
            nn.init.uniform_(a, -bound, bound)
        for b in self.b:
            nn.init.zeros_(b)

    @contextmanager
    def enabled(self, weights: Tensor | None = None) -> Iterator[None]:
        """Add the updates to the outputs of the attached modules within this context.

        weights: g [U, R] of every token (U tokens in all), or of the rows of a grid of tokens (U
            rows); None leaves all ranks as they are.
        """
        with self.active(True if weights is None else weights):
            yield

    def update(self, j: int, x: Tensor, weights: Tensor | None = None) -> Tensor:
        """Return alpha/r B diag(g) A drop(x) of matrix j: x [..., d_in] -> [..., d_out], alike.

        weights: g, as in `enabled`.
        """
        low = F.linear(self.dropout(x), self.a[j].to(x.dtype))
        if weights is not None:
            # Some models flatten a grid: tokens of a row stay next to one another.
            rows = low.reshape(len(weights), -1, low.shape[-1])
            low = (rows * weights[:, None].to(x.dtype)).view(low.shape)
        return F.linear(low * self.scaling, self.b[j].to(x.dtype))

    def _output(
        self, number: int, x: Tensor, plain: Forward, state: Tensor | Literal[True]
    ) -> Tensor:
        y, weights = plain(x), None if state is True else state
        for j in self._places[number]:
            y = y + self._parts[j].spread(self.update(j, x, weights))
        return y
