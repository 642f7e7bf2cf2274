"""Eq. 7-9 against loops over users and candidates, in float64."""

from __future__ import annotations

import pytest
import torch
from tests.support import reference
from torch import Tensor, nn

from l2rec.modules import objectives
from l2rec.modules.fusion import AdaptiveFusion
from l2rec.modules.objectives import (
    Cells,
    bpc_loss,
    catalog_loss,
    contrastive_loss,
    cosine,
    fused_catalog_loss,
)

B, D = 5, 4


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def same_gradients(ours: Tensor, theirs: Tensor, leaves: list[Tensor], rtol: float = 1e-9) -> None:
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol)
    grads = torch.autograd.grad(ours, leaves)
    expected = torch.autograd.grad(theirs, leaves)
    for mine, other in zip(grads, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=rtol, atol=rtol)


# ------------------------------------------------------------------------------- Eq. 7


@pytest.mark.parametrize("gate", ["vector", "scalar"])
def test_fusion_is_eq_7(gate: str) -> None:
    torch.manual_seed(0)
    fusion = AdaptiveFusion(D, gate).double()
    for parameter in fusion.parameters():
        nn.init.normal_(parameter)
    behavioral, semantic = draw(B, D), draw(B, D)
    b = fusion.residual("behavioral", behavioral)
    s = fusion.residual("semantic", semantic)
    fused, delta = fusion.fuse(b, s)
    assert delta.shape == (B, D if gate == "vector" else 1)
    maps = [
        (m.weight, m.bias)
        for m in (fusion.project_behavioral, fusion.project_semantic, fusion.gate)
    ]
    rows = [reference.fuse(x, y, *maps) for x, y in zip(behavioral, semantic, strict=True)]
    for mine, k in ((b, 0), (s, 1), (fused, 2), (delta, 3)):
        torch.testing.assert_close(mine, torch.stack([row[k] for row in rows]), rtol=0, atol=1e-12)
    weight = torch.randn(B, D, dtype=torch.float64)
    theirs = (torch.stack([row[2] for row in rows]) * weight).sum()
    leaves = [behavioral, semantic, *fusion.parameters()]
    same_gradients((fused * weight).sum(), theirs, leaves)


def test_untrained_fusion_is_the_mean_of_the_views() -> None:
    fusion = AdaptiveFusion(D).double()
    behavioral, semantic = draw(B, D), draw(B, D)
    b = fusion.residual("behavioral", behavioral)
    s = fusion.residual("semantic", semantic)
    fused, delta = fusion.fuse(b, s)
    assert torch.equal(b, behavioral) and torch.equal(s, semantic)
    assert torch.equal(delta, torch.full_like(delta, 0.5))
    torch.testing.assert_close(fused, (behavioral + semantic) / 2)


# ------------------------------------------------------------------------------- Eq. 8


def test_cosine() -> None:
    users, items = draw(B, D), draw(3, D)
    expected = torch.stack(
        [torch.stack([reference.similarity(u, i) for i in items]) for u in users]
    )
    ours = cosine(users, items)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_contrastive_loss_is_eq_8(seed: int) -> None:
    torch.manual_seed(seed)
    n = 7
    scores = draw(B, n)
    positive = torch.tensor([0, 3, 3, 6, 1])  # two users share a positive
    allowed = torch.rand(B, n) < 0.5
    # The caller may mark the positive as a negative, or not.
    allowed[torch.arange(B), positive] = torch.tensor([True, True, False, False, True])
    negatives = [[i for i in range(n) if allowed[u, i] and i != positive[u]] for u in range(B)]
    before = allowed.clone()
    ours = contrastive_loss(scores, positive, allowed)
    assert torch.equal(allowed, before), "the caller's mask is not changed"
    same_gradients(
        ours, reference.recommendation_loss(scores, positive.tolist(), negatives), [scores]
    )


def test_the_loss_without_negatives_is_zero() -> None:
    scores = draw(2, 3)
    loss = contrastive_loss(scores, torch.tensor([0, 1]), torch.zeros(2, 3, dtype=torch.bool))
    assert float(loss.detach()) == 0
    assert not torch.autograd.grad(loss, scores)[0].any()


def test_catalog_loss_is_eq_8_with_every_other_item() -> None:
    scores, positive = draw(B, 6), [5, 0, 0, 2, 3]
    negatives = [[i for i in range(6) if i != p] for p in positive]
    same_gradients(
        catalog_loss(scores, torch.tensor(positive)),
        reference.recommendation_loss(scores, positive, negatives),
        [scores],
    )


@pytest.mark.parametrize("block", [1, 13, 1 << 22])
@pytest.mark.parametrize("cells", [None, [], [(0, 1), (0, 4), (3, 3), (4, 5)]])
def test_the_fused_catalog_loss_is_that_of_the_product(
    block: int, cells: list[tuple[int, int]] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compare value and gradients in float64, at any block size; cells may be left out."""
    monkeypatch.setattr(objectives, "FUSED_SCORES", block)
    monkeypatch.setattr(objectives, "FUSED_ROWS", 1)
    users, items, positive = draw(B, D), draw(6, D), [5, 0, 0, 2, 0]
    negatives = [
        [i for i in range(6) if i != p and (row, i) not in (cells or ())]
        for row, p in enumerate(positive)
    ]
    without = None
    if cells is not None:
        rows, columns = torch.tensor(cells, dtype=torch.int64).reshape(-1, 2).unbind(1)
        without = Cells(rows, columns)
    ours = fused_catalog_loss(
        users, items, torch.tensor(positive), without=without, dtype=torch.float64
    )
    theirs = reference.recommendation_loss(users @ items.T, positive, negatives)
    same_gradients(3 * ours, 3 * theirs, [users, items])


def test_the_fused_catalog_loss_in_bfloat16_is_close() -> None:
    """Round matrix products to bfloat16; softmax and sums stay float32."""
    torch.manual_seed(0)
    users, items = torch.randn(64, 32, requires_grad=True), torch.randn(500, 32)
    items = torch.nn.functional.normalize(items, dim=-1).requires_grad_()
    positive = torch.randint(500, (64,))
    exact = fused_catalog_loss(users, items, positive)
    rough = fused_catalog_loss(users, items, positive, dtype=torch.bfloat16)
    assert float(rough.detach()) == pytest.approx(float(exact.detach()), rel=1e-3)
    for mine, other in zip(
        torch.autograd.grad(rough, [users, items]),
        torch.autograd.grad(exact, [users, items]),
        strict=True,
    ):
        assert mine.dtype == torch.float32
        assert float((mine - other).norm() / other.norm()) < 0.01


# ------------------------------------------------------------------------------- Eq. 9


@pytest.mark.parametrize("users", [[0, 1, 2, 3, 4], [7, 7, 2, 7, 2], [1, 1, 1, 1, 1]])
def test_bpc_is_eq_9(users: list[int]) -> None:
    torch.manual_seed(0)
    behavioral, semantic = draw(B, D), draw(B, D)
    ours = bpc_loss(behavioral, semantic, torch.tensor(users), 0.5, 0.3)
    theirs = reference.preference_contrast(behavioral, semantic, users, 0.5, 0.3)
    # The library computes its losses in float32.
    same_gradients(ours.double(), theirs, [behavioral, semantic], rtol=2e-6)


def test_bpc_rewards_agreement_and_punishes_distance() -> None:
    torch.manual_seed(0)
    x, users = torch.randn(B, D), torch.arange(B)
    apart = bpc_loss(x, x[torch.tensor([1, 2, 3, 4, 0])], users, 0.1, 0.0)
    assert float(bpc_loss(x, x, users, 0.1, 0.0)) < float(apart)
    near, far = (float(bpc_loss(x, x * k, users, 0.1, 1.0)) for k in (1.0, 2.0))
    assert far - near == pytest.approx(float(x.square().sum(-1).mean()), rel=1e-4)


def test_a_temperature_that_is_learned_gets_a_gradient() -> None:
    tau = torch.tensor(0.5, requires_grad=True)
    bpc_loss(torch.randn(B, D), torch.randn(B, D), torch.arange(B), tau, 0.1).backward()
    assert tau.grad is not None and float(tau.grad) != 0
