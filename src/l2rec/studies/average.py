"""The mean of several runs' scores, as the control for whatever joins two models.

Two seeds of one recipe, averaged, score better than either. A method with two parts has to beat
that, not one of its parts alone. Scores of one method are on one scale, and averaged as the runs
give them. Those of several, or of blended runs and others, are not: each user's are standardised
first, as `l2rec blend` does it, or the method with the larger numbers would decide.
"""

from __future__ import annotations

__all__ = ["Average", "average_runs"]

import datetime
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from l2rec.data.dataset import Dataset
from l2rec.data.ragged import Ragged
from l2rec.data.splits import Split
from l2rec.disk import replacing_folder, write_json
from l2rec.errors import CheckpointError
from l2rec.modules.cooccurrence import reached, standardised
from l2rec.protocols import Progress, Scorer
from l2rec.runs.folder import load_run_config, open_run_dataset, read_report, split_of
from l2rec.runs.machine import hardware, peak_memory_mb, versions
from l2rec.runs.predictor import load
from l2rec.runs.remarks import of_report
from l2rec.runs.scoring import score, summed_up, with_cold_items


class Average:
    """Several recommenders of one catalog as one: the mean of their scores. What one of them did
    not reach counts as the last that it reached. Cold items of a ``dataset`` are added.

    standardised: whether each user's scores are brought to one scale, as the runs differ in method.
    """

    def __init__(self, runs: Sequence[Path], dataset: Dataset | None = None) -> None:
        self._runs = [load(run) for run in runs]
        methods = {(type(run.model).__qualname__, run.blend is None) for run in self._runs}
        self.standardised = len(methods) > 1
        if dataset is not None:
            self._runs = [with_cold_items(run, dataset) for run in self._runs]
        self._n_warm = self._runs[0].n_items if dataset is None else dataset.n_warm
        self.n_items = self._runs[0].n_items

    def scorer(self) -> Scorer:
        """Return histories -> mean scores [B, N]."""
        scorers = [run.scorer() for run in self._runs]

        def of_one(scorer: Scorer, histories: Ragged) -> Tensor:
            scores = scorer(histories)
            warm, cold = scores.tensor_split((self._n_warm,), dim=1)
            if self.standardised:
                warm, new = standardised(scores, self._n_warm).tensor_split((self._n_warm,), dim=1)
                cold = new.masked_fill(cold.isneginf(), -torch.inf)
            # -inf in one of the runs would leave the others no say.
            return torch.cat((reached(warm), cold), dim=1)

        def mean(histories: Ragged) -> Tensor:
            first, *others = (of_one(scorer, histories) for scorer in scorers)
            return sum(others, first) / len(scorers)

        return mean


def average_runs(
    runs: Sequence[Path],
    out: Path,
    *,
    progress: Progress,
    data: Path | None = None,
    command: str = "",
) -> dict[str, Any]:
    """Score the average of finished runs on test; write a report and ranks to a new folder.

    The folder holds ``report.json`` and ``ranks.parquet``, as a run folder does, and no model.
    Costs in the report are those of all runs together; their peak memory is the largest.

    Raises:
        CheckpointError: fewer than two runs, one of them twice, or of different data, splits or
            items; or ``out`` holds something.
    """
    if len(runs) < 2:
        raise CheckpointError("an average needs two runs or more")
    if len({run.resolve() for run in runs}) < len(runs):
        raise CheckpointError("an average counts each run once; one of these is given twice")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} is not empty; choose another --out")
    started = time.monotonic()
    dataset = open_run_dataset(runs[0], data)
    split = _common_split(runs, data)
    reports = [read_report(run) for run in runs]
    configs = [load_run_config(run)[0] for run in runs]
    backbone = {**reports[0]["backbone"]}
    backbone["trained_parameters"] = sum(r["backbone"]["trained_parameters"] for r in reports)
    average = Average(runs, dataset)
    if average.standardised:
        progress.line(
            "the runs differ in method: each user's scores are standardised, then averaged"
        )
    scores = score(average, split, None, progress)
    method = "average of " + " and ".join(dict.fromkeys(str(r["method"]) for r in reports))
    report = {
        **reports[0],
        "method": method,
        "recipe": " and ".join(dict.fromkeys(str(r["recipe"]) for r in reports)),
        "command": command,
        "averaged": [str(run) for run in runs],
        "standardised": average.standardised,
        **of_report(configs),
        "backbone": backbone,
        "hardware": hardware(),
        "versions": versions(),
        "date": datetime.date.today().isoformat(),
        "training_seconds": sum(r["training_seconds"] for r in reports),
        "validation_seconds": sum(r["validation_seconds"] for r in reports),
        "tokens_seen": sum(r["tokens_seen"] for r in reports),
        "peak_memory_mb": max(peak_memory_mb(), *(r["peak_memory_mb"] for r in reports)),
        **summed_up({method: scores}),
        "significance": {},
    }
    for key in ("seed", "steps", "best_step", "stopped", "valid", "tied_day", "blend"):
        report.pop(key, None)
    with replacing_folder(out, remedy="free some space and average again") as folder:
        scores.write(folder, dataset, split)
        report["wall_seconds"] = round(time.monotonic() - started, 1)
        write_json(folder / "report.json", report)
    return report


def _common_split(runs: Sequence[Path], data: Path | None) -> Split:
    """Return the split of all runs.

    Raises:
        CheckpointError: they have different data or splits.
    """
    splits = [split_of(load_run_config(r)[0], open_run_dataset(r, data)) for r in runs]
    prints = [load_run_config(run)[1]["dataset"]["fingerprint"] for run in runs]
    for run, split, fingerprint in zip(runs, splits, prints, strict=True):
        if (fingerprint, split.protocol) != (prints[0], splits[0].protocol):
            raise CheckpointError(
                f"{run} is of data {fingerprint}, {split.protocol}; {runs[0]} of {prints[0]}, "
                f"{splits[0].protocol}: only runs of the same data and split have an average"
            )
    return splits[0]
