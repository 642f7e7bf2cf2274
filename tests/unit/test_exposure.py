"""What is shown to whom: against sums written out one by one."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from tests.support.command import Call
from tests.support.errors import one_line
from tests.support.runs import Quiet

from l2rec.data.catalog import Catalog
from l2rec.data.dataset import Dataset
from l2rec.data.splits import leave_one_out
from l2rec.errors import CheckpointError, ConfigError, DataError
from l2rec.evaluation import ranking
from l2rec.evaluation.ranking import evaluate
from l2rec.runs.predictor import load
from l2rec.studies import exposure
from l2rec.studies.exposure import exposure_of, item_attribute

FIELD = "text"
K = 5


def catalog(values: list[str | None]) -> Catalog:
    ids = [f"i{n}" for n in range(len(values))]
    return Catalog(pa.table({"item_id": ids, "genre": pa.array(values, pa.string()), "text": ids}))


@pytest.fixture(scope="module")
def users_file(chains: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("users") / "users.csv"
    rows = [f"{user},{'odd' if n % 3 else 'third'}" for n, user in enumerate(chains.user_ids)]
    path.write_text("\n".join(["user_id,kind", *rows]) + "\n")
    return path


@pytest.fixture(scope="module")
def report(sasrec_run: Path, users_file: Path) -> dict[str, Any]:
    by = ["popularity", "kind", "history"]
    return exposure_of(sasrec_run, by, users=users_file, k=K, progress=Quiet())


def test_groups_of_an_item_with_several_values() -> None:
    found = item_attribute("genre", catalog(["a, b", "a", None, " ", "b,b"]), np.ones(5), ",")
    assert found.groups == ["a", "b", "(none)"]
    np.testing.assert_allclose(
        found.shares, [[0.5, 0.5, 0], [1, 0, 0], [0, 0, 1], [0, 0, 1], [0, 1, 0]]
    )
    whole = item_attribute("genre", catalog(["a, b", "a"]), np.ones(2))
    assert whole.groups == ["a", "a, b"]


def test_many_values_end_in_one_group() -> None:
    values = [f"v{n:02}" for n in range(30)] + ["v29", "v29", ""]
    found = item_attribute("genre", catalog(list(values)), np.ones(33))
    assert found.groups[0] == "v29" and found.groups[-2:] == ["(other)", "(none)"]
    assert len(found.groups) == 21
    assert found.shares[:, -2].sum() == 30 - 19
    np.testing.assert_allclose(found.shares.sum(1), 1)


def test_popularity_is_head_tail_and_what_was_never_trained_on() -> None:
    found = item_attribute("popularity", catalog([None] * 5), np.array([0, 9, 1, 2, 0]))
    assert found.groups == ["head", "tail", "cold"]
    assert found.shares.argmax(1).tolist() == [2, 0, 1, 1, 2]


def lists_of(run: Path, dataset: Dataset) -> tuple[list[list[int]], list[list[int]], list[int]]:
    """Return histories, recommended items and targets of the test, one user after the other."""
    predictor, cases = load(run), leave_one_out(dataset.sequences).test
    histories = [cases.histories[n].tolist() for n in range(len(cases))]
    lists = []
    for history in histories:
        found = predictor.recommend([predictor.ids[i] for i in history], K).items
        lists.append([predictor.ids.index(item["id"]) for item in found])
    return histories, lists, cases.targets.values.tolist()


def test_shares_are_those_of_sums_written_out(
    report: dict[str, Any], sasrec_run: Path, chains: Dataset
) -> None:
    histories, lists, targets = lists_of(sasrec_run, chains)
    split = leave_one_out(chains.sequences)
    counts = Counter(split.train.values.tolist())
    best = sorted(range(chains.n_items), key=lambda i: (-counts[i], i))
    head = set(best[: math.ceil(chains.n_items / 5)])
    group = {i: "head" if i in head else "tail" if counts[i] else "cold" for i in best}
    rows = {row["group"]: row for row in report["items"]["popularity"]}
    places = Counter(group[i] for items in lists for i in items)
    for name, row in rows.items():
        trained = sum(n for i, n in counts.items() if group[i] == name) / sum(counts.values())
        assert row["exposure"] == pytest.approx(places[name] / (K * len(lists)), abs=1e-6)
        assert row["trained"] == pytest.approx(trained, abs=1e-6)
        assert row["next"] == pytest.approx(np.mean([group[i] == name for i in targets]), abs=1e-6)
        assert row["ratio"] == pytest.approx(row["exposure"] / trained, abs=1e-5)
    assert sum(row["exposure"] for row in rows.values()) == pytest.approx(1)
    assert report["overall"]["coverage"] == len({i for one in lists for i in one}) / chains.n_items
    used = sorted(Counter(i for one in lists for i in one).get(i, 0) for i in range(chains.n_items))
    apart = sum(abs(a - b) for a in used for b in used)
    gini = apart / (2 * chains.n_items * sum(used))
    assert report["overall"]["gini"] == pytest.approx(gini, abs=1e-9)

    kinds = {g["group"]: g for g in report["both"][1]["groups"]}
    assert report["both"][1]["users"] == "kind"
    third = range(0, len(histories), 3)
    shares = kinds["third"]["shares"]["head"]
    before = np.mean([np.mean([group[i] == "head" for i in histories[u]]) for u in third])
    after = np.mean([np.mean([group[i] == "head" for i in lists[u]]) for u in third])
    assert shares["history"] == pytest.approx(before, abs=1e-6)
    assert shares["exposure"] == pytest.approx(after, abs=1e-6)
    divergence = []
    for user in third:
        total = 0.0
        for name in rows:
            p = np.mean([group[i] == name for i in histories[user]])
            q = 0.99 * np.mean([group[i] == name for i in lists[user]]) + 0.01 * p
            total += p * math.log(p / q) if p else 0.0
        divergence.append(total)
    assert kinds["third"]["calibration"] == pytest.approx(np.mean(divergence), rel=1e-4)


def test_scores_of_groups_are_those_of_the_evaluator(
    report: dict[str, Any], sasrec_run: Path, chains: Dataset
) -> None:
    cases = leave_one_out(chains.sequences).test
    evaluation = evaluate(load(sasrec_run), cases.histories, cases.targets, users=cases.users)
    values = evaluation.values("ndcg@10", masked=True)
    rows = {row["group"]: row for row in report["users"]["kind"]}
    third = values[::3]
    assert rows["third"]["ndcg@10"] == pytest.approx(third.mean())
    assert rows["third"]["error"] == pytest.approx(third.std() / math.sqrt(len(third)))
    assert rows["third"]["users"] + rows["odd"]["users"] == report["cases"] == 40
    assert report["overall"]["ndcg@10"] == pytest.approx(values.mean())
    assert [row["group"] for row in report["users"]["history"]] == ["6-10 events"]


def test_a_list_without_items_is_no_list_of_no_group(
    beam_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a search finds may be in the history already."""

    def narrow(predictor: Any, *_: Any) -> Any:
        score = predictor.scorer()

        class Narrow:
            n_items = predictor.n_items

            def scorer(self) -> Any:
                return lambda rows: (s := score(rows)).where(s == s.amax(1, keepdim=True), -np.inf)

        return Narrow()

    monkeypatch.setattr(exposure, "with_cold_items", narrow)
    found = exposure.exposure_of(beam_run, ["popularity"], progress=Quiet(), k=K)
    assert 0 < found["empty_lists"] < found["cases"]
    shares = [row["exposure"] for row in found["items"]["popularity"]]
    assert sum(shares) == pytest.approx(1)
    assert found["overall"]["popularity_bias"] is not None
    [everyone] = found["both"][0]["groups"]
    assert sum(part["exposure"] for part in everyone["shares"].values()) == pytest.approx(1)


def test_lists_are_made_in_blocks_that_fit_the_catalog(
    sasrec_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the ranking before them, and as visibly."""

    class Watched(Quiet):
        def validating(self, done: int, total: int) -> None:
            steps.append((done, total))

    steps: list[tuple[int, int]] = []
    monkeypatch.setattr(ranking, "_BLOCK_SCORES", 1)
    exposure_of(sasrec_run, ["popularity"], progress=Watched(), k=K)
    assert steps == 2 * [(16, 40), (32, 40), (40, 40)]


def test_the_command_prints_and_writes_it(
    call: Call, sasrec_run: Path, users_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "report.json"
    options = ("--by", "popularity", "--by", "kind", "--users", users_file, "-k", K)
    code, shown, _ = call("diagnose", sasrec_run, *options, "--out", out)
    assert code == 0
    for text in ("items by popularity", "users by kind", "third", "head", "calibration", "Gini"):
        assert text in shown
    code, shown, _ = call("diagnose", sasrec_run, *options, "--json")
    assert json.loads(shown) == json.loads(out.read_text())
    code, shown, _ = call("diagnose", sasrec_run)
    assert "items by popularity" in shown and "users by history" in shown


def test_what_cannot_be_diagnosed(sasrec_run: Path, users_file: Path, tmp_path: Path) -> None:
    def refused(kind: type[Exception], match: str, by: str, users: Path | None = None) -> None:
        with pytest.raises(kind, match=match) as e:
            exposure_of(sasrec_run, [by], users=users, progress=Quiet())
        one_line(e)

    refused(ConfigError, r"popularit: .* mean 'popularity'\? \(there are:", "popularit")
    refused(DataError, "not readable", "kind", tmp_path / "none.csv")
    for text, message in {
        "id,kind\n1,a\n": r"no column user_id \(it has: id, kind\)",
        "user_id,kind\nu,a\nu,b\n": "a user has two rows",
        "user_id,kind\nnobody,a\n": "none of the 40 tested users is in the table",
    }.items():
        (tmp_path / "users.csv").write_text(text)
        refused(DataError, message, "kind", tmp_path / "users.csv")
    with pytest.raises(CheckpointError, match="is not a run folder"):
        exposure_of(tmp_path, ["popularity"], progress=Quiet())
