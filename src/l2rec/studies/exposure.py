"""Who and what a model serves: exposure, scores and calibration by groups of items and users.

    exposure_of(run, by=["genre", "gender"], users=FILE)

A model that learns from histories can return their imbalance enlarged (bias amplification, HDRec
§8): what it lists is therefore put beside what people chose.

    exposure      share of the k places of all lists that a group of items has
    trained       its share of the training events;  next: of what was chosen next, on test
    ratio         exposure / trained: above 1 the model gives the group more than people did
    calibration   KL(p || q~) of a user's history p and list q~ over the groups, 0 where they are
                  alike (Steck, RecSys '18), q~ = 0.99 q + 0.01 p

An item with several values of a field counts for each in equal parts. Lists have no item of the
history, as `l2rec recommend` gives them; scores are NDCG@10 with the history masked.
"""

from __future__ import annotations

__all__ = ["HISTORY", "POPULARITY", "Attribute", "exposure_of", "item_attribute", "user_attribute"]

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from l2rec.data.catalog import Catalog
from l2rec.data.dataset import Dataset
from l2rec.data.ragged import Ragged
from l2rec.data.splits import Cases
from l2rec.errors import ConfigError, DataError, nearest
from l2rec.evaluation.ranking import top_k
from l2rec.metrics import coverage
from l2rec.protocols import Progress
from l2rec.runs.folder import load_run_config, open_run_dataset, require_finished, training_split
from l2rec.runs.lists import user_table
from l2rec.runs.predictor import load
from l2rec.runs.scoring import rank, with_cold_items
from l2rec.studies.compare import HEAD, MEDIUM, SHORT, bias_of

Floats = npt.NDArray[np.floating]

POPULARITY, HISTORY = "popularity", "history"
"""Attributes that every data set has: of items, and of users."""
HEAD_GROUP, TAIL_GROUP, COLD_GROUP = "head", "tail", "cold"
EVERYONE, OTHER, MISSING = "all", "(other)", "(none)"
MOST_GROUPS = 20
"""Values of an attribute that are a group of their own: those of the most items or users."""
MOST_CASES = 50_000
"""Test cases that are looked at, evenly from all."""
SMOOTHING = 0.01
METRIC = "ndcg@10"


@dataclass(frozen=True)
class Attribute:
    """Groups of n items or users. ``shares``: [n, G] float32, how much each belongs to each group;
    rows add up to 1.
    """

    name: str
    groups: list[str]
    shares: npt.NDArray[np.float32]


def item_attribute(
    name: str, catalog: Catalog, counts: npt.NDArray[np.integer], separator: str | None = None
) -> Attribute:
    """Group the items by a field of the catalog, or by ``popularity``.

    Args:
        name: the field; ``popularity``: the fifth with the most training events (head), the rest
            (tail), and those without any (cold).
        catalog: the items.
        counts: [N] training events of each item.
        separator: text between the values of an item that has several.

    Raises:
        DataError: there is no such field.
    """
    if name == POPULARITY:
        order = np.argsort(-counts, kind="stable")
        labels = np.full(len(counts), TAIL_GROUP, dtype=object)
        labels[order[: math.ceil(HEAD * len(counts))]] = HEAD_GROUP
        labels[counts == 0] = COLD_GROUP
        found = _grouped(name, [[label] for label in labels])
        return _in_order(found, (HEAD_GROUP, TAIL_GROUP, COLD_GROUP))
    values = catalog.field(name)
    parts = [value.split(separator) if separator else [value] for value in values]
    return _grouped(name, parts)


def user_attribute(
    name: str, dataset: Dataset, cases: Cases, table: Mapping[str, Mapping[str, str]]
) -> Attribute:
    """Group the users of test cases by the length of their ``history``, or by a column of a table.

    ``table``: by column, the value of each user id.

    Raises:
        DataError: no user of the cases is in the table.
    """
    if name == HISTORY:
        lengths = cases.histories.lengths
        names = (f"1-{SHORT} events", f"{SHORT + 1}-{MEDIUM} events", f"{MEDIUM + 1}+ events")
        at = np.searchsorted([SHORT, MEDIUM], lengths)
        return _in_order(_grouped(name, [[names[i]] for i in at]), names)
    values = table[name]
    ids = [dataset.user_ids[int(user)].as_py() for user in cases.users]
    if not any(user in values for user in ids):
        raise DataError(
            f"none of the {len(ids):,} tested users is in the table of users; its column user_id "
            f"has ids such as {next(iter(values), 'none')!r}, the data set {ids[0]!r}"
        )
    return _grouped(name, [[values.get(user, "")] for user in ids])


def _grouped(name: str, values: Sequence[Sequence[str]]) -> Attribute:
    """Make groups of the values of each row, the most frequent ones first."""
    rows = [list(dict.fromkeys(part.strip() or MISSING for part in parts)) for parts in values]
    rows = [[part for part in row if part != MISSING] or [MISSING] for row in rows]
    weight: dict[str, float] = {}
    for row in rows:
        for part in row:
            weight[part] = weight.get(part, 0.0) + 1 / len(row)
    order = sorted(weight, key=lambda part: (part == MISSING, -weight[part], part))
    named = [part for part in order if part != MISSING]
    few = named if len(named) <= MOST_GROUPS else named[: MOST_GROUPS - 1]
    groups = [*few, *([OTHER] if len(few) < len(named) else []), *order[len(named) :]]
    column = {part: groups.index(part if part in groups else OTHER) for part in weight}
    shares = np.zeros((len(rows), len(groups)), dtype=np.float32)
    for number, row in enumerate(rows):
        for part in row:
            shares[number, column[part]] += 1 / len(row)
    return Attribute(name, groups, shares)


def _in_order(attribute: Attribute, names: Sequence[str]) -> Attribute:
    kept = [name for name in names if name in attribute.groups]
    columns = [attribute.groups.index(name) for name in kept]
    return Attribute(attribute.name, kept, attribute.shares[:, columns])


def exposure_of(
    run: Path,
    by: Sequence[str],
    *,
    progress: Progress,
    users: Path | None = None,
    separator: str | None = None,
    k: int = 10,
    data: Path | None = None,
) -> dict[str, Any]:
    """Measure a finished run on test, by attributes.

    Args:
        run: the run folder.
        by: fields of its catalog, columns of ``users``, ``popularity`` or ``history``.
        progress: is told how far it is.
        users: a CSV or Parquet table with the column ``user_id``, and attributes of users.
        separator: text between the values of an item that has several.
        k: items of a list.
        data: the data set, if it was moved.

    Returns:
        ``overall``; ``items`` and ``users``: by attribute, a row for each group; ``both``: for each
        pair of a users' and an items' attribute, the shares of each cell, and calibration.

    Raises:
        ConfigError: an attribute that nobody has. DataError: a table that cannot be read.
        CheckpointError: the run is not finished, or its data set is gone.
    """
    require_finished(run)
    dataset = open_run_dataset(run, data)
    split = training_split(load_run_config(run)[0], dataset)
    counts = np.bincount(split.train.values, minlength=dataset.n_items)
    catalog = Catalog(dataset.catalog)
    table = {} if users is None else _read_users(users)
    known = [POPULARITY, HISTORY, *catalog.fields, *table]
    unknown = [name for name in by if name not in known]
    if unknown:
        raise ConfigError(
            f"--by {unknown[0]}: no attribute of the items or users{nearest(unknown[0], known)} "
            f"(there are: {', '.join(known)}; --users FILE brings those of users)"
        )
    predictor = with_cold_items(load(run), dataset)
    if not 1 <= k <= dataset.n_items:
        raise DataError(
            f"k={k}: the catalog has {dataset.n_items} items; choose 1..{dataset.n_items}"
        )
    cases = _some(split.test)
    values = rank(predictor, cases, progress).values(METRIC, masked=True)
    top = top_k(
        predictor,
        cases.histories,
        k,
        exclude=cases.histories,
        progress=lambda done: progress.validating(done, len(cases)),
    ).items
    seen = _Lists(cases, top, values, counts)
    items = [
        item_attribute(name, catalog, counts, separator)
        for name in by
        if name == POPULARITY or name in catalog.fields
    ]
    people = [
        user_attribute(name, dataset, cases, table)
        for name in by
        if name == HISTORY or name in table
    ]
    everyone = Attribute(EVERYONE, [EVERYONE], np.ones((len(cases), 1), dtype=np.float32))
    return {
        "run": str(run),
        "dataset": dataset.identity,
        "protocol": split.protocol,
        "k": k,
        "cases": len(cases),
        "of_cases": len(split.test),
        "empty_lists": int((~seen.some).sum()),
        "overall": _by_users(everyone, seen)[0] | {"gini": _gini(top, dataset.n_items)},
        "items": {one.name: _by_items(one, seen) for one in items},
        "users": {one.name: _by_users(one, seen) for one in people},
        "both": [_by_both(one, each, seen) for one in (everyone, *people) for each in items],
    }


@dataclass(frozen=True)
class _Lists:
    """Test cases [M], their lists [M, k] (-1: none), scores [M], training events of items [N]."""

    cases: Cases
    top: npt.NDArray[np.int64]
    scores: Floats
    counts: npt.NDArray[np.integer]

    @cached_property
    def some(self) -> npt.NDArray[np.bool_]:
        """Say which lists have an item, [M]: what a search finds may be in the history already."""
        return np.asarray((self.top >= 0).any(1))

    def listed(self, shares: Floats) -> Floats:
        """Return the mean share of each group in each list, [M, G]; 0 for an empty list."""
        real = (self.top >= 0)[..., None]
        total = (shares[self.top] * real).sum(1)
        mean: Floats = total / np.maximum(real.sum(1), 1)
        return mean


def _some(cases: Cases) -> Cases:
    if len(cases) <= MOST_CASES:
        return cases
    return cases.take(np.linspace(0, len(cases) - 1, MOST_CASES).astype(np.int64))


def _means(rows: Ragged, shares: Floats) -> Floats:
    """Return the mean share of each group over the items of each row, [M, G]; no row is empty."""
    sums: Floats = np.add.reduceat(shares[rows.values], rows.offsets[:-1], axis=0)
    return sums / rows.lengths[:, None]


def _score(scores: Floats, weights: Floats) -> dict[str, float | None]:
    """Return a weighted mean and its standard error; None where there is no weight."""
    total = float(weights.sum())
    if total <= 0:
        return {METRIC: None, "error": None}
    mean = float(scores @ weights) / total
    error = math.sqrt(float(((scores - mean) ** 2) @ weights**2)) / total
    return {METRIC: mean, "error": error}


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None


def _by_items(attribute: Attribute, seen: _Lists) -> list[dict[str, Any]]:
    shares = attribute.shares
    targets = _means(seen.cases.targets, shares)
    trained = seen.counts @ shares / max(1, seen.counts.sum())
    exposed, chosen = _mean(seen.listed(shares), seen.some), targets.mean(0)
    return [
        {
            "group": group,
            "items": float(shares[:, g].sum()),
            "catalog": float(shares[:, g].mean()),
            "trained": float(trained[g]),
            "next": float(chosen[g]),
            "exposure": float(exposed[g]),
            "ratio": _ratio(float(exposed[g]), float(trained[g])),
            "targets": float(targets[:, g].sum()),
            **_score(seen.scores, targets[:, g]),
        }
        for g, group in enumerate(attribute.groups)
    ]


def _by_users(attribute: Attribute, seen: _Lists) -> list[dict[str, Any]]:
    order = np.argsort(-seen.counts, kind="stable")
    head = np.zeros((len(seen.counts), 1), dtype=np.float32)
    head[order[: math.ceil(HEAD * len(seen.counts))]] = 1
    chosen = {
        "history": _means(seen.cases.histories, head)[:, 0],
        "next": _means(seen.cases.targets, head)[:, 0],
    }
    exposed = seen.listed(head)
    rows = []
    for g, group in enumerate(attribute.groups):
        inside = attribute.shares[:, g] > 0
        listed = inside & seen.some
        histories = seen.cases.histories.take(np.flatnonzero(listed))
        rows.append(
            {
                "group": group,
                "users": len(np.unique(seen.cases.users[inside])),
                **_score(seen.scores, attribute.shares[:, g]),
                **{f"head_{name}": float(values[inside].mean()) for name, values in chosen.items()},
                "head_exposure": float(_mean(exposed, listed)[0]),
                "popularity_bias": bias_of(seen.top[listed], histories, seen.counts),
                "coverage": coverage(seen.top[inside], len(seen.counts)),
            }
        )
    return rows


def _mean(values: Floats, rows: npt.NDArray[np.bool_]) -> Floats:
    """Return the mean of some rows, [G]; 0 where there is none."""
    mean: Floats = values[rows].sum(0) / max(1, int(rows.sum()))
    return mean


def _by_both(people: Attribute, items: Attribute, seen: _Lists) -> dict[str, Any]:
    """Return shares of item groups in histories, choices and lists of each group of users."""
    before = _means(seen.cases.histories, items.shares)
    after = _means(seen.cases.targets, items.shares)
    exposed = seen.listed(items.shares)
    smoothed = (1 - SMOOTHING) * exposed + SMOOTHING * before
    positive = np.where(before > 0, before, 1)  # 0 log 0 is 0
    apart = (before * np.log(positive / np.where(before > 0, smoothed, 1))).sum(1)
    cells = []
    for g, group in enumerate(people.groups):
        inside = people.shares[:, g] > 0
        listed = inside & seen.some
        share = _mean(exposed, listed)
        cells.append(
            {
                "group": group,
                "calibration": float(_mean(apart[:, None], listed)[0]),
                "shares": {
                    name: {
                        "history": float(before[inside, i].mean()),
                        "next": float(after[inside, i].mean()),
                        "exposure": float(share[i]),
                        "ratio": _ratio(float(share[i]), float(before[inside, i].mean())),
                    }
                    for i, name in enumerate(items.groups)
                },
            }
        )
    return {"users": people.name, "items": items.name, "groups": cells}


def _gini(top: npt.NDArray[np.int64], n_items: int) -> float:
    """Return how unequally the places of all lists are shared among the items: 0 equally, 1 one has
    all.
    """
    places = np.sort(np.bincount(top[top >= 0], minlength=n_items)).astype(np.float64)
    if not places.sum():
        return 0.0
    ranks = np.arange(1, n_items + 1)
    return float((2 * ranks - n_items - 1) @ places / (n_items * places.sum()))


def _read_users(path: Path) -> dict[str, dict[str, str]]:
    """Read attributes of users: by column, the value of each user id; null is none."""
    table = user_table(path)
    ids = table["user_id"].to_list()
    return {
        name: {user: value or "" for user, value in zip(ids, table[name].to_list(), strict=True)}
        for name in table.columns
        if name != "user_id"
    }
