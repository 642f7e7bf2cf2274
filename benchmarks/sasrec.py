"""SASRec here against RecBole's and RecTools', on the same split: time, memory and scores.

    python -m venv recbole              an environment of its own for each peer
    recbole/bin/pip install torch && recbole/bin/pip install --no-deps recbole==1.2.1
    recbole/bin/pip install numpy scipy 'pandas<3' tqdm colorlog colorama scikit-learn pyyaml \
        tensorboard thop tabulate plotly texttable psutil
    python -m venv rectools
    rectools/bin/pip install torch && rectools/bin/pip install 'rectools[torch]==0.19.*'
    python benchmarks/sasrec.py --data data/scientific --peer recbole/bin/python \
        --rectools rectools/bin/python --epochs 20

All train SASRec with the same sizes (64 dimensions, 2 layers, 2 heads, 50 items), the full softmax
and the same number of epochs, each in a process of its own, one after the other, with the same
threads; all rank every user over the whole catalog after every epoch. Test scores are those at
the best validation NDCG@10. RecBole makes an example of every prefix and pads each to 50 items;
RecTools pads every user to 50 items; here every position of a sequence predicts, and the encoder
reads rows of like length together. Of RecTools there are three models: its SASRec, its flat net,
which has no trainer (here a plain loop), and its UniSRec, beside UniSRec here on the same text
vectors, trained without pre-training and without item ids, as RecTools' is. Scores of RecTools are
ranks by the evaluator here, over the vectors that RecTools scores with.

Seconds are processor time, which other processes disturb less than wall time; peak memory is that
of the whole process. Preparation is what comes before the first epoch, imports left out; here it
is opening a data set that `l2rec prepare` wrote, and for UniSRec loading the language model and
its cached text vectors.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from measure import arguments, median, report

from l2rec.config import load_recipe
from l2rec.data.catalog import Catalog
from l2rec.data.dataset import Dataset, open_dataset
from l2rec.data.ragged import Ragged
from l2rec.data.splits import Cases, Split, leave_one_out
from l2rec.evaluation.ranking import evaluate, evaluate_each
from l2rec.protocols import Scorer
from l2rec.runs.predictor import backbone_of, build_model

RECIPES = {
    "SASRec": ("sasrec", ["model.dim=64"]),
    "UniSRec": (
        "unisrec",
        [
            "model.dim=64",
            "model.pretrain_epochs=0",
            "model.freeze_encoder=false",
            "model.transductive=false",
        ],
    ),
}
"""Recipe and options of each method, by name."""
PEERS = (
    ("RecBole", "SASRec", "SASRec"),
    ("RecTools", "SASRec", "SASRec"),
    ("RecTools", "FlatSASRec", "SASRec"),
    ("RecTools", "UniSRec", "UniSRec"),
)
"""Library, its model, and what it is measured against here."""
METRICS = ("recall@10", "ndcg@10")


def sample(dataset: Dataset, users: int, seed: int, folder: Path) -> Dataset:
    """Write some users of a data set, with the items that they met, as one of its own."""
    drawn = np.random.default_rng(seed).permutation(dataset.n_users)[:users]
    drawn.sort()
    rows = dataset.sequences.take(drawn)
    names = dataset.user_ids.take(pa.array(np.repeat(drawn, rows.lengths)))
    events = pa.table({"user_id": names, "item_id": dataset.item_ids.take(pa.array(rows.values))})
    items = dataset.catalog.drop_columns(["text"])
    return Dataset.from_frames(events, items, folder, timestamp=None, progress=False)


def write_atomic(dataset: Dataset, folder: Path) -> None:
    """Write RecBole's .inter file, with the place in the user's sequence as the time."""
    rows = dataset.sequences
    users = np.repeat(np.arange(len(rows)), rows.lengths)
    places = np.arange(len(rows.values)) - np.repeat(rows.offsets[:-1], rows.lengths)
    folder.mkdir(parents=True)
    lines = np.stack([users, rows.values, places], axis=1)
    header = "user_id:token\titem_id:token\ttimestamp:float"
    np.savetxt(folder / f"{folder.name}.inter", lines, "%d", "\t", header=header, comments="")


def ours(data: Path, method: str, epochs: int, batch: int, seed: int) -> dict[str, Any]:
    """Train here and measure what the child processes measure of the peers."""
    started = time.process_time()
    config, model, split = prepared(data, method, epochs, batch, seed)
    training = config.training
    (stage,) = model.stages(training.lr, training.weight_decay)
    groups = [
        {"params": g.parameters, "lr": g.lr, "weight_decay": g.weight_decay} for g in stage.groups
    ]
    optimizer = torch.optim.AdamW(groups)
    prepare_seconds = time.process_time() - started
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
        "prepare_seconds": prepare_seconds,
        "epoch_seconds": epoch_seconds,
        "eval_seconds": eval_seconds,
        "valid": scores,
        "best_valid": best,
        "test": {name: test[name] for name in METRICS},
        "parameters": sum(p.numel() for p in model.parameters()),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def prepared(data: Path, method: str, epochs: int, batch: int, seed: int) -> tuple[Any, Any, Split]:
    """Open the data set and build the model: its config, the model, the split."""
    recipe, options = RECIPES[method]
    given = [f"seed={seed}", f"training.epochs={epochs}", f"training.batch_users={batch}"]
    config = load_recipe(recipe, [*options, *given])
    dataset = open_dataset(data)
    split = leave_one_out(dataset.sequences)
    backbone = backbone_of(config)
    return config, build_model(config, Catalog(dataset.catalog), backbone, data / "cache"), split


def ranked(model: Any, split: Split, *, test: bool) -> dict[str, float]:
    histories, targets = (
        (split.test.histories, split.test.targets)
        if test
        else (split.valid.histories, split.valid.targets)
    )
    return evaluate(model, histories, targets).metrics()


# -- RecTools ------------------------------------------------------------------------------------


def write_events(split: Split, n_items: int, vectors: npt.NDArray[np.float32], file: Path) -> None:
    """Write what `rectools_child.py` reads: events of training, and histories of both kinds."""
    parts = {
        "train": split.train,
        "valid": split.valid.histories,
        "test": split.test.histories,
    }
    arrays: dict[str, Any] = {"n_items": n_items, "vectors": vectors}
    for name, rows in parts.items():
        arrays[f"{name}_users"] = np.repeat(np.arange(len(rows)), rows.lengths)
        arrays[f"{name}_items"] = rows.values.astype(np.int64)
    np.savez(file, **arrays)


def scores_of(exported: Mapping[str, npt.NDArray[Any]], part: str, cases: Cases) -> dict[str, Any]:
    """Rank by inner products of exported vectors; what the peer cannot recommend comes last.

    ``exported``: of one epoch, as `rectools_child.py` writes it. Metrics are None where the
    vectors are not finite.
    """
    users, items = exported[part], torch.from_numpy(exported["items"])
    if not (np.isfinite(users).all() and bool(items.isfinite().all())):
        return dict.fromkeys(METRICS)
    unknown = torch.from_numpy(~exported["known"])
    read = 0

    def score(histories: Ragged) -> torch.Tensor:
        nonlocal read  # blocks of users come in order
        block = torch.from_numpy(users[read : read + len(histories)])
        read += len(histories)
        return (block @ items.T).masked_fill(unknown, float("-inf"))

    def scorer() -> Scorer:
        return score

    return evaluate_each(len(items), {"": scorer}, cases.histories, cases.targets)[""].metrics()


def rectools(
    python: str, contender: str, events: Path, split: Split, given: Sequence[str]
) -> dict[str, Any]:
    """Run a model of RecTools in a process of its own. ``given``: epochs, threads, seed, batch."""
    child = Path(__file__).with_name("rectools_child.py")
    with tempfile.TemporaryDirectory() as folder:
        command = [python, str(child), contender, str(events), *given, folder]
        subprocess.run(command, check=True, cwd=folder)
        found: dict[str, Any] = json.loads(Path(folder, "result.json").read_text(encoding="utf-8"))
        files = [np.load(Path(folder, f"epoch-{n + 1}.npz")) for n in range(int(given[0]))]
        valid = [scores_of(file, "valid", split.valid)["ndcg@10"] for file in files]
        found["valid"] = [-1.0 if score is None else score for score in valid]
        test = scores_of(files[int(np.argmax(found["valid"]))], "test", split.test)
    return {**found, "test": {name: test[name] for name in METRICS}}


# -- RecBole -------------------------------------------------------------------------------------


def recbole(python: str, dataset: Dataset, given: Sequence[str]) -> dict[str, Any]:
    """Run RecBole's SASRec in a process of its own. ``given``: epochs, threads, seed."""
    child = Path(__file__).with_name("recbole_child.py")
    with tempfile.TemporaryDirectory() as temporary:
        folder, result = Path(temporary), Path(temporary) / "result.json"
        write_atomic(dataset, folder / "events")
        command = [python, str(child), str(folder), "events", *given, str(result)]
        subprocess.run(command, check=True, cwd=folder)
        found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return found


# -- the table -----------------------------------------------------------------------------------


def row(library: str, model: str, found: dict[str, Any], mine: dict[str, Any]) -> dict[str, Any]:
    """Build a line of the table; ratios are this one's figure divided by that of l2rec."""

    def times(key: str) -> float:
        return median(found[key]) / median(mine[key])

    return {
        "contender": f"{library}, {model}",
        "prepare": found["prepare_seconds"],
        "epoch": median(found["epoch_seconds"]),
        "slower_epoch": times("epoch_seconds"),
        "evaluation": median(found["eval_seconds"]),
        "slower_evaluation": times("eval_seconds"),
        "peak_mb": found["peak_mb"],
        "parameters": found["parameters"],
        "best_epoch": 1 + int(np.argmax(found["valid"])),
        **{name: found["test"][name] for name in METRICS},
    }


def goals(data: str, mine: dict[str, Any], theirs: dict[str, Any]) -> list[dict[str, Any]]:
    """Build the goals of a line of the table against that of l2rec."""
    path = f"{data}, against {theirs['contender']}"
    faster = [
        {
            "path": f"{path}: {what}",
            "goal": "faster",
            "measured": f"{theirs[key]:.1f} x faster",
            "reached": theirs[key] > 1,
        }
        for what, key in (("an epoch", "slower_epoch"), ("ranking", "slower_evaluation"))
    ]
    score = theirs["ndcg@10"]
    better = mine["ndcg@10"] / score - 1 if score else 0.0
    told = f"{score:.4f} ({better:+.1%})" if score is not None else "NaN"
    return [
        *faster,
        {
            "path": f"{path}: test ndcg@10 after as many epochs",
            "goal": "equal or better",
            "measured": f"{mine['ndcg@10']:.4f} against {told}",
            "reached": better > -0.01,
        },
    ]


def main(argv: Sequence[str] | None = None) -> None:
    p = arguments(__file__, __doc__)
    p.add_argument("--data", type=Path, required=True, metavar="DIR", help="a prepared data set")
    p.add_argument("--peer", metavar="PYTHON", help="an interpreter with RecBole")
    p.add_argument("--rectools", metavar="PYTHON", help="an interpreter with RecTools")
    p.add_argument("--epochs", type=int, default=3, help="of all (default %(default)s)")
    p.add_argument(
        "--batch",
        type=int,
        default=512,
        help="most users of a batch, here and of RecTools (default %(default)s)",
    )
    p.add_argument("--users", type=int, help="so many, drawn, and their items alone")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--ours", choices=RECIPES, help="only this one of ours, as JSON")
    args = p.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.quick:
        args.epochs = 1
    if args.ours:
        print(json.dumps(ours(args.data, args.ours, args.epochs, args.batch, args.seed)))
        return
    # Absolute, because they run in other folders; links stay, because they lead out of the venv.
    pythons = {
        name: path and os.path.abspath(path)
        for name, path in (("RecBole", args.peer), ("RecTools", args.rectools))
    }
    peers = [peer for peer in PEERS if pythons[peer[0]]]
    if not peers:
        p.error("nothing to compare with; give --peer PYTHON, --rectools PYTHON, or both")
    threads = str(torch.get_num_threads())
    given = [str(args.epochs), threads, str(args.seed)]
    dataset, mine, theirs = open_dataset(args.data), {}, {}
    with tempfile.TemporaryDirectory() as temporary:
        data, events = args.data, Path(temporary) / "events.npz"
        if args.users:
            data = Path(temporary) / f"{dataset.name}-{args.users}-users"
            dataset = sample(dataset, args.users, args.seed, data)
        if args.rectools:
            _, model, split = prepared(data, "UniSRec", args.epochs, args.batch, args.seed)
            write_events(split, dataset.n_items, model.text.vectors.numpy(), events)
        for method in dict.fromkeys(method for _, _, method in peers):
            own = ["--data", str(data), "--epochs", str(args.epochs), "--batch", str(args.batch)]
            own += ["--seed", str(args.seed), "--threads", threads, "--ours", method]
            done = subprocess.run(
                [sys.executable, __file__, *own], check=True, stdout=subprocess.PIPE, text=True
            )
            mine[method] = json.loads(done.stdout)
        for library, model_name, _ in peers:
            print(f"{library}, {model_name} ...", file=sys.stderr, flush=True)
            theirs[library, model_name] = (
                recbole(pythons[library], dataset, given)
                if library == "RecBole"
                else rectools(
                    pythons[library], model_name, events, split, [*given, str(args.batch)]
                )
            )
    table = {method: row("l2rec", method, found, found) for method, found in mine.items()}
    rows, summary = [], []
    for method, own in table.items():
        rows.append(own)
        for library, model_name, against in peers:
            if against == method:
                found = theirs[library, model_name]
                rows.append(row(library, model_name, found, mine[method]))
                summary += goals(dataset.name, own, rows[-1])
    notes = [
        f"Data {dataset.name}, {dataset.n_users:,} users and {dataset.n_items:,} items, "
        f"fingerprint {dataset.fingerprint}; {args.epochs} epochs, seed "
        f"{args.seed}, batches of at most {args.batch} users (RecBole: 2048 prefixes); history "
        "not masked; test scores at the best validation ndcg@10. Other processes used the machine "
        "too: compare the ratios, which are of processor seconds.",
        "After few epochs, test scores tell how soon a model learns, not how far it gets.",
    ]
    notes += [
        f"{library}, {model_name}: its scores are NaN in evaluation mode as shipped; those in the "
        "table were computed with PyTorch's fused attention switched off."
        for (library, model_name), found in theirs.items()
        if found.get("nan")
    ]
    report(
        "sasrec",
        args.json,
        goal="Models train and rank faster than those of RecBole and RecTools, at equal or better "
        "quality",
        columns=[
            ("contender", "model"),
            ("prepare", "preparation, CPU s"),
            ("epoch", "epoch, CPU s"),
            ("slower_epoch", "by l2rec's"),
            ("evaluation", "ranking all users, CPU s"),
            ("slower_evaluation", "by l2rec's"),
            ("peak_mb", "peak memory, MB"),
            ("parameters", "parameters"),
            ("best_epoch", "best epoch"),
            *((name, f"test {name}") for name in METRICS),
        ],
        rows=rows,
        notes=notes,
        summary=summary,
    )


if __name__ == "__main__":
    main()
