"""The load generator of benchmarks/serving.py, on a real server of a tiny run."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import SecretStr
from tests.support.benchmarks import script
from tests.support.runs import Finished
from tests.support.service import Serve, error, in_process, in_thread

from l2rec.service.app import create_app
from l2rec.service.events import EventLog
from l2rec.service.live import Live
from l2rec.service.loading import load_version
from l2rec.service.settings import Settings

load, limits = script("serving"), script("limits")


def test_clients_count_what_they_get(catalog_run: Finished, tmp_path: Path) -> None:
    log = f"sqlite:///{tmp_path / 'events.db'}"
    options = ["--rate", "0", "--no-access-log", "--inflight", "16", "--log", log]
    drawn = load.Drawn([f"i{n}" for n in range(30)], seed=0)
    assert len(drawn.new()) == 10 and drawn.known() in drawn.pool
    with in_process(catalog_run.run, *options) as server:
        assert load.answers(server.port)
        few = asyncio.run(load.ask(server.port, drawn.known, 2, 0.5))
        assert set(few.statuses) == {200} and not few.broken
        assert few.statuses[200] == len(few.seconds) > 0 and few.rate > 0
        many = asyncio.run(load.ask(server.port, drawn.new, 40, 1.0))
        assert set(many.statuses) == {200, 503} and not many.broken
        assert len(many.refused) == many.statuses[503] and not many.without_retry_after
        found = load.overload(load.Server("l2rec", server.port, server.process), drawn, 0.5)
        assert found["refused"].keys() == {"503"} and found["other codes"] == []
        assert found["answered"] > 0 and found["clients"] == load.OVERLOAD == 700
        assert found["broken connections"] == found["without Retry-After"] == 0
        assert found["errors after"] == 0  # eight clients are fewer than sixteen
        assert 0 < found["MB before, at most, after"][0] <= found["MB before, at most, after"][1]
    assert not load.answers(server.port)


def test_an_overload_is_reported_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts of the overload itself, the others' where it says so."""
    usual, first, during, again = (
        load.Measured(wall=2.0, statuses=Counter(statuses), **more)
        for statuses, more in (
            ({200: 100}, {}),
            ({200: 5, 503: 7}, {"broken": 1, "without_retry_after": 2, "refused": [9.0] * 7}),
            (
                {200: 40, 503: 50, 500: 3},
                {"broken": 2, "without_retry_after": 4, "refused": [0.01] * 52 + [0.21]},
            ),
            ({200: 90, 503: 6}, {"broken": 4}),
        )
    )
    measured, asked = iter([usual, first, during, again]), []

    async def ask(port: int, histories: Any, clients: int, seconds: float) -> Any:
        asked.append((port, clients, seconds))
        await asyncio.sleep(0.15)  # memory is looked at ten times a second
        return next(measured)

    # Before, twice during, after; and the two looks of the first overload.
    memory = iter([1.0, 2.0, 100.0, 140.0, 130.0, 110.0])
    server = SimpleNamespace(port=5, resident_mb=lambda: next(memory))
    monkeypatch.setattr(load, "ask", ask)
    assert load.overload(server, load.Drawn(["a", "b", "c"], seed=0), 4.0) == {
        "clients": 700,
        "answered": 40,
        "refused": {"500": 3, "503": 50},
        "broken connections": 3,
        "without Retry-After": 6,
        "refusals, ms p50 / p99": [10.0, pytest.approx(106.0, abs=0.1)],
        "MB before, at most, after": [100, 140, 110],
        "rate before, during, after": [50.0, 20.0, 45.0],
        "errors after": 10,
        "other codes": [500],
    }
    assert asked == [(5, 8, 2.0), (5, 700, 4.0), (5, 700, 4.0), (5, 8, 2.0)]


def test_the_largest_bodies_are_allowed_and_no_larger_ones_are(serve: Serve) -> None:
    """What the benchmark attacks with is what a server lets pass."""
    client = serve(timeout=300, queue=200)
    ids, texts = [f"i{n}" for n in range(30)], ["heavy red hat", "cold glass door"]
    for make in limits.largest(ids, texts):
        path, body = make()
        assert client.post(path, json=body).status_code == 200, path
        (field, longest), *_ = ((k, v) for k, v in body.items() if isinstance(v, list))
        larger = body | {field: [*longest, longest[0]]}
        assert error(client.post(path, json=larger), 422).startswith(field)
    text = limits.largest(ids, texts)[0]()[1]["texts"][0]
    assert 9_000 < len(text) <= 10_000


def test_items_are_put_some_at_a_time() -> None:
    requests = list(limits.puts(60))
    bodies = [json.loads(request.partition(b"\r\n\r\n")[2])["items"] for request in requests]
    assert [len(items) for items in bodies] == [25, 25, 10]
    assert len({item["id"] for items in bodies for item in items}) == 60


def test_both_see_the_other(serve: Serve, catalog_run: Finished, tmp_path: Path) -> None:
    """The victim's answers and the attacker's, of one server with the keys of both."""
    drawn = load.Drawn([f"i{n}" for n in range(30)], seed=0)
    attacks = [
        [limits.request_of(make()[1], make()[0], key=limits.ATTACKER)]
        for make in limits.largest([f"i{n}" for n in range(30)], ["heavy red hat"])
    ]
    settings = Settings(
        read_keys=(SecretStr(limits.VICTIM), SecretStr(limits.ATTACKER)),
        write_keys=(SecretStr(limits.WRITER),),
    )
    log = EventLog(f"sqlite:///{tmp_path / 'events.db'}")
    with in_thread(create_app(settings, Live(load_version(catalog_run.run)), log)) as url:
        port = int(url.rpartition(":")[2])
        victim, attacker = asyncio.run(limits.asked(port, drawn, attacks, 2.0))
        assert set(victim.statuses) <= {200} and not victim.broken
        assert set(attacker.statuses) <= {200, 429, 503} and sum(attacker.statuses.values())
        assert not attacker.without_retry_after
        asyncio.run(limits.put(port, list(limits.puts(30))))
        alone, nobody = asyncio.run(limits.asked(port, drawn, [], 2.0))
        assert set(alone.statuses) == {200} and not nobody.statuses


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    for module in (load, limits):
        with pytest.raises(SystemExit) as stopped:
            module.main(["--help"])
        assert stopped.value.code == 0
        assert f"python benchmarks/{module.__name__}.py" in capsys.readouterr().out
