"""Scores of a trained HDRec at other fusion weights (HDRec, Fig. 5 and 6), without training."""

from __future__ import annotations

__all__ = ["fusion_sweep"]

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from l2rec.errors import ConfigError
from l2rec.evaluation.ranking import evaluate_each
from l2rec.methods.hdrec import DOMINANT, HDRec
from l2rec.protocols import Progress
from l2rec.runs.folder import load_run_config, open_run_dataset, split_of
from l2rec.runs.predictor import load


def fusion_sweep(
    run: Path,
    alphas: Sequence[float],
    *,
    dominant: str | None = None,
    split_name: str = "valid",
    progress: Progress,
    data: Path | None = None,
) -> dict[str, Any]:
    """Score a trained HDRec at other weights of its two sides (HDRec, Fig. 6 right).

    Both sides read every history once, whatever the number of weights.

    Args:
        run: a finished run of HDRec.
        alphas: weights of the second side, none negative and none twice.
        dominant: another way to fuse (variants of Fig. 5), by default the run's.
        split_name: ``valid`` or ``test``.
        data: folder of the data set, by default the path that the run was trained on.

    Returns:
        ``fingerprint`` of the data set, ``protocol``, ``split``, and ``scores``: the metrics by
        weight, as text.

    Raises:
        ConfigError: not an HDRec with two sides, a blended run, or a weight that is negative
            or given twice.
        CheckpointError: the data set is not the one that the run was trained on.
    """
    if split_name not in ("valid", "test"):
        raise ConfigError(f"split={split_name!r}: choose valid or test")
    if dominant not in (None, *DOMINANT):
        raise ConfigError(f"dominant={dominant!r}: choose one of {', '.join(DOMINANT)}")
    if not alphas or len(set(alphas)) < len(alphas) or min(alphas) < 0:
        raise ConfigError("alpha: name one or more weights, none below 0 and none twice")
    dataset = open_run_dataset(run, data)
    if dataset.n_cold and split_name == "test":
        raise ConfigError(f"{dataset.path} has cold items, which l2rec fusion does not rank")
    predictor = load(run)
    if predictor.blend is not None:
        raise ConfigError(f"{run} is blended; give the run it was made of: sides have no blend")
    model: Any = predictor.model
    if not isinstance(model, HDRec):
        raise ConfigError(f"{run} is no HDRec but {type(model).__name__}: it has no sides to fuse")
    scorers = model.fused_scorers(alphas, dominant)
    split = split_of(load_run_config(run)[0], dataset)
    cases = split.cases(split_name)
    evaluations = evaluate_each(
        model.n_items,
        {str(alpha): scorer for alpha, scorer in zip(alphas, scorers, strict=True)},
        cases.histories,
        cases.targets,
        users=cases.users,
        progress=lambda done: progress.validating(done, len(cases)),
    )
    return {
        "fingerprint": dataset.fingerprint,
        "protocol": split.protocol,
        "split": split_name,
        "scores": {alpha: evaluation.metrics() for alpha, evaluation in evaluations.items()},
    }
