"""The test of L2Rec's premise: are two views less apart in one backbone than in two?

The paper says that views which share a backbone have minimal misalignment of their outputs. Three
ways to have two views of the same users are measured alike, layer by layer:

    one backbone    a run of both views: one frozen model, the experts of either view
    two backbones   two runs of one view each: a frozen model with experts for each
    untrained       the first of these before any training

with what two backbones cost in memory and time. `l2rec experiment two-backbones` asks which scores
better.
"""

from __future__ import annotations

__all__ = ["MOST_USERS", "Arm", "Cost", "measure_alignment"]

import datetime
import gc
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from l2rec.data.ragged import Ragged
from l2rec.disk import write_json
from l2rec.errors import CheckpointError, ConfigError
from l2rec.methods.l2rec import L2Rec, L2RecConfig
from l2rec.modules.views import View
from l2rec.protocols import Progress
from l2rec.runs.checkpoint import load_trained
from l2rec.runs.folder import (
    find_backbone,
    load_run_config,
    open_run_dataset,
    read_report,
    read_run,
    split_of,
)
from l2rec.runs.machine import hardware, versions
from l2rec.runs.numbers import MAIN
from l2rec.runs.predictor import backbone_of, build_model
from l2rec.studies.alignment.report import write_report
from l2rec.studies.alignment.statistics import statistics
from l2rec.studies.folder import claim_folder

REPORT = "alignment"
"""``kind`` of the report, which tells that a folder holds this study."""
MOST_USERS = 5000
"""Pairs of users grow with the square of their number."""
SEMANTIC: View = "semantic"
BEHAVIORAL: View = "behavioral"
BOTH = {SEMANTIC, BEHAVIORAL}
ONE, TWO, UNTRAINED = "one backbone", "two backbones", "untrained"
TIMED, REPEATS = 500, 3
"""Users, at most, that are encoded to measure the time, and how often; the least time counts."""

States = Mapping[str, Mapping[View, Tensor]]
"""By depth, then by view: [M, D]."""


@dataclass(frozen=True)
class Cost:
    """What it takes to have the views of a user.

    frozen, trained: parameters. megabytes: of both, as they are held. seconds: for 1,000 users.
    """

    frozen: int
    trained: int
    megabytes: float
    seconds: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(_numbers(self), _numbers(other), strict=True)))

    def over(self, other: Cost) -> dict[str, float]:
        """Return the ratios of what two things take."""
        mine, theirs = asdict(self), asdict(other)
        return {name: mine[name] / theirs[name] for name in mine if theirs[name]}


def _numbers(cost: Cost) -> tuple[Any, ...]:
    return cost.frozen, cost.trained, cost.megabytes, cost.seconds


@dataclass(frozen=True)
class Arm:
    """One way to have two views: statistics by depth, costs, and the runs it is made of.

    kind: `ONE`, `TWO` or `UNTRAINED`. scores: N@10, history masked, on test, of each run.
    """

    kind: str
    runs: tuple[str, ...]
    depths: Mapping[str, Mapping[str, float]]
    cost: Cost
    scores: tuple[float | None, ...] = ()


@dataclass
class _Sorted:
    """Runs by the views they have."""

    both: list[Path] = field(default_factory=list)
    semantic: list[Path] = field(default_factory=list)
    behavioral: list[Path] = field(default_factory=list)


def measure_alignment(
    runs: Sequence[Path],
    out: Path,
    *,
    users: int = 2000,
    seed: int = 0,
    data: Path | None = None,
    progress: Progress,
    command: str = "",
) -> dict[str, Any]:
    """Measure how far apart the views' outputs are, and write a report into ``out``.

    Runs of both views are measured each by itself; those of one view in pairs, the first of the
    semantic one with the first of the behavioural one. Users and their histories are drawn from
    the test cases.

    Args:
        runs: finished runs of L2Rec on one data set, split and backbone.
        out: folder of ``report.json``, ``report.md`` and ``report.html``.
        users: how many to measure, `MOST_USERS` at most.
        seed: of the users that are drawn, and of the pairs of different users.
        data: folder of the data set, by default where it was.

    Raises:
        ConfigError: runs that are not of L2Rec, that make no pair, or too few or many users.
        CheckpointError: runs of different data, splits or backbones; or ``out`` holds something
            else.
    """
    if not 10 <= users <= MOST_USERS:
        raise ConfigError(f"--users {users}: choose 10 to {MOST_USERS:,}")
    claim_folder(out, REPORT)
    kinds = _by_views(runs)
    _check_alike(runs, data)
    dataset = open_run_dataset(runs[0], data)
    split = split_of(load_run_config(runs[0])[0], dataset)
    drawn = np.random.default_rng(seed).permutation(len(split.test))[:users]
    histories = split.test.histories.take(np.sort(drawn))
    if len(histories) < 10:
        raise ConfigError(f"{dataset.path} has {len(histories)} test cases; ten are too few")

    arms: list[Arm] = []
    for run in kinds.both:
        progress.line(f"{ONE}: {run}")
        states, cost = _encoded(run, histories)
        arms.append(_arm(ONE, (run,), states, cost, seed))
    pairs = list(zip(kinds.semantic, kinds.behavioral, strict=True))
    for pair in pairs:
        progress.line(f"{TWO}: {pair[0]} and {pair[1]}")
        arms.append(_arm(TWO, pair, *_joined(_encoded(run, histories) for run in pair), seed))
    first = (kinds.both[0],) if kinds.both else pairs[0]
    progress.line(f"{UNTRAINED}: the recipe of {' and '.join(map(str, first))}")
    untrained = [_encoded(run, histories, trained=False) for run in first]
    arms.append(_arm(UNTRAINED, first, *_joined(untrained), seed))
    report = {
        "kind": REPORT,
        "dataset": dataset.identity,
        "protocol": split.protocol,
        "users": len(histories),
        "seed": seed,
        "backbone": load_run_config(runs[0])[1]["backbone"],
        "arms": [_plain(arm) for arm in arms],
        "two_over_one": _ratios(arms),
        "hardware": hardware(),
        "versions": versions(),
        "date": datetime.date.today().isoformat(),
        "command": command,
    }
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "report.json", report)
    write_report(report, out)
    return report


def _by_views(runs: Sequence[Path]) -> _Sorted:
    """Sort runs by their views.

    Raises:
        ConfigError: not of L2Rec, or not as many of one view as of the other, or none at all.
    """
    found = _Sorted()
    for run in runs:
        config = load_run_config(run)[0].model
        if not isinstance(config, L2RecConfig):
            raise ConfigError(f"{run} is no run of L2Rec, so it has no views")
        views = set(config.views)
        place = found.both if views == BOTH else getattr(found, next(iter(views)))
        place.append(run)
    if len(found.semantic) != len(found.behavioral):
        raise ConfigError(
            f"{len(found.semantic)} runs of the semantic view alone and {len(found.behavioral)} of "
            "the behavioural one: two backbones are a pair, so give as many of either"
        )
    if not runs:
        raise ConfigError("give a run of both views, or one of each view, or all three")
    return found


def _check_alike(runs: Sequence[Path], data: Path | None) -> None:
    """Refuse runs whose users, histories or frozen weights differ."""
    facts = []
    for run in runs:
        config, identity = load_run_config(run)
        read_report(run)  # that it is finished
        split = split_of(config, open_run_dataset(run, data))
        facts.append(
            (
                f"data {identity['dataset']['fingerprint']}",
                split.protocol,
                f"backbone {identity['backbone']['name']} {identity['backbone']['weight_hash']}",
            )
        )
    for run, fact in zip(runs, facts, strict=True):
        for mine, first in zip(fact, facts[0], strict=True):
            if mine != first:
                raise CheckpointError(
                    f"{run} has {mine}, {runs[0]} has {first}: give runs of the same data, split "
                    "and backbone"
                )


def _encoded(run: Path, histories: Ragged, *, trained: bool = True) -> tuple[States, Cost]:
    """Return the states of a run's views at every depth, and what it costs to have them."""
    folder = read_run(run)
    backbone = backbone_of(find_backbone(run, folder.config, folder.identity))
    model = build_model(folder.config, folder.catalog, backbone, run / "cache")
    assert isinstance(model, L2Rec) and backbone is not None
    sizes = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if trained:
        load_trained(model, folder.tensors, str(run / "model.safetensors"))
    model.freeze()
    own = [t for name, t in model.named_parameters() if not name.startswith("backbone.")]
    held = [*backbone.parameters(), *backbone.buffers(), *(p for p in own if p.requires_grad)]
    megabytes = sum(t.numel() * t.element_size() for t in held) / 1e6
    some = histories.take(np.unique(np.linspace(0, len(histories) - 1, TIMED).astype(np.int64)))
    with torch.inference_mode():
        seconds = min(_timed(model, some) for _ in range(REPEATS))
    cost = Cost(backbone.size, sizes, megabytes, seconds / len(some) * 1000)
    states = {
        depth: {view: h.cpu() for view, h in views.items()}
        for depth, views in model.view_layers(histories).items()
    }
    del model, backbone
    gc.collect()
    return states, cost


def _timed(model: L2Rec, histories: Ragged) -> float:
    """Return the seconds that it takes to encode users."""
    started = time.perf_counter()
    float(model.encode_users(histories).sum())  # on a GPU, this waits for the result
    return time.perf_counter() - started


def _joined(sides: Any) -> tuple[States, Cost]:
    """Put the views of one model, or of two, together: the depths that all have."""
    states, costs = zip(*sides, strict=True)
    depths = [depth for depth in states[0] if all(depth in other for other in states)]
    views = {depth: {v: h for side in states for v, h in side[depth].items()} for depth in depths}
    first, *others = costs
    return views, sum(others, first)


def _arm(kind: str, runs: Sequence[Path], states: States, cost: Cost, seed: int) -> Arm:
    """Measure one arm."""
    depths = {
        depth: statistics(views[SEMANTIC], views[BEHAVIORAL], seed)
        for depth, views in states.items()
    }
    reports = [] if kind == UNTRAINED else [read_report(run) for run in runs]
    scores = tuple(r["scores"][r["method"]].get(f"{MAIN}_masked") for r in reports)
    return Arm(kind, tuple(map(str, runs)), depths, cost, scores)


def _plain(arm: Arm) -> dict[str, Any]:
    """Return an arm as plain values, None for what is no number."""
    values = asdict(arm)
    values["depths"] = {
        depth: {name: v if np.isfinite(v) else None for name, v in found.items()}
        for depth, found in arm.depths.items()
    }
    return values


def _ratios(arms: Sequence[Arm]) -> dict[str, float] | None:
    """Return what two backbones take, of what one takes: means over runs. None without both."""
    sides = [[arm.cost for arm in arms if arm.kind == kind] for kind in (TWO, ONE)]
    if not all(sides):
        return None
    two, one = (
        Cost(*(sum(numbers) / len(side) for numbers in zip(*map(_numbers, side), strict=True)))
        for side in sides
    )
    return two.over(one)
