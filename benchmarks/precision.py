"""Quality in bfloat16 and float32: the same trained run scored in both, user by user.

    python benchmarks/precision.py --run RUN               its tensors, in float32 and bfloat16
    python benchmarks/precision.py --runs runs/a runs/b    two finished runs, such as one trained
                                                           in each precision, by their ranks
    python benchmarks/precision.py                         a run of its own, on generated chains

Only the frozen backbone has another precision; experts, routers and tables are float32 in both, and
the text vectors of the catalog are computed anew in each. Every user's test target is ranked over
the whole catalog; differences are tested in pairs, per user (two-sided t-test). Quality counts as
unchanged where the difference is not significant (p > 0.05) or less than half a percent.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import arguments, report
from startup import small_run

from l2rec.data.catalog import Catalog
from l2rec.data.dataset import Dataset, open_dataset
from l2rec.data.splits import leave_one_out
from l2rec.evaluation.ranking import Evaluation, evaluate
from l2rec.evaluation.ranks import aligned_ranks, read_ranks
from l2rec.evaluation.significance import paired_test
from l2rec.metrics import FloatArray, rank_values
from l2rec.modules.backbone import load_backbone
from l2rec.runs.checkpoint import load_tensors, load_trained
from l2rec.runs.folder import load_run_config
from l2rec.runs.predictor import build_model

DTYPES = ("float32", "bfloat16")
METRICS = ("recall@10", "ndcg@10")
P, RELATIVE = 0.05, 0.005


def scored(run: Path, dataset: Dataset, dtype: str, users: int) -> tuple[Evaluation, float]:
    """Rank some users' test targets with the backbone in ``dtype``; also return the seconds."""
    config, _ = load_run_config(run)
    backbone_config = config.backbone.model_copy(update={"dtype": dtype})
    tensors, _ = load_tensors(run / "model.safetensors")
    backbone = load_backbone(backbone_config)
    model = build_model(config, Catalog(dataset.catalog), backbone, dataset.path / "cache")
    load_trained(model, tensors, str(run))
    model.eval()
    split = leave_one_out(dataset.sequences)
    everyone = len(split.test)
    some = np.linspace(0, everyone - 1, min(users, everyone)).astype(np.int64)
    started = time.perf_counter()
    evaluation = evaluate(
        model,
        split.test.histories.take(some),
        split.test.targets.take(some),
        users=split.test.users[some],
    )
    return evaluation, time.perf_counter() - started


def compared(
    names: Sequence[str], ranks: Sequence[dict[str, FloatArray]], seconds: Sequence[float | None]
) -> list[dict[str, Any]]:
    """Compare two rankings of the same users, one row each; the second is tested against the first.

    ``ranks``: for each ranking, "" with the history and " masked" without it.
    """
    rows: list[dict[str, Any]] = []
    for name, found, spent in zip(names, ranks, seconds, strict=True):
        row: dict[str, Any] = {"ranked": name, "users": len(found[""]), "seconds": spent}
        for masked in found:
            for metric in METRICS:
                row[metric + masked] = float(rank_values(found[masked], metric).mean())
        rows.append(row)
    for masked in ranks[0]:
        for metric in METRICS:
            test = paired_test(ranks[1][masked], ranks[0][masked], metric)
            rows[1][f"{metric}{masked} difference"] = test.difference
            rows[1][f"{metric}{masked} p"] = test.p
    return rows


def of_evaluation(evaluation: Evaluation) -> dict[str, FloatArray]:
    return {"": evaluation.ranks, " masked": evaluation.ranks_masked}


def dataset_of(run: Path, paths: Sequence[Path]) -> Dataset:
    """Open the data set a run was trained on, from ``paths`` or from the path in the run."""
    _, identity = load_run_config(run)
    for path in (*paths, Path(identity["dataset"]["path"])):
        dataset = open_dataset(path)
        if dataset.fingerprint == identity["dataset"]["fingerprint"]:
            return dataset
    raise SystemExit(f"{run} was made on other data; give its folder with --data")


def by_dtype(run: Path, paths: Sequence[Path], users: int) -> list[dict[str, Any]]:
    """Score the trained tensors of one run with the backbone in each precision."""
    dataset = dataset_of(run, paths)
    found = [scored(run, dataset, dtype, users) for dtype in DTYPES]
    return compared(DTYPES, [of_evaluation(e) for e, _ in found], [s for _, s in found])


def by_run(runs: Sequence[Path]) -> list[dict[str, Any]]:
    """Compare two finished runs by the ranks that they wrote."""
    a, b = (read_ranks(run / "ranks.parquet") for run in runs)
    pairs = {
        name: aligned_ranks(a, b, masked=masked)
        for name, masked in (("", False), (" masked", True))
    }
    names = [f"{run.name}, {load_run_config(run)[1]['backbone']['dtype']}" for run in runs]
    ranks = [{name: pair[side] for name, pair in pairs.items()} for side in (0, 1)]
    return compared(names, ranks, (None, None))


def goal(rows: Sequence[dict[str, Any]], metric: str) -> dict[str, Any]:
    before, after = rows
    difference, p = after[f"{metric} difference"], after[f"{metric} p"]
    relative = difference / before[metric] if before[metric] else 0.0
    return {
        "path": f"{metric}, {after['ranked']} against {before['ranked']}",
        "goal": f"p > {P:g} or less than {RELATIVE:.1%} apart",
        "measured": f"{before[metric]:.4f}, {after[metric]:.4f} ({relative:+.1%}, p = {p:.2f})",
        "reached": p > P or abs(relative) < RELATIVE,
    }


def main(argv: Sequence[str] | None = None) -> None:
    p = arguments(__file__, __doc__)
    p.add_argument("--data", type=Path, nargs="+", metavar="DIR", help="the run's, if it was moved")
    p.add_argument("--run", type=Path, help="a finished run to score in both precisions")
    p.add_argument("--runs", type=Path, nargs=2, metavar=("A", "B"), help="two finished runs")
    p.add_argument("--users", type=int, default=10**9, help="at most so many, evenly picked")
    args = p.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.quick:
        args.users = min(args.users, 200)
    pairs = []
    if args.run:
        pairs.append(by_dtype(args.run, args.data or (), args.users))
    if args.runs:
        pairs.append(by_run(args.runs))
    if not pairs:
        with tempfile.TemporaryDirectory() as folder:
            own = small_run(Path(folder), "training.epochs=5", users=200)
            pairs.append(by_dtype(own, (), args.users))
    metrics = [f"{metric}{masked}" for masked in ("", " masked") for metric in METRICS]
    report(
        "precision",
        args.json,
        goal="a frozen backbone in bfloat16 ranks as well as in float32",
        columns=[
            ("ranked", "backbone"),
            ("users", "users"),
            *((metric, metric) for metric in metrics),
            ("ndcg@10 difference", "difference of ndcg@10"),
            ("ndcg@10 p", "p"),
            ("seconds", "seconds"),
        ],
        rows=[row for pair in pairs for row in pair],
        notes=["Differences are the second row of a pair less the first."],
        summary=[goal(pair, metric) for pair in pairs for metric in metrics],
    )


if __name__ == "__main__":
    main()
