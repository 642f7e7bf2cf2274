"""What is TIGER's own; what every method promises is in test_methods.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests.support import models, tiny

from l2rec.data.catalog import Catalog
from l2rec.data.ragged import Ragged
from l2rec.data.synthetic import simple_text
from l2rec.methods.tiger import TIGER, told_apart
from l2rec.protocols import Coded

N = 16
TEXTS = [" ".join(simple_text(1007 * i).split()[: 1 + i % 4]) for i in range(N)]
SMALL: dict[str, Any] = {
    "text_tokens": 12,
    "levels": 2,
    "codes": 4,
    "code_dim": 4,
    "code_hidden": (8,),
    "code_epochs": 3,
    "code_passes": 2,
    "dim": 16,
    "heads": 2,
    "head_dim": 8,
    "inner": 16,
    "layers": 1,
    "max_items": 3,
    "beams": N,
}
HISTORIES = Ragged.from_rows([[3, 1], [0], [5, 6, 7, 8]])


def build(**more: Any) -> TIGER:
    backbone, catalog = tiny.random_backbone("bert"), Catalog.of_texts(TEXTS)
    model: TIGER = models.build(TIGER, SMALL | more, catalog, backbone, seed=0)
    return model


def test_items_of_the_same_codes_are_counted_in_their_order() -> None:
    codes = torch.tensor([[1, 2], [0, 0], [1, 2], [1, 2], [0, 1]])
    found = told_apart(codes, 2)
    assert found[:, :2].equal(codes)
    assert found[:, 2].tolist() == [0, 0, 1, 1, 0], "no more than there are codes: these collide"


@torch.no_grad()
def test_a_score_is_the_log_probability_of_the_codes() -> None:
    model = build().eval()
    scores = model.scorer()(HISTORIES)
    tokens = model.generator.tokens(torch.arange(N))
    for user, history in enumerate(HISTORIES):
        newest = torch.from_numpy(history[-3:].astype(np.int64))
        prompt = tokens[newest].flatten()[None]
        for item in range(N):
            said = torch.cat((torch.zeros(1, dtype=torch.int64), tokens[item]))[None]
            logits = model.generator.t5(input_ids=prompt, decoder_input_ids=said).logits[0, :-1]
            wanted = logits.log_softmax(-1).gather(1, tokens[item][:, None]).sum()
            assert float(scores[user, item]) == pytest.approx(float(wanted), abs=1e-4)


def test_what_the_beam_does_not_reach_has_no_score() -> None:
    wide, narrow = build().scorer()(HISTORIES), build(beams=3).scorer()(HISTORIES)
    assert narrow.isfinite().sum(1).tolist() == [3, 3, 3]
    found = narrow.isfinite()
    torch.testing.assert_close(narrow[found], wide[found], atol=1e-4, rtol=0)


def test_tokens_of_levels_are_apart() -> None:
    model = build()
    tokens = model.generator.tokens(torch.arange(N))
    for level in range(3):
        of_level = tokens[:, level]
        assert bool(((of_level > level * 4) & (of_level <= (level + 1) * 4)).all())
    assert len(tokens.unique(dim=0)) == len(model.generator.codes.unique(dim=0))


def test_codes_are_taken_before_the_generator_learns_and_stay() -> None:
    model = build()
    codes, generator = model.stages(1e-3, 0.0)
    before = model.generator.codes.clone()
    with torch.no_grad():
        model.quantizer.codebooks.copy_(model.quantizer.codebooks.flip(1))
    assert codes.begin_epoch is not None and generator.begin_epoch is not None
    for epoch in (1, 2):
        generator.begin_epoch(epoch)
        assert model.generator.codes.equal(before)
    generator.begin_epoch(0)
    assert not model.generator.codes.equal(before)


def test_no_event_reaches_the_quantizer() -> None:
    model = build()
    sizes = {"seed": 0, "epoch": 0, "batch_users": 4, "batch_tokens": 99}
    made = model.item_batches(Ragged.from_rows([]), **sizes)
    seen = np.concatenate([batch.users for batch in made.iterate()])
    assert np.bincount(seen, minlength=N).tolist() == [2] * N, "every item in every pass"


def test_usage_is_of_the_codes_before_the_counter() -> None:
    model = build()
    assert isinstance(model, Coded)
    found = model.code_usage()
    assert len(found.used) == len(found.perplexity) == 2
    shared = len(model.generator.codes[:, :-1].unique(dim=0)) < N
    assert len(found.collisions) == 2 and found.collisions[0] >= found.collisions[1]
    assert (found.collisions[-1] > 0) == shared
