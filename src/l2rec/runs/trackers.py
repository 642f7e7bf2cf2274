"""Where the points of a training go besides ``metrics.jsonl``: TensorBoard, or another tracker.

TensorBoard's files lie in the run folder. MLflow, Weights & Biases and trackio are Accelerate's
trackers, and take their addresses and keys from their own environment variables.
"""

from __future__ import annotations

__all__ = ["Points", "tracking"]

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from l2rec.config import Tracker
from l2rec.errors import ConfigError
from l2rec.modules import processes

PROJECT = "l2rec"
Points = Callable[[str, int, dict[str, float]], None]
"""Writer of points: kind, step, values by name."""


@contextmanager
def tracking(
    tracker: Tracker, run: Path, first: int, options: Mapping[str, Any]
) -> Iterator[Points]:
    """Yield the writer of points of a run, which only the first of several processes has.

    first: a resumed run's first step; TensorBoard's later points are replaced. options: what the
    tracker shows of the run.

    Raises:
        ConfigError: the tracker, or Accelerate, is not installed.
    """
    if not processes.current().main:
        yield lambda kind, step, values: None
    elif tracker == "tensorboard":
        with _tensorboard(run, first) as points:
            yield points
    else:
        with _elsewhere(tracker, run, options) as points:
            yield points


@contextmanager
def _tensorboard(run: Path, first: int) -> Iterator[Points]:
    """Write points to RUN/tensorboard, replacing those from step ``first`` on.

    A full disk is no error here: the files that matter report it.
    """
    from torch.utils.tensorboard import SummaryWriter

    board = SummaryWriter(str(run / "tensorboard"), purge_step=first)

    def points(kind: str, step: int, values: dict[str, float]) -> None:
        with suppress(OSError):
            for name, value in values.items():
                board.add_scalar(f"{kind}/{name}", value, step)

    try:
        yield points
    finally:
        with suppress(OSError):
            board.close()


@contextmanager
def _elsewhere(tracker: str, run: Path, options: Mapping[str, Any]) -> Iterator[Points]:
    """Hand points to one of Accelerate's trackers."""
    try:
        from accelerate import Accelerator
        from accelerate.tracking import get_available_trackers
    except ImportError:
        raise ConfigError(
            f"training.tracker={tracker} takes Accelerate: pip install 'l2rec[distributed]'"
        ) from None
    if tracker not in map(str, get_available_trackers()):
        raise ConfigError(f"training.tracker={tracker} is not installed: pip install {tracker}")
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision="no",
        log_with=tracker,
        project_dir=str(run),
    )
    accelerator.init_trackers(PROJECT, {"run": run.name, **_flat(options)})

    def points(kind: str, step: int, values: dict[str, float]) -> None:
        # MLflow takes no @ in a name.
        named = {f"{kind}/{name.replace('@', '_at_')}": value for name, value in values.items()}
        accelerator.log(named, step=step)

    try:
        yield points
    finally:
        accelerator.end_training()


def _flat(options: Mapping[str, Any], prefix: str = "") -> dict[str, str | int | float | bool]:
    """Name the options by their dotted keys; trackers take plain values."""
    found: dict[str, str | int | float | bool] = {}
    for name, value in options.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            plain = isinstance(value, (str, int, float, bool))
            found[prefix + name] = value if plain else str(value)
    return found
