"""What is LETTER's own; what every method promises is in test_methods.py."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from tests.support import models, tiny

from l2rec.data.batches import Batch
from l2rec.data.catalog import Catalog
from l2rec.data.ragged import Ragged
from l2rec.data.synthetic import simple_text
from l2rec.methods.letter import LETTER

N, K, LEVELS = 24, 6, 2
TEXTS = [" ".join(simple_text(1007 * i).split()[: 1 + i % 4]) for i in range(N)]
SMALL: dict[str, Any] = {
    "text_tokens": 12,
    "levels": LEVELS,
    "codes": K,
    "code_dim": 16,
    "code_hidden": (8,),
    "clusters": 2,
    "dim": 16,
    "heads": 2,
    "head_dim": 8,
    "inner": 16,
    "layers": 1,
    "beams": N,
}


def build(**more: Any) -> LETTER:
    backbone, catalog = tiny.random_backbone("bert"), Catalog.of_texts(TEXTS)
    model: LETTER = models.build(LETTER, SMALL | more, catalog, backbone, seed=0)
    return model


def of_items(items: list[int]) -> Batch:
    none = np.zeros((len(items), 0), dtype=np.int32)
    flat = np.array(items)
    return Batch(flat, Ragged.from_rows([[i] for i in items]), flat[:0], none)


def softmax_loss(logits: list[float], target: int) -> float:
    high = max(logits)
    return high + math.log(sum(math.exp(v - high) for v in logits)) - logits[target]


def test_codes_are_drawn_to_items_that_the_same_users_choose() -> None:
    model, items = build(collaborative=0.5).eval(), [3, 1, 8, 20]
    losses = model.code_loss(of_items(items))
    codes = model.quantizer.codes(model.text.vectors[items])
    books = model.quantizer.codebooks.detach().double()
    whole = [sum(books[level, codes[row, level]] for level in range(LEVELS)) for row in range(4)]
    rows = model.sasrec.items.weight.detach().double()[items]
    terms = [softmax_loss([float(z @ e) for e in rows], row) for row, z in enumerate(whole)]
    assert float(losses.parts["collaborative"]) == pytest.approx(0.5 * np.mean(terms), rel=1e-4)


def test_a_code_predicts_another_of_its_cluster() -> None:
    model = build(diversity=0.5).eval()
    # Pairs, so that which code is drawn leaves no choice.
    model.clusters.copy_(torch.arange(K).div(2, rounding_mode="floor").expand(LEVELS, -1))
    items = [3, 1, 8, 20, 5]
    losses = model.code_loss(of_items(items))
    codes = model.quantizer.codes(model.text.vectors[items])
    terms = []
    for level, book in enumerate(model.quantizer.codebooks.detach().double()):
        for code in codes[:, level].tolist():
            others = [k for k in range(K) if k != code]
            logits = [float(book[code] @ book[k]) for k in others]
            terms.append(softmax_loss(logits, others.index(code ^ 1)))
    assert float(losses.parts["diversity"]) == pytest.approx(0.5 * np.mean(terms), rel=1e-4)


def test_a_cluster_of_one_predicts_nothing() -> None:
    model = build(diversity=0.5)
    model.clusters.copy_(torch.arange(K).expand(LEVELS, -1))
    losses = model.code_loss(of_items([3, 1, 8]))
    assert float(losses.parts["diversity"]) == 0 and bool(losses.total.isfinite())


def test_clusters_are_made_anew_each_epoch_and_are_balanced() -> None:
    model = build(codes=40, clusters=4)
    _, codes, _ = model.stages(1e-3, 0.0)
    assert codes.begin_epoch is not None
    codes.begin_epoch(0)
    for of_level in model.clusters:
        sizes = torch.bincount(of_level, minlength=4)
        assert sizes.tolist() == [10] * 4


def test_items_that_share_all_codes_are_assigned_anew() -> None:
    model = build()
    codes = model.quantizer.codes(model.text.vectors)
    codes[:] = codes[0]  # all collide; there are six codes of the last level for 24 items
    apart = model._told_apart(codes, 0)
    assert apart[:, :-1].equal(codes[:, :-1])
    assert len(apart.unique(dim=0)) == K
    known = model._told_apart(codes, N - 2)
    assert known[: N - 2].equal(codes[: N - 2]), "items that are in use keep their codes"
    assert not known[N - 2 :, -1].equal(codes[N - 2 :, -1])


def test_codes_of_the_catalog_collide_less_than_the_quantizers() -> None:
    model = build(codes=N)
    plain = model.quantizer.codes(model.text.vectors)
    assert len(plain.unique(dim=0)) < len(model.generator.codes.unique(dim=0)) == N
    assert model.generator.codes.shape == (N, LEVELS), "no code to tell items apart"


def test_sasrec_comes_first_and_gets_no_gradient_from_the_codes() -> None:
    model = build()
    assert [stage.name for stage in model.stages(1e-3, 0.0)] == [
        "SASRec, for its item vectors",
        "codes",
        "generator",
    ]
    model.code_loss(of_items([3, 1, 8])).total.backward()
    assert model.sasrec.items.weight.grad is None
