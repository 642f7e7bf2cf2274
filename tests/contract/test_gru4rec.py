"""GRU4Rec: its equations and each of its losses written out."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tests.support import models, sequential
from tests.support.models import one_batch, shaken
from tests.support.sequential import HISTORIES, NAMELESS, double
from torch import Tensor

from l2rec.methods.gru4rec import GRU4Rec, ranking_loss

LOSSES: list[dict[str, Any]] = [
    {},
    {"layers": 2},
    {"loss": "bpr"},
    {"loss": "top1"},
    {"loss": "bpr-max", "penalty": 0.5},
]


def build(seed: int = 0, **changes: Any) -> GRU4Rec:
    options = {"dim": 16, "hidden": 24, "max_items": 8, "negatives": 12} | changes
    model: GRU4Rec = models.build(GRU4Rec, options, NAMELESS, seed=seed)
    return model


def written_out(model: GRU4Rec, row: list[int]) -> Tensor:
    """Compute u_t for every position of one row: [T, dim] float64."""
    x = [double(model.items.weight[i]) for i in row]
    for layer in range(model.config.layers):
        w_in, w_state = (double(getattr(model.gru, f"weight_{k}_l{layer}")) for k in ("ih", "hh"))
        h, states = torch.zeros(model.config.hidden, dtype=torch.float64), []
        for y in x:
            a, b = (w_in @ y).chunk(3), (w_state @ h).chunk(3)
            reset, update = torch.sigmoid(a[0] + b[0]), torch.sigmoid(a[1] + b[1])
            h = update * h + (1 - update) * torch.tanh(a[2] + reset * b[2])
            states.append(h)
        x = states
    return torch.stack([sequential.linear(model.out, h) for h in x])


@pytest.mark.parametrize("layers", [1, 2])
def test_the_equations(layers: int) -> None:
    model = shaken(build(layers=layers))
    with torch.no_grad():
        users, _ = model(HISTORIES.head(8))
        losses = model.loss(one_batch(model, HISTORIES))
    table = double(model.items.weight)
    for row in range(len(HISTORIES)):
        items = HISTORIES[row][:8].tolist()
        expected = written_out(model, items)
        torch.testing.assert_close(users[row, : len(items)].double(), expected, rtol=0, atol=1e-5)
    each = []
    for row in (HISTORIES[i].tolist() for i in range(len(HISTORIES))):
        # Eight targets in a row; what is older is another row, with its own context.
        first = max(0, len(row) - 1 - 8)
        for start, stop in ((0, first), (first, len(row) - 1)):
            inputs = row[max(0, stop - 8) : stop]
            for t in range(start, stop):
                users = written_out(model, inputs[: t - max(0, stop - 8) + 1])
                each.append(sequential.cross_entropy(table @ users[-1], row[t + 1]))
    assert float(losses.total) == pytest.approx(np.mean(each), rel=1e-5)


def test_ranking_losses() -> None:
    positive = torch.tensor([0.5, -1.0, 0.3], dtype=torch.float64)
    negative = torch.tensor([[0.2, 1.1], [1.5, 0.1], [0.3, 0.3]], dtype=torch.float64)
    counts = torch.tensor([[True, False], [True, True], [False, False]])
    kept = [(0.5, [0.2]), (-1.0, [1.5, 0.1])]
    s = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    bpr = [-mean([math.log(s(p - n)) for n in row]) for p, row in kept]
    top1 = [mean([s(n - p) + s(n * n) for n in row]) for p, row in kept]
    bpr_max = []
    for p, row in kept:
        weights = [math.exp(n) / sum(map(math.exp, row)) for n in row]
        beaten = sum(w * s(p - n) for w, n in zip(weights, row, strict=True))
        large = sum(w * n * n for w, n in zip(weights, row, strict=True))
        bpr_max.append(-math.log(beaten) + 0.7 * large)
    for kind, each in (("bpr", bpr), ("top1", top1), ("bpr-max", bpr_max)):
        found = ranking_loss(kind, positive, negative, counts, 0.7)  # type: ignore[arg-type]
        assert float(found) == pytest.approx(sum(each) / 3), kind


@pytest.mark.parametrize("changes", LOSSES, ids=str)
def test_every_loss_trains(changes: dict[str, Any]) -> None:
    sequential.check_loss_and_gradients(build(**changes))


@pytest.mark.parametrize("loss", ["ce", "bpr", "top1", "bpr-max"])
def test_it_learns_by_heart(loss: str) -> None:
    sequential.check_overfits(
        build(loss=loss, dropout=0.0, penalty=0.1, dim=32, hidden=64, negatives=64), epochs=100
    )


def test_a_negative_of_the_batch_is_never_one_s_own_target() -> None:
    """Check that a batch with one target gives no gradient."""
    for loss in ("bpr", "top1", "bpr-max"):
        model = build(loss=loss)
        batch = one_batch(model, HISTORIES.take(np.array([3])))
        model.loss(batch).total.backward()
        assert not any(bool(p.grad.any()) for p in model.parameters() if p.grad is not None), loss


def test_what_is_refused() -> None:
    with pytest.raises(ValidationError, match="'ce', 'bpr', 'top1' or 'bpr-max'"):
        build(loss="hinge")
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        build(negatives=0)
