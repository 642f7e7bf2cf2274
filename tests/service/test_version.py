"""One version: exact masked ranking whatever is left out, items that come and go, bad runs."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.runs import Finished
from tests.support.service import Serve

from l2rec.data.ragged import Ragged
from l2rec.errors import CheckpointError, ConfigError, DataError
from l2rec.index import Exact, Milvus, build, save
from l2rec.runs.checkpoint import load_tensors, save_tensors
from l2rec.service.attributes import Attributes
from l2rec.service.loading import check_version, load_version
from l2rec.service.ranking import Query, User, encode, rank
from l2rec.service.version import Version


class Scan(Exact):
    """An exact index that counts how often it was asked."""

    searches = 0

    def search(self, queries: Any, k: int) -> Any:
        self.searches += 1
        return super().search(queries, k)


class Backwards(Exact):
    """An exact index that lists the last of equal rows first."""

    def __init__(self, vectors: Any) -> None:
        super().__init__(vectors[::-1].copy())

    def search(self, queries: Any, k: int) -> Any:
        rows, scores = super().search(queries, k)
        return len(self) - 1 - rows, scores


class Plain:
    """A predictor as far as ranking knows one."""

    def __init__(self, vectors: Any) -> None:
        self.ids = [f"i{n}" for n in range(len(vectors))]
        self.vectors = torch.from_numpy(vectors)


def plain(vectors: Any, indexed: int, deleted: set[int]) -> Version:
    return Version(
        predictor=Plain(vectors),  # type: ignore[arg-type]
        index=Scan(vectors[:indexed]),
        indexed=indexed,
        attributes=Attributes(len(vectors), {}),
        deleted=frozenset(deleted),
        name="plain",
        report={},
        loaded_at=0.0,
        serial=0,
    )


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_ranked_as_by_exact_masking(data: Any) -> None:
    n, d = data.draw(st.integers(1, 40)), 4
    seed = data.draw(st.integers(0, 10**6))
    draw = np.random.default_rng(seed)
    vectors = draw.integers(-2, 3, (n, d)).astype(np.float32)  # ties
    indexed = data.draw(st.integers(1, n))
    version = plain(vectors, indexed, data.draw(st.sets(st.integers(0, n - 1))))
    queries = []
    for _ in range(data.draw(st.integers(1, 3))):
        k = data.draw(st.integers(1, 12))
        without = sorted(data.draw(st.sets(st.integers(0, n - 1))))
        only = None
        if data.draw(st.booleans()):
            only = draw.random(n) < data.draw(st.sampled_from([0.05, 0.5, 0.9]))
        vector = torch.from_numpy(draw.integers(-2, 3, d).astype(np.float32))
        some = np.asarray(sorted(data.draw(st.sets(st.integers(0, n - 1), max_size=6))), dtype=int)
        user = User(vector, None, some, draw.integers(-9, 9, len(some)).astype(np.float32))
        queries.append(Query(version, user, k, np.asarray(without, dtype=np.int64), only))
    for query, found in zip(queries, rank(queries), strict=True):
        scores = vectors @ query.user.vector.numpy()
        scores[query.user.rows] += query.user.added
        allowed = np.ones(n, dtype=bool) if query.only is None else query.only.copy()
        allowed[list(version.deleted)] = False
        allowed[query.without] = False
        expected = sorted(np.flatnonzero(allowed), key=lambda row: (-scores[row], row))[: query.k]
        assert found.scores.tolist() == scores[expected].tolist()
        assert len(set(found.rows.tolist())) == len(found.rows) == len(expected)
        assert allowed[found.rows].all()
        assert scores[found.rows].tolist() == found.scores.tolist()


def test_newer_rows_do_not_stand_for_those_of_the_index() -> None:
    vectors = np.linspace(1, 0.5, 30, dtype=np.float32)[:, None].repeat(2, 1)
    vectors[-4:] = 0.1  # newer than the index, and worse than all that is in it
    version = plain(vectors, 26, set(range(20)))
    found = rank([Query(version, User(torch.ones(2)), 3)])[0]
    assert found.rows.tolist() == [20, 21, 22]


def test_queries_of_one_version_are_searched_together() -> None:
    vectors = np.eye(20, dtype=np.float32)
    a, b = plain(vectors, 20, set()), plain(vectors, 20, set())
    users = [User(torch.eye(20)[n]) for n in range(3)]
    found = rank([Query(a, users[0], 2), Query(b, users[1], 2), Query(a, users[2], 2)])
    assert [ranked.rows[0] for ranked in found] == [0, 1, 2]
    assert a.index.searches == b.index.searches == 1  # type: ignore[union-attr]


def test_a_prior_is_not_searched_for() -> None:
    version = plain(np.eye(20, dtype=np.float32), 20, set())
    blended = User(torch.eye(20)[0], None, np.asarray([7]), np.asarray([2], dtype=np.float32))
    assert rank([Query(version, blended, 2)])[0].rows.tolist() == [7, 0]
    assert version.index.searches == 0  # type: ignore[union-attr]


def test_a_method_that_only_ranks() -> None:
    scores = torch.tensor([0.1, 0.9, 0.5, 0.7])
    version = replace(plain(np.eye(4, dtype=np.float32), 4, {3}), index=None)
    version.predictor.vectors = None
    found = rank([Query(version, User(scores), 3, np.asarray([1]))])[0]
    assert found.rows.tolist() == [2, 0]


# -- attributes ----------------------------------------------------------------------------------


def test_attributes() -> None:
    genres = pa.array(["Comedy|Drama", "Drama", "", "Comedy"], pa.string())
    some = Attributes(4, {"genres": genres, "year": pa.array(["1", "2", "1", "1"], pa.string())})
    assert some.mask({"genres": ["Comedy"]}).tolist() == [True, False, False, True]
    assert some.mask({"genres": ["Comedy", "Drama"], "year": ["1"]}).tolist() == [1, 0, 0, 1]
    assert some.mask({"genres": ["Dra"]}).tolist() == [0, 0, 0, 0]
    more = some.extended([{"genres": "Drama", "maker": "x|y"}, {}])
    assert more.names == ["genres", "year", "maker"] and len(more) == 6 and len(some) == 4
    assert more.mask({"maker": ["y"]}).tolist() == [0, 0, 0, 0, 1, 0]
    assert more.of(4) == {"genres": "Drama", "maker": "x|y"} and more.of(5) == {}
    with pytest.raises(DataError, match=r"no attribute 'genre'; did you mean 'genres'\?"):
        some.mask({"genre": ["x"]})
    with pytest.raises(DataError, match="65 different attributes; items have at most 64"):
        Attributes(0, {}).extended([{str(n): "x" for n in range(65)}])


def test_attributes_that_change() -> None:
    some = Attributes(3, {"price": pa.array(["1", "2", "3"], pa.string())})
    now = some.changed({2: {"price": "9", "maker": "x|y"}, 0: {}})
    assert [now.of(row) for row in range(3)] == [{}, {"price": "2"}, {"price": "9", "maker": "x|y"}]
    assert now.mask({"maker": ["y"]}).tolist() == [0, 0, 1] and len(now) == 3
    assert some.names == ["price"] and some.of(0) == {"price": "1"} and some.changed({}) is some
    with pytest.raises(DataError, match="66 different attributes; items have at most 64"):
        some.changed({1: {str(n): "x" for n in range(65)}})


def test_values_between_which_something_else_stands() -> None:
    kinds = pa.array(["Action Adventure", "Sci-Fi", "New York|Paris", "New York"], pa.string())
    some = Attributes(4, {"class": kinds}, {"class": " "}).extended([{"class": "Action|War"}])
    assert some.mask({"class": ["Action"]}).tolist() == [1, 0, 0, 0, 1]
    assert some.mask({"class": ["Sci-Fi", "War"]}).tolist() == [0, 1, 0, 0, 1]
    assert some.mask({"class": ["New York"]}).tolist() == [0, 0, 1, 1, 0]  # as a whole, as a part
    assert some.mask({"class": ["Action Adventure"]}).tolist() == [1, 0, 0, 0, 0]
    assert some.of(0) == {"class": "Action Adventure"}
    changed = some.changed({1: {"class": "Action"}})
    assert changed.mask({"class": ["Adventure", "Action"]}).tolist() == [1, 1, 0, 0, 1]


def test_no_attributes() -> None:
    none = Attributes(2, {})
    assert none.mask({}).tolist() == [True, True] and len(none.extended([{}])) == 3
    with pytest.raises(DataError, match=r"the catalog has: none"):
        none.check(["x"])


# -- items ---------------------------------------------------------------------------------------


def top(version: Version, history: list[str], k: int = 40) -> list[str]:
    user = encode(version, version.predictor.rows([history]))[0]
    return [version.ids[row] for row in rank([Query(version, user, k)])[0].rows]


@pytest.mark.parametrize("items", ["catalog", "paper", "blended"])
def test_items_come_change_and_go(items: str, request: pytest.FixtureRequest) -> None:
    first = load_version(request.getfixturevalue(f"{items}_run").run)
    ranked = top(first, ["i1", "i2"])
    second = first.with_items({"n1": ("heavy red hat", {"color": "red"}), "n2": ("hat", {})})
    third = second.with_items({"n1": ("cold glass door", {}), "i3": ("cold glass door", {})})
    fourth = third.without_items(["n2", "i4", "nobody"])
    # Each of them answers as before, although the model has grown since.
    assert top(first, ["i1", "i2"]) == ranked and not {"n1", "n2"} & set(ranked)
    assert {"n1", "n2"} <= set(top(second, ["i1", "i2"])) and len(second) == 32
    now = top(third, ["n1", "i2"])
    assert now.count("n1") == now.count("i3") == 1 and len(now) == 32
    assert third.texts[third.predictor.row_of("n1") or 0] == "cold glass door"
    assert third.attributes_of(second.predictor.row_of("n1") or 0) == {"color": "red"}
    assert set(top(fourth, ["i1", "n2"])) == set(now) - {"n2", "i4"}
    assert fourth.serves("n1") and not fourth.serves("n2") and not fourth.serves("zz")
    # What is the same already costs nothing.
    again = third.with_items({"n1": ("cold glass door", {})})
    assert again.predictor is third.predictor
    back = fourth.with_items({"n2": ("hat", {})})
    assert back.serves("n2") and back.predictor is fourth.predictor


def test_a_version_that_was_given_up_leaves_no_trace(catalog_run: Finished) -> None:
    first = load_version(catalog_run.run)
    first.with_items({"lost": ("heavy red hat", {})})
    second = first.with_items({"n1": ("heavy red hat", {})})
    assert second.added == 2 and len(second) == 32
    ranked = top(second, ["i1", "n1"])
    assert len(ranked) == 31 and "" not in ranked and "n1" in ranked
    assert second.predictor.row_of("") is None and second.predictor.row_of("lost") is None


def test_new_items_are_found_beside_an_index(catalog_run: Finished) -> None:
    first = load_version(catalog_run.run)
    assert first.index is not None and len(first.index) == first.indexed == 30
    text = first.texts[5]
    second = first.with_items({"twin": (text, {})})
    assert second.index is first.index
    by_text = second.embed_texts([text])[0]
    found = rank([Query(second, User(by_text), 1)])[0]
    assert second.ids[found.rows[0]] == "twin" and found.scores[0] == pytest.approx(1, abs=1e-4)


def test_items_of_the_log_are_indexed_with_the_rest(catalog_run: Finished) -> None:
    state = ({"n1": ("heavy red hat", {})}, frozenset({"i4", "gone"}))
    version = load_version(catalog_run.run, items=state)
    assert version.indexed == 31 and version.added == 0
    ranked = top(version, ["i1"])
    assert "n1" in ranked and "i4" not in ranked and len(ranked) == 30
    assert version.brought_to(state) is version
    later = version.brought_to(({"n2": ("hat", {})}, frozenset({"n1"})))
    assert later.serves("n2") and not later.serves("n1")


# -- runs that are not served --------------------------------------------------------------------


@pytest.fixture
def copied(catalog_run: Finished, tmp_path: Path) -> Path:
    shutil.copytree(catalog_run.run, tmp_path / "copied")
    return tmp_path / "copied"


def test_a_good_run_passes(catalog_run: Finished) -> None:
    version = load_version(catalog_run.run)
    check_version(version)
    assert version.name == "catalog" and version.report["method"] == "L2Rec"
    assert version.version == version.predictor.version and version.loaded_at > 1e9
    assert load_version(catalog_run.run).serial != version.serial


def test_weights_that_were_not_deployed(copied: Path) -> None:
    with pytest.raises(CheckpointError, match=r"its weights are \w{16}, beef was deployed"):
        load_version(copied, expected="beef")


def test_torn_weights(copied: Path) -> None:
    path = copied / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="torn or not a safetensors file"):
        load_version(copied)


def test_weights_exchanged_under_their_vectors(copied: Path) -> None:
    tensors, metadata = load_tensors(copied / "model.safetensors")
    save_tensors(
        copied / "model.safetensors", {n: t * 1.01 for n, t in tensors.items()}, **metadata
    )
    with pytest.raises(CheckpointError, match=r"item vectors of model \w+, weights \w+: torn or"):
        load_version(copied)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v * float("nan"), "item vectors that are not finite"),
        (lambda v: -v, r"stored item vectors differ from the model's by 2 of their length"),
    ],
)
def test_vectors_that_are_not_the_models(copied: Path, change: Any, message: str) -> None:
    tensors, metadata = load_tensors(copied / "items.safetensors")
    save_tensors(copied / "items.safetensors", {"vectors": change(tensors["vectors"])}, **metadata)
    with pytest.raises(CheckpointError, match=message):
        load_version(copied)


def test_adapters_that_are_not_applied(catalog_run: Finished, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(catalog_run.run, run)
    version = load_version(run)
    sample = version.predictor.sample
    assert sample is not None and len(sample.vectors) == 4 and sample.within == 0.001
    again = version.predictor.encode(sample.histories).vectors
    assert torch.allclose(sample.vectors, again, atol=1e-5)
    with torch.no_grad():  # as if they had never been loaded
        for name, parameter in version.predictor.model.named_parameters():
            if name.startswith("experts."):
                parameter.zero_()
    with pytest.raises(CheckpointError, match=r"user vectors differ .* adapters are not applied"):
        version.predictor.verify_users()
    grown = version.with_items({"n1": ("heavy red hat", {})})
    with pytest.raises(CheckpointError, match="user vectors differ"):
        grown.predictor.verify_users()
    tensors, _ = load_tensors(run / "users.safetensors")
    save_tensors(run / "users.safetensors", tensors, model="other")  # of earlier tensors
    assert load_version(run).predictor.sample is None
    (run / "users.safetensors").unlink()  # as in runs of earlier versions
    assert load_version(run).predictor.sample is None


def test_a_blend_keeps_the_sample(blended_run: Finished) -> None:
    assert load_version(blended_run.run).predictor.sample is not None


def test_a_blend_has_no_index(
    blended_run: Finished, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "blended"
    shutil.copytree(blended_run.run, run)
    with caplog.at_level(logging.INFO, logger="l2rec.service"):
        version = load_version(run)
        assert not caplog.records
        (run / "index").mkdir()
        load_version(run), load_version(run, index="hnsw")
    assert caplog.text.count("is blended, which takes the scores of all items: no index") == 2
    check_version(version)
    assert version.index is None and version.matrix is not None
    encoded = encode(version, version.predictor.rows([["i1", "i2"]]))
    assert len(encoded[0].rows)
    listed = version.predictor.recommend(["i1", "i2"], k=10, exclude_seen=False).items
    found = rank([Query(version, encoded[0], 10)])[0]
    assert [version.ids[row] for row in found.rows] == [item["id"] for item in listed]


def test_a_model_that_gives_no_numbers(copied: Path) -> None:
    version = load_version(copied)  # its item vectors are sound
    for parameter in version.predictor.model.fusion.parameters():
        parameter.data.fill_(float("nan"))
    with pytest.raises(CheckpointError, match="copied: scores that are not finite numbers"):
        check_version(version)


def test_an_index_that_finds_something_else(catalog_run: Finished) -> None:
    version = load_version(catalog_run.run)
    assert version.matrix is not None
    wrong = replace(version, index=Scan(-version.matrix.numpy()))
    with pytest.raises(CheckpointError, match=r"the index finds \d+% of what exact search finds"):
        check_version(wrong)
    nothing = replace(version, deleted=frozenset(range(30)))
    with pytest.raises(CheckpointError, match="no item can be recommended"):
        check_version(nothing)


def test_an_index_that_lists_equal_items_in_another_order(catalog_run: Finished) -> None:
    version = load_version(catalog_run.run)
    version = version.with_items({f"n{n}": ("heavy red hat", {}) for n in range(40)})
    assert version.matrix is not None
    matrix = version.matrix.numpy()
    other = replace(version, index=Backwards(matrix), indexed=len(version))
    check_version(other)
    user = encode(version, version.predictor.rows([["n1"]]))[0]
    lists = [set(rank([Query(v, user, 10)])[0].rows.tolist()) for v in (other, version)]
    assert lists[0] != lists[1]  # or the test could not fail


def test_an_index_of_the_run_folder(copied: Path) -> None:
    first = load_version(copied)
    assert first.matrix is not None and first.index is not None and first.index.kind == "exact"
    made = build(first.matrix.numpy(), "hnsw")
    save(made, copied / "index", ids=list(first.ids), version=first.version)
    state = ({"n1": ("heavy red hat", {})}, frozenset({"i4"}))
    version = load_version(copied, items=state)
    check_version(version)
    assert version.index is not None and version.index.kind == "hnsw"
    assert version.indexed == 30 and len(version) == 31 and version.added == 0
    assert top(version, ["i1"]) == top(load_version(copied, index="exact", items=state), ["i1"])
    save(made, copied / "index", ids=list(first.ids), version="other")
    with pytest.raises(CheckpointError, match=r"of vectors of model other, the run is \w+; build"):
        load_version(copied)
    for file in (copied / "index").glob("ids-*"):
        file.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"index.*ids-.*(torn|edited|bytes)"):
        load_version(copied)


def test_the_log_says_which_milvus_an_index_asks(
    copied: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first = load_version(copied)
    index = Milvus.__new__(Milvus)
    index.uri, index.rows = "http://127.0.0.1:1", len(first)
    (copied / "index").mkdir()
    found = index, list(first.ids), first.version
    monkeypatch.setattr("l2rec.service.loading.load_index", lambda folder: found)
    with caplog.at_level(logging.INFO, logger="l2rec.service"):
        assert load_version(copied).index is index
    assert "index is searched by Milvus at http://127.0.0.1:1" in caplog.text


def test_an_index_that_fails_is_not_needed(catalog_run: Finished) -> None:
    version = load_version(catalog_run.run)

    class Away:
        kind = "milvus"

        def search(self, *_: Any) -> Any:
            raise RuntimeError("away")

    assert top(replace(version, index=Away()), ["i1"]) == top(version, ["i1"])  # type: ignore[arg-type]


def test_a_model_of_ids_alone_takes_no_items(catalog_run: Finished) -> None:
    version = load_version(catalog_run.run)

    class OfIds:
        n_items = 30

    version.predictor.model = OfIds()
    assert not version.takes_new_items
    assert version.brought_to(({"n1": ("hat", {})}, frozenset())) is version
    with pytest.raises(ConfigError, match="ranks the items it was trained on"):
        version.with_items({"n1": ("hat", {})})


# -- a method that names items by tokens, and reaches those of its beam alone ----------------------


def test_what_a_beam_reaches_is_served(beam_run: Path, serve: Serve) -> None:
    version = load_version(beam_run)
    check_version(version)
    user = encode(version, Ragged.from_rows([[3, 4]]))[0]
    ranked = rank([Query(version, user, 10)])[0]
    assert len(ranked.rows) == 4 and np.isfinite(ranked.scores).all()
    client = serve(beam_run)
    assert client.get("/readyz").status_code == 200
    body = {"history": ["i3", "i4"], "k": 10, "exclude_seen": False}
    found = client.post("/v1/recommend", json=body).json()["items"]
    assert [item["id"] for item in found] == [version.ids[row] for row in ranked.rows]
    other = next(item for item in version.ids if item not in {one["id"] for one in found})
    for item, score in ((found[0]["id"], found[0]["score"]), (other, None)):
        why = client.post("/v1/explain", json={"history": body["history"], "item": item})
        assert why.status_code == 200, why.text
        assert why.json()["score"] == (score and pytest.approx(score, abs=1e-5))


@pytest.mark.parametrize("bad", ["nan", "inf", "-inf"])
def test_a_beam_that_gives_no_numbers(beam_run: Path, bad: str) -> None:
    version = load_version(beam_run)
    vector = torch.full((len(version),), -torch.inf)
    vector[3] = float(bad)
    predictor = version.predictor
    predictor._scorer = lambda rows: vector.repeat(len(rows), 1)
    with pytest.raises(CheckpointError, match="scores that are not finite numbers"):
        check_version(version)
    vector[3] = 0.0
    check_version(version)


def test_where_all_that_a_beam_reaches_is_deleted(beam_run: Path, serve: Serve) -> None:
    client = serve(beam_run, rate=0)
    body = {"history": ["i0"], "k": 30, "exclude_seen": False}
    found = [item["id"] for item in client.post("/v1/recommend", json=body).json()["items"]]
    for item in found:
        assert client.delete("/v1/items", params={"id": item}).status_code == 200
    answer = client.post("/v1/recommend", json=body).json()
    assert answer["fallback"] and answer["items"], "what is popular, not nothing"
    assert not {item["id"] for item in answer["items"]} & {*found}
    assert client.get("/readyz").status_code == 200, client.get("/readyz").text
    why = client.post("/v1/explain", json={"history": ["i0"]})
    assert why.status_code == 404 and "nothing is left to recommend" in why.json()["detail"]
