"""Ids of words: how they are spelled, which words are chosen, and that no two are alike."""

from __future__ import annotations

import math
from typing import Any

import pytest
from tests.support import tiny
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from l2rec.data.synthetic import simple_text
from l2rec.modules.textual_ids import FIRST_WORD, Id, Keywords, Spelling, first_unused

TEXTS = [
    "red wood lamp red lamp",
    "red wood table",
    "red glass cup",
    "red glass cup",
    "red paper book",
]


def spelling(texts: list[str] = TEXTS, max_tokens: int = 99) -> Spelling:
    return Spelling(texts, tiny.tokenizer(), max_tokens)


def keywords(texts: list[str] = TEXTS, limit: int = 3) -> list[str]:
    spelled = spelling(texts)
    made = Keywords(spelled.words, limit).proposals(spelled.words)
    return [spelled.write(row) for row in first_unused(len(texts), made, set())]


def byte_pairs(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a tokenizer whose tokens begin with blanks and may be parts of words."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer: Any = trainers.BpeTrainer(
        vocab_size=280, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    raw.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw)


# -- spelling ------------------------------------------------------------------------------------


def test_words_are_in_lower_case_without_what_stands_between_them() -> None:
    found = spelling(["Red wood - LAMP , unheard lamp"])
    assert [found.write(word) for word in found.words[0]] == ["red", "wood", "lamp", "lamp"]
    assert len(found) == FIRST_WORD + 3 and found.tokens == sorted(found.tokens)


def test_words_of_byte_pairs_are_whole() -> None:
    text = "Desk lamp, 1.75mm (grey); LAMP é"
    tokenizer = byte_pairs(["lamp desk grey lamp desk lamp grey"])
    found = Spelling([text], tokenizer, 99)
    words = [
        "".join(tokenizer.convert_ids_to_tokens([found.tokens[code - FIRST_WORD] for code in word]))
        for word in found.words[0]
    ]
    assert [word.lstrip("Ġ") for word in words[:-1]] == ["desk", "lamp", "1.75mm", "grey", "lamp"]
    assert len(found.words[0][2]) > 1, "of several tokens"


def test_a_text_is_read_up_to_a_limit() -> None:
    assert [len(words) for words in spelling(max_tokens=2).words] == [2] * len(TEXTS)


def test_words_of_other_texts_need_tokens_of_the_catalog() -> None:
    found = spelling()
    assert [[found.write(w) for w in row] for row in found.read(["blue cup", "silk kite"])] == [
        ["cup"],
        [],
    ]


# -- keywords ------------------------------------------------------------------------------------


def test_the_weight_of_a_word_by_hand() -> None:
    """``lamp``, twice in one item, is of no other: it comes after all that relate the item."""
    assert keywords(limit=1) == ["wood", "table", "glass", "cup", "red"]
    weight = {"wood": math.log(5 / 2), "red": 2 * math.log(5 / 5)}
    assert weight["wood"] > weight["red"]
    assert keywords(limit=2)[0] == "red wood", "said from the common to the rare"
    assert keywords(limit=3)[0] == "red wood lamp"


def test_of_equal_words_the_first_of_the_text_is_taken() -> None:
    assert keywords(["old cup box", "old cup box", "new bag"], limit=2)[0] == "old cup"


def test_a_word_gives_way_where_another_item_has_the_id() -> None:
    found = keywords(limit=2)
    assert found[2:4] == ["glass cup", "red glass"]


def test_words_that_do_not_fit_are_passed_over() -> None:
    texts = ["desk lamp", "desk lamp", "desk"]
    found = Spelling(texts, byte_pairs(["lamp lamp lamp"]), 99)
    made = Keywords(found.words, 2).proposals(found.words)
    whole = {found.write(word).strip() for word in found.words[0] if len(word) <= 2}
    assert found.write(made([0], 0)[0]).strip() in whole


@pytest.mark.parametrize("limit", [1, 2, 4])
def test_every_item_has_an_id_of_its_own_words(limit: int) -> None:
    texts = [simple_text(7 * (i % 25)) for i in range(40)] + [""] * 3
    found = keywords(texts, limit)
    assert len(set(found)) == len(texts) and found == keywords(texts, limit)
    for text, said in zip(texts, found, strict=True):
        words = [word for word in said.split() if not word.isdigit()]
        assert set(words) <= set(text.split()) and len(words) <= limit
    assert found[-3:] == ["1", "2", "3"], "nothing but a number is left"
    if limit > 1:
        assert not any(c.isdigit() for c in "".join(found[:25])), "there are words enough"


# -- no two alike --------------------------------------------------------------------------------


def listed(proposals: list[list[Id]]) -> Any:
    def propose(items: list[int], number: int) -> list[Id]:
        return [proposals[i][number] if number < len(proposals[i]) else () for i in items]

    return propose


def test_the_first_unused_proposal_is_taken_and_then_a_number() -> None:
    a, b, c = (20,), (21,), (22, 20)
    proposals = [[a], [a, b], [a, b, c], [a], [], [b]]
    found = first_unused(6, listed(proposals), {c})
    one, two = 2, 3
    assert found == [a, (20, one), (20, two), (20, 4), (one,), b]


def test_numbers_that_are_in_use_are_passed_over() -> None:
    used = {(20,), (20, 2)}
    proposals: list[list[Id]] = [[(20,)]] * 12
    found = first_unused(12, listed(proposals), used)
    assert found[0] == (20, 3) and found[8] == (20, 2, 1) and len({*found, *used}) == 14
    assert used == {(20,), (20, 2)}, "what is given stays as it is"
