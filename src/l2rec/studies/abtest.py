"""A/B tests on users: assignment to arms, rates of each arm, and the statistical analysis.

- `arm`: deterministic, salted assignment of a user.
- `analyze`: events -> click and reply rate of each arm, lift, tests, intervals, checks.
- `simulate`: events of an experiment with a known lift, to check the analysis with.

A rate is a user-level metric: events of a user per exposure of that user, averaged over users
(L2Rec, section 3.6). Users were randomised, so users are the unit of the tests.

    difference  mean_t - mean_c, its interval by Welch's t
    lift        (mean_t - mean_c) / mean_c
    p           Welch's two-sample t-test on the users' rates, two-sided; Holm over the metrics
    interval    of the lift, by the delta method: var(m_t / m_c) = v_t / m_c^2 + m_t^2 v_c / m_c^4
    ratio       sum of events / sum of exposures, its variance by the delta method over users
                (Deng, Knoblich, Lu, KDD '18)
    CUPED       y - theta (x - mean x), x the same rate before the experiment
                (Deng, Xu, Kohavi, Walker, WSDM '13)
    SRM         chi-square test of the users in the arms against the planned share
                (Fabijan et al., KDD '19)
    MDE         the smallest true lift that is detected with the wanted power:
                (z_{1 - alpha/2} + z_power) sqrt(v_t + v_c) / mean_c
    needed      355 skewness^2 users in an arm, for its mean to be normal enough
                (Kohavi, Deng, Longbotham, Xu, KDD '14, rule 7)
    power       to detect a true lift of 1, 5, 10%; not the power at the observed lift, which only
                restates the p-value (Hoenig, Heisey, The American Statistician '01)
"""

from __future__ import annotations

__all__ = ["analyze", "events_of", "experiments", "simulate"]

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from l2rec.errors import ConfigError, DataError
from l2rec.evaluation.significance import holm
from l2rec.studies.arms import CONTROL, SHARE, TREATMENT, arm

METRICS = {"ctr": "click", "reply_rate": "reply"}
"""Event type that each metric counts per exposure."""
PLURAL = {"ctr": "clicks", "reply_rate": "replies"}
SRM_ALPHA = 0.001
"""p value below which the sizes of the arms contradict the plan: something is broken."""
NORMAL = 355
"""Factor of the squared skewness: with so many users in an arm a mean is normal enough."""
PRE_DAYS = 14.0
"""Default number of days before the experiment whose events CUPED uses."""
DAY = 86_400.0
"""Seconds of a day."""
COLUMNS = ("user", "type", "timestamp", "experiment", "arm")
"""Columns that a log must have."""

Log = pl.DataFrame | pl.LazyFrame
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


# -- events to users -----------------------------------------------------------------------------


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
    """List the experiments in a log, the one with the most events first."""
    named = events.lazy().drop_nulls("experiment").group_by("experiment").len().collect()
    return [str(name) for name in named.sort("len", "experiment", descending=[True, False])[:, 0]]


def _log(events: Log) -> pl.LazyFrame:
    """Select the needed columns, with timestamps in seconds.

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
    return log.select(COLUMNS)


def _counts(rows: pl.Expr, suffix: str = "") -> list[pl.Expr]:
    """Build the expressions that count exposures and each metric's events among ``rows``."""

    def count(kind: str) -> pl.Expr:
        return ((pl.col("type") == kind) & rows).sum().cast(pl.Int64)

    kinds = {"exposures": "exposure", **METRICS}
    return [count(kind).alias(name + suffix) for name, kind in kinds.items()]


def _users(
    events: Log, name: str, pre_days: float, since: float | None
) -> tuple[Users, dict[str, Any]]:
    """Count events by user of an experiment.

    Returns the users, and a mapping with the times ``from`` and ``to`` and the numbers of users
    that were left out (``crossed_over``, ``never_exposed``).

    Raises:
        DataError: no such experiment, no event since ``since``, or an arm of another name.
    """
    log = _log(events)
    arms, time = pl.col("arm"), pl.col("timestamp")
    within = time >= (-math.inf if since is None else since)
    wrong = arms.is_null() | ~arms.is_in([TREATMENT, CONTROL])
    table = (
        log.filter(pl.col("experiment") == name)
        .group_by("user")
        .agg(
            *_counts(within),
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
    past = earlier.group_by("user").agg(*_counts(pl.lit(value=True), "_before")).collect()
    table = table.filter(pl.col("exposures") > 0).join(past, on="user", how="left").sort("user")
    table = table.with_columns(pl.col("^.*_before$").fill_null(0))
    users = Users(
        treated=(table["arm"] == TREATMENT).to_numpy(),
        exposures=table["exposures"].to_numpy(),
        events={m: table[m].to_numpy() for m in METRICS},
        exposures_before=table["exposures_before"].to_numpy(),
        events_before={m: table[f"{m}_before"].to_numpy() for m in METRICS},
    )
    return users, {"from": first, "to": last, "crossed_over": crossed, "never_exposed": unexposed}


# -- users to conclusions ------------------------------------------------------------------------


def analyze(
    events: Log,
    name: str,
    *,
    treatment: float = SHARE,
    alpha: float = 0.05,
    power: float = 0.8,
    pre_days: float = PRE_DAYS,
    since: float | None = None,
) -> dict[str, Any]:
    """Analyse one experiment; the result can be written as JSON.

    Args:
        events: columns user, type (exposure, click, reply), timestamp (seconds since 1970, or
            dates), experiment, arm. It may contain events without an experiment; CUPED uses them.
            A lazy frame is never loaded into memory as a whole.
        name: the experiment.
        treatment: the planned share of users in the treatment.
        alpha: significance level of tests and intervals.
        power: power that the minimal detectable lift (MDE) is computed for.
        pre_days: days before the experiment's first event whose events CUPED uses.
        since: leave out the experiment's events before this time (seconds since 1970), such as its
            first days; decide on it before you see them.

    Raises:
        DataError: no such experiment, a missing column, an arm with fewer than two exposed users.
        ConfigError: a share, alpha or power that is not between 0 and 1.
    """
    for option, value in (("treatment", treatment), ("alpha", alpha), ("power", power)):
        if not 0 < value < 1:
            raise ConfigError(f"{option}={value}: a number between 0 and 1")
    if not pre_days >= 0:
        raise ConfigError(f"pre_days={pre_days}: a number of days, 0 for none")
    users, facts = _users(events, name, pre_days, since)
    return {
        "experiment": name,
        "from": facts["from"],
        "to": facts["to"],
        **conclude(users, treatment=treatment, alpha=alpha, power=power),
        "left_out": {k: facts[k] for k in ("crossed_over", "never_exposed")},
    }


def conclude(
    users: Users, *, treatment: float = SHARE, alpha: float = 0.05, power: float = 0.8
) -> dict[str, Any]:
    """Analyse counted users; arguments and result are those of `analyze`.

    Raises:
        DataError: fewer than two exposed users in an arm.
    """
    t, c = users.treated, ~users.treated
    sizes = {TREATMENT: int(t.sum()), CONTROL: int(c.sum())}
    if min(sizes.values()) < 2:
        few = min(sizes, key=lambda name: sizes[name])
        raise DataError(f"{sizes[few]} exposed users in {few}: a test needs two in each arm")
    metrics = {name: _metric(users, name, alpha, power) for name in METRICS}
    adjusted = holm([metric["p"] for metric in metrics.values()])
    for metric, p in zip(metrics.values(), adjusted, strict=True):
        metric["p_holm"] = p
    return {
        "alpha": alpha,
        "power": power,
        "arms": {
            name: {
                "users": sizes[name],
                "exposures": int(users.exposures[rows].sum()),
                **{PLURAL[m]: int(users.events[m][rows].sum()) for m in METRICS},
            }
            for name, rows in ((TREATMENT, t), (CONTROL, c))
        },
        "sample_ratio": sample_ratio(sizes[TREATMENT], sizes[CONTROL], treatment),
        "metrics": metrics,
    }


def _metric(users: Users, name: str, alpha: float, power: float) -> dict[str, Any]:
    """Analyse one metric in every way."""
    t, c = users.treated, ~users.treated
    rate = users.rate(name)
    result = _compare(rate[t], rate[c], alpha)
    result |= _detectable(rate[t], rate[c], alpha, power)
    result |= _needed(rate)
    result["ratio"] = _ratio(users, name, alpha)
    result["cuped"] = _cuped(rate, users.rate_before(name), t, alpha)
    return result


def _compare(treated: Floats, control: Floats, alpha: float) -> dict[str, Any]:
    """Compute both means, the lift with its interval, and Welch's t-test."""
    from scipy import stats

    mean_t, mean_c = float(treated.mean()), float(control.mean())
    var_t, var_c = treated.var(ddof=1) / len(treated), control.var(ddof=1) / len(control)
    difference = mean_t - mean_c
    if var_t + var_c > 0:
        test = stats.ttest_ind(treated, control, equal_var=False)
        t: float | None = float(test.statistic)
        p = float(test.pvalue)
        low, high = map(float, test.confidence_interval(1 - alpha))
    else:  # all users of an arm have the same rate
        t, p = None if difference else 0.0, float(difference == 0)
        low = high = difference
    return {
        "treatment": mean_t,
        "control": mean_c,
        "difference": difference,
        "low": low,
        "high": high,
        **_lift(mean_t, mean_c, float(var_t), float(var_c), alpha),
        "t": t,
        "p": p,
    }


def _lift(
    mean_t: float, mean_c: float, var_t: float, var_c: float, alpha: float
) -> Mapping[str, float | None]:
    """Compute the relative difference and its interval from means and their variances."""
    from scipy import stats

    if mean_c == 0:
        return {"lift": None, "lift_low": None, "lift_high": None}
    lift = mean_t / mean_c - 1
    spread = math.sqrt(var_t / mean_c**2 + mean_t**2 * var_c / mean_c**4)
    z = float(stats.norm.ppf(1 - alpha / 2))
    return {"lift": lift, "lift_low": lift - z * spread, "lift_high": lift + z * spread}


def _detectable(
    treated: Floats, control: Floats, alpha: float, power: float
) -> Mapping[str, float | None]:
    """Compute the smallest lift detected with ``power``, and the power at lifts of 1, 5 and 10%."""
    from scipy import stats

    spread = math.sqrt(treated.var(ddof=1) / len(treated) + control.var(ddof=1) / len(control))
    mean = float(control.mean())
    if mean == 0 or spread == 0:
        return {"mde": None} | {f"power_at_{lift}%": None for lift in (1, 5, 10)}
    z = float(stats.norm.ppf(1 - alpha / 2))
    mde = (z + float(stats.norm.ppf(power))) * spread / mean

    def power_at(lift: float) -> float:
        shift = lift * mean / spread
        return float(stats.norm.sf(z - shift) + stats.norm.cdf(-z - shift))

    return {"mde": mde} | {f"power_at_{lift}%": power_at(lift / 100) for lift in (1, 5, 10)}


def _needed(rate: Floats) -> Mapping[str, float | int | None]:
    """Compute the skewness of the rates and the users an arm needs for a normal mean."""
    from scipy import stats

    if rate.var() == 0:
        return {"skewness": None, "users_needed": None}
    skewness = float(stats.skew(rate))
    return {"skewness": skewness, "users_needed": math.ceil(NORMAL * skewness**2)}


def _ratio(users: Users, name: str, alpha: float) -> dict[str, Any]:
    """Compare all events / all exposures of the arms: z-test and interval by the delta method."""
    from scipy import stats

    values, variances = {}, {}
    for arm_name, rows in ((TREATMENT, users.treated), (CONTROL, ~users.treated)):
        y, n = users.events[name][rows].astype(np.float64), users.exposures[rows]
        value = float(y.sum() / n.sum())
        # Linearised: each user's y - R n, over the mean number of exposures.
        variances[arm_name] = float((y - value * n).var(ddof=1) / len(y) / n.mean() ** 2)
        values[arm_name] = value
    spread = math.sqrt(sum(variances.values()))
    difference = values[TREATMENT] - values[CONTROL]
    p = 2 * float(stats.norm.sf(abs(difference) / spread)) if spread else float(difference == 0)
    lift = _lift(
        values[TREATMENT], values[CONTROL], variances[TREATMENT], variances[CONTROL], alpha
    )
    return {**values, **lift, "p": p}


def _cuped(
    rate: Floats, before: Floats, treated: npt.NDArray[np.bool_], alpha: float
) -> dict[str, Any] | None:
    """Compare rates adjusted for those before the experiment (CUPED).

    Returns None if too few users have a rate from before, or all have the same.
    """
    known = ~np.isnan(before)
    if known.sum() < 3 or before[known].var() == 0:
        return None
    # Users without a rate from before get the mean, which adjusts nothing.
    x = np.where(known, before, before[known].mean())
    theta = float(np.cov(rate, x, ddof=1)[0, 1] / x.var(ddof=1))
    adjusted = rate - theta * (x - x.mean())
    return {
        **_compare(adjusted[treated], adjusted[~treated], alpha),
        "theta": theta,
        "known_before": float(known.mean()),
        "variance_left": float(adjusted.var(ddof=1) / rate.var(ddof=1)) if rate.var() else 1.0,
    }


def sample_ratio(treated: int, control: int, share: float) -> dict[str, Any]:
    """Test whether the arms are as large as planned: chi-square, one degree of freedom."""
    from scipy import stats

    total = treated + control
    expected = [share * total, (1 - share) * total]
    p = float(stats.chisquare([treated, control], expected).pvalue)
    return {"planned": share, "observed": treated / total, "p": p, "mismatch": p < SRM_ALPHA}


# -- simulated experiments -----------------------------------------------------------------------


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
        ConfigError: fewer than ten users.
    """
    if users < 10:
        raise ConfigError(f"users={users}: simulate ten or more")
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
