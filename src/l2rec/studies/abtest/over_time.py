"""An experiment over time: the rates of each period, and the lift so far."""

from __future__ import annotations

__all__ = ["over_time"]

from typing import Any

import numpy as np
import polars as pl

from l2rec.studies.abtest.statistics import Mean, compare
from l2rec.studies.abtest.users import (
    DAY,
    METRICS,
    PLURAL,
    Counted,
    Log,
    counts_of,
    needed_columns,
)
from l2rec.studies.arms import CONTROL, TREATMENT

PERIODS = 60
"""Periods of an experiment, at most, or one more: it need not begin at midnight."""
WIDTHS = {3600.0: 48, 6 * 3600.0: 28, DAY: PERIODS, 7 * DAY: PERIODS}
"""Lengths of a period in seconds, and how many there may be: hours up to two days, quarters of a
day up to a week, days up to two months, then weeks."""


def over_time(
    events: Log, name: str, counted: Counted, since: float | None, alpha: float
) -> dict[str, Any]:
    """Count an experiment by period, with the lift of all users up to the end of each.

    Returns ``seconds``, the length of a period, and ``periods``, each with its start ``from``
    (seconds since 1970; days begin at midnight UTC), the events and rates of each arm within it,
    and ``so_far``: the lift of each metric's mean rate since the beginning, with the p and interval
    that are valid at any time, None while there are too few users.
    """
    span = counted.last - counted.first
    fitting = (width for width, most in WIDTHS.items() if span <= most * width)
    width = next(fitting, DAY * np.ceil(span / DAY / PERIODS))
    begin = width * np.floor(counted.first / width)
    users, time = counted.users, pl.col("timestamp")
    rows = (
        needed_columns(events)
        .filter(
            pl.col("experiment") == name,
            pl.col("arm").is_not_null(),
            time >= (begin if since is None else since),
        )
        .join(counted.ids.to_frame().lazy().with_row_index("row"), on="user")
        .group_by("row", ((time - begin) // width).cast(pl.Int64).alias("period"))
        .agg(*counts_of(pl.lit(value=True)))
        .collect()
    )
    totals = {
        kind: np.zeros(len(users.treated), dtype=np.int64) for kind in ("exposures", *METRICS)
    }
    periods = []
    for n in range(int((counted.last - begin) // width) + 1):
        part = rows.filter(pl.col("period") == n)
        who = part["row"].to_numpy()
        treated = users.treated[who]
        period: dict[str, Any] = {"from": float(begin + n * width)}
        for arm, some in ((TREATMENT, treated), (CONTROL, ~treated)):
            counts = {kind: int(part[kind].to_numpy()[some].sum()) for kind in totals}
            shown = counts["exposures"]
            period[arm] = {"users": int(some.sum()), "exposures": shown}
            period[arm] |= {PLURAL[m]: counts[m] for m in METRICS}
            period[arm] |= {m: counts[m] / shown if shown else None for m in METRICS}
        for kind, total in totals.items():
            total[who] += part[kind].to_numpy()
        period["so_far"] = {m: _so_far(users.treated, totals, m, alpha) for m in METRICS}
        periods.append(period)
    return {"seconds": float(width), "periods": periods}


def _so_far(treated: Any, totals: dict[str, Any], metric: str, alpha: float) -> Any:
    """Compare the users who were shown something so far; None while an arm has too few."""
    shown = totals["exposures"] > 0
    arms = []
    for rows in (treated & shown, ~treated & shown):
        if rows.sum() < 2:
            return None
        events = totals[metric][rows]
        arms.append(Mean.of(events / totals["exposures"][rows], int((events > 0).sum())))
    found = compare(arms[0], arms[1], alpha)
    return None if found["any_time"] is None else {"lift": found["lift"], **found["any_time"]}
