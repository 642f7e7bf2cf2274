"""SASRec: its equations and each of its losses written out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tests.support import models, sequential
from tests.support.models import one_batch, shaken
from tests.support.sequential import HISTORIES, NAMELESS, N, double
from torch.nn import functional as F

from l2rec.methods.sasrec import SASRec


def build(seed: int = 0, **changes: Any) -> SASRec:
    options = {"dim": 16, "inner": 24, "max_items": 8} | changes
    model: SASRec = models.build(SASRec, options, NAMELESS, seed=seed)
    return model


def test_the_equations() -> None:
    model = shaken(build(heads=4))
    rows = HISTORIES.head(8)
    table = double(model.items.weight)
    with torch.no_grad():
        states, _ = model(rows)
    each = []
    for row in range(len(rows)):
        items = rows[row].tolist()
        expected = sequential.encoded(model.encoder, [table[i] for i in items], causal=True)
        torch.testing.assert_close(
            states[row, : len(items)].double(), torch.stack(expected), rtol=0, atol=1e-4
        )
        each += [
            sequential.cross_entropy(table @ expected[t], items[t + 1])
            for t in range(len(items) - 1)
        ]
    total = model.loss(one_batch(model, rows)).total.detach()
    assert float(total) == pytest.approx(np.mean(each), rel=1e-5)


@pytest.mark.parametrize("loss", ["bce", "sampled"])
def test_sampled_losses(loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that a position has separate negatives, none of which is its target."""
    model = shaken(build(loss=loss, negatives=3))
    batch = one_batch(model, HISTORIES.head(8))
    drawn = torch.randint(N, (len(batch.targets), 3), generator=torch.Generator().manual_seed(0))
    drawn[0, 1] = int(batch.targets[0])
    monkeypatch.setattr(torch, "randint", lambda *_, **__: drawn)
    with torch.no_grad():
        found = float(model.loss(batch).total)
        states, real = model(batch.histories)
        scores = (states[real] @ model.items.weight.T).double()
    each = []
    for p, target in enumerate(batch.targets.tolist()):
        others = [j for j in drawn[p].tolist() if j != target]
        if loss == "bce":
            terms = [F.logsigmoid(scores[p, target]), *(F.logsigmoid(-scores[p, others]))]
            each.append(-float(sum(terms)))
        else:
            each.append(sequential.cross_entropy(scores[p, [target, *others]], 0))
    assert found == pytest.approx(np.mean(each), rel=1e-5)


LOSSES: list[dict[str, Any]] = [
    {},
    {"loss": "bce", "negatives": 4},
    {"loss": "sampled", "negatives": 12},
]


@pytest.mark.parametrize("changes", LOSSES, ids=str)
def test_every_loss_trains(changes: dict[str, Any]) -> None:
    sequential.check_loss_and_gradients(build(**changes))


@pytest.mark.parametrize("changes", LOSSES, ids=str)
def test_it_learns_by_heart(changes: dict[str, Any]) -> None:
    still = {"dim": 32, "dropout": 0.0, "attention_dropout": 0.0}
    # Binary losses are slow to tell items apart.
    users, epochs = (8, 300) if changes.get("loss") == "bce" else (24, 150)
    sequential.check_overfits(build(**still | changes), epochs=epochs, lr=3e-3, users=users)


def test_what_is_refused() -> None:
    with pytest.raises(ValidationError, match="heads=3 does not divide dim=16"):
        build(heads=3)
    with pytest.raises(ValidationError, match="'ce', 'bce' or 'sampled'"):
        build(loss="hinge")
