"""A/B tests on users: who is in which arm, what the arms did, and what may be concluded.

- `arm`: deterministic, salted assignment of a user.
- `analyze`: events -> click and reply rate of each arm, lift, tests, intervals, checks.
- `simulate`: events of an experiment with a known lift, to try all of it on.

A rate is a user-level metric: events of a user per exposure of that user, averaged over users
(L2Rec, section 3.6). The user is what was randomised, so the user is what is tested.

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
    MDE         the smallest true lift that is found with the wanted power:
                (z_{1 - alpha/2} + z_power) sqrt(v_t + v_c) / mean_c
    needed      355 skewness^2 users in an arm, for its mean to be normal enough
                (Kohavi, Deng, Longbotham, Xu, KDD '14, rule 7)
    power       that a true lift of 1, 5, 10% is found with; not that of the lift that was found,
                which is the p-value said again (Hoenig, Heisey, The American Statistician '01)
"""

from __future__ import annotations

__all__ = ["analyze", "arm", "events_of", "experiments", "simulate"]

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from l2rec.errors import ConfigError, DataError
from l2rec.evaluation.significance import holm

TREATMENT, CONTROL = "treatment", "control"
SHARE = 0.06
"""Of users in the treatment: the papers' 6%."""
METRICS = {"ctr": "click", "reply_rate": "reply"}
PLURAL = {"ctr": "clicks", "reply_rate": "replies"}
SRM_ALPHA = 0.001
"""Below this, arms are not as large as they were planned: something is broken."""
NORMAL = 355
"""Users of an arm, times the squared skewness: from there on a mean is normal enough."""
PRE_DAYS = 14.0
DAY = 86_400.0
COLUMNS = ("user", "type", "timestamp", "experiment", "arm")

Log = pl.DataFrame | pl.LazyFrame
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def arm(user: str, experiment: str, *, salt: str = "", treatment: float = SHARE) -> str:
    """``treatment`` or ``control``: the same for the same user, experiment and salt, everywhere.

    Raises:
        ConfigError: a share outside 0..1.
    """
    if not 0 <= treatment <= 1:
        raise ConfigError(f"treatment={treatment}: a share from 0 to 1")
    digest = hashlib.sha256(f"{salt}\0{experiment}\0{user}".encode()).digest()
    return TREATMENT if int.from_bytes(digest[:8]) / 2**64 < treatment else CONTROL


# -- events to users -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Users:
    """What M users did. ``treated``: [M] bool. ``exposures``: [M] int64, at least 1.

    ``events``: [M] int64 of each metric. ``exposures_before``, ``events_before``: the same before
    the experiment, 0 where nothing was shown to the user then.
    """

    treated: npt.NDArray[np.bool_]
    exposures: Ints
    events: Mapping[str, Ints]
    exposures_before: Ints
    events_before: Mapping[str, Ints]

    def rate(self, metric: str) -> Floats:
        """[M] events per exposure."""
        found: Floats = self.events[metric] / self.exposures
        return found

    def rate_before(self, metric: str) -> Floats:
        """[M] of what was before; NaN where nothing was."""
        shown = np.where(self.exposures_before > 0, self.exposures_before, np.nan)
        found: Floats = self.events_before[metric] / shown
        return found


def experiments(events: Log) -> list[str]:
    """Names of the experiments in a log, the one with most events first."""
    named = events.lazy().drop_nulls("experiment").group_by("experiment").len().collect()
    return [str(name) for name in named.sort("len", "experiment", descending=[True, False])[:, 0]]


def _log(events: Log) -> pl.LazyFrame:
    """With the columns that are needed, times in seconds."""
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
    """Exposures, and events of each metric, among these rows."""

    def count(kind: str) -> pl.Expr:
        return ((pl.col("type") == kind) & rows).sum().cast(pl.Int64)

    kinds = {"exposures": "exposure", **METRICS}
    return [count(kind).alias(what + suffix) for what, kind in kinds.items()]


def _users(
    events: Log, name: str, pre_days: float, since: float | None
) -> tuple[Users, dict[str, Any]]:
    """Users of an experiment, and what was noticed on the way."""
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
    # Who has no event since then was not lost; who was in both arms at any time is in neither.
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
    """Everything about one experiment, ready for JSON.

    Args:
        events: columns user, type (exposure, click, reply), timestamp (seconds since 1970, or
            dates), experiment, arm; events without an experiment may be among them, and serve
            CUPED. What is lazy is never in memory as a whole.
        treatment: the share of users that was planned for the treatment.
        alpha: of tests and intervals. power: that the MDE is for.
        pre_days: how long before the experiment's first event counts as before.
        since: leave out the experiment's events before this time, such as its first days; decide
            that before you see them.

    Raises:
        DataError: no such experiment, a missing column, an arm without two exposed users.
        ConfigError: a share, alpha or power outside 0..1.
    """
    for what, value in (("treatment", treatment), ("alpha", alpha), ("power", power)):
        if not 0 < value < 1:
            raise ConfigError(f"{what}={value}: a number between 0 and 1")
    if not pre_days >= 0:
        raise ConfigError(f"pre_days={pre_days}: a number of days, 0 for none")
    users, noticed = _users(events, name, pre_days, since)
    return {
        "experiment": name,
        "from": noticed["from"],
        "to": noticed["to"],
        **conclude(users, treatment=treatment, alpha=alpha, power=power),
        "left_out": {k: noticed[k] for k in ("crossed_over", "never_exposed")},
    }


def conclude(
    users: Users, *, treatment: float = SHARE, alpha: float = 0.05, power: float = 0.8
) -> dict[str, Any]:
    """As `analyze`, of users that are counted already."""
    t, c = users.treated, ~users.treated
    sizes = {TREATMENT: int(t.sum()), CONTROL: int(c.sum())}
    if min(sizes.values()) < 2:
        few = min(sizes, key=lambda name: sizes[name])
        raise DataError(f"{sizes[few]} exposed users in {few}: a test needs two in each arm")
    metrics = {name: _metric(users, name, alpha, power) for name in METRICS}
    adjusted = holm([found["p"] for found in metrics.values()])
    for found, p in zip(metrics.values(), adjusted, strict=True):
        found["p_holm"] = p
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
    t, c = users.treated, ~users.treated
    rate = users.rate(name)
    found = _compare(rate[t], rate[c], alpha)
    found |= _detectable(rate[t], rate[c], alpha, power)
    found |= _needed(rate)
    found["ratio"] = _ratio(users, name, alpha)
    found["cuped"] = _cuped(rate, users.rate_before(name), t, alpha)
    return found


def _compare(treated: Floats, control: Floats, alpha: float) -> dict[str, Any]:
    """Means, lift with its interval, Welch's t-test."""
    from scipy import stats

    mean_t, mean_c = float(treated.mean()), float(control.mean())
    var_t, var_c = treated.var(ddof=1) / len(treated), control.var(ddof=1) / len(control)
    difference = mean_t - mean_c
    if var_t + var_c > 0:
        test = stats.ttest_ind(treated, control, equal_var=False)
        t: float | None = float(test.statistic)
        p = float(test.pvalue)
        low, high = map(float, test.confidence_interval(1 - alpha))
    else:  # every user of an arm is like the others
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
    """Relative difference and its interval, from means and the variances of these means."""
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
    """The smallest lift found with ``power``, and the power for a lift of 1, 5 and 10%."""
    from scipy import stats

    spread = math.sqrt(treated.var(ddof=1) / len(treated) + control.var(ddof=1) / len(control))
    mean = float(control.mean())
    if mean == 0 or spread == 0:
        return {"mde": None} | {f"power_at_{lift}%": None for lift in (1, 5, 10)}
    z = float(stats.norm.ppf(1 - alpha / 2))
    mde = (z + float(stats.norm.ppf(power))) * spread / mean

    def found(lift: float) -> float:
        shift = lift * mean / spread
        return float(stats.norm.sf(z - shift) + stats.norm.cdf(-z - shift))

    return {"mde": mde} | {f"power_at_{lift}%": found(lift / 100) for lift in (1, 5, 10)}


def _needed(rate: Floats) -> Mapping[str, float | int | None]:
    """Skewness of a user's rate, and how many users an arm needs for its mean to be normal."""
    from scipy import stats

    if rate.var() == 0:
        return {"skewness": None, "users_needed": None}
    skewness = float(stats.skew(rate))
    return {"skewness": skewness, "users_needed": math.ceil(NORMAL * skewness**2)}


def _ratio(users: Users, name: str, alpha: float) -> dict[str, Any]:
    """All events / all exposures of each arm, z-test and interval by the delta method."""
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
    """The comparison with what was before taken out; None where too little was before."""
    known = ~np.isnan(before)
    if known.sum() < 3 or before[known].var() == 0:
        return None
    # Who was not there before gets the mean, which takes nothing out.
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
    """Whether the arms are as large as planned: chi-square, one degree of freedom."""
    from scipy import stats

    total = treated + control
    expected = [share * total, (1 - share) * total]
    p = float(stats.chisquare([treated, control], expected).pvalue)
    return {"planned": share, "observed": treated / total, "p": p, "mismatch": p < SRM_ALPHA}


# -- events of an experiment that never was ------------------------------------------------------


def simulate(
    users: int,
    *,
    lift: float = 0.0,
    seed: int = 0,
    treatment: float = SHARE,
    before: bool = True,
) -> Users:
    """Users whose rates differ and whose exposures have a long tail, with a known lift.

    Each user clicks a share of what is shown that is drawn once (mean 8%), in the treatment
    ``1 + lift`` times as much, and replies to a fifth of the clicks. Arms are assigned as in
    production. ``before``: as many exposures without treatment came before.

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

    def shown() -> Ints:
        found: Ints = np.ceil(rng.lognormal(2.0, 1.0, users)).astype(np.int64)
        return found

    def did(exposures: Ints, rate: Floats) -> dict[str, Ints]:
        clicks = rng.binomial(exposures, np.minimum(rate, 1.0))
        return {"ctr": clicks, "reply_rate": rng.binomial(clicks, 0.2)}

    earlier = shown() if before else np.zeros(users, dtype=np.int64)
    was = did(earlier, taste)
    exposures = shown()
    return Users(
        treated=treated,
        exposures=exposures,
        events=did(exposures, taste * np.where(treated, 1 + lift, 1.0)),
        exposures_before=earlier,
        events_before=was,
    )


def events_of(users: Users, experiment: str, seed: int = 0) -> pl.DataFrame:
    """The log that simulated users leave: one row an event, with the columns of an event log.

    Two weeks of the experiment, after nearly two weeks that no experiment is named for.
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
