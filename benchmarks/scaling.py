"""The plan on paper for data that no single machine trains on: docs/scaling.md.

    python benchmarks/scaling.py              the page anew, from what was measured
    python benchmarks/scaling.py --out FILE   elsewhere

Every figure is one of three: measured, by a command that the page names, on the machine and day
that stand beside it (results/performance/*.json; the commands write them anew on another machine);
an assumption, with its source; or arithmetic, with its formula. Operations of a backbone come from
the shapes in its config.json, no weights are needed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from performance import RESULTS, ROOT, table

PAGE = ROOT / "docs" / "scaling.md"


@dataclass(frozen=True)
class Shape:
    """Shapes of a decoder of the Qwen3 family, as its config.json has them."""

    name: str
    layers: int
    dim: int
    heads: int
    shared_heads: int
    head: int
    wide: int
    words: int

    @property
    def weights(self) -> int:
        """Weights of the layers: q, k, v, o, gate, up, down."""
        attention = 2 * self.dim * self.head * (self.heads + self.shared_heads)
        return self.layers * (attention + 3 * self.dim * self.wide)

    @property
    def parameters(self) -> int:
        """Weights of the layers and word vectors, without the few of the norms."""
        return self.weights + self.words * self.dim

    def forward(self, row: float) -> float:
        """Count operations of a token in a row of ``row``: matrices, and attention to all of it."""
        return 2 * self.weights + 4 * self.layers * self.heads * self.head * row

    def experts(self, rank: int, experts: int) -> int:
        """Count weights of low-rank experts on q and v, without routers."""
        q, v = self.dim + self.heads * self.head, self.dim + self.shared_heads * self.head
        return self.layers * experts * rank * (q + v)


SMALL = Shape("Qwen3-0.6B", 28, 1024, 16, 8, 128, 3072, 151_936)
LARGE = Shape("Qwen3-8B", 36, 4096, 32, 8, 128, 12_288, 151_936)


@dataclass(frozen=True)
class Card:
    """An accelerator, by its data sheet."""

    name: str
    flops: float
    bytes: float
    bandwidth: float


CARD = Card("H100 SXM", 989e12, 80e9, 3.35e12)
UTILISED = 0.4
ITEM_TOKENS, MOST_TOKENS = 20, 1024
EPOCHS = 5
NEGATIVES, RANK, EXPERTS = 10, 8, 17
BATCH, SAMPLED = 128, 1024
AT_ONCE = 32
LINKS = 32

ASSUMPTIONS = [
    (
        f"{CARD.name}: {CARD.flops / 1e12:.0f} TFLOP/s in bfloat16 (dense), "
        f"{CARD.bytes / 1e9:.0f} GB, {CARD.bandwidth / 1e12:.2f} TB/s",
        "data sheet, https://www.nvidia.com/en-us/data-center/h100/",
    ),
    (
        f"{UTILISED:.0%} of these operations are reached",
        "Llama 3 was trained with 38 to 43% (Table 4 of arXiv:2407.21783)",
    ),
    (
        f"a text has {ITEM_TOKENS} tokens, and one that separates it",
        "T / L = 1024 / 50 of the paper",
    ),
    (f"{EPOCHS} epochs", "l2rec-plus stops after 4 to 6 (log.md)"),
    (
        f"the paper's form: one target of a user in an epoch, {NEGATIVES} negatives, rank {RANK} "
        f"on q and v, {EXPERTS} experts",
        "the paper",
    ),
    (
        f"l2rec-plus: {BATCH} users a step, model.sampled_items={SAMPLED}, the behavioural view",
        "this plan",
    ),
    ("a request encodes its whole history, none is remembered", "this plan, the worst case"),
]


@dataclass(frozen=True)
class Plan:
    """Data, and the cards they are to be trained on."""

    users: int
    items: int
    events: int
    cards: int

    @property
    def title(self) -> str:
        return (
            f"{self.users:,} users, {self.items:,} items, {self.events:,} events; "
            f"{self.cards:,} x {CARD.name}"
        )

    @property
    def history(self) -> float:
        return self.events / self.users

    @property
    def read(self) -> float:
        """Tokens of a user in both views: Eq. 1 and 2."""
        return min(MOST_TOKENS, self.history * (ITEM_TOKENS + 1)) + self.history


PLANS = (
    Plan(1_500_000, 611_000, 42_000_000, 8),
    Plan(1_000_000_000, 100_000_000, 28_000_000_000, 256),
)


# -- what was measured ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """A unit cost, and the measurement that it is taken from."""

    what: str
    value: float
    shown: str
    part: str


Documents = Mapping[str, Mapping[str, Any]]


def documents() -> Documents:
    """Read the measurements that the plan is made of."""
    parts = ("preparation", "step", "industrial", "serving")
    return {p: json.loads((RESULTS / f"{p}.json").read_text(encoding="utf-8")) for p in parts}


def row(document: Mapping[str, Any], **wanted: object) -> dict[str, Any]:
    """Return the first row with these values."""
    rows = (r for r in document["rows"] if all(r.get(k) == v for k, v in wanted.items()))
    found: dict[str, Any] = next(rows)
    return found


def costs(found: Documents) -> dict[str, Cost]:
    """Return the unit costs by short names."""
    unit: dict[str, Cost] = {}

    def add(part: str, short: str, what: str, value: float, form: str) -> None:
        unit[short] = Cost(what, value, form.format(value), part)

    log = row(found["preparation"], step="prepare")
    what = f"preparing an event, of {log['events']:,} of {log['users']:,} users"
    add("preparation", "prepare", what, log["seconds"] / log["events"], "{:.2e} s")
    size = log["disk_mb"] * 2**20 / log["events"]
    add("preparation", "disk", "an event of a data set on disk", size, "{:.1f} bytes")
    peak = gigabytes(log["peak_mb"])
    add("preparation", "peak", "most memory of preparing", peak, "{:.1f} GB")

    bare, ours = (row(found["step"], case=STEP, contender=name) for name in ("bare", "l2rec"))
    what = "a training step, by the bare backbone's forward pass (Qwen3 shapes, bfloat16)"
    add("step", "step", what, ours["seconds"] / bare["seconds"], "{:.2f}")
    what = "memory of a step, a token and layer of width 1,024"
    add("step", "held", what, ours["memory_mb"] * 2**20 / STEP_TOKENS, "{:,.0f} bytes")

    step = {name: row(found["industrial"], step=name) for name in ("texts", "train", "free")}
    step |= {name: row(found["industrial"], step=name) for name in ("items", "users")}
    at = "industrial"
    add(
        at,
        "texts",
        "tokenising and reading an item, 20 to a text of 4 tokens (MiniLM)",
        step["texts"]["each"],
        "{:.1e} s",
    )
    add(at, "train", f"a step of {BATCH} users (MiniLM)", step["train"]["each"], "{:.2f} s")
    free = step["free"]["each"]
    add(at, "free", "updating r_i of 611,000 items, in a step", free, "{:.2f} s")
    add(at, "free_peak", "and its memory", gigabytes(step["free"]["peak_mb"]), "{:.1f} GB")
    ranked = step["train"]["ranked_each"]
    add(at, "rank", "ranking a user among 611,000 items", ranked, "{:.3f} s")
    add(at, "item", "an item vector, from its text vector", step["items"]["each"], "{:.1e} s")
    add(at, "user", "a user vector", step["users"]["each"], "{:.1e} s")
    recalls = {k: row(found[at], step=f"index {k}")["recall"] for k in ("int8", "binary")}
    for kind in ("exact", "int8", "binary"):
        found_by = row(found[at], step=f"search {kind}")
        of = "" if kind == "exact" else f", recall@10 {recalls[kind]:.3f}"
        what = f"{kind} searches among 611,000 rows of 384, {AT_ONCE} at once{of}"
        add(at, kind, what, 1 / found_by["each"], "{:,.0f} a second")
    served = row(found["serving"], histories="distinct", clients=8, server="l2rec serve")
    what = "distinct requests (MiniLM, MovieLens-100K)"
    add("serving", "served", what, served["rate"], "{:,.0f} a second")
    return unit


def gigabytes(mb: float) -> float:
    """Convert the MB of a measurement, 2^20 bytes each, to the page's GB, a power of ten."""
    return mb * 2**20 / 1e9


STEP = "qwen3, q,v, bfloat16"
STEP_TOKENS = 8 * 128 * 2
"""Tokens of that step in its two layers."""


# -- the arithmetic ------------------------------------------------------------------------------


def shown_bytes(count: float) -> str:
    for unit, size in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:#.3g} {unit}".replace(". ", " ")
    return f"{count / 1e3:#.3g} kB"


def shown_time(seconds: float) -> str:
    for unit, size in (("years", 365 * 86_400), ("days", 2 * 86_400), ("hours", 3600), ("min", 60)):
        if seconds >= size:
            per = 86_400 if unit == "days" else size
            return f"{seconds / per:#.3g} {unit}".replace(". ", " ")
    return f"{seconds:#.2g} s".replace(". ", " ")


def shown_rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}".rstrip(".")


@dataclass(frozen=True)
class Line:
    """A row of the plan: what, its formula in the symbols of the page, and how to compute it."""

    what: str
    formula: str
    of: Callable[[Plan, Shape], str]


def lines(unit: Mapping[str, Cost]) -> list[Line]:
    """Return all rows of the plan."""
    card = CARD.flops * UTILISED

    def hours(operations: float, plan: Plan) -> str:
        return shown_time(operations / (plan.cards * card))

    def texts(plan: Plan, shape: Shape) -> str:
        tokens = ITEM_TOKENS + 1
        return hours(plan.items * tokens * shape.forward(tokens), plan)

    def paper(plan: Plan, shape: Shape) -> float:
        """Count operations of an epoch of the paper's form."""
        tokens = ITEM_TOKENS + 1
        items = (1 + NEGATIVES) * (tokens + 1) * shape.forward(tokens)
        operations = plan.read * shape.forward(plan.read) + items
        return plan.users * unit["step"].value * operations

    def plus(plan: Plan, shape: Shape) -> float:
        """Count operations of an epoch of l2rec-plus, one layer."""
        tokens = plan.history + plan.history + SAMPLED / BATCH
        return plan.users * unit["step"].value * tokens * shape.forward(plan.history) / shape.layers

    def encoded(plan: Plan, shape: Shape) -> float:
        return plan.read * shape.forward(plan.read)

    def rows(plan: Plan, shape: Shape, size: float) -> float:
        return plan.items * shape.dim * size

    def requests(plan: Plan, shape: Shape) -> str:
        search = rows(plan, shape, 1) / CARD.bandwidth / AT_ONCE
        return shown_rate(1 / (encoded(plan, shape) / card + search))

    def fit(plan: Plan, shape: Shape) -> str:
        held = unit["held"].value * shape.dim / 1024 * shape.layers
        return f"{max(0.0, (CARD.bytes - 2 * shape.parameters) / held):,.0f}"

    return [
        Line("frozen weights, bfloat16", "2 P", lambda p, s: shown_bytes(2 * s.parameters)),
        Line(
            "trained experts, with gradients and AdamW",
            f"16 layers {EXPERTS} r (rows + columns of q, v)",
            lambda p, s: shown_bytes(16 * s.experts(RANK, EXPERTS)),
        ),
        Line(
            "tokens of a step on a card, nothing computed twice",
            "(card - 2 P) / (m D/1024 layers)",
            fit,
        ),
        Line("reading all texts once", "N t F(t) / (G C)", texts),
        Line(
            "states of all tokens on disk (semantic view, item_layers)",
            "N t D 2",
            lambda p, s: shown_bytes(rows(p, s, 2) * (ITEM_TOKENS + 1)),
        ),
        Line(
            f"training, the paper's form, {EPOCHS} epochs",
            f"epochs U s (w F(w) + {1 + NEGATIVES} (t + 1) F(t)) / (G C)",
            lambda p, s: hours(EPOCHS * paper(p, s), p),
        ),
        Line(
            f"training, l2rec-plus, behavioural view, {EPOCHS} epochs",
            f"epochs U s (2 h + {SAMPLED}/{BATCH}) F(h) / layers / (G C)",
            lambda p, s: hours(EPOCHS * plus(p, s), p),
        ),
        Line(
            "free item vectors r_i with gradient and AdamW, on every card",
            "16 N D",
            lambda p, s: shown_bytes(rows(p, s, 16)),
        ),
        Line(
            "ranking every user among all items, once",
            "2 U N D / (G C)",
            lambda p, s: hours(2.0 * p.users * rows(p, s, 1), p),
        ),
        Line(
            "user vectors: time",
            "U w F(w) / (G C)",
            lambda p, s: hours(p.users * encoded(p, s), p),
        ),
        Line("user vectors: float32", "4 U D", lambda p, s: shown_bytes(4.0 * p.users * s.dim)),
        Line("index, float32", "4 N D", lambda p, s: shown_bytes(rows(p, s, 4))),
        Line("index, int8", "N D", lambda p, s: shown_bytes(rows(p, s, 1))),
        Line(
            "index, binary, with int8 to score once more",
            "N D / 8 + N D",
            lambda p, s: f"{shown_bytes(rows(p, s, 1 / 8))} + {shown_bytes(rows(p, s, 1))}",
        ),
        Line(
            "index, HNSW links beside the rows",
            f"N 2 {LINKS} 4",
            lambda p, s: shown_bytes(p.items * 2 * LINKS * 4.0),
        ),
        Line(
            "requests a second of one card, histories distinct, int8 rows read whole",
            f"1 / (w F(w) / C + N D / bandwidth / {AT_ONCE})",
            requests,
        ),
    ]


SYMBOLS = (
    "U users, N items, E events, h = E / U events of a user, t = "
    f"{ITEM_TOKENS + 1} tokens of an item, w = min({MOST_TOKENS}, h t) + h tokens of a user in "
    "both views, P parameters of the backbone, F(n) = 2 (weights of the layers) + 4 layers heads "
    "head_dim n operations of a token in a row of n, D its width, G cards, C = operations a card "
    "reaches, s the measured ratio of a step to a forward pass, m the measured memory of a step."
)


PRODUCTS_ALONE = (
    "Times are of matrix products at that share of a card's speed. Reading, waiting for other "
    "cards and Python come on top: little where rows are long, as in the paper's form, most of all "
    "where a step is one layer over single items."
)

ID_BYTES = 12
"""Characters of a user id, such as those of the generated log; 8 more say where it begins."""
PAIR_BYTES = 31
"""Most memory of counting 47 million pairs, for each: two item numbers and a weight, the same once
more as a matrix, and the pairs of one distance."""
WINDOW = 10
"""Distance of co-occurrence, both ways."""


def breaks(unit: Mapping[str, Cost]) -> list[str]:
    """Return what breaks first, in the order in which data grow."""
    small, large = PLANS
    half = CARD.bytes / 2
    everybody = shown_time(unit["rank"].value * small.users)
    pairs = shown_bytes(PAIR_BYTES * 2.0 * WINDOW * small.events)
    states = shown_bytes(large.items * (ITEM_TOKENS + 1) * SMALL.dim * 2.0)
    alike = [f"{2.0 * plan.items**2 * SMALL.dim:.1e} for {plan.items:,}" for plan in PLANS]
    fit = ", ".join(f"{half / (16 * s.dim):,.0f} of {s.name}" for s in (SMALL, LARGE))
    ids = shown_bytes((8.0 + ID_BYTES) * large.users)
    whole, bits = 4.0 * large.items * SMALL.dim, large.items * SMALL.dim / 8
    return [
        f"**Validation and test of everybody**: {unit['rank'].shown} a user are {everybody} for "
        f"{small.users:,}, each time, on one core. `split.users=10000` ranks so many, evenly "
        "spread; all are trained on.",
        f"**Counting pairs**, for the floors of `l2rec train` and for `l2rec blend`: {PAIR_BYTES} "
        f"bytes a pair, measured with 47 million, are {pairs} for {small.events:,} events. A "
        "machine has to have that much, or does not come to its test.",
        "**Texts that are alike**, for `l2rec blend` of a method that reads texts: the text of "
        "every item is compared with all others, 2 N^2 D operations in float32, in one process. "
        f"With vectors of {SMALL.name} they are {alike[0]} items and {alike[1]}: ten times the "
        "items take a hundred times as long.",
        f"**r_i** (`item_residual`), dense: {unit['free'].shown} a step beside "
        f"{unit['train'].shown}, and {unit['free_peak'].shown} of memory. Half of a card holds "
        f"those, with gradients and AdamW, of the items of {fit}. Beyond: "
        "`model.item_residual=false`.",
        f"**States of all tokens** (`item_layers` with the semantic view): {states} on disk for "
        f"{large.items:,} items of {SMALL.name}. The behavioural view alone keeps a sample.",
        f"**The user ids of one data set** are all in memory while it is prepared: {ids} for "
        f"{large.users:,} users with ids of {ID_BYTES} characters, and a table to find them by on "
        "top. Nothing here divides the users yet.",
        f"**Preparing in one process**: {shown_time(unit['prepare'].value * large.events)} for "
        f"{large.events:,} events, and more: an event was measured among {small.users:,} users, "
        "and among more its ids take longer to find.",
        f"**One index**: {shown_bytes(whole)} in float32 and {shown_bytes(whole / 4)} in int8 are "
        f"more than a card holds; bits take {shown_bytes(bits)}. Partitions of Milvus, or several "
        "servers of which each has a part of the items.",
        f"**Item numbers**, 32 bits wide: {2**31 - 1:,} items. Offsets have 64.",
    ]


# -- the page ------------------------------------------------------------------------------------


def page(found: Documents) -> str:
    """Write the text of docs/scaling.md."""
    unit = costs(found)
    blocks = [
        "# Data that no single machine trains on",
        "Written by `python benchmarks/scaling.py`. A figure is measured (with its command, "
        "machine and day), an assumption (with its source), or arithmetic (with its formula). MB, "
        "GB, TB and PB are powers of ten. To "
        "make the page for another machine, run the commands below the first table there, each "
        "with `--json results/performance/PART.json`, then this one.",
        "## Measured",
        table(
            [("what", "unit cost"), ("shown", "measured"), ("part", "part")],
            [{"what": c.what, "shown": c.shown, "part": c.part} for c in unit.values()],
        ),
        "\n".join(f"- {part}: {where(document)}" for part, document in found.items()),
        "## Assumed",
        table(
            [("what", "assumption"), ("source", "from")],
            [{"what": what, "source": source} for what, source in ASSUMPTIONS],
        ),
        "## The log of industrial size on one core",
        "Generated: 1,500,000 users, 611,000 items, 42,000,000 events; all-MiniLM-L6-v2, the "
        "behavioural view of l2rec-plus. Training and users in part; hours of all are the seconds "
        "of one times their number. `free` is AdamW over r_i alone.",
        industrial(found["industrial"]),
        *found["industrial"]["notes"],
    ]
    for plan in PLANS:
        blocks += [f"## {plan.title}", logs(plan, unit)]
        blocks.append(
            table(
                [("what", "what"), ("formula", "formula")]
                + [(shape.name, shape.name) for shape in (SMALL, LARGE)],
                [
                    {"what": line.what, "formula": line.formula}
                    | {shape.name: line.of(plan, shape) for shape in (SMALL, LARGE)}
                    for line in lines(unit)
                ],
            )
        )
        if plan is PLANS[0]:
            blocks += [SYMBOLS, PRODUCTS_ALONE]
    blocks += [
        "## What breaks first",
        "\n".join(f"{n}. {b}" for n, b in enumerate(breaks(unit), 1)),
    ]
    return "\n\n".join(blocks) + "\n"


def where(document: Mapping[str, Any]) -> str:
    """Name the command of a measurement, its machine and its day."""
    machine = document["machine"]
    return (
        f"`{document['command']}`, {machine['date']}, {machine['cpu']}, {machine['threads']} "
        f"thread{'s' * (machine['threads'] > 1)}, torch {machine['torch']}"
    )


def logs(plan: Plan, unit: Mapping[str, Cost]) -> str:
    disk, seconds = unit["disk"].value * plan.events, unit["prepare"].value * plan.events
    return (
        f"The data set takes {shown_bytes(disk)} ({unit['disk'].shown} x E) and "
        f"{shown_time(seconds)} to prepare in one process ({unit['prepare'].shown} x E). "
        f"On one core, with MiniLM, all users would be encoded in "
        f"{shown_time(unit['user'].value * plan.users)}."
    )


def industrial(document: Mapping[str, Any]) -> str:
    columns: Sequence[tuple[str, str]] = [tuple(c) for c in document["columns"]]
    sizes = ("peak_mb", "disk_mb")
    rows = [
        row | {key: 1e3 * gigabytes(row[key]) for key in sizes if key in row}
        for row in document["rows"]
    ]
    return table(columns, rows)


def main(argv: Sequence[str] | None = None) -> None:
    p = argparse.ArgumentParser(
        prog="benchmarks/scaling.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "--out", type=Path, default=PAGE, help="page to write (default: docs/scaling.md)"
    )
    args = p.parse_args(argv)
    args.out.write_text(page(documents()), encoding="utf-8")


if __name__ == "__main__":
    main()
