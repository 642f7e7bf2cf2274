"""What one client can do to another, and what an item that is put costs in memory.

    python benchmarks/limits.py --run runs/ml
    python benchmarks/limits.py --run RUN --earlier CHECKOUT ITS_RUN

A server with two read keys and a write key runs as a process on this machine. *alone*: one client
asks for recommendations, histories of ten items that never come twice. *beside*: so does it while
another read key sends the largest bodies that are allowed, from many connections, as fast as they
are answered: texts and histories to embed, histories to explain, long histories to rank. Refused,
it comes again after half a second, whatever it was told. Then items are put, some at a time, and
the server's resident memory is read before and after.

With fewer threads than cores the server keeps to as many cores, and the clients to the rest.
``--earlier``: an earlier build too, from a checkout of it and a run that it has trained; both
servers run at once and are measured in turn.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import arguments, report
from serving import COMMAND, Drawn, Measured, Server, client, free_port, request_of, started
from startup import small_run

from l2rec.runs.folder import read_catalog
from l2rec.runs.predictor import load

OURS, EARLIER = "l2rec serve", "l2rec serve, earlier build"
VICTIM, ATTACKER, WRITER = "victim-0123456789", "attacker-0123456789", "writer-0123456789"
CONNECTIONS = 4
"""Connections of the attacker for each kind of body."""
PUT = 25
"""Items of a request."""
BELOW = 1.0
"""Seconds; the p99 that is wanted beside an attacker."""
ITEM_KB = 4.0
"""Memory of an item, beside its vector, at most."""

Body = tuple[str, dict[str, Any]]
"""Path, and what is sent there."""


def largest(ids: Sequence[str], texts: Sequence[str], seed: int = 0) -> list[Callable[[], Body]]:
    """Return functions that make a body as large as one read key may send, no two alike."""
    draw = random.Random(seed)
    words = " ".join(texts).split()

    def history() -> list[str]:
        return draw.choices(ids, k=500)

    def text() -> str:
        return " ".join(draw.choices(words, k=10_000))[:10_000].rstrip()

    return [
        lambda: ("/v1/embed/items", {"texts": [text() for _ in range(64)]}),
        lambda: ("/v1/embed/users", {"histories": [history() for _ in range(64)]}),
        lambda: ("/v1/explain", {"history": history(), "item": ids[0]}),
        lambda: ("/v1/recommend", {"history": history(), "k": 500, "deny": list(ids)[:10_000]}),
    ]


def serve(name: str, run: Path, folder: Path, source: Path | None) -> Callable[[int], list[str]]:
    """Build the command of a server with keys; source: where its code is, None for this one."""
    keys = [f"L2REC_READ_KEYS={VICTIM},{ATTACKER}", f"L2REC_WRITE_KEYS={WRITER}"]
    path = [] if source is None else [f"PYTHONPATH={source}"]
    log = f"sqlite:///{folder / name.replace(' ', '-')}.db"

    def command(port: int) -> list[str]:
        options = ["--no-access-log", "--log", log, "--port", str(port)]
        return ["env", *path, *keys, sys.executable, "-c", COMMAND, "serve", str(run), *options]

    return command


def cycle(bodies: Sequence[bytes]) -> Callable[[], bytes]:
    return itertools.cycle(bodies).__next__


async def asked(
    port: int, drawn: Drawn, attacks: Sequence[Sequence[bytes]], seconds: float
) -> tuple[Measured, Measured]:
    """Let one client recommend, and others attack: what both got. attacks: bodies by kind."""
    victim, attacker = Measured(), Measured()
    until = time.monotonic() + seconds

    def requests() -> bytes:
        return request_of({"history": drawn.new(), "k": 10}, key=VICTIM)

    others = [
        client(port, cycle(bodies), until, attacker)
        for bodies in attacks
        for _ in range(CONNECTIONS)
    ]
    await asyncio.gather(client(port, requests, until, victim), *others)
    return victim, attacker


def isolation(
    servers: Sequence[Server], drawn: Drawn, attacks: Sequence[Sequence[bytes]], seconds: float
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for what, sent in (("alone", []), ("beside", attacks)):
        for server in servers:
            victim, attacker = asyncio.run(asked(server.port, drawn, sent, seconds))
            times = 1000 * np.asarray(victim.seconds or [float("nan")])
            p50, p99 = np.percentile(times, (50, 99)).tolist()
            alone = next((row for row in rows if row["server"] == server.name), None)
            rows.append(
                {
                    "server": server.name,
                    "what": what,
                    "answered": victim.statuses[200],
                    "p50": p50,
                    "p99": p99,
                    "longest": float(times.max()),
                    "times": 1.0 if alone is None else p50 / alone["p50"],
                    "refused": sum(victim.statuses.values()) - victim.statuses[200],
                    "attacker": ", ".join(
                        f"{code}: {n}" for code, n in sorted(attacker.statuses.items())
                    ),
                }
            )
            print(rows[-1], file=sys.stderr, flush=True)
    return rows


def puts(count: int) -> Iterator[bytes]:
    """Make the requests that put ``count`` items of a usual length."""
    for start in range(0, count, PUT):
        items = [
            {
                "id": f"put-{n}",
                "text": f"The {n}th film of its kind ({1920 + n % 100}), Drama Comedy",
                "attributes": {"year": str(1920 + n % 100)},
            }
            for n in range(start, min(start + PUT, count))
        ]
        yield request_of({"items": items}, "/v1/items", "PUT", WRITER)


async def put(port: int, requests: Sequence[bytes]) -> None:
    """Send requests one after the other, each until it is not refused."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for request in requests:
        while True:
            writer.write(request)
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            lines = head.split(b"\r\n")
            length = next(line for line in lines if line.startswith(b"content-length:"))
            answer = await reader.readexactly(int(length.split(b":")[1]))
            if lines[0].split()[1] == b"200":
                break
            if lines[0].split()[1] != b"503":
                raise RuntimeError(answer.decode())
            await asyncio.sleep(1)
    writer.close()


def memory(server: Server, items: int) -> float:
    """Return the resident KB that each item adds, of the last two thirds that are put."""
    requests = list(puts(items))
    first = len(requests) // 3
    asyncio.run(put(server.port, requests[:first]))
    before = server.resident_mb()
    asyncio.run(put(server.port, requests[first:]))
    return 1024 * (server.resident_mb() - before) / (items - PUT * first)


def main(argv: Sequence[str] | None = None) -> None:
    p = arguments(__file__, __doc__)
    p.add_argument("--run", type=Path, metavar="RUN", help="a finished run (default: a tiny one)")
    p.add_argument("--earlier", nargs=2, type=Path, metavar=("CHECKOUT", "ITS_RUN"), default=())
    p.add_argument("--seconds", type=float, default=20, help="of each measurement")
    p.add_argument("--items", type=int, default=3000, help="items that are put")
    args = p.parse_args(argv)
    seconds, items = (3.0, 300) if args.quick else (args.seconds, args.items)
    with tempfile.TemporaryDirectory() as base, ExitStack() as stack:
        folder = Path(base)
        run = args.run or small_run(folder)
        texts = read_catalog(run).texts
        ids = read_catalog(run).table["item_id"].to_pylist()
        vectors = load(run).vectors
        vector_kb = 0.0 if vectors is None else vectors.shape[1] * 4 / 1024
        commands = {OURS: serve(OURS, run, folder, None)}
        if args.earlier:
            checkout, its_run = args.earlier
            commands[EARLIER] = serve(EARLIER, its_run, folder, checkout / "src")
        mine = sorted(os.sched_getaffinity(0))
        threads = args.threads or len(mine)
        torch.set_num_threads(threads)  # as it is reported
        servers = []
        for name, command in commands.items():
            port = free_port()
            servers.append(stack.enter_context(started(name, command(port), port, threads)))
        if threads < len(mine):
            os.sched_setaffinity(0, mine[threads:])
        attacks = [
            [request_of(body, path, key=ATTACKER) for path, body in (make() for _ in range(5))]
            for make in largest(ids, texts)
        ]
        try:
            rows = isolation(servers, Drawn(ids, seed=0), attacks, seconds)
            costs = {server.name: memory(server, items) for server in servers}
        finally:
            os.sched_setaffinity(0, mine)
    beside = next(row for row in rows if row["server"] == OURS and row["what"] == "beside")
    report(
        "limits",
        args.json,
        goal="one read key with the largest bodies that are allowed leaves the others answered",
        columns=[
            ("server", "server"),
            ("what", "the other key"),
            ("answered", "answered"),
            ("p50", "p50, ms"),
            ("p99", "p99, ms"),
            ("longest", "longest, ms"),
            ("times", "p50, times that alone"),
            ("refused", "refused"),
            ("attacker", "what the other key got"),
        ],
        rows=rows,
        notes=[
            "Resident memory of an item that is put: "
            + "; ".join(f"{name}: {cost:.1f} KB" for name, cost in costs.items())
            + f"; its vector is {vector_kb:.1f} KB.",
        ],
        memory=costs,
        summary=[
            {
                "path": "recommendations beside the largest bodies of another key",
                "goal": f"p99 below {1000 * BELOW:g} ms, none refused",
                "measured": f"{beside['p99']:.0f} ms, {beside['refused']} refused",
                "reached": beside["p99"] < 1000 * BELOW and not beside["refused"],
            },
            {
                "path": "memory of an item that is put, beside its vector",
                "goal": f"at most {ITEM_KB:g} KB",
                "measured": f"{costs[OURS] - vector_kb:.1f} KB",
                "reached": costs[OURS] - vector_kb <= ITEM_KB,
            },
        ],
    )


if __name__ == "__main__":
    main()
