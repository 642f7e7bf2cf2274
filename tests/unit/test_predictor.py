"""Predictors that share one model, whose catalog only ever grows: what each of them knows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
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


def test_adding_does_not_copy_what_was_there() -> None:
    predictor = make(SASRecTable)
    predictor.model.eval()
    predictor.model.freeze()
    steps, before = [predictor], [predictor.vectors.clone()]  # type: ignore[union-attr]
    for n in range(60):
        steps.append(steps[-1].with_items({f"n{n}": TEXTS[n % N], "i3": TEXTS[n % N]}))
        before.append(steps[-1].vectors.clone())  # type: ignore[union-attr]
    places = {step.vectors.data_ptr() for step in steps}  # type: ignore[union-attr]
    assert len(places) < 10, "moved when the room is full, not each time"
    model = predictor.model
    held = model.table().data_ptr(), model.text.vectors.data_ptr()
    last = steps[-1].with_items({"x": TEXTS[0]})
    assert (model.table().data_ptr(), model.text.vectors.data_ptr()) == held
    assert last._first is predictor._first, "ids that were loaded are not copied either"
    # One that others grew of stays as it is, and so do the two that grow of it.
    other = steps[-1].with_items({"y": TEXTS[1]})
    assert last.ids[-1] == "x" and other.ids[-2:] == ["", "y"]
    for step, earlier in zip(steps, before, strict=True):
        assert step.vectors is not None and torch.equal(step.vectors, earlier)
        assert len(step.ids) == len(earlier)
        assert step.row_of("i3") == (3 if step is predictor else len(earlier) - 1)
    for step in (last, other):
        torch.testing.assert_close(step.vectors, model.encode_items(np.arange(len(step.ids))))


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


NUMBERED = [str(n) for n in range(N)]


def of_numbers(method: Any) -> Predictor:
    """Make a predictor whose ids are the digits of numbers, so that a string is a list of some."""
    predictor = make(method)
    return Predictor(predictor.model, NUMBERED, predictor.texts, predictor.vectors, "v")


CALLS: dict[str, Callable[[Predictor, Any], Any]] = {
    "recommend": lambda p, given: p.recommend(given, 2),
    "rows of one": lambda p, given: p.rows([given]),
    "rows": lambda p, given: p.rows(given),
    "encode_users of one": lambda p, given: p.encode_users([given]),
    "encode_users": lambda p, given: p.encode_users(given),
    "encode_items": lambda p, given: p.encode_items(given),
    "recommendations": lambda p, given: recommendations(p, {"u": given}, 2),
    "candidates": lambda p, given: recommendations(p, {"u": ["1"]}, 2, items_to_recommend=given),
}


@pytest.mark.parametrize("given", ["12", b"12", 12, None], ids=repr)
@pytest.mark.parametrize("call", CALLS)
def test_a_string_is_no_list(call: str, given: Any) -> None:
    if (call, given) == ("candidates", None):
        return  # all items
    with pytest.raises(DataError, match=rf"={given!r}: give a list of ") as error:
        CALLS[call](of_numbers(SASRecTable), given)
    one_line(error)


def test_lists_of_one_id_are_lists() -> None:
    predictor = of_numbers(SASRecTable)
    for given in (["11"], ("11",), np.array([11]), [11]):
        assert predictor.recommend(given, 2) == predictor.recommend(["11"], 2)  # type: ignore[arg-type]
        allowed = recommendations(predictor, {"u": ["1"]}, 2, items_to_recommend=given)  # type: ignore[arg-type]
        assert allowed["item_id"].to_list() == ["11"]


@pytest.mark.parametrize("k", [2.0, None, "2", [2]], ids=repr)
def test_a_number_of_items_is_whole(k: Any) -> None:
    predictor = make(SASRecTable)
    for call in (
        lambda: predictor.recommend(HISTORY, k),
        lambda: recommendations(predictor, {"u": HISTORY}, k),
    ):
        with pytest.raises(DataError, match=r"^k=.* is no whole number; choose 1\.\.12$") as error:
            call()
        one_line(error)
    assert len(predictor.recommend(HISTORY, np.int64(2)).items) == 2


def test_numbers_stand_for_ids_of_new_items(predictor: Predictor) -> None:
    predictor.add_items({100: TEXTS[3]})  # type: ignore[dict-item]
    assert predictor.ids[-1] == "100" and predictor.row_of(100) == predictor.row_of("100") == N  # type: ignore[arg-type]
    assert predictor.recommend([100], 3) == predictor.recommend(["100"], 3)  # type: ignore[list-item]
    table = recommendations(predictor, {"u": [100]}, N + 1, filter_viewed=False)  # type: ignore[list-item]
    assert "100" in table["item_id"].to_list()
    with pytest.raises(DataError, match="item '100' is in the catalog already"):
        predictor.add_items({100: TEXTS[4]})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ({"q": None}, "a new item needs a text"),
        ({"q": float("nan")}, "a new item needs a text"),
        ({"q": 3}, "a new item needs a text"),
        ({"q": " "}, "a new item needs a text"),
        ({3: "a lamp", "3": "a cup"}, "two items with the id '3'; give each its own"),
        ([("q", "a lamp")], r"items=\[.*: give a dictionary of texts by item id"),
        (None, "items=None: give a dictionary"),
    ],
)
def test_what_is_no_new_item(predictor: Predictor, items: Any, message: str) -> None:
    for add in (predictor.add_items, predictor.with_items):
        with pytest.raises(DataError, match=message) as error:
            add(items)
        one_line(error)
    assert predictor.ids == IDS and predictor.model.n_items == N


@pytest.mark.parametrize("texts", [["a lamp", None], [float("nan")], [1, 2], ["a lamp", ""]])
def test_what_is_no_text_is_not_encoded(texts: Any) -> None:
    with pytest.raises(DataError, match="needs a text") as error:
        make(SASRecTable).encode_items(texts)
    one_line(error)
