"""What is IDGenRec's own; what every method promises is in test_methods.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tests.support import models, tiny
from tests.support.runs import Quiet
from torch import Tensor

from l2rec.config import TrainingConfig
from l2rec.data.catalog import Catalog
from l2rec.data.ragged import Ragged
from l2rec.data.splits import leave_one_out
from l2rec.data.synthetic import simple_text
from l2rec.errors import ConfigError
from l2rec.methods.idgenrec import IDGenRec, TagGenerator
from l2rec.modules.textual_ids import FIRST_WORD
from l2rec.runs.loop import train

N = 14
TEXTS = [" ".join(simple_text(1007 * (i % 11)).split()[: 1 + i % 4]) for i in range(N)]
SMALL: dict[str, Any] = {
    "text_tokens": 12,
    "id_tokens": 3,
    "dim": 16,
    "heads": 2,
    "head_dim": 8,
    "inner": 16,
    "layers": 1,
    "max_items": 3,
    "beams": N,
}
SPEAKS: dict[str, Any] = {"generator": "language-model", "candidates": 4, "lora_rank": 2}
LEARNS = SPEAKS | {"rounds": 1}
HISTORIES = Ragged.from_rows([[3, 1], [0], [5, 6, 7, 8]])


def build(family: str = "bert", texts: list[str] = TEXTS, **more: Any) -> IDGenRec:
    tied = {"tie_word_embeddings": True} if family == "qwen3" else {}
    backbone, catalog = tiny.random_backbone(family, **tied), Catalog.of_texts(texts)
    cache = more.pop("cache", None)
    model: IDGenRec = models.build(IDGenRec, SMALL | more, catalog, backbone, seed=0, cache=cache)
    return model


def speaks(texts: list[str] = TEXTS, **more: Any) -> IDGenRec:
    return build("qwen3", texts, **SPEAKS | more)


# -- ids -----------------------------------------------------------------------------------------


def test_ids_are_words_of_the_items() -> None:
    model = build()
    ids = model.ids()
    assert len(set(ids)) == N and ids == build().ids()
    for text, said in zip(TEXTS, ids, strict=True):
        assert {word for word in said.split() if not word.isdigit()} <= set(text.split())


def test_weights_and_users_change_no_id() -> None:
    """Ids are of the texts alone: nothing of an event, nor of a seed."""
    other: IDGenRec = models.build(
        IDGenRec, SMALL, Catalog.of_texts(TEXTS), tiny.random_backbone("bert", 3), seed=5
    )
    assert other.ids() == build().ids() and not hasattr(other, "calibrate")


def test_new_items_take_ids_that_are_free() -> None:
    model = build()
    before = model.ids()
    longest = max(TEXTS, key=len)
    added = model.add_items([longest, longest, "unheard of"])
    assert added.tolist() == [N, N + 1, N + 2] and model.n_items == N + 3
    ids = model.ids()
    assert ids[:N] == before and len(set(ids)) == N + 3
    assert set(ids[N].split()) & set(longest.split()) and ids[N + 2].isdigit()
    scores = model.scorer()(Ragged.from_rows([[N, 2], [N + 2]]))
    assert scores.shape == (2, N + 3) and int(scores.isfinite().sum()) == 2 * N, "a full beam"


@torch.no_grad()
def test_a_score_is_the_log_probability_of_the_id_and_its_end() -> None:
    model = build().eval()
    assert len({len(row) for row in model.generator.rows()}) > 1, "ids of several lengths"
    scores = model.scorer()(HISTORIES)
    tokens = [torch.tensor(row) + 1 for row in model.generator.rows()]
    for user in range(len(HISTORIES)):
        prompt = torch.cat([tokens[item] for item in HISTORIES[user][-3:]])[None]
        for item in range(N):
            said = torch.cat((torch.zeros(1, dtype=torch.int64), tokens[item]))[None]
            logits = model.generator.t5(input_ids=prompt, decoder_input_ids=said).logits[0, :-1]
            wanted = logits.log_softmax(-1).gather(1, tokens[item][:, None]).sum()
            assert float(scores[user, item]) == pytest.approx(float(wanted), abs=1e-4)


def test_what_the_beam_reaches_is_items_and_no_more() -> None:
    narrow = build(beams=3).scorer()(HISTORIES)
    assert narrow.isfinite().sum(1).tolist() == [3, 3, 3]


# -- generator=language-model --------------------------------------------------------------------


def plain_scores(model: IDGenRec, read: list[int]) -> Tensor:
    """Logits of the words it may say, then of the end, by Hugging Face's own model."""
    plain: Any = tiny.random_model("qwen3", tie_word_embeddings=True)
    with torch.no_grad():
        state = plain(input_ids=torch.tensor([read])).last_hidden_state[0, -1]
        assert model.tags is not None
        logits: Tensor = state @ plain.get_input_embeddings().weight[model.tags.said].T
    return logits


def reference(model: IDGenRec, item: int, count: int, limit: int, less: float) -> list[list[int]]:
    """Diverse beam search, each beam a group of its own, step by step."""
    assert model.tags is not None
    row, said = model.tags.rows[item].tolist(), model.tags.said.tolist()
    candidates: list[list[int]] = []
    for _ in range(count):
        words: list[int] = []
        for place in range(limit):
            scores = plain_scores(model, [*row, *(said[w] for w in words)]).log_softmax(-1)
            for other in candidates:
                if place < len(other):
                    scores[other[place]] -= less
            if place == 0:
                scores[-1] = -torch.inf
            words.append(int(scores.argmax()))
            if words[-1] == len(said) - 1:
                break
        candidates.append(words)
    return candidates


@pytest.mark.parametrize("less", [0.0, 4.0])
def test_candidates_are_those_of_diverse_beam_search(less: float) -> None:
    model = speaks(diversity=less)
    assert model.tags is not None
    end = len(model.tags.said) - 1
    _, propose = model.tags.proposals()
    found = [propose(list(range(N)), number) for number in range(4)]
    for item in (0, 3, 7):
        expected = [[w for w in words if w != end] for words in reference(model, item, 4, 3, less)]
        assert [[w - FIRST_WORD for w in ids[item]] for ids in found] == expected
    if less:
        assert len({ids[0] for ids in found}) > 1
    assert propose([0, 1], 4) == [(), ()]


def test_it_says_words_of_the_catalog_and_no_two_items_alike() -> None:
    model = speaks()
    ids, words = model.ids(), set(" ".join(TEXTS).split())
    assert len(set(ids)) == N and ids == speaks().ids()
    assert {word for said in ids for word in said.split() if not word.isdigit()} <= words
    assert model.add_items(["old blue book", "old blue book"]).tolist() == [N, N + 1]
    assert len(set(model.ids())) == N + 2


def test_its_ids_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = speaks(cache=tmp_path)
    assert [path.is_file() for path in first.cached] == [True]

    def never(*_: Any) -> Any:
        raise AssertionError("said again")

    monkeypatch.setattr(TagGenerator, "_say", never)
    again = speaks(cache=tmp_path)
    assert again.ids() == first.ids() and again.cached == first.cached
    with pytest.raises(AssertionError, match="said again"):
        speaks(cache=tmp_path, diversity=2.0)
    assert build(cache=tmp_path).cached == [], "a rule needs no file"


def test_what_cannot_generate_is_refused() -> None:
    for family, more in (("bert", SPEAKS), ("llama", SPEAKS)):  # the latter is not tied
        with pytest.raises(ConfigError, match="no decoder whose output layer"):
            build(family, **more)
    with pytest.raises(ValidationError, match="a rule does not learn"):
        build(rounds=1)
    with pytest.raises(ConfigError, match="has 256 positions; lower text_tokens"):
        speaks([" ".join(["red"] * 300), *TEXTS], text_tokens=250)


# -- rounds --------------------------------------------------------------------------------------


def test_both_learn_in_turn() -> None:
    stages = build("qwen3", **LEARNS | {"rounds": 2}).stages(1e-3, 0.0)
    assert [(stage.name, stage.select, stage.epochs) for stage in stages] == [
        ("recommender", True, None),
        ("id generator, round 1", False, 1),
        ("recommender, round 1", True, None),
        ("id generator, round 2", False, 1),
        ("recommender, round 2", True, None),
    ]
    assert [stage.name for stage in speaks().stages(1e-3, 0.0)] == ["recommender"]


@torch.no_grad()
def test_shares_are_the_models_distributions() -> None:
    model = build("qwen3", **LEARNS)
    tags = model.tags
    assert tags is not None
    rows = [[w for w in row if w >= FIRST_WORD] for row in model.generator.rows()]
    items, rows[4] = np.array([3, 4, 0]), []
    shares, read = tags.shares(items, Ragged.from_rows([rows[i] for i in items]))
    expected = []
    for item in items:
        for place in range(len(rows[item])):
            words = tags.said[torch.tensor(rows[item][:place], dtype=torch.int64) - FIRST_WORD]
            logits = plain_scores(model, [*tags.rows[item].tolist(), *words.tolist()])
            expected.append(logits[:-1].softmax(-1))
    torch.testing.assert_close(shares, torch.stack(expected), atol=1e-5, rtol=1e-4)
    assert read == sum(len(tags.rows[i]) + max(0, len(rows[i]) - 1) for i in items)


def test_a_generator_that_is_sure_has_the_recommenders_loss(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where each word has all of its distribution, the words' own vectors are read."""
    model = build("qwen3", **LEARNS).eval()
    batch = models.one_batch(model, HISTORIES, stage=1)
    expected = float(model.generator.loss(batch).total.detach())
    mixed = float(model.generator_loss(batch).total.detach())

    def sure(self: TagGenerator, items: Any, words: Ragged) -> tuple[Tensor, int]:
        at = torch.from_numpy(words.values.astype(np.int64)) - FIRST_WORD
        return torch.nn.functional.one_hot(at, len(self.said) - 1).float(), 1

    monkeypatch.setattr(TagGenerator, "shares", sure)
    found = float(model.generator_loss(batch).total.detach())
    assert found == pytest.approx(expected, rel=1e-6) and mixed != pytest.approx(expected, rel=1e-4)


def test_the_loss_reaches_the_generator_and_new_ids_are_said(tmp_path: Path) -> None:
    model = build("qwen3", **LEARNS)
    _, generator, recommender = model.stages(1e-3, 0.0)
    batch = models.one_batch(model, HISTORIES, stage=1)
    model.generator_loss(batch).total.backward()
    updated = [p for group in generator.groups for p in group.parameters]
    assert any(bool(p.grad.any()) for p in updated if p.grad is not None)
    assert recommender.begin_epoch is not None
    before = model.ids()
    recommender.begin_epoch(0)
    assert model.ids() == before, "an untrained update changes nothing"
    with torch.no_grad():
        for parameter in updated:
            parameter.normal_()
    recommender.begin_epoch(1)
    assert model.ids() == before
    recommender.begin_epoch(0)
    assert model.ids() != before and len(set(model.ids())) == N


def test_the_loop_trains_all_rounds(tmp_path: Path) -> None:
    model = build("qwen3", **LEARNS | {"generator_lr": 0.1, "generator_users": 4})
    rows = [[(start + step) % N for step in range(6)] for start in range(N)]
    split = leave_one_out(Ragged.from_rows(rows))
    config = TrainingConfig(epochs=2, lr=3e-3, batch_users=8, eval_every=2)
    result = train(model, split, config, seed=0, run=tmp_path, progress=Quiet())
    assert result.steps == 2 * 2 + 4 + 2 * 2 and result.stopped == "epochs"
