"""Dual-view personalised mixture of LoRA experts: DPMoE, Eq. 3-6 of L2Rec (SIGIR '26).

For every adapted matrix W_j of the frozen backbone, every view v in {semantic, behavioural}:

    dW_j x = alpha/r * ( sum_{i in shared} B_i A_i x + sum_{i in E_v} g_i B_i A_i x )     Eq. 3
    g^(m)  = softmax(R2^(m) relu(R1^(m) z^(m) + b1^(m)) + b2^(m)),  m in {c, u, f}        Eq. 4
             z^c = x,  z^u = u,  z^f = [u; x]
    g_hat  = g^c + (g^u + g^f) * g^c;  g_i = g_hat_i where i is in Top-N, else 0          Eq. 5

No loop over experts: the A of all experts and the x-halves of R1^c and R1^f are one stacked
matrix, so one skinny matmul of x gives every low-rank activation and the routers' hidden layers;
the activations are scaled by the gates and one matmul with the stacked B brings them back. What
depends on the user alone (g^u and the u-half of R1^f [u; x]) is one matmul for all matrices.

On a GPU a step of a small backbone is as long as its list of calls, so matrices that read the same
x (q, k and v of a block; gate and up) are one *group*: one stack, one batch of routers. The first
of them to be called computes for all. The load balance of all matrices is computed at the end.

The backbone stays Hugging Face's code: `DPMoE.attach` takes over the forward of its Linear modules,
by name, and `DPMoE.detach` gives it back.

Legend: n tokens, U users (rows or running prefixes), J adapted matrices, G those of a group, E
experts of a view, V views, R rank, W router width, D hidden size.
"""

from __future__ import annotations

__all__ = ["DPMoE", "Routing", "ViewSlice", "load_balance", "top_n"]

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from l2rec.errors import ConfigError
from l2rec.modules.adapters import side_by_side
from l2rec.modules.backbone import split


@dataclass(frozen=True)
class ViewSlice:
    """Tokens [start, stop) of a packed batch that belong to one view.

    u: [U, D] float32 user vectors of this view. user: [stop - start] int64, the row of u that
    each token is routed by (one per history, or one per prefix of it).
    """

    view: int
    start: int
    stop: int
    u: Tensor
    user: Tensor


@dataclass
class Routing:
    """What one forward pass of the backbone needs to know, and what is known after it.

    from_user: per slice and group, what a token's user adds, float32: to the hidden layers of the
        routers, [U, G, 2 W] (the context's bias; the interaction's bias and u-half of R1^f [u; x]),
        and g^u, [U, G, E]. Empty where the router does not know the user.
    chosen: per slice, of each group that was passed: g_hat [G, n, E] and the chosen experts, bool.
    ready: by matrix, the input of its group and what the matrix makes of it, until it is called.
    balance: per view, the load-balancing term of each matrix that was passed, [J].
    load: per view, for each of them the share of tokens that each expert received, [J, E],
        detached.
    """

    slices: Sequence[ViewSlice]
    from_user: list[Sequence[tuple[Tensor, Tensor]]]
    chosen: list[list[tuple[Tensor, Tensor]]]
    ready: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    balance: dict[int, Tensor] = field(default_factory=dict)
    load: dict[int, Tensor] = field(default_factory=dict)

    def finish(self) -> None:
        """Balance and load, once the backbone was passed."""
        self.ready.clear()
        for part, chosen in zip(self.slices, self.chosen, strict=True):
            if chosen:
                scores, kept = (torch.cat(of_groups) for of_groups in zip(*chosen, strict=True))
                self.balance[part.view], self.load[part.view] = load_balance(scores, kept)
                chosen.clear()


def top_n(scores: Tensor, n: int) -> Tensor:
    """Indicator of the ``n`` largest of the last dimension, [..., E] bool; exactly n are True."""
    kept = scores.detach().topk(n, dim=-1, sorted=False).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, kept, True)


def load_balance(scores: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Switch-style balance of routers: E * sum_i f_i P_i, 1 when the load is even.

    Args:
        scores: [..., n, E] fused scores g_hat of Eq. 5. kept: alike, bool, the chosen experts.

    Returns:
        The term of each router [...], and f [..., E], each expert's share of the choices
        (detached).
    """
    share = kept.to(scores.dtype).mean(-2)
    share = share / share.sum(-1, keepdim=True)
    probability = (scores / scores.sum(-1, keepdim=True)).mean(-2)
    return scores.shape[-1] * (share * probability).sum(-1), share.detach()


def _gates(hidden: Tensor, out: Tensor, bias: Tensor) -> Tensor:
    """softmax(R2 relu(hidden) + b2) of K routers: hidden [n, K W], out [K, E, W], bias [K, E]
    -> [K, E, n].

    A softmax over a short last dimension is several times slower.
    """
    active = F.relu(hidden).view(len(hidden), len(out), -1).permute(1, 2, 0)
    return torch.baddbmm(bias[..., None], out, active).softmax(1)


class _Products(torch.autograd.Function):
    """W x + b of the frozen matrices of a group, and of each view's rows of x the products with its
    own stack.

    One function, so that all gradients of x meet inside the products: autograd would add them up
    afterwards, once for every adapted matrix, which costs more than the products of the experts.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, frozen: list[nn.Linear], sizes: list[int], *stacks: Tensor
    ) -> tuple[Tensor, ...]:
        weights = [linear.weight for linear in frozen]
        ctx.save_for_backward(x, *weights, *stacks)
        ctx.sizes = sizes
        views = zip(split(x, sizes), stacks, strict=True)
        own = [F.linear(x, linear.weight, linear.bias) for linear in frozen]
        return *own, *(F.linear(part, stack) for part, stack in views)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        views = len(ctx.sizes)
        x, *matrices = ctx.saved_tensors
        weights, stacks = matrices[:-views], matrices[-views:]
        g_own, g_low = grads[:-views], grads[-views:]
        g_x = None
        if ctx.needs_input_grad[0]:
            g_x = g_own[0] @ weights[0]
            for g, weight in zip(g_own[1:], weights[1:], strict=True):
                g_x.addmm_(g, weight)
            for part, g, stack in zip(split(g_x, ctx.sizes), g_low, stacks, strict=True):
                part.addmm_(g, stack)
        g_stacks = [g.t() @ part for part, g in zip(split(x, ctx.sizes), g_low, strict=True)]
        return g_x, None, None, *g_stacks


class _AddLowRank(torch.autograd.Function):
    """y += low B of each view's rows, where y already lies. factors: low, B of every view."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, sizes: list[int], *factors: Tensor) -> Tensor:
        ctx.save_for_backward(*factors)
        ctx.sizes = sizes
        ctx.mark_dirty(y)
        for own, low, b in zip(split(y, sizes), factors[::2], factors[1::2], strict=True):
            own.addmm_(low, b)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        factors = ctx.saved_tensors
        g_factors: list[Tensor] = []
        for g, low, b in zip(split(grads[0], ctx.sizes), factors[::2], factors[1::2], strict=True):
            g_factors += (g @ b.t(), low.t() @ g)
        return grads[0], None, *g_factors


class _View(NamedTuple):
    """What one view has of a `_Mixture`."""

    a: Tensor
    b: Tensor
    router_x: Tensor
    router_x_bias: Tensor
    out: Tensor
    out_bias: Tensor


class _Mixture(nn.Module):
    """The experts and routers of one adapted matrix, all views."""

    def __init__(
        self,
        d_in: int,
        d_out: int,
        *,
        views: int,
        shared: int,
        experts: int,
        rank: int,
        width: int,
        signals: int,
    ) -> None:
        super().__init__()
        self.shared_a = nn.Parameter(torch.empty(shared * rank, d_in))
        self.shared_b = nn.Parameter(torch.empty(shared * rank, d_out))
        self.a = nn.Parameter(torch.empty(views, experts * rank, d_in))
        self.b = nn.Parameter(torch.empty(views, experts * rank, d_out))
        # x-halves of the first router layers, rows [context; interaction]: signals is 2, or 1
        # where the router does not know the user.
        self.router_x = nn.Parameter(torch.empty(views, signals * width, d_in))
        self.router_x_bias = nn.Parameter(torch.empty(views, signals * width))
        self.router_out = nn.Parameter(torch.empty(views, signals, experts, width))
        self.router_out_bias = nn.Parameter(torch.empty(views, signals, experts))

    def views(self) -> list[_View]:
        """The parameters by view. Taken apart in one piece: an index into them costs a zero-filled
        gradient of all of them for every view.
        """
        stacked = (
            self.a,
            self.b,
            self.router_x,
            self.router_x_bias,
            self.router_out,
            self.router_out_bias,
        )
        return [_View(*own) for own in zip(*(p.unbind() for p in stacked), strict=True)]

    def reset_parameters(self) -> None:
        for a in (self.shared_a, self.a):
            nn.init.uniform_(a, -1 / math.sqrt(a.shape[-1]), 1 / math.sqrt(a.shape[-1]))
        for b in (self.shared_b, self.b):
            nn.init.zeros_(b)
        bound = 1 / math.sqrt(self.router_x.shape[-1])
        nn.init.uniform_(self.router_x, -bound, bound)
        nn.init.zeros_(self.router_x_bias)
        _init_router_out(self.router_out, self.router_out_bias)


def _init_router_out(weight: Tensor, bias: Tensor) -> None:
    """Every expert equally likely at the start; only tiny differences break the ties of Top-N."""
    nn.init.normal_(weight, std=1e-3)
    nn.init.zeros_(bias)


class DPMoE(nn.Module):
    """Experts and three-signal routers for the adapted matrices of one backbone.

    Args:
        linears: the frozen modules to adapt, by name.
        dim: size D of the user vectors.
        views: number of views V; each sees the shared experts and its own.
        shared_experts, view_experts: experts shared by all views, and of each view.
        rank, alpha: of every LoRA expert; the update is scaled by alpha / rank.
        top: experts of a view kept for a token (Top-N of Eq. 5).
        width: hidden width W of the routers.
        personalized: False removes the user from the router: g = g^c (the paper's "w/o PR").
    """

    def __init__(
        self,
        linears: dict[str, nn.Linear],
        dim: int,
        *,
        views: int = 2,
        shared_experts: int = 1,
        view_experts: int = 8,
        rank: int = 8,
        alpha: float = 16.0,
        top: int = 2,
        width: int = 16,
        personalized: bool = True,
    ) -> None:
        super().__init__()
        if not 1 <= top <= view_experts:
            raise ConfigError(f"top_n={top} must lie between 1 and view_experts={view_experts}")
        self.names = list(linears)
        self.groups = side_by_side(self.names)
        self.shared_experts, self.view_experts = shared_experts, view_experts
        self.rank, self.scaling, self.top, self.width = rank, alpha / rank, top, width
        self.personalized = personalized
        self.mixtures = nn.ModuleList(
            _Mixture(
                m.in_features,
                m.out_features,
                views=views,
                shared=shared_experts,
                experts=view_experts,
                rank=rank,
                width=width,
                signals=2 if personalized else 1,
            )
            for m in linears.values()
        )
        if personalized:
            matrices = len(self.names)
            # First router layers on u, all matrices: rows [user; interaction's u-half].
            self.router_u = nn.Parameter(torch.empty(views, matrices, 2 * width, dim))
            self.router_u_bias = nn.Parameter(torch.empty(views, matrices, width))
            self.user_out = nn.Parameter(torch.empty(views, matrices, view_experts, width))
            self.user_out_bias = nn.Parameter(torch.empty(views, matrices, view_experts))
        self._linears = list(linears.values())
        self._taken: dict[nn.Linear, Callable[[Tensor], Tensor]] = {}
        self._routing: Routing | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A Kaiming-uniform, B zero, routers near uniform: untrained, nothing changes."""
        for mixture in self.mixtures:
            mixture.reset_parameters()  # type: ignore[operator]
        if self.personalized:
            bound = 1 / math.sqrt(self.router_u.shape[-1])
            nn.init.uniform_(self.router_u, -bound, bound)
            nn.init.zeros_(self.router_u_bias)
            _init_router_out(self.user_out, self.user_out_bias)

    # -- attaching to the backbone ---------------------------------------------------------------

    def attach(self) -> None:
        """Take over every adapted Linear: inside `routed` it gives W x + b and the update."""
        for j, linear in enumerate(self._linears):
            if linear not in self._taken:
                before = linear.forward
                self._taken[linear] = before
                linear.forward = self._adapting(j, before)  # type: ignore[assignment,method-assign]

    def detach(self) -> None:
        """The backbone is what it was: mixtures are detached in the opposite order."""
        for linear, before in self._taken.items():
            linear.forward = before  # type: ignore[assignment,method-assign]
        self._taken = {}

    def _adapting(self, j: int, plain: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        number = next(n for n, group in enumerate(self.groups) if j in group)
        group = self.groups[number]

        def forward(x: Tensor) -> Tensor:
            routing = self._routing
            if routing is None:
                return plain(x)
            read, y = routing.ready.pop(j, (None, x))
            if read is not x:
                ys = self.adapted(number, x.squeeze(0), routing)
                made = {i: (x, one[None]) for i, one in zip(group, ys, strict=True)}
                _, y = made.pop(j)
                routing.ready |= made
            return y

        return forward

    @contextmanager
    def routed(self, slices: Sequence[ViewSlice]) -> Iterator[Routing]:
        """Within this context the attached backbone adapts the given slices of its packed input."""
        biases: Sequence[Tensor] = ()
        if self.personalized:
            stacked = [mixture.router_x_bias for mixture in self.mixtures]
            biases = torch.stack(stacked, dim=1).unbind()  # type: ignore[arg-type]
        from_user = [self._from_user(s, biases) for s in slices]
        self._routing = routing = Routing(slices, from_user, [[] for _ in slices])
        try:
            yield routing
        finally:
            self._routing = None
        routing.finish()

    # -- the equations ---------------------------------------------------------------------------

    def _from_user(
        self, part: ViewSlice, biases: Sequence[Tensor]
    ) -> Sequence[tuple[Tensor, Tensor]]:
        """`Routing.from_user` of one slice; biases: of the routers of x, [J, 2 W] of each view."""
        if not self.personalized:
            return ()
        v = part.view
        matrices, width = self.router_u.shape[1], self.width
        hidden = F.linear(part.u, self.router_u[v].flatten(0, 1)).view(-1, matrices, 2 * width)
        user, interaction = hidden.split(width, dim=-1)
        active = F.relu(user + self.router_u_bias[v])
        logits = torch.einsum("ujw,jew->uje", active, self.user_out[v]) + self.user_out_bias[v]
        added = biases[v] + F.pad(interaction, (width, 0))
        sizes = [len(group) for group in self.groups]
        return list(zip(added.split(sizes, 1), logits.softmax(-1).split(sizes, 1), strict=True))

    def adapted(self, group: int, x: Tensor, routing: Routing) -> list[Tensor]:
        """(W_j + dW_j) x + b of a whole packed batch, Eq. 3, for every matrix j of a group:
        x [N, d_in] -> [N, d_out] each.
        """
        members = self.groups[group]
        frozen = [self._linears[j] for j in members]
        mixtures: list[_Mixture] = [self.mixtures[j] for j in members]  # type: ignore[misc]
        sizes = [part.stop - part.start for part in routing.slices]
        of_member = [mixture.views() for mixture in mixtures]
        own = [[views[part.view] for views in of_member] for part in routing.slices]
        # [A of all experts; x-halves of the routers' first layers], [G ((S + E) R + 2 W), d_in]
        stacks = []
        for views in own:
            pairs = zip(mixtures, views, strict=True)
            a = [matrix for mixture, v in pairs for matrix in (mixture.shared_a, v.a)]
            stacks.append(torch.cat([*a, *(v.router_x for v in views)]).to(x.dtype))
        made = _Products.apply(x, frozen, sizes, *stacks)  # type: ignore[no-untyped-call]
        plain, products = made[: len(members)], made[len(members) :]
        low = [
            self._gated(group, own[k], product, k, routing) for k, product in enumerate(products)
        ]
        ys: list[Tensor] = []
        for m, (mixture, y) in enumerate(zip(mixtures, plain, strict=True)):
            factors: list[Tensor] = []
            for of_view, views in zip(low, own, strict=True):
                b = torch.cat((mixture.shared_b, views[m].b)).to(x.dtype)
                factors += (of_view[m], b)
            ys.append(_AddLowRank.apply(y, sizes, *factors))  # type: ignore[no-untyped-call]
        return ys

    def _gated(
        self, group: int, own: Sequence[_View], product: Tensor, k: int, routing: Routing
    ) -> Sequence[Tensor]:
        """A x of one view's experts times their gates, [n, (S + E) R] for every matrix of the
        group: B brings it back.
        """
        matrices, routers = len(own), sum(len(v.router_x) for v in own)
        low, hidden = product.split((product.shape[1] - routers, routers), dim=-1)
        scores = self._fused_scores(group, own, hidden.unflatten(-1, (matrices, -1)), k, routing)
        kept = top_n(scores, self.top)
        routing.chosen[k].append((scores, kept))
        gates = F.pad(scores * kept, (self.shared_experts, 0), value=1.0) * self.scaling
        gates = gates.transpose(0, 1).to(product.dtype).repeat_interleave(self.rank, dim=-1)
        gated: Tensor = low.unflatten(-1, (matrices, -1)) * gates
        return gated.unbind(1)

    def _fused_scores(
        self, group: int, own: Sequence[_View], hidden: Tensor, k: int, routing: Routing
    ) -> Tensor:
        """Eq. 4 and the first line of Eq. 5: g_hat [G, n, E] float32, of R1 x [n, G, 2 W] without
        its bias.
        """
        out, bias = torch.cat([v.out for v in own]), torch.cat([v.out_bias for v in own])
        if not self.personalized:
            hidden = hidden + torch.stack([v.router_x_bias for v in own])
            return _gates(hidden.flatten(1), out, bias).transpose(1, 2)
        of_hidden, of_user = routing.from_user[k][group]
        user = routing.slices[k].user
        hidden = hidden + of_hidden.index_select(0, user)
        gates = _gates(hidden.flatten(1), out, bias).unflatten(0, (len(own), 2))
        g_context, g_interaction = gates.transpose(2, 3).unbind(1)
        g_user = of_user.index_select(0, user).transpose(0, 1)
        fused: Tensor = g_context + (g_user + g_interaction) * g_context
        return fused
