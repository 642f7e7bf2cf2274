"""Item texts as inputs of small models: the frozen backbone's vectors, also of new items."""

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
from l2rec.errors import ConfigError, DataError
from l2rec.modules.backbone import Backbone
from l2rec.modules.item_text import catalog_vectors, separators, text_vectors


class FrozenText(nn.Module):
    """Text vectors x [N, d] float32, one for each item; neither trained nor saved.

    Vectors have length sqrt(d), as hidden states do: weights that start at N(0, 0.02) would shrink
    unit vectors to less than the positions that are added to them.

    Args:
        backbone: the language model. texts: those of the catalog. max_tokens: most tokens of a
            text. cache: folder for the vectors, named by content; None for no cache.

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

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the backbone, in which products with its vectors are computed."""
        return self._backbone[0].dtype

    def forward(self, items: Tensor) -> Tensor:
        """Look up the vectors of item ints [...]: [..., d]."""
        return self.vectors[items]

    def read_catalog(self, texts: Sequence[str]) -> tuple[Tensor, list[Path]]:
        """Compute vectors of texts [n, d], or read them from the cache; also return its files."""
        (backbone,) = self._backbone
        tokens = tokenize(texts, backbone.tokenizer, self._max_tokens, self._cache)
        vectors, files = catalog_vectors(backbone, tokens, self._max_tokens, self._cache)
        return vectors * backbone.dim**0.5, files

    def add(self, texts: Sequence[str]) -> npt.NDArray[np.int32]:
        """Add items by text alone; return the ints that stand for them from now on.

        Raises:
            DataError: an empty text.
        """
        if any(not text.strip() for text in texts):
            raise DataError("a new item needs a text: it is all that is known of it")
        (backbone,) = self._backbone
        tokens = tokenize(texts, backbone.tokenizer, self._max_tokens)
        vectors = text_vectors(backbone, tokens, self._max_tokens) * backbone.dim**0.5
        first = len(self)
        self.vectors = torch.cat((self.vectors, vectors.to(self.vectors.device)))
        return np.arange(first, len(self), dtype=np.int32)

    @contextmanager
    def borrowed(self, texts: Sequence[str]) -> Iterator[npt.NDArray[np.int32]]:
        """Add items for the duration of a block."""
        known = self.vectors
        try:
            yield self.add(texts)
        finally:
            self.vectors = known
