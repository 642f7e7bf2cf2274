"""Results that are kept until training, or loaded weights, change what they are made of."""

from __future__ import annotations

__all__ = ["Keeps"]

from typing import Any, Self

from torch import nn


class Keeps(nn.Module):
    """Base of modules that compute something once; ``_kept``: what it is, None until then."""

    _kept: Any = None

    def train(self, mode: bool = True) -> Self:
        """Switch the mode as every module does; training forgets what was kept."""
        if mode:
            self._kept = None
        return super().train(mode)

    def _load_from_state_dict(self, *args: Any) -> None:
        self._kept = None
        super()._load_from_state_dict(*args)
