"""Both stages against the equations written out in float64, one feature at a time."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from l2rec.data.ragged import Ragged
from l2rec.studies.downstream.dlrm import (
    DLRM,
    ITEM,
    PACE,
    DLRMConfig,
    Features,
    Tables,
    TwoTower,
    matching_loss,
    pairwise_dots,
)

SIZES = (11, 7, 5, 3)  # users, items, two attributes
SMALL = DLRMConfig(dim=4, bottom=(6,), top=(8, 5), tower=(9, 4), temperature=0.2)
Array = npt.NDArray[np.float64]


def features(
    rows: int, dense: int, tables: range, *, history: bool = True, seed: int = 0
) -> Features:
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.integers(SIZES[t], size=rows) for t in tables], axis=1)
    lengths = rng.integers(0, 4, size=rows)
    lengths[0] = 0  # nobody's history yet
    bags = Ragged.from_rows([rng.integers(SIZES[ITEM], size=n) for n in lengths])
    known = torch.from_numpy(rng.normal(size=(rows, dense)).astype(np.float32))
    if not history:
        return Features(known, torch.from_numpy(ids))
    values = torch.from_numpy(bags.values.astype(np.int64))
    return Features(known, torch.from_numpy(ids), values, torch.from_numpy(bags.offsets))


# -- the reference: no batches, no offsets, no library ---------------------------------------------


def array(tensor: Tensor) -> Array:
    return tensor.detach().numpy().astype(np.float64)


def reference_mlp(layers: nn.Sequential, x: Array) -> Array:
    for layer in layers:
        if isinstance(layer, nn.Linear):
            x = array(layer.weight) @ x + array(layer.bias)
        else:
            x = np.maximum(x, 0.0)
    return x


def reference_vectors(model: Any, side: Any, given: Features, row: int, first: int) -> list[Array]:
    """x_0, then the mean of the history, then one row for each categorical feature."""
    weight = array(model.tables.rows.weight)
    table = [weight[sum(SIZES[:n]) : sum(SIZES[: n + 1])] for n in range(len(SIZES))]
    vectors = [reference_mlp(side.bottom, array(given.dense[row]))]
    if given.history is not None and given.starts is not None:
        start, end = int(given.starts[row]), int(given.starts[row + 1])
        mean = np.zeros(weight.shape[1])
        for item in given.history[start:end].tolist():
            mean += table[ITEM][item] / (end - start)
        vectors.append(mean)
    for column, number in enumerate(given.ids[row].tolist()):
        vectors.append(table[first + column][number])
    return vectors


def reference_dots(vectors: list[Array]) -> list[float]:
    return [
        float(sum(a * b for a, b in zip(vectors[f], vectors[g], strict=True)))
        for f in range(len(vectors))
        for g in range(f + 1, len(vectors))
    ]


def reference_tower(model: TwoTower, given: Features, row: int, *, user: bool) -> Array:
    side, top = (model.user_side, model.user_top) if user else (model.item_side, model.item_top)
    vectors = reference_vectors(model, side, given, row, 0 if user else 1)
    out = reference_mlp(top, np.concatenate([*vectors, reference_dots(vectors)]))
    return out / np.sqrt((out**2).sum())


def softplus(x: float) -> float:
    return math.log1p(math.exp(-abs(x))) + max(x, 0.0)


def reference_bce(logits: Array, labels: Array) -> float:
    """Mean over rows of the sum over tasks."""
    rows = [
        softplus(x) - y * x
        for row, wanted in zip(logits, labels, strict=True)
        for x, y in zip(row, wanted, strict=True)
    ]
    return sum(rows) / len(logits)


def reference_softmax(scores: Array, ids: list[int], clicked: list[int], log_q: Array) -> float:
    """scores: [B, B], user by item."""
    losses = []
    for row in clicked:
        others = [j for j in range(len(ids)) if j == row or ids[j] != ids[row]]
        corrected = [scores[row, j] - log_q[j] for j in others]
        top = max(corrected)
        log_sum = top + math.log(sum(math.exp(c - top) for c in corrected))
        losses.append(log_sum - (scores[row, row] - log_q[row]))
    return sum(losses) / len(losses) if losses else 0.0


# -- equal to it -----------------------------------------------------------------------------------


def test_ranking_is_the_equations() -> None:
    torch.manual_seed(1)
    model = DLRM(SMALL, SIZES, dense=5)
    pairs = features(9, 5, range(4))
    labels = torch.from_numpy(np.random.default_rng(2).integers(2, size=(9, 2))).float()
    wanted = []
    for row in range(9):
        vectors = reference_vectors(model, model.side, pairs, row, 0)
        wanted.append(
            reference_mlp(model.top, np.concatenate([vectors[0], reference_dots(vectors)]))
        )
    np.testing.assert_allclose(array(model(pairs)), wanted, atol=2e-6)
    assert len(reference_dots(vectors)) == 15  # dense, history, user, item, two attributes
    found = model.loss(pairs, labels)
    assert float(found.total.detach()) == pytest.approx(
        reference_bce(np.array(wanted), array(labels)), abs=1e-6
    )
    assert sum(float(part) for part in found.parts.values()) == pytest.approx(
        float(found.total.detach())
    )


@pytest.mark.parametrize("frozen", [0, 3])
def test_matching_is_the_equations(frozen: int) -> None:
    torch.manual_seed(1)
    rng = np.random.default_rng(3)
    model = TwoTower(SMALL, SIZES, user_dense=5, item_dense=6, frozen=frozen)
    users, items = features(8, 5, range(1)), features(8, 6, range(1, 4), history=False, seed=4)
    a, b = (torch.from_numpy(rng.normal(size=(8, max(1, frozen))).astype(np.float32)) for _ in "ab")
    if frozen:
        assert model.weights is not None
        with torch.no_grad():
            model.weights.copy_(torch.tensor([0.3, -1.0, 2.0]))
    with torch.no_grad():
        model.beta.copy_(torch.tensor([-1.0, -3.0]))
    labels = torch.tensor([[1.0, 0], [0, 0], [1, 1], [0, 0], [0, 0], [1, 0], [0, 0], [0, 0]])
    log_q = torch.from_numpy(rng.normal(size=8).astype(np.float32))
    ids = torch.tensor([4, 1, 4, 4, 2, 3, 2, 0])
    p = [reference_tower(model, users, row, user=True) for row in range(8)]
    q = [reference_tower(model, items, row, user=False) for row in range(8)]
    inner = np.array([[float(x @ y) for y in q] for x in p])
    if frozen:
        assert model.weights is not None
        inner += (array(a) * PACE * array(model.weights)) @ array(b).T
    given = (a, b) if frozen else (None, None)
    left, right = model.users(users, given[0]), model.items(items, given[1])
    np.testing.assert_allclose(array(left @ right.T), inner, atol=2e-6)
    logits = np.diag(inner)[:, None] * array(model.alpha) + array(model.beta)
    wanted = reference_bce(logits, array(labels))
    wanted += reference_softmax(inner / 0.2, ids.tolist(), [0, 2, 5], array(log_q))
    found = model.loss(left, right, labels, ids, log_q)
    assert float(found.total.detach()) == pytest.approx(wanted, abs=1e-5)


def test_softmax_without_clicks_is_zero_and_has_gradients() -> None:
    users = torch.randn(3, 4, requires_grad=True)
    none = torch.zeros(3, dtype=torch.bool)
    loss = matching_loss(users[none] @ torch.randn(5, 4).T, none, torch.arange(3), torch.zeros(3))
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert users.grad is not None and not users.grad.any()


def test_frequent_items_are_corrected_for() -> None:
    """Drawn twice as often with the same scores: without log Q its share of the loss doubles."""
    scores = torch.zeros(1, 3)
    clicked = torch.tensor([True, False, False])
    log_q = torch.log(torch.tensor([0.5, 0.25, 0.25]))
    loss = matching_loss(scores, clicked, torch.arange(3), log_q)
    assert float(loss) == pytest.approx(math.log(2 + 4 + 4) - math.log(2))


# -- parts -----------------------------------------------------------------------------------------


def test_dots_by_hand() -> None:
    x = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]])
    assert pairwise_dots(x).tolist() == [[11.0, 17.0, 39.0]]


def test_a_row_belongs_to_its_table() -> None:
    tables = Tables((3, 2), 4)
    rows = tables(torch.tensor([[2, 1], [0, 0]]))
    weight = tables.rows.weight
    assert torch.equal(rows, weight[torch.tensor([[2, 4], [0, 3]])])
    assert torch.equal(tables(torch.tensor([[1]]), first=1), weight[None, 4:])
    bags = tables.mean(torch.tensor([1, 0, 1]), torch.tensor([0, 2, 2, 3]), table=1)
    wanted = torch.stack((weight[3:].mean(0), torch.zeros(4), weight[4]))
    torch.testing.assert_close(bags, wanted)
    bags.sum().backward()
    assert weight.grad is not None and not weight.grad[:3].any() and weight.grad[3:].all()


def test_tables_start_within_their_bounds() -> None:
    torch.manual_seed(0)
    weight = Tables((4, 400), 50).rows.weight.detach().abs()
    assert 0.45 < float(weight[:4].max()) <= 0.5 and 0.045 < float(weight[4:].max()) <= 0.05


def test_arms_begin_with_the_same_tables_and_towers() -> None:
    """Whatever the number of dense features, one seed gives one start of all that they share."""

    def start(*dense: int, frozen: int = 0) -> tuple[nn.Module, nn.Module]:
        torch.manual_seed(7)
        ranking = DLRM(SMALL, SIZES, dense[0])
        torch.manual_seed(7)
        return ranking, TwoTower(SMALL, SIZES, dense[1], dense[2], frozen)

    shared = ("tables", "top", "user_top", "item_top", "alpha", "beta")
    for a, b in zip(start(5, 4, 3), start(17, 8, 7, frozen=4), strict=True):
        theirs = b.state_dict()
        names = [name for name in a.state_dict() if name.startswith(shared)]
        assert names and all(torch.equal(a.state_dict()[n], theirs[n]) for n in names)


def test_average_rates_are_the_start() -> None:
    torch.manual_seed(0)
    odds = torch.tensor([-2.0, -5.0])
    ranking = DLRM(SMALL, SIZES, 5)
    before = ranking(features(4, 5, range(4)))
    last = ranking.top[-1].bias.detach().clone()
    ranking.start_at(odds)
    torch.testing.assert_close(ranking(features(4, 5, range(4))), before - last + odds)
    matching = TwoTower(SMALL, SIZES, 5, 6)
    matching.start_at(odds)
    assert torch.equal(matching.beta.detach(), odds)


def test_rows_do_not_depend_on_their_batch() -> None:
    torch.manual_seed(0)
    model = DLRM(SMALL, SIZES, 5).eval()
    pairs = features(6, 5, range(4))
    assert pairs.history is not None and pairs.starts is not None
    whole = model(pairs)
    for row in range(6):
        start, end = int(pairs.starts[row]), int(pairs.starts[row + 1])
        one = Features(
            pairs.dense[row : row + 1],
            pairs.ids[row : row + 1],
            pairs.history[start:end],
            torch.tensor([0, end - start]),
        )
        torch.testing.assert_close(model(one)[0], whole[row], atol=1e-6, rtol=1e-5)


def test_it_learns_who_likes_what() -> None:
    """Clicks are an exclusive or of two ids: no feature tells anything but with the other."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    users, items = rng.integers(10, size=4000), rng.integers(6, size=4000)
    labels = torch.from_numpy(((users + items) % 2)[:, None].repeat(2, axis=1)).float()
    ids = np.stack((users, items, np.zeros_like(users), np.zeros_like(users)), axis=1)
    empty = torch.zeros(0, dtype=torch.int64)
    model = DLRM(SMALL, SIZES, 1)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(4):
        for at in np.split(rng.permutation(4000), 40):
            starts = torch.zeros(len(at) + 1, dtype=torch.int64)
            batch = Features(torch.zeros(len(at), 1), torch.from_numpy(ids[at]), empty, starts)
            found = model.loss(batch, labels[at])
            optimizer.zero_grad()
            found.total.backward()
            optimizer.step()
    assert float(found.total.detach()) < 0.1  # 2 log 2 = 1.39 for one who knows nothing


def test_options_are_closed() -> None:
    with pytest.raises(ValidationError, match="nonsense"):
        DLRMConfig(nonsense=1)  # type: ignore[call-arg]
