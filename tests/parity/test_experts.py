"""The fast mixture against Eq. 3-6 written out, and adapted backbones against the bare one."""

from __future__ import annotations

import pytest
import torch
from tests.support import reference
from tests.support.mixtures import RANK, WIDTH, matrix_of
from tests.support.tiny import random_backbone
from torch import Tensor, nn

from l2rec.errors import BackboneError, ConfigError
from l2rec.modules.adapters import ACTIVE, find_linears, side_by_side
from l2rec.modules.experts import (
    DPMoE,
    Routers,
    Routing,
    ViewSlice,
    load_balance,
    plain_update,
    top_n,
    user_share,
)
from l2rec.modules.lora import LoRA
from l2rec.modules.packing import Attend, Packing, pack

DIM = 5
SHAPES = [(DIM, DIM), (4, 6)]  # of the adapted matrices: d_in, d_out


def mixture_of(
    seed: int, shared: int, experts: int, top: int, personalized: bool, norm: bool = False
) -> DPMoE:
    """Build a float64 mixture and draw every parameter: none is at its neutral start."""
    torch.manual_seed(seed)
    linears = {f"m{j}": nn.Linear(i, o) for j, (i, o) in enumerate(SHAPES)}
    moe = DPMoE(
        linears,
        DIM,
        shared_experts=shared,
        view_experts=experts,
        rank=RANK,
        alpha=3.0,
        top=top,
        width=WIDTH,
        personalized=personalized,
        gate_norm=norm,
    ).double()
    for parameter in moe.parameters():
        nn.init.normal_(parameter, std=0.7)
    return moe


def routers_of(matrix: reference.Matrix) -> Routers:
    """Name the routers of one matrix as `plain_update` does."""
    named = {"c": matrix.context, "u": matrix.user, "f": matrix.interaction}
    return {m: (r.r1, r.b1, r.r2, r.b2) for m, r in named.items() if r is not None}


def update(moe: DPMoE, j: int, x: Tensor, routing: Routing) -> Tensor:
    """Return alpha/r dW_j x alone."""
    linear = moe._parts[j].module.to(x.dtype)
    [adapted] = moe.adapted(j, x, routing)  # every matrix is a group of its own
    return adapted - linear(x)


def packed(running: bool) -> tuple[list[ViewSlice], list[Tensor], int]:
    """Pack two views of three ragged users: u per row, or per token (a running prefix)."""
    slices, us, start = [], [], 0
    for view, lengths in enumerate(([3, 1, 2], [1, 2, 1])):
        total = sum(lengths)
        rows = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
        user = torch.arange(total) if running else rows
        u = torch.randn(total if running else 3, DIM, dtype=torch.float64, requires_grad=True)
        slices.append(ViewSlice(view, start, start + total, u, user))
        us.append(u)
        start += total
    return slices, us, start


@pytest.mark.parametrize("running", [False, True], ids=["row", "running"])
@pytest.mark.parametrize(
    ("seed", "shared", "experts", "top", "personalized"),
    [
        (0, 1, 4, 2, True),
        (1, 1, 4, 2, False),
        (2, 0, 3, 1, True),
        (3, 2, 3, 3, True),
        (4, 2, 1, 1, True),
        (5, 0, 4, 3, False),
        (6, 1, 4, 1, True),
        (7, 1, 4, 4, True),
    ],
)
def test_update_is_eq_3_to_5(
    seed: int, shared: int, experts: int, top: int, personalized: bool, running: bool
) -> None:
    moe = mixture_of(seed, shared, experts, top, personalized)
    slices, us, n = packed(running)
    for j, (d_in, d_out) in enumerate(SHAPES):
        x = torch.randn(n, d_in, dtype=torch.float64, requires_grad=True)
        weight = torch.randn(n, d_out, dtype=torch.float64)
        with moe.routed(slices) as routing:
            ours = update(moe, j, x, routing)

        plain, theirs, balances = [], [], []
        for part in slices:
            matrix = matrix_of(moe, j, part.view)
            scores, marked = [], []
            for t in range(part.start, part.stop):
                u = part.u[part.user[t - part.start]]
                theirs.append(reference.update(matrix, u, x[t], top, 3.0 / RANK))
                experts, routers = (matrix.shared, matrix.experts), routers_of(matrix)
                plain.append(plain_update(x[t], u, *experts, routers, top, 3.0 / RANK))
                scores.append(reference.fused_gates(matrix, u, x[t]))
                marked.append(reference.chosen(scores[-1], top))
            balances.append(reference.load_balance(scores, marked))
            load = torch.tensor(marked, dtype=torch.float64).mean(0) / top
            torch.testing.assert_close(routing.load[part.view][0], load)
        torch.testing.assert_close(ours, torch.stack(theirs), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(ours, torch.stack(plain), rtol=1e-10, atol=1e-12)
        for part, balance in zip(slices, balances, strict=True):
            torch.testing.assert_close(routing.balance[part.view][0], balance, rtol=1e-10, atol=0)

        leaves = [*moe.parameters(), x, *(us if personalized else [])]
        ours_total = (ours * weight).sum() + routing.balance[0][0] + routing.balance[1][0]
        their_total = (torch.stack(theirs) * weight).sum() + sum(balances)
        grads = torch.autograd.grad(ours_total, leaves, allow_unused=True)
        expected = torch.autograd.grad(their_total, leaves, allow_unused=True)
        for mine, other in zip(grads, expected, strict=True):
            zero = torch.zeros(())
            torch.testing.assert_close(
                zero if mine is None else mine,
                (zero if mine is None else torch.zeros_like(mine)) if other is None else other,
                rtol=1e-9,
                atol=1e-11,
            )


def test_gates_that_add_up_to_one() -> None:
    moe = mixture_of(0, 1, 4, 2, True, norm=True)
    slices, _, n = packed(False)
    for j, (d_in, _) in enumerate(SHAPES):
        x = torch.randn(n, d_in, dtype=torch.float64)
        with moe.routed(slices) as routing:
            ours = update(moe, j, x, routing)
        theirs = [
            reference.update(
                matrix_of(moe, j, part.view), part.u[user], x[t], 2, 3.0 / RANK, norm=True
            )
            for part in slices
            for t, user in enumerate(part.user.tolist(), start=part.start)
        ]
        torch.testing.assert_close(ours, torch.stack(theirs), rtol=1e-10, atol=1e-12)


def test_the_user_s_share_of_what_a_router_decides_by() -> None:
    """sd(u-half) / (sd(u-half) + sd(x-half)) of the interaction router's hidden layer, by hand."""
    moe = mixture_of(0, 1, 4, 2, True)
    slices, us, n = packed(False)
    inputs = [torch.randn(n, d_in, dtype=torch.float64) for d_in, _ in SHAPES]
    with moe.watched() as signals, moe.routed(slices) as routing:
        for j, x in enumerate(inputs):
            update(moe, j, x, routing)
    for part, u in zip(slices, us, strict=True):
        shares = user_share([s for s in signals if s.view == part.view])
        for j, x in enumerate(inputs):
            router = matrix_of(moe, j, part.view).interaction
            assert router is not None
            of_user = torch.stack([router.r1[:, :DIM] @ u[k] for k in part.user])
            of_x = x[part.start : part.stop] @ router.r1[:, DIM:].T
            sd = [h.detach().var(0, correction=0).mean().sqrt() for h in (of_user, of_x)]
            assert shares[j] == pytest.approx(float(sd[0] / sum(sd)), rel=1e-5)
    with moe.routed(slices) as routing:
        update(moe, 0, inputs[0], routing)
    assert len(signals) == len(SHAPES) * len(slices), "nothing is collected outside the context"


def test_the_load_of_a_block_that_runs_several_times_is_that_of_all_its_runs() -> None:
    """As ALBERT's only block does; the balance has a term for each run, as training always had."""
    moe = mixture_of(3, 1, 4, 2, True)
    slices, _, n = packed(False)
    first, other, again = (torch.randn(n, SHAPES[j][0]).double() for j in (0, 1, 0))
    apart = []
    for j, x in ((0, first), (1, other), (0, again)):
        with moe.routed(slices) as routing:
            update(moe, j, x, routing)
        apart.append(routing)
    with moe.routed(slices) as whole:
        for j, x in ((1, other), (0, first), (0, again)):
            update(moe, j, x, whole)
    for part in slices:
        one, two, three = (routing.load[part.view][0] for routing in apart)
        expected = torch.stack([(one + three) / 2, two])  # in the order of names
        torch.testing.assert_close(whole.load[part.view], expected)
        terms = [apart[run].balance[part.view] for run in (1, 0, 2)]
        torch.testing.assert_close(whole.balance[part.view], torch.cat(terms))


def test_every_parameter_is_trained() -> None:
    moe = mixture_of(0, 1, 4, 2, True)
    slices, _, n = packed(False)
    total = torch.zeros((), dtype=torch.float64)
    with moe.routed(slices) as routing:
        for j, (d_in, _) in enumerate(SHAPES):
            total = total + update(moe, j, torch.randn(n, d_in).double(), routing).square().sum()
    total.backward()
    for name, parameter in moe.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.any()), name


def test_views_do_not_share_their_own_experts() -> None:
    moe = mixture_of(0, 1, 4, 2, True)
    slices, _, n = packed(False)
    x = torch.randn(n, DIM, dtype=torch.float64)
    with moe.routed(slices) as routing:
        before = update(moe, 0, x, routing)
    with torch.no_grad():
        for parameter in (moe.mixtures[0].a, moe.mixtures[0].b, moe.router_u, moe.user_out):
            parameter[1] += 1
    with moe.routed(slices) as routing:
        after = update(moe, 0, x, routing)
    semantic, behavioral = slices
    torch.testing.assert_close(before[: semantic.stop], after[: semantic.stop], rtol=0, atol=0)
    assert not torch.allclose(before[behavioral.start :], after[behavioral.start :])


def test_without_the_personal_router_the_user_changes_nothing() -> None:
    for personalized in (True, False):
        moe = mixture_of(0, 1, 4, 2, personalized)
        slices, _, n = packed(False)
        x = torch.randn(n, DIM, dtype=torch.float64)
        others = [ViewSlice(s.view, s.start, s.stop, s.u.detach() + 3, s.user) for s in slices]
        results = []
        for chosen in (slices, others):
            with moe.routed(chosen) as routing:
                results.append(update(moe, 0, x, routing))
        assert torch.equal(*results) is not personalized


@pytest.mark.parametrize("n", [1, 2, 4])
def test_top_n_marks_exactly_n_of_ties(n: int) -> None:
    scores = torch.tensor([[0.25] * 4, [0.0] * 4, [0.4, 0.3, 0.3, 0.0], [0.3, 0.3, 0.3, 0.1]])
    largest = top_n(scores, n)
    assert largest.dtype == torch.bool
    assert largest.sum(-1).tolist() == [n] * 4
    assert largest[2, 0]
    assert bool((scores[largest].view(4, n).amin(-1) >= scores.topk(n).values.amin(-1)).all())


def test_load_balance_is_one_when_even_and_e_when_collapsed() -> None:
    even = torch.eye(4).repeat(3, 1) * 0.4 + 0.15
    term, load = load_balance(even, top_n(even, 1))
    torch.testing.assert_close(term, torch.tensor(1.0))
    torch.testing.assert_close(load, torch.full((4,), 0.25))
    collapsed = torch.tensor([[1.0, 0, 0, 0]]).repeat(6, 1)
    term, load = load_balance(collapsed, top_n(collapsed, 1))
    torch.testing.assert_close(term, torch.tensor(4.0))
    assert load.tolist() == [1, 0, 0, 0]


def test_new_routers_are_even_and_new_experts_silent() -> None:
    torch.manual_seed(0)
    moe = DPMoE({"m": nn.Linear(DIM, DIM)}, DIM, view_experts=4, top=2)
    slices, _, n = packed(False)
    slices = [ViewSlice(s.view, s.start, s.stop, s.u.float(), s.user) for s in slices]
    with moe.routed(slices) as routing:
        silent = update(moe, 0, torch.randn(n, DIM), routing)
        hidden = torch.zeros(slices[0].stop, 1, 2 * moe.width)
        scores = moe._fused_scores(0, moe._join(0, torch.float32)[0], hidden, 0, routing)
    assert not silent.any()
    # g^c = g^u = g^f = 1/E
    torch.testing.assert_close(
        scores, torch.full_like(scores, 0.25 + 2 * 0.0625), rtol=0.05, atol=0
    )


# ------------------------------------------------------------------------------- the backbone


@pytest.mark.parametrize("family", ["bert", "roberta", "qwen3", "llama"])
def test_untrained_mixture_leaves_the_backbone_exactly_as_it_is(family: str) -> None:
    backbone = random_backbone(family)
    linears = find_linears(backbone.model, ("q", "k", "v", "o"))
    assert len(linears) == 2 * 4
    moe = DPMoE(linears, backbone.dim, rank=2, width=4, view_experts=4)
    moe.attach()
    lengths = torch.tensor([5, 2, 4])
    group, positions = pack(lengths, Attend.CAUSAL if backbone.causal else Attend.FULL)
    packing = Packing((group,), positions)
    x = backbone.embed(torch.randint(6, 40, (11,)))
    rows = torch.repeat_interleave(torch.arange(3), lengths)
    slices = [ViewSlice(0, 0, 11, torch.randn(3, backbone.dim), rows)]

    bare = backbone(x, packing)
    with moe.routed(slices) as routing:
        assert torch.equal(backbone(x, packing), bare)
    assert len(routing.balance[0]) == len(linears)
    for mixture in moe.mixtures:
        nn.init.normal_(mixture.b)
    with moe.routed(slices):
        assert not torch.allclose(backbone(x, packing), bare)
    assert torch.equal(backbone(x, packing), bare), "outside routed() nothing is adapted"

    moe.detach()
    with moe.routed(slices) as routing:
        assert torch.equal(backbone(x, packing), bare)
    assert not routing.balance
    assert all(linear.forward.__func__ is nn.Linear.forward for linear in linears.values())
    moe.attach()
    moe.attach()
    with moe.routed(slices) as routing:
        backbone(x, packing)
    assert len(routing.balance[0]) == len(linears), "attached once, however often it is asked"


def test_without_gradients_the_update_is_added_in_place_and_the_same() -> None:
    """Compare with the output that has gradients; two views are two slices of it."""
    backbone = random_backbone().double()
    moe = DPMoE(find_linears(backbone.model, ("q", "v")), backbone.dim, rank=2, view_experts=4)
    moe.double().attach()
    for mixture in moe.mixtures:
        nn.init.normal_(mixture.b)
        nn.init.normal_(mixture.shared_b)
    a, first = pack(torch.tensor([5, 2]), Attend.FULL)
    b, second = pack(torch.tensor([4]), Attend.FULL, start=7)
    packing = Packing((a, b), torch.cat((first, second)))
    x = backbone.embed(torch.randint(6, 40, (11,)))
    rows = (torch.tensor([0] * 5 + [1] * 2), torch.zeros(4, dtype=torch.long))
    slices = [
        ViewSlice(view, start, start + len(row), torch.randn(2, backbone.dim).double(), row)
        for view, (start, row) in enumerate(zip((0, 7), rows, strict=True))
    ]
    with moe.routed(slices):
        expected = backbone(x, packing)
    for without in (torch.no_grad, torch.inference_mode):
        with without(), moe.routed(slices):
            torch.testing.assert_close(backbone(x, packing), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", ["bert", "roberta", "qwen3", "llama"])
def test_matrices_that_read_the_same_are_a_group(family: str) -> None:
    """Group also where keys and values are narrower than queries; o and down stand alone."""
    gated = family in ("qwen3", "llama")
    parts = ["q", "k", "v", "o", "up", *(["gate", "down"] * gated)]
    linears = find_linears(random_backbone(family).model, parts)
    groups = [[list(linears)[j] for j in group] for group in side_by_side(linears)]
    sizes = [3, 1, 2, 1] if gated else [3, 1, 1]
    assert [len(group) for group in groups] == sizes * 2
    assert len({name for group in groups for name in group}) == len(linears)
    assert all(len({linears[n].in_features for n in group}) == 1 for group in groups)


@pytest.mark.parametrize("personalized", [True, False])
@pytest.mark.parametrize("family", ["bert", "qwen3"])
def test_a_group_is_its_matrices_one_by_one(family: str, personalized: bool) -> None:
    """Compare outputs, balance, load and all gradients of a whole backbone; two views, float64."""
    torch.manual_seed(0)
    backbone = random_backbone(family).double()
    parts = ("q", "k", "v", "o", "up", *(["gate", "down"] * backbone.causal))
    linears = find_linears(backbone.model, parts)
    unnamed = {f"m{j}": linear for j, linear in enumerate(linears.values())}  # no neighbours
    grouped, alone = (
        DPMoE(
            named,
            backbone.dim,
            view_experts=4,
            rank=2,
            width=3,
            personalized=personalized,
        ).double()
        for named in (linears, unnamed)
    )
    assert max(map(len, grouped.groups)) == 3 and max(map(len, alone.groups)) == 1
    for parameter in grouped.parameters():
        nn.init.normal_(parameter, std=0.3)
    alone.load_state_dict(grouped.state_dict())
    attend = Attend.CAUSAL if backbone.causal else Attend.FULL
    a, first = pack(torch.tensor([5, 2]), attend)
    b, second = pack(torch.tensor([4]), attend, start=7)
    packing = Packing((a, b), torch.cat((first, second)))
    x = backbone.embed(torch.randint(6, 40, (11,))).requires_grad_()
    rows = (torch.tensor([0] * 5 + [1] * 2), torch.zeros(4, dtype=torch.long))
    u = torch.randn(2, backbone.dim, dtype=torch.float64, requires_grad=personalized)
    slices = [ViewSlice(0, 0, 7, u, rows[0]), ViewSlice(1, 7, 11, u, rows[1])]
    weight = torch.randn(11, backbone.dim, dtype=torch.float64)

    def passed(moe: DPMoE) -> list[Tensor]:
        leaves = [*moe.parameters(), x, *([u] if personalized else [])]
        moe.attach()
        with moe.routed(slices) as routing:
            y = backbone(x, packing)
        moe.detach()
        assert not routing.ready
        balance = torch.cat(list(routing.balance.values()))
        grads = torch.autograd.grad((y * weight).sum() + balance.sum(), leaves)
        return [y, balance, *routing.load.values(), *grads]

    for got, expected in zip(passed(grouped), passed(alone), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


def test_a_neighbour_that_reads_something_else_is_computed_anew() -> None:
    torch.manual_seed(0)
    block = nn.ModuleDict({"q": nn.Linear(DIM, DIM), "k": nn.Linear(DIM, DIM)})
    moe = DPMoE(find_linears(block, ("q", "k")), DIM, view_experts=4)
    moe.attach()
    for mixture in moe.mixtures:
        nn.init.normal_(mixture.b)
    part = [ViewSlice(0, 0, 3, torch.randn(1, DIM), torch.zeros(3, dtype=torch.long))]
    x, other = torch.randn(1, 3, DIM), torch.randn(1, 3, DIM)
    with moe.routed(part):
        expected = [block["q"](x), block["k"](x), block["q"](other), block["k"](other)]
    with moe.routed(part):
        got = [block["q"](x), block["k"](other), block["q"](other), block["k"](x)]
    for one, place in zip(got, (0, 3, 2, 1), strict=True):
        assert torch.equal(one, expected[place])


def test_two_mixtures_on_one_backbone_do_not_meet() -> None:
    backbone = random_backbone()
    first, second = (DPMoE(find_linears(backbone.model, ("q",)), backbone.dim) for _ in range(2))
    for moe in (first, second):
        moe.attach()
        for mixture in moe.mixtures:
            nn.init.normal_(mixture.b)
    group, positions = pack(torch.tensor([3]), Attend.FULL)
    x, packing = torch.randn(3, backbone.dim), Packing((group,), positions)
    part = [ViewSlice(0, 0, 3, torch.randn(1, backbone.dim), torch.zeros(3, dtype=torch.long))]
    with first.routed(part):
        together = backbone(x, packing)
    second.detach()
    with first.routed(part):
        assert torch.equal(backbone(x, packing), together)


def test_an_error_inside_leaves_no_routing_behind() -> None:
    backbone = random_backbone()
    moe = DPMoE(find_linears(backbone.model, ("q",)), backbone.dim)
    moe.attach()
    part = [ViewSlice(0, 0, 1, torch.zeros(1, backbone.dim), torch.zeros(1, dtype=torch.long))]
    with pytest.raises(ZeroDivisionError), moe.routed(part):
        raise ZeroDivisionError
    assert moe not in ACTIVE.get()


def test_adapters_of_both_kinds_stack_and_detach_in_the_opposite_order() -> None:
    torch.manual_seed(0)
    block = nn.ModuleDict({"q": nn.Linear(DIM, DIM), "k": nn.Linear(DIM, DIM)})
    x = torch.randn(1, 3, DIM)
    bare, lora = block["q"](x), LoRA(find_linears(block, ("q", "k")), rank=2)
    moe = DPMoE(find_linears(block, ("q",)), DIM, view_experts=4)
    for b in (*lora.b, moe.mixtures[0].b):
        nn.init.normal_(b)
    moe.attach()
    lora.attach()
    part = [ViewSlice(0, 0, 3, torch.randn(1, DIM), torch.zeros(3, dtype=torch.long))]
    assert torch.equal(block["q"](x), bare)
    with lora.enabled():
        low = block["q"](x)
    with moe.routed(part):
        mixed = block["q"](x)
        with lora.enabled(), moe.routed(part):
            both = block["q"](x)
        assert torch.equal(block["q"](x), mixed), "an inner context switches nothing off"
    assert not torch.allclose(low, bare) and not torch.allclose(mixed, bare)
    torch.testing.assert_close(both - bare, (low - bare) + (mixed - bare))
    with pytest.raises(AssertionError, match="detach in the opposite order of attach"):
        moe.detach()
    lora.detach()
    moe.detach()
    with lora.enabled(), moe.routed(part):
        assert torch.equal(block["q"](x), bare)
    assert all(linear.forward.__func__ is nn.Linear.forward for linear in block.values())
    assert {name.split(".")[0] for name in lora.state_dict()} == {"a", "b"}


def test_find_linears() -> None:
    bert, qwen = random_backbone("bert").model, random_backbone("qwen3").model
    assert [n.rsplit(".", 1)[1] for n in find_linears(qwen, ("v", "q"))] == ["q_proj", "v_proj"] * 2
    parts = ("q", "k", "v", "o", "gate", "up", "down")
    assert len(find_linears(qwen, parts)) == 2 * 7
    assert all("attention" in name for name in find_linears(bert, ("o",)))
    with pytest.raises(ConfigError, match="unknown 'w'; choose from q, k, v, o"):
        find_linears(bert, ("w",))
    with pytest.raises(
        BackboneError, match=r"\(bert\) has no .gate. matrix, but q k v o up down; change"
    ):
        find_linears(bert, ("gate",))


@pytest.mark.parametrize("top", [0, 5])
def test_top_n_outside_the_experts_is_refused(top: int) -> None:
    with pytest.raises(ConfigError, match=f"top_n={top} must lie between 1 and view_experts=4"):
        DPMoE({"m": nn.Linear(2, 2)}, 2, view_experts=4, top=top)
