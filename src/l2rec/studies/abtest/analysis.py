"""Analysis of an A/B test on users: events in, conclusions out.

A rate is a user-level metric: events of a user per exposure of that user, averaged over users
(L2Rec, section 3.6). Users were randomised, so users are the unit of the tests: `statistics`.
"""

from __future__ import annotations

__all__ = ["analyze", "conclude"]

from typing import Any

from l2rec.errors import ConfigError, DataError
from l2rec.evaluation.significance import holm
from l2rec.studies.abtest.over_time import over_time
from l2rec.studies.abtest.statistics import (
    Mean,
    compare,
    cuped,
    detectable,
    needed,
    ratio,
    sample_ratio,
)
from l2rec.studies.abtest.users import METRICS, PLURAL, PRE_DAYS, Log, Users, count_users
from l2rec.studies.arms import CONTROL, TREATMENT


def analyze(
    events: Log,
    name: str,
    *,
    treatment: float | None = None,
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
        treatment: the planned share of users in the treatment; None where it is not known, and the
            sizes of the arms cannot be checked.
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
        if value is not None and not 0 < value < 1:
            raise ConfigError(f"{option}={value}: a number between 0 and 1")
    if not pre_days >= 0:
        raise ConfigError(f"pre_days={pre_days}: a number of days, 0 for none")
    counted = count_users(events, name, pre_days, since)
    return {
        "experiment": name,
        "from": counted.first,
        "to": counted.last,
        **conclude(counted.users, treatment=treatment, alpha=alpha, power=power),
        "left_out": dict(counted.left_out),
        "over_time": over_time(events, name, counted, since, alpha),
    }


def conclude(
    users: Users, *, treatment: float | None = None, alpha: float = 0.05, power: float = 0.8
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
    # A metric of which nothing happened is no second chance to find something.
    tested = [name for name, metric in metrics.items() if metric["p"] is not None]
    adjusted = holm([metrics[name]["p"] for name in tested])
    for name, metric in metrics.items():
        metric["p_holm"] = dict(zip(tested, adjusted, strict=True)).get(name)
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
    rate, events = users.rate(name), users.events[name]
    treatment, control = (
        Mean.of(rate[rows], int((events[rows] > 0).sum()))
        for rows in (users.treated, ~users.treated)
    )
    return {
        **compare(treatment, control, alpha),
        **detectable(treatment, control, alpha, power),
        **needed(rate),
        "ratio": ratio(events, users.exposures, users.treated, alpha),
        "cuped": cuped(rate, users.rate_before(name), users.treated, alpha),
    }
