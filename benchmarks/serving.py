"""Requests a second and their latency: `l2rec serve` against a bare service on the same backbone.

    python benchmarks/serving.py --run RUN
    python benchmarks/serving.py --run RUN --quick     1 round of 3 seconds
    python benchmarks/serving.py --run RUN --earlier CHECKOUT ITS_RUN

Both are real processes on this machine, asked over loopback by as many clients as stand in the
table: each sends its next request when the last was answered. A request is a history of ten items,
ten items come back. *distinct*: no history comes twice; *repeating*: one of a hundred, all asked
for before. The peer is sentence-transformers, a flat FAISS index and FastAPI (`serving_peer.py`),
on whole texts, of which it reads 256 tokens of a history; and, harder to beat, on texts cut to the
tokens that the run reads of an item. All servers run at once and are measured in turn, so that a
busy neighbour hits each; with fewer threads than cores the servers keep to as many cores, and the
clients to the rest. Rates are medians over rounds; latencies are of all rounds.

``--earlier``: also an earlier build, from a checkout of it and a run that it has trained, with the
same data and environment. ``--without-peers``: these alone.

Then an overload: many more clients than may wait, until most are refused, and a look at memory, at
what is refused and how fast, and at whether everything is as before when they are gone.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import arguments, median, needs, report
from startup import small_run

from l2rec.modules.backbone import dtype_of
from l2rec.runs.folder import load_run_config, read_catalog

CLIENTS = (1, 8, 64)
ITEMS, K, POOL = 10, 10, 100
OVERLOAD, AGAIN, RECOVERED = 700, 0.5, 0.7
COMMAND = "from l2rec.cli import main; main()"  # what the installed script does
OURS, WHOLE, CUT = "l2rec serve", "peer, whole texts", "peer, same tokens"
EARLIER = "l2rec serve, earlier build"
TIMES = 3
"""Requests a second, by those of an earlier build whose layers all run again in every request."""

Histories = Callable[[], list[str]]


# -- servers -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Server:
    """A process that listens on a port of this machine."""

    name: str
    port: int
    process: subprocess.Popen[bytes]

    def resident_mb(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
        return int(line.split()[1]) / 1024


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@contextmanager
def started(name: str, command: Sequence[str], port: int, threads: int) -> Iterator[Server]:
    """Start a server, wait until it answers /livez, and end it by SIGTERM."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
    }
    keys = {"L2REC_READ_KEYS", "L2REC_WRITE_KEYS"}
    environment = {key: value for key, value in environment.items() if key not in keys}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    if threads < len(os.sched_getaffinity(0)):
        os.sched_setaffinity(process.pid, sorted(os.sched_getaffinity(0))[:threads])
    try:
        deadline = time.monotonic() + 600
        while not answers(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{name} did not start: {' '.join(command)}")
            time.sleep(0.2)
        yield Server(name, port, process)
    finally:
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)
        process.kill()
        process.wait()


def answers(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5) as s:
        s.sendall(b"GET /livez HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
        return s.recv(64).startswith(b"HTTP/1.1 200")
    return False


def commands(
    run: Path, item_tokens: int | None, folder: Path, earlier: Sequence[Path], peers: bool
) -> dict[str, Callable[[int], list[str]]]:
    """Build the command that starts each server, by name."""
    peer = [sys.executable, str(Path(__file__).with_name("serving_peer.py")), str(run)]

    def serve(run: Path, events: str, port: int) -> list[str]:
        options = ["--rate", "0", "--no-access-log", "--log", f"sqlite:///{folder / events}"]
        return [sys.executable, "-c", COMMAND, "serve", str(run), *options, "--port", str(port)]

    found = {OURS: lambda port: serve(run, "events.db", port)}
    if peers:
        found[WHOLE] = lambda port: [*peer, str(port)]
    if earlier:
        checkout, its_run = earlier
        path = f"PYTHONPATH={checkout / 'src'}"
        found[EARLIER] = lambda port: ["env", path, *serve(its_run, "earlier.db", port)]
    if peers and item_tokens is not None:
        found[CUT] = lambda port: [*peer, str(port), str(item_tokens)]
    return found


# -- clients -------------------------------------------------------------------------------------


@dataclass
class Measured:
    """Answers that clients got: how often each status, and seconds of each 200 and other answer."""

    wall: float = 0.0
    statuses: Counter[int] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    without_retry_after: int = 0
    broken: int = 0

    @property
    def rate(self) -> float:
        return self.statuses[200] / self.wall


def request_of(
    body: dict[str, Any], path: str = "/v1/recommend", method: str = "POST", key: str = ""
) -> bytes:
    content = json.dumps(body).encode()
    head = (
        f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        + (f"Authorization: Bearer {key}\r\n" if key else "")
        + f"Content-Length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


async def client(port: int, requests: Callable[[], bytes], until: float, found: Measured) -> None:
    """One connection, one request after the other; a new connection where it was closed."""
    reader = writer = None
    while time.monotonic() < until:
        asked = time.perf_counter()
        try:
            if writer is None:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
            assert reader is not None
            writer.write(requests())
            head = await reader.readuntil(b"\r\n\r\n")
            lines = head.lower().split(b"\r\n")
            length = next(line for line in lines if line.startswith(b"content-length:"))
            await reader.readexactly(int(length.split(b":")[1]))
        except (OSError, asyncio.IncompleteReadError):
            found.broken += 1
            if writer is not None:
                writer.close()
            reader = writer = None
            await asyncio.sleep(0.05)
            continue
        spent, status = time.perf_counter() - asked, int(lines[0].split()[1])
        found.statuses[status] += 1
        if status == 200:
            found.seconds.append(spent)
        else:
            found.refused.append(spent)
            found.without_retry_after += not any(x.startswith(b"retry-after:") for x in lines)
            await asyncio.sleep(AGAIN)  # less than the second that it was told
        if b"connection: close" in lines:
            writer.close()
            reader = writer = None
    if writer is not None:
        writer.close()


async def ask(port: int, histories: Histories, clients: int, seconds: float) -> Measured:
    """Send requests from ``clients`` clients at once for ``seconds``."""
    found = Measured()
    began = time.monotonic()

    def requests() -> bytes:
        return request_of({"history": histories(), "k": K})

    await asyncio.gather(*(client(port, requests, began + seconds, found) for _ in range(clients)))
    found.wall = time.monotonic() - began
    return found


class Drawn:
    """Histories of distinct items: new ones, or of a pool of ``POOL``."""

    def __init__(self, ids: Sequence[str], seed: int) -> None:
        self._ids, self._draw = list(ids), random.Random(seed)
        self.pool = [self.new() for _ in range(POOL)]

    def new(self) -> list[str]:
        return self._draw.sample(self._ids, min(ITEMS, len(self._ids) // 2))

    def known(self) -> list[str]:
        return self._draw.choice(self.pool)


# -- measuring -----------------------------------------------------------------------------------


def rates(
    servers: Sequence[Server], drawn: Drawn, rounds: int, seconds: float
) -> list[dict[str, Any]]:
    rows = []
    for server in servers:
        asyncio.run(ask(server.port, drawn.new, 4, min(3.0, seconds)))  # warm
    for what, histories in (("distinct", drawn.new), ("repeating", drawn.known)):
        for clients in CLIENTS:
            found: dict[str, list[Measured]] = {server.name: [] for server in servers}
            if what == "repeating":
                ours = next(server for server in servers if server.name == OURS)
                for history in drawn.pool:
                    asyncio.run(ask_once(ours.port, history))
            for _ in range(rounds):
                for server in servers:
                    found[server.name].append(
                        asyncio.run(ask(server.port, histories, clients, seconds))
                    )
            for name, measured in found.items():
                bad = sum(sum(m.statuses.values()) - m.statuses[200] + m.broken for m in measured)
                milliseconds = 1000 * np.asarray([s for m in measured for s in m.seconds])
                p50, p95, p99 = np.percentile(milliseconds, (50, 95, 99)).tolist()
                rows.append(
                    {
                        "histories": what,
                        "clients": clients,
                        "server": name,
                        "rate": median([m.rate for m in measured]),
                        "p50": p50,
                        "p95": p95,
                        "p99": p99,
                        "requests": len(milliseconds),
                        "errors": bad,
                        # Within rounds.
                        "ratio": against(measured, found[WHOLE]) if WHOLE in found else None,
                        "ratio_cut": against(measured, found[CUT]) if CUT in found else None,
                        "ratio_earlier": (
                            against(measured, found[EARLIER]) if EARLIER in found else None
                        ),
                        "p50_earlier": (
                            median(
                                [
                                    median(a.seconds) / median(b.seconds)
                                    for a, b in zip(measured, found[EARLIER], strict=True)
                                ]
                            )
                            if EARLIER in found
                            else None
                        ),
                    }
                )
                print(rows[-1], file=sys.stderr, flush=True)
    return rows


def against(measured: Sequence[Measured], peer: Sequence[Measured]) -> float:
    return median([a.rate / b.rate for a, b in zip(measured, peer, strict=True)])


def against_earlier(ours: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the goal that is set by an earlier build, if there is one."""
    rows = [row for row in ours if row["histories"] == "distinct"]
    ratios = {row["clients"]: row["ratio_earlier"] for row in rows}
    if None in ratios.values():
        return []
    waits = [row["p50_earlier"] for row in rows]
    again = [row["ratio_earlier"] for row in ours if row["histories"] == "repeating"]
    return [
        {
            "path": "l2rec serve, distinct histories, against an earlier build",
            "goal": f"at least {TIMES} times its requests/s",
            "measured": ", ".join(f"{r:.2f} x with {n} clients" for n, r in ratios.items()),
            "reached": min(ratios.values()) >= TIMES,
        },
        {
            "path": "l2rec serve, distinct histories, against an earlier build: p50",
            "goal": f"at most 1 / {TIMES} of its p50",
            "measured": ", ".join(
                f"{r:.2f} x with {n} clients" for n, r in zip(ratios, waits, strict=True)
            ),
            "reached": max(waits) <= 1 / TIMES,
        },
        {
            "path": "l2rec serve, repeating histories, against an earlier build",
            "goal": "no fewer requests/s, within a tenth",
            "measured": ", ".join(
                f"{r:.2f} x with {n} clients" for n, r in zip(ratios, again, strict=True)
            ),
            "reached": min(again) >= 0.9,
        },
    ]


def against_peers(ours: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the goals that are set by the peers."""
    worst = {
        what: min(row["ratio"] for row in ours if row["histories"] == what)
        for what in ("distinct", "repeating")
    }
    cut = [row["ratio_cut"] for row in ours if row["histories"] == "distinct"]
    same = f" ({min(cut):.2f} x where it reads the same tokens)" if None not in cut else ""
    return [
        {
            "path": "l2rec serve, distinct histories",
            "goal": "at least the requests/s of the peer at 1, 8 and 64 clients",
            "measured": f"at least {worst['distinct']:.2f} x{same}",
            "reached": worst["distinct"] >= 1,
        },
        {
            "path": "l2rec serve, repeating histories",
            "goal": "at least 3 times those of the peer",
            "measured": f"at least {worst['repeating']:.2f} x",
            "reached": worst["repeating"] >= 3,
        },
    ]


async def ask_once(port: int, history: list[str]) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request_of({"history": history, "k": K}))
    await reader.readuntil(b"\r\n\r\n")
    writer.close()


def overload(server: Server, drawn: Drawn, seconds: float) -> dict[str, Any]:
    """Send far more requests than may wait; record memory before, at most, and after."""

    async def watched() -> tuple[Measured, float]:
        peak = 0.0

        async def watch() -> None:
            nonlocal peak
            while True:
                peak = max(peak, server.resident_mb())
                await asyncio.sleep(0.1)

        watching = asyncio.create_task(watch())
        found = await ask(server.port, drawn.new, OVERLOAD, seconds)
        watching.cancel()
        return found, peak

    usual = asyncio.run(ask(server.port, drawn.new, 8, seconds / 2))
    # Once, so that every buffer has been as large as it gets; what grows after that is a leak.
    first, _ = asyncio.run(watched())
    before = server.resident_mb()
    found, peak = asyncio.run(watched())
    after = server.resident_mb()
    again = asyncio.run(ask(server.port, drawn.new, 8, seconds / 2))
    refused = 1000 * np.asarray(found.refused or [float("nan")])
    return {
        "clients": OVERLOAD,
        "answered": found.statuses[200],
        "refused": {str(code): n for code, n in sorted(found.statuses.items()) if code != 200},
        "broken connections": found.broken + first.broken,
        "without Retry-After": found.without_retry_after + first.without_retry_after,
        "refusals, ms p50 / p99": np.percentile(refused, (50, 99)).round(1).tolist(),
        "MB before, at most, after": [round(x) for x in (before, peak, after)],
        "rate before, during, after": [round(m.rate, 1) for m in (usual, found, again)],
        "errors after": sum(again.statuses.values()) - again.statuses[200] + again.broken,
        "other codes": sorted({*found.statuses} - {200, 429, 503}),
    }


def measure(
    run: Path,
    folder: Path,
    threads: int,
    rounds: int,
    seconds: float,
    earlier: Sequence[Path] = (),
    peers: bool = True,
) -> tuple[Any, Any]:
    config, _ = load_run_config(run)
    item_tokens = getattr(config.model, "item_tokens", None)
    ids = read_catalog(run).table["item_id"].to_pylist()
    drawn = Drawn(ids, seed=0)
    mine = sorted(os.sched_getaffinity(0))
    with ExitStack() as stack:
        servers = []
        for name, command in commands(run, item_tokens, folder, earlier, peers).items():
            port = free_port()
            servers.append(stack.enter_context(started(name, command(port), port, threads)))
        if threads < len(mine):
            os.sched_setaffinity(0, mine[threads:])
        try:
            rows = rates(servers, drawn, rounds, seconds)
            return rows, overload(servers[0], drawn, 2 * seconds)
        finally:
            os.sched_setaffinity(0, mine)


def main(argv: Sequence[str] | None = None) -> None:
    p = arguments(__file__, __doc__)
    p.add_argument("--run", type=Path, metavar="RUN", help="a finished run (default: a tiny one)")
    p.add_argument(
        "--earlier",
        type=Path,
        nargs=2,
        default=[],
        metavar=("CHECKOUT", "ITS_RUN"),
        help="an earlier build to compare with",
    )
    p.add_argument("--without-peers", action="store_true", help="measure l2rec alone")
    p.add_argument("--rounds", type=int, default=3, help="(default %(default)s)")
    p.add_argument("--seconds", type=float, default=5.0, help="of a round (default %(default)s)")
    args = p.parse_args(argv)
    if not args.without_peers:
        needs(p, "bench,faiss", "sentence_transformers", "faiss")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # servers are ended on the way
    rounds, seconds = (1, 3.0) if args.quick else (args.rounds, args.seconds)
    threads = args.threads or torch.get_num_threads()
    torch.set_num_threads(threads)  # as it is reported
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        run = args.run or small_run(folder, "training.max_steps=1", items=400)
        rows, loaded = measure(
            run, folder, threads, rounds, seconds, args.earlier, not args.without_peers
        )
        backbone = load_run_config(run)[0].backbone
    ours = [row for row in rows if row["server"] == OURS]
    refused = sum(loaded["refused"].values())
    before, peak, after = loaded["MB before, at most, after"]
    rate_before, _, rate_after = loaded["rate before, during, after"]
    quick = loaded["refusals, ms p50 / p99"][0]
    dtype = str(dtype_of(backbone)).removeprefix("torch.")
    fine = (
        refused > 0
        and not loaded["other codes"]
        and not loaded["without Retry-After"]
        and not loaded["errors after"]
        and peak < 1.1 * before
        and rate_after > RECOVERED * rate_before
    )
    report(
        "serving",
        args.json,
        goal="a service that adapts the model to each user answers at least as many requests as a "
        "bare one of a few lines, and three times as many when histories repeat",
        columns=[
            ("histories", "histories"),
            ("clients", "clients"),
            ("server", "server"),
            ("rate", "requests/s"),
            ("p50", "p50, ms"),
            ("p95", "p95, ms"),
            ("p99", "p99, ms"),
            ("ratio", "ratio to the peer"),
            ("ratio_cut", "on the same tokens"),
            ("ratio_earlier", "ratio to the earlier build"),
            ("p50_earlier", "p50, to the earlier build's"),
            ("errors", "errors"),
        ],
        rows=rows,
        notes=[
            f"l2rec and its peers encode in {dtype}.",
            "Overload, "
            + "; ".join(f"{key}: {value}" for key, value in loaded.items() if value != [])
            + ".",
        ],
        overload=loaded,
        dtype=dtype,
        summary=[
            *against_earlier(ours),
            *([] if args.without_peers else against_peers(ours)),
            {
                "path": "l2rec serve, overload",
                "goal": "only quick 429 or 503 with Retry-After, flat memory, all well afterwards",
                "measured": f"{refused:,} refused, half of them within {quick:g} ms; "
                f"{before} -> {peak} -> {after} MB; {rate_before:g} -> {rate_after:g} requests/s",
                "reached": fine,
            },
        ],
    )


if __name__ == "__main__":
    main()
