"""The stages downstream: metrics against scikit-learn, nothing from the future, a planted gain."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow.parquet as pq
import pytest
import torch
from scipy import stats
from sklearn.metrics import log_loss, roc_auc_score
from tests.support import runs
from tests.support.command import Call
from tests.support.runs import Quiet

from l2rec.data.catalog import Catalog
from l2rec.data.dataset import Dataset
from l2rec.data.moments import moment
from l2rec.data.prepare import PrepareConfig, prepare
from l2rec.data.synthetic import TOPICS, simulated_exposures
from l2rec.data.vectors import vectors_table
from l2rec.disk import read_json
from l2rec.errors import CheckpointError, ConfigError, DataError, TrainingError
from l2rec.runs.embed import Sharding, embed_run
from l2rec.runs.predictor import load
from l2rec.runs.train import train_run
from l2rec.studies.downstream import study
from l2rec.studies.downstream.daily import DAY, Exposures, Known, daily_log, exposures
from l2rec.studies.downstream.features import Clicks, Table, attributes, periods, user_hash
from l2rec.studies.downstream.metrics import (
    Scored,
    area,
    compared,
    grouped_area,
    matching_scores,
    mean_by_user,
    midranks,
    ranking_scores,
)
from l2rec.studies.downstream.options import DownstreamConfig, downstream_config
from l2rec.studies.downstream.study import run_downstream
from l2rec.studies.downstream.vectors import Frozen, vectors_of_files, vectors_of_run

CUT, DAYS = "2023-11-18", 9
"""The run knows four days; three train, one chooses, one tests."""
FAST: dict[str, Any] = {
    "test_days": 1,
    "epochs": 3,
    "lr": 3e-3,
    "user_buckets": 512,
    "ks": (5, 20),
    "dlrm": {"dim": 8, "bottom": (16,), "top": (16,), "tower": (32, 16)},
}


# -- metrics ---------------------------------------------------------------------------------------


def judged(seed: int = 0, ties: bool = True) -> tuple[Any, Any, Any]:
    """scores, labels and users; some users have one class alone, one has nothing at all."""
    rng = np.random.default_rng(seed)
    users = np.sort(rng.integers(1, 40, size=600))
    scores = rng.normal(size=600) + 0.05 * users
    labels = rng.random(600) < 1 / (1 + np.exp(2 - scores))
    labels[users == 3], labels[users == 4] = False, True
    return np.round(scores, 1) if ties else scores, labels, users


@pytest.mark.parametrize("ties", [True, False])
def test_auc_is_sklearns(ties: bool) -> None:
    scores, labels, users = judged(ties=ties)
    found = area(scores, labels, users, 40)
    assert found is not None
    assert found.value == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    assert found.influence.mean() == pytest.approx(0.0, abs=1e-9)


def test_gauc_is_sklearns_of_each_user() -> None:
    scores, labels, users = judged()
    each = [
        (int((users == u).sum()), roc_auc_score(labels[users == u], scores[users == u]))
        for u in range(40)
        if len(set(labels[users == u].tolist())) == 2
    ]
    assert len(each) < 38  # some users do not count
    wanted = sum(n * value for n, value in each) / sum(n for n, _ in each)
    found = grouped_area(scores, labels, users, 40)
    assert found is not None and found.value == pytest.approx(wanted, abs=1e-12)


def test_one_class_has_no_area() -> None:
    users = np.array([0, 0, 1])
    for labels in (np.zeros(3, bool), np.ones(3, bool)):
        assert area(np.arange(3.0), labels, users, 2) is None
        assert grouped_area(np.arange(3.0), labels, users, 2) is None
    mixed = np.array([True, True, False])  # both classes, but no user has both
    assert area(np.arange(3.0), mixed, users, 2) is not None
    assert grouped_area(np.arange(3.0), mixed, users, 2) is None


def test_midranks_are_scipys() -> None:
    from scipy.stats import rankdata

    scores, _, users = judged()
    mixed = np.random.default_rng(1).permutation(len(users))
    found = midranks(scores[mixed], users[mixed])
    for user in np.unique(users):
        own = users[mixed] == user
        assert found[own].tolist() == rankdata(scores[mixed][own]).tolist()


def test_log_loss_is_sklearns() -> None:
    scores, labels, users = judged()
    p = 1 / (1 + np.exp(-scores))
    shown = replace_labels(users, labels)
    found = ranking_scores(np.stack((p, p), axis=1), shown, 40)
    assert found["click log loss"] is not None
    assert found["click log loss"].value == pytest.approx(log_loss(labels, p), abs=1e-12)
    assert list(found) == [
        f"{task} {metric}" for task in ("click", "reply") for metric in ("auc", "gauc", "log loss")
    ]
    sure = ranking_scores(np.stack((p * 0, p * 0), axis=1), shown, 40)
    assert sure["click log loss"] is not None and math.isfinite(sure["click log loss"].value)


def replace_labels(users: Any, labels: Any) -> Any:
    both = np.stack((labels, labels), axis=1).astype(np.float32)
    zeros = np.zeros(len(users), dtype=np.int64)
    return Exposures(users, zeros, zeros, zeros.astype(np.float64), both)


def bootstrap(metric: Callable[[Any, Any, Any], float], times: int = 400) -> float:
    """Standard error over users, drawn with replacement."""
    scores, labels, users = judged()
    rng = np.random.default_rng(0)
    rows = [np.flatnonzero(users == u) for u in range(40)]
    values = []
    for _ in range(times):
        drawn = [rows[u] for u in rng.integers(40, size=40)]
        at = np.concatenate(drawn)
        whose = np.repeat(np.arange(40), [len(d) for d in drawn])
        values.append(metric(scores[at], labels[at], whose))
    return float(np.std(values, ddof=1))


@pytest.mark.parametrize("of", [area, grouped_area])
def test_influence_gives_the_error_that_a_bootstrap_gives(of: Any) -> None:
    found = of(*judged(), 40)
    error = float(found.influence.std(ddof=1)) / math.sqrt(40)
    wanted = bootstrap(lambda s, y, u: float(of(s, y, u, 40).value))
    assert error == pytest.approx(wanted, rel=0.2)


def test_mean_by_user_by_hand() -> None:
    found = mean_by_user(np.array([1.0, 0.0, 0.0]), np.array([2, 1, 0]))
    assert found.value == pytest.approx(1 / 3)
    np.testing.assert_allclose(found.influence, [1 / 3, -1 / 3, 0.0])


def test_comparison_by_hand() -> None:
    def of(value: float, moved: list[float]) -> dict[str, Scored | None]:
        return {"m": Scored(value, np.array(moved)), "none": None}

    arms = {
        "control": [of(0.5, [0.0, 0.0, 0.0]), of(0.6, [0.0, 0.0, 0.0])],
        "treatment": [of(0.7, [1.0, -1.0, 0.0]), of(0.9, [3.0, -3.0, 0.0])],
    }
    found = compared(arms, 3, alpha=0.05)
    m = found["m"]
    assert m["control"]["mean"] == pytest.approx(0.55) and m["treatment"]["seeds"] == [0.7, 0.9]
    assert m["difference"] == pytest.approx(0.25)
    users = np.std([2.0, -2.0, 0.0], ddof=1) / math.sqrt(3)
    seeds = np.std([0.2, 0.3], ddof=1)
    assert m["error_users"] == pytest.approx(users) and m["sd_seeds"] == pytest.approx(seeds)
    whole = math.sqrt(users**2 + seeds**2 / 2)
    freedom = whole**4 / (users**4 / 2 + (seeds**2 / 2) ** 2 / 1)  # Satterthwaite
    t = stats.t(freedom)
    assert m["high"] - m["low"] == pytest.approx(2 * t.ppf(0.975) * whole, rel=1e-6)
    assert m["p"] == pytest.approx(2 * t.sf(0.25 / whole))
    assert m["p_holm"] == m["p"]  # one metric was tested
    assert found["none"]["difference"] is None and found["none"]["control"]["mean"] is None
    one = compared({name: runs[:1] for name, runs in arms.items()}, 3, 0.05)["m"]
    assert one["difference"] == pytest.approx(0.2) and one["error_users"] > 0
    assert one["control"]["sd"] is None
    for of_seeds in ("sd_seeds", "low", "high", "p", "p_holm"):  # one seed does not tell
        assert one[of_seeds] is None


def test_arms_that_differ_by_rounding_do_not_differ() -> None:
    def of(value: float) -> dict[str, Scored | None]:
        return {"m": Scored(value, np.array([value, -value]))}

    sums = {"control": [of(0.3), of(0.3)], "treatment": [of(0.1 + 0.2), of(0.1 + 0.2)]}
    assert 0.1 + 0.2 != 0.3
    m = compared(sums, 2, alpha=0.05)["m"]
    assert (m["difference"], m["error_users"], m["p"], m["p_holm"]) == (0, 0, 1, 1)


def test_user_hash_is_splitmix64() -> None:
    def reference(x: int) -> int:
        mask = (1 << 64) - 1
        x = (x + 0x9E3779B97F4A7C15) & mask
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    users = np.array([0, 1, 2, 10**6])
    assert user_hash(users, 1000).tolist() == [reference(int(u)) % 1000 for u in users]
    spread = np.bincount(user_hash(np.arange(20_000), 50), minlength=50)
    assert spread.min() > 300 and spread.max() < 500


# -- days ------------------------------------------------------------------------------------------


def test_periods() -> None:
    newest = 100 * DAY - 1  # the last second of day 99
    days = periods(newest, last=106, test_days=2)
    assert (days.train, days.choose, days.test, days.last) == (100, 104, 105, 106)
    assert days.named()["test"] == "1970-04-16 .. 1970-04-17"
    assert periods(100 * DAY, 106, 2).train == 101
    with pytest.raises(DataError, match=r"know events up to 1970-04-14 .* the 3 days left, 2 are"):
        periods(104 * DAY - 1, 106, 2)
    with pytest.raises(DataError, match=r"of the 0 days left.*--only click --before 1970-04-12"):
        periods(200 * DAY, 106, 2)


class Road(NamedTuple):
    """A simulated feed, prepared twice, and a tiny run on the clicks of its first days."""

    log: Path
    data: Dataset
    run: Path


@pytest.fixture(scope="module")
def road(backbone_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Road:
    folder = tmp_path_factory.mktemp("road")
    log = simulated_exposures(folder / "log", 250, 150, DAYS, seed=0)
    data = prepare(log, folder / "all", progress=False)
    early = PrepareConfig(only=("click",), before=CUT)
    prepare(log, folder / "clicks", early, progress=False)
    config = runs.config(backbone_folder, epochs=1)
    train_run(config, folder / "clicks", folder / "run", progress=Quiet())
    return Road(log, data, folder / "run")


def no_vectors(known: Known) -> Frozen:
    n = known.log.n_items
    return Frozen(np.zeros((n, 2), np.float32), lambda u, d: np.zeros((len(u), 2), "f4"), {})


def table_of(data: Dataset, config: DownstreamConfig, until: str = CUT) -> Table:
    return Table(data, config, no_vectors, math.nextafter(moment(until), 0), Quiet())


def delayed(log: Path, out: Path, hours: float) -> Path:
    """The same log, but people take hours to answer: often until the next day."""
    out.mkdir()
    events = pl.read_parquet(log / "events-*.parquet").with_columns(pl.col("event_type").cast(str))
    late = pl.when(pl.col("event_type") == "exposure").then(0.0).otherwise(3600 * hours)
    end = events["timestamp"].max()
    events = events.with_columns(pl.col("timestamp") + late).filter(pl.col("timestamp") <= end)
    events.write_parquet(out / "events.parquet")
    (out / "items.parquet").write_bytes((log / "items.parquet").read_bytes())
    return out


def test_training_does_not_know_the_test_days(road: Road, tmp_path: Path) -> None:
    """The log as it was the evening before the test: what is trained on is the same to the bit."""
    config = DownstreamConfig(**FAST)
    source = delayed(road.log, tmp_path / "log", hours=6)
    everything = prepare(
        source, tmp_path / "all", PrepareConfig(keep_all_items=True), progress=False
    )
    whole = table_of(everything, config)
    before = moment(str(np.datetime64(whole.days.test, "D")))
    options = PrepareConfig(before=before, keep_all_items=True)
    past = prepare(source, tmp_path / "past", options, progress=False)
    log = daily_log(past)
    cut = Table.__new__(Table)
    cut.config, cut.days, cut.known = config, whole.days, Known(log, whole.fields, whole.days.train)
    same_users = {u: n for n, u in enumerate(past.user_ids.to_pylist())}
    ids = everything.user_ids.to_pylist()
    rows = np.concatenate((whole.parts["train"], whole.parts["choose"]))
    user = np.array([same_users[ids[u]] for u in whole.shown.user[rows]])
    item, day = whole.shown.item[rows], whole.shown.day[rows]
    np.testing.assert_array_equal(
        whole.users.dense[whole.user_row[rows]].numpy(), cut.known.users(user, day)
    )
    np.testing.assert_array_equal(
        whole.items.dense[whole.item_row[rows]].numpy(), cut.known.items(item, day)
    )
    np.testing.assert_array_equal(whole.cross[rows].numpy(), cut.known.pairs(user, item, day))
    assert whole.users.histories is not None
    mine, its = whole.users.histories.take(whole.user_row[rows]), cut.known.histories(user, day, 50)
    assert mine.values.tolist() == its.values.tolist()
    # and the labels
    shown = exposures(log, cut=whole.days.test)
    shown = shown.take(np.flatnonzero(shown.day >= whole.days.train))
    key = np.lexsort((shown.time, shown.item, shown.user))
    own = np.lexsort((whole.shown.time[rows], item, user))
    assert shown.labels[key].tolist() == whole.shown.labels[rows][own].tolist()
    later = exposures(daily_log(everything), cut=0)  # and there was something not to know
    assert later.labels[later.day < whole.days.test].sum() > (
        exposures(daily_log(everything), cut=whole.days.test)
        .labels[later.day < whole.days.test]
        .sum()
    )


def test_histories_end_before_the_day(road: Road) -> None:
    table = table_of(road.data, DownstreamConfig(**FAST))
    data, users = road.data, table.users
    assert data.event_types is not None and users.histories is not None
    click = data.event_type_names.index("click")
    some = range(0, len(users.owner), 37)
    for row in some:
        user, day = int(users.owner[row]), int(users.day[row])
        at = slice(int(data.offsets[user]), int(data.offsets[user + 1]))
        items, times, types = data.items[at], data.timestamps[at], data.event_types[at]
        wanted = items[(types == click) & (times < day * DAY)][-50:]
        assert users.histories[row].tolist() == wanted.tolist()
    assert any(len(users.histories[row]) > 3 for row in some)


def test_items_nobody_was_shown_share_a_row(road: Road) -> None:
    table = table_of(road.data, DownstreamConfig(**FAST))
    days = table.days
    row_of = table.items.ids[:, 0].numpy()
    own = row_of > 0
    assert (row_of[own] == table.items.owner[own] + 1).all() and 0 < own.mean() < 1
    first = table.first_day[table.items.owner]
    assert not own[first >= table.items.day].any()
    late = table.item_states(np.arange(table.n_items), np.full(table.n_items, days.last))
    trained = set(row_of[own & (table.items.day < days.choose)].tolist())
    assert set(late.ids[:, 0].tolist()) <= trained | {0}


def test_log_q_is_the_share_of_training_exposures(road: Road) -> None:
    table = table_of(road.data, DownstreamConfig(**FAST))
    items = table.shown.item[table.parts["train"]].tolist()
    often = max(set(items), key=items.count)
    assert float(table.log_q[often]) == pytest.approx(math.log(items.count(often) / len(items)))


def test_attributes_are_fields_that_items_share(road: Road) -> None:
    catalog = Catalog(road.data.catalog)
    found = attributes(catalog)
    assert list(found) == ["category", "creator"]  # every title is its own
    names = catalog.field("category")
    for a, b in ((0, 1), (2, 30), (7, 100)):
        assert (found["category"][a] == found["category"][b]) == (names[a] == names[b])
    assert list(attributes(catalog, ["title"])) == ["title"]
    with pytest.raises(DataError, match="no field 'categori'; did you mean 'category'"):
        attributes(catalog, ["categori"])


def test_recall_equals_the_loop(road: Road) -> None:
    table = table_of(road.data, DownstreamConfig(**FAST))
    clicks: Clicks = table.clicks["test"]
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(len(table.users.owner), table.n_items)).astype(np.float32)
    ranks = clicks.ranks(lambda states: lambda at: torch.from_numpy(noise[at][:, states.owner]))
    there = {item for item, day in enumerate(table.first_day) if day <= table.days.last}
    for n in range(0, len(ranks), 9):
        item, state = int(clicks.item[n]), int(clicks.state[n])
        better = [j for j in there if noise[state, j] > noise[state, item]]
        assert ranks[n] == 1 + len(better)
    found = matching_scores(ranks, clicks, road.data.n_users, (5, 20))
    assert found["recall@20"] is not None
    assert found["recall@20"].value == pytest.approx(float((ranks <= 20).mean()))


# -- vectors ---------------------------------------------------------------------------------------


def test_vectors_of_a_run_are_of_what_was_known_that_day(road: Road) -> None:
    log, data = daily_log(road.data), road.data
    known = Known(log, {}, average=log.days[0] + 1)
    frozen = vectors_of_run(road.run, data, 50, Quiet())(known)
    predictor = load(road.run)
    ids = data.item_ids.to_pylist()
    new = [n for n, item in enumerate(ids) if predictor.row_of(item) is None]
    assert new and frozen.about["items_by_text"] == len(new) and not frozen.about["items_without"]
    by_text = predictor.encode_items([data.texts()[n] for n in new]).numpy()
    np.testing.assert_allclose(frozen.items[new], by_text, atol=1e-5)
    old = next(n for n, item in enumerate(ids) if predictor.row_of(item) is not None)
    row = predictor.row_of(ids[old])
    assert predictor.vectors is not None and row is not None
    np.testing.assert_allclose(frozen.items[old], predictor.vectors[row].numpy(), atol=1e-6)
    # Users of some days, at once, against a literal history each.
    predictor.add_items({ids[n]: data.texts()[n] for n in new})
    users = np.array([3, 3, 3, 17, 40, 41])
    days = log.days[0] + np.array([0, 4, 8, 6, 7, 7])
    found = frozen.users(users, days)
    assert data.event_types is not None
    click = data.event_type_names.index("click")
    for n, (user, day) in enumerate(zip(users, days, strict=True)):
        at = slice(int(data.offsets[user]), int(data.offsets[user + 1]))
        past = (data.event_types[at] == click) & (data.timestamps[at] < day * DAY)
        history = [ids[i] for i in data.items[at][past][-50:]]
        if not history:
            assert not found[n].any()
            continue
        wanted = predictor.encode_users([history])[0].numpy()
        np.testing.assert_allclose(found[n], wanted, atol=1e-4)
    assert not found[0].any() and found[1].any()


def write_vectors(path: Path, ids: list[str], vectors: Any, version: str = "v") -> None:
    """As `l2rec embed` does."""
    table = vectors_table(ids, np.ascontiguousarray(vectors, dtype=np.float32), version)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)


def test_vectors_of_embed_are_read(road: Road, tmp_path: Path) -> None:
    embed_run(road.run, tmp_path, Quiet())
    known = Known(daily_log(road.data), {}, average=1)
    frozen = vectors_of_files(tmp_path, road.data)(known)
    table = pq.read_table(tmp_path / "users.parquet")
    first = table["id"][0].as_py()
    user = road.data.user_index(first)
    found = frozen.users(np.array([user, user]), np.array([1, 2]))
    np.testing.assert_array_equal(found[0], np.array(table["vector"][0].as_py(), np.float32))
    np.testing.assert_array_equal(found[0], found[1])
    assert frozen.about["items_without"] > 0  # the newest items were not in the run's catalog
    assert (frozen.items == 0).all(1).sum() == frozen.about["items_without"]
    assert frozen.about["users_without"] == road.data.n_users - len(table)


def test_vectors_of_shards_are_read(road: Road, tmp_path: Path) -> None:
    embed_run(road.run, tmp_path / "whole", Quiet())
    embed_run(road.run, tmp_path / "shards", Quiet(), sharding=Sharding(rows=3))
    known = Known(daily_log(road.data), {}, average=1)
    whole, shards = (
        vectors_of_files(tmp_path / name, road.data)(known) for name in ("whole", "shards")
    )
    users = np.arange(road.data.n_users)
    found, wanted = shards.users(users, users), whole.users(users, users)
    np.testing.assert_allclose(found, wanted, atol=1e-6)  # other batches round otherwise
    np.testing.assert_array_equal(shards.items, whole.items)
    embed_run(road.run, tmp_path / "shards", Quiet())
    with pytest.raises(CheckpointError, match=r"users\.parquet and a folder users of shards"):
        vectors_of_files(tmp_path / "shards", road.data)


def test_vectors_that_do_not_fit(road: Road, tmp_path: Path) -> None:
    ids, users = road.data.item_ids.to_pylist()[:3], road.data.user_ids.to_pylist()[:3]
    write_vectors(tmp_path / "a" / "items.parquet", ids, np.eye(3))
    write_vectors(tmp_path / "a" / "users.parquet", users, np.eye(3), version="w")
    with pytest.raises(DataError, match="items of model v, users of w; embed them again"):
        vectors_of_files(tmp_path / "a", road.data)
    write_vectors(tmp_path / "a" / "users.parquet", ["nobody"], np.eye(1))
    with pytest.raises(DataError, match="vectors of 3 items and 0 users of"):
        vectors_of_files(tmp_path / "a", road.data)
    with pytest.raises(CheckpointError, match="holds no vectors"):
        vectors_of_files(tmp_path / "nothing", road.data)


def test_a_run_of_other_items(road: Road, catalog_run: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"knows none of the .* items of"):
        vectors_of_run(catalog_run.run, road.data, 50, Quiet())


# -- the whole ----------------------------------------------------------------------------------


def tastes(data: Dataset) -> npt.NDArray[np.float32]:
    """What the titles tell: the topics of each item, [N, topics]."""
    words = [t.split() for topics in TOPICS.values() for t in topics.values()]
    topic_of = {word: n for n, each in enumerate(words) for word in each}
    found = np.zeros((data.n_items, len(words)), dtype=np.float32)
    for row, title in enumerate(Catalog(data.catalog).field("title")):
        for word in title.replace(",", "").split():
            if word in topic_of:
                found[row, topic_of[word]] += 0.25
    return found


def planted(data: Dataset, folder: Path, seed: int | None = None) -> Path:
    """Vectors of topics: users are the mean of what they clicked before the cut. Or noise."""
    items = tastes(data)
    log = daily_log(data)
    early = log.of("click")[log.time[log.of("click")] < moment(CUT)]
    users = np.zeros((data.n_users, items.shape[1]), dtype=np.float32)
    np.add.at(users, log.user[early], items[log.item[early]])
    users -= users.mean(0)
    users /= np.linalg.norm(users, axis=1, keepdims=True) + 1e-6
    if seed is not None:
        rng = np.random.default_rng(seed)
        items, users = rng.normal(size=items.shape) / 6, rng.normal(size=users.shape) / 6
    write_vectors(folder / "items.parquet", data.item_ids.to_pylist(), items)
    write_vectors(folder / "users.parquet", data.user_ids.to_pylist(), users)
    return folder


def test_a_planted_gain_is_found_and_noise_is_none(road: Road, tmp_path: Path) -> None:
    config = DownstreamConfig(**FAST)

    def gains(vectors: Path) -> dict[str, Any]:
        report = run_downstream(
            road.data.path,
            tmp_path / f"out-{vectors.name}",
            progress=Quiet(),
            vectors=vectors,
            until=moment(CUT),
            seeds=2,
            config=config,
        )
        return report["metrics"]

    told = gains(planted(road.data, tmp_path / "taste"))
    noise = gains(planted(road.data, tmp_path / "noise", seed=0))
    assert told["recall@5"]["difference"] > 0.05 and told["recall@5"]["p"] < 0.05
    assert told["click gauc"]["difference"] > 0.02
    for metric, most in (("recall@5", 0.03), ("click gauc", 0.02)):
        assert noise[metric]["difference"] < most, metric
        controls = [found[metric]["control"] for found in (told, noise)]
        assert controls[0] == controls[1]  # the control has not seen the vectors
    assert told["click log loss"]["difference"] < 0


TIMELESS = ("metrics", "floors", "training", "periods", "vectors", "features", "candidates")


def test_the_whole_road(road: Road, tmp_path: Path) -> None:
    config = DownstreamConfig(**FAST)
    progress = Quiet()
    reports = [
        run_downstream(
            road.data.path, tmp_path / name, progress=progress, run=road.run, seeds=1, config=config
        )
        for name in "ab"
    ]
    report = reports[0]
    for key in TIMELESS:
        assert reports[0][key] == reports[1][key], key
    assert json.loads((tmp_path / "a" / "report.json").read_text()) == json.loads(
        json.dumps(report)
    )
    assert list(report["periods"]) == ["train", "choose", "test"]
    assert report["periods"]["train"]["days"] == "2023-11-18 .. 2023-11-20"
    assert report["periods"]["test"]["days"] == "2023-11-22 .. 2023-11-22"
    sizes = [facts["ranking"]["parameters"] for facts in report["training"]["control"]]
    more = [facts["ranking"]["parameters"] for facts in report["training"]["treatment"]]
    dim, width = report["vectors"]["dim"], FAST["dlrm"]["bottom"][0]
    assert more[0] - sizes[0] == (3 * dim + 1) * width  # the arms differ by the inputs alone
    metrics = report["metrics"]
    assert list(metrics)[-2:] == ["recall@5", "recall@20"]
    assert report["floors"]["popularity"].keys() == metrics.keys()
    assert report["floors"]["vectors alone"].keys() == metrics.keys() - {
        "click log loss",
        "reply log loss",
    }
    for metric in ("click auc", "recall@20"):
        floor = report["floors"]["popularity"][metric]
        assert metrics[metric]["control"]["mean"] > 0.9 * floor
    predictions = pl.read_parquet(tmp_path / "a" / "predictions.parquet")
    assert len(predictions) == report["periods"]["test"]["exposures"]
    wanted = roc_auc_score(predictions["click"], predictions["click_treatment"])
    assert metrics["click auc"]["treatment"]["mean"] == pytest.approx(wanted)
    assert any("newer than" in line for line in progress.lines)
    steps = progress.steps[: len(progress.steps) // 2]
    assert [a for a, _ in steps] == sorted(a for a, _ in steps) and steps[-1][0] <= steps[-1][1]
    # Called again, it replaces what it wrote, and nothing else.
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match="is not empty and holds no `l2rec downstream`"):
        run_downstream(road.data.path, tmp_path / "mine", progress=progress, run=road.run)
    with pytest.raises(CheckpointError, match=r"thesis\.tex is a file; choose a folder"):
        run_downstream(
            road.data.path, tmp_path / "mine" / "thesis.tex", progress=progress, run=road.run
        )


def test_the_days_that_a_run_knows_are_told_by_the_unit_of_its_times(
    road: Road, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "vectors_of_run", lambda *given: None)

    def newest(*times: int) -> float:
        log = tmp_path / "log.csv"
        rows = [f"u,{item},{at}\n" for item, at in zip("abc", times, strict=True)]
        log.write_text("user_id,item_id,timestamp\n" + "".join(rows))
        past = prepare(log, tmp_path / "past", PrepareConfig(), progress=False)
        monkeypatch.setattr(study, "open_run_dataset", lambda run, data: past)
        return study._open_run(road.run, None, road.data, DownstreamConfig(), Quiet())[0]

    last = int(moment(CUT)) - 1
    assert newest(last - 2, last - 1, last) == last
    assert newest(*(1000 * (last - back) for back in (2, 1, 0))) == last
    with pytest.raises(DataError, match=r"'order only'.* give --vectors DIR with --until DATE"):
        newest(1, 2, 3)
    with pytest.raises(DataError, match="the unit 'unknown'"):
        newest(50_000, 60_000, 70_000)


def test_a_run_that_has_seen_the_test_days_is_refused(
    road: Road, backbone_folder: Path, tmp_path: Path
) -> None:
    prepare(road.log, tmp_path / "clicks", PrepareConfig(only=("click",)), progress=False)
    config = runs.config(backbone_folder, epochs=1, max_steps=1)
    train_run(config, tmp_path / "clicks", tmp_path / "run", progress=Quiet())
    with pytest.raises(DataError, match="none to train on; train the run on less"):
        run_downstream(road.data.path, tmp_path / "out", progress=Quiet(), run=tmp_path / "run")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, "give either --run RUN, or --vectors DIR"),
        ({"run": Path("a"), "vectors": Path("b")}, "give either --run RUN, or --vectors DIR"),
        ({"vectors": Path("a")}, "say with --until DATE which day"),
        ({"run": Path("a"), "seeds": 0}, "--seeds 0: choose 1 or more"),
    ],
)
def test_what_cannot_be_asked(tmp_path: Path, given: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        run_downstream(tmp_path, tmp_path / "out", progress=Quiet(), **given)


def test_options() -> None:
    config = downstream_config(["test_days=3", "dlrm.dim=32", "ks=[1, 5]", "lr=1e-4"])
    assert (config.test_days, config.dlrm.dim, config.ks, config.lr) == (3, 32, (1, 5), 1e-4)
    with pytest.raises(ConfigError, match=r"dlrm\.dimm=3: .*keys: dlrm, test_days"):
        downstream_config(["dlrm.dimm=3"])
    with pytest.raises(ConfigError, match="epochs=0"):
        downstream_config(["epochs=0"])


def test_a_period_without_clicks(road: Road, tmp_path: Path) -> None:
    rows = pl.read_parquet(road.log / "events-*.parquet").with_columns(
        pl.col("event_type").cast(pl.String)
    )
    last = FIRST_OF_LAST
    quiet = rows.filter((pl.col("timestamp") < last) | (pl.col("event_type") == "exposure"))
    (tmp_path / "log").mkdir()
    quiet.write_parquet(tmp_path / "log" / "events.parquet")
    (tmp_path / "log" / "items.parquet").write_bytes((road.log / "items.parquet").read_bytes())
    data = prepare(tmp_path / "log", tmp_path / "data", progress=False)
    with pytest.raises(DataError, match=r"exposures to test with \(2023-11-22 .* 0 of them"):
        table_of(data, DownstreamConfig(**FAST))


FIRST_OF_LAST = moment("2023-11-22")


def test_a_rate_too_high_ends_in_one_line(road: Road, tmp_path: Path) -> None:
    config = DownstreamConfig(**FAST | {"lr": 1e30})
    with pytest.raises(TrainingError, match="control, seed 0, ranking: not a number after epoch"):
        run_downstream(
            road.data.path, tmp_path / "out", progress=Quiet(), run=road.run, config=config
        )


# -- the command -----------------------------------------------------------------------------------


def test_command(
    road: Road,
    tmp_path: Path,
    call: Call,
) -> None:
    vectors = planted(road.data, tmp_path / "taste")
    fast = [
        *("test_days=1", "epochs=1", "user_buckets=512", "ks=[20]", "dlrm.dim=8"),
        *("dlrm.bottom=[16]", "dlrm.top=[16]", "dlrm.tower=[32, 16]"),
    ]
    asked = ["downstream", road.data.path, *fast]
    asked += ["--vectors", vectors, "--until", CUT, "--seeds", 1]
    printed = call(*asked, "--out", tmp_path / "a", "--json")
    assert printed.code == 0
    assert json.loads(printed.out) == read_json(tmp_path / "a" / "report.json")
    assert printed.err == ""
    code, shown, _ = call(*asked, "--out", tmp_path / "b")
    assert code == 0
    assert "click gauc" in shown and "p (Holm)" in shown and "vectors alone" in shown
    assert "test    2023-11-22 .. 2023-11-22" in shown
    refused = call("downstream", road.data.path, "--out", tmp_path / "c")
    assert refused.code == 2 and refused.err.startswith("l2rec: give either --run RUN")
    refused = call(*asked[:-2], "--until", "soon", "--out", tmp_path / "c")
    assert refused.code == 2 and "'soon' is no time" in refused.err
