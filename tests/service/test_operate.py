"""What an operator sees and does: failures, gauges, deployments, and the way back."""

from __future__ import annotations

import getpass
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from starlette.testclient import TestClient
from tests.support.runs import Finished
from tests.support.service import READ_KEY, WRITE_KEY, Serve, error, metric_of

from l2rec.errors import CheckpointError
from l2rec.service.app import create_app
from l2rec.service.events import EventLog
from l2rec.service.live import STEPS, deploy, end_shadow, read_deployment, rollback
from l2rec.service.security import Guard
from l2rec.service.server import load_live
from l2rec.service.settings import Settings

KEYS = {"read_keys": (SecretStr(READ_KEY),), "write_keys": (SecretStr(WRITE_KEY),)}
READ = {"Authorization": f"Bearer {READ_KEY}"}
WRITE = {"Authorization": f"Bearer {WRITE_KEY}"}


# -- metrics and failures ------------------------------------------------------------------------


def test_what_fails_is_remembered(serve: Serve) -> None:
    client = serve()
    assert client.get("/v1/failures").json() == {"failures": []}
    before = time.time()
    refused = client.post("/v1/recommend", json={"history": ["gone"]})
    client.get("/nowhere")
    client.post("/v1/recommend", json={"history": ["i1"]})
    unknown, first = client.get("/v1/failures").json()["failures"]  # newest first
    assert first["request"] == refused.headers["x-request-id"]
    assert before <= first["at"] <= unknown["at"] <= time.time()
    assert first["method"] == "POST" and first["route"] == "/v1/recommend"
    assert first["status"] == 422 and first["detail"].startswith("unknown item ids: 'gone'")
    assert unknown["status"] == 404 and unknown["route"] == "other"


def test_few_failures_are_remembered_and_no_probes(serve: Serve) -> None:
    client = serve()
    client.get("/livez?x=" + "y" * 10)
    for n in range(60):
        client.post("/v1/recommend", json={"history": [f"gone-{n}"]})
    found = client.get("/v1/failures").json()["failures"]
    assert len(found) == 50
    assert "'gone-59'" in found[0]["detail"] and "'gone-10'" in found[-1]["detail"]


def test_who_has_no_key_leaves_no_failure(serve: Serve) -> None:
    client = serve(**KEYS)
    client.request("DELETE", "/v1/items", params={"id": "i1"}, headers=READ)
    client.post("/v1/recommend", json={"history": ["gone"]}, headers=READ)
    for headers in ({}, {"Authorization": f"Bearer wrong-{WRITE_KEY}"}):
        for address in ("/v1/live", "/static/nothing", "/nowhere"):
            assert client.get(address, headers=headers).status_code in (401, 404)
    answer = client.get("/v1/failures", headers=READ)
    assert [each["status"] for each in answer.json()["failures"]] == [422, 403]
    assert WRITE_KEY not in answer.text and READ_KEY not in answer.text
    metrics = client.app.state.metrics  # type: ignore[attr-defined]
    assert metric_of(metrics, "l2rec_requests_total", status="401") == 4


def test_failures_of_an_overload_are_those_of_who_has_a_key(serve: Serve) -> None:
    client = serve(**KEYS, inflight=2)
    guard: Any = client.app.middleware_stack  # type: ignore[attr-defined]
    while not isinstance(guard, Guard):
        guard = guard.app
    guard.inflight += 2
    error(client.get("/v1/live"), 401)
    error(client.get("/v1/live", headers=READ), 503)
    guard.inflight -= 2
    found = client.get("/v1/failures", headers=READ).json()["failures"]
    assert [each["status"] for each in found] == [503]


def test_gauges_of_the_process(serve: Serve) -> None:
    before = time.time()
    client = serve()
    metrics = client.app.state.metrics  # type: ignore[attr-defined]
    assert before <= metric_of(metrics, "l2rec_start_time_seconds") <= time.time()
    assert metric_of(metrics, "l2rec_inflight_requests") == 0
    assert metric_of(metrics, "l2rec_queue_slices") == 0
    told = client.get("/metrics").text
    assert "l2rec_inflight_requests 1.0" in told  # the one that asks


def test_who_may_write(serve: Serve) -> None:
    assert serve().get("/v1/live").json()["may_write"] is True
    client = serve(**KEYS)
    assert client.get("/v1/live", headers=READ).json()["may_write"] is False
    assert client.get("/v1/live", headers=WRITE).json()["may_write"] is True


# -- live.json -----------------------------------------------------------------------------------


def test_who_did_what_and_when(catalog_run: Finished, other_run: Finished, tmp_path: Path) -> None:
    folder, before = tmp_path / "serving", time.time()
    a, b = catalog_run.run.resolve(), other_run.run.resolve()
    deploy(a, folder)
    deploy(b, folder, shadow=True)
    end_shadow(b, folder)
    deploy(b, folder)
    rollback(folder, by="write key 1")
    steps = read_deployment(folder).steps
    assert [(step.action, Path(step.run)) for step in steps] == [
        ("rollback", a),
        ("deploy", b),
        ("end shadow", b),
        ("shadow", b),
        ("deploy", a),
    ]
    times = [step.at for step in reversed(steps)]
    assert times == sorted(times) and before <= times[0] and times[-1] <= time.time()
    assert steps[0].by == "write key 1"
    assert all(step.by.startswith(f"{getpass.getuser()}@") for step in steps[1:])
    versions = {Path(step.run): step.version for step in steps}
    assert versions[a] and versions[b] and versions[a] != versions[b]


def test_steps_are_few_and_those_of_earlier_files_none(
    catalog_run: Finished, other_run: Finished, tmp_path: Path
) -> None:
    deploy(catalog_run.run, tmp_path)
    deploy(other_run.run, tmp_path)
    path = tmp_path / "live.json"
    value = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in value.items() if k != "steps"}))
    assert read_deployment(tmp_path).steps == ()
    path.write_text(json.dumps(value | {"steps": [value["steps"][0]] * STEPS}))
    assert len(rollback(tmp_path).steps) == STEPS
    for torn in ("x", [1], [{"at": "now"}], [{**value["steps"][0], "action": "burn"}]):
        path.write_text(json.dumps(value | {"steps": torn}))
        with pytest.raises(CheckpointError, match="steps: not a list of steps; delete it"):
            read_deployment(tmp_path)


# -- deployments over HTTP -----------------------------------------------------------------------


@pytest.fixture
def followed(
    catalog_run: Finished, other_run: Finished, tmp_path: Path, log_url: str
) -> Iterator[Callable[..., TestClient]]:
    """Return a function that serves a folder where ``other`` was deployed after ``catalog``."""
    folder = tmp_path / "serving"
    deploy(catalog_run.run, folder)
    deploy(other_run.run, folder)
    opened: list[TestClient] = []

    def start(**options: Any) -> TestClient:
        settings = Settings(**{"rate": 0, "poll": 0.02, **options})
        log = EventLog(log_url)
        live, follow = load_live(folder, log, settings, None)
        app = create_app(settings, live, log, follow=follow)
        client = TestClient(app, base_url="http://localhost")
        client.__enter__()
        opened.append(client)
        return client

    yield start
    for client in opened:
        client.__exit__(None, None, None)


def wait_until_live(client: TestClient, name: str, **headers: str) -> None:
    deadline = time.monotonic() + 60
    while client.get("/v1/live", headers=headers).json()["name"] != name:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_rolling_back_by_http(followed: Callable[..., TestClient]) -> None:
    client = followed(**KEYS)
    found = client.get("/v1/deployments", headers=READ).json()
    assert found["current"]["run"] == "other" and found["shadow"] is None
    assert [run["run"] for run in found["previous"]] == ["catalog"]
    assert [(step["action"], step["run"]) for step in found["steps"]] == [
        ("deploy", "other"),
        ("deploy", "catalog"),
    ]
    assert "/" not in found["current"]["run"]  # no path of the server
    place = "/v1/deployments/rollback"
    error(client.post(place, json=found["current"], headers=READ), 403)
    wrong = found["current"] | {"version": "0" * 16}
    message = error(client.post(place, json=wrong, headers=WRITE), 409)
    assert "is no longer what is deployed, other" in message
    done = client.post(place, json=found["current"], headers=WRITE)
    assert done.status_code == 200 and done.json() == found["previous"][0]
    wait_until_live(client, "catalog", **WRITE)
    # Who asked at the same time does not go back once more.
    error(client.post(place, json=found["current"], headers=WRITE), 409)
    after = client.get("/v1/deployments", headers=READ).json()
    assert after["current"] == done.json() and after["previous"] == []
    assert after["steps"][0]["by"] == "write key 1" and after["steps"][0]["action"] == "rollback"
    message = error(client.post(place, json=after["current"], headers=WRITE), 409)
    assert message == "serving: nothing was deployed before catalog"


def test_a_run_that_is_gone_is_not_gone_back_to(
    followed: Callable[..., TestClient], tmp_path: Path
) -> None:
    client = followed()
    path = tmp_path / "serving" / "live.json"
    value = json.loads(path.read_text())
    path.write_text(json.dumps(value | {"previous": [str(tmp_path / "gone")]}))
    current = client.get("/v1/deployments").json()["current"]
    message = error(client.post("/v1/deployments/rollback", json=current), 409)
    assert message == "gone was served before other, and is no longer there"
    assert client.get("/v1/deployments").json()["current"] == current


def test_a_run_that_changed_since_is_not_gone_back_to_by_http(
    catalog_run: Finished, other_run: Finished, tmp_path: Path
) -> None:
    folder, run = tmp_path / "serving", tmp_path / "copy"
    shutil.copytree(catalog_run.run, run)
    deploy(run, folder)
    deploy(other_run.run, folder)
    shutil.copy2(other_run.run / "model.safetensors", run)
    with pytest.raises(CheckpointError, match=r"its weights are \w+, \w+ was deployed"):
        rollback(folder, check=False)
    shutil.copy2(catalog_run.run / "model.safetensors", run)
    (run / "catalog.parquet").write_bytes(b"PAR1")
    with pytest.raises(CheckpointError, match="missing or torn"):
        rollback(folder, check=False)
    assert read_deployment(folder).current == other_run.run.resolve()


def test_one_run_cannot_be_rolled_back(serve: Serve) -> None:
    client = serve()
    empty = {"current": None, "previous": [], "shadow": None, "steps": []}
    assert client.get("/v1/deployments").json() == empty
    body = {"run": "catalog", "version": None}
    message = error(client.post("/v1/deployments/rollback", json=body), 409)
    assert message.startswith("one run folder is served")


def test_a_torn_deployment_is_said(followed: Callable[..., TestClient], tmp_path: Path) -> None:
    client = followed()
    (tmp_path / "serving" / "live.json").write_text("{")
    answer = client.get("/v1/deployments")
    assert error(answer, 409).startswith("serving/live.json: not readable")
    assert str(tmp_path) not in answer.text
