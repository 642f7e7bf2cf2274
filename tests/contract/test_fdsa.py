"""FDSA: both encoders and both kinds of features, written out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from pydantic import ValidationError
from tests.support import models, sequential, tiny
from tests.support.models import one_batch, shaken
from tests.support.sequential import HISTORIES, TEXTS, N, double, linear
from torch import Tensor

from l2rec.data.catalog import Catalog
from l2rec.errors import ConfigError, DataError
from l2rec.methods.fdsa import FDSA, FDSAConfig

BRANDS = ["acme", "", "old bowl"] * 6 + ["acme", "acme"]
CATEGORIES = ["tools, hand tools", "tools", ""] * 6 + ["", "toys"]
CATALOG = Catalog(
    pa.table(
        {
            "item_id": [str(i) for i in range(N)],
            "text": TEXTS,
            "brand": BRANDS,
            "category": CATEGORIES,
            "empty": [" "] * N,
        }
    )
)
FIELDS = {"features": ("brand", "category"), "separator": ", "}


def build(seed: int = 0, cache: Path | None = None, **changes: Any) -> FDSA:
    options = {"dim": 16, "inner": 24, "max_items": 8, "text_tokens": 12} | changes
    backbone = tiny.random_backbone() if options.get("features", "text") == "text" else None
    model: FDSA = models.build(FDSA, options, CATALOG, backbone, seed=seed, cache=cache)
    return model


def fields_of(item: int) -> list[list[tuple[str, str]]]:
    """Return the values of each field, with the field's name."""
    return [
        [(field, value) for value in text.split(", ") if value]
        for field, text in (("brand", BRANDS[item]), ("category", CATEGORIES[item]))
    ]


def feature(model: FDSA, item: int) -> Tensor:
    """Compute f of one item, [h] float64."""
    features: Any = model.features
    if model.config.features == "text":
        return linear(features.linear, double(features.text.vectors[item])).clamp(min=0)
    known = list(dict.fromkeys(value for i in range(N) for row in fields_of(i) for value in row))
    table = double(features.table.weight)
    assert len(table) == len(known)
    pooled = []
    for row in fields_of(item):
        rows = [table[known.index(value)] for value in row]
        pooled.append(sum(rows, 0 * table[0]) / max(1, len(rows)))
    weights = [
        torch.exp(linear(features.weigh, linear(features.hidden, p).clamp(min=0))) for p in pooled
    ]
    total: Tensor = sum(w * p for w, p in zip(weights, pooled, strict=True)) / sum(weights)
    return total


@pytest.mark.parametrize("changes", [{}, FIELDS], ids=["text", "fields"])
def test_the_equations(changes: dict[str, Any]) -> None:
    model = shaken(build(**changes))
    rows = HISTORIES.head(8)
    table = double(model.items.weight)
    each = []
    with torch.no_grad():
        states, _ = model(rows)
    for row in range(len(rows)):
        items = rows[row].tolist()
        ids = sequential.encoded(model.item_encoder, [table[i] for i in items], causal=True)
        read = [feature(model, i) for i in items]
        features = sequential.encoded(model.feature_encoder, read, causal=True)
        users = [
            sequential.norm(model.norm, linear(model.join, torch.cat(pair)))
            for pair in zip(ids, features, strict=True)
        ]
        torch.testing.assert_close(
            states[row, : len(items)].double(), torch.stack(users), rtol=0, atol=1e-4
        )
        each += [
            sequential.cross_entropy(table @ users[t], items[t + 1]) for t in range(len(items) - 1)
        ]
    total = model.next_item_loss(one_batch(model, rows)).total.detach()
    assert float(total) == pytest.approx(np.mean(each), rel=1e-5)


@pytest.mark.parametrize("changes", [{}, FIELDS, {"features": ("brand",)}], ids=str)
def test_every_source_of_features_trains(changes: dict[str, Any]) -> None:
    model = build(**changes)
    if changes.get("features") == ("brand",):
        for part in (model.features.hidden, model.features.weigh):  # one field has weight one
            part.requires_grad_(False)
            for parameter in part.parameters():
                parameter.grad = torch.ones_like(parameter)
    sequential.check_loss_and_gradients(model)


def test_it_learns_by_heart() -> None:
    model = build(dim=32, dropout=0.0, attention_dropout=0.0)
    sequential.check_overfits(model, epochs=80, lr=5e-3)


def test_features_reach_the_user() -> None:
    model = shaken(build(**FIELDS))
    before = model.encode_users(HISTORIES)
    with torch.no_grad():
        model.features.table.weight[0] += 1  # "acme"
    after = model.encode_users(HISTORIES)
    has = [any(BRANDS[i] == "acme" for i in HISTORIES[row][-8:]) for row in range(len(HISTORIES))]
    assert (before != after).any(1).tolist() == has and not all(has)


def test_text_vectors_are_frozen_and_cached(tmp_path: Path) -> None:
    model = build(cache=tmp_path)
    assert model.cached and all(path.is_file() for path in model.cached)
    assert not [name for name in model.state_dict() if "text" in name or "backbone" in name]
    assert torch.equal(build(cache=tmp_path).features.text.vectors, model.features.text.vectors)
    assert build(**FIELDS).cached == []


def test_what_is_refused() -> None:
    with pytest.raises(ValidationError, match="heads=3 does not divide dim=16"):
        build(heads=3)
    with pytest.raises(ValidationError, match=r"features=\[\] leaves nothing to read"):
        build(features=())
    with pytest.raises(DataError, match="no field 'brnd'; did you mean 'brand'"):
        build(features=("brnd",))
    with pytest.raises(DataError, match="no item has a value of empty; name other fields"):
        build(features=("empty",))
    with pytest.raises(DataError, match="FDSA with features=text reads item texts"):
        FDSA(FDSAConfig(), Catalog.of_texts([""]), tiny.random_backbone())
    with pytest.raises(ConfigError, match="features=text needs a backbone"):
        FDSA(FDSAConfig(), CATALOG)
