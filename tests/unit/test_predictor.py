"""Predictors that share one model, whose catalog only ever grows: what each of them knows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.support import models, tiny
from tests.support.errors import one_line
from tests.support.models import shaken

from l2rec.data.catalog import Catalog
from l2rec.data.synthetic import simple_text
from l2rec.errors import DataError
from l2rec.methods.hdrec import HDRec
from l2rec.methods.sasrec_table import SASRecTable
from l2rec.runs.frames import recommendations
from l2rec.runs.predictor import Predictor, catalog_vectors

N = 12
IDS = [f"i{n}" for n in range(N)]
TEXTS = [simple_text(1007 * n) for n in range(N)]
OPTIONS: dict[Any, dict[str, Any]] = {
    SASRecTable: {"inner": 24, "max_items": 8, "text_tokens": 12},
    HDRec: {"max_items": 8, "item_tokens": 6, "max_tokens": 256, "id_dim": 8},
}
HISTORY = ["i3", "i7"]


@pytest.fixture(params=[SASRecTable, HDRec], ids=["vectors", "scores"])
def predictor(request: pytest.FixtureRequest) -> Predictor:
    return make(request.param)


def make(method: Any) -> Predictor:
    backbone, catalog = tiny.random_backbone(), Catalog.of_texts(TEXTS)
    model = shaken(models.build(method, OPTIONS[method], catalog, backbone))
    return Predictor(model, list(IDS), list(TEXTS), catalog_vectors(model), "v")


def scores(predictor: Predictor, *history: str) -> torch.Tensor:
    return predictor.scores(predictor.encode(predictor.rows([history])))[0]


def listed(predictor: Predictor, history: list[str] = HISTORY) -> set[str]:
    everything = predictor.recommend(history, len(predictor.ids), exclude_seen=False)
    return {item["id"] for item in everything.items}


def test_one_that_others_grew_of_stays_as_it_is(predictor: Predictor) -> None:
    rows = predictor.rows([HISTORY])
    before, evaluated = scores(predictor, *HISTORY), predictor.scorer()(rows)
    grown = predictor.with_items({"new": TEXTS[3]})
    assert (predictor.n_items, grown.n_items) == (N, N + 1)
    assert scores(predictor, *HISTORY).shape == before.shape
    assert predictor.scorer()(rows).shape == evaluated.shape
    assert listed(predictor) == {*IDS} and listed(grown) == {*IDS, "new"}
    assert predictor.ids == IDS and predictor.texts == TEXTS


def test_rows_of_another_are_no_items(predictor: Predictor) -> None:
    predictor.with_items({"a": TEXTS[1]})
    grown = predictor.with_items({"c": TEXTS[5]})
    assert grown.ids == [*IDS, "", "c"] and grown.row_of("") is None
    assert listed(grown, ["c"]) == {*IDS, "c"}
    for found in (scores(grown, "c"), grown.scorer()(grown.rows([["c"]]))[0]):
        assert found.isneginf().nonzero().flatten().tolist() == [N]
    table = recommendations(grown, {"u": ["c"]}, N + 2, filter_viewed=False, frame="arrow")
    assert {*table["item_id"].to_pylist()} == {*IDS, "c"}
    later = grown.with_items({"d": TEXTS[6]})
    assert listed(later) == {*IDS, "c", "d"}


def test_items_are_added_where_the_model_puts_them(predictor: Predictor) -> None:
    """Rows that the model has for another predictor come in between."""
    predictor.with_items({"a": TEXTS[1]})
    predictor.add_items({"b": TEXTS[5]})
    assert predictor.row_of("b") == N + 1 == predictor.ids.index("b")
    assert predictor.text_of("b") == TEXTS[5] and listed(predictor) == {*IDS, "b"}
    fresh = make(type(predictor.model))
    fresh.add_items({"a": TEXTS[1], "b": TEXTS[5]})
    of_a, of_b, found = scores(fresh, "a"), scores(fresh, "b"), scores(predictor, "b")
    torch.testing.assert_close(found[:N], of_b[:N])
    torch.testing.assert_close(found[N + 1], of_b[N + 1])
    assert not torch.allclose(of_a[:N], of_b[:N], atol=1e-3)


def test_nothing_is_added(predictor: Predictor) -> None:
    predictor.add_items({})
    same = predictor.with_items({})
    assert predictor.ids == same.ids == IDS and predictor.model.n_items == N
    assert torch.equal(scores(same, *HISTORY), scores(predictor, *HISTORY))
    same.add_items({"new": TEXTS[2]})
    assert predictor.ids == IDS and predictor.texts == TEXTS
    for add in (predictor.add_items, predictor.with_items):
        with pytest.raises(DataError, match="an item with an empty id") as error:
            add({"": TEXTS[2]})
        one_line(error)
