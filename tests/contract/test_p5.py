"""What is P5's own; what every method promises is in test_methods.py."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
from tests.support import models

from l2rec.data.catalog import Catalog
from l2rec.data.ragged import Ragged
from l2rec.methods.p5 import P5, by_first_appearance

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


def test_held_out_targets_change_no_number(caplog: pytest.LogCaptureFixture) -> None:
    """The leak of the authors' numbering is closed, and shows only where it is asked for."""
    a, b, leaky = build(), build(), build(index="leaky")
    a.calibrate(TRAIN, *VALID)
    b.calibrate(TRAIN, Ragged.from_rows([[0]] * 3), np.array([8, 8, 8]))
    assert numbers(a) == numbers(b)
    assert not caplog.records
    with caplog.at_level(logging.WARNING, "l2rec"):
        leaky.calibrate(TRAIN, *VALID)
    assert "not to be compared" in caplog.text
    found = numbers(leaky)
    assert found[3] == found[2] + 1, "the next item is the next number"


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
