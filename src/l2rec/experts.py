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
On a GPU a step of a small backbone is as long as its list of calls: the routers of a token are one
batched matmul, and the load balance of all matrices is computed at once.

The backbone stays Hugging Face's code: `DPMoE.attach` takes over the forward of its Linear modules,
by name, and `DPMoE.detach` gives it back.

Legend: n tokens, U users (rows or running prefixes), J adapted matrices, E experts of a view,
V views, R rank, W router width, D hidden size.
"""

from __future__ import annotations

__all__ = ["DPMoE", "Routing", "ViewSlice", "find_linears", "load_balance", "top_n"]

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from l2rec.backbone import split
from l2rec.errors import BackboneError, ConfigError

# What the matrices of one attention or MLP block are called across model families.
MATRIX_NAMES = {
    "q": ("q_proj", "query", "q_lin", "q"),
    "k": ("k_proj", "key", "k_lin", "k"),
    "v": ("v_proj", "value", "v_lin", "v"),
    "o": ("o_proj", "attention.output.dense", "out_lin", "attn.Wo", "attn.o"),
    "gate": ("gate_proj",),
    "up": ("up_proj", "intermediate.dense", "lin1", "mlp.Wi"),
    "down": ("down_proj", "lin2", "mlp.Wo"),
}


def find_linears(model: nn.Module, matrices: Sequence[str]) -> dict[str, nn.Linear]:
    """The Linear modules of every block that play the given parts (``q``, ``k``, ``v``, ``o``,
    ``gate``, ``up``, ``down``), by full name, in the model's order.

    Raises:
        ConfigError: an unknown part. BackboneError: the model has none of that part.
    """
    found: dict[str, nn.Linear] = {}
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    for matrix in matrices:
        if matrix not in MATRIX_NAMES:
            raise ConfigError(
                f"matrices: unknown {matrix!r}; choose from {', '.join(MATRIX_NAMES)}"
            )
        hits = {
            n: m
            for n, m in linears.items()
            if any(n == s or n.endswith(f".{s}") for s in MATRIX_NAMES[matrix])
        }
        if not hits:
            raise BackboneError(f"the backbone has no {matrix!r} matrix; change model.matrices")
        found.update(hits)
    order = list(linears)
    return dict(sorted(found.items(), key=lambda item: order.index(item[0])))


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

    from_user: per slice and matrix, what a token's user adds, [U, 2 W + E] float32: to the hidden
        layers of the context router (its bias) and of the interaction router (its bias and the
        u-half of R1^f [u; x]), and g^u. Empty where the router does not know the user.
    chosen: per slice, of each matrix that was passed: g_hat [n, E] and the chosen experts, bool.
    balance: per view, the load-balancing term of each of these matrices, [J].
    load: per view, for each of them the share of tokens that each expert received, [J, E],
        detached.
    """

    slices: Sequence[ViewSlice]
    from_user: list[Sequence[Tensor]]
    chosen: list[list[tuple[Tensor, Tensor]]]
    balance: dict[int, Tensor] = field(default_factory=dict)
    load: dict[int, Tensor] = field(default_factory=dict)

    def finish(self) -> None:
        """Balance and load, once the backbone was passed."""
        for part, chosen in zip(self.slices, self.chosen, strict=True):
            if chosen:
                scores, kept = (torch.stack(of_matrix) for of_matrix in zip(*chosen, strict=True))
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


def _gates(hidden: Tensor, out: Tensor, bias: Tensor) -> Sequence[Tensor]:
    """softmax(R2 relu(hidden) + b2) of S routers: hidden [n, S W], out [S, E, W], bias [S, E]
    -> S times [n, E], experts first in memory.

    A softmax over a short last dimension is several times slower.
    """
    active = F.relu(hidden).view(len(hidden), len(out), -1).permute(1, 2, 0)
    scores = torch.baddbmm(bias[..., None], out, active).softmax(1)
    return scores.transpose(1, 2).unbind()


class _Products(torch.autograd.Function):
    """W x + b of the frozen matrix, and of each view's rows of x the products with its own stack.

    One function, so that all gradients of x meet inside the products: autograd would add them up
    afterwards, once for every adapted matrix, which costs more than the products of the experts.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, sizes: list[int], *stacks: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, weight, *stacks)
        ctx.sizes = sizes
        views = zip(split(x, sizes), stacks, strict=True)
        return F.linear(x, weight, bias), *(F.linear(own, stack) for own, stack in views)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *stacks = ctx.saved_tensors
        g_y, g_low = grads[0], grads[1:]
        g_x = None
        if ctx.needs_input_grad[0]:
            g_x = g_y @ weight
            for own, g, stack in zip(split(g_x, ctx.sizes), g_low, stacks, strict=True):
                own.addmm_(g, stack)
        g_stacks = [g.t() @ own for own, g in zip(split(x, ctx.sizes), g_low, strict=True)]
        return g_x, None, None, None, *g_stacks


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
        def forward(x: Tensor) -> Tensor:
            if self._routing is None:
                return plain(x)
            return self.adapted(j, x.squeeze(0), self._routing)[None]

        return forward

    @contextmanager
    def routed(self, slices: Sequence[ViewSlice]) -> Iterator[Routing]:
        """Within this context the attached backbone adapts the given slices of its packed input."""
        from_user = [self._from_user(s) for s in slices]
        self._routing = routing = Routing(slices, from_user, [[] for _ in slices])
        try:
            yield routing
        finally:
            self._routing = None
        routing.finish()

    # -- the equations ---------------------------------------------------------------------------

    def _from_user(self, part: ViewSlice) -> Sequence[Tensor]:
        """`Routing.from_user` of one slice: [U, 2 W + E] of every matrix."""
        if not self.personalized:
            return ()
        v = part.view
        matrices, width = self.router_u.shape[1], self.width
        hidden = F.linear(part.u, self.router_u[v].flatten(0, 1)).view(-1, matrices, 2 * width)
        user, interaction = hidden.split(width, dim=-1)
        logits = torch.einsum(
            "ujw,jew->uje", F.relu(user + self.router_u_bias[v]), self.user_out[v]
        )
        g_user = (logits + self.user_out_bias[v]).softmax(-1)
        biases = torch.stack([m.router_x_bias for m in self.mixtures], dim=1)[v]  # type: ignore[misc]
        hidden = biases + F.pad(interaction, (width, 0))
        return torch.cat((hidden, g_user), dim=-1).unbind(1)

    def adapted(self, j: int, x: Tensor, routing: Routing) -> Tensor:
        """(W_j + dW_j) x + b of a whole packed batch, Eq. 3: x [N, d_in] -> [N, d_out]."""
        linear = self._linears[j]
        mixture: _Mixture = self.mixtures[j]  # type: ignore[assignment]
        sizes = [part.stop - part.start for part in routing.slices]
        of_view = mixture.views()
        views = [of_view[part.view] for part in routing.slices]
        # [A of all experts; x-halves of the routers' first layers], [(S + E) R + 2 W, d_in]
        stacks = [torch.cat((mixture.shared_a, v.a, v.router_x)).to(x.dtype) for v in views]
        y, *products = _Products.apply(x, linear.weight, linear.bias, sizes, *stacks)  # type: ignore[no-untyped-call]
        factors: list[Tensor] = []
        for k, (product, v) in enumerate(zip(products, views, strict=True)):
            b = torch.cat((mixture.shared_b, v.b)).to(product.dtype)
            factors += (self._gated(j, v, product, k, routing), b)
        added: Tensor = _AddLowRank.apply(y, sizes, *factors)  # type: ignore[no-untyped-call]
        return added

    def _gated(self, j: int, own: _View, product: Tensor, k: int, routing: Routing) -> Tensor:
        """A x of one view's experts times their gates, [n, (S + E) R]: B brings it back."""
        routers = len(own.router_x)
        low, hidden = product.split((product.shape[1] - routers, routers), dim=-1)
        scores = self._fused_scores(j, own, hidden, k, routing)
        kept = top_n(scores, self.top)
        routing.chosen[k].append((scores, kept))
        gates = F.pad(scores * kept, (self.shared_experts, 0), value=1.0) * self.scaling
        gated: Tensor = low * gates.to(product.dtype).repeat_interleave(self.rank, dim=-1)
        return gated

    def _fused_scores(self, j: int, own: _View, hidden: Tensor, k: int, routing: Routing) -> Tensor:
        """Eq. 4 and the first line of Eq. 5: g_hat [n, E] float32, of R1 x without its bias."""
        if not self.personalized:
            return _gates(hidden + own.router_x_bias, own.out, own.out_bias)[0]
        from_user = routing.from_user[k][j].index_select(0, routing.slices[k].user)
        of_hidden, g_user = from_user.split((2 * self.width, self.view_experts), dim=-1)
        g_context, g_interaction = _gates(hidden + of_hidden, own.out, own.out_bias)
        fused: Tensor = g_context + (g_user + g_interaction) * g_context
        return fused
