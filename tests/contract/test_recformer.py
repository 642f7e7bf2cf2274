"""RecFormer: its rows and losses written out, its table, and what it refuses."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from pydantic import ValidationError
from tests.support import models, tiny
from tests.support.models import one_batch, shaken
from tests.support.runs import Quiet
from tests.support.sequential import HISTORIES, N
from torch import Tensor
from torch.nn import functional as F

from l2rec.config import TrainingConfig
from l2rec.data.catalog import Catalog
from l2rec.data.ragged import Ragged
from l2rec.data.splits import leave_one_out
from l2rec.data.synthetic import simple_text
from l2rec.errors import BackboneError, ConfigError, DataError
from l2rec.evaluation.ranking import evaluate
from l2rec.methods.recformer import KEY, MARK, VALUE, RecFormer, RecFormerConfig, Rows, split_rows
from l2rec.modules.backbone import Backbone
from l2rec.runs.checkpoint import load_tensors, load_trained, save_tensors, trained_tensors
from l2rec.runs.loop import train

TITLES = [" ".join(simple_text(1007 * i).split()[: 1 + i % 4]) for i in range(N)]
BRANDS = ["" if i % 3 else simple_text(31 * i + 5).split()[0] for i in range(N)]
CATALOG = Catalog(
    pa.table(
        {
            "item_id": [str(i) for i in range(N)],
            "text": TITLES,
            "wood": TITLES,  # fields are named by words that the tiny tokenizer knows
            "metal": BRANDS,
        }
    )
)
BACKBONE = ("backbone.", "tuned.")  # what a test leaves as it was
FAMILIES = ("bert", "qwen3", "llama")


def build(
    family: str = "bert",
    seed: int = 0,
    *,
    catalog: Catalog = CATALOG,
    backbone: Backbone | None = None,
    **changes: Any,
) -> RecFormer:
    values: dict[str, Any] = {"max_items": 8, "max_tokens": 64, "item_tokens": 6, "rank": 2}
    options = values | {"pretrain_epochs": 1} | changes
    backbone = backbone or tiny.random_backbone(family)
    model: RecFormer = models.build(RecFormer, options, catalog, backbone, seed=seed)
    return model


# ------------------------------------------------------------------------------- rows


def written_out(model: RecFormer, row: list[int]) -> list[tuple[int, int, int]]:
    """List (id, type, item position) of every token of one history, by loops."""
    config, backbone = model.config, model.backbone
    texts = {"text": TITLES, "wood": TITLES, "metal": BRANDS}
    number = tiny.VOCABULARY.index
    share = config.item_tokens // len(config.keys)

    def item(i: int) -> list[tuple[int, int]]:
        tokens = []
        for key in config.keys:
            words = texts[key][i].split()
            if words:
                name = tiny.VOCABULARY.index(key) if key in tiny.VOCABULARY else number("[UNK]")
                pair = [(name, KEY), *((number(word), VALUE) for word in words)]
                tokens += pair[:share]
        return tokens

    start = {"bert": [number("[CLS]")], "llama": [number("<s>")], "qwen3": []}[
        backbone.name.removeprefix("tiny-")
    ]
    room = config.max_tokens - len(start) - backbone.causal
    chosen: list[list[tuple[int, int, int]]] = []
    for age, i in enumerate(reversed(row[-config.max_items :]), 1):
        tokens = [(token, kind, age) for token, kind in item(i)]
        if len(tokens) > room:
            break
        room -= len(tokens)
        chosen.append(tokens)
    if backbone.causal:
        chosen.reverse()
    marks = [(token, MARK, 0) for token in start]
    end = [(0, MARK, 0)] if backbone.causal else []
    return [*marks, *(token for tokens in chosen for token in tokens), *end]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"keys": ("wood", "metal")},
        {"keys": ("metal", "text"), "item_tokens": 8},
        {"max_items": 3},
        {"max_tokens": 14},
        {"max_tokens": 9, "keys": ("wood", "metal")},
    ],
    ids=lambda c: ",".join(map(str, c.values())) or "plain",
)
def test_rows_are_what_the_paper_says(family: str, changes: dict[str, Any]) -> None:
    model = build(family, **changes)
    rows = model._rows(HISTORIES)
    expected = [written_out(model, HISTORIES[i].tolist()) for i in range(len(HISTORIES))]
    flat = [token for row in expected for token in row]
    found = zip(rows.ids.tolist(), rows.types.tolist(), rows.items.tolist(), strict=True)
    assert list(found) == flat
    assert rows.lengths.tolist() == [len(row) for row in expected]
    ends = np.cumsum([len(row) for row in expected])
    causal = model.backbone.causal
    assert rows.read.tolist() == ((ends - 1).tolist() if causal else [0, *ends[:-1].tolist()])
    assert int(rows.lengths.max()) <= model.config.max_tokens


def test_an_item_without_text_takes_no_tokens() -> None:
    for family in FAMILIES:
        model = shaken(build(family, catalog=Catalog.of_texts(["", *TITLES[1:]])), still=BACKBONE)
        rows = model._rows(Ragged.from_rows([[0], [3, 0], [3]]))
        marks = len(model.before) + model.backbone.causal
        assert rows.lengths[0] == marks and rows.lengths[1] == rows.lengths[2] > marks
        assert bool(model.encode_users(Ragged.from_rows([[0], [3, 0]])).isfinite().all())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_is_its_equation(family: str) -> None:
    """Compare with the Hugging Face model, one row at a time, the updates added to its weights."""
    model = shaken(build(family), still=BACKBONE)
    merged = tiny.random_model(family)
    for name, a, b in zip(model.lora.names, model.lora.a, model.lora.b, strict=True):
        merged.get_submodule(name).weight.data += model.lora.scaling * b @ a
    words: Any = merged.get_input_embeddings()
    with torch.no_grad():
        z = model(HISTORIES).z
        for row in range(len(HISTORIES)):
            ids, types, ages = zip(*written_out(model, HISTORIES[row].tolist()), strict=True)
            x = words.weight[list(ids)] + model.types[list(types)] + model.positions[list(ages)]
            if model.backbone.causal:
                x[-1] = model.seq
            states = merged(inputs_embeds=x[None]).last_hidden_state[0]
            expected = F.normalize(states[-1 if model.backbone.causal else 0], dim=-1)
            torch.testing.assert_close(z[row], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(model.encode_users(HISTORIES), z, rtol=0, atol=1e-5)


def test_untrained_it_is_the_bare_backbone_at_its_first_token() -> None:
    model, bare = build(), tiny.random_model("bert")
    ids = [token for token, _, _ in written_out(model, [3, 1])]
    state = bare(torch.tensor([ids])).last_hidden_state[0, 0]
    z = model.encode_users(Ragged.from_rows([[3, 1]]))[0]
    torch.testing.assert_close(z, F.normalize(state, dim=-1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_does_not_fit_does_not_matter(family: str) -> None:
    model = shaken(build(family, max_tokens=20), still=BACKBONE)
    row = [3, 19, 7, 11, 15, 2, 3]  # texts of three and four words
    kept = int(model._rows(Ragged.from_rows([row])).items.max())
    assert 1 < kept < len(row)
    whole, cut, less = model.encode_users(Ragged.from_rows([row, row[-kept:], row[-kept + 1 :]]))
    torch.testing.assert_close(whole, cut)
    assert not torch.allclose(whole, less, atol=1e-3)


# ------------------------------------------------------------------------------- losses


def contrast(users: Tensor, items: Tensor, targets: list[int], tau: float) -> float:
    """Compute the in-batch softmax in float64, other rows with the same target left out."""
    total = 0.0
    for i, target in enumerate(targets):
        scores = {
            j: float(users[i].double() @ items[j].double()) / tau
            for j, other in enumerate(targets)
            if j == i or other != target
        }
        total += math.log(sum(map(math.exp, scores.values()))) - scores[i]
    return total / len(targets)


@pytest.mark.parametrize("family", FAMILIES)
def test_pretraining_is_its_equation(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = shaken(build(family, temperature=0.5), still=BACKBONE)
    batch = one_batch(model, HISTORIES, 0)
    # Every third token is hidden, unless it is a mark.
    monkeypatch.setattr(
        model,
        "_hide",
        lambda rows: (
            rows.ids.masked_fill(hidden := _third(rows), 1),
            hidden,
        ),
    )
    torch.manual_seed(3)
    losses = model.pretraining_loss(batch)
    torch.manual_seed(3)
    histories, targets = split_rows(batch.histories)
    single = Ragged(targets, np.arange(len(targets) + 1))
    with torch.no_grad():
        users, items = model(histories), model(single)
        expected = contrast(users.z, items.z, targets.tolist(), 0.5)
        assert float(losses.parts["contrast"]) == pytest.approx(expected, rel=1e-4)
        words = 0.0
        for reading in (users, items):
            rows, states = reading.rows, reading.states
            if model.backbone.causal:
                starts = (rows.lengths.cumsum(0) - rows.lengths).tolist()
                at = [
                    k
                    for k, kind in enumerate(rows.types.tolist())
                    if kind != MARK and k not in starts
                ]
                states = states[[k - 1 for k in at]]
            else:
                hidden = _third(rows)
                at = hidden.nonzero().flatten().tolist()
                ids = rows.ids.masked_fill(hidden, 1)
                states = model._read(
                    Rows(ids, rows.types, rows.items, rows.lengths, rows.read)
                ).states[at]
            logits = model.head(states, model.backbone.word_embeddings.weight).double()
            words += float(F.cross_entropy(logits, rows.ids[at]))
    assert float(losses.parts["words"]) == pytest.approx(words, rel=1e-4)
    total = expected + model.config.mlm * words
    assert float(losses.total.detach()) == pytest.approx(total, rel=1e-4)
    passes = 1 if model.backbone.causal else 2
    assert losses.tokens == passes * (len(users.rows.ids) + len(items.rows.ids))


def _third(rows: Rows) -> Tensor:
    hidden = rows.types != MARK
    hidden[torch.arange(len(hidden)) % 3 != 0] = False
    return hidden


def test_without_language_losses() -> None:
    model = shaken(build(mlm=0.0), still=BACKBONE)
    losses = model.pretraining_loss(one_batch(model, HISTORIES, 0))
    assert float(losses.parts["words"]) == 0
    assert float(losses.total.detach()) == float(losses.parts["contrast"])
    assert not any(p.requires_grad for p in model.head.parameters())


def test_one_pass_for_both_losses() -> None:
    """Check ``mlm_apart=false``: equal language losses, a contrast over rows with hidden words."""
    apart, once = (shaken(build(mlm_apart=apart), still=BACKBONE) for apart in (True, False))
    batch = one_batch(apart, HISTORIES, 0)
    losses = []
    for model in (apart, once):
        torch.manual_seed(0)
        losses.append(model.pretraining_loss(batch))
    torch.testing.assert_close(losses[0].parts["words"], losses[1].parts["words"])
    assert not torch.equal(losses[0].parts["contrast"], losses[1].parts["contrast"])
    assert losses[0].tokens == 2 * losses[1].tokens


def test_rows_are_split_in_their_second_half() -> None:
    rows = Ragged.from_rows([np.arange(n) for n in (2, 3, 7, 8)] * 200)
    torch.manual_seed(0)
    histories, targets = split_rows(rows)
    positions: dict[int, set[int]] = {}
    for i in range(len(rows)):
        assert histories[i].tolist() == list(range(int(targets[i]))), "what comes before it, alone"
        positions.setdefault(len(rows[i]), set()).add(int(targets[i]))
    assert positions == {2: {1}, 3: {1, 2}, 7: {3, 4, 5, 6}, 8: {3, 4, 5, 6, 7}}


def test_pretraining_has_one_row_for_each_user() -> None:
    long = Ragged.from_rows([np.arange(40) % N, [1, 2], [5]])
    batch = one_batch(build(), long, 0)
    rows = [batch.histories[i].tolist() for i in range(2)]
    assert sorted(batch.users.tolist()) == [0, 1]
    assert sorted(rows, key=len) == [[1, 2], [i % N for i in range(31, 40)]]


def test_whole_words_are_hidden_and_marks_never() -> None:
    backbone = tiny.random_backbone()
    model = build(backbone=backbone, max_tokens=200, mask_share=0.3)
    number = tiny.VOCABULARY.index
    model.continues[number("lamp")] = True  # as if "wood lamp" were one word
    pair, lone = (number("wood"), number("lamp")), number("red")
    n = 4000
    ids = torch.tensor([number("[CLS]"), *pair, lone, *pair] * n)
    types = torch.tensor([MARK, KEY, VALUE, VALUE, VALUE, VALUE] * n)
    items = torch.tensor([0, 1, 1, 1, 2, 2] * n)
    rows = Rows(ids, types, items, torch.tensor([6] * n), torch.arange(n) * 6)
    torch.manual_seed(0)
    seen, hidden = model._hide(rows)
    grid = hidden.view(n, 6)
    assert not grid[:, 0].any()
    assert torch.equal(grid[:, 1], grid[:, 2]) and torch.equal(grid[:, 4], grid[:, 5])
    assert not torch.equal(grid[:, 2], grid[:, 3])
    assert float(grid[:, 1:].float().mean()) == pytest.approx(0.3, abs=0.02)
    assert torch.equal(seen[~hidden], ids[~hidden])
    masked = (seen[hidden] == number("[UNK]")).float().mean()
    kept = (seen[hidden] == ids[hidden]).float().mean()
    assert float(masked) == pytest.approx(0.8, abs=0.02)
    assert float(kept) == pytest.approx(0.1, abs=0.02)


@pytest.mark.parametrize(
    ("vocabulary", "expected"),
    [
        (["[CLS]", "wood", "##en", "lamp"], [False, False, True, False]),
        (["<s>", "\u0120wood", "en", "\u0120lamp"], [True, False, True, False]),
        (["<s>", "\u2581wood", "en", "\u2581lamp"], [True, False, True, False]),
        (["<s>", "wood", "lamp"], [False, False, False]),
    ],
)
def test_where_words_begin(vocabulary: list[str], expected: list[bool]) -> None:
    from l2rec.methods.recformer import _continues_word

    class Pieces:
        def __len__(self) -> int:
            return len(vocabulary)

        def convert_ids_to_tokens(self, ids: range) -> list[str]:
            return [vocabulary[i] for i in ids]

    backbone = tiny.random_backbone()
    backbone.tokenizer = Pieces()
    found = _continues_word(backbone).tolist()
    assert found[: len(expected)] == expected and not any(found[len(expected) :])


@pytest.mark.parametrize("family", FAMILIES)
def test_fine_tuning_is_its_equation(family: str) -> None:
    model = shaken(build(family), still=BACKBONE)
    model._renew_table(0)
    batch = one_batch(model, HISTORIES, 1)
    scores = (model.encode_users(batch.histories) @ model.table.T).double() / 0.05
    expected = F.cross_entropy(scores, torch.from_numpy(batch.targets.astype(np.int64)))
    losses = model.loss(batch)
    assert float(losses.total.detach()) == pytest.approx(float(expected), rel=1e-3)
    assert losses.tokens == len(model._rows(batch.histories).ids)


def test_one_target_for_each_user_and_nothing_after_it() -> None:
    batch = one_batch(build(), HISTORIES, 1)
    assert sorted(batch.users.tolist()) == [0, 2, 3, 4]
    for i, user in enumerate(batch.users):
        row, seen = HISTORIES[int(user)].tolist(), batch.histories[i].tolist()
        before = [row[max(0, t - 8) : t] for t in range(1, len(row)) if row[t] == batch.targets[i]]
        assert seen in before


# ------------------------------------------------------------------------------- the table


def test_users_are_scored_against_the_table_they_were_trained_with() -> None:
    model = build()
    items = np.arange(N)
    live = model.encode_items(items)
    shaken(model, still=BACKBONE)
    assert not torch.allclose(model.encode_items(items), live), (
        "without a table: encoded when asked"
    )
    pretrain, finetune, fixed = model.stages(1e-3, 0.0)
    assert pretrain.begin_epoch is not None and not pretrain.select
    assert finetune.begin_epoch is not None and fixed.begin_epoch is not None
    finetune.begin_epoch(0)
    table = model.encode_items(items).clone()
    with torch.no_grad():
        model.types += 0.5
    assert torch.equal(model.encode_items(items), table)
    torch.testing.assert_close(model.scorer()(HISTORIES), model.encode_users(HISTORIES) @ table.T)
    fixed.begin_epoch(0)
    assert torch.equal(model.encode_items(items), table), "the last stage keeps it"
    finetune.begin_epoch(1)
    assert not torch.allclose(model.encode_items(items), table)
    assert bool(model.kept)
    pretrain.begin_epoch(0)
    assert not bool(model.kept), "of a start that was fine-tuned: pre-training makes it older"


def test_the_last_stage_makes_a_table_where_there_is_none() -> None:
    model = shaken(build(), still=BACKBONE)
    *_, stage = model.stages(1e-3, 0.0)
    assert stage.begin_epoch is not None
    live = model.encode_items(np.arange(N))
    stage.begin_epoch(0)
    assert bool(model.kept) and torch.equal(model.table, live)


def test_the_best_model_comes_with_its_table(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    split = leave_one_out(Ragged.from_rows(list(rng.integers(N, size=(24, 7)))))
    model = build()
    training = TrainingConfig(epochs=3, lr=1e-2, batch_users=8, patience=2)
    train(model, split, training, seed=0, run=tmp_path, progress=Quiet())
    tensors, _ = load_tensors(tmp_path / "model.safetensors")
    other = build(seed=1)
    load_trained(other, tensors, "here")
    assert torch.equal(other.kept, model.kept) and torch.equal(other.table, model.table)
    scores = model.scorer()(split.test.histories)
    assert torch.equal(other.scorer()(split.test.histories), scores)


def test_other_items_start_without_a_table() -> None:
    model = shaken(build(), still=BACKBONE)
    model._renew_table(0)
    left = {n: t for n, t in trained_tensors(model).items() if n not in model.item_tensors}
    other = build(catalog=Catalog.of_texts([*TITLES, "pink kite"]))
    load_trained(other, {**trained_tensors(other), **left}, "here")
    assert not other.kept
    both = [m.encode_items(["pink kite", "old lamp"]) for m in (model, other)]
    torch.testing.assert_close(*both)


@pytest.mark.parametrize("family", FAMILIES)
def test_new_items_stand_beside_the_table(family: str) -> None:
    model = shaken(build(family, keys=("wood", "metal")), still=BACKBONE)
    model._renew_table(0)
    assert model.encode_items(["pink silk kite"]).shape == (1, 32)
    assert model.n_items == N and len(model.table) == N
    (new,) = model.add_items(["pink silk kite"])
    assert len(model.table) == N + 1
    rows = model._rows(Ragged.from_rows([[int(new)]]))
    names = [tiny.VOCABULARY[int(i)] for i, kind in zip(rows.ids, rows.types, strict=True) if kind]
    assert names == ["wood", "pink", "silk"], "the value of the first key, and no second one"


# ------------------------------------------------------------------------------- tuning


@pytest.mark.parametrize("family", FAMILIES)
def test_full_tuning_trains_a_copy(family: str, tmp_path: Path) -> None:
    backbone = tiny.random_backbone(family)
    before = copy.deepcopy(backbone.state_dict())
    model = build(backbone=backbone, tuning="full")
    torch.testing.assert_close(
        model.encode_users(HISTORIES),
        build(family, backbone=backbone, seed=0).encode_users(HISTORIES),
    ) if not backbone.causal else None
    whole = sum(p.numel() for n, p in backbone.named_parameters() if "pooler" not in n)
    words = backbone.word_embeddings.weight.numel()
    assert sum(p.numel() for p in model.tuned) == whole - words
    same = build(family, backbone=backbone)
    if backbone.causal:
        same.seq.data.copy_(model.seq)
    torch.testing.assert_close(model.encode_users(HISTORIES), same.encode_users(HISTORIES))
    for stage in model.stages(1e-2, 0.0):
        own = [p for group in stage.groups for p in group.parameters]
        optimizer = torch.optim.AdamW(own, lr=1e-2)
        if stage.begin_epoch is not None:
            stage.begin_epoch(0)
        stage.loss(one_batch(model, HISTORIES, 0 if not stage.select else 1)).total.backward()
        assert all(p.grad is not None for p in own), stage.name
        optimizer.step()
        model.zero_grad()
    for name, tensor in backbone.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    save_tensors(tmp_path / "model.safetensors", trained_tensors(model))
    other = build(family, seed=1, tuning="full")
    load_trained(other, load_tensors(tmp_path / "model.safetensors")[0], "here")
    assert torch.equal(other.scorer()(HISTORIES), model.scorer()(HISTORIES))


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_inputs_are_dropped_in_training_alone(tuning: str) -> None:
    model = build(tuning=tuning, dropout=0.5, pretrain_epochs=0)
    stage = model.stages(1e-2, 0.0)[-1]
    if tuning == "lora":  # B starts at zero
        for p in model.lora.parameters():
            torch.nn.init.normal_(p, std=0.1)
    batch = one_batch(model, HISTORIES, 1)
    if stage.begin_epoch is not None:
        stage.begin_epoch(0)
    for training in (True, False):
        model.train(training)
        first, second = (float(stage.loss(batch).total.detach()) for _ in range(2))
        assert (first != second) is training


def test_it_says_how_much_of_a_text_it_reads() -> None:
    """Six tokens of an item, of which the key takes its own."""
    model = build()
    key = len(model.backbone.tokenizer("text", add_special_tokens=False)["input_ids"])
    assert model.text_tokens == 6 - min(key, 5)
    assert int(model.tokens.ids.lengths.max()) <= 6


def test_stages_train_what_they_read() -> None:
    model = build()
    named = {id(p): n for n, p in model.named_parameters()}
    stages = model.stages(1e-3, 0.0)
    pretrain, *others = (
        {named[id(p)] for group in stage.groups for p in group.parameters} for stage in stages
    )
    assert {n for n in pretrain if n.startswith("head.")} == pretrain - others[0]
    assert others[0] == others[1] == {n for n in pretrain if not n.startswith("head.")}
    assert not any(n.startswith("backbone.") for n in pretrain)
    only = build(pretrain_epochs=0)
    assert [stage.name for stage in only.stages(1e-3, 0.0)] == [s.name for s in stages[1:]]
    assert not any(p.requires_grad for p in only.head.parameters())
    (alone,) = build(finetune=False).stages(1e-3, 0.0)
    assert alone.name == stages[0].name and alone.epochs == 1


def test_a_handful_of_users_is_learned_by_heart() -> None:
    rng = np.random.default_rng(0)
    rows = Ragged.from_rows(list(rng.permuted(np.tile(np.arange(N), (8, 1)), axis=1)[:, :3]))
    model = build(matrices=("q", "k", "v", "o"), rank=8, dropout=0.0)
    *_, stage = model.stages(1e-2, 0.0)
    assert stage.begin_epoch is not None
    optimizer = torch.optim.AdamW([p for g in stage.groups for p in g.parameters], lr=1e-2)
    model.train()
    for epoch in range(80):
        stage.begin_epoch(epoch)
        for batch in stage.batches(
            rows, seed=0, epoch=epoch, batch_users=99, batch_tokens=10**6
        ).iterate():
            optimizer.zero_grad()
            stage.loss(batch).total.backward()
            optimizer.step()
    ranks = evaluate(model, rows.head(2), rows.values[rows.offsets[1:] - 1]).ranks
    assert float(np.mean(ranks == 1)) > 0.9, ranks


# ------------------------------------------------------------------------------- refusals


def test_what_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_tokens=300: backbone 'tiny-bert' has 256 positions"):
        build(max_tokens=300)
    with pytest.raises(ConfigError, match=r"item_tokens=64 and 1 mark\(s\) exceed max_tokens=64"):
        build(item_tokens=64)
    with pytest.raises(DataError, match=r"the catalog has no field 'colour' .*it has: wood, metal"):
        build(keys=("colour",))
    with pytest.raises(ValidationError, match="two tokens or more for each"):
        RecFormerConfig(keys=("a", "b"), item_tokens=3)
    with pytest.raises(ValidationError, match="at least one key"):
        RecFormerConfig(keys=())
    with pytest.raises(ValidationError, match="leave nothing to train"):
        RecFormerConfig(finetune=False, pretrain_epochs=0)
    with pytest.raises(DataError, match="RecFormer reads item texts and no item"):
        build(catalog=Catalog.of_texts(["", " "]))
    with pytest.raises(DataError, match="a new item needs a text"):
        build().add_items(["red", " "])
    with pytest.raises(DataError, match="an empty history"):
        build().encode_users(Ragged.from_rows([[1], []]))
    nothing_before = tiny.random_backbone()
    nothing_before.tokenizer = tiny.tokenizer("qwen")
    with pytest.raises(BackboneError, match=r"no token such as \[CLS\] before a text"):
        build(backbone=nothing_before)
