"""Item texts -> token ids, once: a ragged table, memory-mapped and cached by content hash."""

from __future__ import annotations

__all__ = ["TokenTable", "share_read", "special_tokens", "tokenize"]

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from l2rec.data.ragged import Ragged
from l2rec.disk import replacing

COUNTED, LONGEST = 10_000, 100_000
"""Texts that `share_read` looks at, and most tokens of one that it counts."""
CHARACTERS, SLACK = 8, 8
"""Characters of a text that are read at first for each token that is wanted, and tokens beyond
those that are wanted, which alone may depend on what follows.
"""
TokenTable = Ragged
"""Token ids of item texts: row i has those of item i, int32, without special tokens."""


def special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the token ids that a tokenizer adds before and after a text.

    ([CLS], [SEP]) for BERT, ([<s>], []) for Llama, ([], []) for Qwen.
    """
    wrapped = tokenizer("a")["input_ids"]
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    start = next(
        (i for i in range(len(wrapped)) if wrapped[i : i + len(bare)] == bare), len(wrapped)
    )
    return list(wrapped[:start]), list(wrapped[start + len(bare) :])


def tokenize(
    texts: Sequence[str], tokenizer: Any, max_tokens: int, cache: Path | None = None
) -> TokenTable:
    """Tokenise every text once, each cut to its first ``max_tokens`` tokens.

    Args:
        texts: one text per item; an empty text gives an empty row.
        tokenizer: a fast Hugging Face tokenizer.
        max_tokens: length to which rows are cut.
        cache: folder for the table; its name there is a hash of texts, tokenizer and limit.

    Raises:
        CheckpointError: the cache cannot be written.
    """
    if cache is None:
        return _tokenize(texts, tokenizer, max_tokens)
    path = cache / f"tokens-{_content_hash(texts, tokenizer, max_tokens)}"
    values, offsets = path / "values.npy", path / "offsets.npy"
    if not (values.is_file() and offsets.is_file()):
        table = _tokenize(texts, tokenizer, max_tokens)
        # Several processes may do this at once: what they write is the same.
        for file, array in ((values, table.values), (offsets, table.offsets)):
            with replacing(file, remedy="free some space") as partial, partial.open("wb") as stream:
                np.save(stream, array)
    return Ragged(np.load(values, mmap_mode="r"), np.load(offsets, mmap_mode="r"))


def share_read(texts: Sequence[str], tokenizer: Any, max_tokens: int) -> tuple[float, float]:
    """Return the share of all tokens of the texts that stand within ``max_tokens`` of each, and the
    share of texts that are longer.

    Of more than `COUNTED` texts so many are looked at, evenly spread.
    """
    some = np.unique(np.linspace(0, len(texts) - 1, min(COUNTED, len(texts))).astype(np.int64))
    lengths = _tokenize([texts[i] for i in some], tokenizer, LONGEST).lengths
    read = np.minimum(lengths, max_tokens)
    return float(read.sum() / max(1, lengths.sum())), float((lengths > max_tokens).mean())


def _tokenize(texts: Sequence[str], tokenizer: Any, max_tokens: int, chunk: int = 4096) -> Ragged:
    values: list[npt.NDArray[np.int32]] = []
    lengths: list[int] = []
    for start in range(0, len(texts), chunk):
        encoded = _first_tokens(texts[start : start + chunk], tokenizer, max_tokens)
        lengths.extend(len(row) for row in encoded)
        values.append(np.fromiter((token for row in encoded for token in row), dtype=np.int32))
    offsets = np.zeros(len(texts) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return Ragged(np.concatenate(values) if values else np.zeros(0, np.int32), offsets)


def _first_tokens(texts: Sequence[str], tokenizer: Any, max_tokens: int) -> list[list[int]]:
    """Return the first ``max_tokens`` tokens of each text, without a look at all of a long one.

    Of a text that is much longer than it has to be, the start is read, up to a space. Only if its
    tokens are too few, or could depend on what follows, more is read.
    """
    found: list[list[int]] = [[]] * len(texts)
    left, characters = list(range(len(texts))), CHARACTERS * (max_tokens + SLACK)
    while left:
        starts = [_start(texts[n], characters) for n in left]
        encoded = tokenizer(
            starts,
            add_special_tokens=False,
            truncation=True,
            max_length=max_tokens + SLACK,
            return_attention_mask=False,
            return_token_type_ids=False,
        )["input_ids"]
        again = []
        for n, start, tokens in zip(left, starts, encoded, strict=True):
            found[n] = tokens[:max_tokens]
            if len(start) < len(texts[n]) and len(tokens) < max_tokens + SLACK:
                again.append(n)
        left, characters = again, 8 * characters
    return found


def _start(text: str, characters: int) -> str:
    """Return the start of a text, up to the last space within so many characters; all of a text
    without a space there.
    """
    if len(text) <= characters:
        return text
    end = text.rfind(" ", 0, characters)
    return text[:end] if end > 0 else text


def _content_hash(texts: Sequence[str], tokenizer: Any, max_tokens: int) -> str:
    digest = hashlib.sha256()
    digest.update(f"{tokenizer.__class__.__name__} {len(tokenizer)} {max_tokens}".encode())
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str())
        # Truncation and padding are settings of the last call, not of the vocabulary.
        state.pop("truncation", None)
        state.pop("padding", None)
        digest.update(json.dumps(state, sort_keys=True).encode())
    for text in texts:
        encoded = text.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "little"))
        digest.update(encoded)
    return digest.hexdigest()[:16]
