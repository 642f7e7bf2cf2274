"""Sets of targets, the tied-day protocol beside leave-one-out, splits by time and given splits."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.rows import rows_of
from tests.support.runs import Quiet
from typer.testing import CliRunner

from l2rec.cli import app
from l2rec.config import RunConfig, resolve
from l2rec.data.dataset import Dataset, open_dataset
from l2rec.data.merge import merge
from l2rec.data.ragged import Ragged
from l2rec.data.splits import split_events
from l2rec.disk import read_json
from l2rec.errors import CheckpointError, ConfigError, DataError
from l2rec.evaluation.ranking import Evaluation, evaluate
from l2rec.evaluation.ranks import aligned, read_ranks, write_ranks
from l2rec.evaluation.tied_day import PROTOCOL, beside_leave_one_out, ranked_as_sets
from l2rec.methods.floors import Popularity
from l2rec.metrics import ranking_metrics
from l2rec.protocols import Scorer
from l2rec.runs.start import check_start
from l2rec.runs.train import evaluate_run, train_run
from l2rec.studies.blend import blend_run
from l2rec.studies.compare import compare_runs

N = 12


class Fixed:
    """Scores that depend on the history alone, some of them equal."""

    n_items = N

    def scorer(self) -> Scorer:
        def score(histories: Ragged) -> torch.Tensor:
            rows = [
                np.random.default_rng([len(row), int(sum(row))]).integers(0, 6, N)
                for row in rows_of(histories)
            ]
            return torch.tensor(np.array(rows, dtype=np.float32).reshape(-1, N))

        return score


# ---------------------------------------------------------------- sets of targets


def literal_ranks(history: list[int], targets: list[int], *, masked: bool) -> list[float]:
    """Rank each target by the definition of docs/ties.md."""
    scores = Fixed().scorer()(Ragged.from_rows([history]))[0].double().tolist()
    ranks = []
    for target in targets:
        ahead = 0.0
        for item, score in enumerate(scores):
            if item == target or (masked and item in history and item not in targets):
                continue
            ahead += 1.0 if score > scores[target] else 0.5 if score == scores[target] else 0.0
        ranks.append(1 + ahead)
    return ranks


def literal_metrics(ranks: list[list[float]], k: int) -> dict[str, float]:
    """Average over sets by the definition of docs/ties.md."""
    recall, ndcg, mrr = 0.0, 0.0, 0.0
    for of_set in ranks:
        recall += sum(rank <= k for rank in of_set) / len(of_set)
        gain = sum(1 / math.log2(rank + 1) for rank in of_set if rank <= k)
        ndcg += gain / sum(1 / math.log2(n + 2) for n in range(min(k, len(of_set))))
        mrr += 1 / min(of_set)
    return {
        f"recall@{k}": recall / len(ranks),
        f"ndcg@{k}": ndcg / len(ranks),
        "mrr": mrr / len(ranks),
    }


ITEMS = st.integers(0, N - 1)
SETS = st.lists(
    st.tuples(
        st.lists(ITEMS, min_size=1, max_size=6),
        st.lists(ITEMS, min_size=1, max_size=4, unique=True),
    ),
    min_size=1,
    max_size=7,
)


@given(SETS, st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_sets_are_ranked_as_the_literal_loop_does(
    rows: list[tuple[list[int], list[int]]], batch: int
) -> None:
    histories, targets = (Ragged.from_rows(list(part)) for part in zip(*rows, strict=True))
    found = evaluate(Fixed(), histories, targets, batch_size=batch)
    for masked in (False, True):
        ranks = [literal_ranks(history, wanted, masked=masked) for history, wanted in rows]
        ours = found.ranks_masked if masked else found.ranks
        assert ours.tolist() == [rank for of_set in ranks for rank in of_set]
        metrics = found.metrics(ks=(1, 2, 5))
        for k in (1, 2, 5):
            for name, value in literal_metrics(ranks, k).items():
                key = f"{name}_masked" if masked else name
                assert metrics[key] == pytest.approx(value, abs=1e-12)
    assert len(found) == len(rows) and found.top.shape == (len(rows), N)


def test_metrics_of_sets_equal_ranx() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it and its compiler import is not ours to judge
        import ranx
    generator = np.random.default_rng(3)
    scores = np.stack([generator.permutation(40) for _ in range(50)])
    sets = [generator.choice(40, generator.integers(1, 15), replace=False) for _ in range(50)]
    names = [f"{name}@{k}" for name in ("recall", "ndcg") for k in (1, 5, 10)] + ["mrr"]
    relevant = {f"u{row}": {str(i): 1 for i in wanted} for row, wanted in enumerate(sets)}
    runs = {
        f"u{row}": {str(i): float(s) for i, s in enumerate(of)} for row, of in enumerate(scores)
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = ranx.evaluate(ranx.Qrels(relevant), ranx.Run(runs), names)
    ranks = np.concatenate([40.0 - of[wanted] for of, wanted in zip(scores, sets, strict=True)])
    offsets = np.cumsum([0, *map(len, sets)])
    ours = ranking_metrics(ranks, ks=(1, 5, 10), offsets=offsets)
    assert ours == pytest.approx({name: float(theirs[name]) for name in names}, abs=1e-12)


def test_a_history_without_a_target_is_refused() -> None:
    with pytest.raises(DataError, match="a history without a target"):
        evaluate(Fixed(), Ragged.from_rows([[1], [2]]), Ragged.from_rows([[3], []]))


def test_ranks_of_sets_round_trip(tmp_path: Path) -> None:
    sets = Ragged.from_rows([[3], [4, 5], [0]])
    found = evaluate(Fixed(), Ragged.from_rows([[1], [2], [6]]), sets)
    write_ranks(tmp_path / "ranks.parquet", found, ["a", "b", "c"], protocol=PROTOCOL)
    back = read_ranks(tmp_path / "ranks.parquet")
    assert back.users == ["a", "b", "c"] and back.targets_of() == [(3,), (4, 5), (0,)]
    for masked in (False, True):
        for metric in ("ndcg@10", "recall@5", "mrr"):
            expected = found.values(metric, masked=masked).tolist()
            assert back.values(metric, masked=masked).tolist() == expected
    shuffled = back.take(np.array([2, 0, 1]))
    assert shuffled.targets_of() == [(0,), (3,), (4, 5)]
    assert aligned(back, shuffled).targets_of() == back.targets_of()
    assert np.array_equal(aligned(back, shuffled).ranks, back.ranks)
    some = found.take(np.array([False, True, True]))
    assert some.values("mrr").tolist() == found.values("mrr").tolist()[1:]


# ---------------------------------------------------------------- data with ties and splits


def log_of(rows: list[list[tuple[int, int]]]) -> pa.Table:
    """Make a log of each user's events (day, item)."""
    return pa.table(
        {
            "user_id": [f"u{user}" for user, row in enumerate(rows) for _ in row],
            "item_id": [f"i{item:02}" for row in rows for _, item in row],
            "timestamp": [86_400.0 * (20_000 + day) for row in rows for day, _ in row],
        }
    )


def walk(user: int) -> list[tuple[int, int]]:
    """Return events of which the last one, two or three tie, by user."""
    steps = [(user + 2 * n) % N for n in range(6 + user % 3)]
    days = [min(n, 5) for n in range(len(steps))]
    return list(zip(days, steps, strict=True))


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("tied")
    return Dataset.from_frames(
        log_of([walk(user) for user in range(36)]), out=folder / "tied", progress=False
    )


def recipe(kind: str = "auto", **split: Any) -> RunConfig:
    values = {
        "method": "l2rec.methods.sasrec:SASRec",
        "model": {"dim": 8, "inner": 8, "layers": 1, "heads": 1},
        "split": {"kind": kind, **split},
        "training": {"epochs": 2, "lr": 0.01},
    }
    return resolve(values, where="test")


@pytest.fixture(scope="module")
def tied_run(tied: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "run"
    train_run(recipe(), tied.path, run, progress=Quiet(), recipe="tiny")
    return run


# ---------------------------------------------------------------- tied-day beside leave-one-out


def test_sets_beside_leave_one_out_are_what_a_whole_evaluation_gives(tied: Dataset) -> None:
    split = split_events(tied)
    sets = beside_leave_one_out(tied, split)
    assert sets is not None
    # A third each ends on one, two and three events of one day; of three, one was trained on.
    assert len(split.test) == 36 and len(sets) == 24
    assert sorted(set(sets.targets.lengths.tolist())) == [1, 2]
    own = evaluate(Fixed(), split.test.histories, split.test.targets, users=split.test.users)
    ranked: list[int] = []

    def rank(cases: Any) -> Evaluation:
        ranked.append(len(cases))
        return evaluate(Fixed(), cases.histories, cases.targets, users=cases.users)

    found = ranked_as_sets(own, split, sets, rank)
    whole = evaluate(Fixed(), sets.histories, sets.targets, users=sets.users)
    assert ranked == [12]
    for name in ("ranks", "ranks_masked", "users", "top", "targets", "offsets"):
        assert np.array_equal(getattr(found, name), getattr(whole, name)), name


def test_sets_are_of_those_who_are_tested(tied: Dataset) -> None:
    split = split_events(tied, users=10)
    sets = beside_leave_one_out(tied, split)
    assert sets is not None and 0 < len(sets) < len(split.test) == 10
    own = evaluate(Fixed(), split.test.histories, split.test.targets, users=split.test.users)

    def rank(cases: Any) -> Evaluation:
        return evaluate(Fixed(), cases.histories, cases.targets, users=cases.users)

    found = ranked_as_sets(own, split, sets, rank)
    whole = evaluate(Fixed(), sets.histories, sets.targets, users=sets.users)
    assert np.array_equal(found.ranks, whole.ranks)


def test_no_event_of_a_set_was_trained_on(tied: Dataset) -> None:
    split = split_events(tied)
    sets = beside_leave_one_out(tied, split)
    assert sets is not None
    for user, history in zip(sets.users.tolist(), rows_of(sets.histories), strict=True):
        trained = split.train[user].tolist()
        assert trained == history[: len(trained)]


def test_both_protocols_stand_in_the_report(tied_run: Path) -> None:
    report = read_json(tied_run / "report.json")
    beside = report["tied_day"]
    assert (report["users_tested"], beside["users_tested"], beside["users_left_out"]) == (
        36,
        24,
        12,
    )
    assert list(beside["scores"]) == list(report["scores"])
    assert set(beside["significance"]) == set(report["significance"])
    ranks = read_ranks(tied_run / "ranks-tied-day.parquet")
    assert ranks.protocol == beside["protocol"] == PROTOCOL
    mean = float(ranks.values("ndcg@10").mean())
    assert beside["scores"]["SASRec"]["ndcg@10"] == pytest.approx(mean)
    page = (tied_run / "report.html").read_text()
    assert "Tied day" in page and "24 of 36 users" in page


def test_evaluate_by_both_protocols(tied_run: Path) -> None:
    report = read_json(tied_run / "report.json")
    own = evaluate_run(tied_run, "test", Quiet())
    sets = evaluate_run(tied_run, "test", Quiet(), tied_day=True)
    assert (own["users"], sets["users"]) == (36, 24)
    assert own["ndcg@10"] == pytest.approx(report["scores"]["SASRec"]["ndcg@10"])
    assert sets["ndcg@10"] == pytest.approx(report["tied_day"]["scores"]["SASRec"]["ndcg@10"])
    with pytest.raises(ConfigError, match="the tied-day protocol is of the test split"):
        evaluate_run(tied_run, "valid", Quiet(), tied_day=True)


def test_compare_by_both_protocols(tied: Dataset, tied_run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    train_run(recipe().model_copy(update={"seed": 1}), tied.path, other, progress=Quiet())
    found = compare_runs([tied_run, other], group=False, tied_day=True)
    assert found.protocol == PROTOCOL and found.blocks[0].users == 24
    assert found.notes[0].startswith("12 users are left out: their last events of one time")
    report = read_json(tied_run / "report.json")["tied_day"]["scores"]
    line = found.blocks[0].lines["tiny"]
    assert line.scores["ndcg@10"].mean == pytest.approx(report["SASRec"]["ndcg@10"])
    assert found.floors["popularity"] == report["popularity"]
    assert {b.segment for b in found.blocks} == {"all", "history 1-5"}
    own = compare_runs([tied_run, other], group=False)
    assert own.blocks[0].users == 36 and not any("left out" in note for note in own.notes)
    shown = CliRunner().invoke(app, ["compare", str(tied_run), str(other), "--tied-day"])
    assert shown.exit_code == 0, shown.output
    (other / "ranks-tied-day.parquet").unlink()
    with pytest.raises(DataError, match=r"has no ranks-tied-day\.parquet.*--tied-day` says"):
        compare_runs([tied_run, other], tied_day=True)


def test_a_blend_has_both_protocols(tied_run: Path, tmp_path: Path) -> None:
    report = blend_run(tied_run, tmp_path / "blend", progress=Quiet())
    sets = evaluate_run(tmp_path / "blend", "test", Quiet(), tied_day=True)
    of_blend = report["tied_day"]["scores"]["SASRec + co-occurrence"]
    assert sets["ndcg@10"] == pytest.approx(of_blend["ndcg@10"])


def test_without_ties_there_is_one_protocol(chains: Dataset, tmp_path: Path) -> None:
    report = train_run(recipe(), chains.path, tmp_path / "run", progress=Quiet())
    assert "tied_day" not in report and not (tmp_path / "run/ranks-tied-day.parquet").exists()
    assert "Tied day" not in (tmp_path / "run/report.html").read_text()
    with pytest.raises(ConfigError, match="no user ends on two events of one time"):
        evaluate_run(tmp_path / "run", "test", Quiet(), tied_day=True)


# ---------------------------------------------------------------- runs by other splits


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("tied-day", {}),
        ("time", {"valid_from": 0.5}),
        ("time", {"valid_from": "2024-10-07", "test_from": 0.9}),
    ],
)
def test_a_run_by_another_split(
    kind: str, options: dict[str, Any], tied: Dataset, tmp_path: Path
) -> None:
    config = recipe(kind, **options)
    report = train_run(config, tied.path, tmp_path / "run", progress=Quiet())
    split = split_events(tied, config.split.kind, config.split.valid_from, config.split.test_from)
    assert report["protocol"].startswith(split.protocol) and "tied_day" not in report
    assert report["users_tested"] == len(split.test)
    floor = Popularity.from_sequences(split.train, tied.n_items)
    of_floor = evaluate(floor, split.test.histories, split.test.targets).metrics()
    assert report["scores"]["popularity"] == pytest.approx(of_floor), "the same training events"
    again = evaluate_run(tmp_path / "run", "test", Quiet())
    assert again["ndcg@10"] == pytest.approx(report["scores"]["SASRec"]["ndcg@10"])
    valid = evaluate_run(tmp_path / "run", "valid", Quiet())
    assert valid["users"] == len(split.valid)
    assert valid["ndcg@10"] == pytest.approx(report["valid"]["ndcg@10"])
    assert compare_runs([tmp_path / "run"]).blocks[0].users == len(split.test)
    with pytest.raises(ConfigError, match="trained with another split"):
        evaluate_run(tmp_path / "run", "test", Quiet(), tied_day=True)


def test_runs_of_different_splits_are_not_compared(
    tied: Dataset, tied_run: Path, tmp_path: Path
) -> None:
    train_run(recipe("time", valid_from=0.5), tied.path, tmp_path / "time", progress=Quiet())
    with pytest.raises(DataError, match="only runs on the same data and protocol"):
        compare_runs([tied_run, tmp_path / "time"])


def test_a_start_that_may_have_seen_the_test_is_refused(
    tied: Dataset, tied_run: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="so it may have seen the test"):
        train_run(
            recipe("time", valid_from=0.5),
            tied.path,
            tmp_path / "x",
            progress=Quiet(),
            init=tied_run,
        )
    train_run(recipe(), tied.path, tmp_path / "y", progress=Quiet(), init=tied_run)


def test_a_start_that_saw_the_test_among_other_data_is_refused(
    tied: Dataset, tied_run: Path, tmp_path: Path
) -> None:
    other = Dataset.from_frames(
        log_of([walk(user) for user in range(9)]), out=tmp_path / "other", progress=False
    )
    once = merge([tied.path, other.path], tmp_path / "once", progress=False)
    again = Dataset.from_frames(
        log_of([walk(user) for user in range(5)]), out=tmp_path / "more", progress=False
    )
    twice = merge([once.path, again.path], tmp_path / "twice", progress=False)
    last = recipe("tied-day")
    train_run(recipe(), twice.path, tmp_path / "merged", progress=Quiet())
    train_run(recipe(), other.path, tmp_path / "through", progress=Quiet(), init=tied_run)
    for init in (tmp_path / "merged", tmp_path / "through"):
        with pytest.raises(CheckpointError, match="so it may have seen the test"):
            train_run(last, tied.path, tmp_path / "x", progress=Quiet(), init=init)
        out = tmp_path / f"from-{init.name}"
        train_run(recipe(), tied.path, out, progress=Quiet(), init=init)


def test_a_start_is_found_from_another_folder_and_told_where_it_is_gone(
    tied: Dataset, tied_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Dataset.from_frames(
        log_of([walk(user) for user in range(9)]), out=tmp_path / "other", progress=False
    )
    monkeypatch.chdir(tied_run.parent)
    through, last = tmp_path / "through", recipe("tied-day")
    train_run(recipe(), other.path, through, progress=Quiet(), init=Path(tied_run.name))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="so it may have seen the test"):
        train_run(last, tied.path, tmp_path / "x", progress=Quiet(), init=Path("through"))
    config = through / "config.yaml"
    config.write_text(config.read_text().replace(str(tied_run.resolve()), "gone"))
    progress = Quiet()
    train_run(last, tied.path, tmp_path / "x", progress=progress, init=through)
    told = [line for line in progress.lines if line.startswith("warning: gone is gone")]
    assert len(told) == 1 and "it has seen the test" in told[0]


def test_a_start_on_the_same_log_in_another_order_is_told(
    tied: Dataset, tied_run: Path, tmp_path: Path
) -> None:
    log = log_of([walk(user) for user in range(36)])
    hashed = Dataset.from_frames(log, out=tmp_path / "hash", ties="hash", progress=False)
    progress = Quiet()
    train_run(recipe(), hashed.path, tmp_path / "x", progress=progress, init=tied_run)
    told = [line for line in progress.lines if "it may have seen the test" in line]
    assert len(told) == 1 and "data of the same users and items" in told[0]
    progress = Quiet()  # what an update's start has seen is left out
    check_start(tied_run, hashed, split_events(hashed), progress, update=True)
    assert not progress.lines


def test_moments_need_a_split_by_time() -> None:
    with pytest.raises(ConfigError, match=r"valid_from and test_from need split\.kind=time"):
        recipe("tied-day", valid_from=0.5)


def test_the_command_line_names_splits(tied: Dataset, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = ["train", "sasrec", "--data", str(tied.path), "--out", str(run)]
    options = ["--split", "time", "--valid-from", "2024-10-07", "--test-from", "2024-10-08"]
    shown = CliRunner().invoke(app, [*command, *options, "training.epochs=1", "model.dim=8"])
    assert shown.exit_code == 0, shown.output
    assert (
        "validation from 2024-10-07, test from 2024-10-08"
        in read_json(run / "report.json")["protocol"]
    )
    wrong = CliRunner().invoke(app, [*command[:-1], str(tmp_path / "b"), "--split", "tied"])
    assert "split.kind='tied'" in str(wrong.exception)


def test_users_are_the_cases_of_given_splits(tied: Dataset, tmp_path: Path) -> None:
    """Give events of the last two days to validation and test: several cases of a user."""
    marked = Dataset.from_frames(
        log_of([walk(user) for user in range(36)]), out=tmp_path / "marked", progress=False
    )
    marks = np.zeros(marked.n_events, dtype=np.int8)
    days = np.asarray(marked.timestamps) / 86_400.0 - 20_000
    marks[days == 4], marks[days == 5] = 1, 2
    np.save(marked.path / "splits.npy", marks)
    file = marked.path / "dataset.json"
    file.write_text(file.read_text().replace('"splits": null', '"splits": "given"'))
    report = train_run(recipe(), marked.path, tmp_path / "run", progress=Quiet())
    assert report["protocol"].startswith("the splits that the data came with")
    assert report["users_tested"] == int((marks == 2).sum()) == 12 * (1 + 2 + 3)
    found = compare_runs([tmp_path / "run"])
    assert found.blocks[0].users == 72
    assert split_events(open_dataset(marked.path)).kind == "given"
