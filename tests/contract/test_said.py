"""SAID: both stages written out, what each of them reads and trains, and what is refused."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tests.support import models, tiny
from torch import Tensor

from l2rec.data.batches import Batch
from l2rec.data.catalog import Catalog
from l2rec.data.ragged import Ragged
from l2rec.data.synthetic import simple_text
from l2rec.errors import ConfigError, DataError
from l2rec.methods.said import SAID, SAIDConfig, standardised
from l2rec.methods.sasrec import SASRec, SASRecConfig
from l2rec.modules.backbone import Backbone

N = 12
TEXTS = [" ".join(simple_text(1007 * i).split()[: 1 + i % 4]) for i in range(N)]
HISTORIES = Ragged.from_rows([[3, 1, 4, 1, 5, 9], [2], [6, 5, 3, 5, 8, 9, 7], [8, 4], [6, 2, 6]])
FAMILIES = ("bert", "qwen3", "llama")
SMALL: dict[str, Any] = {
    "item_dim": 8,
    "item_tokens": 6,
    "prompt": "old box",
    "dim": 16,
    "inner": 24,
    "max_items": 6,
    "dropout": 0.0,
    "attention_dropout": 0.0,
}


def build(
    family: str = "bert",
    seed: int = 0,
    *,
    texts: list[str] = TEXTS,
    backbone: Backbone | None = None,
    **changes: Any,
) -> SAID:
    backbone = backbone or tiny.random_backbone(family)
    model: SAID = models.build(SAID, SMALL | changes, Catalog.of_texts(texts), backbone, seed=seed)
    return model


def items_batch(model: SAID, **options: int) -> Batch:
    sizes = {"seed": 0, "epoch": 0, "batch_users": 1, "batch_tokens": 10**6} | options
    made = model.item_batches(Ragged.from_rows([]), **sizes)
    assert len(made) == 1
    return next(iter(made.iterate()))


def train_stage(
    model: SAID, number: int, epochs: int, sequences: Ragged = HISTORIES
) -> list[float]:
    """Train one stage as the loop does; return its losses."""
    stage = model.stages(1e-2, 0.0)[number]
    own = [p for group in stage.groups for p in group.parameters]
    before = {p: p.requires_grad for p in model.parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(any(parameter is p for p in own))
    optimizer = torch.optim.AdamW([{"params": g.parameters, "lr": g.lr} for g in stage.groups])
    losses = []
    model.train()
    for epoch in range(epochs):
        if stage.begin_epoch is not None:
            stage.begin_epoch(epoch)
        made = stage.batches(sequences, seed=0, epoch=epoch, batch_users=4, batch_tokens=10**4)
        for batch in made.iterate():
            optimizer.zero_grad()
            total = stage.loss(batch).total
            total.backward()
            optimizer.step()
            losses.append(float(total.detach()))
    for parameter, needed in before.items():
        parameter.requires_grad_(needed)
    model.eval()
    return losses


# ------------------------------------------------------------------------------- stage 1


def words_of(item: int) -> list[int]:
    return [tiny.VOCABULARY.index(word) for word in TEXTS[item].split()]


def text_losses(model: SAID, hugging_face: Any, item: int, prompt: Tensor) -> list[float]:
    """Compute - log P of each word of an item's text by the Hugging Face model on this row."""
    matrix = hugging_face.get_input_embeddings().weight
    number = tiny.VOCABULARY.index
    style = tiny.STYLES[model.backbone.name.removeprefix("tiny-")]
    start = {"bert": ["[CLS]"], "llama": ["<s>"], "qwen": []}[style]
    text = words_of(item)
    causal = style != "bert"
    shown = text if causal else [number("[UNK]")] * len(text)
    row = [
        *(matrix[number(token)] for token in start),
        prompt,
        *(matrix[number(word)] for word in model.config.prompt.split()),
        *(matrix[token] for token in shown),
        *([] if causal else [matrix[number("[SEP]")]]),
    ]
    states = hugging_face(inputs_embeds=torch.stack(row)[None]).last_hidden_state[0]
    first = len(start) + 1 + len(model.config.prompt.split())
    found = []
    for t, token in enumerate(text):
        state = states[first + t - causal].double()
        head = model.head
        if head.trained:
            state = head.transform.weight.double() @ state + head.transform.bias.double()
        scores = matrix.double() @ state + (head.bias.double() if head.trained else 0)
        if model.words is not None:
            scores = scores[model.words]
            token = model.words.tolist().index(token)
        found.append(math.log(float(scores.exp().sum())) - float(scores[token]))
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("vocabulary", ["full", "catalog"])
@pytest.mark.parametrize("tied", [False, True])
def test_stage_one_is_its_equation(family: str, vocabulary: str, tied: bool) -> None:
    backbone = tiny.random_backbone(family, tie_word_embeddings=tied)
    model = build(backbone=backbone, vocabulary=vocabulary).eval()
    bare = copy.deepcopy(tiny.random_model(family, tie_word_embeddings=tied))
    assert model.head.trained is not (tied and family != "bert")
    batch = items_batch(model)
    with torch.no_grad():
        if model.head.trained:
            model.head.transform.weight += 0.1 * torch.randn(32, 32)
        losses = model.text_loss(batch)
        each = [
            loss
            for item in batch.users
            for loss in text_losses(model, bare, int(item), model.soft_prompts()[int(item)])
        ]
    assert float(losses.total) == pytest.approx(float(np.mean(each)), rel=1e-4)
    assert len(each) == sum(len(text.split()) for text in TEXTS)


def test_soft_prompts_are_as_long_as_words() -> None:
    model = build()
    words = model.backbone.word_embeddings.weight.norm(dim=-1).mean()
    lengths = model.soft_prompts().norm(dim=-1)
    torch.testing.assert_close(lengths, words.expand(N))
    some = torch.tensor([4, 1])
    torch.testing.assert_close(model.soft_prompts(some), model.soft_prompts()[some])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_word_is_told_before_it_is_seen(family: str) -> None:
    """Check that infilling shows no word, and that a next word is predicted from earlier ones."""
    texts = ["red lamp chair", "red cup chair"]
    a, b = (build(family, texts=[text, *TEXTS]).eval() for text in texts)
    row = Ragged.from_rows([[0]])
    with torch.no_grad():
        (x, _, told, _), (y, _, _, _) = a._read(row), b._read(row)
    assert int(told.sum()) == 3
    if family == "bert":
        assert torch.equal(x, y)
    else:
        second = int(told.nonzero()[1])
        assert torch.equal(x[:second], y[:second]) and not torch.equal(x[second], y[second])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_learned_vector_tells_its_own_text(family: str) -> None:
    backbone = tiny.random_backbone(family, tie_word_embeddings=family != "bert")
    model = build(backbone=backbone, table_lr=3e-2)
    frozen = copy.deepcopy(backbone.state_dict())
    losses = train_stage(model, 0, 80)
    assert losses[-1] < losses[0] - 1
    bare = tiny.random_model(family, tie_word_embeddings=family != "bert")
    with torch.no_grad():
        prompts = model.soft_prompts()
        told = [[np.sum(text_losses(model, bare, i, p)) for p in prompts] for i in range(N)]
    own = [int(np.argmin(row)) for row in told]
    same = [TEXTS[i] == TEXTS[own[i]] for i in range(N)]
    assert np.mean(same) > 0.7, own
    for name, tensor in backbone.state_dict().items():
        assert torch.equal(tensor, frozen[name]), name


def test_every_item_with_a_text_comes_once_an_epoch() -> None:
    model = build(texts=["", *TEXTS[1:-1], ""], embed_batch=4)
    made = model.item_batches(HISTORIES, seed=0, epoch=0, batch_users=1, batch_tokens=10**6)
    batches = list(made.iterate())
    assert len(made) == len(batches) == 3
    seen = np.concatenate([batch.users for batch in batches])
    assert sorted(seen.tolist()) == list(range(1, N - 1))
    for batch in batches:
        assert batch.histories.values.tolist() == batch.users.tolist()
        assert bool(model.text_loss(batch).total.isfinite())


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_belongs_to_stage_one(family: str) -> None:
    model = build(family, lora_rank=2)
    assert model.lora is not None
    first, second = (
        {id(p) for group in stage.groups for p in group.parameters}
        for stage in model.stages(1e-3, 0.0)
    )
    own = {id(p) for p in model.lora.parameters()}
    assert own <= first and not own & second
    batch = items_batch(model)
    plain = model.text_loss(batch).total
    with torch.no_grad():
        for b in model.lora.b:
            b.normal_()
    assert not torch.allclose(model.text_loss(batch).total, plain)
    assert build(family).lora is None


# ------------------------------------------------------------------------------- stage 2


def test_stage_two_is_sasrec_on_the_vectors() -> None:
    model = build().eval()
    shape = {name: SMALL[name] for name in ("dim", "inner", "max_items")}
    sasrec = SASRec(
        SASRecConfig(**shape, dropout=0.0, attention_dropout=0.0), Catalog.of_texts(TEXTS)
    ).eval()
    sasrec.encoder.load_state_dict(model.encoder.state_dict())
    with torch.no_grad():
        sasrec.items.weight.copy_(model.vectors @ model.adaptor.weight.T + model.adaptor.bias)
    torch.testing.assert_close(model.scorer()(HISTORIES), sasrec.scorer()(HISTORIES))
    made = model.batches(HISTORIES, seed=0, epoch=0, batch_users=9, batch_tokens=10**4)
    (batch,) = made.iterate()
    torch.testing.assert_close(model.loss(batch).total, sasrec.loss(batch).total)


def test_stage_two_takes_what_stage_one_made() -> None:
    model = build()
    random = model.vectors.clone()
    train_stage(model, 0, 5)
    assert torch.equal(model.vectors, random)
    take = model.stages(1e-3, 0.0)[1].begin_epoch
    assert take is not None
    take(1)
    assert torch.equal(model.vectors, random), "only its first epoch takes them"
    take(0)
    expected = standardised(model.soft_prompts().detach(), whiten=True)
    assert torch.equal(model.vectors, expected)


@pytest.mark.parametrize("n", [6, 200])
def test_vectors_are_standardised(n: int) -> None:
    torch.manual_seed(0)
    e = 3 + torch.randn(n, 8) @ torch.randn(8, 8)
    plain, white = (standardised(e, whiten=whiten).double() for whiten in (False, True))
    for vectors in (plain, white):
        torch.testing.assert_close(vectors.mean(0), torch.zeros(8).double(), rtol=0, atol=1e-5)
        assert float(vectors.square().mean()) == pytest.approx(1, rel=1e-5)
    centred = (e - e.mean(0)).double()
    torch.testing.assert_close(plain * centred[0, 0] / plain[0, 0], centred, rtol=0, atol=1e-4)
    variances = torch.linalg.eigvalsh(white.T @ white / n)
    rank = min(n - 1, 8)  # fewer items than dimensions differ in fewer directions
    expected = torch.cat((torch.zeros(8 - rank), torch.full((rank,), 8 / rank))).double()
    torch.testing.assert_close(variances, expected, rtol=0, atol=1e-4)
    same = standardised(torch.ones(4, 8), whiten=True)
    assert not same.any(), "items that are all alike"


@pytest.mark.parametrize("freeze", [True, False])
def test_freeze(freeze: bool) -> None:
    model = build(freeze=freeze)
    before = {name: p.clone() for name, p in model.named_parameters()}
    losses = train_stage(model, 1, 30)
    assert losses[-1] < losses[0]
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert ("vectors" in moved) is not freeze
    assert not {n for n in moved if n.startswith(("backbone.", "table.", "projector.", "head."))}


def test_users_are_learned_by_heart() -> None:
    rows = Ragged.from_rows(
        list(np.random.default_rng(0).permuted(np.tile(np.arange(N), (12, 1)), axis=1)[:, :5])
    )
    model = build()
    train_stage(model, 1, 90, rows)
    best = model.scorer()(rows.head(4)).argmax(1)
    last = torch.from_numpy(rows.values[rows.offsets[1:] - 1].astype(np.int64))
    assert float((best == last).float().mean()) > 0.9


# ------------------------------------------------------------------------------- refusals


def test_what_is_refused() -> None:
    with pytest.raises(ConfigError, match="item_tokens=252 and 5 tokens around them: backbone"):
        build(item_tokens=252)
    build(item_tokens=251)
    with pytest.raises(DataError, match="SAID has a vector for each item it was trained on"):
        build().encode_items(["a drill"])
    with pytest.raises(DataError, match="SAID reads item texts and no item"):
        build(texts=["", " "])
    with pytest.raises(ValidationError, match="heads=3 does not divide dim=64"):
        SAIDConfig(heads=3)
    with pytest.raises(DataError, match="an empty history"):
        build().encode_users(Ragged.from_rows([[1], []]))
