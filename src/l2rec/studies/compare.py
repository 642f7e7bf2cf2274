"""Finished runs side by side: test scores, paired tests between them, segments of users, costs.

    run folders ── read_run ──┐
                              ├─ compare ─ Comparison ─ tables.py: console, Markdown, CSV
    data set ── population ───┘

Runs of one recipe that differ only in the seed, or in options that cannot change the result, are
one row, mean ± standard deviation over seeds; the tests compare each user's mean over seeds. Every
test is a two-sided paired t-test over users. The tests of all rows and segments by one metric in
one view of the history, a table, are a family: beside p stands p_holm, which is corrected for it.
"""

from __future__ import annotations

__all__ = [
    "Block",
    "Comparison",
    "Difference",
    "Entry",
    "FinishedRun",
    "Line",
    "Population",
    "Score",
    "compare",
    "compare_runs",
    "family_size",
    "over_seeds",
    "population",
    "ranked_users",
    "read_run",
]

import json
import math
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from l2rec.config import RunConfig
from l2rec.data.dataset import Dataset, open_dataset
from l2rec.data.ragged import Ragged
from l2rec.data.splits import Cases
from l2rec.errors import CheckpointError, DataError, L2RecError
from l2rec.evaluation.ranks import Ranks, aligned, read_ranks
from l2rec.evaluation.significance import holm, paired_values_test
from l2rec.evaluation.tied_day import beside_leave_one_out
from l2rec.metrics import coverage, popularity_bias
from l2rec.runs.folder import (
    RANKS,
    TIED_RANKS,
    load_shown_config,
    read_report,
    require_finished,
    resumed_from,
    split_of,
)
from l2rec.runs.numbers import MAIN, METRICS
from l2rec.runs.remarks import LEAKY, is_leaky, remarks_of, together

TESTED = (MAIN, "recall@10")
"""Metrics whose differences are tested."""
LISTED = 10
"""Length of the recommendation lists that coverage and popularity bias describe."""
COVERAGE, BIAS = f"coverage@{LISTED}", f"popularity_bias@{LISTED}"
LISTS = {COVERAGE: f"cov@{LISTED}", BIAS: f"bias@{LISTED}"}
"""Column heading of each metric of recommendation lists."""
SHORT, MEDIUM = 5, 10
"""Most events of a short and of a medium history."""
HEAD = 0.2
"""Share of the catalog that counts as its head: the items with the most training events."""
EVERYONE, COLD = "all", "cold target"
"""Names of the segment of all users and of the one whose targets have no training event."""
FLOORS = ("popularity", "last item neighbour", "co-occurrence")
"""Baselines of a report that follow from the data alone."""

Rows = npt.NDArray[np.bool_]


# -- reading -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FinishedRun:
    """A run folder: its recipe as `load_shown_config` reads it, identity, report and test ranks of
    each user.
    """

    path: Path
    config: RunConfig
    identity: Mapping[str, Any]
    report: Mapping[str, Any]
    ranks: Ranks


@dataclass(frozen=True)
class Population:
    """The M ranked users as their data set describes them, in the order of their ranks.

    ``segments``: name -> [M] bool. ``histories``: M rows, the history that each user's list was
    made from. ``counts``: [N] int64 training events of each item.
    """

    segments: dict[str, Rows]
    histories: Ragged
    counts: npt.NDArray[np.int64]


def read_run(path: Path, dataset: Dataset | None = None, *, tied_day: bool = False) -> FinishedRun:
    """Read a finished run, with its ranks by its own protocol or by the tied-day one.

    ``dataset``: needed if it stores ranks without users, as in `results/`.

    Raises:
        CheckpointError: not a run folder, not finished, or damaged.
        DataError: ``dataset`` is not the one that the run was trained on, or there are no ranks by
            the tied-day protocol.
    """
    bare = not (path / "config.yaml").is_file() and (path / "report.json").is_file()
    if bare and "averaged" in read_report(path):
        raise CheckpointError(
            f"{path} is an average, not a run; a row `average_of` of an experiment of your own is "
            "tested against runs (l2rec experiment)"
        )
    config, identity = load_shown_config(path)
    require_finished(path)
    trained_on = identity["dataset"]["fingerprint"]
    if dataset is not None and dataset.fingerprint != trained_on:
        raise DataError(
            f"{path} was made on data {trained_on}, {dataset.path} is {dataset.fingerprint}; give "
            "the folder it was made on with --data"
        )
    if tied_day and not (path / TIED_RANKS).is_file():
        raise DataError(
            f"{path} has no {TIED_RANKS}: no two events of a user tie at the end, the split is not "
            f"leave-one-out, or the run is of an earlier version; "
            f"`l2rec evaluate {shlex.quote(str(path))} --tied-day` says which, and writes it"
        )
    users = None
    if dataset is not None and not tied_day:
        users = partial(ranked_users, config, dataset)
    ranks = read_ranks(path / (TIED_RANKS if tied_day else RANKS), users)
    return FinishedRun(path, config, identity, read_report(path), ranks)


def ranked_users(config: RunConfig, dataset: Dataset) -> tuple[list[str], npt.NDArray[np.int64]]:
    """Return the ids [M] and targets of the users whom a run ranks for its test, in their order."""
    cases = split_of(config, dataset).test
    return _ids(dataset, cases), cases.targets.values.astype(np.int64)


def _ids(dataset: Dataset, cases: Cases) -> list[str]:
    ids: list[str] = dataset.user_ids.take(pa.array(cases.users)).to_pylist()
    return ids


def population(cases: Cases, counts: npt.NDArray[np.int64]) -> Population:
    """Divide users into segments by the length of their history and the popularity of their target.

    ``cases``: M; where they have sets of targets, these divide nobody. ``counts``: [N] training
    events of each item.
    Head: the fifth of the catalog with the most training events (ties go to the lower item int);
    tail: the rest; cold: the part of the tail without a training event. Empty segments are left
    out.
    """
    length, targets = cases.histories.lengths, cases.targets.values
    head = np.zeros(len(counts), dtype=bool)
    head[np.argsort(-counts, kind="stable")[: math.ceil(HEAD * len(counts))]] = True
    segments = {
        f"history 1-{SHORT}": length <= SHORT,
        f"history {SHORT + 1}-{MEDIUM}": (length > SHORT) & (length <= MEDIUM),
        f"history {MEDIUM + 1}+": length > MEDIUM,
    }
    if len(targets) == len(cases):
        segments |= {
            "head target": head[targets],
            "tail target": ~head[targets],
            COLD: counts[targets] == 0,
        }
    segments = {name: rows for name, rows in segments.items() if rows.any()}
    return Population(segments, cases.histories, counts)


def _population_of(dataset: Dataset, run: FinishedRun, *, tied_day: bool) -> Population:
    """Build the `Population` of the test cases that a run ranked, in the order of its ranks.

    Raises:
        DataError: its users or targets are not those of the data set's test split.
    """
    split, ranks = split_of(run.config, dataset), run.ranks
    sets = beside_leave_one_out(dataset, split) if tied_day else None
    cases = split.test if sets is None else sets
    ids = pa.array(ranks.users, dataset.user_ids.type)
    users = pc.fill_null(pc.index_in(ids, value_set=dataset.user_ids), -1).to_numpy()
    if not np.array_equal(users, cases.users):  # ranks in another order: each user has one case
        cases = cases.take(np.searchsorted(cases.users, users).clip(max=len(cases) - 1))
    fits = cases.users == users
    if len(cases.targets.values) == len(ranks.targets):
        fits[
            np.repeat(np.arange(len(cases)), cases.targets.lengths)[
                cases.targets.values != ranks.targets
            ]
        ] = False
    else:
        fits[:] = False
    if not fits.all():
        raise DataError(
            f"{np.count_nonzero(~fits):,} of {len(fits):,} ranked users differ from the test split "
            f"of {dataset.path}; evaluate the runs again"
        )
    counts = np.bincount(split.train.values, minlength=dataset.n_items).astype(np.int64)
    return population(cases, counts)


def _dataset_of(runs: Sequence[FinishedRun]) -> Dataset | None:
    """Open the data set at the path that any of the runs names; None if it is at none of them."""
    fingerprint = runs[0].ranks.fingerprint
    for run in runs:
        try:
            dataset = open_dataset(Path(run.identity["dataset"]["path"]))
        except L2RecError:
            continue
        if dataset.fingerprint == fingerprint:
            return dataset
    return None


# -- the comparison ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """A metric of one row: mean and sample standard deviation over seeds (None for one seed)."""

    mean: float
    sd: float | None


@dataclass(frozen=True)
class Difference:
    """A mean difference over users and the p value of its two-sided paired t-test.

    ``p_holm``: p, corrected for all tests of its family; None of a lead, which is in none.
    """

    difference: float
    p: float
    p_holm: float | None = None


@dataclass(frozen=True)
class Line:
    """One row of a block.

    ``scores``: by metric. ``tests``: this row minus the reference, by tested metric.
    """

    scores: dict[str, Score]
    tests: dict[str, Difference]


@dataclass(frozen=True)
class Block:
    """All rows on one segment of users, with the history in the ranking or masked.

    ``best``: the row with the highest NDCG@10. ``rival``: the second highest, None if there is one
    row. ``lead``: best minus rival. ``reference``: the row that every line is tested against: the
    best, or the one asked for.
    """

    segment: str
    masked: bool
    users: int
    best: str
    rival: str | None
    lead: dict[str, Difference]
    reference: str
    lines: dict[str, Line]


@dataclass(frozen=True)
class Entry:
    """The runs behind one row and their costs: means over seeds, None if a report lacks one."""

    label: str
    method: str
    runs: list[str]
    seeds: list[int]
    backbone: str
    hardware: str
    trained_parameters: float | None
    training_seconds: float | None
    tokens_seen: float | None
    peak_memory_mb: float | None


@dataclass(frozen=True)
class Comparison:
    """The result of `compare`.

    ``blocks``: every segment with the history not masked, then masked; all users come first.
    ``against``: the row that was asked for as the reference of all tests; None: the best of each
    block.
    ``floors``: scores of the baselines that need no training, by name. ``notes``: what is missing,
    and why.
    """

    data: str
    fingerprint: str
    protocol: str
    entries: list[Entry]
    blocks: list[Block]
    against: str | None
    floors: dict[str, dict[str, float]]
    notes: list[str]


# -- comparing -----------------------------------------------------------------------------------


def compare_runs(
    paths: Sequence[Path],
    *,
    data: Path | None = None,
    against: Path | None = None,
    group: bool = True,
    tied_day: bool = False,
) -> Comparison:
    """Read run folders and compare them.

    Args:
        paths: run folders.
        data: folder of their data set; by default the path that the runs were trained on.
        against: the run that every other is tested against, instead of the best.
        group: show runs of one recipe with different seeds as one row.
        tied_day: compare by the tied-day protocol.

    Raises:
        DataError: runs of different data, protocols, users or targets; a run given twice.
        CheckpointError: a folder that is not a finished run.
    """
    folders: dict[Path, Path] = {}
    for path in paths:
        if path.resolve() in folders:
            raise DataError(f"{path} is given twice; name each run once")
        folders[path.resolve()] = path
    if against is not None:
        folders.setdefault(against.resolve(), against)
    dataset = None if data is None else open_dataset(data)
    runs = [read_run(path, dataset, tied_day=tied_day) for path in folders.values()]
    runs = [runs[0], *(_paired(runs[0], run) for run in runs[1:])]
    dataset = dataset or _dataset_of(runs)
    known = None if dataset is None else _population_of(dataset, runs[0], tied_day=tied_day)
    reference = None if against is None else folders[against.resolve()]
    return compare(runs, known, against=reference, group=group, tied_day=tied_day)


def _paired(first: FinishedRun, run: FinishedRun) -> FinishedRun:
    """Return ``run`` with its users in the order of ``first``.

    Raises:
        DataError: other users, targets, data or protocol.
    """
    try:
        return replace(run, ranks=aligned(first.ranks, run.ranks))
    except DataError as error:
        raise DataError(f"{first.path} and {run.path} cannot be compared: {error}") from None


def compare(
    runs: Sequence[FinishedRun],
    known: Population | None,
    *,
    against: Path | None = None,
    group: bool = True,
    tied_day: bool = False,
) -> Comparison:
    """Compare scores and costs of runs whose ranks are of the same users in the same order.

    ``known``: without it there are no segments and no popularity bias. ``against``: the path of
    one of the runs, the reference of all tests; by default the best of each block. ``tied_day``:
    the ranks are by this protocol.

    Raises:
        DataError: two runs of one recipe and seed, to be grouped.
    """
    recipes = _recipes(runs, group)
    reference = next(
        (label for label, seeds in recipes.items() if against in [run.path for run in seeds]), None
    )
    first = runs[0]
    users = np.unique(first.ranks.users, return_inverse=True)[1]
    segments = {EVERYONE: np.ones(len(users), dtype=bool)}
    segments |= {} if known is None else known.segments
    data = first.report["dataset"]
    views = [
        [
            _block(recipes, segment, rows, users, masked, known, int(data["items"]), reference)
            for segment, rows in segments.items()
        ]
        for masked in (False, True)
    ]
    for blocks in views:
        _correct(blocks, reference)
    return Comparison(
        data=data["name"],
        fingerprint=first.ranks.fingerprint,
        protocol=first.ranks.protocol,
        entries=[_entry(label, seeds) for label, seeds in recipes.items()],
        blocks=[block for blocks in views for block in blocks],
        against=reference,
        floors=_floors(runs, tied_day),
        notes=[*_remarks(recipes), *_notes(runs, known, tied_day)],
    )


def _floors(runs: Sequence[FinishedRun], tied_day: bool) -> dict[str, dict[str, float]]:
    """Collect the baselines' scores from all runs: they agree, but older reports lack some."""
    reports = [run.report.get("tied_day", {}) if tied_day else run.report for run in runs]
    scores = {name: s for report in reports for name, s in report.get("scores", {}).items()}
    return {name: scores[name] for name in FLOORS if name in scores}


def _recipes(runs: Sequence[FinishedRun], group: bool) -> dict[str, list[FinishedRun]]:
    """Group runs into rows, by the row's label: the recipe, and the path where other rows have the
    same recipe or the command changed options of it.

    Raises:
        DataError: two runs of one recipe and seed.
    """
    alike: dict[str, list[FinishedRun]] = {}
    for run in runs:
        blended = " blended" * ("blend" in run.report)
        key = str(run.path)
        if group:
            key = _recipe_key(run.config, run.identity, run.report.get("stopped")) + blended
        same = next((r for r in alike.get(key, ()) if r.config.seed == run.config.seed), None)
        if same is not None:
            raise DataError(
                f"{same.path} and {run.path} are one recipe with seed {run.config.seed}; leave one "
                "out, or give --no-group"
            )
        alike.setdefault(key, []).append(run)
    names = [
        str(seeds[0].report.get("recipe") or seeds[0].report["method"])
        + LEAKY * is_leaky(run.config for run in seeds)
        for seeds in alike.values()
    ]
    return {
        name
        if names.count(name) == 1 and not _changed(seeds[0])
        else f"{name} ({seeds[0].path})": seeds
        for name, seeds in zip(names, alike.values(), strict=True)
    }


def _changed(run: FinishedRun) -> bool:
    """Say whether the command of a run changed options of its recipe."""
    words = shlex.split(str(run.report.get("command", "")))
    return any(re.match(r"(model|training|backbone)\.[\w.]+=", word) for word in words)


def _recipe_key(config: RunConfig, identity: Mapping[str, Any], stopped: str | None = None) -> str:
    """Return a text that is equal for two runs of one recipe.

    They may differ in the seed, also that of their pre-training, and in what cannot have changed
    the result: how often logs and checkpoints were written, and a time limit that neither ended the
    run nor shaped its learning rate (with a cosine schedule it does). What options were before a
    resume that changed them counts too.
    """
    start = identity.get("init")
    if start is not None and (Path(start) / "config.yaml").is_file():
        start = _recipe_key(*load_shown_config(Path(start)))
    options = config.model_dump(mode="json") | {"seed": None}
    training = options["training"]
    of_no_effect = {"log_every", "checkpoint_minutes"}
    if training["schedule"] == "constant":
        of_no_effect.add("max_minutes")
        if stopped in (None, "max_minutes"):
            options["ended_by"] = training["max_minutes"]
    stages = [
        {key: value for key, value in stage.items() if key not in of_no_effect}
        for stage in (*resumed_from(identity), training)
    ]
    options["training"] = [stage for stage in stages if stage]
    trained_on = [identity["dataset"]["fingerprint"], identity["backbone"], start]
    return json.dumps([options, trained_on], sort_keys=True)


def _entry(label: str, seeds: Sequence[FinishedRun]) -> Entry:
    """Describe one row: its runs, seeds and mean costs."""
    reports = [run.report for run in seeds]
    backbone: Mapping[str, Any] = reports[0].get("backbone") or {}

    def mean(cost: Callable[[Mapping[str, Any]], Any]) -> float | None:
        costs = [cost(report) for report in reports]
        return None if None in costs else float(np.mean(costs))

    return Entry(
        label=label,
        method=str(reports[0]["method"]),
        runs=[str(run.path) for run in seeds],
        seeds=[run.config.seed for run in seeds],
        backbone=str(backbone.get("name") or "none"),
        hardware=", ".join(dict.fromkeys(str(r.get("hardware") or "unknown") for r in reports)),
        trained_parameters=mean(lambda r: (r.get("backbone") or {}).get("trained_parameters")),
        training_seconds=mean(lambda r: r.get("training_seconds")),
        tokens_seen=mean(lambda r: r.get("tokens_seen")),
        peak_memory_mb=mean(lambda r: r.get("peak_memory_mb")),
    )


def _block(
    recipes: Mapping[str, Sequence[FinishedRun]],
    segment: str,
    rows: Rows,
    users: npt.NDArray[np.int64],
    masked: bool,
    known: Population | None,
    n_items: int,
    reference: str | None,
) -> Block:
    """Score and test every row on the users ``rows`` [M] bool; ``users``: [M] ints, each's."""
    scores: dict[str, dict[str, Score]] = {}
    tested: dict[str, dict[str, npt.NDArray[np.float64]]] = {}
    for label, seeds in recipes.items():
        values = {  # [S, m]
            metric: np.stack([run.ranks.values(metric, masked=masked)[rows] for run in seeds])
            for metric in METRICS
        }
        scores[label] = {metric: over_seeds(v.mean(1)) for metric, v in values.items()}
        if not masked:
            scores[label] |= _list_scores(seeds, rows, known, n_items)
        tested[label] = {metric: values[metric].mean(0) for metric in TESTED}
    best, *others = sorted(scores, key=lambda label: -scores[label][MAIN].mean)
    rival = others[0] if others else None
    reference = reference or best
    lines = {
        label: Line(by_metric, _tests(tested, label, reference, users[rows]))
        for label, by_metric in scores.items()
    }
    lead = {} if rival is None else _tests(tested, best, rival, users[rows])
    return Block(segment, masked, int(rows.sum()), best, rival, lead, reference, lines)


def over_seeds(of_seeds: npt.ArrayLike) -> Score:
    """Take mean and standard deviation over seeds."""
    values = np.asarray(of_seeds, dtype=np.float64)
    return Score(float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else None)


def _list_scores(
    seeds: Sequence[FinishedRun], rows: Rows, known: Population | None, n_items: int
) -> dict[str, Score]:
    """Compute coverage and popularity bias of these users' lists; without lists, nothing.

    Popularity bias needs histories and counts, so it is left out if ``known`` is None, or where
    training holds no item of the histories.
    """
    tops = [run.ranks.top[rows, :LISTED] for run in seeds if run.ranks.top is not None]
    if len(tops) < len(seeds):
        return {}
    scores = {COVERAGE: over_seeds([coverage(top, n_items) for top in tops])}
    if known is not None:
        histories = known.histories.take(np.flatnonzero(rows))
        found = [bias_of(top, histories, known.counts) for top in tops]
        if biases := [bias for bias in found if bias is not None]:
            scores[BIAS] = over_seeds(biases)
    return scores


def bias_of(
    top: npt.NDArray[np.integer], histories: Ragged, counts: npt.NDArray[np.integer]
) -> float | None:
    """Return `popularity_bias`; None where no history has an item that was trained on."""
    trained = bool(counts[histories.values].any())
    return popularity_bias(top, histories, counts) if trained else None


def _tests(
    tested: Mapping[str, Mapping[str, npt.NDArray[np.float64]]],
    label: str,
    reference: str,
    users: npt.NDArray[np.int64],
) -> dict[str, Difference]:
    """Test ``label`` minus ``reference``; a row is not tested with itself, nor on a single user."""
    tests = {}
    for metric in TESTED:
        a, b = tested[label][metric], tested[reference][metric]
        if label != reference and len(np.unique(users)) > 1:
            test = paired_values_test(a, b, users)
            tests[metric] = Difference(test.difference, test.p)
    return tests


def family_size(blocks: Sequence[Block], against: str | None) -> int:
    """Count the tests of one metric in the blocks of one view of the history.

    The best row of a block was chosen by the scores that are tested, and could have been any: then
    all pairs of rows count, whatever the tests that are made.
    """
    tested = [len(block.lines) for block in blocks if block.lead]
    return sum(n - 1 if against is not None else n * (n - 1) // 2 for n in tested)


def _correct(blocks: Sequence[Block], against: str | None) -> None:
    """Give the tests in the blocks of one view of the history their ``p_holm``."""
    lines = [line.tests for block in blocks for line in block.lines.values()]
    for metric in TESTED:
        tested = [tests for tests in lines if metric in tests]
        ps = holm([tests[metric].p for tests in tested], family_size(blocks, against))
        for tests, p in zip(tested, ps, strict=True):
            tests[metric] = replace(tests[metric], p_holm=p)


def _remarks(recipes: Mapping[str, Sequence[FinishedRun]]) -> list[str]:
    """Say what to know beside the scores of a row."""
    return together({label: remarks_of(run.config for run in s) for label, s in recipes.items()})


def _notes(runs: Sequence[FinishedRun], known: Population | None, tied_day: bool) -> list[str]:
    """Say what and who is missing and why, and how to read scores of cold targets."""
    notes = []
    if tied_day and (left_out := runs[0].report.get("tied_day", {}).get("users_left_out")):
        notes.append(
            f"{left_out:,} users are left out: their last events of one time are more than two, "
            "and runs that are trained leave-one-out have seen some of them"
        )
    if known is None:
        path = runs[0].identity["dataset"]["path"]
        notes.append(
            f"no segments and no popularity bias: data {runs[0].ranks.fingerprint} is no longer at "
            f"{path}; give its folder with --data"
        )
    listless = [str(run.path) for run in runs if run.ranks.top is None]
    if listless:
        notes.append(
            f"no coverage and no popularity bias of {', '.join(listless)}: the folders hold no "
            "lists; `l2rec evaluate` of a run writes them"
        )
    if known is not None and COLD in known.segments:
        targets = runs[0].ranks.targets[known.segments[COLD]]
        notes.append(
            f"{COLD}: {len(targets):,} users share {len(np.unique(targets)):,} of the "
            f"{np.count_nonzero(known.counts == 0):,} items without a training event; vectors that "
            "were trained only as negatives can lie close together and move up all at once, so a "
            "high score here need not mean that the method knew which of them it was"
        )
    return notes
