"""Ids made of words: a few tokens of each item's text, no two items alike.

    Spelling     tokens of the catalog's words as codes, with ten digits and an end of our own
    Keywords     the words that tell an item from others, by their TF-IDF
    first_unused the first id proposed for an item that no other has; a number makes the rest unlike

An id is a tuple of codes: 0 ends it and is not written here, 1 to 10 are digits, those above are
tokens of words.
"""

from __future__ import annotations

__all__ = ["END_OF_ID", "FIRST_WORD", "Id", "Keywords", "Propose", "Spelling", "first_unused"]

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Id = tuple[int, ...]
Propose = Callable[[list[int], int], list[Id]]
"""Numbers of items, and how many proposals each has had -> the next one of each; empty where there
is none, after which no more is asked for."""

WORD = re.compile(r"\w+(?:\.\d\w*)*")
"""A word, or a number with its fraction and unit: 1.75mm."""
END_OF_ID, FIRST_DIGIT, FIRST_WORD = 0, 1, 11


class Spelling:
    """Tokens of the words of a catalog's texts, and their codes.

    Args:
        texts: of the catalog. tokenizer: a fast one. max_tokens: tokens of a text that are read.

    ``tokens``: [V] token ids in ascending order; the code of the first is `FIRST_WORD`.
    """

    def __init__(self, texts: Sequence[str], tokenizer: Any, max_tokens: int) -> None:
        self._tokenizer, self._max_tokens = tokenizer, max_tokens
        rows = self._words(texts)
        self.tokens = sorted({token for words in rows for word in words for token in word})
        self._codes = {token: FIRST_WORD + n for n, token in enumerate(self.tokens)}
        self.words = [[self.spell(word) for word in words] for words in rows]
        """Words of the catalog's texts, each as its codes, in their order."""

    def __len__(self) -> int:
        """Return the number of codes, digits and the end included."""
        return FIRST_WORD + len(self.tokens)

    def spell(self, tokens: Sequence[int]) -> Id:
        """Return the codes of tokens; those that the catalog has not have none."""
        return tuple(self._codes[token] for token in tokens if token in self._codes)

    def read(self, texts: Sequence[str]) -> list[list[Id]]:
        """Return the words of other texts, as codes, without those that have a token of no code."""
        return [
            [self.spell(word) for word in words if self._codes.keys() >= set(word)]
            for words in self._words(texts)
        ]

    def write(self, codes: Sequence[int]) -> str:
        """Return an id as it reads."""
        words = [self.tokens[code - FIRST_WORD] for code in codes if code >= FIRST_WORD]
        digits = (str(c - FIRST_DIGIT) for c in codes if FIRST_DIGIT <= c < FIRST_WORD)
        return f"{self._tokenizer.decode(words)} {''.join(digits)}".strip()

    def _words(self, texts: Sequence[str]) -> list[list[Id]]:
        """Return the tokens of each word of the texts, in lower case."""
        lower = [text.lower() for text in texts]
        read = self._tokenizer(
            lower,
            add_special_tokens=False,
            truncation=True,
            max_length=self._max_tokens,
            return_offsets_mapping=True,
        )
        rows = []
        for text, ids, spans in zip(lower, read["input_ids"], read["offset_mapping"], strict=True):
            owner = np.full(len(text) + 1, -1)
            for number, word in enumerate(WORD.finditer(text)):
                owner[word.start() : word.end()] = number
            words: dict[int, Id] = {}
            for token, (start, end) in zip(ids, spans, strict=True):
                number = int(owner[end - 1]) if end > start else -1  # a span may begin at a blank
                if number >= 0:
                    words[number] = (*words.get(number, ()), token)
            unknown = self._tokenizer.unk_token_id
            rows.append([word for word in words.values() if unknown not in word])
        return rows


class Keywords:
    """The words that tell an item from the others of a catalog.

    A word w of item i has the weight tf(w, i) log(N / df(w)), the earlier one first among equals;
    words of no other item come last: they relate it to nothing. The first that fit into ``limit``
    tokens are the id, said from the one that most items have to the one that fewest have, so that
    a decoder goes from the general to the particular. Where another item has that id, its last word
    by weight gives way to the next one.

    Args:
        words: of the N items. limit: most tokens of an id.
    """

    def __init__(self, words: Sequence[Sequence[Id]], limit: int) -> None:
        self._items = Counter(word for row in words for word in set(row))
        self._count, self._limit = len(words), limit

    def proposals(self, words: Sequence[Sequence[Id]]) -> Propose:
        """Return what proposes ids of items with these words."""
        return lambda items, number: [self._proposal(words[item], number) for item in items]

    def _proposal(self, words: Sequence[Id], number: int) -> Id:
        often, items = Counter(words), self._items

        def rank(word: Id) -> tuple[bool, float]:
            others = max(1, items[word])
            return others == 1, -often[word] * math.log(self._count / others)

        ranked = sorted(often, key=rank)  # Counter keeps their order, and sorting those of equals
        for _ in range(number):
            if chosen := self._fitting(ranked):
                ranked.remove(chosen[-1])
        said = sorted(self._fitting(ranked), key=lambda word: -items[word])
        return tuple(itertools.chain.from_iterable(said))

    def _fitting(self, ranked: Sequence[Id]) -> list[Id]:
        chosen: list[Id] = []
        room = self._limit
        for word in ranked:
            if len(word) <= room:
                chosen.append(word)
                room -= len(word)
        return chosen


def first_unused(count: int, propose: Propose, used: set[Id]) -> list[Id]:
    """Give ``count`` items ids that are not ``used``, nor those of one another.

    All items make their first proposal, then those that lost make their second, and so on; of two
    with the same the one that comes first has it. An item that is left without takes its first
    proposal with a number behind it, the lowest that is free.
    """
    ids: list[Id] = [()] * count
    first: list[Id] = [()] * count
    used, numbers = set(used), Counter[Id]()
    left, without = list(range(count)), list[int]()
    for number in itertools.count():
        if not left:
            break
        waiting = []
        for item, proposed in zip(left, propose(left, number), strict=True):
            if number == 0:
                first[item] = proposed
            if not proposed:
                without.append(item)
            elif proposed in used:
                waiting.append(item)
            else:
                ids[item] = proposed
                used.add(proposed)
        left = waiting
    for item in sorted(without):
        while not ids[item] or ids[item] in used:
            numbers[first[item]] += 1
            digits = str(numbers[first[item]])
            ids[item] = (*first[item], *(FIRST_DIGIT + int(digit) for digit in digits))
        used.add(ids[item])
    return ids
