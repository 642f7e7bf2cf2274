"""SASRecTable: its equations written out, and items that are added by their texts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests.support import models, sequential, tiny
from tests.support.models import one_batch, shaken
from tests.support.sequential import HISTORIES, TEXTS, N, double
from torch import Tensor

from l2rec.data.catalog import Catalog
from l2rec.data.ragged import Ragged
from l2rec.errors import ConfigError, DataError
from l2rec.methods.sasrec_table import SASRecTable


def build(**changes: Any) -> SASRecTable:
    options: dict[str, Any] = {"inner": 24, "max_items": 8, "text_tokens": 12} | changes
    catalog, backbone = Catalog.of_texts(TEXTS), tiny.random_backbone()
    model: SASRecTable = models.build(SASRecTable, options, catalog, backbone)
    return model


def row(model: SASRecTable, text: Tensor, residual: Tensor | None) -> Tensor:
    """Compute T of one item, [D] float64, from its text's vector."""
    e = double(text) - double(model.text.vectors[:N]).mean(0)
    e = e / e.norm()
    e = e + e @ double(model.table.linear) + (0 if residual is None else double(residual))
    return e / e.norm()


def users(model: SASRecTable, history: list[Tensor]) -> list[Tensor]:
    """Compute u_t of every position."""
    wide = len(history[0]) ** 0.5
    states = sequential.encoded(model.encoder, [wide * one for one in history], causal=True)
    beside = [
        0.5 * state / state.norm() + model.skip.item() * one
        for state, one in zip(states, history, strict=True)
    ]
    return [one / one.norm() for one in beside]


def test_the_equations() -> None:
    model = shaken(build())
    rows = HISTORIES.head(8)
    table = [row(model, model.text.vectors[i], model.table.residual[i]) for i in range(N)]
    each = []
    for number in range(len(rows)):
        items = rows[number].tolist()
        expected = users(model, [table[i] for i in items])
        found = model.encode_users(Ragged.from_rows([items]))[0].double()
        torch.testing.assert_close(found, expected[-1], rtol=0, atol=1e-4)
        scores = model.scorer()(Ragged.from_rows([items]))[0].double()
        torch.testing.assert_close(
            scores, torch.stack([expected[-1] @ t for t in table]), rtol=0, atol=1e-4
        )
        each += [
            sequential.cross_entropy(
                torch.stack([expected[t] @ one for one in table]) / model.config.temperature,
                items[t + 1],
            )
            for t in range(len(items) - 1)
        ]
    total = model.loss(one_batch(model, rows)).total.detach()
    assert float(total) == pytest.approx(np.mean(each), rel=1e-4)


def test_an_item_that_training_never_meets_is_its_text() -> None:
    model = shaken(build())
    model.calibrate(Ragged.from_rows([[4, 2], [2, 7]]), HISTORIES, HISTORIES.values)
    rows = model.encode_items(np.arange(N, dtype=np.int32))
    for item in range(N):
        met = item in (2, 4, 7)
        own = row(model, model.text.vectors[item], model.table.residual[item] if met else None)
        torch.testing.assert_close(rows[item].double(), own, rtol=0, atol=1e-5)


def test_it_trains() -> None:
    sequential.check_loss_and_gradients(build())


@pytest.mark.parametrize("kept", [False, True])
def test_items_that_come_later(kept: bool) -> None:
    model = shaken(build())
    if kept:
        model.freeze()
    old = model.encode_items(np.arange(N))
    text = "a lamp for reading"
    (alone,) = model.encode_items([text])
    assert model.n_items == N
    (added,) = model.add_items([text]).tolist()
    assert added == N and model.n_items == N + 1
    expected = row(model, model.text.vectors[N], None)
    found = model.encode_items(np.arange(N + 1))
    torch.testing.assert_close(found[N].double(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(found[N], alone)
    torch.testing.assert_close(found[:N], old)
    assert model.scorer()(HISTORIES).shape == (len(HISTORIES), N + 1)
    with pytest.raises(DataError, match="needs a text"):
        model.add_items([" "])


def test_what_is_refused() -> None:
    with pytest.raises(ConfigError, match="heads=5 does not divide"):
        build(heads=5)
