"""A/B tests on users: who is in which arm, what the arms did, and what may be concluded.

- `arm`: deterministic, salted assignment of a user.
- `analyze`: events -> click and reply rate of each arm, lift, tests, intervals, checks.
- `simulate`: events of an experiment with a known lift, to try all of it on.

A rate is a user-level metric: events of a user per exposure of that user, averaged over users
(L2Rec, section 3.6). The user is what was randomised, so the user is what is tested.

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
"""

from __future__ import annotations

__all__ = ["analyze", "arm", "events_of", "experiments", "holm", "simulate"]

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from l2rec.errors import ConfigError, DataError

TREATMENT, CONTROL = "treatment", "control"
SHARE = 0.06
"""Of users in the treatment: the papers' 6%."""
METRICS = {"ctr": "click", "reply_rate": "reply"}
PLURAL = {"ctr": "clicks", "reply_rate": "replies"}
SRM_ALPHA = 0.001
"""Below this, arms are not as large as they were planned: something is broken."""
PRE_DAYS = 14.0
DAY = 86_400.0
COLUMNS = ("user", "item", "type", "timestamp", "experiment", "arm")

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

    ``events``: [M] int64 of each metric. ``before``: [M] float64, the rate before the experiment,
    NaN where nothing was shown to the user then.
    """

    treated: npt.NDArray[np.bool_]
    exposures: Ints
    events: Mapping[str, Ints]
    before: Mapping[str, Floats]


def experiments(events: pl.DataFrame) -> list[str]:
    """Names of the experiments in a log, the one with most events first."""
    named = events.drop_nulls("experiment").group_by("experiment").len()
    return [str(name) for name in named.sort("len", "experiment", descending=[True, False])[:, 0]]


def _users(events: pl.DataFrame, name: str, pre_days: float) -> tuple[Users, dict[str, Any]]:
    """Users of an experiment, and what was noticed on the way."""
    missing = [column for column in COLUMNS if column not in events.columns]
    if missing:
        raise DataError(f"the log has no column {missing[0]!r}; it needs {', '.join(COLUMNS)}")
    within = events.filter(pl.col("experiment") == name)
    if within.is_empty():
        known = ", ".join(experiments(events)[:5]) or "none"
        raise DataError(f"no events of experiment {name!r}; the log has: {known}")
    odd = within.filter(~pl.col("arm").is_in([TREATMENT, CONTROL]) | pl.col("arm").is_null())
    if not odd.is_empty():
        raise DataError(f"arm {odd['arm'][0]!r} of experiment {name!r}: treatment or control")

    def count(of_type: str) -> pl.Expr:
        return (pl.col("type") == of_type).sum().cast(pl.Int64)

    counted = [count("exposure").alias("exposures")]
    counted += [count(kind).alias(metric) for metric, kind in METRICS.items()]
    table = within.group_by("user").agg(
        *counted, pl.col("arm").n_unique().alias("arms"), pl.col("arm").first()
    )
    crossed = int((table["arms"] > 1).sum())
    unexposed = int(((table["arms"] == 1) & (table["exposures"] == 0)).sum())
    table = table.filter((pl.col("arms") == 1) & (pl.col("exposures") > 0))
    start, end = float(within["timestamp"].min()), float(within["timestamp"].max())  # type: ignore[arg-type]
    earlier = events.filter(
        (pl.col("timestamp") < start)
        & (pl.col("timestamp") >= start - pre_days * DAY)
        & ((pl.col("experiment") != name) | pl.col("experiment").is_null())
    )
    past = earlier.group_by("user").agg(*counted).filter(pl.col("exposures") > 0)
    past = past.select(
        "user", *((pl.col(m) / pl.col("exposures")).alias(f"before_{m}") for m in METRICS)
    )
    table = table.join(past, on="user", how="left").sort("user")
    noticed = {"crossed_over": crossed, "never_exposed": unexposed, "from": start, "to": end}
    return (
        Users(
            treated=(table["arm"] == TREATMENT).to_numpy(),
            exposures=table["exposures"].to_numpy(),
            events={m: table[m].to_numpy() for m in METRICS},
            before={
                m: table[f"before_{m}"].fill_null(float("nan")).to_numpy().astype(np.float64)
                for m in METRICS
            },
        ),
        noticed,
    )


# -- users to conclusions ------------------------------------------------------------------------


def analyze(
    events: pl.DataFrame,
    name: str,
    *,
    treatment: float = SHARE,
    alpha: float = 0.05,
    power: float = 0.8,
    pre_days: float = PRE_DAYS,
) -> dict[str, Any]:
    """Everything about one experiment, ready for JSON.

    Args:
        events: columns user, item, type (exposure, click, reply), timestamp (seconds), experiment,
            arm; events without an experiment may be among them, and serve CUPED.
        treatment: the share of users that was planned for the treatment.
        alpha: of tests and intervals. power: that the MDE is for.
        pre_days: how long before the experiment's first event counts as before.

    Raises:
        DataError: no such experiment, a missing column, an arm without two exposed users.
        ConfigError: a share, alpha or power outside 0..1.
    """
    for what, value in (("treatment", treatment), ("alpha", alpha), ("power", power)):
        if not 0 < value < 1:
            raise ConfigError(f"{what}={value}: a number between 0 and 1")
    users, noticed = _users(events, name, pre_days)
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
    rate = users.events[name] / users.exposures
    found = _compare(rate[t], rate[c], alpha)
    found |= _detectable(rate[t], rate[c], alpha, power)
    found["ratio"] = _ratio(users, name, alpha)
    found["cuped"] = _cuped(rate, users.before[name], t, alpha)
    return found


def _compare(treated: Floats, control: Floats, alpha: float) -> dict[str, Any]:
    """Means, lift with its interval, Welch's t-test."""
    from scipy import stats

    mean_t, mean_c = float(treated.mean()), float(control.mean())
    var_t, var_c = treated.var(ddof=1) / len(treated), control.var(ddof=1) / len(control)
    if var_t + var_c > 0:
        t, p = map(float, stats.ttest_ind(treated, control, equal_var=False))
    else:
        t, p = 0.0, 1.0 if mean_t == mean_c else 0.0
    return {
        "treatment": mean_t,
        "control": mean_c,
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


def holm(ps: Sequence[float]) -> list[float]:
    """p-values adjusted for their number (Holm, 1979), in the order given."""
    order = np.argsort(ps, kind="stable")
    steps = [(len(ps) - rank) * float(ps[at]) for rank, at in enumerate(order)]
    rising = np.minimum(1.0, np.maximum.accumulate(steps))
    adjusted = np.empty(len(ps))
    adjusted[order] = rising
    return [float(p) for p in adjusted]


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

    earlier = shown()
    was = did(earlier, taste)
    exposures = shown()
    events = did(exposures, taste * np.where(treated, 1 + lift, 1.0))
    nothing = np.full(users, np.nan)
    return Users(
        treated=treated,
        exposures=exposures,
        events=events,
        before={m: was[m] / earlier if before else nothing for m in METRICS},
    )


def events_of(users: Users, experiment: str, seed: int = 0) -> pl.DataFrame:
    """The log that simulated users leave: one row an event, as `analyze` reads it.

    What was before is not in it.
    """
    rng = np.random.default_rng(seed)
    parts = []
    counts = {"exposure": users.exposures} | {k: users.events[m] for m, k in METRICS.items()}
    for kind, number in counts.items():
        who = np.repeat(np.arange(len(number)), number)
        parts.append(
            pl.DataFrame(
                {
                    "user": who,
                    "item": rng.integers(1000, size=len(who)),
                    "type": [kind] * len(who),
                    "timestamp": 1.7e9 + rng.uniform(0, 14 * DAY, len(who)),
                    "arm": np.where(users.treated[who], TREATMENT, CONTROL),
                }
            )
        )
    rows = pl.concat(parts).sort("timestamp")
    return rows.with_columns(
        pl.format("e{}", pl.int_range(pl.len())).alias("id"),
        pl.format("user-{}", "user").alias("user"),
        pl.format("item-{}", "item").alias("item"),
        pl.lit(experiment).alias("experiment"),
    )
