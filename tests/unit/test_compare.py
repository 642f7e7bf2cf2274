"""Runs side by side: numbers worked out by hand, tests against scipy, every refusal."""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from scipy import stats
from statsmodels.stats.multitest import multipletests

from l2rec.config import resolve
from l2rec.data.dataset import Dataset
from l2rec.data.ragged import Ragged
from l2rec.data.splits import Cases, leave_one_out
from l2rec.errors import CheckpointError, ConfigError, DataError
from l2rec.evaluation.ranking import Evaluation
from l2rec.evaluation.ranks import write_ranks
from l2rec.metrics import coverage, popularity_bias, rank_values, ranking_metrics
from l2rec.studies import compare as comparing
from l2rec.studies.compare import (
    Block,
    Comparison,
    FinishedRun,
    Population,
    compare,
    compare_runs,
    population,
    read_run,
)
from l2rec.studies.tables import csv_text, markdown, tables, write_comparison

Make = Callable[..., Path]
USERS = 40
FLOOR = {"ndcg@10": 0.25, "ndcg@10_masked": 0.5, "coverage@10": 0.125}


def ranks_of(seed: int, best: int = 1) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.random.default_rng(seed).integers(best, 28, USERS).astype(np.float64)


@pytest.fixture
def make(tmp_path: Path, chains: Dataset) -> Make:
    """A finished run folder with given ranks, and nothing else that no comparison reads."""

    def run(
        name: str,
        ranks: Sequence[float] | np.ndarray[Any, Any],
        *,
        seed: int = 0,
        method: str = "sasrec:SASRec",
        recipe: str = "sasrec",
        dim: int = 64,
        model: Mapping[str, Any] | None = None,
        data: Dataset = chains,
        fingerprint: str = "",
        protocol: str = "full",
        init: Path | None = None,
        order: Sequence[int] = range(USERS),
        seconds: float = 60.0,
        training: Mapping[str, Any] | None = None,
        stopped: str = "patience",
        command: str = "",
        earlier: Sequence[Mapping[str, Any]] = (),
    ) -> Path:
        options = {"dim": dim} | dict(model or {})
        values = {"method": f"l2rec.methods.{method}", "seed": seed, "model": options}
        values["training"] = dict(training or {})
        fingerprint = fingerprint or data.fingerprint
        identity = {
            "run_version": 1,
            "init": None if init is None else str(init),
            "config": resolve(values, where="test").model_dump(mode="json"),
            "dataset": {"path": str(data.path), "name": "chains", "fingerprint": fingerprint},
            "backbone": None,
            "earlier_training": list(earlier),
        }
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.yaml").write_text(yaml.safe_dump(identity))
        report = {
            "method": "SASRec",
            "recipe": recipe,
            "command": command,
            "dataset": {"name": "chains", "items": data.n_items},
            "backbone": {"name": "none", "trained_parameters": 1234},
            "hardware": "a processor",
            "training_seconds": seconds,
            "stopped": stopped,
            "tokens_seen": 2_000_000,
            "scores": {"SASRec": {}, "popularity": FLOOR},
        }
        (folder / "report.json").write_text(json.dumps(report))
        split = leave_one_out(data.sequences)
        top = np.random.default_rng(seed).permuted(
            np.tile(np.arange(data.n_items), (USERS, 1)), axis=1
        )
        every = Evaluation(
            ranks=np.asarray(ranks, dtype=np.float64),
            ranks_masked=np.maximum(1.0, np.asarray(ranks) - 2.0),
            users=split.test.users,
            top=top[:, :20].astype(np.int32),
            targets=split.test.targets.values.astype(np.int64),
            n_items=data.n_items,
        )
        write_ranks(
            folder / "ranks.parquet",
            every.take(np.asarray(order)),
            data.user_ids.to_pylist(),
            fingerprint=fingerprint,
            protocol=protocol,
        )
        return folder

    return run


def block(found: Comparison, segment: str = "all", masked: bool = False) -> Block:
    return next(b for b in found.blocks if (b.segment, b.masked) == (segment, masked))


# -- segments ------------------------------------------------------------------------------------


def cases(histories: Ragged, targets: list[int]) -> Cases:
    rows = Ragged.from_rows([[target] for target in targets])
    return Cases(np.arange(len(targets)), histories, rows)


def test_segments_by_hand() -> None:
    histories = Ragged.from_rows([[0] * n for n in (1, 5, 6, 10, 11)])
    counts = np.array([3, 9, 0, 3, 3, 1, 0, 0, 0, 0])  # the head of ten items: 1, and 0 of the 3s
    segments = population(cases(histories, [0, 1, 2, 3, 5]), counts).segments
    assert {name: rows.tolist() for name, rows in segments.items()} == {
        "history 1-5": [True, True, False, False, False],
        "history 6-10": [False, False, True, True, False],
        "history 11+": [False, False, False, False, True],
        "head target": [True, True, False, False, False],
        "tail target": [False, False, True, True, True],
        "cold target": [False, False, True, False, False],
    }


def test_segments_of_nobody_are_left_out() -> None:
    found = population(cases(Ragged.from_rows([[0, 1]]), [0]), np.array([2, 1, 1]))
    assert list(found.segments) == ["history 1-5", "head target"]


def test_cold_targets_come_with_a_warning(make: Make, tmp_path: Path) -> None:
    """Five users whose one target nobody else ever met, and 35 who have other targets."""
    rows = [[0, 1, 2, 3, 9 if user < 5 else user % 4] for user in range(USERS)]
    run = read_run(make("a", ranks_of(1)))
    targets = np.array([row[-1] for row in rows])
    counts = np.bincount(np.concatenate([row[:-2] for row in rows]), minlength=30)
    histories = Ragged.from_rows([row[:-1] for row in rows])
    known = population(cases(histories, targets.tolist()), counts)
    assert known.segments["cold target"].sum() == 5 + sum(u % 4 == 3 for u in range(5, USERS))
    found = compare([replace(run, ranks=replace(run.ranks, targets=targets))], known)
    (note,) = found.notes
    assert note.startswith("cold target: 14 users share 2 of the 27 items without a training event")
    assert note in markdown(found)


# -- scores and tests ----------------------------------------------------------------------------


def test_scores_and_tests_of_two_runs(make: Make, chains: Dataset) -> None:
    good, bad = ranks_of(1), ranks_of(2, best=4)
    shuffled = np.random.default_rng(0).permutation(USERS)
    a, b = make("a", good, recipe="first"), make("b", bad, recipe="second", dim=32, order=shuffled)
    found = compare_runs([b, a])
    assert (found.data, found.fingerprint, found.protocol) == ("chains", chains.fingerprint, "full")
    assert [entry.label for entry in found.entries] == ["second", "first"] and not found.notes
    split = leave_one_out(chains.sequences)
    counts = np.bincount(split.train.values, minlength=chains.n_items)
    cases = {"all": np.ones(USERS, bool)}
    cases |= population(split.test, counts).segments
    assert len(found.blocks) == 2 * len(cases) and {"head target", "history 6-10"} <= cases.keys()
    for masked in (False, True):
        ranks = {"first": good, "second": bad}
        ranks = {n: np.maximum(1, r - 2) if masked else r for n, r in ranks.items()}
        for segment, rows in cases.items():
            got = block(found, segment, masked)
            expected = {name: ranking_metrics(r[rows]) for name, r in ranks.items()}
            best, rival = sorted(expected, key=lambda name: -expected[name]["ndcg@10"])
            assert (got.users, got.best, got.rival) == (rows.sum(), best, rival)
            assert got.reference == best and got.lines[best].tests == {}
            for name, metrics in expected.items():
                scores = got.lines[name].scores
                assert {m: scores[m].mean for m in metrics} == pytest.approx(metrics)
                assert all(score.sd is None for score in scores.values())
            for metric in ("ndcg@10", "recall@10"):
                a_values, b_values = (rank_values(ranks[n][rows], metric) for n in (best, rival))
                lead, test = got.lead[metric], got.lines[rival].tests[metric]
                assert lead.difference == -test.difference and lead.p == test.p
                assert lead.difference == pytest.approx(float((a_values - b_values).mean()))
                assert lead.p == pytest.approx(float(stats.ttest_rel(a_values, b_values).pvalue))
    assert {b.best for b in found.blocks} == {"first", "second"}, "of each segment its own"


def test_coverage_and_bias_are_of_the_lists(make: Make, chains: Dataset) -> None:
    found = compare_runs([make("a", ranks_of(1))])
    split = leave_one_out(chains.sequences)
    counts = np.bincount(split.train.values, minlength=chains.n_items)
    top = np.random.default_rng(0).permuted(np.tile(np.arange(30), (USERS, 1)), axis=1)[:, :10]
    head = population(split.test, counts).segments["head target"]
    for segment, chosen in {"all": np.ones(USERS, bool), "head target": head}.items():
        scores = block(found, segment).lines["sasrec"].scores
        assert scores["coverage@10"].mean == coverage(top[chosen], chains.n_items)
        histories = split.test.histories.take(np.flatnonzero(chosen))
        expected = popularity_bias(top[chosen], histories, counts)
        assert scores["popularity_bias@10"].mean == pytest.approx(expected)
    assert "coverage@10" not in block(found, masked=True).lines["sasrec"].scores


def test_people_of_new_items_alone_have_no_popularity_bias(
    make: Make, chains: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a split by time: a segment whose histories hold nothing that was trained on."""
    split = leave_one_out(chains.sequences)
    counts = np.bincount(split.train.values, minlength=chains.n_items)
    counts[split.test.histories.take(np.array([0])).values] = 0
    first = np.arange(len(split.test)) == 0
    known = Population({"newcomers": first}, split.test.histories, counts)
    monkeypatch.setattr(comparing, "_population_of", lambda *_, **__: known)
    found = compare_runs([make("a", ranks_of(1))])
    scores = {b.segment: b.lines["sasrec"].scores for b in found.blocks if not b.masked}
    assert "popularity_bias@10" in scores["all"]
    assert "popularity_bias@10" not in scores["newcomers"] and "coverage@10" in scores["newcomers"]
    assert "bias@10" in markdown(found)


def test_seeds_of_a_recipe_are_one_row(make: Make) -> None:
    ranks = [ranks_of(seed) for seed in (1, 2, 3)]
    seeds = [make(f"s{n}", r, seed=n, seconds=60.0 * n) for n, r in enumerate(ranks)]
    other = make("other", ranks_of(4, best=5), recipe="other", dim=32)
    found = compare_runs([seeds[0], other, *seeds[1:]])
    ours, _ = found.entries
    assert ours.seeds == [0, 1, 2] and ours.runs == [str(run) for run in seeds]
    assert (ours.training_seconds, ours.peak_memory_mb) == (60.0, None)
    assert (ours.trained_parameters, ours.tokens_seen) == (1234, 2e6)
    got = block(found)
    for metric in ("ndcg@10", "mrr", "recall@5"):
        means = [ranking_metrics(r)[metric] for r in ranks]
        score = got.lines["sasrec"].scores[metric]
        assert score.mean == pytest.approx(statistics.fmean(means))
        assert score.sd == pytest.approx(statistics.stdev(means))
    of_users = np.mean([rank_values(r, "ndcg@10") for r in ranks], axis=0)
    theirs = stats.ttest_rel(of_users, rank_values(ranks_of(4, best=5), "ndcg@10"))
    assert got.lead["ndcg@10"].p == pytest.approx(float(theirs.pvalue))


def test_seeds_apart(make: Make) -> None:
    a, b = make("a", ranks_of(1)), make("b", ranks_of(2), seed=1)
    found = compare_runs([a, b], group=False)
    assert [entry.label for entry in found.entries] == [f"sasrec ({a})", f"sasrec ({b})"]
    assert [entry.seeds for entry in found.entries] == [[0], [1]]


@pytest.mark.parametrize(
    ("overrides", "label"),
    [("", "sasrec"), ("seed=3", "sasrec"), ("model.dim=32 'training.lr=1e-3'", "sasrec ({path})")],
)
def test_a_recipe_that_was_changed_is_not_called_by_its_name_alone(
    make: Make, overrides: str, label: str
) -> None:
    run = make("a", ranks_of(1), command=f"l2rec train sasrec --data D --out R {overrides}")
    found = compare_runs([run, make("b", ranks_of(2), recipe="b", dim=16)])
    assert found.entries[0].label == label.format(path=run)


@pytest.mark.parametrize(
    ("training", "stopped", "same"),
    [
        ({"log_every": 50, "checkpoint_minutes": 1}, "patience", True),
        ({"max_minutes": 9}, "patience", True),
        ({"max_minutes": 9}, "max_minutes", False),
        ({"max_minutes": 9, "schedule": "cosine"}, "patience", False),  # the clock sets the rate
        ({"patience": 4}, "patience", False),
    ],
)
def test_what_changes_no_result_is_one_recipe(
    make: Make, training: Mapping[str, Any], stopped: str, same: bool
) -> None:
    constant = {"schedule": "constant"}
    schedule = {"schedule": training.get("schedule", "constant")}
    a = make("a", ranks_of(1), training=schedule)
    b = make("b", ranks_of(2), seed=1, training=constant | training, stopped=stopped)
    found = compare_runs([a, b])
    assert [entry.seeds for entry in found.entries] == ([[0, 1]] if same else [[0], [1]])


def test_options_from_before_a_resume_are_part_of_the_recipe(make: Make) -> None:
    """But not those that change no result."""
    constant = {"schedule": "constant"}
    clean, more_time = (
        make(f"r{n}", ranks_of(n), seed=n, training=constant, earlier=earlier)
        for n, earlier in enumerate([[], [{"max_minutes": 5, "log_every": 3}]])
    )
    other = make("r2", ranks_of(2), seed=2, training=constant, earlier=[{"lr": 0.5}])
    entries = compare_runs([clean, more_time, other]).entries
    assert [entry.seeds for entry in entries] == [[0, 1], [2]]
    slow = {"schedule": "cosine"}  # the limit set the rate
    timed = make("r3", ranks_of(3), seed=3, training=slow, earlier=[{"max_minutes": 5}])
    whole = make("r4", ranks_of(4), seed=4, training=slow)
    assert len(compare_runs([timed, whole]).entries) == 2


def test_pre_training_is_part_of_the_recipe(make: Make, tmp_path: Path) -> None:
    """Starts that differ in the seed alone are one recipe; other starts, or none, are others."""
    starts = [make(f"pre{n}", ranks_of(n), seed=n) for n in (0, 1)]
    starts += [make("wide", ranks_of(1), dim=128), tmp_path / "gone", tmp_path / "gone", None]
    runs = [make(f"r{n}", ranks_of(n), seed=n, init=s) for n, s in enumerate(starts)]
    entries = compare_runs(runs).entries
    assert [entry.seeds for entry in entries] == [[0, 1], [2], [3, 4], [5]]
    assert len({entry.label for entry in entries}) == 4


def test_against_a_run(make: Make) -> None:
    good, bad = make("good", ranks_of(1)), make("bad", ranks_of(1) + 5, recipe="bad", dim=32)
    other = make("other", ranks_of(1) + 2, recipe="other", dim=16)
    inside, outside = (
        compare_runs([good, bad, other], against=bad),
        compare_runs([good, other], against=bad),
    )
    for found in (inside, outside):
        got = block(found)
        assert (got.best, got.rival, got.reference) == ("sasrec", "other", "bad")
        assert got.lines["bad"].tests == {} and got.lines["sasrec"].tests["ndcg@10"].difference > 0
        assert got.lead["ndcg@10"].difference > 0
    assert [entry.label for entry in outside.entries] == ["sasrec", "other", "bad"]


def test_tests_are_corrected_for_all_of_their_table(make: Make) -> None:
    """By statsmodels, over every pair of rows where the best is the reference."""
    first, *others = (
        make(f"r{n}", ranks_of(n, best=1 + 3 * n), recipe=f"r{n}", dim=8 + 2 * n) for n in range(4)
    )
    best, fixed = compare_runs([first, *others]), compare_runs([first, *others], against=first)
    for found, pairs in ((best, 6), (fixed, 3)):
        for metric, masked in product(comparing.TESTED, (False, True)):
            tested = [b for b in found.blocks if b.masked == masked and b.users > 1]
            tests = [line.tests[metric] for b in tested for line in b.lines.values() if line.tests]
            assert len(tests) == 3 * len(tested) and len(tested) > 2
            others_unknown = [1.0] * ((pairs - 3) * len(tested))  # no test is later than they are
            theirs = multipletests([t.p for t in tests] + others_unknown, method="holm")[1]
            assert [t.p_holm for t in tests] == pytest.approx(theirs[: len(tests)].tolist())
            assert all(t.p <= (t.p_holm or 0) for t in tests)
    assert all(t.p_holm is None for b in best.blocks for t in b.lead.values())


@pytest.mark.parametrize("against", [None, "r0"])
def test_where_nothing_differs_there_is_no_dagger(make: Make, against: str | None) -> None:
    """Nine runs whose ranks are drawn alike; of uncorrected tests, some are called most times."""
    draw = np.random.default_rng(0)
    users, base = 300, read_run(make("base", ranks_of(0)))
    ids = [str(user) for user in range(users)]
    ranks = draw.integers(1, 28, users).astype(np.float64)
    empty = Ragged.from_rows([[] for _ in range(users)])
    first = np.arange(users) < users // 2
    known = Population({"first": first, "last": ~first}, empty, np.zeros(1, dtype=np.int64))

    def drawn(n: int) -> FinishedRun:
        new = draw.choice(ranks, users)
        of_run = replace(
            base.ranks, users=ids, ranks=new, ranks_masked=new, targets=np.arange(users), top=None
        )
        return replace(base, path=Path(f"r{n}"), ranks=of_run)

    marked = uncorrected = 0
    for _ in range(40):  # 95% of them is 38
        runs = [drawn(n) for n in range(9)]
        reference = None if against is None else Path(against)
        found = compare(runs, known, group=False, against=reference)
        table = next(t for t in tables(found) if "N@10 by segment" in t.title)
        marked += any("†" in cell for row in table.rows for cell in row)
        tests = [x.tests for b in found.blocks for x in b.lines.values() if not b.masked]
        uncorrected += any(t["ndcg@10"].p < 0.05 for t in tests if t)
    assert marked <= 2 and uncorrected > 15
    assert "corrected by Holm's method" in table.caption
    assert ("all 108 pairs of two rows" if against is None else "24 tests") in table.caption


def test_what_to_know_beside_the_scores_is_said_of_its_row(make: Make) -> None:
    """By the recipe alone: reports of earlier versions say nothing of it."""
    beam = make("p", ranks_of(0), method="p5:P5", recipe="p5")
    vectors = make("v", ranks_of(1))
    text = markdown(compare_runs([beam, vectors]))
    assert "- p5: ranks the items of the 50 codes that its beam search reaches" in text
    assert "MRR@50" in text and "- p5: its T5 is trained from nothing" in text
    assert "beam" not in markdown(compare_runs([vectors]))


def test_what_was_given_held_out_items_is_called_leaky(make: Make) -> None:
    leaky = make("l", ranks_of(0), method="p5:P5", recipe="p5", model={"index": "leaky"})
    found = compare_runs([leaky, make("v", ranks_of(1))])
    assert [entry.label for entry in found.entries] == ["p5 (leaky)", "sasrec"]
    assert any(note.startswith("p5 (leaky): leaky, not to be compared") for note in found.notes)


def test_one_run_alone(make: Make) -> None:
    found = compare_runs([make("a", ranks_of(1))])
    got = block(found)
    assert (got.best, got.rival, got.lead, got.lines["sasrec"].tests) == ("sasrec", None, {}, {})
    assert all("**" not in cell for t in tables(found) for row in t.rows for cell in row)
    assert not any(mark for t in tables(found)[2:] for row in t.best for mark in row)


# -- what is missing, what is refused ------------------------------------------------------------


def test_ranks_from_before_lists_were_kept(make: Make) -> None:
    old, new = make("old", ranks_of(1)), make("new", ranks_of(2), recipe="new", dim=32)
    pq.write_table(
        pq.read_table(old / "ranks.parquet").drop_columns(["top"]), old / "ranks.parquet"
    )
    found = compare_runs([old, new])
    (note,) = found.notes
    assert str(old) in note and str(new) not in note and "`l2rec evaluate` of a run" in note
    got = block(found)
    assert "coverage@10" in got.lines["new"].scores
    assert not {"coverage@10", "popularity_bias@10"} & got.lines["sasrec"].scores.keys()
    assert tables(found)[0].rows[0][9:11] == ["–", "–"]
    by_segment = {table.title.partition(": ")[2]: table for table in tables(found)}
    (row,) = by_segment["cov@10 by segment of users, history not masked"].rows
    assert row[0] == "new"


def test_the_data_set_is_gone(make: Make, chains: Dataset, tmp_path: Path) -> None:
    shutil.copytree(chains.path, tmp_path / "moved")
    runs = [make("a", ranks_of(1)), make("b", ranks_of(2), recipe="b", dim=32)]
    for run in runs:
        identity = yaml.safe_load((run / "config.yaml").read_text())
        identity["dataset"]["path"] = str(tmp_path / "gone")
        (run / "config.yaml").write_text(yaml.safe_dump(identity))
    found = compare_runs(runs)
    assert len(found.notes) == 1 and str(tmp_path / "gone") in found.notes[0]
    assert "--data" in found.notes[0] and found.notes[0] in markdown(found)
    assert [(b.segment, b.masked) for b in found.blocks] == [("all", False), ("all", True)]
    scores = block(found).lines["b"].scores
    assert "coverage@10" in scores and "popularity_bias@10" not in scores
    assert len(tables(found)) == 3
    assert len(compare_runs(runs, data=tmp_path / "moved").blocks) > 2


def test_ranks_alone_are_those_of_the_test_users_in_order(
    make: Make, chains: Dataset, tmp_path: Path
) -> None:
    """What `results/` keeps: no user, no target, no list."""
    whole = [make("a", ranks_of(1)), make("b", ranks_of(2), recipe="b", dim=32)]
    kept = []
    for run in whole:
        table = pq.read_table(run / "ranks.parquet")
        slim = tmp_path / f"{run.name}-kept"
        shutil.copytree(run, slim)
        pq.write_table(table.select(["rank", "rank_masked"]), slim / "ranks.parquet")
        kept.append(slim)
    found, expected = compare_runs(kept, data=chains.path), compare_runs(whole)
    for one, other in zip(found.blocks, expected.blocks, strict=True):
        assert (one.segment, one.lead, one.users) == (other.segment, other.lead, other.users)
    assert (
        compare_runs([whole[0], kept[1]], data=chains.path).blocks[0].lead == found.blocks[0].lead
    )
    assert str(kept[0]) in found.notes[0] and "no coverage" in found.notes[0]
    with pytest.raises(CheckpointError, match=r"keeps ranks alone.*--data"):
        compare_runs(kept)
    fewer = pq.read_table(kept[0] / "ranks.parquet").slice(1)
    pq.write_table(fewer, kept[0] / "ranks.parquet")
    with pytest.raises(CheckpointError, match="keeps ranks alone"):
        compare_runs(kept, data=chains.path)


def test_another_data_set(make: Make, chains: Dataset, tmp_path: Path) -> None:
    run = make("a", ranks_of(1), fingerprint="another")
    assert compare_runs([run]).notes[0].startswith("no segments and no popularity bias")
    with pytest.raises(DataError, match=f"made on data another, .* is {chains.fingerprint}"):
        compare_runs([run], data=chains.path)


def test_runs_that_cannot_be_compared(make: Make) -> None:
    run = make("a", ranks_of(1))
    for name, change, message in [
        ("b", {"fingerprint": "x"}, f"fingerprint '{'[0-9a-f]' * 16}' against 'x'"),
        ("c", {"protocol": "sampled"}, "protocol 'full' against 'sampled'"),
        ("d", {"order": range(1, USERS)}, "40 and 39 ranked users, 39 in common"),
    ]:
        other = make(name, ranks_of(2), recipe=name, dim=32, **change)
        with pytest.raises(DataError, match=message) as error:
            compare_runs([run, other])
        assert str(error.value).startswith(f"{run} and {other} cannot be compared: ")
    targets = make("e", ranks_of(2), dim=32)
    table = pq.read_table(targets / "ranks.parquet")
    column = table["target"].to_numpy().copy()
    column[0] += 1
    pq.write_table(table.set_column(3, "target", [column]), targets / "ranks.parquet")
    with pytest.raises(DataError, match="39 in common"):
        compare_runs([run, targets])
    with pytest.raises(DataError, match="1 of 40 ranked users differ from the test split"):
        compare_runs([targets])
    with pytest.raises(DataError, match="is given twice"):
        compare_runs([run, run.parent / "." / run.name])
    again = make("again", ranks_of(2))
    with pytest.raises(DataError, match=f"{run} and {again} are one recipe with seed 0;.*no-group"):
        compare_runs([run, again])
    assert len(compare_runs([run, again], group=False).entries) == 2


def test_folders_that_are_no_finished_runs(make: Make, tmp_path: Path) -> None:
    run = make("a", ranks_of(1))
    with pytest.raises(CheckpointError, match="not a run folder"):
        compare_runs([run, tmp_path / "nothing"])
    (run / "ranks.parquet").unlink()
    with pytest.raises(CheckpointError, match="holds no ranks"):
        compare_runs([run])
    (run / "report.json").unlink()
    with pytest.raises(CheckpointError, match=r"is not finished.*--resume"):
        compare_runs([run])


# -- tables --------------------------------------------------------------------------------------


@pytest.fixture
def three(make: Make) -> Comparison:
    """Two seeds of one recipe and one run with a name that means something in Markdown."""
    runs = [make(f"s{n}", ranks_of(n), seed=n) for n in (1, 2)]
    return compare_runs([*runs, make("other", ranks_of(3, best=9), recipe="a|b", dim=32)])


def test_tables_are_rectangular(three: Comparison) -> None:
    for table in tables(three):
        assert table.rows, table.title
        for row, best in zip(table.rows, table.best, strict=True):
            assert len(row) == len(best) == len(table.header), table.title


def test_markdown(three: Comparison) -> None:
    text = markdown(three)
    lines = text.splitlines()
    row = next(line for line in lines if line.startswith("| **sasrec** | 2 |"))
    score = block(three).lines["sasrec"].scores["ndcg@10"]
    assert f"**{score.mean:.4f} ± {score.sd:.4f}**" in row
    other = next(line for line in lines if line.startswith("| a\\|b | 1 |"))
    assert other.count(" (p") == 2 and "p < 0.001" in other
    floor = next(line for line in lines if line.startswith("| popularity |"))
    assert "0.2500" in floor and "0.1250" in floor and "**" not in floor
    assert "best by N@10: sasrec; against the best rival, a|b: N@10 +" in text
    assert "| 0.0" in text and "† differs from" in text
    assert "pairs of two rows in all columns." in text
    costs = text[text.index(f"### chains, fingerprint {three.fingerprint}: costs") :]
    assert "| sasrec | SASRec | 1 2 | none | 1,234 | 1.0 min | 2.0 M | – | a processor |" in costs
    assert "means over seeds." in costs


def test_csv_has_every_number(three: Comparison) -> None:
    records = list(csv.DictReader(io.StringIO(csv_text(three))))
    assert len(records) == 2 * len(three.blocks)
    for record in records:
        masked = record["history"] == "masked"
        found = block(three, record["segment"], masked)
        assert record["users"] == str(found.users) and record["reference"] == found.reference
        line = found.lines[record["run"]]
        for metric, score in line.scores.items():
            assert float(record[metric]) == score.mean
            assert record[f"{metric}_sd"] == ("" if score.sd is None else str(score.sd))
        for metric, test in line.tests.items():
            assert float(record[f"{metric}_p"]) == test.p
            assert float(record[f"{metric}_p_holm"]) == test.p_holm
        assert (record["coverage@10"] == "") == masked
        assert record["training_seconds"] == "60.0" and record["peak_memory_mb"] == ""


def test_files_that_are_written(three: Comparison, tmp_path: Path) -> None:
    for name, text in {"t.md": markdown(three), "t.csv": csv_text(three)}.items():
        write_comparison(three, tmp_path / "made" / name)
        assert (tmp_path / "made" / name).read_text() == text
    with pytest.raises(ConfigError, match=r"t\.html: choose a name that ends in \.md or \.csv"):
        write_comparison(three, tmp_path / "t.html")


def test_a_segment_of_one_user_is_not_tested(make: Make) -> None:
    found = compare_runs([make("a", ranks_of(1)), make("b", ranks_of(2), recipe="b", dim=32)])
    alone = [b for b in found.blocks if b.users == 1]
    for got in alone:
        assert got.lead == {} and all(line.tests == {} for line in got.lines.values())
    assert all(math.isfinite(t.p) for b in found.blocks for t in b.lead.values())
