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
        encoded = tokenizer(
            list(texts[start : start + chunk]),
            add_special_tokens=False,
            truncation=True,
            max_length=max_tokens,
            return_attention_mask=False,
            return_token_type_ids=False,
        )["input_ids"]
        lengths.extend(len(row) for row in encoded)
        values.append(np.fromiter((token for row in encoded for token in row), dtype=np.int32))
    offsets = np.zeros(len(texts) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return Ragged(np.concatenate(values) if values else np.zeros(0, np.int32), offsets)


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
