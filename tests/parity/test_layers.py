"""Views that enter at layer K, against the layers of Hugging Face called one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.support import tiny
from tests.support.models import build, one_batch, shaken
from torch import Tensor, nn

from l2rec.data.catalog import Catalog
from l2rec.data.ragged import Ragged
from l2rec.errors import BackboneError
from l2rec.methods.l2rec import L2Rec
from l2rec.modules import entry
from l2rec.modules.backbone import Backbone
from l2rec.modules.entry import LayerEntry
from l2rec.modules.packing import Attend, Packing, pack
from l2rec.modules.views import mean_of

TEXTS = ["red round lamp", "old bowl", "blue silk kite of the sea", "drum", "tall green chair"]
ROWS = [[0, 3, 1, 2], [4], [2, 2]]
LAYERS, ITEM_TOKENS = 3, 4


def backbone(family: str = "bert", **changes: Any) -> Backbone:
    return tiny.random_backbone(family, num_hidden_layers=LAYERS, **changes)


def model(
    family: str = "bert", layers: int = LAYERS - 1, cache: Path | None = None, **o: Any
) -> L2Rec:
    options = tiny.small(item_layers=layers, item_tokens=ITEM_TOKENS, **o).model_dump()
    catalog = Catalog.of_texts(TEXTS)
    built: L2Rec = build(L2Rec, options, catalog, backbone(family), cache=cache)
    return built


def ids_of(text: str, tokenizer: Any) -> list[int]:
    """Write a text as the backbone reads it alone, cut to ITEM_TOKENS."""
    marks = len(tokenizer("", add_special_tokens=True)["input_ids"])
    found: list[int] = tokenizer(
        text, add_special_tokens=True, truncation=True, max_length=ITEM_TOKENS + marks
    )["input_ids"]
    return found


def states_of(one: nn.Module, ids: list[int], layer: int) -> Tensor:
    """Return what layer ``layer`` is given when a text is read alone, [n, D]."""
    output = one(input_ids=torch.tensor([ids]), output_hidden_states=True, use_cache=False)
    states: Tensor = output.hidden_states[layer][0]
    return states


def bert_above(one: Any, states: Tensor, layer: int) -> Tensor:
    """Run the layers of BERT from ``layer`` on over one row of states [n, D]."""
    x = states[None]
    for block in one.encoder.layer[layer:]:
        x = block(x)
    return x[0]


@pytest.mark.parametrize("family", sorted(tiny.CONFIGS))
@pytest.mark.parametrize("below", [1, LAYERS - 1])
def test_two_parts_are_the_whole(family: str, below: int) -> None:
    whole = backbone(family)
    cut = whole.cut(below)
    lengths = [5, 1, 7]
    group, positions = pack(torch.tensor(lengths), Attend.CAUSAL if whole.causal else Attend.FULL)
    packing = Packing((group,), positions)
    ids = torch.arange(5, 5 + sum(lengths))
    x = whole.embed(ids)
    lower = whole.lower(cut, x, packing)
    for row, got in zip(ids.split(lengths), lower.split(lengths), strict=True):
        alone = states_of(tiny.random_model(family, num_hidden_layers=LAYERS), row.tolist(), below)
        torch.testing.assert_close(got, alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        whole.upper(cut, lower, packing), whole(x, packing), rtol=1e-5, atol=5e-6
    )
    forwards = {name: module.forward for name, module in whole.model.named_modules()}
    whole.upper(cut, lower, packing)
    assert forwards == {name: module.forward for name, module in whole.model.named_modules()}


@pytest.mark.parametrize("family", ["bert", "qwen3"])
def test_recomputed_blocks_are_given_the_same_states(family: str) -> None:
    """Gradient checkpointing runs the layers above once more, when the cut pass is over."""
    found = []
    for again in (False, True):
        ours = model(family, layers=1)
        if again:
            ours.backbone.recompute()
        losses = (
            shaken(ours, still=("backbone.",)).train().loss(one_batch(ours, Ragged.from_rows(ROWS)))
        )
        losses.total.backward()
        found.append(
            [losses.total.detach(), *(p.grad for p in ours.parameters() if p.requires_grad)]
        )
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_gradients_reach_what_is_given_to_the_upper_part() -> None:
    whole = backbone()
    cut = whole.cut(2)
    group, positions = pack(torch.tensor([4, 3]), Attend.FULL)
    states = torch.randn(7, whole.dim, requires_grad=True)
    whole.upper(cut, states, Packing((group,), positions))[0, 0].backward()
    assert states.grad is not None
    assert bool(states.grad[:4].any(1).all()) and not bool(states.grad[4:].any())


def test_a_row_is_the_states_of_its_items_and_their_places() -> None:
    """The slow way: every text alone, its states behind one another, layer after layer."""
    ours = shaken(model(views=("semantic",), adapt=False), still=("backbone.",))
    one = tiny.random_model("bert", num_hidden_layers=LAYERS)
    tokenizer = ours.backbone.tokenizer
    found = ours.user_states(Ragged.from_rows(ROWS)).semantic
    for row, got in zip(ROWS, found, strict=True):
        parts = []
        for place, item in enumerate(row):
            states = states_of(one, ids_of(TEXTS[item], tokenizer), LAYERS - 1)
            parts.append(states + ours.places[0, place])
        h = bert_above(one, torch.cat(parts), LAYERS - 1).mean(0)
        expected = ours.fusion(None, h[None])[1][0]
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_item_vectors_are_the_mean_of_their_states() -> None:
    ours = model()
    one = tiny.random_model("bert", num_hidden_layers=LAYERS)
    for text, got in zip(TEXTS, ours.entry.pooled(), strict=True):
        ids = ids_of(text, ours.backbone.tokenizer)
        expected = states_of(one, ids, LAYERS - 1).mean(0)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    entered = ours.projector(ours.entry.pooled()).detach()
    torch.testing.assert_close(entered.mean(0), torch.zeros(ours.backbone.dim), rtol=0, atol=1e-5)
    scale = float(entered.square().mean().sqrt())
    assert scale == pytest.approx(ours.entry.scale, rel=1e-4)


@pytest.mark.parametrize("family", ["bert", "qwen3"])
def test_experts_stand_above_alone(family: str) -> None:
    ours = model(family, layers=1)
    numbers = {name.partition("layer")[2].strip("s.").partition(".")[0] for name in ours.linears}
    assert numbers == {"1", "2"}
    ours.loss(one_batch(ours, Ragged.from_rows(ROWS))).total.backward()
    assert ours.places is not None and ours.places.grad is not None
    assert bool(ours.places.grad.any())


@pytest.mark.parametrize("form", ["paper", "catalog"])
def test_one_item_with_nothing_trained_reads_as_the_text_alone(form: str) -> None:
    """At K as at 0, the semantic view of one item is what the backbone makes of its text."""
    vectors = []
    for layers in (0, 1, LAYERS - 1):
        ours = model(layers=layers, views=("semantic",), form=form)
        vectors.append(ours.encode_users(Ragged.from_rows([[i] for i in range(len(TEXTS))])))
    for other in vectors[1:]:
        torch.testing.assert_close(other, vectors[0], rtol=1e-4, atol=1e-5)


def test_states_are_kept_and_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = model(cache=tmp_path)
    (path,) = first.entry.cached
    assert path.name.startswith("states-") and path in first.cached
    monkeypatch.setattr(entry, "read_texts", None)  # nothing is read again
    again = model(cache=tmp_path)
    histories = Ragged.from_rows(ROWS)
    assert torch.equal(again.encode_users(histories), first.encode_users(histories))
    monkeypatch.undo()
    other = model(cache=tmp_path, layers=1)
    assert other.entry.cached != [path]
    without = model()
    assert torch.equal(without.encode_users(histories), first.encode_users(histories))
    assert len(list(tmp_path.glob("states-*"))) == 2


def test_states_of_many_items_and_of_added_ones() -> None:
    bare = backbone()
    tokens = Ragged.from_rows([list(range(5, 5 + n)) for n in (3, 1, 9, 4, 2)])
    whole = LayerEntry(bare, tokens, ITEM_TOKENS, 2, None)
    grown = LayerEntry(bare, tokens.take(np.arange(2)), ITEM_TOKENS, 2, None)
    grown.add(tokens.take(np.arange(2, 3)))
    grown.add(tokens.take(np.arange(3, 5)))
    rows = Ragged.from_rows([[4, 0, 2], [1], [3, 3]])
    for budget in (1000, 9):
        (x, a), (y, b) = (e.read(rows, budget, 8) for e in (whole, grown))
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
        assert torch.equal(a.block, b.block) and torch.equal(a.row, b.row)
    torch.testing.assert_close(grown.pooled(2), whole.pooled()[2:], rtol=1e-5, atol=1e-6)
    x, parts = whole.read(Ragged.from_rows([[i] for i in range(5)]), 99, 8)
    torch.testing.assert_close(whole.pooled(), mean_of(x, parts.block, 5))
    grown.shrink(3)
    assert len(grown) == 3
    torch.testing.assert_close(grown.pooled(), whole.pooled()[:3], rtol=1e-5, atol=1e-6)
    grown.shrink(1)
    assert len(grown) == 1


@pytest.mark.parametrize("shift", [15, 2])
def test_without_a_reader_states_are_a_sample(
    shift: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scale is that of all states, from few of them; a file of all serves too."""
    monkeypatch.setattr(entry, "SAMPLE_SHIFT", shift)
    bare = backbone()
    tokens = Ragged.from_rows([list(range(5, 5 + n)) for n in (3, 1, 9, 4, 2)])
    whole = LayerEntry(bare, tokens, ITEM_TOKENS, 2, tmp_path / "whole")
    for cache in (None, tmp_path / "sample", tmp_path / "sample", tmp_path / "whole"):
        few = LayerEntry(bare, tokens, ITEM_TOKENS, 2, cache, read=False)
        assert few.scale == pytest.approx(whole.scale, rel=1e-6)
        assert few.costs(slice(None)).tolist() == whole.costs(slice(None)).tolist()
        assert (len(few._states) < len(whole._states)) is (shift == 2)
    assert few.cached == whole.cached
    assert [f.name[:7] for f in (tmp_path / "sample").iterdir()] == ["sample-"]


@pytest.mark.parametrize("layers", [3, -3, 9, -9])
def test_too_many_layers_are_refused(layers: int) -> None:
    with pytest.raises(BackboneError, match="has 3 layers; choose 0 to 2, or -1 to -2 for"):
        model(layers=layers)


def test_layers_are_counted_from_the_top_too(tmp_path: Path) -> None:
    histories = Ragged.from_rows(ROWS)
    first, again = (shaken(model(layers=k, cache=tmp_path)).eval() for k in (2, -1))
    assert torch.equal(first.encode_users(histories), again.encode_users(histories))
    assert first.entry.cached == again.entry.cached
    assert len(list(tmp_path.glob("states-*.npy"))) == 1


def test_layers_that_hand_on_more_than_states_are_refused() -> None:
    from transformers import AutoModel, T5Config

    torch.manual_seed(0)
    config = T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4, vocab_size=64)
    t5 = AutoModel.from_config(config).eval()
    with torch.no_grad():
        for name, weight in t5.named_parameters():
            if "relative_attention_bias" in name:
                weight.normal_(std=2.0)
    whole = Backbone(t5, tiny.tokenizer(), name="tiny-t5", source="random", revision=None)
    with pytest.raises(BackboneError, match="cut between layers, which hand on more than states"):
        whole.cut(1)


def test_of_added_items_the_states_read_last_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are computed when a history has them, the same whether kept or not, and are not many."""
    texts = [f"red round lamp {'of the sea ' * (n % 3)}{n}" for n in range(12)]
    one = shaken(model(form="catalog", max_tokens=64)).eval()
    one.freeze()
    assert isinstance(one.entry, LayerEntry)
    computed: list[int] = []
    plain = one.entry._computed

    def watched(tokens: Ragged) -> Tensor:
        computed.append(len(tokens))
        return plain(tokens)

    monkeypatch.setattr(one.entry, "_computed", watched)
    added = one.add_items(texts)
    assert not computed and one.n_items == len(TEXTS) + len(texts)
    one.encode_items(["blue silk kite", "drum"])  # embedded, and not added
    assert sum(computed) == 2 and one.n_items == len(TEXTS) + len(texts)
    computed.clear()
    rows = Ragged.from_rows([[0, int(item), 2, int(item)] for item in added])
    everything = one.encode_users(rows)
    assert sum(computed) == len(texts), "each once"
    one.encode_users(rows)
    assert sum(computed) == len(texts), "and kept"

    room = 5 * (ITEM_TOKENS + 2) * one.backbone.dim
    monkeypatch.setattr(entry, "RECENT_NUMBERS", room)
    for _ in range(2):
        alone = torch.cat([one.encode_users(rows.take(np.array([n]))) for n in range(len(rows))])
        torch.testing.assert_close(alone, everything, rtol=1e-4, atol=1e-5)
        assert sum(states.numel() for states in one.entry._recent.values()) <= room
    assert sum(computed) > len(texts)
    # Those that are cut leave nothing behind.
    one.entry.shrink(len(TEXTS) + 2)
    assert one.n_items == len(TEXTS) + 2 and max(one.entry._recent, default=0) < one.n_items
    some = one.encode_users(rows.take(np.array([0, 1])))
    torch.testing.assert_close(some, everything[:2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("residual", [False, True])
def test_of_added_items_a_kept_table_has_one_row(residual: bool) -> None:
    kept, plain = (
        shaken(model(form="catalog", item_residual=residual, max_tokens=64)).eval()
        for _ in range(2)
    )
    kept.freeze()
    for one in (kept, plain):
        one.add_items(["red kite", "old drum of the sea"])
        one.add_items(["tall lamp"])
    tables = [one.items.table for one in (kept, plain)]  # type: ignore[attr-defined]
    torch.testing.assert_close(kept.items.rows, plain.items.rows)
    assert len(tables[0].text) == len(TEXTS) and len(tables[1].text) == len(TEXTS) + 3
    kept.items.shrink(len(TEXTS) + 1)
    torch.testing.assert_close(kept.items.rows, plain.items.rows[: len(TEXTS) + 1])
    with pytest.raises(RuntimeError, match="1 items were added to a model that no longer learns"):
        kept.train()
        kept.items.rows  # noqa: B018
    kept.items.shrink(len(TEXTS))
    assert len(kept.eval().items.rows) == len(TEXTS)
