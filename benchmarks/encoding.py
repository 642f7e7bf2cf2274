"""Speed of encoding items and users, against sentence-transformers on the same backbone.

    python benchmarks/encoding.py --data data/scientific
    python benchmarks/encoding.py --quick          a few generated texts

Both get the same texts, cut to the same number of tokens, in the same precision, with the same
threads, in one process, in turn. The peer reads a user as the text of the tokens that l2rec reads.
Experts have weights as after training (B is not zero), so that nothing of them can be left out.

    sentence-transformers, N   SentenceTransformer.encode in batches of N; the faster is the peer
    its tokenizer              what the peer spends on tokens. l2rec tokenises a catalog once, when
                               the model is built; for "raw texts" it does within the time
    bare backbone              text vectors of items without views and experts: a scale
    l2rec, semantic view       L2Rec.encode_items or encode_users, experts on q and v
    l2rec, both views          the paper's form
    l2rec, raw texts           both views, items that are not in the catalog

Seconds are the median over rounds; a ratio is the median over rounds of the peer's time by the
contender's in the same round: above 1 is faster than the peer. Memory is the peak of encoding n, 2n
and 4n texts, each in a fresh process, above that process with everything loaded; the vectors that
are handed out are taken off. n is four times the sample, so that it fills several batches.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from measure import arguments, from_child, interleave, median, needs, peak_mb, ratio, report

from l2rec.config import load_recipe
from l2rec.data.catalog import Catalog
from l2rec.data.dataset import open_dataset
from l2rec.data.ragged import Ragged
from l2rec.data.synthetic import N_TEXTS, simple_text
from l2rec.data.text import tokenize
from l2rec.methods.l2rec import L2Rec
from l2rec.modules.backbone import fast_bfloat16, load_backbone, minilm_source
from l2rec.modules.item_text import separators, text_vectors
from l2rec.modules.views import semantic_tokens
from l2rec.runs.predictor import build_model

RECIPE = "scientific/l2rec"
PEER = "sentence-transformers"
PEER_BATCHES = (32, 128)
GOAL = 1.5
GROWTH = 1.1
VIEWS = {"l2rec, semantic view": ["semantic"], "l2rec, both views": ["semantic", "behavioral"]}
What = Literal["items", "users"]


@dataclass(frozen=True)
class Sample:
    """Texts of a catalog, and histories over it."""

    name: str
    texts: list[str]
    histories: Ragged


def generated(texts: int, users: int) -> Sample:
    """Generate texts of 4 to 32 words and histories of 2 to 20 items."""
    rng = np.random.default_rng(0)
    made = [
        ", ".join(simple_text(int(code)) for code in rng.integers(N_TEXTS, size=parts))
        for parts in rng.integers(1, 9, size=texts)
    ]
    rows = [rng.integers(texts, size=length) for length in rng.integers(2, 21, size=users)]
    return Sample("generated", made, Ragged.from_rows(rows))


def sampled(path: Path, texts: int, users: int) -> Sample:
    """Sample users of a data set, the items of their histories, and other items to fill up."""
    dataset, rng = open_dataset(path), np.random.default_rng(0)
    some = np.flatnonzero(dataset.sequences.lengths)
    chosen = np.sort(rng.choice(some, size=min(users, len(some)), replace=False))
    histories = dataset.sequences.take(chosen)
    needed = np.unique(histories.values)
    others = np.setdiff1d(np.arange(dataset.n_items), needed)
    missing = min(max(0, texts - len(needed)), len(others))
    items = np.union1d(needed, rng.choice(others, size=missing, replace=False))
    catalog = dataset.texts()
    return Sample(
        dataset.name,
        [catalog[item] for item in items],
        Ragged(np.searchsorted(items, histories.values).astype(np.int32), histories.offsets),
    )


# -- contenders ----------------------------------------------------------------------------------


def model_of(texts: Sequence[str], views: Sequence[str], dtype: str) -> L2Rec:
    config = load_recipe(RECIPE, [f"backbone.dtype={dtype}", f"model.views=[{','.join(views)}]"])
    model: L2Rec = build_model(
        config, Catalog.of_texts(texts), load_backbone(config.backbone), None
    )
    with torch.no_grad():
        for name, parameter in model.experts.named_parameters():
            if name.endswith(("shared_b", ".b")):
                parameter.normal_(std=0.02)
    return model.eval()


def peer(dtype: str, max_tokens: int) -> Any:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(
        minilm_source(), device="cpu", model_kwargs={"dtype": getattr(torch, dtype)}
    )
    model.max_seq_length = max_tokens
    return model


def user_texts(model: L2Rec, sample: Sample) -> list[str]:
    """Write the text of each row of the semantic view, whose tokens are the row's tokens."""
    config = model.config
    before, after = separators(model.backbone)
    read = semantic_tokens(
        sample.histories.tail(config.max_items),
        tokenize(sample.texts, model.backbone.tokenizer, config.item_tokens),
        item_tokens=config.item_tokens,
        max_tokens=config.max_tokens,
        max_items=config.semantic_items,
        before=before,
        after=after,
    )
    rows = read.ids.split(read.segments.lengths.tolist())
    # The first and the last token the peer's tokenizer puts there itself.
    return [model.backbone.tokenizer.decode(row[1:-1]) for row in rows]


def contenders(what: What, sample: Sample, dtype: str) -> dict[str, Callable[[], object]]:
    """Build the contenders by name: functions that encode the whole sample."""
    models = {name: model_of(sample.texts, views, dtype) for name, views in VIEWS.items()}
    both = models["l2rec, both views"]
    items = np.arange(len(sample.texts))
    if what == "items":
        texts = sample.texts
        limit = both.config.item_tokens + sum(map(len, separators(both.backbone)))
    else:
        texts, limit = user_texts(both, sample), both.config.max_tokens
    rival = peer(dtype, limit)
    found: dict[str, Callable[[], object]] = {
        f"{PEER}, {size}": partial(rival.encode, texts, batch_size=size, show_progress_bar=False)
        for size in PEER_BATCHES
    }
    found["its tokenizer"] = lambda: [
        rival.preprocess(texts[start : start + PEER_BATCHES[0]])
        for start in range(0, len(texts), PEER_BATCHES[0])
    ]
    if what == "users":
        return found | {
            name: partial(model.encode_users, sample.histories) for name, model in models.items()
        }
    short = tokenize(texts, both.backbone.tokenizer, both.config.item_tokens)
    found["bare backbone"] = partial(text_vectors, both.backbone, short, both.config.text_tokens)
    found |= {name: partial(model.encode_items, items) for name, model in models.items()}
    found["l2rec, raw texts"] = partial(both.encode_items, texts)
    return found


# -- measurements --------------------------------------------------------------------------------


def speed(what: What, sample: Sample, dtype: str, rounds: int, warmup: int) -> list[dict[str, Any]]:
    rivals = contenders(what, sample, dtype)
    wall, cpu = interleave(list(rivals.values()), rounds, warmup)
    seconds = dict(zip(rivals, wall, strict=True))
    fastest = min((n for n in rivals if n.startswith(PEER)), key=lambda n: median(seconds[n]))
    texts = len(sample.texts) if what == "items" else len(sample.histories)
    return [
        {
            "data": sample.name,
            "what": what,
            "dtype": dtype,
            "contender": f"{name} *" if name == fastest else name,
            "texts": texts,
            "seconds": median(seconds[name]),
            "cpu_seconds": median(busy),
            "rate": texts / median(seconds[name]),
            "ratio": ratio(seconds[fastest], seconds[name]),
        }
        for name, busy in zip(rivals, cpu, strict=True)
    ]


def encoding_mb(what: What, sample: Sample, times: int, dtype: str) -> float:
    """Measure the peak MB, above the loaded process, of encoding the sample ``times`` over."""
    model = model_of(sample.texts, VIEWS["l2rec, both views"], dtype)
    rows: Ragged
    if what == "items":
        count = len(sample.texts)
        rows = Ragged(np.tile(np.arange(count), times), np.arange(times * count + 1))
    else:
        rows = sample.histories.take(np.tile(np.arange(len(sample.histories)), times))
    output = len(rows) * model.backbone.dim * 4 / 2**20
    # What every first pass leaves behind (kernels, pools) is not what encoding takes.
    model.encode_users(rows.take(np.arange(min(64, len(rows)))))
    return peak_mb(lambda: model.encode_users(rows)) - output


def memory(what: What, sample: Sample, dtype: str, options: Sequence[str]) -> list[dict[str, Any]]:
    texts = len(sample.texts) if what == "items" else len(sample.histories)
    return [
        {
            "data": sample.name,
            "what": what,
            "dtype": dtype,
            "contender": "l2rec, both views: memory",
            "texts": times * texts,
            "memory_mb": from_child(
                __file__, *options, "--memory-of", what, "--times", str(times), "--dtypes", dtype
            ),
        }
        for times in (4, 8, 16)
    ]


def speed_goals(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "path": f"encoding {row['what']} of {row['data']}, {row['dtype']}, {row['contender']}",
            "goal": f"at least {GOAL} x {PEER}",
            "measured": f"{row['ratio']:.2f} x ({row['rate']:,.0f} texts/s)",
            "reached": row["ratio"] >= GOAL,
        }
        for row in rows
        if row["contender"] in VIEWS
    ]


def memory_goal(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    found = [row["memory_mb"] for row in rows]
    if not found or None in found:
        return []
    return [
        {
            "path": f"memory of encoding {rows[0]['what']}",
            "goal": f"grows less than {GROWTH - 1:.0%} from n to 4n texts",
            "measured": f"{found[0]:,.0f} MB to {found[-1]:,.0f} MB beside the vectors",
            "reached": found[-1] < GROWTH * found[0],
        }
    ]


def main(argv: Sequence[str] | None = None) -> None:
    options = list(sys.argv[1:] if argv is None else argv)
    p = arguments(__file__, __doc__)
    p.add_argument("--data", type=Path, nargs="+", metavar="DIR", help="each is sampled")
    p.add_argument("--texts", type=int, default=600, help="items (default %(default)s)")
    p.add_argument("--users", type=int, default=100, help="histories (default %(default)s)")
    p.add_argument("--rounds", type=int, default=3, help="timed rounds (default %(default)s)")
    p.add_argument(
        "--dtypes",
        default="float32,bfloat16" if fast_bfloat16() else "float32",
        help="of the frozen weights, comma-separated (default %(default)s: what is native here)",
    )
    p.add_argument("--memory-of", choices=["items", "users"], help="only this, as a number of MB")
    p.add_argument("--times", type=int, default=1, help="with --memory-of: repeat the texts")
    args = p.parse_args(options)
    needs(p, "bench", "sentence_transformers")
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.quick:
        args.texts, args.users, args.rounds = 256, 64, 2
    samples = [sampled(path, args.texts, args.users) for path in args.data or ()]
    samples = samples or [generated(args.texts, args.users)]
    dtypes = args.dtypes.split(",")
    if args.memory_of:
        print(encoding_mb(args.memory_of, samples[0], args.times, dtypes[0]))
        return
    kinds: tuple[What, ...] = ("items", "users")
    timed = [
        row
        for sample in samples
        for what in kinds
        for dtype in dtypes
        for row in speed(what, sample, dtype, args.rounds, 1)
    ]
    # Few texts are one batch, and that grows.
    measured = () if args.quick else kinds
    held = {what: memory(what, samples[0], dtypes[0], options) for what in measured}
    report(
        "encoding",
        args.json,
        goal=f"items and users are encoded {GOAL} times as fast as by {PEER}, in flat memory",
        columns=[
            ("data", "data"),
            ("what", "encoded"),
            ("dtype", "dtype"),
            ("contender", "contender"),
            ("texts", "texts"),
            ("seconds", "seconds"),
            ("cpu_seconds", "CPU s"),
            ("rate", "texts/s"),
            ("ratio", "times the peer"),
            ("memory_mb", "memory MB"),
        ],
        rows=[*timed, *(row for rows in held.values() for row in rows)],
        notes=[
            *(
                f"{sample.name}: {len(sample.texts):,} items, {len(sample.histories):,} histories "
                f"of {sample.histories.lengths.mean():.1f} items on average, read as recipe "
                f"{RECIPE} does."
                for sample in samples
            ),
            f"{args.rounds} rounds after 1. * is the peer.",
            "Memory: the peak above the loaded process, less the vectors that are handed out.",
        ],
        summary=[
            *speed_goals(timed),
            *(goal for rows in held.values() for goal in memory_goal(rows)),
        ],
    )


if __name__ == "__main__":
    main()
