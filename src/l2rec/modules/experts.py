"""Dual-view personalised mixture of LoRA experts: DPMoE, Eq. 3-6 of L2Rec (SIGIR '26).

The experts add alpha/r dW_j x to the output of every adapted matrix W_j of the frozen backbone
(alpha/r is LoRA's; the paper gives no scale):

                                              plain form       fast form
    Eq. 3   dW_j x, sum of gated experts      `plain_update`   `DPMoE.adapted`
    Eq. 4   routers g^c, g^u, g^f             `plain_update`   `_gates`; g^u: `DPMoE._from_user`
    Eq. 5   fusion g_hat, then Top-N          `plain_update`   `DPMoE._fused_scores`; `top_n`
    Eq. 6   one such update for each view                      `ViewSlice`

`plain_update` is the paper's form, for one token. The literal reference is
tests/parity/reference.py: float64, loops over users, tokens and experts, nothing from l2rec.
tests/parity/test_experts.py compares outputs of the fast form with both, and load, balance and
every gradient with the reference.

The fast form has no loop over experts: the A of all experts and the x-halves of R1^c and R1^f are
one stacked matrix, so one skinny matmul of x gives every low-rank activation and the routers'
hidden layers; the activations are scaled by the gates and one matmul with the stacked B brings them
back. What depends on the user alone (g^u and the u-half of R1^f [u; x]) is one matmul for all
matrices.

On a GPU a step of a small backbone is as long as its list of calls, so matrices that read the same
x (q, k and v of a block; gate and up) are one *group*: one stack, one batch of routers. The first
of them to be called computes for all. The load balance of all matrices is computed at once, after
the pass.

Legend: n tokens of a slice, N of the packed batch, U users (rows or running prefixes), J adapted
matrices, G those of a group, S shared experts, E experts of a view, V views, R rank, W router
width, D hidden size. Parameters are float32; products run in the dtype of x, routers' softmax and
gates in float32.
"""

from __future__ import annotations

__all__ = [
    "DPMoE",
    "Routing",
    "Signal",
    "ViewSlice",
    "load_balance",
    "plain_update",
    "top_n",
    "user_share",
]

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from l2rec.errors import ConfigError
from l2rec.modules.adapters import Adapter, Forward, side_by_side
from l2rec.modules.fused import Matrix, Part
from l2rec.modules.kept import Keeps
from l2rec.modules.packing import Group, split
from l2rec.modules.processes import summed

Pairs: TypeAlias = Sequence[tuple[Tensor, Tensor]]
"""Experts: B_i [d_out, R] and A_i [R, d_in] of each."""
Routers: TypeAlias = Mapping[str, tuple[Tensor, Tensor, Tensor, Tensor]]
"""R1 [W, size of z], b1 [W], R2 [E, W], b2 [E] of the signals "c", "u" and "f"; "c" alone without
a personalised router.
"""


def plain_update(
    x: Tensor, u: Tensor, shared: Pairs, experts: Pairs, routers: Routers, top: int, scaling: float
) -> Tensor:
    """Return alpha/r dW_j x [d_out] of one token x [d_in] of a user u [D], one view: Eq. 3-5."""

    def g(m: str, z: Tensor) -> Tensor:  # Eq. 4
        r1, b1, r2, b2 = routers[m]
        return torch.softmax(r2 @ F.relu(r1 @ z + b1) + b2, dim=-1)

    g_c = g_hat = g("c", x)
    if "u" in routers:
        g_hat = g_c + (g("u", u) + g("f", torch.cat((u, x)))) * g_c  # Eq. 5, fusion
    gates = [*x.new_ones(len(shared)), *(g_hat * top_n(g_hat, top))]  # Eq. 5, Top-N
    terms = [gate * (b @ (a @ x)) for gate, (b, a) in zip(gates, (*shared, *experts), strict=True)]
    return scaling * torch.stack(terms).sum(0)  # Eq. 3


@dataclass(frozen=True)
class ViewSlice:
    """Tokens [start, stop) of a packed batch that belong to one view: u^v, x^v and E_v of Eq. 6.

    view: place of the view, and of its experts, 0..V-1. u: [U, D] float32 user vectors of this
    view. user: [n] int64, the row of u that each token is routed by (one per history, or one per
    prefix of it).
    filler: how many of the last tokens are in no row, and count for no expert's load.
    """

    view: int
    start: int
    stop: int
    u: Tensor
    user: Tensor
    filler: int = 0

    @property
    def tokens(self) -> int:
        """Number of tokens that are in rows."""
        return self.stop - self.start - self.filler

    @classmethod
    def of_group(cls, view: int, group: Group, u: Tensor, user: Tensor) -> ViewSlice:
        """Build the slice of a group and its filler; user: [n], of the group's tokens alone."""
        user = F.pad(user, (0, group.filler))  # fillers need some user
        return cls(view, group.start, group.stop + group.filler, u, user, group.filler)


@dataclass
class Routing:
    """State of one forward pass of the backbone; afterwards, its load balance.

    slices: the views' tokens; together the whole packed batch, in order.
    from_user: per slice and group, the terms that depend on the user alone, float32: what is added
        to the hidden layers of the routers, [U, G, 2 W] (context: b1^c; interaction: b1^f and the
        u-half of R1^f [u; x]), and g^u, [U, G, E]. Empty where the router does not know the user.
    chosen: per slice, of each passage of a group: its matrices j, g_hat [G, n, E] float32 and the
        chosen experts [G, n, E] bool. Emptied once they are summed up; None where nothing is
        collected, because a part of the pass is computed once more.
    ready: by module, the input of its group and the output that was computed with it, until the
        module is called.
    """

    slices: Sequence[ViewSlice]
    from_user: list[Sequence[tuple[Tensor, Tensor]]]
    chosen: list[list[tuple[list[int], Tensor, Tensor]]] | None
    ready: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def balance(self) -> dict[int, Tensor]:
        """Load-balancing term of each passage of a matrix, float32, by view: [J], or more where a
        block runs several times.
        """
        return {view: terms for view, (terms, _, _) in self._summed_up.items()}

    @property
    def load(self) -> dict[int, Tensor]:
        """Share of choices that each expert of the matrices that were passed received, [J, E]
        float32, detached, by view.
        """
        found = {}
        for view, (_, load, matrices) in self._summed_up.items():
            _, row, times = matrices.unique(return_inverse=True, return_counts=True)
            total = load.new_zeros(len(times), load.shape[1])
            total.index_add_(0, row.to(load.device), load)
            found[view] = total / times.to(load.device)[:, None]  # all are of the same tokens
        return found

    @cached_property
    def _summed_up(self) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
        # At the first question: nobody asks when a user is served.
        assert self.chosen is not None, "a part that is computed once more is no whole pass"
        found = {}
        for part, chosen in zip(self.slices, self.chosen, strict=True):
            if chosen:
                groups, *rest = zip(*chosen, strict=True)
                scores, in_top = (torch.cat(of_groups)[:, : part.tokens] for of_groups in rest)
                matrices = torch.tensor([j for group in groups for j in group])
                found[part.view] = *load_balance(scores, in_top), matrices
                chosen.clear()
        return found


def top_n(scores: Tensor, n: int) -> Tensor:
    """Mark the ``n`` largest scores, the indicator of Eq. 5: [..., E] -> [..., E] bool.

    Exactly n are True, ties or not.
    """
    largest = scores.detach().topk(n, dim=-1, sorted=False).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, largest, True)


def load_balance(scores: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the load-balancing term of routers: E * sum_i f_i P_i, 1 when the load is even.

    Fedus et al. Switch Transformers. JMLR '22, https://arxiv.org/abs/2101.03961, Eq. 4-6.

    Args:
        scores: [..., n, E] fused scores g_hat of Eq. 5. chosen: alike, bool, those in Top-N.

    Tokens are those of all processes where a batch is dealt out.

    Returns:
        The term of each router, [...], and f [..., E], each expert's share of the choices
        (detached).
    """
    share = summed(chosen.to(scores.dtype).sum(-2))
    share = share / share.sum(-1, keepdim=True)
    tokens = summed(scores.new_tensor(float(scores.shape[-2])))
    probability = summed((scores / scores.sum(-1, keepdim=True)).sum(-2)) / tokens
    return scores.shape[-1] * (share * probability).sum(-1), share.detach()


def _gates(hidden: Tensor, out: Tensor, bias: Tensor) -> Tensor:
    """Compute softmax(R2 relu(hidden) + b2), Eq. 4, of K routers.

    hidden: [n, K W], R1 z + b1. out: [K, E, W], R2. bias: [K, E], b2. Returns [K, E, n], experts
    not last: a softmax over a short last dimension is several times slower.
    """
    active = F.relu(hidden).view(len(hidden), len(out), -1).permute(1, 2, 0)
    return torch.baddbmm(bias[..., None], out, active).softmax(1)


class _Products(torch.autograd.Function):
    """Products of x with the frozen matrices of a group, W x + b, and with each view's stack.

    x: [N, d_in], the rows of each view one after the other. frozen: one `Part` of each module.
    sizes: rows of each view. stacks: one of each view, [rows of the stack, d_in]. Returns
    [N, rows of the module] of each module, then
    [n, rows of the stack] of each view.

    One function, so that all gradients of x meet inside the products: autograd would add them up
    afterwards, once for every adapted matrix, which costs more than the products of the experts.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, frozen: list[Part], sizes: list[int], *stacks: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, *stacks)
        # Not the matrices: one that is quantised is made for a product and dropped.
        ctx.frozen, ctx.sizes = frozen, sizes
        views = zip(split(x, sizes), stacks, strict=True)
        plain = [
            F.linear(x, part.weight, part.module.bias)  # type: ignore[arg-type]
            for part in frozen
        ]
        return *plain, *(F.linear(part, stack) for part, stack in views)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        views = len(ctx.sizes)
        x, *stacks = ctx.saved_tensors
        g_plain, g_low = grads[:-views], grads[-views:]
        g_x = None
        if ctx.needs_input_grad[0]:
            g_x = g_plain[0] @ ctx.frozen[0].weight
            for g, module in zip(g_plain[1:], ctx.frozen[1:], strict=True):
                g_x.addmm_(g, module.weight)
            for part, g, stack in zip(split(g_x, ctx.sizes), g_low, stacks, strict=True):
                part.addmm_(g, stack)
        g_stacks = [g.t() @ part for part, g in zip(split(x, ctx.sizes), g_low, strict=True)]
        return g_x, None, None, *g_stacks


class _AddLowRank(torch.autograd.Function):
    """In-place sum y += low B of each view's rows: the experts' part of Eq. 3.

    y: [N, rows of the module]. part: those of the matrix. sizes: rows of each view. factors: low
    [n, (S + E) R] and B [(S + E) R, d_out] of every view in turn.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, part: Part, sizes: list[int], *factors: Tensor) -> Tensor:
        ctx.save_for_backward(*factors)
        ctx.part, ctx.sizes = part, sizes
        ctx.mark_dirty(y)
        for rows, low, b in zip(split(y, sizes), factors[::2], factors[1::2], strict=True):
            part.add_(rows, low, b)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        factors = ctx.saved_tensors
        g_factors: list[Tensor] = []
        shares = split(ctx.part.of(grads[0]), ctx.sizes)
        for g, low, b in zip(shares, factors[::2], factors[1::2], strict=True):
            g_factors += (g @ b.t(), low.t() @ g)
        return grads[0], None, None, *g_factors


class Signal(NamedTuple):
    """Spread over the tokens of a slice of what enters R1^f [u; x]: which half decides.

    view, group: of the slice, and of the matrices. tokens: of the slice.
    user, context: [G] float32, variance of the u-half and of the x-half of the hidden layer, mean
    over its width.
    """

    view: int
    group: int
    tokens: int
    user: Tensor
    context: Tensor


def _spread(hidden: Tensor) -> Tensor:
    """Return the variance over tokens of [n, G, W], mean over W: [G] float32."""
    return hidden.detach().float().var(0, correction=0).mean(-1)


def user_share(signals: Sequence[Signal]) -> list[float]:
    """Return, of each matrix in order, the share of the user in the interaction router's hidden
    layer: sd(u-half) / (sd(u-half) + sd(x-half)), over all signals of one view.
    """
    shares: list[float] = []
    for group in sorted({signal.group for signal in signals}):
        some = [signal for signal in signals if signal.group == group]
        tokens = sum(signal.tokens for signal in some)
        user, context = (
            (sum(s.tokens * getattr(s, half) for s in some) / tokens).sqrt()
            for half in ("user", "context")
        )
        shares += (user / (user + context).clamp_min(1e-12)).tolist()
    return shares


class _View(NamedTuple):
    """Parameters of one view in a `_Mixture`."""

    a: Tensor
    b: Tensor
    router_x: Tensor
    router_x_bias: Tensor
    out: Tensor
    out_bias: Tensor


class _Joined(NamedTuple):
    """Parameters of one group and one view, as the products of a pass take them.

    stack: [A of all experts; x-halves of the routers' first layers], [G ((S + E) R + 2 W), d_in].
    b: [(S + E) R, d_out] of each matrix; both in the dtype of x. bias: [G, 2 W] of those first
    layers. out, out_bias: [2 G, E, W] and [2 G, E], the second layers. (G and W where the router
    does not know the user.)
    """

    stack: Tensor
    b: list[Tensor]
    bias: Tensor
    out: Tensor
    out_bias: Tensor


class _Mixture(nn.Module):
    """Experts and routers of one adapted matrix, all views.

    Experts are stacked along their ranks: rows i R to (i + 1) R of ``a`` are A_i, of ``b`` B_i
    transposed.
    """

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
        """Return the parameters of each view.

        All at once: an index into a parameter costs a zero-filled gradient of all of it for every
        view.
        """
        stacked = (
            self.a,
            self.b,
            self.router_x,
            self.router_x_bias,
            self.router_out,
            self.router_out_bias,
        )
        return [_View(*parts) for parts in zip(*(p.unbind() for p in stacked), strict=True)]

    def reset_parameters(self) -> None:
        """Draw A as Kaiming-uniform, set B to zero, start the routers near uniform."""
        for a in (self.shared_a, self.a):
            nn.init.uniform_(a, -1 / math.sqrt(a.shape[-1]), 1 / math.sqrt(a.shape[-1]))
        for b in (self.shared_b, self.b):
            nn.init.zeros_(b)
        bound = 1 / math.sqrt(self.router_x.shape[-1])
        nn.init.uniform_(self.router_x, -bound, bound)
        nn.init.zeros_(self.router_x_bias)
        _init_router_out(self.router_out, self.router_out_bias)


def _init_router_out(weight: Tensor, bias: Tensor) -> None:
    """Start with every expert equally likely, but for tiny differences that break ties of Top-N."""
    nn.init.normal_(weight, std=1e-3)
    nn.init.zeros_(bias)


class DPMoE(Keeps, Adapter[Routing]):
    """Experts and three-signal routers for the adapted matrices of one backbone.

    Args:
        linears: the frozen matrices to adapt, by name (`find_linears`).
        dim: size D of the user vectors.
        views: number of views V; each uses the shared experts and its own.
        shared_experts, view_experts: S and E, experts shared by all views and of each view.
        rank, alpha: R of every LoRA expert, and the scale: the update is multiplied by alpha / rank
            (the paper gives no scale).
        top: N of Eq. 5, experts of a view that are active for a token.
        width: hidden width W of the routers.
        personalized: False removes the user from the router: g_hat = g^c (the paper's "w/o PR").
        gate_norm: gates of the chosen experts are divided by their sum (ours).

    Raises:
        ConfigError: ``top`` is not between 1 and ``view_experts``.
    """

    _kept: dict[tuple[int, torch.dtype], list[_Joined]] | None

    def __init__(
        self,
        linears: Mapping[str, Matrix],
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
        gate_norm: bool = False,
    ) -> None:
        super().__init__(linears)
        if not 1 <= top <= view_experts:
            raise ConfigError(f"top_n={top} must lie between 1 and view_experts={view_experts}")
        self.groups = side_by_side(linears)
        self._modules_in = [sorted({self._module_of[j] for j in group}) for group in self.groups]
        self._group_of = [n for n, modules in enumerate(self._modules_in) for _ in modules]
        self.shared_experts, self.view_experts = shared_experts, view_experts
        self.rank, self.scaling, self.top, self.width = rank, alpha / rank, top, width
        self.personalized, self.gate_norm = personalized, gate_norm
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
            for m in self._parts
        )
        if personalized:
            matrices = len(self.names)
            # First router layers on u, all matrices: rows [user; interaction's u-half].
            self.router_u = nn.Parameter(torch.empty(views, matrices, 2 * width, dim))
            self.router_u_bias = nn.Parameter(torch.empty(views, matrices, width))
            self.user_out = nn.Parameter(torch.empty(views, matrices, view_experts, width))
            self.user_out_bias = nn.Parameter(torch.empty(views, matrices, view_experts))
        self._watched: list[Signal] | None = None
        self.reset_parameters()

    def keep(self) -> None:
        """Join parameters once, for weights that no longer change; training or loading ends it."""
        self._kept = None if self.training else {}

    def reset_parameters(self) -> None:
        """Draw A as Kaiming-uniform, set B to zero, start the routers near uniform: dW = 0."""
        for mixture in self.mixtures:
            mixture.reset_parameters()  # type: ignore[operator]
        if self.personalized:
            bound = 1 / math.sqrt(self.router_u.shape[-1])
            nn.init.uniform_(self.router_u, -bound, bound)
            nn.init.zeros_(self.router_u_bias)
            _init_router_out(self.user_out, self.user_out_bias)

    @contextmanager
    def watched(self) -> Iterator[list[Signal]]:
        """Collect, within this context, how far the routers' inputs spread; empty without users."""
        self._watched = []
        try:
            yield self._watched
        finally:
            self._watched = None

    @contextmanager
    def routed(self, slices: Sequence[ViewSlice]) -> Iterator[Routing]:
        """Adapt the given slices of the attached backbone's packed input within this context.

        slices: all tokens of the input, in order. The routing has balance and load afterwards.
        """
        biases: Sequence[Tensor] = ()
        if self.personalized:
            stacked = [mixture.router_x_bias for mixture in self.mixtures]
            biases = torch.stack(stacked, dim=1).unbind()  # type: ignore[arg-type]
        from_user = [self._from_user(s, biases) for s in slices]
        with self.active(Routing(slices, from_user, [[] for _ in slices])) as routing:
            yield routing
        routing.ready.clear()

    def _again(self, state: Routing) -> Routing:
        return Routing(state.slices, state.from_user, None)

    def _output(self, number: int, x: Tensor, plain: Forward, state: Routing) -> Tensor:
        """Return (W_j + alpha/r dW_j) x + b: x [..., N, d_in] -> [..., N, rows of the module].

        The first of a group to be called computes for all of it; a neighbour that reads another
        input computes anew. ``plain`` is not called, because `adapted` multiplies by W_j itself: an
        adapter that was attached before this one has no effect here.
        """
        read, y = state.ready.pop(number, (None, x))
        if read is not x:
            group = self._group_of[number]
            outputs = self.adapted(group, x.flatten(end_dim=-2), state)
            ready = {
                i: (x, output.view(*x.shape[:-1], -1))
                for i, output in zip(self._modules_in[group], outputs, strict=True)
            }
            _, y = ready.pop(number)
            state.ready |= ready
        return y

    # -- the equations ---------------------------------------------------------------------------

    def _from_user(
        self, part: ViewSlice, biases: Sequence[Tensor]
    ) -> Sequence[tuple[Tensor, Tensor]]:
        """Compute `Routing.from_user` of one slice: Eq. 4 for g^u, and the u-half of R1^f [u; x].

        biases: b1 of the routers of x (context, interaction), [J, 2 W] of each view.
        """
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
        """Compute (W_j + alpha/r dW_j) x + b, Eq. 3, for every matrix j of a group.

        x: [N, d_in], a whole packed batch. Returns [N, rows of the module] of each module, in the
        dtype of x.
        """
        members, modules = self.groups[group], self._modules_in[group]
        frozen = [Part.whole(self._modules_of[number]) for number in modules]
        sizes = [part.stop - part.start for part in routing.slices]
        views = self._joined(group, x.dtype)
        of_slice = [views[part.view] for part in routing.slices]
        stacks = [joined.stack for joined in of_slice]
        results = _Products.apply(x, frozen, sizes, *stacks)  # type: ignore[no-untyped-call]
        ys, products = dict(zip(modules, results, strict=False)), results[len(modules) :]
        low = [
            self._gated(group, joined, product, k, routing)
            for k, (joined, product) in enumerate(zip(of_slice, products, strict=True))
        ]
        for m, j in enumerate(members):
            factors: list[Tensor] = []
            for of_view, joined in zip(low, of_slice, strict=True):
                factors += (of_view[m], joined.b[m])
            number = self._module_of[j]
            y, part = ys[number], self._parts[j]
            ys[number] = _AddLowRank.apply(y, part, sizes, *factors)  # type: ignore[no-untyped-call]
        return list(ys.values())

    def _joined(self, group: int, dtype: torch.dtype) -> list[_Joined]:
        """Join the parameters of a group, for each view."""
        if self._kept is None:
            return self._join(group, dtype)
        if (group, dtype) not in self._kept:
            self._kept[group, dtype] = self._join(group, dtype)
        return self._kept[group, dtype]

    def _join(self, group: int, dtype: torch.dtype) -> list[_Joined]:
        mixtures: list[_Mixture] = [self.mixtures[j] for j in self.groups[group]]  # type: ignore[misc]
        joined = []
        for views in zip(*(mixture.views() for mixture in mixtures), strict=True):
            pairs = list(zip(mixtures, views, strict=True))
            a = [matrix for mixture, v in pairs for matrix in (mixture.shared_a, v.a)]
            joined.append(
                _Joined(
                    torch.cat([*a, *(v.router_x for v in views)]).to(dtype),
                    [torch.cat((mixture.shared_b, v.b)).to(dtype) for mixture, v in pairs],
                    torch.stack([v.router_x_bias for v in views]),
                    torch.cat([v.out for v in views]),
                    torch.cat([v.out_bias for v in views]),
                )
            )
        return joined

    def _gated(
        self, group: int, joined: _Joined, product: Tensor, k: int, routing: Routing
    ) -> Sequence[Tensor]:
        """Compute alpha/r g_i A_i x of slice k, Eq. 5: [n, (S + E) R] for every matrix of a group.

        joined: of the slice's view. product: [n, G ((S + E) R + 2 W)], its stack times x.
        """
        matrices, routers = len(joined.b), joined.bias.numel()
        low, hidden = product.split((product.shape[1] - routers, routers), dim=-1)
        scores = self._fused_scores(group, joined, hidden.unflatten(-1, (matrices, -1)), k, routing)
        chosen = top_n(scores, self.top)
        if routing.chosen is not None:
            routing.chosen[k].append((self.groups[group], scores, chosen))
        gates = scores * chosen
        if self.gate_norm:
            gates = gates / gates.sum(-1, keepdim=True)
        gates = F.pad(gates, (self.shared_experts, 0), value=1.0) * self.scaling
        gates = gates.transpose(0, 1).to(product.dtype).repeat_interleave(self.rank, dim=-1)
        gated: Tensor = low.unflatten(-1, (matrices, -1)) * gates
        return gated.unbind(1)

    def _fused_scores(
        self, group: int, joined: _Joined, hidden: Tensor, k: int, routing: Routing
    ) -> Tensor:
        """Compute g_hat of slice k, Eq. 4 and the first line of Eq. 5: [G, n, E] float32.

        hidden: [n, G, 2 W], R1 x of context and interaction ([n, G, W] of context alone, where the
        router does not know the user), without bias, in the dtype of x.
        """
        if not self.personalized:
            hidden = hidden + joined.bias
            return _gates(hidden.flatten(1), joined.out, joined.out_bias).transpose(1, 2)
        of_hidden, of_user = routing.from_user[k][group]
        user = routing.slices[k].user
        of_user_hidden = of_hidden.index_select(0, user)
        if self._watched is not None:
            part = routing.slices[k]
            self._watched.append(
                Signal(
                    part.view,
                    group,
                    part.tokens,
                    _spread(of_user_hidden[: part.tokens, :, self.width :]),
                    _spread(hidden[: part.tokens, :, self.width :]),
                )
            )
        hidden = hidden + of_user_hidden
        gates = _gates(hidden.flatten(1), joined.out, joined.out_bias)
        g_context, g_interaction = gates.unflatten(0, (-1, 2)).transpose(2, 3).unbind(1)
        g_user = of_user.index_select(0, user).transpose(0, 1)
        fused: Tensor = g_context + (g_user + g_interaction) * g_context
        return fused
