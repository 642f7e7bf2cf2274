"""A server as a process: load what is served, then run the app under uvicorn to a clean end."""

from __future__ import annotations

__all__ = ["load_live", "open_log", "serve"]

import asyncio
import gc
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvicorn

from l2rec.errors import CheckpointError, ConfigError
from l2rec.runs.folder import load_run_config, require_finished
from l2rec.service.app import create_app
from l2rec.service.events import EventLog
from l2rec.service.experiments import POPULARITY, popular, record_arms, record_plan
from l2rec.service.follow import load_first, load_with_items
from l2rec.service.live import FILE, Live, read_deployment
from l2rec.service.protocol import Http
from l2rec.service.settings import Settings

logger = logging.getLogger("l2rec.service")

SWITCH_SECONDS = 0.001
"""Longest time that a thread may keep the interpreter while others want it: the event loop must not
wait for a model's Python between two matrix products.
"""
BUSY_SHARE = 0.4
"""Share of `Settings.timeout` that the database may be locked: a write waits once for those before
it and once itself, and its client should see that error, not the request's.
"""
GRACE = 10
"""Seconds beyond `Settings.shutdown` after which a process that hangs is ended."""


def serve(
    target: Path,
    settings: Settings,
    *,
    log_url: str | None = None,
    control: str | Path | None = None,
    say: Callable[[str], None] = print,
) -> int:
    """Serve a run folder, or the runs that live.json of a folder names, until SIGTERM or SIGINT.

    Args:
        log_url: URL of the event log; SQLite in ``target`` by default.
        control: run that serves the control arm of the experiment, or ``popularity``; the live run
            by default.
        say: receives the line that says where the server listens.

    Returns:
        0, after every request in progress was answered.

    Raises:
        ConfigError: options that do not fit together, or an address that is taken.
        L2RecError: no run can be served.
    """
    settings.check()
    if control is not None and settings.experiment is None:
        raise ConfigError("--control needs --experiment NAME: it serves that experiment's arm")
    if not target.is_dir():
        raise CheckpointError(f"{target} is not a folder; give a run, or what `l2rec deploy` wrote")
    if not (target / FILE).is_file():
        load_run_config(target)  # before an event log is written into it
        require_finished(target)
    if log_url is None and not os.access(target, os.W_OK):
        raise CheckpointError(
            f"{target} cannot be written, and the event log lies there by default; give another "
            "place: --log sqlite:///PATH"
        )
    _log_to_stderr()
    listening = _listen(settings)
    log = open_log(log_url or f"sqlite:///{target.resolve() / 'events.db'}", settings)
    try:
        if settings.experiment is not None:
            record_plan(log, settings.experiment)
        live, follow = load_live(target, log, settings, control)
        if settings.experiment is not None:
            record_arms(log, settings.experiment, live.all())
        _collect_garbage_again()
        app = create_app(settings, live, log, follow=follow)
        config = uvicorn.Config(
            app,
            http=Http,
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            ws="none",
            lifespan="on",
            timeout_graceful_shutdown=settings.shutdown,
        )
        host, port = listening.getsockname()[:2]
        version = live.current()
        line = f"serving {version.name} (version {version.version}) on http://{_shown(host)}:{port}"
        _run(_Server(config, lambda: say(line)), app, listening)
    finally:
        listening.close()
        log.close()
    return 0


def open_log(url: str, settings: Settings) -> EventLog:
    """Open the event log of a server, whose errors come before those of a request's timeout."""
    return EventLog(url, busy=BUSY_SHARE * settings.timeout)


def load_live(
    target: Path, log: EventLog, settings: Settings, control: str | Path | None
) -> tuple[Live, tuple[Path, Path, Path | None] | None]:
    """Load the versions that a server starts with.

    Args:
        target: run folder, or a folder with a live.json.
        control: run that serves the control arm, or ``popularity``; None for none.

    Returns:
        The versions, and `create_app`'s ``follow``: None where ``target`` is a run folder.

    Raises:
        L2RecError: no run can be served.
    """
    follow: tuple[Path, Path, Path | None] | None = None
    refused: str | None = None
    if (target / FILE).is_file():
        wanted = read_deployment(target)
        version, run, refused = load_first(wanted, log, index=settings.index)
        # The follower loads whatever is not named here, and so also the shadow.
        follow = (target, run if refused is None else wanted.current, None)
        live = Live(version, folder=target)
        if refused is not None:
            live.refuse(wanted.current, refused)
    else:
        live = Live(load_with_items(target, log, index=settings.index))
    if control == POPULARITY:
        assert live.version.run is not None
        live.control = popular(live.version.run, log.items())
    elif control is not None:
        live.control = load_with_items(Path(control), log, index=settings.index)
    return live, follow


def _listen(settings: Settings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # Only with the protocol named does asyncio turn Nagle's algorithm off for the connections;
    # otherwise every answer would wait 40 ms for an acknowledgement.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((settings.host, settings.port))
    except OSError as error:
        listening.close()
        raise ConfigError(
            f"--host {settings.host} --port {settings.port}: {error.strerror or error}; choose "
            "another --port, or 0 for any"
        ) from error
    return listening


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host


class _Server(uvicorn.Server):
    """A server that ends the process if a thread hangs: no thread can be stopped from outside."""

    def __init__(self, config: uvicorn.Config, started: Callable[[], None]) -> None:
        super().__init__(config)
        self._started = started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._started()

    def handle_exit(self, sig: int, frame: Any) -> None:
        if not self.should_exit:
            seconds = (self.config.timeout_graceful_shutdown or 0) + GRACE
            watchdog = threading.Timer(seconds, _give_up)
            watchdog.daemon = True
            watchdog.start()
        super().handle_exit(sig, frame)


def _give_up() -> None:
    logger.error("a thread hangs; ending the process")
    os._exit(1)


def _run(server: _Server, app: Any, listening: socket.socket) -> None:
    # uvicorn raises the signal again after it has stopped, when everything is done.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    sys.setswitchinterval(SWITCH_SECONDS)

    async def main() -> None:
        def poke() -> None:
            if app.state.follower is not None:
                app.state.follower.poke()

        if hasattr(signal, "SIGHUP"):
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, poke)
        await server.serve(sockets=[listening])

    asyncio.run(main())


def _collect_garbage_again() -> None:
    """Collect what the start left and leave the rest, modules and models, out of later collections;
    `l2rec serve` switches collections off while it imports.
    """
    gc.collect()
    gc.freeze()
    gc.enable()


def _log_to_stderr() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for name, level in (("l2rec.service", logging.INFO), ("uvicorn.error", logging.WARNING)):
        log = logging.getLogger(name)
        log.handlers[:] = [handler]
        log.setLevel(level)
        log.propagate = False
