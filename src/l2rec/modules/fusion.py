"""Adaptive cross-view fusion: ACF, Eq. 7 of L2Rec (SIGIR '26)."""

from __future__ import annotations

__all__ = ["AdaptiveFusion"]

import torch
from torch import Tensor, nn

from l2rec.modules.views import View


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

    def residual(self, view: View, h: Tensor) -> Tensor:
        """Compute h~^v from h^v [B, D]."""
        project = self.project_behavioral if view == "behavioral" else self.project_semantic
        out: Tensor = h + project(h)
        return out

    def fuse(self, behavioral: Tensor, semantic: Tensor) -> tuple[Tensor, Tensor]:
        """Fuse h~^B and h~^S [B, D] into h^F [B, D].

        Also returns delta, [B, D] or [B, 1]; where it is 1, h^F is all behavioural.
        """
        delta = torch.sigmoid(self.gate(torch.cat((behavioral, semantic), dim=-1)))
        return delta * behavioral + (1 - delta) * semantic, delta

    def forward(
        self, behavioral: Tensor | None, semantic: Tensor | None, *, project: bool = True
    ) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor | None]:
        """Return h~^B, h~^S, h^F and delta of Eq. 7. Of one view alone (the other is None), h^F is
        its h~^v, and there is no delta.

        project: False leaves out P_v, so that h~^v is h^v.
        """
        if project:
            behavioral = None if behavioral is None else self.residual("behavioral", behavioral)
            semantic = None if semantic is None else self.residual("semantic", semantic)
        if behavioral is not None and semantic is not None:
            return behavioral, semantic, *self.fuse(behavioral, semantic)
        fused = semantic if behavioral is None else behavioral
        assert fused is not None, "no view"
        return behavioral, semantic, fused, None
