"""Labels and counters against literal loops, and that no day knows of itself or of what follows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from l2rec.data.moments import moment
from l2rec.data.prepare import PrepareConfig, prepare
from l2rec.errors import DataError
from l2rec.studies.downstream.daily import (
    DAY,
    KINDS,
    SMOOTHING,
    Counts,
    DailyLog,
    Known,
    daily_log,
    exposures,
)

U, N, FIRST, DAYS = 6, 8, 100, 7
FIELDS = {"kind": np.arange(N) % 3}
Event = tuple[int, int, float, int]


def random_log(seed: int, events: int = 400) -> DailyLog:
    """By user and time; few users and items, so that pairs meet again and again."""
    rng = np.random.default_rng(seed)
    user, item = rng.integers(U, size=events), rng.integers(N, size=events)
    time = FIRST * DAY + np.floor(rng.uniform(0, DAYS * DAY, events) / 7200) * 7200  # with ties
    kind = rng.choice(3, size=events, p=(0.6, 0.3, 0.1)).astype(np.int8)
    order = np.lexsort((time, user))
    user, item, time, kind = user[order], item[order], time[order], kind[order]
    return DailyLog(user, item, time, (time // DAY).astype(np.int64), kind, U, N)


def part(log: DailyLog, rows: np.ndarray) -> DailyLog:  # type: ignore[type-arg]
    arrays = {n: getattr(log, n)[rows] for n in ("user", "item", "time", "day", "kind")}
    return replace(log, **arrays)


def events_of(log: DailyLog) -> list[Event]:
    columns = (log.user, log.item, log.time, log.kind)
    return list(zip(*(c.tolist() for c in columns), strict=True))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("window", [4 * 3600.0, DAY])
def test_labels_equal_the_loop(seed: int, window: float) -> None:
    log, cut = random_log(seed), FIRST + 5
    wanted: dict[int, list[float]] = {
        row: [0.0, 0.0] for row, kind in enumerate(log.kind) if kind == 0
    }
    listed = events_of(log)
    for user, item, time, kind in listed:
        if kind == 0:
            continue
        before = [
            (t, row)
            for row, (u, i, t, k) in enumerate(listed)
            if k == 0 and (u, i) == (user, item) and t <= time
        ]
        if not before:
            continue
        shown, row = max(before)
        known = not (shown // DAY < cut <= time // DAY)
        if time - shown <= window and known:
            wanted[row][kind - 1] = 1.0
    found = exposures(log, cut=cut, window=window)
    assert found.labels.tolist() == list(wanted.values())
    assert found.labels.any(0).all() and not found.labels.all(0).any()


def test_a_click_after_the_cut_is_not_known_before_it() -> None:
    midnight = 101 * DAY
    time = np.array([midnight - 10, midnight + 10])
    log = DailyLog(
        np.zeros(2, np.int64),
        np.zeros(2, np.int64),
        time,
        (time // DAY).astype(np.int64),
        np.array([0, 1], np.int8),
        1,
        1,
    )
    assert exposures(log, cut=101).labels[0, 0] == 0
    assert exposures(log, cut=102).labels[0, 0] == 1


@pytest.mark.parametrize("seed", range(3))
def test_known_equals_the_loop(seed: int) -> None:
    log = random_log(seed)
    known = Known(log, FIELDS, average=FIRST + 2)
    listed = events_of(log)
    early = [kind for _, _, time, kind in listed if time < (FIRST + 2) * DAY]
    rates = [early.count(k) / early.count(0) for k in (1, 2)]
    names = known.names
    users, items, days = (
        a.ravel()
        for a in np.meshgrid(np.arange(U), np.arange(N), np.arange(FIRST, FIRST + DAYS + 1))
    )
    of_users, of_items = known.users(users, days), known.items(items, days)
    of_pairs = known.pairs(users, items, days)
    histories = known.histories(users, days, 3)
    shown_before, n_clicks = known.shown_before(items, days), known.n_clicks(users, days)
    for row, (user, item, day) in enumerate(zip(users, items, days, strict=True)):
        past = [e for e in listed if e[2] // DAY < day]
        mine, its = [e for e in past if e[0] == user], [e for e in past if e[1] == item]
        for found, own in ((of_users[row], mine), (of_items[row], its)):
            n = [sum(e[3] == kind for e in own) for kind in range(3)]
            smooth = [(n[k] + SMOOTHING * rates[k - 1]) / (n[0] + SMOOTHING) for k in (1, 2)]
            np.testing.assert_allclose(found[:5], [*np.log1p(n), *smooth], rtol=1e-5)
        clicks = [e for e in mine if e[3] == 1]
        since = day - clicks[-1][2] // DAY if clicks else 0
        assert of_users[row, 5] == pytest.approx(np.log1p(since), rel=1e-5)
        shown = [e[2] // DAY for e in its if e[3] == 0]
        age, last = (day - min(shown), day - max(shown)) if shown else (0, 0)
        np.testing.assert_allclose(
            of_items[row, 5:], [np.log1p(age), np.log1p(last), not shown], rtol=1e-5
        )
        assert shown_before[row] == bool(shown)
        alike = [[e for e in mine if e[1] == item], [e for e in mine if e[1] % 3 == item % 3]]
        counted = [sum(e[3] == kind for e in own) for own in alike for kind in (0, 1)]
        np.testing.assert_allclose(of_pairs[row], np.log1p(counted), rtol=1e-5)
        assert histories[row].tolist() == [e[1] for e in clicks][-3:]
        assert n_clicks[row] == len(clicks)
    assert [len(names[side]) for side in ("user", "item", "pair")] == [6, 8, 4]
    assert (of_users.shape[1], of_items.shape[1], of_pairs.shape[1]) == (6, 8, 4)


@pytest.mark.parametrize("day", [FIRST + 1, FIRST + 4])
def test_a_day_knows_neither_itself_nor_what_follows(day: int) -> None:
    """The same features from a log that ends the evening before, and from one with another end."""
    log = random_log(0)
    past = np.flatnonzero(log.day < day)
    other = random_log(9)
    mixed = np.flatnonzero(other.day >= day)
    forged = {
        n: np.concatenate((getattr(log, n)[past], getattr(other, n)[mixed]))
        for n in ("user", "item", "time", "day", "kind")
    }
    order = np.lexsort((forged["time"], forged["user"]))
    logs = [log, part(log, past), replace(log, **{n: a[order] for n, a in forged.items()})]
    users, items = (a.ravel() for a in np.meshgrid(np.arange(U), np.arange(N)))
    days = np.full(len(users), day)

    def features(log: DailyLog) -> list[object]:
        known = Known(log, FIELDS, average=min(day, FIRST + 2))
        rows = known.histories(users, days, 50)
        return [
            known.users(users, days).tolist(),
            known.items(items, days).tolist(),
            known.pairs(users, items, days).tolist(),
            [row.tolist() for row in (rows.values, rows.offsets)],
        ]

    found = [features(one) for one in logs]
    assert found[0] == found[1] == found[2]
    later = Known(log, FIELDS, average=FIRST + 1).users(users, days + 1)
    assert later.tolist() != found[0][0]  # what that day brought is known on the next


def test_counts_of_nothing() -> None:
    none = np.zeros(0, dtype=np.int64)
    counts = Counts(none, none, (5, 9))
    asked = np.array([0, 3]), np.array([5, 12])
    for found in (counts.before(*asked), counts.since_last(*asked), counts.since_first(*asked)):
        assert found.tolist() == [0, 0]


HEAD = "user_id,item_id,timestamp,event_type\n"


def prepared(tmp_path: Path, rows: str) -> Path:
    (tmp_path / "log.csv").write_text(HEAD + rows)
    config = PrepareConfig(event_type="event_type")
    prepare(tmp_path / "log.csv", tmp_path / "out", config, progress=False)
    return tmp_path / "out"


def test_log_of_a_data_set(tmp_path: Path) -> None:
    from l2rec.data.dataset import open_dataset

    rows = "u,a,172800,click\nu,a,86399,exposure\nv,b,86400,share\nv,b,86401,exposure\n"
    log = daily_log(open_dataset(prepared(tmp_path, rows)))
    assert [KINDS[k] for k in log.kind] == ["exposure", "click", "exposure"]  # shares left out
    assert log.day.tolist() == [0, 2, 1] and log.user.tolist() == [0, 0, 1]
    assert log.days == (0, 2)


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ("u,a,1,exposure\nu,a,2,view\n", r"no events of type 'click' \(it has: exposure, view\)"),
        ("u,a,1,click\n", "no events of type 'exposure'"),
        ("u,a,1700000000000,exposure\nu,a,1700000000001,click\n", "days; prepare the log with sec"),
        ("u,a,1,exposure\nu,a,1700000000000,click\n", "days; prepare the log with seconds"),
    ],
)
def test_logs_that_will_not_do(tmp_path: Path, rows: str, says: str) -> None:
    from l2rec.data.dataset import open_dataset

    with pytest.raises(DataError, match=says):
        daily_log(open_dataset(prepared(tmp_path, rows)))


def test_moments() -> None:
    assert moment("1970-01-02") == moment("1970-01-02T01:00:00+01:00") == moment("86400") == 86400.0
    with pytest.raises(DataError, match="'soon' is no time; write a date such as 2023-11-28"):
        moment("soon")
