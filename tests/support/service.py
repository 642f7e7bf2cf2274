"""Servers of a run, in this process, in a thread and in a process of their own."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from starlette.testclient import TestClient
from tests.support.command import PROGRAM

from l2rec.service.metrics import Metrics
from l2rec.service.protocol import Http

Serve = Callable[..., TestClient]
"""Opens a client of an app; see the fixture ``serve``."""

READ_KEY, WRITE_KEY = "read-key-0123456789", "write-key-987654321"


def error(answer: Any, status: int) -> str:
    """Return the detail of a refusal, which has to have this status and be problem details."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    value = answer.json()
    assert list(value) == ["type", "title", "status", "detail", "request"]
    assert value["type"] == "about:blank" and value["title"] and value["status"] == status
    assert value["request"] == answer.headers["x-request-id"]
    assert "\n" not in value["detail"]
    return str(value["detail"])


def metric_of(metrics: Metrics, name: str, /, **labels: str) -> float:
    """Sum all samples of a name that have these labels."""
    return sum(
        sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


def postgres_address(server: Any) -> str:
    """Return the address of a PostgreSQL server as SQLAlchemy takes it."""
    return str(server.get_uri()).replace("postgresql://", "postgresql+psycopg://", 1)


@contextmanager
def in_thread(app: Any) -> Iterator[str]:
    """Serve an app in a thread, on a free port; the address."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(app, http=Http, log_level="critical", lifespan="on"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        deadline = time.monotonic() + 60
        while not server.started:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


def environment() -> dict[str, str]:
    """Return this process's environment without settings of the service."""
    return {k: v for k, v in os.environ.items() if not k.startswith("L2REC_")}


class Process:
    """``l2rec serve`` in a process and on a port of its own."""

    def __init__(self, target: Path, *options: str, keys: bool = False) -> None:
        self.process = subprocess.Popen(
            [*PROGRAM, "serve", str(target), "--port", "0", *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment() | ({"L2REC_WRITE_KEYS": WRITE_KEY} if keys else {}),
        )
        self.errors: list[str] = []
        assert self.process.stderr is not None and self.process.stdout is not None
        self._reading = threading.Thread(target=self._read, daemon=True)
        self._reading.start()
        line = self.process.stdout.readline()
        address = re.search(r"http://127\.0\.0\.1:(\d+)", line)
        if address is None:
            self.process.wait(60)
            self._reading.join(10)
            raise AssertionError(line + "".join(self.errors))
        self.url = address[0]
        self.port = int(address[1])

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.errors.extend(self.process.stderr)

    def end(self, number: int = signal.SIGTERM) -> int:
        """End the process by a signal; its exit code."""
        self.process.send_signal(number)
        code = self.process.wait(60)
        self._reading.join(10)
        return code


@contextmanager
def in_process(target: Path, *options: str, keys: bool = False) -> Iterator[Process]:
    """Serve a run or a deployment from a process of its own, which is killed at the end."""
    process = Process(target, *options, keys=keys)
    try:
        yield process
    finally:
        process.process.kill()
        process.process.wait(60)
        for stream in (process.process.stdout, process.process.stderr):
            assert stream is not None
            stream.close()
