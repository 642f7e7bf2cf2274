"""UniSRec: the mixture, both losses and both settings written out, its stages and new items."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tests.support import models, runs, sequential, tiny
from tests.support.models import one_batch, shaken
from tests.support.sequential import HISTORIES, TEXTS, N, double
from torch import Tensor

from l2rec.config import resolve
from l2rec.data.batches import Batch
from l2rec.data.catalog import Catalog
from l2rec.data.ragged import Ragged
from l2rec.data.synthetic import chain_dataset
from l2rec.errors import ConfigError, DataError
from l2rec.methods.unisrec import MixtureAdaptor, UniSRec, drop_words, without
from l2rec.modules.frozen_text import FrozenText
from l2rec.runs.checkpoint import load_tensors, trained_tensors
from l2rec.runs.predictor import load
from l2rec.runs.train import train_run

SMALL: dict[str, Any] = {
    "dim": 16,
    "inner": 24,
    "experts": 3,
    "max_items": 8,
    "text_tokens": 12,
    "pretrain_epochs": 0,
}
STILL: dict[str, Any] = {"dropout": 0.0, "attention_dropout": 0.0, "adaptor_dropout": 0.0}
INDUCTIVE = {"transductive": False}


def build(seed: int = 0, texts: list[str] = TEXTS, **changes: Any) -> UniSRec:
    catalog, backbone = Catalog.of_texts(texts), tiny.random_backbone()
    model: UniSRec = models.build(UniSRec, SMALL | changes, catalog, backbone, seed=seed)
    return model


def adapted(adaptor: MixtureAdaptor, x: Tensor, noise: Tensor | None = None) -> Tensor:
    """Compute v of one text [d] float64, by experts; noise: [G] standard normal, in training."""
    logits = [float(x @ column) for column in double(adaptor.gate).T]
    if noise is not None:
        scales = [math.log1p(math.exp(float(x @ column))) for column in double(adaptor.noise).T]
        logits = [g + float(e) * (s + 0.01) for g, e, s in zip(logits, noise, scales, strict=True)]
    total = sum(math.exp(g) for g in logits)
    each = [
        math.exp(g) / total * ((x - shift) @ weight)
        for g, shift, weight in zip(
            logits, double(adaptor.shift), double(adaptor.weight), strict=True
        )
    ]
    return sum(each, torch.zeros(weight_width(adaptor)).double())


def weight_width(adaptor: MixtureAdaptor) -> int:
    return int(adaptor.weight.shape[-1])


def item(model: UniSRec, number: int) -> Tensor:
    """Compute v + e of one item, [h] float64."""
    v = adapted(model.adaptor, double(model.text.vectors[number]))
    return v if model.items is None else v + double(model.items.weight[number])


def cosines(user: Tensor, items: list[Tensor], tau: float) -> Tensor:
    return torch.stack([user @ v / user.norm() / v.norm() / tau for v in items])


def test_the_mixture() -> None:
    torch.manual_seed(0)
    adaptor = shaken(MixtureAdaptor(6, 5, 3, dropout=0.0), scale=0.5)
    x = torch.randn(4, 6)
    for training in (False, True):
        adaptor.train(training)
        torch.manual_seed(7)
        noise = torch.randn(4, 3) if training else [None] * 4
        torch.manual_seed(7)
        expected = [adapted(adaptor, double(row), e) for row, e in zip(x, noise, strict=True)]
        with torch.no_grad():
            found = adaptor(x).double()
        torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=1e-5)
    dropped = MixtureAdaptor(400, 5, 3, dropout=0.5).train()
    with torch.no_grad():
        dropped.weight.fill_(1.0)
        sums = dropped(torch.ones(200, 400))
    assert 190 < float(sums.mean()) / 2 < 210 and float(sums.std()) > 5  # 400 halved, doubled


@pytest.mark.parametrize("changes", [{}, INDUCTIVE], ids=["transductive", "inductive"])
def test_fine_tuning_loss(changes: dict[str, Any]) -> None:
    model = shaken(build(**changes))
    rows, tau = HISTORIES.head(8), model.config.temperature
    items = [item(model, i) for i in range(N)]
    each = []
    for row in range(len(rows)):
        history = rows[row].tolist()
        states = sequential.encoded(model.encoder, [items[i] for i in history], causal=True)
        each += [
            sequential.cross_entropy(cosines(states[t], items, tau), history[t + 1])
            for t in range(len(history) - 1)
        ]
        found = model.scorer()(Ragged.from_rows([history]))[0].double() / tau
        torch.testing.assert_close(found, cosines(states[-1], items, tau), rtol=0, atol=1e-3)
    total = model.loss(one_batch(model, rows)).total.detach()
    assert float(total) == pytest.approx(np.mean(each), rel=1e-4)


@pytest.mark.parametrize("view", ["items", "words"])
def test_pre_training_loss(view: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check both contrasts, with known drops of items or words in the augmented rows."""
    model = shaken(
        build(sequence_weight=0.3, item_drop=0.5, item_drop_batches=float(view == "items"))
    )
    tau = model.config.temperature
    batch = Batch(  # two rows of one user; targets 7 and 3 occur twice
        users=np.array([0, 1, 1, 2]),
        histories=Ragged.from_rows([[3, 1, 7], [2], [6, 5], [9, 3]]),
        targets=np.array([1, 7, 4, 3, 5, 7, 3, 8]),
        negatives=np.zeros((4, 0), dtype=np.int32),
    )
    chosen = torch.tensor([0.9, 0.1, 0.9, 0.1, 0.9, 0.1, 0.9, 0.9])  # below item_drop: 1, 2, 5
    draws = iter([chosen, torch.tensor(0.5)])
    monkeypatch.setattr(torch, "rand", lambda *_: next(draws))
    with torch.no_grad():
        losses = model.pretrain_loss(batch)

    read = [adapted(model.adaptor, double(x)) for x in model.text.vectors]  # never with e
    shorter = [adapted(model.adaptor, double(x)) for x in model._with_words_dropped]
    rows = [[read[i] for i in row] for row in ([3, 1, 7], [2], [6, 5], [9, 3])]
    if view == "items":  # a row that loses all its items keeps the last
        other = [[read[3], read[7]], [read[2]], [read[6]], [read[9], read[3]]]
    else:
        other = [
            [read[3], shorter[1], read[7]],
            [shorter[2]],
            [read[6], shorter[5]],
            [read[9], read[3]],
        ]
    states = [sequential.encoded(model.encoder, row, causal=True) for row in rows]
    users = [state for row in states for state in row]
    targets = batch.targets.tolist()
    items = []
    for p, user in enumerate(users):
        kept = [p, *(q for q in range(len(users)) if targets[q] != targets[p])]
        scores = cosines(user, [read[targets[q]] for q in kept], tau)
        items.append(sequential.cross_entropy(scores, 0))
    assert float(losses.parts["item"]) == pytest.approx(np.mean(items), rel=1e-4)
    views = [sequential.encoded(model.encoder, row, causal=True)[-1] for row in other]
    sequences = []
    for row in range(4):
        kept = [row, *(q for q in range(4) if batch.users[q] != batch.users[row])]
        scores = cosines(states[row][-1], [views[q] for q in kept], tau)
        sequences.append(sequential.cross_entropy(scores, 0))
    assert float(losses.parts["sequence"]) == pytest.approx(np.mean(sequences), rel=1e-4)
    total = np.mean(items) + 0.3 * np.mean(sequences)
    assert float(losses.total) == pytest.approx(total, rel=1e-4)


def test_other_views() -> None:
    rows = Ragged.from_rows([[1, 2, 3], [4], [5, 6]])
    kept = without(rows, np.array([True, False, True, True, True, True]))
    assert [kept[i].tolist() for i in range(3)] == [[2], [4], [6]]
    nothing = without(rows, np.zeros(6, dtype=bool))
    assert np.array_equal(nothing.values, rows.values)
    assert np.array_equal(nothing.offsets, rows.offsets)

    texts = ["one", "", " ".join(f"word{i}" for i in range(2000))]
    shorter = drop_words(texts, 0.15, seed=0)
    assert shorter == drop_words(texts, 0.15, seed=0) != drop_words(texts, 0.15, seed=1)
    assert shorter[:2] == ["one", ""]
    words = iter(texts[2].split())
    assert all(word in words for word in shorter[2].split()), "the order stays"
    assert 0.82 < len(shorter[2].split()) / 2000 < 0.88
    assert drop_words(["only"], 0.999, seed=0) == ["only"], "no text becomes empty"


# ------------------------------------------------------------------------------- stages


def names(model: UniSRec, stage: int) -> set[str]:
    held = {id(p) for g in model.stages(1e-3, 0.0)[stage].groups for p in g.parameters}
    return {name for name, p in model.named_parameters() if id(p) in held}


@pytest.mark.parametrize("transductive", [True, False])
@pytest.mark.parametrize("freeze", [True, False])
def test_what_each_stage_trains(transductive: bool, freeze: bool) -> None:
    model = build(pretrain_epochs=2, transductive=transductive, freeze_encoder=freeze)
    every = {name for name, _ in model.named_parameters()}
    assert not any("backbone" in name or "text" in name for name in every)
    encoder = {n for n in every if n.startswith(("encoder.layers.", "encoder.positions."))}
    assert encoder and names(model, 0) == every - {"items.weight"}
    assert names(model, 1) == (every - encoder if freeze else every)
    assert ("items.weight" in every) == transductive
    pretrain, finetune = model.stages(1e-3, 0.0)
    assert (pretrain.select, pretrain.epochs) == (False, 2)
    assert (finetune.select, finetune.epochs) == (True, None)
    assert len(build(pretrain_epochs=0).stages(1e-3, 0.0)) == 1
    (alone,) = build(pretrain_epochs=2, finetune=False).stages(1e-3, 0.0)
    assert alone.name == "pretrain"


OPTIONS: list[dict[str, Any]] = [
    {},
    INDUCTIVE,
    {"sequence_weight": 0.0},
    {"item_drop_batches": 0.0, "word_drop": 0.5},
    {"experts": 1},
]


@pytest.mark.parametrize("changes", OPTIONS, ids=str)
def test_losses_reach_all_that_is_trained(changes: dict[str, Any]) -> None:
    model = shaken(build(pretrain_epochs=2, **changes)).train()
    for number, stage in enumerate(model.stages(1e-3, 0.0)):
        made = stage.batches(HISTORIES, seed=0, epoch=0, batch_users=99, batch_tokens=10**6)
        losses = stage.loss(made[0])
        assert bool(losses.total.isfinite()) and 0 < losses.tokens <= losses.computed_tokens
        assert not any(part.requires_grad for part in losses.parts.values())
        model.zero_grad()
        losses.total.backward()
        parameters = dict(model.named_parameters())
        gates = {"adaptor.gate", "adaptor.noise"} if changes.get("experts") == 1 else set()
        for name in names(model, number) - gates:
            gradient = parameters[name].grad
            assert gradient is not None and bool(gradient.any()), (stage.name, name)


@pytest.mark.parametrize("changes", [{}, INDUCTIVE], ids=["transductive", "inductive"])
def test_it_learns_by_heart(changes: dict[str, Any]) -> None:
    model = build(dim=32, freeze_encoder=False, **STILL | changes)
    sequential.check_overfits(model, epochs=250, lr=5e-3)


def test_pre_training_alone_ranks_chains() -> None:
    """Check that texts alone are enough to rank, without trained vectors of items."""
    model = build(dim=32, pretrain_epochs=1, finetune=False, **STILL)
    rows = Ragged.from_rows([(np.arange(6) + start) % N for start in range(N)])
    sequential.train(model, rows, epochs=150, lr=5e-3)
    model.eval()
    best = model.scorer()(rows.head(5)).argmax(1)
    assert best.tolist() == rows.values[rows.offsets[1:] - 1].tolist()


def test_what_no_stage_trains_is_no_part_of_an_item() -> None:
    build(pretrain_epochs=1)
    drawn = torch.get_rng_state()
    alone = build(pretrain_epochs=1, finetune=False).eval()
    # Drawn all the same, so that what is drawn later is what it always was.
    assert torch.equal(torch.get_rng_state(), drawn)
    assert alone.config.transductive and "items.weight" not in names(alone, 0)
    torch.testing.assert_close(
        alone.encode_items(np.arange(N)), alone.encode_items(TEXTS), rtol=0, atol=1e-5
    )


# ------------------------------------------------------------------------------- promises


def test_a_position_reads_as_its_prefix() -> None:
    model = shaken(build())
    rows = HISTORIES.head(8)
    with torch.no_grad():
        states, real = model(rows, model.item_states(torch.arange(N)))
    prefixes = [rows[i][: t + 1] for i in range(len(rows)) for t in range(len(rows[i]))]
    expected = model.encode_users(Ragged.from_rows(prefixes))
    found = torch.nn.functional.normalize(states[real], dim=-1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("changes", [{}, INDUCTIVE], ids=["transductive", "inductive"])
def test_new_items_enter_by_their_text(changes: dict[str, Any]) -> None:
    model = shaken(build(**changes))
    known = model.encode_items(np.arange(N))
    read = model.encode_items([TEXTS[4], TEXTS[9]])
    assert model.n_items == N and read.shape == (2, 16)
    expected = adapted(model.adaptor, double(model.text.vectors[4]))
    torch.testing.assert_close(read[0].double(), expected / expected.norm(), rtol=0, atol=1e-4)
    assert torch.allclose(read[0], known[4], atol=1e-4) == (not model.config.transductive)
    assert model.add_items(["soft silk hat"]).tolist() == [N] and model.n_items == N + 1
    assert torch.equal(model.encode_items(np.arange(N + 1))[:N], known)
    scores = model.scorer()(Ragged.from_rows([[1, N], [1]]))
    assert scores.shape == (2, N + 1) and not torch.equal(scores[0], scores[1])


# ------------------------------------------------------------------------------- whole runs


def test_pre_trained_elsewhere(tmp_path: Path) -> None:
    """Train a run that pre-trains alone, and one on other items that starts from it."""
    backbone = runs.save_backbone(tmp_path / "bert")
    source = chain_dataset(tmp_path / "source", 20, 15, 6, seed=0)
    target = chain_dataset(tmp_path / "target", 20, 17, 6, seed=1)

    def config(**model: Any) -> Any:
        values = {
            "method": "l2rec.methods.unisrec:UniSRec",
            "backbone": {"name": str(backbone), "dtype": "float32"},
            "model": SMALL | model,
            "training": runs.TRAINING,
        }
        return resolve(values, where="test")

    quiet = runs.Quiet()
    train_run(
        config(pretrain_epochs=2, finetune=False), source.path, tmp_path / "pre", progress=quiet
    )
    report = train_run(
        config(), target.path, tmp_path / "run", progress=quiet, init=tmp_path / "pre"
    )
    assert "before fine-tuning" in report["scores"]
    start, _ = load_tensors(tmp_path / "run" / "state" / "start.safetensors")
    before, _ = load_tensors(tmp_path / "pre" / "model.safetensors")
    after, _ = load_tensors(tmp_path / "run" / "model.safetensors")
    assert len(start["items.weight"]) == 17 and len(before["items.weight"]) == 15
    for name in before.keys() - {"items.weight"}:
        assert torch.equal(start[name], before[name]), name
    frozen = [n for n in after if n.startswith(("encoder.layers.", "encoder.positions."))]
    assert frozen and all(torch.equal(after[name], before[name]) for name in frozen)
    predictor = load(tmp_path / "run")
    predictor.add_items({"new": "small red lamp"})
    assert len(predictor.recommend(["i1", "new"], k=18, exclude_seen=False).items) == 18


# ------------------------------------------------------------------------------- texts


def test_texts_are_read_once(tmp_path: Path) -> None:
    backbone = tiny.random_backbone()
    made = [FrozenText(backbone, TEXTS, max_tokens=12, cache=path) for path in (tmp_path, None)]
    again = FrozenText(backbone, TEXTS, max_tokens=12, cache=tmp_path)
    assert len(made[0].files) == 1 and made[0].files == again.files and made[1].files == []
    assert torch.equal(made[0].vectors, again.vectors) and torch.equal(*(m.vectors for m in made))
    lengths = made[0].vectors.norm(dim=-1)
    torch.testing.assert_close(lengths, torch.full((N,), backbone.dim**0.5))
    assert not made[0].state_dict() and not list(made[0].parameters())


def test_words_are_dropped_in_pre_training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[list[str]] = []
    original = FrozenText.read_catalog

    def counted(self: FrozenText, texts: list[str]) -> Any:
        read.append(texts)
        return original(self, texts)

    monkeypatch.setattr(FrozenText, "read_catalog", counted)
    model = build(pretrain_epochs=1, item_drop_batches=0.0)
    model.scorer()(HISTORIES)
    one_batch(build(), HISTORIES)
    assert read == [TEXTS, TEXTS]
    stage = model.stages(1e-3, 0.0)[0]
    made = stage.batches(HISTORIES, seed=0, epoch=0, batch_users=2, batch_tokens=10**6)
    for batch in made.iterate():
        stage.loss(batch)
    assert len(made) > 1 and read[2:] == [drop_words(TEXTS, 0.15, 0)]
    assert model._with_words_dropped.shape == model.text.vectors.shape
    assert not [name for name in trained_tensors(model) if "words" in name or "text" in name]


def test_what_is_refused() -> None:
    with pytest.raises(ValidationError, match="heads=3 does not divide dim=16"):
        build(heads=3)
    with pytest.raises(ValidationError, match="finetune=false with pretrain_epochs=0 trains"):
        build(finetune=False)
    with pytest.raises(DataError, match="UniSRec reads item texts and no item"):
        build(texts=[""] * N)
    with pytest.raises(ConfigError, match=r"text_tokens=300: .* choose at most 254"):
        build(text_tokens=300)
    model = build()
    with pytest.raises(DataError, match="a new item needs a text"):
        model.add_items(["a drill", " "])
    with pytest.raises(DataError, match="an empty history: give at least one item"):
        model.encode_users(Ragged.from_rows([[1], []]))
    with pytest.raises(DataError, match="an empty history"):
        model.encode_users(Ragged.from_rows([[]]))
    assert model.encode_users(Ragged.from_rows([])).shape == (0, 16)
    assert model.encode_items(np.zeros(0, dtype=np.int32)).shape == (0, 16)
