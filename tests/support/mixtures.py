"""Mixtures of experts as their literal reference reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tests.support import reference
from torch import Tensor, nn

from l2rec.modules.experts import DPMoE, ViewSlice

WIDTH, RANK = 3, 2
"""Width of the routers and rank of the experts that `matrix_of` takes apart."""


def matrix_of(moe: DPMoE, j: int, v: int) -> reference.Matrix:
    """Take the stacked parameters apart, expert by expert; gradients reach the parameters."""
    m = moe.mixtures[j]

    def pairs(b: Tensor, a: Tensor) -> list[tuple[Tensor, Tensor]]:
        return [
            (b[i * RANK : (i + 1) * RANK].T, a[i * RANK : (i + 1) * RANK])
            for i in range(len(a) // RANK)
        ]

    bias, out, out_bias = m.router_x_bias[v], m.router_out[v], m.router_out_bias[v]
    context = reference.Router(m.router_x[v][:WIDTH], bias[:WIDTH], out[0], out_bias[0])
    user = interaction = None
    if moe.personalized:
        r1_u = moe.router_u[v, j]
        user = reference.Router(
            r1_u[:WIDTH], moe.router_u_bias[v, j], moe.user_out[v, j], moe.user_out_bias[v, j]
        )
        r1_f = torch.cat((r1_u[WIDTH:], m.router_x[v][WIDTH:]), dim=1)  # on [u; x]
        interaction = reference.Router(r1_f, bias[WIDTH:], out[1], out_bias[1])
    return reference.Matrix(
        pairs(m.shared_b, m.shared_a), pairs(m.b[v], m.a[v]), context, user, interaction
    )


def literal(
    model: nn.Module, moe: DPMoE, rows: Sequence[Tensor], slices: Sequence[ViewSlice]
) -> None:
    """Hook Eq. 3-5 into an untouched model, token by token, expert by expert.

    rows: of each matrix, its rows in the output of its module.
    """
    for j, name in enumerate(moe.names):
        whole = dict(model.named_modules())
        module = whole[name] if name in whole else whole[name.rpartition(".")[0]]

        def hook(_: nn.Module, inputs: Any, y: Tensor, j: int = j) -> Tensor:
            x = inputs[0].flatten(end_dim=-2)
            if len(x) != slices[-1].stop:
                return y  # DeBERTa: places, which have no user
            added = []
            for part in slices:
                matrix = matrix_of(moe, j, part.view)
                for t in range(part.start, part.stop):
                    u = part.u[part.user[t - part.start]]
                    update = reference.update(matrix, u, x[t], moe.top, moe.scaling)
                    added.append(torch.zeros_like(y.flatten(end_dim=-2)[t]))
                    added[-1] = added[-1].index_put((rows[j],), update)
            return y + torch.stack(added).view(y.shape)

        module.register_forward_hook(hook)
