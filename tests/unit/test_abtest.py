"""A/B analysis: numbers worked out another way, nominal error rates, a planted lift found again."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from scipy import stats
from typer.testing import CliRunner

from l2rec import abtest
from l2rec.abtest import Users, analyze, arm, conclude, events_of, experiments, holm, simulate
from l2rec.cli import app
from l2rec.errors import ConfigError, DataError

DAY = 86_400.0


def event(user: str, kind: str, at: float = 100.0, *, a: str = "control", x: str = "x") -> Any:
    return {
        "user": user,
        "item": "i",
        "type": kind,
        "timestamp": at,
        "experiment": x or None,
        "arm": a if x else None,
    }


def some_users(seed: int = 0, n: int = 400) -> Users:
    return simulate(n, lift=0.1, seed=seed, treatment=0.5)


# ------------------------------------------------------------------------------- arms


def test_arms_are_what_they_always_were() -> None:
    """Fixed for ever: a change would move users between arms of running experiments."""
    found = [arm(f"user-{n}", "home", salt="s", treatment=0.5) for n in range(12)]
    assert "".join(a[0] for a in found) == "ttccctcctttc"


def test_arms_have_their_share_and_do_not_follow_one_another() -> None:
    users = [f"u{n}" for n in range(20_000)]
    first = np.array([arm(u, "one") == "treatment" for u in users])
    assert abs(first.mean() - 0.06) < 4 * math.sqrt(0.06 * 0.94 / len(users))
    for other in ({"experiment": "two"}, {"experiment": "one", "salt": "again"}):
        second = np.array([arm(u, treatment=0.06, **other) == "treatment" for u in users])
        together = float((first & second).mean())
        assert abs(together - 0.06**2) < 0.002, "independent of another experiment, and salt"
    assert {arm(u, "x", treatment=0.0) for u in users[:99]} == {"control"}
    assert {arm(u, "x", treatment=1.0) for u in users[:99]} == {"treatment"}
    with pytest.raises(ConfigError, match="treatment=6: a share from 0 to 1"):
        arm("u", "x", treatment=6)


# ------------------------------------------------------------------------------- counting


def test_events_are_counted_by_user() -> None:
    rows = [
        event("a", "exposure"),
        event("a", "exposure"),
        event("a", "click"),
        event("b", "exposure", a="treatment"),
        event("b", "click", a="treatment"),
        event("b", "reply", a="treatment"),
        event("c", "exposure", a="treatment"),
        event("d", "exposure"),
        event("both", "exposure"),
        event("both", "exposure", a="treatment"),
        event("never shown", "click"),
        event("a", "exposure", 50.0, x=""),  # before, without an experiment
        event("a", "click", 50.0, x=""),
        event("a", "click", 50.0 - 30 * DAY, x=""),  # too long before
        event("z", "exposure", x="another"),
    ]
    frame = pl.DataFrame(rows)
    users, noticed = abtest._users(frame, "x", 14.0)
    assert users.treated.tolist() == [False, True, True, False]
    assert users.exposures.tolist() == [2, 1, 1, 1]
    assert users.events["ctr"].tolist() == [1, 1, 0, 0]
    assert users.events["reply_rate"].tolist() == [0, 1, 0, 0]
    assert users.before["ctr"][0] == 1.0 and np.isnan(users.before["ctr"][1:]).all()
    assert (noticed["crossed_over"], noticed["never_exposed"]) == (1, 1)
    assert experiments(frame) == ["x", "another"]
    found = analyze(frame, "x")
    assert found["arms"]["treatment"] == {"users": 2, "exposures": 2, "clicks": 1, "replies": 1}
    assert found["metrics"]["ctr"]["control"] == pytest.approx((0.5 + 0) / 2)
    assert found["left_out"] == {"crossed_over": 1, "never_exposed": 1}


@pytest.mark.parametrize(
    ("rows", "name", "message"),
    [
        ([event("a", "exposure")], "y", "no events of experiment 'y'; the log has: x"),
        ([event("a", "exposure", a="B")], "x", "arm 'B' of experiment 'x'"),
        ([event("a", "exposure"), event("b", "exposure")], "x", "0 exposed users in treatment"),
    ],
)
def test_logs_that_cannot_be_analysed(rows: list[Any], name: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        analyze(pl.DataFrame(rows), name)
    with pytest.raises(DataError, match="no column 'user'"):
        analyze(pl.DataFrame({"x": [1]}), name)
    with pytest.raises(ConfigError, match=r"alpha=5: a number between 0 and 1"):
        analyze(pl.DataFrame(rows), name, alpha=5)


# ------------------------------------------------------------------------------- each number


def test_welch_and_the_lift() -> None:
    users = some_users()
    found = conclude(users, treatment=0.5)["metrics"]["ctr"]
    rate = users.events["ctr"] / users.exposures
    t, c = rate[users.treated], rate[~users.treated]
    expected = stats.ttest_ind(t, c, equal_var=False)
    assert found["p"] == pytest.approx(expected.pvalue) and found["t"] == pytest.approx(
        expected.statistic
    )
    assert found["lift"] == pytest.approx(t.mean() / c.mean() - 1)
    low, high = found["lift_low"], found["lift_high"]
    assert low < found["lift"] < high
    draws = np.random.default_rng(0)
    again = [
        draws.choice(t, len(t)).mean() / draws.choice(c, len(c)).mean() - 1 for _ in range(2000)
    ]
    assert (high - low) / 2 / 1.959964 == pytest.approx(np.std(again), rel=0.1), "as a bootstrap"


def test_the_ratio_s_interval_is_a_bootstrap_s() -> None:
    users = some_users()
    found = conclude(users, treatment=0.5)["metrics"]["ctr"]["ratio"]
    draws = np.random.default_rng(1)

    def drawn(rows: np.ndarray[Any, Any]) -> float:
        some = draws.choice(np.flatnonzero(rows), int(rows.sum()))
        return float(users.events["ctr"][some].sum() / users.exposures[some].sum())

    again = [drawn(users.treated) / drawn(~users.treated) - 1 for _ in range(2000)]
    width = (found["lift_high"] - found["lift_low"]) / 2 / 1.959964
    assert width == pytest.approx(np.std(again), rel=0.12)
    rows = users.treated
    assert found["treatment"] == users.events["ctr"][rows].sum() / users.exposures[rows].sum()


def test_cuped_takes_out_what_was_before_and_nothing_else() -> None:
    users = simulate(6000, lift=0.2, seed=3, treatment=0.5)
    found = conclude(users, treatment=0.5)["metrics"]["ctr"]
    cuped = found["cuped"]
    assert cuped["variance_left"] < 0.9 and cuped["known_before"] == 1.0
    assert cuped["lift_high"] - cuped["lift_low"] < 0.96 * (found["lift_high"] - found["lift_low"])
    rate, before = users.events["ctr"] / users.exposures, users.before["ctr"]
    slope = stats.linregress(before, rate).slope
    assert cuped["theta"] == pytest.approx(slope)
    none = conclude(simulate(100, seed=1, treatment=0.5, before=False), treatment=0.5)
    assert none["metrics"]["ctr"]["cuped"] is None


def test_sample_ratio() -> None:
    assert not abtest.sample_ratio(600, 9400, 0.06)["mismatch"]
    found = abtest.sample_ratio(700, 9300, 0.06)
    assert found["mismatch"]
    chi = (700 - 600) ** 2 / 600 + (9300 - 9400) ** 2 / 9400
    assert found["p"] == pytest.approx(stats.chi2.sf(chi, 1))


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


def test_the_detectable_lift_has_the_power_it_says() -> None:
    users = some_users()
    found = conclude(users, treatment=0.5, power=0.8)["metrics"]["ctr"]
    rate = users.events["ctr"] / users.exposures
    t, c = rate[users.treated], rate[~users.treated]
    spread = math.sqrt(t.var(ddof=1) / len(t) + c.var(ddof=1) / len(c))
    shift = found["mde"] * c.mean() / spread
    z = stats.norm.ppf(0.975)
    assert stats.norm.sf(z - shift) + stats.norm.cdf(-z - shift) == pytest.approx(0.8, abs=1e-3)
    assert found["power_at_1%"] < found["power_at_5%"] < found["power_at_10%"] < 1


def test_nothing_ever_happened() -> None:
    users = Users(
        treated=np.array([True, True, False, False]),
        exposures=np.ones(4, dtype=np.int64),
        events={m: np.zeros(4, dtype=np.int64) for m in abtest.METRICS},
        before={m: np.full(4, np.nan) for m in abtest.METRICS},
    )
    found = conclude(users, treatment=0.5)["metrics"]["ctr"]
    assert found["lift"] is None and found["p"] == 1.0 and found["mde"] is None


# ------------------------------------------------------------------------------- error rates


def test_an_a_a_test_rejects_at_its_level() -> None:
    ps = {"p": 0, "ratio": 0, "cuped": 0}
    runs = 300
    for seed in range(runs):
        found = conclude(simulate(800, seed=seed, treatment=0.5), treatment=0.5)["metrics"]["ctr"]
        ps["p"] += found["p"] < 0.05
        ps["ratio"] += found["ratio"]["p"] < 0.05
        ps["cuped"] += found["cuped"]["p"] < 0.05
    for name, rejected in ps.items():
        p = stats.binomtest(rejected, runs, 0.05).pvalue
        assert p > 0.001, f"{name}: {rejected} of {runs} rejected at 5%"


def test_intervals_hold_a_planted_lift_as_often_as_they_say() -> None:
    held, runs = 0, 200
    for seed in range(runs):
        users = simulate(1500, lift=0.3, seed=1000 + seed, treatment=0.5)
        found = conclude(users, treatment=0.5)["metrics"]["ctr"]
        held += found["lift_low"] <= 0.3 <= found["lift_high"]
    assert stats.binomtest(held, runs, 0.95).pvalue > 0.001, f"{held} of {runs}"


def test_a_log_says_what_its_users_did() -> None:
    users = simulate(300, lift=0.2, seed=5, treatment=0.5)
    frame = events_of(users, "home")
    found = analyze(frame, "home", treatment=0.5)
    direct = conclude(users, treatment=0.5)
    assert found["arms"] == direct["arms"]
    for name in ("treatment", "control", "lift", "p"):
        assert found["metrics"]["ctr"][name] == pytest.approx(direct["metrics"]["ctr"][name])
    assert frame["id"].n_unique() == len(frame)
    with pytest.raises(ConfigError, match="simulate ten or more"):
        simulate(3)


# ------------------------------------------------------------------------------- the command


def test_the_command_reads_tables_and_event_logs(tmp_path: Path) -> None:
    pytest.importorskip("sqlalchemy")
    from l2rec.service.events import Event, EventLog

    frame = events_of(simulate(60, seed=5, treatment=0.5), "home")
    frame.write_parquet(tmp_path / "log.parquet")
    log = EventLog(f"sqlite:///{tmp_path / 'events.db'}")
    log.append([Event(**row) for row in frame.to_dicts()])
    log.close()
    found = []
    for name in ("log.parquet", "events.db"):
        options = ["abtest", str(tmp_path / name), "--treatment", "0.5"]
        done = CliRunner().invoke(app, [*options, "--json"], catch_exceptions=False)
        assert done.exit_code == 0
        found.append(json.loads(done.stdout))
        shown = CliRunner().invoke(app, options, catch_exceptions=False).stdout
        assert "experiment home" in shown and "CUPED" not in shown and "planned" in shown
    assert found[0] == found[1] and found[0]["experiment"] == "home"


def test_what_the_command_cannot_do(tmp_path: Path) -> None:
    other = pl.DataFrame([event("a", "exposure"), event("a", "exposure", x="y")])
    other.write_parquet(tmp_path / "two.parquet")
    for options, message in (
        ([], "give a log, or --simulate USERS"),
        ([str(tmp_path / "none.parquet")], "neither an event log nor a Parquet table"),
        ([str(tmp_path / "two.parquet")], "has 2 experiments; name one"),
    ):
        with pytest.raises((ConfigError, DataError), match=message):
            CliRunner().invoke(app, ["abtest", *options], catch_exceptions=False)
