"""Reasons are exact: what is left out scores as if it had never been, and shares add up."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tests.support.runs import Finished

from l2rec.errors import DataError
from l2rec.runs.predictor import Predictor, load
from l2rec.service.explain import effects, experts, explain, label, variants

HISTORY = ["i3", "i4", "i9", "i4", "i20"]


def scored(predictor: Predictor, history: list[str], item: str) -> float:
    """What `recommend` gives an item, asked for on its own."""
    ranked = predictor.recommend(history, len(predictor.ids), exclude_seen=False)
    return float(next(i["score"] for i in ranked.items if i["id"] == item))


@pytest.mark.parametrize("items", ["catalog", "paper", "blended"])
def test_without_an_item_is_a_history_without_it(
    items: str, request: pytest.FixtureRequest
) -> None:
    predictor = load(request.getfixturevalue(f"{items}_run").run)
    found = explain(predictor, HISTORY, "i7")
    assert found.item == "i7"
    assert found.score == pytest.approx(scored(predictor, HISTORY, "i7"), abs=1e-5)
    assert found.gate == pytest.approx(predictor.recommend(HISTORY, 1).gate, abs=1e-5)
    assert len(found.without) == len(HISTORY)
    for place, score in enumerate(found.without):
        left = HISTORY[:place] + HISTORY[place + 1 :]
        assert score == pytest.approx(scored(predictor, left, "i7"), abs=1e-5)
    assert len({round(score, 6) for score in found.without if score is not None}) > 1


def test_what_is_added_to_the_inner_product(blended_run: Finished, catalog_run: Finished) -> None:
    predictor = load(blended_run.run)
    found = explain(predictor, HISTORY, "i10")
    assert predictor.vectors is not None and found.added is not None
    encoded = predictor.encode(predictor.rows([HISTORY]))
    inner = float(encoded.vectors[0] @ predictor.vectors[10])
    assert found.score == pytest.approx(inner + found.added, abs=1e-5)
    every = [explain(predictor, HISTORY, item).added for item in ("i10", "i5", "i3")]
    assert any(added for added in every)
    assert explain(load(catalog_run.run), HISTORY, "i10").added is None


def test_shares_of_experts(catalog_run: Finished, paper_run: Finished) -> None:
    for run in (catalog_run.run, paper_run.run):
        predictor = load(run)
        found = explain(predictor, HISTORY, "i7").experts
        assert found is not None and found == experts(predictor, HISTORY)
        assert found.shares.keys() == {"semantic", "behavioral"}
        load_of = predictor.model.expert_load(predictor.rows([HISTORY]))
        assert found.matrices == load_of.matrices
        for view, shares in found.shares.items():
            np.testing.assert_allclose(shares, load_of.experts[view], atol=1e-4)
        top = predictor.model.experts.top
        for shares in found.shares.values():
            assert np.shape(shares) == (len(found.matrices), 3)
            np.testing.assert_allclose(np.sum(shares, axis=1), 1.0, atol=2e-4)
            assert np.max(shares) <= 1 / top + 1e-4  # an expert is chosen once for a token
        # Routers that know what they want route other histories elsewhere.
        torch.manual_seed(0)
        for name, weight in predictor.model.experts.named_parameters():
            if "out" in name:
                torch.nn.init.normal_(weight)
        some, other = experts(predictor, HISTORY), experts(predictor, ["i1"])
        assert some is not None and other is not None and some.shares != other.shares
        assert len({share for rows in some.shares.values() for row in rows for share in row}) > 3


def test_the_best_item_is_explained_by_default(catalog_run: Finished) -> None:
    predictor = load(catalog_run.run)
    best = predictor.recommend(HISTORY, 1).items[0]
    found = explain(predictor, HISTORY)
    assert found.item == best["id"] and found.score == pytest.approx(best["score"], abs=1e-5)
    with pytest.raises(
        DataError,
        match=r"^nothing is left to recommend after this history: name the item to explain$",
    ):
        explain(predictor, list(predictor.ids))


def test_a_method_of_ids_alone(sasrec_run: Path) -> None:
    predictor = load(sasrec_run)
    found = explain(predictor, HISTORY, "i7")
    assert found.gate is None and found.experts is None and found.added is None
    for place, score in enumerate(found.without):
        left = HISTORY[:place] + HISTORY[place + 1 :]
        assert score == pytest.approx(scored(predictor, left, "i7"), abs=1e-5)


def test_a_history_of_one(catalog_run: Finished) -> None:
    predictor = load(catalog_run.run)
    found = explain(predictor, ["i3"], "i4")
    assert found.without == [None] and found.gate is not None
    with pytest.raises(DataError, match=r"^an empty history: give at least one item id$"):
        explain(predictor, [])
    with pytest.raises(DataError, match="unknown item ids: 'zz'"):
        explain(predictor, ["i1"], "zz")
    with pytest.raises(DataError, match="unknown item ids: 'yy'"):
        explain(predictor, ["yy"], "i1")


def test_variants_and_effects() -> None:
    assert variants(["a"]) == [["a"]]
    assert variants(["a", "b"]) == [["a", "b"], ["b"], ["a"]]
    assert variants(["a", "b", "c"], most=2) == [["a", "b", "c"], ["a", "c"], ["a", "b"]]
    assert len(variants(list(range(80)))) == 51
    assert effects(1, [0.5]) == [None]
    assert effects(3, [0.5, 0.1, 0.2]) == [None, 0.1, 0.2]


def test_short_names_of_matrices() -> None:
    assert label("encoder.layer.3.attention.self.query") == "4 q"
    assert label("model.layers.27.self_attn.v_proj") == "28 v"
    assert label("layers.0.mlp.Wi.up") == "1 up"
    assert label("h.2.attn.c_attn.k") == "3 k"
    assert label("encoder.layer.0.output.dense") == "1 down"
    assert label("encoder.layer.0.attention.output.dense") == "1 o"
    assert label("something.else") == "else"
