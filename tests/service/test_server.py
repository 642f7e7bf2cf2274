"""A real process: what it refuses to start with, and how it ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.support.command import PROGRAM
from tests.support.runs import Finished
from tests.support.service import WRITE_KEY, environment, in_process, in_thread
from typer.testing import CliRunner

from l2rec.cli import app
from l2rec.errors import L2RecError
from l2rec.runs.predictor import load
from l2rec.service import protocol, server
from l2rec.service.app import create_app
from l2rec.service.events import EventLog
from l2rec.service.live import Live, deploy
from l2rec.service.loading import load_version
from l2rec.service.settings import Settings


def test_a_public_address_without_a_key_is_refused() -> None:
    done = subprocess.run(
        [*PROGRAM, "serve", "runs", "--host", "0.0.0.0"],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=120,
    )
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("l2rec: --host 0.0.0.0 can be reached from other machines")


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The message of the error that `l2rec serve` ends with, in this process."""
    for name in ("L2REC_READ_KEYS", "L2REC_WRITE_KEYS", "L2REC_LOG"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments: str) -> str:
        result = CliRunner().invoke(app, ["serve", "--port", "0", *arguments])
        assert isinstance(result.exception, L2RecError), result.output
        return str(result.exception)

    return run


def test_what_cannot_be_served(
    command: Any, catalog_run: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = str(catalog_run.run)
    assert "nowhere is not a folder; give a run" in command(str(tmp_path / "nowhere"))
    assert "is not a run folder: it has no config.yaml" in command(str(tmp_path))
    assert not any(tmp_path.iterdir()), "nothing is left in a folder that is not served"
    assert command(run, "--inflight", "0").startswith("--inflight: Input should be greater than")
    assert "--queue 256: seconds that a history may wait" in command(run, "--queue", "256")
    assert command(run, "--index", "x").startswith("--index: Input should be 'auto', ")
    share = command(run, "--experiment", "e", "--treatment-share", "1")
    assert share == "--treatment-share: Input should be less than 1"
    assert command(run, "--experiment", "a b").startswith("--experiment: String should match")
    assert "--control needs --experiment NAME" in command(run, "--control", run)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        line = command(run, "--port", str(taken.getsockname()[1]))
        assert "choose another --port, or 0 for any" in line
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda _, mode: mode != os.W_OK)
        assert "cannot be written, and the event log lies there by default" in command(run)
    refused = CliRunner().invoke(app, ["serve", run, "--threads", "-1"])
    assert refused.exit_code == 2 and "--threads" in refused.output
    monkeypatch.setenv("L2REC_READ_KEYS", "hunter2")
    line = command(run, "--host", "0.0.0.0")
    assert "L2REC_READ_KEYS: key 1 has 7 characters" in line and "hunter2" not in line
    monkeypatch.delenv("L2REC_READ_KEYS")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "l2rec.service.server", raising=False)
    assert command(run) == "`l2rec serve` needs uvicorn: pip install 'l2rec[serve]'"


def test_an_unfinished_run_is_not_served(
    command: Any, catalog_run: Finished, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(catalog_run.run, run)
    (run / "report.json").unlink()
    line = command(str(run))
    assert line.startswith(f"{run} is not finished") and "--resume" in line
    assert not (run / "events.db").exists()
    (run / "report.json").write_text("{}")
    control = tmp_path / "control"
    shutil.copytree(catalog_run.run, control)
    (control / "report.json").unlink()
    line = command(str(catalog_run.run), "--experiment", "e", "--control", str(control))
    assert line.startswith(f"{control} is not finished")


def test_deploy_and_rollback_by_command(
    catalog_run: Finished, other_run: Finished, tmp_path: Path
) -> None:
    def invoke(*arguments: str) -> str:
        result = CliRunner().invoke(app, list(arguments))
        assert result.exit_code == 0, result.output
        return result.output

    folder = str(tmp_path / "serving")
    for finished in (catalog_run, other_run):
        said = invoke("deploy", str(finished.run), "--to", folder)
        assert said.endswith(f"{folder}: current {finished.run.resolve()}, shadow none\n")
    assert said.startswith("items 30 -> 30 (0 gained, 0 lost)\nusers 40 -> 40 (0 gained, 0 lost)\n")
    said = invoke("deploy", str(catalog_run.run), "--to", folder, "--shadow")
    assert said.endswith(f"shadow {catalog_run.run.resolve()}\n")
    said = invoke("deploy", str(catalog_run.run), "--to", folder, "--stop-shadow")
    assert said.endswith("shadow none\n")
    said = invoke("rollback", folder)
    assert said == f"{folder}: current {catalog_run.run.resolve()}, before it 0 more\n"


@pytest.mark.parametrize(
    "sent",
    [
        b"nonsense\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: localhost\r\nContent-Length: x\r\n\r\n",
    ],
)
def test_what_is_not_http_is_answered_with_problem_details(
    sent: bytes, catalog_run: Finished, log_url: str
) -> None:
    live = Live(load_version(catalog_run.run))
    with in_thread(create_app(Settings(), live, EventLog(log_url))) as url:
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as connection:
            connection.sendall(sent)
            answer = b""
            while part := connection.recv(65536):
                answer += part
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 "), answer
        assert b"content-type: application/problem+json" in head.lower()
        value = json.loads(body)
        assert value["status"] == 400 and value["title"] == "Bad Request"
        assert value["detail"].startswith("not HTTP/1.1: ")
        assert httpx.get(f"{url}/livez").status_code == 200  # others are served as before


def test_sigterm_answers_what_is_in_flight(catalog_run: Finished, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'events.db'}"
    with in_process(catalog_run.run, "--log", url, keys=True) as server:
        headers = {"Authorization": f"Bearer {WRITE_KEY}"}
        idle = httpx.Client(base_url=server.url, headers=headers)
        assert idle.get("/readyz").json()["status"] == "ready"
        assert "server" not in idle.get("/livez").headers
        # A request that is half sent when the signal comes, and ends after it.
        body = json.dumps({"history": ["i1", "i2"], "k": 3}).encode()
        with socket.create_connection(("127.0.0.1", server.port)) as half:
            half.sendall(
                b"POST /v1/recommend HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                + f"Authorization: Bearer {WRITE_KEY}\r\n".encode()
                + f"Content-Length: {len(body)}\r\n\r\n".encode()
                + body[:5]
            )
            time.sleep(0.3)
            server.process.send_signal(signal.SIGTERM)
            deadline = time.monotonic() + 30
            while True:  # until nobody new is let in
                assert time.monotonic() < deadline
                try:
                    socket.create_connection(("127.0.0.1", server.port), timeout=1).close()
                except OSError:
                    break
                time.sleep(0.02)
            half.sendall(body[5:])
            answer = b""
            while part := half.recv(65536):
                answer += part
        head, _, content = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 "), answer
        expected = load(catalog_run.run).recommend(["i1", "i2"], 3)
        assert [i["id"] for i in json.loads(content)["items"]] == [i["id"] for i in expected.items]
        assert server.process.wait(60) == 0
        idle.close()
        said = "".join(server.errors)
        assert "Traceback" not in said and WRITE_KEY not in said


@pytest.fixture
def connected(
    catalog_run: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[], socket.socket]]:
    """Opens connections to a server that is less patient than others."""
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 0.4)
    log = EventLog(f"sqlite:///{tmp_path / 'events.db'}")
    served = create_app(Settings(), Live(load_version(catalog_run.run)), log)
    with in_thread(served) as url, ExitStack() as stack:
        port = int(url.rpartition(":")[2])

        def connect() -> socket.socket:
            made = socket.create_connection(("127.0.0.1", port), timeout=20)
            return stack.enter_context(made)

        yield connect


def received(connection: socket.socket) -> bytes:
    """Read until the other side closes."""
    parts = []
    while part := connection.recv(65536):
        parts.append(part)
    return b"".join(parts)


HEAD = b"POST /v1/recommend HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def test_a_head_that_does_not_come_ends_the_connection(connected: Any) -> None:
    silent, slow, again = (connected() for _ in range(3))
    slow.sendall(b"GET /livez HTTP/1.1\r\nHost: loc")
    again.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
    answer = b""
    while not answer.endswith(b"}"):
        answer += again.recv(65536)
    assert answer.startswith(b"HTTP/1.1 200")
    again.sendall(b"GET /livez HTTP/1.1\r\nHo")  # the second head of a connection
    assert received(silent) == received(slow) == received(again) == b""


def test_a_body_has_its_own_time(connected: Any) -> None:
    body = b'{"history": ["i1"], "k": 3}'
    connection = connected()
    connection.sendall(HEAD + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body))
    for byte in range(len(body)):
        connection.sendall(body[byte : byte + 1])
        time.sleep(0.03)  # 0.8 s in all: more than a head may take
    assert received(connection).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET /livez HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n", b"200"),
        (b"GET /livez HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n", b"200"),
        (b"POST /v1/events HTTP/1.1\r\nHost: example.com\r\nContent-Length: 1000\r\n\r\n", b"400"),
    ],
)
def test_a_body_that_is_not_read_does_not_keep_a_connection(
    head: bytes, status: bytes, connected: Any
) -> None:
    connection = connected()
    connection.sendall(head)
    answer = connection.recv(65536)
    assert answer.startswith(b"HTTP/1.1 " + status)
    closed, deadline = False, time.monotonic() + 3
    while not closed and time.monotonic() < deadline:
        try:
            connection.sendall(b"1")
        except OSError:
            closed = True
        time.sleep(0.05)
    assert closed


def test_what_is_left_of_a_refused_body_may_come(connected: Any) -> None:
    """Whoever sends all of it may go on with the connection."""
    connection = connected()
    connection.sendall(b"POST /v1/events HTTP/1.1\r\nHost: x.org\r\nContent-Length: 4\r\n\r\n")
    answer = b""
    while not answer.endswith(b"}"):
        answer += connection.recv(65536)
    assert answer.startswith(b"HTTP/1.1 400")
    connection.sendall(b"1234" + HEAD + b"Connection: close\r\nContent-Length: 19\r\n\r\n")
    connection.sendall(b'{"history": ["i1"]}')
    assert received(connection).startswith(b"HTTP/1.1 200")


def test_two_lengths_of_one_body_are_refused(connected: Any) -> None:
    connection = connected()
    chunks = b'1b\r\n{"history": ["i1"], "k": 3}\r\n0\r\n\r\n'
    hidden = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"
    lengths = b"Content-Length: %d\r\nTransfer-Encoding: chunked\r\n\r\n" % len(chunks)
    connection.sendall(HEAD + lengths + chunks + hidden)
    answer = received(connection)
    assert answer.startswith(b"HTTP/1.1 400") and answer.count(b"HTTP/1.1") == 1
    assert b"both Content-Length and Transfer-Encoding" in answer
    alone = connected()
    alone.sendall(HEAD + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks)
    assert received(alone).startswith(b"HTTP/1.1 200")


def test_storage_gives_up_before_the_request(tmp_path: Path) -> None:
    log = server.open_log(f"sqlite:///{tmp_path / 'events.db'}", Settings(timeout=8))
    with log.engine.connect() as connection:
        (busy,) = connection.exec_driver_sql("PRAGMA busy_timeout").one()
    log.close()
    # A write may wait for the one before it, and then for itself.
    assert busy == 3200 and 2 * busy < 8000


def test_items_and_events_survive_kill_9(catalog_run: Finished, tmp_path: Path) -> None:
    """What was acknowledged before the kill is there after it, whenever it comes."""
    url = f"sqlite:///{tmp_path / 'events.db'}"
    acknowledged: list[int] = []

    def write(client: httpx.Client, number: int) -> None:
        item = {"id": f"n{number}", "text": f"heavy red hat {number}"}
        event = {"id": f"e{number}", "user": "u", "item": f"n{number}", "type": "click"}
        for method, path, body in (
            ("PUT", "/v1/items", {"items": [item]}),
            ("POST", "/v1/events", {"events": [event]}),
        ):
            client.request(method, path, json=body).raise_for_status()
        acknowledged.append(number)

    with in_process(catalog_run.run, "--log", url) as server:
        with httpx.Client(base_url=server.url, timeout=30) as client:
            killer = threading.Timer(0.4, server.process.kill)
            killer.start()
            with pytest.raises(httpx.HTTPError):
                for number in range(10_000):
                    write(client, number)
        assert server.process.wait(60) == -signal.SIGKILL
    assert acknowledged
    with (
        in_process(catalog_run.run, "--log", url) as server,
        httpx.Client(base_url=server.url, timeout=30) as client,
    ):
        body: Any = {"history": ["i1"], "k": 500}
        found = client.post("/v1/recommend", json=body).json()
        ids = {item["id"] for item in found["items"]}
        assert {f"n{number}" for number in acknowledged} <= ids
        again = [
            {"id": f"e{n}", "user": "u", "item": f"n{n}", "type": "click"} for n in acknowledged
        ]
        stored = client.post("/v1/events", json={"events": again[:1000]}).json()
        assert stored == {"stored": 0, "ignored": len(again[:1000])}
        assert client.post("/v1/recommend", json={"user": "u"}).status_code == 200


def test_a_folder_is_followed(catalog_run: Finished, other_run: Finished, tmp_path: Path) -> None:
    folder = tmp_path / "serving"
    deploy(catalog_run.run, folder)
    with in_process(folder) as server, httpx.Client(base_url=server.url, timeout=30) as client:

        def version() -> str:
            answer = client.post("/v1/recommend", json={"history": ["i1"]})
            return str(answer.json()["version"])

        assert version() == load(catalog_run.run).version
        assert (folder / "events.db").is_file()
        deploy(other_run.run, folder)
        server.process.send_signal(signal.SIGHUP)
        deadline = time.monotonic() + 30
        while version() != load(other_run.run).version:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert server.end(signal.SIGINT) == 0
        assert "Traceback" not in "".join(server.errors)
