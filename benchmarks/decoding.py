"""Constrained beam search over a catalog, against Transformers' own.

    python benchmarks/decoding.py
    python benchmarks/decoding.py --quick     a tenth of the items, few users

TIGER's T5 as its recipe has it, random weights, random codes of three levels of 256 and one that
tells items apart, histories of ten items. The peer is ``generate`` of the same model with
``prefix_allowed_tokens_fn`` over a dictionary of the same trie, as the authors of TIGER's
re-implementations have it, in the same batches. Both must find the same items in the same order,
or nothing is reported.

Seconds are the median over rounds, contenders in turn. Memory is the peak of one search in a fresh
process, above that process with the model and the trie loaded. The last table is the cost of 1,000
lists of ten beside a vector method's: a SASRec of the same data, history in, items out.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from measure import arguments, from_child, interleave, median, peak_mb, ratio, report
from torch import Tensor

from l2rec.data.catalog import Catalog
from l2rec.data.ragged import Ragged
from l2rec.evaluation.ranking import top_k
from l2rec.methods.sasrec import SASRec, SASRecConfig
from l2rec.modules.beam import Seq2SeqDecoder, beam_search
from l2rec.modules.code_generator import PAD, SEARCHED, CodeGenerator, GeneratorConfig
from l2rec.modules.trie import Trie
from l2rec.protocols import inner_product_scorer

ITEMS, USERS, HISTORY, BEAMS, CODES = 4_385, 128, 10, 20, 256
GOAL, MEMORY_GOAL = 5.0, 0.5
OURS, PEER = "l2rec", "transformers generate"


@dataclass(frozen=True)
class Task:
    """A T5 on random codes, the trie of these, and histories."""

    model: CodeGenerator
    codes: Ragged
    trie: Trie
    histories: Ragged

    @classmethod
    def random(cls, n_items: int, users: int) -> Task:
        torch.manual_seed(0)
        rng = np.random.default_rng(0)
        model = CodeGenerator(
            GeneratorConfig(beams=BEAMS), n_items, width=4, codes=CODES, dtype=torch.float32
        ).eval()
        found = rng.integers(CODES, size=(n_items, 3))
        model.codes.copy_(torch.from_numpy(np.column_stack((found, np.arange(n_items) % CODES))))
        with torch.no_grad():  # at their start all tokens are equally likely, and beams tie
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * parameter.std())
        codes = Ragged.from_rows(model.tokens(torch.arange(n_items)).numpy())
        rows = rng.integers(n_items, size=(users, HISTORY), dtype=np.int32)
        return cls(model, codes, Trie.of(codes), Ragged.from_rows(rows))

    def blocks(self) -> list[Ragged]:
        starts = range(0, len(self.histories), SEARCHED)
        return [
            self.histories.take(np.arange(s, min(s + SEARCHED, len(self.histories))))
            for s in starts
        ]


@torch.inference_mode()
def ours(task: Task) -> Tensor:
    """Find the codes of [users, beams]: tokens [users, beams, 4]."""
    found = []
    for rows in task.blocks():
        decoder = Seq2SeqDecoder(task.model.t5, *task.model.read(rows))
        leaves = beam_search(decoder, task.trie, BEAMS, len(rows)).leaves
        items = task.trie.items[task.trie.items_first[leaves]]
        found.append(task.model.tokens(items.flatten()).view(*items.shape, -1))
    return torch.cat(found)


def as_dictionary(codes: Ragged) -> dict[tuple[int, ...], list[int]]:
    """Return the tokens that may follow each prefix."""
    following: dict[tuple[int, ...], set[int]] = {}
    for code in codes:
        row = code.tolist()
        for end in range(len(row)):
            following.setdefault(tuple(row[:end]), set()).add(row[end])
    return {prefix: sorted(tokens) for prefix, tokens in following.items()}


@torch.inference_mode()
def peer(task: Task, following: dict[tuple[int, ...], list[int]]) -> Tensor:
    found = []
    for rows in task.blocks():
        ids, real = task.model.read(rows)
        sequences = task.model.t5.generate(
            input_ids=ids,
            attention_mask=real,
            num_beams=BEAMS,
            num_return_sequences=BEAMS,
            max_new_tokens=4,
            length_penalty=0.0,
            do_sample=False,
            prefix_allowed_tokens_fn=lambda _, said: following[tuple(said.tolist()[1:])],
            pad_token_id=PAD,
        )
        found.append(sequences[:, 1:].view(len(rows), BEAMS, -1))
    return torch.cat(found)


def contenders(task: Task) -> dict[str, Callable[[], object]]:
    return {PEER: partial(peer, task, as_dictionary(task.codes)), OURS: partial(ours, task)}


def lists(task: Task) -> dict[str, Callable[[], object]]:
    """Lists of ten items for all users, by codes and by vectors."""
    catalog = Catalog.of_texts([str(item) for item in range(len(task.codes))])
    vectors = inner_product_scorer(SASRec(SASRecConfig(), catalog).eval())

    def of_ten(scorer: Callable[[Ragged], Tensor]) -> None:
        with torch.inference_mode():
            top_k(scorer, task.histories, 10, exclude=task.histories)

    return {
        "codes, beam search": partial(of_ten, task.model.scorer()),
        "vectors, inner products": partial(of_ten, vectors),
    }


def measure(
    rivals: dict[str, Callable[[], object]],
    users: int,
    rounds: int,
    memory: Callable[[str], float | None],
) -> list[dict[str, Any]]:
    wall, cpu = interleave(list(rivals.values()), rounds, 1)
    return [
        {
            "contender": name,
            "seconds": median(seconds),
            "cpu_seconds": median(busy),
            "rate": users / median(seconds),
            "thousand": 1000 * 1000 * median(seconds) / users,
            "ratio": ratio(wall[0], seconds),
            "memory_mb": memory(name),
        }
        for name, seconds, busy in zip(rivals, wall, cpu, strict=True)
    ]


def main(argv: Sequence[str] | None = None) -> None:
    options = list(sys.argv[1:] if argv is None else argv)
    p = arguments(__file__, __doc__)
    p.add_argument("--users", type=int, default=USERS, help="default %(default)s")
    p.add_argument("--items", type=int, default=ITEMS, help="default %(default)s")
    p.add_argument("--rounds", type=int, default=5, help="timed rounds (default %(default)s)")
    p.add_argument("--memory-of", metavar="NAME", help="only this, as a number of MB")
    args = p.parse_args(options)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.quick:
        args.users, args.items, args.rounds = 8, args.items // 10, 1
    task = Task.random(args.items, args.users)
    both = contenders(task), lists(task)
    if args.memory_of:
        print(peak_mb({**both[0], **both[1]}[args.memory_of]))
        return
    theirs, own = (found() for found in both[0].values())
    if not torch.equal(torch.as_tensor(theirs), torch.as_tensor(own)):
        raise SystemExit("the two searches find different items: nothing to compare")

    def memory(name: str) -> float | None:
        return from_child(__file__, *options, "--memory-of", name)

    searches, answers = (measure(rivals, args.users, args.rounds, memory) for rivals in both)
    own_row, peer_row = searches[1], searches[0]
    summary = [
        {
            "path": f"constrained decoding, {BEAMS} beams",
            "goal": f"at least {GOAL:g} x users a second of generate",
            "measured": f"{own_row['ratio']:.1f} x ({own_row['rate']:,.0f} users/s)",
            "reached": own_row["ratio"] >= GOAL,
        }
    ]
    if own_row["memory_mb"] is not None and peer_row["memory_mb"] is not None:
        share = own_row["memory_mb"] / peer_row["memory_mb"]
        summary.append(
            {
                "path": f"constrained decoding, {BEAMS} beams: memory",
                "goal": f"at most {MEMORY_GOAL:g} x that of generate",
                "measured": f"{share:.2f} x ({own_row['memory_mb']:,.0f} MB)",
                "reached": share <= MEMORY_GOAL,
            }
        )
    report(
        "decoding",
        args.json,
        goal=f"{GOAL:g} times the users a second of Transformers' generate, half its memory",
        columns=[
            ("contender", "contender"),
            ("seconds", "seconds"),
            ("cpu_seconds", "CPU s"),
            ("rate", "users/s"),
            ("ratio", "times the first"),
            ("thousand", "ms for 1,000 users"),
            ("memory_mb", "memory MB"),
        ],
        rows=[*searches, *answers],
        notes=[
            f"{args.users:,} users with {HISTORY} items each, {args.items:,} items, beams "
            f"{BEAMS}, {SEARCHED} users at once. {args.rounds} rounds after 1. The first two rows "
            "find the same items; the last two are lists of ten, what has been seen left out."
        ],
        summary=summary,
    )


if __name__ == "__main__":
    main()
