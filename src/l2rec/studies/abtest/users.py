"""Events of an experiment, counted by user: the input of the statistics."""

from __future__ import annotations

__all__ = ["METRICS", "Counted", "Users", "count_users", "experiments"]

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl

from l2rec.data.ties import per_second_of, unit_of
from l2rec.errors import DataError
from l2rec.studies.arms import CONTROL, TREATMENT

METRICS = {"ctr": "click", "reply_rate": "reply"}
"""Event type that each metric counts per exposure."""
PLURAL = {"ctr": "clicks", "reply_rate": "replies"}
PRE_DAYS = 14.0
"""Default number of days before the experiment whose events CUPED uses."""
DAY = 86_400.0
"""Seconds of a day."""
COLUMNS = ("user", "type", "timestamp", "experiment", "arm")
"""Columns that a log must have."""

Log = pl.DataFrame | pl.LazyFrame
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Users:
    """Event counts of M exposed users.

    ``treated``: [M] bool. ``exposures``: [M] int64, at least 1. ``events``: [M] int64 for each
    metric. ``exposures_before``, ``events_before``: the same before the experiment, 0 for a user
    to whom nothing was shown then.
    """

    treated: npt.NDArray[np.bool_]
    exposures: Ints
    events: Mapping[str, Ints]
    exposures_before: Ints
    events_before: Mapping[str, Ints]

    def rate(self, metric: str) -> Floats:
        """Return events per exposure [M] during the experiment."""
        rates: Floats = self.events[metric] / self.exposures
        return rates

    def rate_before(self, metric: str) -> Floats:
        """Return events per exposure [M] before the experiment, NaN without an exposure."""
        shown = np.where(self.exposures_before > 0, self.exposures_before, np.nan)
        rates: Floats = self.events_before[metric] / shown
        return rates


def experiments(events: Log) -> list[str]:
    """List the experiments in a log, the one with the most events first.

    Raises:
        DataError: as `needed_columns`.
    """
    named = needed_columns(events).drop_nulls("experiment").group_by("experiment").len().collect()
    ordered = named.sort("len", "experiment", descending=[True, False])
    return ordered["experiment"].to_list()


def needed_columns(events: Log) -> pl.LazyFrame:
    """Select the needed columns, with timestamps in seconds and names as text.

    Raises:
        DataError: a missing column, or timestamps that are neither numbers nor dates.
    """
    log = events.lazy()
    schema = log.collect_schema()
    missing = [column for column in COLUMNS if column not in schema]
    if missing:
        raise DataError(f"the log has no column {missing[0]!r}; it needs {', '.join(COLUMNS)}")
    if schema["timestamp"].is_temporal():
        log = log.with_columns(pl.col("timestamp").dt.epoch("us") / 1e6)
    elif not schema["timestamp"].is_numeric():
        raise DataError(
            f"the log's timestamp is {schema['timestamp']}: seconds since 1970 or dates"
        )
    names = pl.col("type", "experiment", "arm").cast(pl.String)
    return log.with_columns(names).select(COLUMNS)


def counts_of(rows: pl.Expr, suffix: str = "") -> list[pl.Expr]:
    """Build the expressions that count exposures and each metric's events among ``rows``."""

    def count(kind: str) -> pl.Expr:
        return ((pl.col("type") == kind) & rows).sum().cast(pl.Int64)

    kinds = {"exposures": "exposure", **METRICS}
    return [count(kind).alias(name + suffix) for name, kind in kinds.items()]


@dataclass(frozen=True)
class Counted:
    """Users of an experiment. ids: [M] strings, sorted. first, last: times of its events. left_out:
    numbers of users that are not among them, by reason, and of events that name no arm or no user.
    """

    users: Users
    ids: pl.Series
    first: float
    last: float
    left_out: Mapping[str, int]


def count_users(events: Log, name: str, pre_days: float, since: float | None) -> Counted:
    """Count events by user of an experiment, those before ``since`` (seconds since 1970) left out.

    Raises:
        DataError: no such experiment, no event since ``since``, an arm of another name, or times of
            another unit.
    """
    log = needed_columns(events)
    arms, time, owned = pl.col("arm"), pl.col("timestamp"), pl.col("user").is_not_null()
    within = time >= (-math.inf if since is None else since)
    wrong = ~arms.is_in([TREATMENT, CONTROL])
    named = log.filter(pl.col("experiment") == name)
    nameless = named.filter(within).select(
        arms.is_null().sum().alias("armless"), (arms.is_not_null() & ~owned).sum().alias("userless")
    )
    armless, userless = nameless.collect().row(0)
    table = (
        named.filter(arms.is_not_null() & owned)
        .group_by("user")
        .agg(
            *counts_of(within),
            arms.first(),
            arms.n_unique().alias("arms"),
            wrong.any().alias("wrong"),
            arms.filter(wrong).first().alias("odd"),
            time.min().alias("start"),
            time.filter(within).min().alias("from"),
            time.max().alias("to"),
        )
        .collect()
    )
    if table.is_empty() and armless + userless:
        raise DataError(
            f"none of the {armless + userless:,} events of experiment {name!r} names an arm and a "
            "user"
        )
    if table.is_empty():
        known = ", ".join(experiments(log)[:5]) or "none"
        raise DataError(f"no events of experiment {name!r}; the log has: {known}")
    odd = table.filter("wrong")["odd"]
    if len(odd):
        raise DataError(f"arm {odd[0]!r} of experiment {name!r}: treatment or control")
    start, first, last = table.select(
        pl.col("start").min(), pl.col("from").min(), pl.col("to").max()
    ).row(0)
    if first is None:
        raise DataError(f"no events of experiment {name!r} since {since}; give an earlier time")
    if (per_second := per_second_of(unit_of(last)) or 1.0) > 1:
        raise DataError(
            f"the log's timestamp goes up to {last:.0f}, which are {unit_of(last)}: divide it by "
            f"{per_second:,.0f}, to seconds since 1970, or give dates"
        )
    # Users without an event since then are not counted as left out. Users who were in both arms at
    # any time are.
    table = table.filter(pl.col("from").is_not_null())
    crossed = int((table["arms"] > 1).sum())
    table = table.filter(pl.col("arms") == 1)
    unexposed = int((table["exposures"] == 0).sum())
    earlier = log.filter(
        (time < start)
        & (time >= start - pre_days * DAY)
        & ((pl.col("experiment") != name) | pl.col("experiment").is_null())
    )
    past = earlier.group_by("user").agg(*counts_of(pl.lit(value=True), "_before")).collect()
    table = table.filter(pl.col("exposures") > 0).join(past, on="user", how="left").sort("user")
    table = table.with_columns(pl.col("^.*_before$").fill_null(0))
    users = Users(
        treated=(table["arm"] == TREATMENT).to_numpy(),
        exposures=table["exposures"].to_numpy(),
        events={m: table[m].to_numpy() for m in METRICS},
        exposures_before=table["exposures_before"].to_numpy(),
        events_before={m: table[f"{m}_before"].to_numpy() for m in METRICS},
    )
    left_out = {
        "crossed_over": crossed,
        "never_exposed": unexposed,
        "events_without_arm": armless,
        "events_without_user": userless,
    }
    return Counted(users, table["user"], first, last, left_out)
