"""The cells of a plan in processes of their own, several at once, until all that can be is done.

A training is `l2rec train`, which keeps its own checkpoints; so a grid that is stopped, by Ctrl-C,
SIGTERM or a kill, goes on from where each cell was.
"""

from __future__ import annotations

__all__ = ["run", "take"]

import contextlib
import datetime
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from l2rec.disk import replacing_folder, working_on, write_json
from l2rec.errors import CheckpointError
from l2rec.protocols import Progress
from l2rec.runs.folder import is_empty, read_report
from l2rec.runs.machine import hardware, versions
from l2rec.runs.numbers import MAIN, as_duration, as_score
from l2rec.studies.experiment.plan import (
    Cell,
    Plan,
    Planned,
    State,
    check_limits,
    claim,
    fitted,
    look_at,
    looked_again,
    read_state,
    write_state,
)

POLL = 0.1
"""Seconds between looks at the processes."""
PATIENCE = 30.0
"""Seconds that a process has to end after it was interrupted; then it is killed."""
NO_REPORT = "it ended without a report"


def run(planned: Plan, *, progress: Progress, jobs: int = 1, hours: float | None = None) -> Plan:
    """Run what is unfinished; return the plan as it stands then, with what was left out.

    A cell that fails is named in ``state.json`` with the last line of its error, and tried again
    by the next call. What is made of it is left out.

    Args:
        jobs: processes at once; each has its share of the cores.
        hours: no cell is begun that would not end by then, as far as its time is known.

    Raises:
        ConfigError: no job, or no hours.
        CheckpointError: another process works on the folder, or it holds something else.
    """
    check_limits(jobs, hours)
    with working_on(planned.out):
        grid = _Running(_taken(planned, progress), progress, jobs, hours)
        try:
            grid.to_the_end()
        finally:
            grid.stop()
        return grid.planned


def take(planned: Plan, *, progress: Progress) -> Plan:
    """Link the runs that were found elsewhere, and run nothing; return the plan as it stands then.

    Raises:
        CheckpointError: another process works on the folder, or it holds something else.
    """
    with working_on(planned.out):
        return _taken(planned, progress)


def _taken(planned: Plan, progress: Progress) -> Plan:
    """Link the runs that were found elsewhere into the grid, or copy them where links cannot be."""
    claim(planned)
    for one in planned.cells:
        if one.state is not State.FOUND:
            continue
        source, path = Path(one.note), one.cell.path
        path.parent.mkdir(parents=True, exist_ok=True)
        if not _cleared(path):
            progress.line(f"{one.cell.key}: not taken, {path} is in use or holds other files")
            continue
        try:
            path.symlink_to(source.resolve(), target_is_directory=True)
            how = f"linked to {source}"
        except OSError:
            with replacing_folder(path, remedy="free some space and take it again") as folder:
                shutil.copytree(source, folder, dirs_exist_ok=True)
            how = f"copied from {source}"
        state = read_state(planned.out)
        state["taken"][one.cell.key] = how
        write_state(planned.out, state)
        progress.line(f"{one.cell.key}: {how}")
    return looked_again(planned)


def _cleared(path: Path) -> bool:
    """Delete what a killed call left of a cell before its first file: a folder without content, or
    a link to a run that is gone. Return whether the place is free.
    """
    if path.is_symlink():
        if not path.exists():
            path.unlink()
    elif path.is_dir():
        try:
            with working_on(path):
                if not is_empty(path):
                    return False
                for part in path.glob(".*.part"):
                    shutil.rmtree(part) if part.is_dir() else part.unlink()
            path.rmdir()
        except (CheckpointError, OSError):  # a process works there, or has just begun to
            return False
    return not path.exists()


@dataclass
class _Job:
    """A process that makes a cell; what it prints goes into ``log``, or ``answer`` if it is asked
    for JSON.
    """

    one: Planned
    process: subprocess.Popen[bytes]
    log: Path
    answer: Path | None
    started: float

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started


@dataclass
class _Running:
    """A grid that is being run.

    whole: all cells as they stand. planned: those that the budget reaches. failed: why, by key, in
    this call.
    """

    whole: Plan
    progress: Progress
    jobs: int
    hours: float | None
    running: list[_Job] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)
    planned: Plan = field(init=False)

    def to_the_end(self) -> None:
        """Begin and end cells until nothing is left that can be begun."""
        self._fit()
        self._say(f"{len(self.planned.unfinished)} of {len(self.planned.cells)} cells to run")
        while True:
            while len(self.running) < self.jobs and (one := self._next()) is not None:
                self._begin(one)
            if not self.running:
                return
            self._wait()

    def stop(self) -> None:
        """Interrupt all processes, and wait until they have ended."""
        for job in self.running:
            with contextlib.suppress(ProcessLookupError):
                job.process.terminate()  # SIGINT is ignored where a shell began us with `&`
        ends = time.monotonic() + PATIENCE
        for job in self.running:
            try:
                job.process.wait(max(0.0, ends - time.monotonic()))
            except subprocess.TimeoutExpired:
                job.process.kill()
                job.process.wait()
        self.running.clear()

    def _fit(self) -> None:
        """Leave out what the rest of the budget does not reach, by the costs known by now."""
        self.planned = self.whole
        if self.hours is None:
            return
        left = self.hours * 3600 - (time.monotonic() - self.started)
        ran = {job.one.cell: job.seconds for job in self.running}
        busy = sum(max(0.0, (job.one.seconds or 0.0) - job.seconds) for job in self.running)
        apart = [o for o in self.whole.cells if o.cell in ran or o.cell.key in self.failed]
        rest = replace(self.whole, cells=tuple(o for o in self.whole.cells if o not in apart))
        # At the end of the time, nothing more is begun: not even what is of unknown time.
        reached = fitted(rest, left if left > 0 else -1.0, self.jobs, busy)
        kept = {one.cell for one in (*reached.cells, *apart)}
        cells = tuple(one for one in self.whole.cells if one.cell in kept)
        self.planned = replace(reached, cells=cells)

    def _next(self) -> Planned | None:
        """Return the next cell whose bases stand; name those whose bases failed as failed."""
        standing = {one.cell: one for one in self.planned.cells}
        busy = {job.one.cell for job in self.running}
        for one in self.planned.unfinished:
            if one.cell in busy or one.cell.key in self.failed:
                continue
            bases = [standing.get(need) for need in one.cell.needs]
            lost = [
                need.key
                for need, base in zip(one.cell.needs, bases, strict=True)
                if base is None or base.state is State.OTHER or need.key in self.failed
            ]
            if lost:
                self._fail(one.cell, f"needs {lost[0]}, which is not there")
            elif all(base is not None and base.done for base in bases):
                return one
        return None

    def _begin(self, one: Planned) -> None:
        cell = one.cell
        if cell.path.is_symlink():
            _cleared(cell.path)
        if cell.config is not None:
            try:
                with working_on(cell.path):
                    pass
            except CheckpointError as error:  # a process of a killed call: its log is its own
                self._fail(cell, str(error))
                return
        log = self.planned.out / "logs" / cell.grid / f"{cell.path.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        cell.path.parent.mkdir(parents=True, exist_ok=True)
        arguments = [*cell.arguments, *(["--resume"] if cell.config is not None else [])]
        answer = log.with_suffix(".json") if cell.row.fusion is not None else None
        environment = os.environ | {"OMP_NUM_THREADS": str(max(1, _cores() // self.jobs))}
        with contextlib.ExitStack() as files:
            messages = files.enter_context(log.open("wb"))
            printed = messages if answer is None else files.enter_context(answer.open("wb"))
            process = subprocess.Popen(
                [sys.executable, "-m", "l2rec", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=messages,
                env=environment,
                start_new_session=True,  # Ctrl-C reaches this process alone, which passes it on
            )
        self.running.append(_Job(one, process, log, answer, time.monotonic()))
        about = "" if one.seconds is None else f", about {as_duration(one.seconds)} {one.basis}"
        goes_on = " goes on" if one.state is State.BEGUN else ""
        self._say(f"{cell.key}{goes_on}: l2rec {shlex.join(arguments)}{about}")

    def _wait(self) -> None:
        """Wait until a process has ended, and look at what it left."""
        while all(job.process.poll() is None for job in self.running):
            time.sleep(POLL)
        for job in [job for job in self.running if job.process.poll() is not None]:
            self.running.remove(job)
            self._end(job)
        self.whole = looked_again(self.whole)
        self._fit()
        self._say(self._left())

    def _end(self, job: _Job) -> None:
        cell, code = job.one.cell, job.process.returncode
        if code == 0 and job.answer is not None:
            _write_fusion(cell, json.loads(job.answer.read_text(encoding="utf-8")), job.seconds)
        if code == 0 and look_at(cell).state is State.FINISHED:
            state = read_state(self.planned.out)
            if state["failed"].pop(cell.key, None) is not None:
                write_state(self.planned.out, state)
            report = read_report(cell.path)
            score = as_score(report["scores"][report["method"]].get(f"{MAIN}_masked"))
            took = as_duration(job.seconds)
            data = report["dataset"]["fingerprint"]
            self._say(
                f"{cell.key} finished in {took}: ndcg@10, history masked, {score}, data {data}"
            )
        else:
            self._fail(cell, _last_line(job.log) if code else NO_REPORT, code)

    def _fail(self, cell: Cell, reason: str, code: int = 0) -> None:
        if code < 0:
            reason = f"{reason} (killed by {signal.Signals(-code).name})".strip()
        self.failed[cell.key] = reason or f"exit code {code}"
        state = read_state(self.planned.out)
        state["failed"][cell.key] = self.failed[cell.key]
        write_state(self.planned.out, state)
        self._say(f"{cell.key} failed: {self.failed[cell.key]}")

    def _left(self) -> str:
        """Say what is done of the grid, and how long the rest will take."""
        cells = self.planned.cells
        done = sum(one.done for one in cells)
        rest = [one for one in self.planned.unfinished if one.cell.key not in self.failed]
        ran = {job.one.cell: job.seconds for job in self.running}
        known = [max(0.0, one.seconds - ran.get(one.cell, 0.0)) for one in rest if one.seconds]
        unknown = sum(one.seconds is None for one in rest)
        text = f"{done} of {len(cells)} cells are finished"
        if failed := sum(not one.done and one.cell.key in self.failed for one in cells):
            text += f", {failed} failed"
        if known:
            text += f"; about {as_duration(sum(known) / self.jobs)} left"
        if unknown:
            text += f"; {unknown} of unknown time"
        return text

    def _say(self, text: str) -> None:
        self.progress.line(text)


def _cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _last_line(log: Path) -> str:
    """Return the last line of a log, without the name of the program."""
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return last.removeprefix("l2rec: ")


def _write_fusion(cell: Cell, answer: Mapping[str, Any], seconds: float) -> None:
    """Write a report of what `l2rec fusion` printed, as a run folder has one."""
    fusion = cell.row.fusion
    assert fusion is not None
    (scores,) = answer["scores"].values()
    base = read_report(cell.needs[0].path)
    kept = ("dataset", "protocol", "seed", "backbone", "peak_memory_mb")
    report = {key: base[key] for key in kept} | {
        "method": cell.line,
        "fusion": {"alpha": fusion.alpha, "dominant": fusion.dominant},
        "command": shlex.join(["l2rec", *cell.arguments]),
        "hardware": hardware(),
        "versions": versions(),
        "date": datetime.date.today().isoformat(),
        "training_seconds": 0.0,
        "tokens_seen": 0,
        "wall_seconds": round(seconds, 1),
        "scores": {cell.line: dict(scores)},
    }
    with replacing_folder(cell.path) as folder:
        write_json(folder / "report.json", report)
