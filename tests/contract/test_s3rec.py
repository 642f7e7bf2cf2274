"""S³-Rec: its four tasks written out, its attributes, and its two stages."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from pydantic import ValidationError
from tests.support import models
from tests.support.models import batches_of, shaken
from torch import Tensor, nn

from l2rec.data.batches import Batch
from l2rec.data.catalog import Catalog
from l2rec.data.ragged import Ragged
from l2rec.errors import DataError
from l2rec.evaluation.ranking import evaluate
from l2rec.methods import s3rec
from l2rec.methods.s3rec import S3Rec, S3RecConfig, hide, item_attributes, nearer_loss, segments
from l2rec.methods.sasrec import SASRec, SASRecConfig

N = 24
WORDS = ("red", "blue", "tall", "short", "round", "old")
TEXTS = [f"thing {WORDS[i % 3]} {WORDS[3 + i % 2]}" + " tiny" * (i == 5) for i in range(N)]
CATALOG = Catalog.of_texts(TEXTS)
ROWS = Ragged.from_rows([[3, 1, 4, 1, 5, 9], [2, 12], [6, 5, 13, 15, 8, 0, 7, 19], [8, 4, 11]])
SMALL = {"dim": 8, "heads": 2, "inner": 12, "max_items": 8}


def build(seed: int = 0, **changes: Any) -> S3Rec:
    options = SMALL | {"max_share": 0.5} | changes
    model: S3Rec = models.build(S3Rec, options, CATALOG, seed=seed)
    return model


def epoch_of(model: S3Rec, stage: int, sequences: Ragged = ROWS, epoch: int = 0) -> list[Batch]:
    return batches_of(model.stages(1e-3, 0.0)[stage], sequences, epoch=epoch)


def fit(model: S3Rec, stage: int, sequences: Ragged, epochs: int) -> list[dict[str, Tensor]]:
    """Train one stage; return the parts of the loss at every step."""
    chosen = model.stages(1e-2, 0.0)[stage]
    optimizer = torch.optim.AdamW([p for g in chosen.groups for p in g.parameters], lr=1e-2)
    parts = []
    model.train()
    for epoch in range(epochs):
        for batch in epoch_of(model, stage, sequences, epoch):
            losses = chosen.loss(batch)
            optimizer.zero_grad()
            losses.total.backward()
            optimizer.step()
            parts.append(losses.parts)
    model.eval()
    return parts


# ------------------------------------------------------------------------------- attributes


def test_words_that_are_neither_rare_nor_everywhere() -> None:
    names, held = item_attributes(S3RecConfig(max_share=0.5), CATALOG)
    # Most frequent first, then by name. "thing" is everywhere, "tiny" in one item.
    assert names == [
        "round",
        "short",
        "blue",
        "red",
        "tall",
    ]
    for item, text in enumerate(TEXTS):
        assert [n for n, has in zip(names, held[item], strict=True) if has] == [
            n for n in names if n in text.split()
        ]
    assert item_attributes(S3RecConfig(max_share=1.0), CATALOG)[0][0] == "thing"
    assert "tiny" in item_attributes(S3RecConfig(max_share=1.0, min_items=1), CATALOG)[0]
    assert item_attributes(S3RecConfig(max_share=0.5, max_attributes=2), CATALOG)[0] == names[:2]
    short = Catalog.of_texts(["A USB-C hub, 4K", "usb café hub 4K"])
    assert item_attributes(S3RecConfig(max_share=1.0), short)[0] == ["hub", "usb"]


def test_fields_are_split_into_values() -> None:
    table = pa.table(
        {
            "item_id": list("abc"),
            "text": ["", "", ""],
            "genre": ["drama, comedy", "comedy|drama ,", None],
            "place": ["drama", "drama", "sea side"],
        }
    )
    options: dict[str, Any] = {"attributes": "fields", "attribute_fields": ("genre", "place")}
    names, held = item_attributes(S3RecConfig(**options), Catalog(table))
    assert names == ["genre: comedy", "genre: drama", "place: drama"]
    assert held.tolist() == [[True] * 3, [True] * 3, [False] * 3]
    names, _ = item_attributes(S3RecConfig(**options, min_items=1, separators=" "), Catalog(table))
    assert {"place: sea", "place: side", "genre: drama,"} <= set(names)


def test_what_cannot_be_an_attribute() -> None:
    with pytest.raises(DataError, match="reads item texts and no item of this data set has one"):
        item_attributes(S3RecConfig(), Catalog.of_texts(["", " "]))
    with pytest.raises(DataError, match="has no field 'brand'"):
        item_attributes(
            S3RecConfig(attributes="fields", attribute_fields=("brand",)), Catalog.of_texts(["a"])
        )
    with pytest.raises(DataError, match="none of the 7 words is in 20 to 12 of the 24 items"):
        item_attributes(S3RecConfig(min_items=20, max_share=0.5), CATALOG)
    for wrong in ({"attributes": "fields"}, {"attribute_fields": ("brand",)}):
        with pytest.raises(ValidationError, match="name fields for attributes=fields, and none"):
            S3RecConfig(**wrong)
    with pytest.raises(ValidationError, match="heads=3 does not divide dim=64"):
        S3RecConfig(heads=3)


# ------------------------------------------------------------------------------- stage 1


def test_hidden_items() -> None:
    torch.manual_seed(0)
    real = torch.arange(40)[None] < torch.randint(1, 41, (500, 1))
    hidden = hide(real, 0.2)
    assert not (hidden & ~real).any() and hidden.any(1).all()
    long = real.sum(1) > 20
    assert float(hidden[long].sum() / real[long].sum()) == pytest.approx(0.2, abs=0.02)
    assert hide(real, 1e-9).sum(1).eq(1).all()
    ends = hide(torch.ones(3000, 3, dtype=torch.bool), 1e-9).float().mean(0)
    torch.testing.assert_close(ends, torch.full((3,), 1 / 3), atol=0.05, rtol=0)


def test_segments_are_of_half_a_row_at_most_and_others_are_of_others() -> None:
    torch.manual_seed(0)
    lengths = torch.tensor([1, 2, 3, 7, 8])
    real = torch.arange(8) < lengths[:, None]
    items = torch.zeros(5, 8, dtype=torch.long)
    items[real] = torch.arange(int(lengths.sum()))
    starts: set[tuple[int, int]] = set()
    for _ in range(300):
        run, others, fits = segments(items, real)
        assert fits.tolist() == [False, True, True, True, True]
        for row in range(1, 5):
            inside = run[row].nonzero().flatten()
            assert 1 <= len(inside) <= int(lengths[row]) // 2
            assert inside.tolist() == list(range(int(inside[0]), int(inside[-1]) + 1))
            assert int(inside[-1]) < lengths[row]
            found = others[row, inside]
            assert not torch.isin(found, items[row][real[row]]).any()
            assert bool(((found[1:] - found[:-1]) % int(lengths.sum()) == 1).all())
            starts.add((row, int(inside[0])))
    assert {start for row, start in starts if row == 4} == set(range(8))
    alone = segments(items[4:], real[4:])
    assert not alone[2].any(), "a batch of one row has no others"


def test_pairwise_loss_has_sigmoids_inside() -> None:
    x, y, z = torch.randn(3, 5, 4, dtype=torch.float64).unbind()
    sigmoid = lambda t: 1 / (1 + math.exp(-float(t)))  # noqa: E731
    for row, loss in enumerate(nearer_loss(x, y, z)):
        inner = sigmoid(x[row] @ y[row]) - sigmoid(x[row] @ z[row])
        assert float(loss) == pytest.approx(-math.log(sigmoid(inner)))
    least = nearer_loss(x, 100 * x, -100 * x)
    torch.testing.assert_close(least, torch.full_like(least, math.log(1 + 1 / math.e)))


@torch.no_grad()
def written_out(model: S3Rec, batch: Batch) -> dict[str, float]:
    """Compute the four tasks in float64, a row and position at a time, with the draws of seed 5."""
    torch.manual_seed(5)
    rows = [batch.histories[r].tolist() for r in range(len(batch.histories))]
    longest = max(map(len, rows))
    items = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    real = torch.arange(longest) < torch.tensor([[len(row)] for row in rows])
    hidden = hide(real, model.config.hidden_share)
    run, others, fits = segments(items, real)
    drawn = torch.randint(N, (int(hidden.sum()),)).tolist()
    encoder, table = model.encoder, model.items.weight

    def states(vectors: list[Tensor]) -> Tensor:
        x = torch.stack(vectors)[None]
        return encoder(x, torch.ones(1, len(vectors), dtype=torch.bool), causal=False)[0]

    def through(task: str, h: Tensor) -> Tensor:
        layer: Any = model.tasks[task]
        return layer.weight @ h + layer.bias

    def attributes(h: Tensor, item: int) -> float:
        total = 0.0
        for a, vector in enumerate(model.attributes.weight):
            p = 1 / (1 + math.exp(-float(vector @ h)))
            total -= math.log(p if bool(model.has_attribute[item, a]) else 1 - p)
        return total

    def nearer(x: Tensor, y: Tensor, z: Tensor) -> float:
        return float(nearer_loss(x[None], y[None], z[None]))

    sums = dict.fromkeys(("aap", "mip", "map", "sp"), 0.0)
    mask = model.hidden.weight[0]
    for r, row in enumerate(rows):
        h = states([mask if hidden[r, t] else table[i] for t, i in enumerate(row)])
        for t, item in enumerate(row):
            if not hidden[r, t]:
                sums["aap"] += attributes(through("aap", h[t]), item)
                continue
            sums["map"] += attributes(through("map", h[t]), item)
            other = drawn.pop(0)
            if other not in row:
                sums["mip"] += nearer(through("mip", h[t]), table[item], table[other])
        if fits[r]:
            swapped = [int(i) for i in others[r]]
            context, truth, false = (
                states([a if run[r, t] else b for t, (a, b) in enumerate(pairs)])[-1]
                for pairs in (
                    [(mask, table[i]) for i in row],
                    [(table[i], mask) for i in row],
                    [(table[i], mask) for i in swapped[: len(row)]],
                )
            )
            sums["sp"] += nearer(through("sp", context), truth, false)
    return {task: value / len(rows) for task, value in sums.items()}


def test_pretraining_is_its_equations() -> None:
    model = shaken(build(aap=0.2, mip=0.7, map=0.9, sp=0.5), 0.3).double()
    rows = Ragged.from_rows([[int(i) for i in np.arange(r, 3 * r + 2) % N] for r in range(9)])
    (batch,) = epoch_of(model, 0, rows.head(8))
    expected = written_out(model, batch)
    torch.manual_seed(5)
    losses = model.pretrain_loss(batch)
    assert {k: float(v) for k, v in losses.parts.items()} == pytest.approx(expected, rel=1e-9)
    weighted = sum(getattr(model.config, task) * value for task, value in expected.items())
    assert float(losses.total.detach()) == pytest.approx(weighted, rel=1e-9)
    assert all(value > 0 for value in expected.values())


def test_negatives_are_not_in_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    model = shaken(build(), 0.3)
    (batch,) = epoch_of(model, 0)
    with monkeypatch.context() as patch:
        patch.setattr(s3rec, "hide", lambda real, share: real)
        patch.setattr(torch, "randint", lambda *_, **__: torch.from_numpy(batch.histories.values))
        assert float(model.pretrain_loss(batch).parts["mip"]) == 0
    assert float(model.pretrain_loss(batch).parts["mip"]) > 0


def test_pretraining_reads_both_ways_and_whole_training_rows() -> None:
    model = shaken(build(), 0.3)
    (batch,) = epoch_of(model, 0)
    assert sorted(map(tuple, (batch.histories[r] for r in range(4)))) == sorted(
        map(tuple, (ROWS[r] for r in range(4)))
    )
    x = model.items(torch.tensor([[3, 1, 4]]))
    real = torch.ones(1, 3, dtype=torch.bool)
    changed = x.clone()
    changed[0, 2] += 1
    for causal in (True, False):
        first, second = (model.encoder(v, real, causal=causal)[0, 0] for v in (x, changed))
        assert torch.equal(first, second) == causal


def test_the_tasks_are_learned() -> None:
    rows = Ragged.from_rows([(np.arange(6) * (1 + r % 3) + r) % N for r in range(48)])
    model = build(dim=32, dropout=0.0, attention_dropout=0.0)
    parts = fit(model, 0, rows, 80)
    first, last = parts[0], {k: np.mean([float(p[k]) for p in parts[-10:]]) for k in parts[0]}
    assert last["aap"] < 0.05 * float(first["aap"])
    assert last["map"] < 0.5 * float(first["map"])
    assert last["mip"] < 0.8 * float(first["mip"]) and last["sp"] < 0.65 < float(first["sp"])


# ------------------------------------------------------------------------------- both stages


def test_stages() -> None:
    model = build()
    pretrain, finetune = model.stages(1e-3, 0.1)
    assert (pretrain.name, pretrain.select, pretrain.epochs) == ("pretrain", False, 100)
    assert (finetune.name, finetune.select, finetune.epochs) == ("finetune", True, None)
    names = {id(p): name for name, p in model.named_parameters()}
    trained = [
        {names[id(p)] for group in stage.groups for p in group.parameters}
        for stage in (pretrain, finetune)
    ]
    assert trained[0] == set(names.values())
    assert trained[1] == {n for n in names.values() if n.startswith(("items.", "encoder."))}
    (only,) = build(pretrain_epochs=0).stages(1e-3, 0.1)
    assert only.name == "finetune"
    assert model.item_tensors <= set(model.state_dict())


def test_fine_tuning_is_sasrec_from_the_same_weights() -> None:
    model = shaken(build(), 0.3)
    theirs = SASRec(SASRecConfig(**SMALL), CATALOG).eval()
    theirs.load_state_dict(
        {n: t for n, t in model.state_dict().items() if n.startswith(("items.", "encoder."))}
    )
    (batch,) = epoch_of(model, 1)
    torch.testing.assert_close(model.next_item_loss(batch).total, theirs.loss(batch).total)
    torch.testing.assert_close(model.encode_users(ROWS), theirs.encode_users(ROWS))
    inputs = [batch.histories[r].tolist() for r in range(4)]
    assert all([*row] in [ROWS[r][:-1].tolist() for r in range(4)] for row in inputs)


@pytest.mark.parametrize("changes", [{"sp": 0.0}, {"aap": 0.0, "map": 0.0}, {"hidden_share": 1.0}])
def test_tasks_can_be_left_out(changes: dict[str, float]) -> None:
    model = build(**changes).train()
    (batch,) = epoch_of(model, 0)
    losses = model.pretrain_loss(batch)
    losses.total.backward()
    assert ("sp" in losses.parts) == (model.config.sp > 0)
    assert losses.tokens == int(ROWS.lengths.sum()) * (4 if model.config.sp else 1)
    untouched = nn.Parameter(torch.zeros(1)) if model.config.aap else model.attributes.weight
    assert untouched.grad is None or not untouched.grad.any()


def test_random_rows_are_learned_by_heart() -> None:
    rng = np.random.default_rng(0)
    rows = Ragged.from_rows([rng.integers(N, size=6) for _ in range(24)])
    model = build(dim=32, inner=64, dropout=0.0, attention_dropout=0.0)
    fit(model, 0, rows, 5)
    fit(model, 1, rows, 60)
    ranks = evaluate(model, rows.head(5), rows.values[rows.offsets[1:] - 1]).ranks
    assert float(np.mean(ranks == 1)) > 0.95


def test_texts_are_no_items() -> None:
    with pytest.raises(DataError, match="S3Rec has a vector for each item it was trained on"):
        build().encode_items(["a drill"])
