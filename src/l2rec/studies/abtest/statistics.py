"""Statistics of two arms: means of users, their tests, and what could have been detected.

    difference  mean_t - mean_c, its interval and p by Welch's t (Biometrika 1947)
    lift        mean_t / mean_c - 1, its interval and p by Welch's t on the logarithm of the ratio,
                whose variance is that of the delta method: v_t / mean_t^2 + v_c / mean_c^2
    any time    p and interval of the same logarithm that hold at all looks together: `any_time`
    ratio       sum of events / sum of exposures, its variance by the delta method over users
                (Deng, Knoblich, Lu, KDD '18)
    CUPED       y - theta (x - mean x), x the same rate before the experiment
                (Deng, Xu, Kohavi, Walker, WSDM '13)
    arms        exact binomial test of the users in the treatment against the planned share
                (Fabijan et al., KDD '19)
    MDE         the smallest true lift that is detected with the wanted power:
                exp((z_{1 - alpha/2} + z_power) sqrt(v_t / mean_t^2 + v_c / mean_c^2)) - 1
    needed      355 skewness^2 users in an arm, for its mean to be normal enough
                (Kohavi, Deng, Longbotham, Xu, KDD '14, rule 7)
    power       to detect a true lift of 1, 5, 10%; not the power at the observed lift, which only
                restates the p-value (Hoenig, Heisey, The American Statistician '01)

Here v is the variance of a mean. An interval leaves out "no difference" where its own p is below
alpha, and only there. docs/abtest.md says which of this libraries have, and why it stands here.
"""

from __future__ import annotations

__all__ = ["Mean", "any_time", "compare", "cuped", "detectable", "needed", "ratio", "sample_ratio"]

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from l2rec.evaluation.significance import ROUNDING, without_rounding
from l2rec.studies.abtest.users import Floats, Ints

SRM_ALPHA = 0.001
"""p value below which the sizes of the arms contradict the plan: something is broken."""
NORMAL = 355
"""Factor of the squared skewness: with so many users in an arm a mean is normal enough."""
TYPICAL = 0.1
"""Standard deviation of the lifts, as logarithms, that `any_time` is the most sensitive for. Not an
option: whoever may choose it after a look has looked once more."""
ANY_TIME_USERS, ANY_TIME_ACTIVE = 100, 20
"""Users, and users with an event, that an arm needs before `any_time` says anything: it takes the
variances for known."""


@dataclass(frozen=True)
class Mean:
    """Mean of an arm. variance: of one user, over n - 1. active: users with an event."""

    value: float
    variance: float
    users: int
    active: int

    @classmethod
    def of(cls, values: Floats, active: int) -> Mean:
        """Compute the mean of values [n], without the noise of values that are all the same."""
        value, variance = without_rounding(values)
        return cls(value, variance, len(values), active)

    @property
    def squared_error(self) -> float:
        """Variance of the mean."""
        return self.variance / self.users

    @property
    def relative(self) -> float:
        """Variance of the logarithm of the mean, by the delta method."""
        return self.squared_error / self.value**2


def compare(treatment: Mean, control: Mean, alpha: float) -> dict[str, Any]:
    """Compare two means by their difference and by their ratio.

    p is None where neither arm has an event. ``p`` belongs to the interval of the lift; where the
    lift has none, since a mean is not above 0, it is that of the difference, ``p_difference``.
    """
    t, c = treatment, control
    difference = t.value - c.value
    error = math.sqrt(t.squared_error + c.squared_error)
    if error == 0 and abs(difference) <= ROUNDING * max(abs(t.value), abs(c.value)):
        difference = 0.0
    p, half = _welch(difference, (t.squared_error, t.users), (c.squared_error, c.users), alpha)
    if error == 0 and not t.value and not c.value:
        p = None
    result: dict[str, Any] = {
        "treatment": t.value,
        "control": c.value,
        "difference": difference,
        "low": difference - half,
        "high": difference + half,
        "t": difference / error if error else None,
        "p_difference": p,
        "lift": t.value / c.value - 1 if c.value else None,
        "lift_low": None,
        "lift_high": None,
        "p": p,
        "any_time": None,
    }
    if min(t.value, c.value) <= 0:
        return result
    log = math.log(t.value / c.value) if difference else 0.0
    p, half = _welch(log, (t.relative, t.users), (c.relative, c.users), alpha)
    result |= {"lift_low": math.expm1(log - half), "lift_high": math.expm1(log + half), "p": p}
    if min(t.users, c.users) >= ANY_TIME_USERS and min(t.active, c.active) >= ANY_TIME_ACTIVE:
        p, half = any_time(log, t.relative + c.relative, alpha)
        low, high = math.expm1(log - half), math.expm1(log + half)
        result["any_time"] = {"lift_low": low, "lift_high": high, "p": p}
    return result


def _welch(
    difference: float, one: tuple[float, int], other: tuple[float, int], alpha: float
) -> tuple[float | None, float]:
    """Compute the two-sided p of a difference and half its interval.

    ``one``, ``other``: variance of each mean, and its number of users. Degrees of freedom by
    Satterthwaite.
    """
    from scipy.special import stdtr, stdtrit  # scipy.stats takes a second to import

    variance = one[0] + other[0]
    if variance == 0:  # all users of an arm have the same rate
        return float(difference == 0), 0.0
    freedom = variance**2 / sum(v**2 / (n - 1) for v, n in (one, other))
    error = math.sqrt(variance)
    p = 2 * float(stdtr(freedom, -abs(difference) / error))
    return p, float(stdtrit(freedom, 1 - alpha / 2)) * error


def any_time(log_ratio: float, variance: float, alpha: float) -> tuple[float, float]:
    """Compute p and half the interval of a log ratio for as many looks as one likes.

    The chance that any look at an experiment without an effect, however many there are, has
    p < alpha is alpha at most, where there are users enough; as often, the interval misses the true
    value at some look. It is the mixture sequential probability ratio test with a normal mixture
    (Robbins 1970; Johari, Koomen, Pekelis, Walsh, Operations Research 2022), with the variance
    estimated: an asymptotic confidence sequence (Waudby-Smith, Arbour, Sinha, Kennedy, Ramdas,
    Annals of Statistics 2024, theorem 2.2). With s = `TYPICAL`^2 and v = ``variance``:

        p = 1 / likelihood ratio = sqrt((v + s) / v) exp(-s x^2 / (2 v (v + s)))
    """
    mixture = TYPICAL**2
    spread = math.log1p(mixture / variance)
    exponent = mixture * log_ratio**2 / (2 * variance * (variance + mixture)) - spread / 2
    half = math.sqrt(variance * (variance + mixture) / mixture * (spread - 2 * math.log(alpha)))
    return math.exp(-max(exponent, 0.0)), half


def ratio(events: Ints, exposures: Ints, treated: npt.NDArray[np.bool_], alpha: float) -> Any:
    """Compare all events / all exposures of the arms, [M] each."""

    def mean(rows: npt.NDArray[np.bool_]) -> Mean:
        y, n = events[rows].astype(np.float64), exposures[rows]
        value = float(y.sum() / n.sum())
        # Linearised: each user's y - R n, over the mean number of exposures.
        variance = float((y - value * n).var(ddof=1) / n.mean() ** 2)
        if variance <= (ROUNDING * value) ** 2:
            variance = 0.0
        return Mean(value, variance, len(y), int((y > 0).sum()))

    return compare(mean(treated), mean(~treated), alpha)


def cuped(
    rate: Floats, before: Floats, treated: npt.NDArray[np.bool_], alpha: float
) -> dict[str, Any] | None:
    """Compare rates adjusted for those before the experiment (CUPED), NaN where there is none.

    Returns None if too few users have a rate from before, or all have the same.
    """
    known = ~np.isnan(before)
    if known.sum() < 3 or without_rounding(before[known])[1] == 0:
        return None
    # Users without a rate from before get the mean, which adjusts nothing.
    x = np.where(known, before, before[known].mean())
    theta = float(np.cov(rate, x, ddof=1)[0, 1] / x.var(ddof=1))
    adjusted = rate - theta * (x - x.mean())
    variance = without_rounding(rate)[1]
    arms = [Mean.of(adjusted[rows], int((rate[rows] > 0).sum())) for rows in (treated, ~treated)]
    return {
        **compare(arms[0], arms[1], alpha),
        "theta": theta,
        "known_before": float(known.mean()),
        "variance_left": float(adjusted.var(ddof=1) / variance) if variance else 1.0,
    }


def detectable(
    treatment: Mean, control: Mean, alpha: float, power: float
) -> Mapping[str, float | None]:
    """Compute the smallest lift detected with ``power``, and the power at lifts of 1, 5 and 10%.

    Of a lift that multiplies what every user does, which leaves the relative variances as they are.
    """
    from scipy.special import ndtr, ndtri

    if min(treatment.value, control.value) <= 0 or not treatment.variance + control.variance:
        return {"mde": None} | {f"power_at_{lift}%": None for lift in (1, 5, 10)}
    error = math.sqrt(treatment.relative + control.relative)
    z = float(ndtri(1 - alpha / 2))
    mde = math.expm1((z + float(ndtri(power))) * error)

    def power_at(lift: float) -> float:
        shift = math.log1p(lift) / error
        return float(ndtr(shift - z) + ndtr(-z - shift))

    return {"mde": mde} | {f"power_at_{lift}%": power_at(lift / 100) for lift in (1, 5, 10)}


def needed(rate: Floats) -> Mapping[str, float | int | None]:
    """Compute the skewness of the rates and the users an arm needs for a normal mean."""
    from scipy import stats

    if without_rounding(rate)[1] == 0:
        return {"skewness": None, "users_needed": None}
    skewness = float(stats.skew(rate))
    return {"skewness": skewness, "users_needed": math.ceil(NORMAL * skewness**2)}


def sample_ratio(treated: int, control: int, share: float | None) -> dict[str, Any]:
    """Test whether the arms are as large as planned; nothing is tested where ``share`` is None."""
    from scipy import stats

    total = treated + control
    facts: dict[str, Any] = {"planned": share, "observed": treated / total}
    if share is None:
        return facts | {"p": None, "mismatch": None}
    p = float(stats.binomtest(treated, total, share).pvalue)
    return facts | {"p": p, "mismatch": p < SRM_ALPHA}
