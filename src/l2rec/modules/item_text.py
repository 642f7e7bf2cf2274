"""The frozen backbone's vectors of item texts, computed once per catalog and cached."""

from __future__ import annotations

__all__ = [
    "TextStates",
    "catalog_key",
    "catalog_vectors",
    "read_texts",
    "separators",
    "text_vectors",
]

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from l2rec.data.batches import plan_batches
from l2rec.data.ragged import Ragged
from l2rec.data.text import special_tokens
from l2rec.disk import replacing
from l2rec.modules.backbone import ENCODED_ROWS, ENCODED_TOKENS, Backbone
from l2rec.modules.packing import Attend, Packing, lay, pack, split_groups
from l2rec.modules.views import mean_of, semantic_tokens


def separators(backbone: Backbone) -> tuple[list[int], list[int]]:
    """Return the token ids that start a row and those that end an item."""
    tokenizer = backbone.tokenizer
    if tokenizer is None:
        return [], [0]
    before, after = special_tokens(tokenizer)
    # Without an end token a line break separates items; an empty text must not be empty.
    after = after or tokenizer("\n", add_special_tokens=False)["input_ids"]
    return before, after or [tokenizer.eos_token_id or 0]


@dataclass(frozen=True)
class TextStates:
    """What the backbone made of some texts, each read alone.

    rows: [B] which texts. states: [n, D] of their tokens, special ones included, text after text.
    text: [n] int64 place in ``rows`` of each token.
    """

    rows: npt.NDArray[np.int64]
    states: Tensor
    text: Tensor


def read_texts(
    backbone: Backbone,
    tokens: Ragged,
    max_tokens: int,
    run: Callable[[Tensor, Packing], Tensor],
) -> Iterator[TextStates]:
    """Read texts in batches of like length.

    tokens: rows of token ids without special tokens, each cut to ``max_tokens``. run: the backbone
    or its lower layers, packed inputs -> states.
    """
    before, after = separators(backbone)
    lengths = np.minimum(tokens.lengths, max_tokens)
    attend = Attend.CAUSAL if backbone.causal else Attend.FULL
    for rows in plan_batches(lengths + 2, None, max_rows=ENCODED_ROWS, max_cost=ENCODED_TOKENS):
        part = semantic_tokens(
            Ragged(rows.astype(np.int32), np.arange(len(rows) + 1)),
            tokens,
            item_tokens=max_tokens,
            max_tokens=max_tokens + len(before) + len(after),
            max_items=1,
            before=before,
            after=after,
            device=backbone.device,
        )
        group, positions = pack(part.segments.lengths, attend)
        x, packing = lay([(backbone.embed(part.ids), group, positions)], backbone.dtype)
        (states,) = split_groups(run(x, packing), packing)
        yield TextStates(rows, states, part.segments.block)


@torch.no_grad()
def text_vectors(backbone: Backbone, tokens: Ragged, max_tokens: int) -> Tensor:
    """Average the backbone's outputs over each text, at unit length: [n, D] float32. Equal ones are
    read once.

    tokens: n rows of token ids without special tokens, each cut to ``max_tokens``.
    """
    if backbone.device.type == "meta":  # shapes alone
        return torch.empty(len(tokens), backbone.dim, device="meta")
    first, same = _distinct(tokens.head(max_tokens))
    out = torch.zeros(len(first), backbone.dim, device=backbone.device)
    for batch in read_texts(backbone, tokens.take(first), max_tokens, backbone):
        rows = torch.from_numpy(batch.rows).to(out.device)
        out[rows] = mean_of(batch.states, batch.text, len(rows))
    out = F.normalize(out, dim=-1)
    return out if len(first) == len(tokens) else out[torch.from_numpy(same).to(out.device)]


def _distinct(rows: Ragged) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the first of each kind of equal rows, ascending, and of which kind each row is."""
    known: dict[bytes, int] = {}
    values = np.ascontiguousarray(rows.values)
    ends = rows.offsets.tolist()
    same = np.fromiter(
        (
            known.setdefault(values[start:stop].tobytes(), len(known))
            for start, stop in pairwise(ends)
        ),
        dtype=np.int64,
        count=len(rows),
    )
    return np.unique(same, return_index=True)[1], same


def catalog_key(backbone: Backbone, tokens: Ragged, *settings: float) -> str:
    """Hash a catalog, its backbone and settings: 16 hex digits for the name of a file."""
    digest = hashlib.sha256(backbone.weight_hash().encode())
    digest.update(" ".join(map(str, (backbone.dtype, *settings))).encode())
    digest.update(np.ascontiguousarray(tokens.offsets).tobytes())
    digest.update(np.ascontiguousarray(tokens.values).tobytes())
    return digest.hexdigest()[:16]


def catalog_vectors(
    backbone: Backbone, tokens: Ragged, max_tokens: int, cache: Path | None
) -> tuple[Tensor, list[Path]]:
    """Compute `text_vectors` of a catalog, or read them from ``cache``; also return its files.

    Raises:
        CheckpointError: the cache cannot be written.
    """
    if cache is None:
        return text_vectors(backbone, tokens, max_tokens), []
    path = cache / f"text-{catalog_key(backbone, tokens, max_tokens)}.safetensors"
    if not path.is_file():
        vectors = text_vectors(backbone, tokens, max_tokens).cpu()
        with replacing(path, remedy="free some space") as partial:
            save_file({"vectors": vectors}, partial)
    return load_file(path)["vectors"].to(backbone.device), [path]
