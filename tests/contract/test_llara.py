"""What is LLaRA's own; what every method promises is in test_methods.py."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.support import models, prompts, tiny
from tests.support.models import batches_of
from tests.support.runs import Quiet, assert_same_training, log

from l2rec.config import TrainingConfig
from l2rec.data.batches import Batch
from l2rec.data.catalog import Catalog
from l2rec.data.ragged import Ragged
from l2rec.data.splits import leave_one_out
from l2rec.data.synthetic import simple_text
from l2rec.errors import BackboneError, ConfigError
from l2rec.methods.llara import LLaRA, TextOnly
from l2rec.protocols import Losses
from l2rec.runs.loop import train

N = 20
TEXTS = [" ".join(simple_text(1007 * i).split()[: 1 + i % 4]) for i in range(N)]
TEXTS[7] = TEXTS[3]
HISTORIES = Ragged.from_rows([[3, 1, 4, 1, 5, 9], [2], [6, 5, 3, 5, 8], [8, 4]])
SMALL: dict[str, Any] = {"max_items": 4, "item_tokens": 3, "id_dim": 8, "rank": 4, "beams": N}
TIED = {"tie_word_embeddings": True}
WINDOW = {"sliding_window": 16, "use_sliding_window": True}
SPEAKERS = ("tied", "llama")


def build(family: str = "tied", **options: Any) -> LLaRA:
    """Build a model as if it were trained, in float64."""
    backbone = tiny.random_backbone(family, **(TIED if family in SPEAKERS else {}))
    model = models.build(LLaRA, SMALL | options, Catalog.of_texts(TEXTS), backbone)
    made: LLaRA = models.shaken(model, still=("backbone.",)).double()
    return made


def plain(rows: Ragged, targets: list[int], kind: type[Batch] = Batch) -> Batch:
    none = np.zeros((len(rows), 0), dtype=np.int32)
    return kind(np.arange(len(rows)), rows, np.array(targets), none)


# ------------------------------------------------------------------------------- prompts


@pytest.mark.parametrize("family", [*SPEAKERS, "bert", "electra"])
@pytest.mark.parametrize("hybrid", [True, False])
@torch.no_grad()
def test_a_prompt_by_hand(family: str, hybrid: bool) -> None:
    model = build(family, head="titles" if family in SPEAKERS else "items")
    found = model.prompts(HISTORIES.tail(4), hybrid=hybrid)
    rows = found.x.split(found.lengths.tolist())
    for row, history in zip(rows, HISTORIES, strict=True):
        expected = prompts.prompt(model, family, TEXTS, history.tolist(), hybrid)
        torch.testing.assert_close(row, expected)
    if hybrid:
        assert model.costs(HISTORIES).tolist() == found.lengths.tolist()


def test_a_grid_is_padded_on_the_left() -> None:
    found = build().prompts(HISTORIES.tail(4))
    grid, real = found.padded()
    assert bool(real[:, -1].all()) and real.sum(1).tolist() == found.lengths.tolist()
    assert torch.equal(grid[real], found.x) and not bool(grid[~real].any())


# ------------------------------------------------------------------------------- curriculum


def test_a_batch_is_hybrid_with_probability_t_of_T() -> None:
    model, epochs = build(curriculum=3), 3
    users = Ragged.from_rows([[u % N, (u + 1) % N, (u + 5) % N] for u in range(400)])
    of_epochs: list[Any] = [
        model.batches(users, seed=0, epoch=epoch, batch_users=4, batch_tokens=10**6)
        for epoch in range(5)
    ]
    count = len(of_epochs[0])
    assert count == 100
    for t in range(5 * count):
        share = of_epochs[t // count].share[t % count]
        assert share == pytest.approx(min(1.0, t / (epochs * count)))
    drawn = np.array([epoch.hybrid.mean() for epoch in of_epochs])
    np.testing.assert_allclose(drawn, [1 / 6, 3 / 6, 5 / 6, 1, 1], atol=0.1)
    assert of_epochs[3].hybrid.all() and not of_epochs[0].hybrid[0]
    kinds = [isinstance(batch, TextOnly) for batch in of_epochs[1].iterate(40)]
    assert kinds == (~of_epochs[1].hybrid[40:]).tolist(), "entered in the middle"
    other = model.batches(users, seed=1, epoch=1, batch_users=4, batch_tokens=10**6)
    assert other.hybrid.tolist() != of_epochs[1].hybrid.tolist()
    at_once = build(curriculum=0).batches(users, seed=0, epoch=0, batch_users=4, batch_tokens=10**6)
    assert at_once.hybrid.all()


def test_a_text_only_batch_leaves_the_projector() -> None:
    model = build()
    for kind in (TextOnly, Batch):
        model.zero_grad(set_to_none=True)
        losses = model.loss(plain(HISTORIES.tail(4), [1, 2, 3, 4], kind))
        losses.total.backward()
        assert float(losses.parts["hybrid"]) == (kind is Batch)
        moved = {n.split(".")[0] for n, p in model.named_parameters() if p.grad is not None}
        assert moved == {"lora", *(["project"] if kind is Batch else [])}


def test_a_run_resumed_within_the_curriculum_ends_with_the_same_weights(tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    split = leave_one_out(Ragged.from_rows([[(u + k) % N for k in range(5)] for u in range(24)]))
    config = TrainingConfig(epochs=2, lr=1e-2, batch_users=4, checkpoint_minutes=0, log_every=1)

    def run(name: str, resume: bool = False, kill_at: int = 0) -> None:
        backbone = tiny.random_backbone("tied")
        options = SMALL | {"curriculum": 2, "sasrec_epochs": 1}
        model: LLaRA = models.build(LLaRA, options, Catalog.of_texts(TEXTS), backbone)
        calls, loss = itertools.count(1), model.loss

        def killed(batch: Batch) -> Losses:
            if next(calls) == kill_at:
                raise Killed
            return loss(batch)

        model.loss = killed  # type: ignore[method-assign]
        train(*(model, split, config), seed=0, run=tmp_path / name, progress=Quiet(), resume=resume)

    run("a")
    hybrid = [row["parts"]["hybrid"] for row in log(tmp_path / "a", "train")[-12:]]
    assert hybrid[0] == 0 and 0 < sum(hybrid[:9]) < 9
    with pytest.raises(Killed):
        run("b", kill_at=9)
    run("b", resume=True)
    assert_same_training(tmp_path / "a", tmp_path / "b")


def test_sasrec_comes_first_and_is_then_frozen() -> None:
    model = build()
    first, second = model.stages(1e-3, 0.0)
    assert first.validates is model.sasrec and second.validates is None
    trained = {p for group in second.groups for p in group.parameters}
    assert not trained & set(model.sasrec.parameters())


# ------------------------------------------------------------------------------- titles


@pytest.mark.parametrize("family", SPEAKERS)
@pytest.mark.parametrize("kind", [Batch, TextOnly])
@torch.no_grad()
def test_the_loss_is_of_the_answers_alone(family: str, kind: type[Batch]) -> None:
    model, targets = build(family), [0, 5, 11, 7]
    bare = prompts.merged(model, family, **TIED)
    terms = []
    for history, target in zip(HISTORIES, targets, strict=True):
        inputs = prompts.prompt(model, family, TEXTS, history.tolist(), kind is Batch)
        terms += prompts.said(model, family, bare, inputs, TEXTS[target])
    losses = model.loss(plain(HISTORIES.tail(4), targets, kind))
    expected = -torch.stack(terms).mean()
    assert float(losses.total) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("family", SPEAKERS)
@torch.no_grad()
def test_a_wide_beam_scores_every_title_as_it_stands_alone(family: str) -> None:
    model = build(family)
    bare = prompts.merged(model, family, **TIED)
    # Transformers' eager softmax is float32, where the float64 mask of a padded row overflows.
    searched, batch = build(family).float(), plain(HISTORIES.tail(4), [0, 5, 11, 7])
    before = searched.loss(batch).total
    scores = searched.scorer()(HISTORIES)
    for user, history in enumerate(HISTORIES):
        inputs = prompts.prompt(model, family, TEXTS, history.tolist())
        for item, text in enumerate(TEXTS):
            expected = sum(map(float, prompts.said(model, family, bare, inputs, text)))
            assert float(scores[user, item]) == pytest.approx(expected, abs=1e-4)
    assert torch.equal(before, searched.loss(batch).total), "packed again after the search"


def test_what_the_beam_does_not_reach_has_no_score_and_equal_titles_tie() -> None:
    wide, narrow = (build(beams=beams).float().scorer()(HISTORIES) for beams in (N, 3))
    found = narrow.isfinite()
    cut = [" ".join(text.split()[:3]) for text in TEXTS]
    titles = [{cut[item] for item in row.nonzero().flatten().tolist()} for row in found]
    assert [len(row) for row in titles] == [3] * 4
    torch.testing.assert_close(narrow[found], wide[found], atol=1e-4, rtol=0)
    assert torch.equal(wide[:, 3], wide[:, 7]), "one title, two items"


def test_a_title_may_begin_another() -> None:
    texts = ["small", "small red", "small red lamp", ""]
    backbone = tiny.random_backbone("tied")
    model = models.build(LLaRA, SMALL, Catalog.of_texts(texts), backbone)
    end = prompts.ends("tied")[1]
    codes = [prompts.words("tied", text) + end for text in texts]
    assert [row.tolist() for row in model.title_codes()] == codes
    assert bool(model.scorer()(Ragged.from_rows([[3, 0]])).isfinite().all())


def test_a_line_break_in_a_text_ends_no_title() -> None:
    texts = ["red\n lamp", "red"]
    model = models.build(LLaRA, SMALL, Catalog.of_texts(texts), tiny.random_backbone("tied"))
    assert (
        model.title_codes()[0].tolist()
        == prompts.words("tied", "red lamp") + prompts.ends("tied")[1]
    )


# ------------------------------------------------------------------------------- items


@pytest.mark.parametrize("family", ["tied", "bert", "electra"])
@torch.no_grad()
def test_items_are_compared_with_the_end_of_the_prompt(family: str) -> None:
    model = build(family, head="items")
    bare = prompts.merged(model, family, **(TIED if family in SPEAKERS else {}))
    scores, targets = model.scorer()(HISTORIES), [0, 5, 11, 7]
    rows = [prompts.projected(model.project_items, e) for e in model.sasrec.items.weight]
    expected = torch.stack(
        [
            torch.stack([row @ states[-1] for row in rows])
            for history in HISTORIES
            for states in [
                prompts.states(bare, prompts.prompt(model, family, TEXTS, history.tolist()))
            ]
        ]
    )
    torch.testing.assert_close(scores, expected)
    losses = model.loss(plain(HISTORIES.tail(4), targets))
    chosen = expected.log_softmax(-1)[range(4), targets]
    torch.testing.assert_close(losses.total, -chosen.mean())


# ------------------------------------------------------------------------------- options


def test_all_matrices_of_a_block_are_updated_unless_some_are_named() -> None:
    parts = {name.rsplit(".", 1)[1] for name in build().lora.names}
    assert parts == {f"{part}_proj" for part in ("q", "k", "v", "o", "gate", "up", "down")}
    assert len(build("bert", head="items").lora.names) == 2 * 6, "a BERT has no gate"
    assert len(build(matrices=("q", "v")).lora.names) == 2 * 2


def test_positions_of_a_user() -> None:
    sequences = Ragged.from_rows([[1, 2, 3, 4, 5]] * 3)
    for positions in (1, 2):
        _, stage = build(targets_per_user=positions).stages(1e-3, 0.0)
        (batch,) = batches_of(stage, sequences)
        assert len(batch.targets) == 3 * positions


@pytest.mark.parametrize(
    ("family", "changes"),
    [("mpt", {}), ("qwen3", TIED | {"layer_types": ["sliding_attention"] * 2} | WINDOW)],
)
def test_what_another_model_is_in_a_search_is_refused(family: str, changes: dict[str, Any]) -> None:
    backbone = tiny.random_backbone(family, **changes)
    with pytest.raises(BackboneError, match="cannot search with beams"):
        models.build(LLaRA, SMALL, Catalog.of_texts(TEXTS), backbone)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("bert", {}, "reads in both directions .* head=items"),
        ("qwen3", {}, "is not its word embeddings.* head=items"),
        ("bert", {"head": "items", "max_items": 90}, "may need .* lower them"),
    ],
)
def test_what_is_refused(family: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(family, **changes)
