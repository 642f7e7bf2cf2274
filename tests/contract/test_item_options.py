"""Options that SASRec and eSASRec share: places from the newest item, dropout of item vectors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.support import models, sequential
from tests.support.models import one_batch, shaken
from tests.support.sequential import HISTORIES, NAMELESS

from l2rec.methods.esasrec import ESASRec
from l2rec.methods.sasrec import SASRec

METHODS = pytest.mark.parametrize("method", [SASRec, ESASRec])
OPTIONS: dict[str, Any] = {"dim": 16, "inner": 24, "max_items": 8, "heads": 2, "negatives": 12}


def build(method: Any, **changes: Any) -> Any:
    return models.build(method, OPTIONS | changes, NAMELESS, seed=0)


def positions_of(model: Any) -> torch.nn.Embedding:
    return model.encoder.positions if isinstance(model, SASRec) else model.positions


@METHODS
def test_places_from_the_newest_are_the_same_table_turned_for_each_row(method: Any) -> None:
    model, plain = shaken(build(method, from_newest=True)), shaken(build(method))
    plain.load_state_dict(model.state_dict())
    rows = HISTORIES.head(8)
    with torch.no_grad():
        found, _ = model(rows)
        for row in range(len(rows)):
            length = len(rows[row])
            turned = positions_of(model).weight.clone()
            turned[:length] = turned[:length].flip(0)
            positions_of(plain).weight.copy_(turned)
            alone, _ = plain(rows.take(torch.tensor([row]).numpy()))
            torch.testing.assert_close(found[row, :length], alone[0, :length])


@METHODS
def test_dropped_vectors_are_the_same_in_inputs_and_in_what_is_scored(
    method: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compare the loss with that of a model whose items are the dropped vectors."""
    options: dict[str, Any] = {"dropout": 0.0, "loss": "sampled", "share_negatives": True}
    if method is SASRec:
        options["attention_dropout"] = 0.0
    model, other = (shaken(build(method, **options, item_dropout=rate)) for rate in (0.3, 0.0))
    other.load_state_dict(model.state_dict())
    batch = one_batch(model, HISTORIES.head(8))
    for each in (model, other):
        each.train()
    torch.manual_seed(1)
    table = model.dropped(0.3)
    assert 0.1 < float((table == 0).float().mean()) < 0.5, "elements, not rows"
    monkeypatch.setattr(model, "dropped", lambda rate: table)
    with torch.no_grad():
        other.items.weight.copy_(table)
    torch.manual_seed(2)
    found = float(model.loss(batch).total.detach())
    torch.manual_seed(2)
    assert found == pytest.approx(float(other.loss(batch).total.detach()), rel=1e-6)
    model.eval()
    assert type(model).dropped(model, 0.3) is model.items.weight, "in training alone"


@METHODS
@pytest.mark.parametrize("loss", ["ce", "sampled"])
def test_both_train(method: Any, loss: str) -> None:
    model = build(method, loss=loss, from_newest=True, item_dropout=0.1, share_negatives=True)
    sequential.check_loss_and_gradients(model)
