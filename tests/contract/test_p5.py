"""What is P5's own; what every method promises is in test_methods.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tests.support import models

from l2rec.data.catalog import Catalog
from l2rec.data.ragged import Ragged
from l2rec.methods.p5 import P5, by_first_appearance
from l2rec.runs.checkpoint import load_trained, trained_tensors

N = 12
SMALL: dict[str, Any] = {
    "digits": 4,
    "dim": 16,
    "heads": 2,
    "head_dim": 8,
    "inner": 16,
    "layers": 1,
    "max_items": 4,
    "beams": N,
}
TRAIN = Ragged.from_rows([[7, 2], [2, 9, 7, 1], [4, 11]])
VALID = Ragged.from_rows([[7, 2], [2, 9, 7, 1], [4, 11]]), np.array([3, 5, 0])


def build(seed: int = 0, **more: Any) -> P5:
    catalog = Catalog.of_texts([str(i) for i in range(N)])
    model: P5 = models.build(P5, SMALL | more, catalog, seed=seed)
    return model


def numbers(model: P5) -> list[int]:
    """The number of each item, from its digits."""
    return [int("".join(map(str, row)), 4) for row in model.generator.codes.tolist()]


def test_order_of_first_appearance_by_hand() -> None:
    found = by_first_appearance(TRAIN, N).tolist()
    assert found == [7, 2, 9, 1, 4, 11, 0, 3, 5, 6, 8, 10]


def test_numbers_follow_the_training_sequences_once() -> None:
    model = build()
    assert model.generator.codes.shape == (N, 2), "sixteen numbers of two digits"
    model.calibrate(TRAIN, *VALID)
    expected = {item: n for n, item in enumerate(by_first_appearance(TRAIN, N).tolist())}
    assert numbers(model) == [expected[item] for item in range(N)]
    model.calibrate(Ragged.from_rows([[0, 1, 2]]), *VALID)
    assert numbers(model) == [expected[item] for item in range(N)], "what was learned stays true"


def test_held_out_targets_change_no_number() -> None:
    """The leak of the authors' numbering is closed, and shows only where it is asked for."""
    a, b, leaky = build(), build(), build(index="leaky")
    a.calibrate(TRAIN, *VALID)
    b.calibrate(TRAIN, Ragged.from_rows([[0]] * 3), np.array([8, 8, 8]))
    assert numbers(a) == numbers(b)
    leaky.leak(Ragged.from_rows([[7, 2, 3, 10], [2, 9, 7, 1, 5], [4, 11, 0]]))
    leaky.calibrate(TRAIN, *VALID)
    found = numbers(leaky)
    assert [found[item] for item in (7, 2, 3, 10, 9, 1, 5)] == list(range(7))


def test_random_numbers_are_drawn_by_the_seed() -> None:
    models_of = [build(seed, index="random") for seed in (1, 1, 2)]
    for model in models_of:
        model.calibrate(TRAIN, *VALID)
    a, b, c = map(numbers, models_of)
    assert a == b != c and sorted(a) == list(range(N))


@torch.no_grad()
def test_tokens_of_one_item_share_a_vector_by_their_place() -> None:
    model = build()
    generator = model.generator
    prompts, real = generator.read(Ragged.from_rows([[3, 5], [5]]))
    assert real.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    words = generator.words
    assert words is not None
    tokens = generator.tokens(torch.tensor([3, 5]))
    for item in range(2):
        for digit in range(2):
            expected = generator.t5.shared.weight[tokens[item, digit]] + words.weight[item]
            torch.testing.assert_close(prompts[0, 2 * item + digit], expected)
    same = generator.t5.shared.weight[tokens[1, 0]] + words.weight[0]
    torch.testing.assert_close(prompts[1, 0], same)
    assert int(tokens.max()) <= 4, "digits are the same tokens in every place"


@torch.no_grad()
def test_a_score_is_the_log_probability_of_the_number() -> None:
    model = build().eval()
    histories = Ragged.from_rows([[3, 1], [0]])
    scores = model.scorer()(histories)
    for user, history in enumerate(histories):
        prompts, real = model.generator.read(Ragged.from_rows([history]))
        for item in range(N):
            code = model.generator.tokens(torch.tensor([item]))
            said = torch.cat((torch.zeros(1, 1, dtype=torch.int64), code[:, :-1]), dim=1)
            found = model.generator.t5(
                inputs_embeds=prompts, attention_mask=real, decoder_input_ids=said
            )
            wanted = found.logits[0].log_softmax(-1).gather(1, code[0][:, None]).sum()
            assert float(scores[user, item]) == pytest.approx(float(wanted), abs=1e-4)


# -- index=collaborative -------------------------------------------------------------------------

GROUPS = Ragged.from_rows(
    [[0, 1, 2], [2, 3, 0], [1, 3, 4], [4, 0, 2], [5, 6, 7], [8, 5, 9], [6, 9, 7], [7, 8, 5], [4, 5]]
)
"""Two groups of five items, and two items of no sequence."""


def codes_of(model: P5) -> list[tuple[int, ...]]:
    return [tuple(c for c in row if c >= 0) for row in model.generator.codes.tolist()]


def collaborative(targets: list[int] | None = None) -> P5:
    model = build(index="collaborative", clusters=3)
    ends = np.array(targets or [11] * len(GROUPS))
    model.calibrate(GROUPS, GROUPS, ends)
    return model


def test_codes_are_of_clusters_of_the_training_sequences() -> None:
    model = collaborative()
    codes = codes_of(model)
    assert len(set(codes)) == N and max(map(max, codes)) < 4
    begins = [code[0] for code in codes]
    groups = [set(begins[:5]), set(begins[5:10]), set(begins[10:])]
    assert all(len(group) == 1 for group in groups) and len(set.union(*groups)) == 3
    assert len({len(code) for code in codes}) > 1, "clusters of five are cut, that of two is not"
    model.calibrate(Ragged.from_rows([[0, 9]]), GROUPS, np.zeros(len(GROUPS), dtype=np.int64))
    assert codes_of(model) == codes, "what was learned stays true"


def test_held_out_targets_change_no_cluster() -> None:
    assert codes_of(collaborative()) == codes_of(collaborative([0] * len(GROUPS)))


@torch.no_grad()
def test_codes_of_other_lengths_are_read_scored_and_saved() -> None:
    model = collaborative().eval()
    generator, histories = model.generator, Ragged.from_rows([[3, 10], [0]])
    prompts, real = generator.read(histories)
    lengths = generator.lengths()
    assert real.sum(1).tolist() == [lengths[3] + lengths[10], lengths[0]]
    words = generator.words
    assert words is not None
    token = generator.tokens(torch.tensor([10]))[0, 0]
    expected = generator.t5.shared.weight[token] + words.weight[1]
    torch.testing.assert_close(prompts[0, lengths[3]], expected)
    scores = model.scorer()(histories)
    assert bool(scores.isfinite().all())
    for item in range(N):
        code = generator.tokens(torch.tensor([item]))[:, : lengths[item]]
        said = torch.cat((torch.zeros(1, 1, dtype=torch.int64), code[:, :-1]), dim=1)
        found = generator.t5(
            inputs_embeds=prompts[:1], attention_mask=real[:1], decoder_input_ids=said
        )
        wanted = found.logits[0].log_softmax(-1).gather(1, code[0][:, None]).sum()
        assert float(scores[0, item]) == pytest.approx(float(wanted), abs=1e-4)
    fresh = build(1, index="collaborative", clusters=3)
    load_trained(fresh, trained_tensors(model), "here")
    torch.testing.assert_close(fresh.scorer()(histories), scores, rtol=0, atol=0)


def test_the_loss_is_the_mean_over_the_tokens_that_are_said() -> None:
    model = collaborative().eval()
    batch = models.one_batch(model, GROUPS)
    prompts, real = model.generator.read(batch.histories)
    terms = []
    for row, target in enumerate(batch.targets.tolist()):
        code = model.generator.tokens(torch.tensor([target]))[
            :, : model.generator.lengths()[target]
        ]
        said = torch.cat((torch.zeros(1, 1, dtype=torch.int64), code[:, :-1]), dim=1)
        logits = model.generator.t5(
            inputs_embeds=prompts[row : row + 1],
            attention_mask=real[row : row + 1],
            decoder_input_ids=said,
        ).logits[0]
        terms += (-logits.log_softmax(-1).gather(1, code[0][:, None])).flatten().tolist()
    found = float(model.generator.loss(batch).total.detach())
    assert found == pytest.approx(np.mean(terms), rel=1e-5)


def test_more_clusters_than_tokens_are_refused() -> None:
    with pytest.raises(ValidationError, match="clusters=5 is more than digits=4"):
        build(index="collaborative", clusters=5)
