"""What the steps of a preparation share: its options, what they counted, progress."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from l2rec.data.dataset import Dataset
from l2rec.data.preparation.config import PrepareConfig

Ints = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]


@dataclass
class State:
    """What one preparation knows and has counted. ``work``: its folder of temporary files."""

    work: Path
    config: PrepareConfig
    chunk: int
    report: Report
    counters: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    event_types: list[str] = field(default_factory=list)
    splits: str | None = None
    splits_left_aside: bool = False


class Report:
    """Rows and rates on standard error: a live line on a terminal, else now and then."""

    SECONDS_BETWEEN_LINES = 10.0

    def __init__(self, on: bool) -> None:
        self._on = on
        self._console = Console(stderr=True) if on else None
        self._live: Progress | None = None
        self._counts: dict[str, int] = {}
        self._since: dict[str, float] = {}
        self._printed = time.monotonic()

    def __enter__(self) -> Report:
        if self._console is not None and self._console.is_terminal:
            self._live = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                TextColumn("{task.completed:,.0f}  {task.fields[rate]:,.0f}/s"),
                TimeElapsedColumn(),
                console=self._console,
                transient=True,
            )
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def rows(self, what: str, more: int) -> None:
        if not self._on:
            return
        now = time.monotonic()
        self._counts[what] = self._counts.get(what, 0) + more
        start = self._since.setdefault(what, now)
        rate = self._counts[what] / (now - start) if now > start else 0.0
        if self._live is not None:
            tasks = {task.description: task.id for task in self._live.tasks}
            task = tasks.get(what)
            if task is None:
                task = self._live.add_task(what, total=None, rate=0.0)
            self._live.update(task, completed=self._counts[what], rate=rate)
        elif now - self._printed >= self.SECONDS_BETWEEN_LINES:
            self._printed = now
            print(f"{what}: {self._counts[what]:,} ({rate:,.0f}/s)", file=sys.stderr)

    def notes(self, dataset: Dataset) -> None:
        """Print all warnings, once. The result is for who called."""
        if not self._on:
            return
        for note in dataset.meta["notes"]:
            print(f"note: {note}", file=sys.stderr)
        for line in dataset.order.lines():
            print(line, file=sys.stderr)
