"""live.json, what a server makes of it, and that no answer is of two versions."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.support.runs import Finished
from tests.support.service import metric_of

from l2rec.errors import CheckpointError, ConfigError, StorageError
from l2rec.runs.checkpoint import load_tensors, save_tensors
from l2rec.runs.predictor import load
from l2rec.service.app import create_app
from l2rec.service.events import EventLog
from l2rec.service.follow import load_first, load_with_items
from l2rec.service.live import (
    Live,
    deploy,
    end_shadow,
    read_deployment,
    rollback,
)
from l2rec.service.loading import load_version
from l2rec.service.settings import Settings


def spoil(run: Path) -> None:
    """A run whose files are whole, and whose model gives no numbers."""
    tensors, _ = load_tensors(run / "model.safetensors")
    save_tensors(
        run / "model.safetensors",
        {n: t * float("nan") if "fusion" in n else t for n, t in tensors.items()},
    )
    (run / "items.safetensors").unlink()


@pytest.fixture
def bad_run(other_run: Finished, tmp_path: Path) -> Path:
    shutil.copytree(other_run.run, tmp_path / "bad")
    spoil(tmp_path / "bad")
    return tmp_path / "bad"


# -- the file ------------------------------------------------------------------------------------


def test_deploy_and_rollback(
    catalog_run: Finished, other_run: Finished, paper_run: Finished, tmp_path: Path
) -> None:
    folder = tmp_path / "serving"
    a, b, c = (finished.run.resolve() for finished in (catalog_run, other_run, paper_run))
    with pytest.raises(CheckpointError, match=r"has no live.json; make it with: l2rec deploy RUN"):
        read_deployment(folder)
    with pytest.raises(ConfigError, match="has nothing that a shadow could be compared with"):
        deploy(a, folder, shadow=True)
    assert deploy(a, folder).previous == ()
    with pytest.raises(ConfigError, match="nothing was deployed before"):
        rollback(folder)
    deploy(b, folder)
    deploy(c, folder, shadow=True)
    found = read_deployment(folder)
    assert (found.current, found.previous, found.shadow) == (b, (a,), c)
    assert found.expected(b) == load(b).version and found.expected(Path("x")) is None
    found = deploy(c, folder)  # the shadow is promoted
    assert (found.current, found.previous, found.shadow) == (c, (b, a), None)
    assert deploy(a, folder).previous == (c, b)
    assert rollback(folder) == read_deployment(folder)
    assert read_deployment(folder).current == c
    assert rollback(folder).current == b
    deploy(a, folder, shadow=True)
    with pytest.raises(ConfigError, match="is not the shadow of"):
        end_shadow(c, folder)
    assert end_shadow(a, folder).shadow is None
    assert [path.name for path in folder.iterdir()] == ["live.json"]


def test_a_bad_run_is_not_deployed(catalog_run: Finished, bad_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "serving"
    deploy(catalog_run.run, folder)
    before = (folder / "live.json").read_bytes()
    with pytest.raises(
        CheckpointError, match="item vectors that are not finite numbers: torn or badly trained"
    ):
        deploy(bad_run, folder)
    with pytest.raises(CheckpointError, match="is not a run folder: it has no config"):
        deploy(tmp_path, folder, shadow=True)
    assert (folder / "live.json").read_bytes() == before


def test_an_unfinished_run_is_not_deployed(catalog_run: Finished, tmp_path: Path) -> None:
    folder, run = tmp_path / "serving", tmp_path / "run"
    shutil.copytree(catalog_run.run, run)
    (run / "report.json").unlink()
    with pytest.raises(CheckpointError, match=r"run is not finished.*--resume"):
        deploy(run, folder)
    assert not folder.exists()
    # One that was deployed and is now trained on goes on being served, with the same weights.
    shutil.copy2(catalog_run.run / "report.json", run)
    deploy(run, folder)
    (run / "report.json").unlink()
    version = load_version(run, expected=read_deployment(folder).expected(run))
    assert version.report == {}


def test_a_run_that_changed_since_is_not_rolled_back_to(
    catalog_run: Finished, other_run: Finished, bad_run: Path, tmp_path: Path
) -> None:
    folder, run = tmp_path / "serving", tmp_path / "copy"
    shutil.copytree(catalog_run.run, run)
    deploy(run, folder)
    deploy(other_run.run, folder)
    shutil.copy2(bad_run / "model.safetensors", run / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"its weights are \w+, \w+ was deployed"):
        rollback(folder)
    assert read_deployment(folder).current == other_run.run.resolve()


def test_what_others_write_while_a_run_is_checked(
    catalog_run: Finished,
    other_run: Finished,
    paper_run: Finished,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    a, b, c = (finished.run.resolve() for finished in (catalog_run, other_run, paper_run))
    deploy(a, tmp_path)
    deploy(b, tmp_path)
    meanwhile: list[Callable[[], Any]] = []

    def checked(version: Any) -> None:
        if meanwhile:
            meanwhile.pop()()

    monkeypatch.setattr("l2rec.service.live.check_version", checked)

    def back() -> None:
        rollback(tmp_path, check=False)

    meanwhile.append(back)
    deploy(c, tmp_path, shadow=True)
    found = read_deployment(tmp_path)
    assert (found.current, found.previous, found.shadow) == (a, (), c)
    assert [step.action for step in found.steps[:2]] == ["shadow", "rollback"]
    deploy(b, tmp_path)
    meanwhile.append(back)
    assert deploy(c, tmp_path).previous == (a,), "what was left meanwhile is not come back to"
    meanwhile.append(lambda: deploy(b, tmp_path))
    with pytest.raises(ConfigError, match="other was made the current run meanwhile; look again"):
        rollback(tmp_path)
    assert read_deployment(tmp_path).previous == (c, a)


def test_a_folder_that_cannot_be_made(catalog_run: Finished, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"cannot be made \(.*\); choose another folder"):
        deploy(catalog_run.run, tmp_path / "file")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"current": 1}', '{"current": "x", "previous": [1]}']
)
def test_a_torn_file(text: str, tmp_path: Path) -> None:
    (tmp_path / "live.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"live\.json: (not readable|expected)"):
        read_deployment(tmp_path)


def test_a_start_with_a_current_run_that_is_bad(
    catalog_run: Finished, bad_run: Path, tmp_path: Path, log_url: str
) -> None:
    folder, log = tmp_path / "serving", EventLog(log_url)
    deploy(catalog_run.run, folder)
    value = json.loads((folder / "live.json").read_text())
    value |= {"current": str(bad_run), "previous": ["/nowhere", value["current"]]}
    (folder / "live.json").write_text(json.dumps(value))
    version, run, problem = load_first(read_deployment(folder), log)
    assert run == catalog_run.run.resolve() and version.version == load(run).version
    assert problem == "item vectors that are not finite numbers: torn or badly trained"
    value["previous"] = []
    (folder / "live.json").write_text(json.dumps(value))
    with pytest.raises(CheckpointError, match="item vectors that are not finite"):
        load_first(read_deployment(folder), log)
    log.close()


# -- a server that follows it --------------------------------------------------------------------


@asynccontextmanager
async def following(
    folder: Path, log: Any, **settings: Any
) -> AsyncIterator[tuple[Any, httpx.AsyncClient]]:
    """An app that follows a folder, and a client."""
    wanted = read_deployment(folder)
    live = Live(load_version(wanted.current, items=log.items()), folder=folder)
    app = create_app(
        Settings(**{"rate": 0, "poll": 0.02, "sync": 0, **settings}),
        live,
        log,
        follow=(folder, wanted.current, None),
    )
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            yield app, client


async def until(condition: Any, seconds: float = 30) -> None:
    async with asyncio.timeout(seconds):
        while not (await condition() if asyncio.iscoroutinefunction(condition) else condition()):
            await asyncio.sleep(0.01)


def test_swaps_under_load_never_mix_versions(
    catalog_run: Finished, other_run: Finished, tmp_path: Path, log_url: str
) -> None:
    """Every answer is, in whole, what the version that it names answers."""
    folder = tmp_path / "serving"
    runs = [catalog_run.run.resolve(), other_run.run.resolve()]
    predictors = {p.version: p for p in map(load, runs)}
    assert len(predictors) == 2
    histories = [[f"i{a}", f"i{b}"] for a in range(6) for b in range(10, 14)]
    expected = {
        (version, tuple(history)): predictor.recommend(history, 5)
        for version, predictor in predictors.items()
        for history in histories
    }
    # The two differ, or the test could not fail.
    tops = [[i["id"] for i in found.items] for found in expected.values()]
    half = len(tops) // 2
    assert sum(a != b for a, b in zip(tops[:half], tops[half:], strict=True)) > half / 2
    for run in runs:
        deploy(run, folder)
    texts = {run: (deploy(run, folder), (folder / "live.json").read_text())[1] for run in runs}

    async def main() -> list[str]:
        seen: list[str] = []
        async with following(folder, EventLog(log_url), cache=40) as (app, client):
            done = False

            async def hammer(start: int) -> None:
                number = start
                while not done:
                    history = histories[number % len(histories)]
                    number += 7
                    answer = await client.post("/v1/recommend", json={"history": history, "k": 5})
                    assert answer.status_code == 200, answer.text
                    body = answer.json()
                    found = expected[body["version"], tuple(history)]
                    assert [i["id"] for i in body["items"]] == [i["id"] for i in found.items]
                    scores = [i["score"] for i in found.items]
                    assert [i["score"] for i in body["items"]] == pytest.approx(scores, abs=1e-5)
                    assert body["gate"] == pytest.approx(found.gate, abs=1e-5)
                    seen.append(body["version"])

            hammers = [asyncio.ensure_future(hammer(n)) for n in range(8)]
            for turn in range(6):
                run = runs[turn % 2]
                write(folder, texts[run])
                wanted = load(run).version
                await until(lambda wanted=wanted: app.state.live.current().version == wanted)
                before = len(seen)
                await until(lambda before=before: len(seen) > before + 20)
                assert seen[-1] == wanted
            done = True
            await asyncio.gather(*hammers)
        return seen

    seen = asyncio.run(main())
    changes = sum(a != b for a, b in itertools.pairwise(seen))
    assert set(seen) == set(predictors) and changes >= 5


def write(folder: Path, text: str) -> None:
    (folder / "new").write_text(text)
    os.replace(folder / "new", folder / "live.json")


def test_a_bad_candidate_never_displaces_a_good_one(
    catalog_run: Finished, bad_run: Path, tmp_path: Path, log_url: str
) -> None:
    folder = tmp_path / "serving"
    deploy(catalog_run.run, folder)
    good = (folder / "live.json").read_text()
    torn = tmp_path / "torn"
    shutil.copytree(catalog_run.run, torn)
    (torn / "catalog.parquet").write_bytes(b"PAR1")

    async def main() -> None:
        async with following(folder, EventLog(log_url)) as (app, client):
            live, metrics = app.state.live, app.state.metrics
            before = live.current()
            for number, (text, reason) in enumerate(
                [
                    (
                        candidate(good, bad_run),
                        "item vectors that are not finite numbers: torn or badly trained",
                    ),
                    (candidate(good, torn), "catalog.parquet: missing or torn"),
                    (candidate(good, Path("/etc")), "etc is not a run folder"),
                    ("{", "live.json: not readable"),
                ],
                1,
            ):
                write(folder, text)
                await until(
                    lambda n=number: (
                        metric_of(metrics, "l2rec_candidates_total", result="refused") == n
                    )
                )
                assert reason in live.refused["reason"] and live.current() is before
                assert str(folder.parent) not in live.refused["reason"]
                answer = await client.post("/v1/recommend", json={"history": ["i1"]})
                assert answer.json()["version"] == before.version
            assert live.status()["refused"]["run"] == "serving"
            # Looked at once, not again and again; a poke tries once more.
            await asyncio.sleep(0.1)
            assert metric_of(metrics, "l2rec_candidates_total", result="refused") == 4
            app.state.follower.poke()
            await until(lambda: metric_of(metrics, "l2rec_candidates_total", result="refused") == 5)
            write(folder, good)
            await until(lambda: live.refused is None)  # what is deployed is live again
            assert live.current() is before
            (folder / "live.json").unlink()
            await asyncio.sleep(0.1)
            assert (await client.get("/readyz")).status_code == 200

    asyncio.run(main())


def test_a_candidate_that_is_rolled_back_while_it_is_loaded_is_not_served(
    catalog_run: Finished,
    other_run: Finished,
    tmp_path: Path,
    log_url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    deploy(catalog_run.run, tmp_path)

    def load_slowly(run: Path, *given: Any, **options: Any) -> Any:
        version = load_with_items(run, *given, **options)
        rollback(tmp_path, check=False)
        return version

    monkeypatch.setattr("l2rec.service.follow.load_with_items", load_slowly)

    async def main() -> None:
        async with following(tmp_path, EventLog(log_url)) as (app, _):
            live, metrics = app.state.live, app.state.metrics
            before = live.current()
            deploy(other_run.run, tmp_path)
            await until(lambda: metric_of(metrics, "l2rec_candidates_total", result="loaded") == 1)
            await asyncio.sleep(0.2)
            assert live.current() is before and live.refused is None
            assert metric_of(metrics, "l2rec_candidates_total", result="loaded") == 1

    asyncio.run(main())


def test_a_run_that_is_trained_anew_in_place_is_served_once_it_is_deployed(
    catalog_run: Finished, other_run: Finished, tmp_path: Path, log_url: str
) -> None:
    folder, run, candidate_run = tmp_path / "serving", tmp_path / "run", tmp_path / "next"

    def train(place: Path, made: Finished) -> None:
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(made.run, place)

    train(run, catalog_run)
    train(candidate_run, catalog_run)
    deploy(run, folder)
    deploy(candidate_run, folder, shadow=True)

    async def main() -> None:
        async with following(folder, EventLog(log_url)) as (app, client):
            live = app.state.live
            first = live.current().version
            await until(lambda: live.shadow is not None)
            await client.put("/v1/items", json={"items": [{"id": "n1", "text": "red hat"}]})
            train(candidate_run, other_run)
            deploy(candidate_run, folder, shadow=True)
            await until(lambda: live.shadow.version != first)
            assert live.current().version == first
            loaded = metric_of(app.state.metrics, "l2rec_candidates_total", result="loaded")
            assert loaded == 2, "the live run was not loaded again"
            train(run, other_run)
            with pytest.raises(ConfigError, match="a shadow needs a folder of its own"):
                deploy(run, folder, shadow=True)
            deploy(run, folder)
            await until(lambda: live.current().version != first)
            assert live.current().version == live.shadow.version and live.refused is None

    asyncio.run(main())


def candidate(text: str, run: Path) -> str:
    value = json.loads(text)
    return json.dumps(value | {"current": str(run)})


def test_items_carry_over_to_what_is_deployed(
    catalog_run: Finished, paper_run: Finished, tmp_path: Path, log_url: str
) -> None:
    folder = tmp_path / "serving"
    deploy(catalog_run.run, folder)

    async def main() -> None:
        async with following(folder, EventLog(log_url)) as (app, client):
            item = {"id": "n1", "text": "heavy red hat", "attributes": {"color": "red"}}
            await client.put("/v1/items", json={"items": [item]})
            await client.delete("/v1/items?id=i4")
            first = app.state.live.current()
            deploy(paper_run.run, folder)
            # While the candidate is loaded, more happens.
            await client.put("/v1/items", json={"items": [item | {"id": "n2"}]})
            await client.delete("/v1/items?id=i5")
            await until(lambda: app.state.live.current().name == "paper")
            assert app.state.live.current().version != first.version
            body = {"history": ["i1", "n2"], "k": 40, "exclude_seen": False}
            answer = (await client.post("/v1/recommend", json=body)).json()
            found = {i["id"] for i in answer["items"]}
            assert {"n1", "n2"} <= found and not {"i4", "i5"} & found and len(found) == 30
            body = {"history": ["i1"], "filters": {"color": ["red"]}}
            answer = (await client.post("/v1/recommend", json=body)).json()
            assert {i["id"] for i in answer["items"]} == {"n1", "n2"}

    asyncio.run(main())


def test_a_database_that_is_away_is_not_the_candidates_fault(
    catalog_run: Finished, other_run: Finished, tmp_path: Path, log_url: str
) -> None:
    folder = tmp_path / "serving"
    deploy(catalog_run.run, folder)
    log = EventLog(log_url)
    away = True

    class Away:
        def __getattr__(self, name: str) -> Any:
            return getattr(log, name)

        def items(self) -> Any:
            if away:
                raise StorageError("the database is away")
            return log.items()

    async def main() -> None:
        nonlocal away
        away = False
        async with following(folder, Away()) as (app, client):
            away = True
            deploy(other_run.run, folder)
            await asyncio.sleep(0.3)
            assert app.state.live.current().name == "catalog" and app.state.live.refused is None
            assert (await client.post("/v1/recommend", json={"history": ["i1"]})).is_success
            away = False
            await until(lambda: app.state.live.current().name == "other")

    asyncio.run(main())


# -- shadow --------------------------------------------------------------------------------------


def test_a_shadow_ranks_what_is_asked_and_serves_nobody(
    catalog_run: Finished, other_run: Finished, tmp_path: Path, log_url: str
) -> None:
    folder = tmp_path / "serving"
    deploy(catalog_run.run, folder)

    async def main() -> None:
        async with following(folder, EventLog(log_url)) as (app, client):
            metrics, live = app.state.metrics, app.state.live

            async def ask(count: int) -> set[str]:
                answers = [
                    await client.post("/v1/recommend", json={"history": [f"i{n}", f"i{n + 1}"]})
                    for n in range(count)
                ]
                return {answer.json()["version"] for answer in answers}

            assert await ask(3) == {live.version.version}
            deploy(catalog_run.run, folder, shadow=True)  # compared with itself
            await until(lambda: live.shadow is not None)
            assert await ask(10) == {live.version.version}
            await until(
                lambda: metric_of(metrics, "l2rec_shadow_requests_total", result="ranked") == 10
            )
            assert metric_of(metrics, "l2rec_shadow_overlap_sum") == pytest.approx(10)
            assert metric_of(metrics, "l2rec_shadow_rank_correlation_sum") == pytest.approx(10)
            assert metric_of(metrics, "l2rec_shadow_seconds_count") == 10
            deploy(other_run.run, folder, shadow=True)
            await until(lambda: live.shadow is not None and live.shadow.name == "other")
            assert await ask(10) == {live.version.version}
            await until(
                lambda: metric_of(metrics, "l2rec_shadow_requests_total", result="ranked") == 20
            )
            assert 10 < metric_of(metrics, "l2rec_shadow_overlap_sum") < 19.9
            assert metric_of(metrics, "l2rec_shadow_rank_correlation_sum") < 19.9
            info = live.status()
            assert info["shadow"]["name"] == "other" and info["live"]["name"] == "catalog"
            assert metric_of(metrics, "l2rec_version_info", role="shadow", name="other") == 1
            end_shadow(other_run.run, folder)
            await until(lambda: live.shadow is None)

    asyncio.run(main())


def test_a_shadow_drops_what_it_cannot_keep_up_with(
    catalog_run: Finished, other_run: Finished, tmp_path: Path, log_url: str
) -> None:
    folder = tmp_path / "serving"
    deploy(catalog_run.run, folder)
    deploy(other_run.run, folder, shadow=True)

    async def main() -> None:
        async with following(folder, EventLog(log_url), shadow_queue=4) as (app, client):
            await until(lambda: app.state.live.shadow is not None)
            app.state.worker.calls += 1  # as if somebody always waited
            for n in range(20):
                await client.post("/v1/recommend", json={"history": [f"i{n}"]})
            metrics = app.state.metrics
            assert metric_of(metrics, "l2rec_shadow_requests_total", result="dropped") == 16
            assert not metric_of(metrics, "l2rec_shadow_requests_total", result="ranked")
            app.state.worker.calls -= 1
            await until(
                lambda: metric_of(metrics, "l2rec_shadow_requests_total", result="ranked") == 4
            )

    asyncio.run(main())
