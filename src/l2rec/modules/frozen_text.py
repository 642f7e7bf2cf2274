"""Item texts as inputs of small models: vectors of the frozen backbone, also of new items."""

from __future__ import annotations

__all__ = ["FrozenText"]

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from l2rec.data.text import tokenize
from l2rec.errors import ConfigError
from l2rec.modules.backbone import Backbone
from l2rec.modules.item_text import catalog_vectors, separators, text_vectors
from l2rec.modules.room import Room
from l2rec.modules.sequences import check_new_texts


class FrozenText(nn.Module):
    """Text vectors of the items, ``vectors`` [N, d] float32: neither trained nor saved.

    Vectors have length sqrt(d), as hidden states do: weights that start at N(0, 0.02) would shrink
    unit vectors to less than the positions that are added to them.

    Args:
        backbone: the language model.
        texts: texts of the catalog's N items.
        max_tokens: most tokens of a text.
        cache: folder for the vectors, keyed by content; None stores nothing.

    Raises:
        ConfigError: ``max_tokens`` is more than the backbone has positions.
    """

    def __init__(
        self, backbone: Backbone, texts: Sequence[str], *, max_tokens: int, cache: Path | None
    ) -> None:
        super().__init__()
        room = sum(map(len, separators(backbone)))
        limit = backbone.max_positions
        if limit is not None and max_tokens + room > limit:
            raise ConfigError(
                f"text_tokens={max_tokens}: backbone {backbone.name!r} has {limit} positions and "
                f"needs {room} for special tokens; choose at most {limit - room}"
            )
        # In a tuple, so that its weights are not registered as the method's.
        self._backbone = (backbone,)
        self._max_tokens, self._cache = max_tokens, cache
        vectors, self.files = self.read_catalog(texts)
        self.register_buffer("vectors", vectors, persistent=False)
        self.vectors: Tensor
        self._room = Room()

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the backbone, in which its matrix products are computed."""
        return self._backbone[0].dtype

    def forward(self, items: Tensor) -> Tensor:
        """Look up items: ints [...] -> vectors [..., d]."""
        return self.vectors[items]

    def read_catalog(self, texts: Sequence[str]) -> tuple[Tensor, list[Path]]:
        """Return vectors of many texts [n, d], from the cache if it has them, and its files."""
        (backbone,) = self._backbone
        tokens = tokenize(texts, backbone.tokenizer, self._max_tokens, self._cache)
        vectors, files = catalog_vectors(backbone, tokens, self._max_tokens, self._cache)
        return vectors * backbone.dim**0.5, files

    def add(self, texts: Sequence[str]) -> npt.NDArray[np.int32]:
        """Add items by text alone and return their item ints.

        Raises:
            DataError: an empty text.
        """
        check_new_texts(texts)
        (backbone,) = self._backbone
        tokens = tokenize(texts, backbone.tokenizer, self._max_tokens)
        vectors = text_vectors(backbone, tokens, self._max_tokens) * backbone.dim**0.5
        first = len(self)
        self.vectors = self._room.followed(self.vectors, vectors.to(self.vectors.device))
        return np.arange(first, len(self), dtype=np.int32)

    @contextmanager
    def borrowed(self, texts: Sequence[str]) -> Iterator[npt.NDArray[np.int32]]:
        """Add items for the length of a ``with`` block, and forget them after it."""
        known = self.vectors
        try:
            yield self.add(texts)
        finally:
            self.vectors = known
