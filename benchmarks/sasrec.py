"""SASRec here against RecBole's, on the same split: time, memory and scores.

    python -m venv recbole              an environment of its own
    recbole/bin/pip install torch && recbole/bin/pip install --no-deps recbole==1.2.1
    recbole/bin/pip install numpy scipy 'pandas<3' tqdm colorlog colorama scikit-learn pyyaml \
        tensorboard thop tabulate plotly texttable psutil
    python benchmarks/sasrec.py --data data/scientific --peer recbole/bin/python --epochs 20

Both train SASRec with the same sizes (64 dimensions, 2 layers, 2 heads, 50 items), the full softmax
and the same number of epochs, each in a process of its own, one after the other, with the same
threads; both rank every user over the whole catalog after every epoch. Test scores are those at
the best validation NDCG@10. RecBole makes an example of every prefix and pads each to 50 items;
here every position of a sequence predicts, and the encoder reads rows of like length together.
Seconds are processor time, which other processes disturb less than wall time; peak memory is that
of the whole process.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import arguments, median, report

from l2rec.config import load_recipe
from l2rec.data.catalog import Catalog
from l2rec.data.dataset import Dataset, open_dataset
from l2rec.data.splits import Split, leave_one_out
from l2rec.evaluation.ranking import evaluate
from l2rec.runs.predictor import build_model

RECIPE = "sasrec"
OURS, PEER = "l2rec", "RecBole"
METRICS = ("recall@10", "ndcg@10")


def write_atomic(dataset: Dataset, folder: Path) -> None:
    """Write RecBole's .inter file, with the place in the user's sequence as the time."""
    rows = dataset.sequences
    users = np.repeat(np.arange(len(rows)), rows.lengths)
    places = np.arange(len(rows.values)) - np.repeat(rows.offsets[:-1], rows.lengths)
    folder.mkdir(parents=True)
    lines = np.stack([users, rows.values, places], axis=1)
    header = "user_id:token\titem_id:token\ttimestamp:float"
    np.savetxt(folder / f"{folder.name}.inter", lines, "%d", "\t", header=header, comments="")


def ours(data: Path, epochs: int, seed: int) -> dict[str, Any]:
    """Train here and measure what the child process measures of RecBole."""
    config = load_recipe(RECIPE, [f"seed={seed}", f"training.epochs={epochs}", "model.dim=64"])
    dataset = open_dataset(data)
    split = leave_one_out(dataset.sequences)
    model = build_model(config, Catalog(dataset.catalog), None, None)
    training = config.training
    (stage,) = model.stages(training.lr, training.weight_decay)
    groups = [
        {"params": g.parameters, "lr": g.lr, "weight_decay": g.weight_decay} for g in stage.groups
    ]
    optimizer = torch.optim.AdamW(groups)
    epoch_seconds, eval_seconds, scores = [], [], []
    best, test = -1.0, {}
    for epoch in range(epochs):
        started = time.process_time()
        model.train()
        batches = stage.batches(
            split.train,
            seed=seed,
            epoch=epoch,
            batch_users=training.batch_users,
            batch_tokens=training.batch_tokens,
        )
        for batch in batches.iterate():
            optimizer.zero_grad(set_to_none=True)
            stage.loss(batch).total.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), training.clip)
            optimizer.step()
        epoch_seconds.append(time.process_time() - started)
        started = time.process_time()
        scores.append(ranked(model, split, test=False)["ndcg@10"])
        eval_seconds.append(time.process_time() - started)
        if scores[-1] > best:
            best, test = scores[-1], ranked(model, split, test=True)
    return {
        "epoch_seconds": epoch_seconds,
        "eval_seconds": eval_seconds,
        "valid": scores,
        "best_valid": best,
        "test": {name: test[name] for name in METRICS},
        "parameters": sum(p.numel() for p in model.parameters()),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def ranked(model: Any, split: Split, *, test: bool) -> dict[str, float]:
    histories, targets = (
        (split.test.histories, split.test.targets)
        if test
        else (split.valid.histories, split.valid.targets)
    )
    return evaluate(model, histories, targets).metrics()


def row(name: str, found: dict[str, Any], peer: dict[str, Any]) -> dict[str, Any]:
    """Build a line of the table; ratios are the peer's figure divided by this one's."""

    def times(key: str) -> float:
        return median(peer[key]) / median(found[key])

    return {
        "contender": name,
        "epoch": median(found["epoch_seconds"]),
        "faster_epoch": times("epoch_seconds"),
        "evaluation": median(found["eval_seconds"]),
        "faster_evaluation": times("eval_seconds"),
        "peak_mb": found["peak_mb"],
        "parameters": found["parameters"],
        "best_epoch": 1 + int(np.argmax(found["valid"])),
        **found["test"],
    }


def goals(mine: dict[str, Any], theirs: dict[str, Any]) -> list[dict[str, Any]]:
    better = mine["ndcg@10"] / theirs["ndcg@10"] - 1 if theirs["ndcg@10"] else 0.0
    return [
        {
            "path": "SASRec, an epoch against RecBole's",
            "goal": "faster",
            "measured": f"{mine['faster_epoch']:.1f} x faster",
            "reached": mine["faster_epoch"] > 1,
        },
        {
            "path": "SASRec, ranking all users against RecBole's",
            "goal": "faster",
            "measured": f"{mine['faster_evaluation']:.1f} x faster",
            "reached": mine["faster_evaluation"] > 1,
        },
        {
            "path": "SASRec, test ndcg@10 after as many epochs",
            "goal": "equal or better",
            "measured": f"{mine['ndcg@10']:.4f} against {theirs['ndcg@10']:.4f} ({better:+.1%})",
            "reached": better > -0.01,
        },
    ]


def main(argv: Sequence[str] | None = None) -> None:
    p = arguments(__file__, __doc__)
    p.add_argument("--data", type=Path, required=True, metavar="DIR", help="a prepared data set")
    p.add_argument("--peer", required=True, metavar="PYTHON", help="an interpreter with RecBole")
    p.add_argument("--epochs", type=int, default=3, help="of both (default %(default)s)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--ours", action="store_true", help="only ours, as JSON")
    options = list(sys.argv[1:] if argv is None else argv)
    args = p.parse_args(options)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.quick:
        args.epochs = 1
    if args.ours:
        print(json.dumps(ours(args.data, args.epochs, args.seed)))
        return
    threads, dataset = str(torch.get_num_threads()), open_dataset(args.data)
    with tempfile.TemporaryDirectory() as temporary:
        folder, result = Path(temporary), Path(temporary) / "result.json"
        write_atomic(dataset, folder / "events")
        child = Path(__file__).with_name("recbole_child.py")
        given = [str(folder), "events", str(args.epochs), threads, str(args.seed), str(result)]
        subprocess.run([args.peer, str(child), *given], check=True, cwd=folder)
        theirs = json.loads(result.read_text(encoding="utf-8"))
    mine = json.loads(
        subprocess.run(
            [sys.executable, __file__, *options, "--ours"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    )
    rows = [row(PEER, theirs, theirs), row(OURS, mine, theirs)]
    report(
        "sasrec",
        args.json,
        goal="SASRec trains and ranks faster than RecBole's, at equal or better quality",
        columns=[
            ("contender", "SASRec of"),
            ("epoch", "epoch, CPU s"),
            ("faster_epoch", "times faster"),
            ("evaluation", "ranking all users, CPU s"),
            ("faster_evaluation", "times faster"),
            ("peak_mb", "peak memory, MB"),
            ("parameters", "parameters"),
            ("best_epoch", "best epoch"),
            *((name, f"test {name}") for name in METRICS),
        ],
        rows=rows,
        notes=[
            f"Data {dataset.name}, fingerprint {dataset.fingerprint}; {args.epochs} epochs, seed "
            f"{args.seed}; history not masked; test scores at the best validation ndcg@10."
        ],
        summary=goals(rows[1], rows[0]),
    )


if __name__ == "__main__":
    main()
