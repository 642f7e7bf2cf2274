"""Statistics of A/B tests, against tea-tasting, statsmodels and SciPy, digit by digit."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import polars as pl
import pytest
from scipy import stats

from l2rec.evaluation.significance import holm
from l2rec.studies.abtest.analysis import conclude
from l2rec.studies.abtest.simulate import simulate
from l2rec.studies.abtest.statistics import Mean, detectable, sample_ratio
from l2rec.studies.abtest.users import METRICS, Users

CLOSE = 1e-10
"""Relative difference that is only the order of additions."""


def table_of(users: Users) -> pl.DataFrame:
    columns: dict[str, Any] = {"variant": users.treated.astype(int), "shown": users.exposures}
    for metric in METRICS:
        columns |= {f"{metric} events": users.events[metric], metric: users.rate(metric)}
        columns |= {f"{metric} before": users.rate_before(metric)}
    return pl.DataFrame(columns)


@pytest.mark.parametrize("lift", [0.0, 0.15, -0.2])
@pytest.mark.parametrize("share", [0.5, 0.06])
def test_means_ratios_and_cuped_are_tea_tastings(lift: float, share: float) -> None:
    tt = pytest.importorskip("tea_tasting", reason="tea-tasting is not installed")
    users = simulate(20_000, lift=lift, seed=11, treatment=share)
    ours = conclude(users, treatment=share)["metrics"]
    for metric in METRICS:
        found = tt.Experiment(
            mean=tt.Mean(metric),
            ratio=tt.RatioOfMeans(f"{metric} events", "shown"),
            cuped=tt.Mean(metric, f"{metric} before"),
        ).analyze(table_of(users))
        readings = {"mean": ours[metric], "ratio": ours[metric]["ratio"]}
        readings["cuped"] = ours[metric]["cuped"]
        for name, reading in readings.items():
            theirs = found[name]._asdict()
            pairs = {
                "treatment": "treatment",
                "control": "control",
                "difference": "effect_size",
                "low": "effect_size_ci_lower",
                "high": "effect_size_ci_upper",
                "t": "statistic",
                "p_difference": "pvalue",
                "lift": "rel_effect_size",
                "lift_low": "rel_effect_size_ci_lower",
                "lift_high": "rel_effect_size_ci_upper",
            }
            for own, other in pairs.items():
                expected = pytest.approx(theirs[other], rel=CLOSE, abs=1e-14)
                assert reading[own] == expected, (metric, name, own)


@pytest.mark.parametrize(("treated", "control"), [(540, 9460), (5, 15), (60_300, 939_700)])
def test_the_check_of_the_arms_is_tea_tastings_exact_one(treated: int, control: int) -> None:
    tt = pytest.importorskip("tea_tasting", reason="tea-tasting is not installed")
    variants = pl.DataFrame({"variant": [1] * treated + [0] * control})
    check = tt.SampleRatio({1: 0.06, 0: 0.94}, method="binom")
    theirs = tt.Experiment(arms=check).analyze(variants)["arms"].pvalue
    assert sample_ratio(treated, control, 0.06)["p"] == pytest.approx(theirs, rel=CLOSE)


def test_welch_is_scipys() -> None:
    users = simulate(5000, lift=0.1, seed=3, treatment=0.2)
    found = conclude(users)["metrics"]["ctr"]
    rate = users.rate("ctr")
    theirs = stats.ttest_ind(rate[users.treated], rate[~users.treated], equal_var=False)
    assert found["p_difference"] == pytest.approx(theirs.pvalue, rel=CLOSE)
    assert found["t"] == pytest.approx(theirs.statistic, rel=CLOSE)
    interval = theirs.confidence_interval(0.95)
    assert (found["low"], found["high"]) == pytest.approx(tuple(interval), rel=CLOSE)


def test_power_is_statsmodels() -> None:
    """Of the logarithm, for arms of one variance, since theirs has but one."""
    power = pytest.importorskip("statsmodels.stats.power", reason="statsmodels is not installed")
    mean, sd, sizes = 0.08, 0.11, (600, 9400)
    treatment, control = (Mean(mean, sd**2, n, n) for n in sizes)
    found = detectable(treatment, control, 0.05, 0.8)
    solver = power.NormalIndPower()
    options = {"nobs1": sizes[0], "alpha": 0.05, "ratio": sizes[1] / sizes[0]}
    for lift in (1, 5, 10):
        theirs = solver.power(math.log1p(lift / 100) * mean / sd, **options)
        assert found[f"power_at_{lift}%"] == pytest.approx(theirs, rel=CLOSE)
    # Ours leaves out a discovery in the wrong direction, of chance 1e-6.
    theirs = solver.solve_power(power=0.8, **options) * sd / mean
    assert found["mde"] == pytest.approx(math.expm1(theirs), rel=1e-5)


def test_holm_is_statsmodels() -> None:
    multitest = pytest.importorskip(
        "statsmodels.stats.multitest", reason="statsmodels is not installed"
    )
    for seed in range(20):
        ps = np.random.default_rng(seed).beta(0.3, 2.0, 7).tolist()
        theirs = multitest.multipletests(ps, method="holm")[1]
        assert holm(ps) == pytest.approx(theirs.tolist(), rel=CLOSE)
