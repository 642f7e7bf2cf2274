"""Adaptive cross-view fusion: ACF, Eq. 7 of L2Rec (SIGIR '26)."""

from __future__ import annotations

__all__ = ["AdaptiveFusion"]

import torch
from torch import Tensor, nn


class AdaptiveFusion(nn.Module):
    """Residual projections P_v of both views, v in {B, S}, and a gate delta between them.

        h~^v = h^v + P_v(h^v),    delta = sigmoid(W_g [h~^B; h~^S] + b_g)
        h^F  = delta h~^B + (1 - delta) h~^S

    P_v and W_g start at zero: the untrained fusion is the plain mean of the views.

    Args:
        dim: size D of both views.
        gate: ``vector``: one delta for each dimension; ``scalar``: one for each user.
    """

    def __init__(self, dim: int, gate: str = "vector") -> None:
        super().__init__()
        self.project_behavioral = nn.Linear(dim, dim)
        self.project_semantic = nn.Linear(dim, dim)
        self.gate = nn.Linear(2 * dim, dim if gate == "vector" else 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set all to zero: h~ = h and delta = 1/2."""
        for module in (self.project_behavioral, self.project_semantic, self.gate):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)

    def residual(self, behavioral: Tensor, semantic: Tensor) -> tuple[Tensor, Tensor]:
        """Compute h~^B and h~^S from h^B and h^S, [B, D] each."""
        return (
            behavioral + self.project_behavioral(behavioral),
            semantic + self.project_semantic(semantic),
        )

    def fuse(self, behavioral: Tensor, semantic: Tensor) -> tuple[Tensor, Tensor]:
        """Fuse h~^B and h~^S [B, D] into h^F [B, D].

        Also returns delta, [B, D] or [B, 1]; where it is 1, h^F is all behavioural.
        """
        delta = torch.sigmoid(self.gate(torch.cat((behavioral, semantic), dim=-1)))
        return delta * behavioral + (1 - delta) * semantic, delta

    def forward(
        self, behavioral: Tensor | None, semantic: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor | None]:
        """Return h~^B, h~^S, h^F and delta of Eq. 7. Of one view alone (the other is None), h^F is
        its residual projection, and there is no delta.
        """
        if behavioral is not None and semantic is not None:
            behavioral, semantic = self.residual(behavioral, semantic)
            return behavioral, semantic, *self.fuse(behavioral, semantic)
        if behavioral is not None:
            behavioral = behavioral + self.project_behavioral(behavioral)
            return behavioral, None, behavioral, None
        assert semantic is not None, "no view"
        semantic = semantic + self.project_semantic(semantic)
        return None, semantic, semantic, None
