"""Gradient checkpointing: of each block, only the input is kept for the backward.

Chen et al. Training Deep Nets with Sublinear Memory Cost. https://arxiv.org/abs/1604.06174

What a block computed is computed once more when its gradients are, so memory grows with one block
instead of all of them, for a third more work. By then the pass is over, with what surrounded it:
the packing, and the states of the adapters (`Adapter.active`). Both are put back meanwhile.
"""

from __future__ import annotations

__all__ = ["recompute_blocks"]

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar, Token
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from l2rec.modules.adapters import ACTIVE, again


def recompute_blocks(model: nn.Module, packing: ContextVar[Any]) -> None:
    """Change the blocks of a transformer in place; without gradients they do as before.

    packing: the variable in which attention finds the packing of the pass.
    """

    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        return nullcontext(), _Surroundings(packing)

    def recomputed(plain: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return plain(*args, **kwargs)
            return checkpoint(plain, *args, use_reentrant=False, context_fn=contexts, **kwargs)

        return forward

    for block in dict.fromkeys(_blocks(model)):
        block.forward = recomputed(block.forward)


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Find the members of the outermost lists of modules: the blocks, as all families have them."""
    for child in module.children():
        if isinstance(module, nn.ModuleList) and not isinstance(child, nn.ModuleList):
            yield child
        else:
            yield from _blocks(child)


class _Surroundings:
    """Context that puts back what surrounded the pass in which it was made; more than once."""

    def __init__(self, packing: ContextVar[Any]) -> None:
        # Not the pass' own states: they hold its results, whose graph holds this object.
        self._packing, self._layout, self._states = packing, packing.get(), again(ACTIVE.get())
        self._tokens: list[tuple[ContextVar[Any], Token[Any]]] = []

    def __enter__(self) -> None:
        for variable, value in ((self._packing, self._layout), (ACTIVE, again(self._states))):
            self._tokens.append((variable, variable.set(value)))

    def __exit__(self, *error: object) -> None:
        while self._tokens:
            variable, token = self._tokens.pop()
            variable.reset(token)
