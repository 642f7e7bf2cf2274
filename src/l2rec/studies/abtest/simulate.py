"""Simulated experiments with a known lift, to check the analysis with."""

from __future__ import annotations

__all__ = ["events_of", "simulate"]

import numpy as np
import polars as pl

from l2rec.errors import ConfigError
from l2rec.studies.abtest.users import DAY, METRICS, PRE_DAYS, Floats, Ints, Users
from l2rec.studies.arms import CONTROL, SHARE, TREATMENT, arm


def simulate(
    users: int,
    *,
    lift: float = 0.0,
    seed: int = 0,
    treatment: float = SHARE,
    before: bool = True,
) -> Users:
    """Simulate users with a known lift, whose rates differ and whose exposures have a long tail.

    Each user clicks a fixed share of the exposures, sampled once (mean 8%), in the treatment
    ``1 + lift`` times as much, and replies to a fifth of the clicks. Arms are assigned as in
    production. ``before``: also simulate as many exposures before the experiment, without
    treatment.

    Raises:
        ConfigError: fewer than ten users, or a lift that leaves a rate below nothing.
    """
    if users < 10:
        raise ConfigError(f"users={users}: simulate ten or more")
    if not lift >= -1:
        raise ConfigError(f"lift={lift:g}: -1, where nobody clicks, or more")
    rng = np.random.default_rng(seed)
    treated = np.array(
        [
            arm(f"user-{n}", f"simulated-{seed}", treatment=treatment) == TREATMENT
            for n in range(users)
        ]
    )
    taste = rng.beta(0.8, 9.2, users)

    def sample_exposures() -> Ints:
        counts: Ints = np.ceil(rng.lognormal(2.0, 1.0, users)).astype(np.int64)
        return counts

    def sample_events(exposures: Ints, rate: Floats) -> dict[str, Ints]:
        clicks = rng.binomial(exposures, np.minimum(rate, 1.0))
        return {"ctr": clicks, "reply_rate": rng.binomial(clicks, 0.2)}

    exposures_before = sample_exposures() if before else np.zeros(users, dtype=np.int64)
    events_before = sample_events(exposures_before, taste)
    exposures = sample_exposures()
    return Users(
        treated=treated,
        exposures=exposures,
        events=sample_events(exposures, taste * np.where(treated, 1 + lift, 1.0)),
        exposures_before=exposures_before,
        events_before=events_before,
    )


def events_of(users: Users, experiment: str, seed: int = 0) -> pl.DataFrame:
    """Write simulated users as an event log: one row per event, with the columns of a real log.

    The experiment lasts two weeks; the nearly two weeks before it name no experiment.
    """
    rng = np.random.default_rng(seed)
    start, days, parts = 1.7e9, PRE_DAYS - 1, []
    periods = (
        (users.exposures_before, users.events_before, start - days * DAY, days, False),
        (users.exposures, users.events, start, 14.0, True),
    )
    for exposures, events, begin, length, runs in periods:
        counts = {"exposure": exposures} | {kind: events[m] for m, kind in METRICS.items()}
        for kind, number in counts.items():
            who = np.repeat(np.arange(len(number)), number)
            arms = pl.Series(np.where(users.treated[who], TREATMENT, CONTROL), dtype=pl.String)
            parts.append(
                pl.DataFrame(
                    {
                        "user": who,
                        "item": rng.integers(1000, size=len(who)),
                        "type": pl.Series([kind] * len(who), dtype=pl.String),
                        "timestamp": begin + rng.uniform(0, length * DAY, len(who)),
                        "arm": arms if runs else pl.Series([None] * len(who), dtype=pl.String),
                    }
                )
            )
    rows = pl.concat(parts).sort("timestamp")
    return rows.select(
        pl.format("e{}", pl.int_range(pl.len())).alias("id"),
        pl.format("user-{}", "user").alias("user"),
        pl.format("item-{}", "item").alias("item"),
        "type",
        "timestamp",
        pl.lit(None, pl.String).alias("request"),
        pl.when(pl.col("arm").is_not_null()).then(pl.lit(experiment)).alias("experiment"),
        "arm",
    )
