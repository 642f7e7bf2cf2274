"""Where the views of a user enter the backbone: at the words, as in the paper, or at layer K.

    WordEntry    item texts are tokens, each with its word vector (Embed of Eq. 1-2)
    LayerEntry   ours: the lowest K layers have read each text by itself, once for the catalog, and
                 the views are made of its tokens' states

Nothing that is trained stands below layer K, so those states never change: they are computed once,
kept on disk in the backbone's dtype and mapped to memory. Of an item that is added later only its
tokens are kept, and the states of those that were read last.

Legend: N items, n tokens, D hidden size.
"""

from __future__ import annotations

__all__ = ["Entry", "LayerEntry", "WordEntry"]

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from l2rec.data.ragged import Ragged, flat_index
from l2rec.disk import replacing
from l2rec.modules.backbone import Backbone
from l2rec.modules.item_text import catalog_key, read_texts, separators
from l2rec.modules.packing import Packing
from l2rec.modules.sequences import as_index, stacked
from l2rec.modules.views import Segments, mean_of, semantic_tokens

POOLED_TOGETHER = 4096
"""Items whose tokens are pooled at once."""
SAMPLE_SHIFT = 15
"""Of fewer than 2 to the power of this plus one states, `scale` looks at all."""
RECENT_NUMBERS = 1 << 22
"""Numbers of the states of added items that are kept in memory."""


class Entry(Protocol):
    """Item texts as the backbone is given them, for N items."""

    @property
    def cached(self) -> list[Path]:
        """Cache entries it was built from."""
        ...

    @property
    def width(self) -> int:
        """Size D' of what the backbone is given for a token."""
        ...

    @property
    def scale(self) -> float:
        """Root mean square of what the backbone is given for a token."""
        ...

    def __len__(self) -> int: ...

    def read(self, histories: Ragged, max_tokens: int, max_items: int) -> tuple[Tensor, Segments]:
        """Return all tokens of each history's newest items that fit, Eq. 1: [n, D'], and whose they
        are.
        """
        ...

    def pooled(self, start: int = 0) -> Tensor:
        """Return the mean over the tokens of items ``start`` and later, [N - start, D'] float32."""
        ...

    def costs(self, items: npt.NDArray[np.integer] | slice) -> npt.NDArray[np.int64]:
        """Return how many tokens each of these items adds to a row."""
        ...

    @property
    def layers(self) -> int:
        """K: how many of the backbone's layers are below."""
        ...

    def is_before(self, name: str) -> bool:
        """Return True for the full name of a module of the backbone that runs before the entry."""
        ...

    def run(self, x: Tensor, packing: Packing) -> Tensor:
        """Run the backbone from here: packed [n, D'] -> last hidden states [n, D]."""
        ...

    def add(self, tokens: Ragged) -> None:
        """Add items by the token ids of their texts."""
        ...

    def shrink(self, count: int) -> None:
        """Forget all items after the first ``count``."""
        ...


class WordEntry:
    """The paper's entry: word vectors, special tokens around the row and after each item.

    Args:
        backbone: the frozen language model. tokens: token ids of the N texts, without special ones.
        item_tokens: most tokens of a text.
    """

    def __init__(self, backbone: Backbone, tokens: Ragged, item_tokens: int) -> None:
        self._backbone, self._tokens, self._item_tokens = backbone, tokens, item_tokens
        self._before, self._after = separators(backbone)
        self.cached: list[Path] = []
        self.width, self.layers = backbone.word_dim, 0

    @property
    def scale(self) -> float:
        """Root mean square of the word vectors."""
        return float(self._backbone.word_scale())

    def __len__(self) -> int:
        return len(self._tokens)

    def read(self, histories: Ragged, max_tokens: int, max_items: int) -> tuple[Tensor, Segments]:
        """Embed the tokens of the newest items."""
        read = semantic_tokens(
            histories,
            self._tokens,
            item_tokens=self._item_tokens,
            max_tokens=max_tokens,
            max_items=max_items,
            before=self._before,
            after=self._after,
            device=self._backbone.device,
        )
        return self._backbone.embed(read.ids), read.segments

    def pooled(self, start: int = 0) -> Tensor:
        """Average word vectors: pool(Embed(c_i)) of Eq. 2."""
        values, starts = self._tokens.values, self._tokens.offsets[start:-1]
        lengths = np.minimum(self._tokens.lengths[start:], self._item_tokens)

        def embedded(places: npt.NDArray[np.int64]) -> Tensor:
            return self._backbone.embed(as_index(values[places], self._backbone.device))

        return _means(starts, lengths, embedded, self.width, self._backbone.device)

    def costs(self, items: npt.NDArray[np.integer] | slice) -> npt.NDArray[np.int64]:
        """Count tokens and the special ones after them."""
        text = np.minimum(self._tokens.lengths_of(items), self._item_tokens)
        costs: npt.NDArray[np.int64] = text + len(self._after)
        return costs

    def is_before(self, name: str) -> bool:
        """Return False."""
        return False

    def run(self, x: Tensor, packing: Packing) -> Tensor:
        """Run all of the backbone."""
        states: Tensor = self._backbone(x, packing)
        return states

    def add(self, tokens: Ragged) -> None:
        """Take the tokens."""
        self._tokens = stacked(self._tokens, tokens)

    def shrink(self, count: int) -> None:
        """Cut the tokens."""
        self._tokens = Ragged(
            self._tokens.values[: self._tokens.offsets[count]], self._tokens.offsets[: count + 1]
        )


class LayerEntry:
    """Entry at layer K: the states of each text's tokens, special ones included, read alone.

    Args:
        backbone: the frozen language model, which is cut here.
        tokens: token ids of the N texts, without special ones. item_tokens: most of a text.
        layers: K, see `LayerCut`. cache: folder for the states; None keeps them in memory alone.
        read: False where nobody calls `read` or `pooled`: only the states that `scale` looks at are
            computed and kept, which of a large catalog are few.

    Raises:
        BackboneError: the backbone cannot be cut. CheckpointError: the cache cannot be written.
    """

    def __init__(
        self,
        backbone: Backbone,
        tokens: Ragged,
        item_tokens: int,
        layers: int,
        cache: Path | None,
        *,
        read: bool = True,
    ) -> None:
        self._backbone, self._item_tokens = backbone, item_tokens
        self._cut, self.width = backbone.cut(layers), backbone.dim
        self.layers = self._cut.below
        self._places = _numbered(self._layout(tokens))
        """Where the states of each item are."""
        self._read = read
        self.cached: list[Path] = []
        if backbone.device.type == "meta":  # shapes alone
            count = len(self._places.values) if read else len(self._looked_at())
            self._states = torch.empty(count, backbone.dim, dtype=backbone.dtype, device="meta")
        elif cache is None:
            self._states = self._computed(tokens) if read else self._sample(tokens)
        else:
            self.cached = [self._file(tokens, cache)]
            self._states = self._mapped(self.cached[0])
            if not read and len(self._states) > len(self._looked_at()):
                self._states = self._states[torch.from_numpy(self._looked_at())]
        self._later = Ragged.from_rows([])
        """Tokens of items that were added to the catalog."""
        self._recent: OrderedDict[int, Tensor] = OrderedDict()
        """States of those of them that were read last, by item."""

    def _layout(self, tokens: Ragged) -> npt.NDArray[np.int64]:
        """Return where the states of each text start, [n + 1]."""
        special = sum(map(len, separators(self._backbone)))
        lengths = np.minimum(tokens.lengths, self._item_tokens) + special
        return np.concatenate(([0], np.cumsum(lengths)))

    def _file(self, tokens: Ragged, cache: Path) -> Path:
        """Return the file of the catalog's states, bytes [n, D x size of the dtype]; write it first
        if it is not there.
        """
        backbone = self._backbone
        key = catalog_key(backbone, tokens, self._cut.below, self._item_tokens)
        whole, sample = cache / f"states-{key}.npy", cache / f"sample-{key}.npy"
        path = whole if self._read or whole.is_file() else sample
        if path.is_file():
            return path
        with replacing(path, remedy="free some space, or set item_layers=0") as partial:
            if not self._read:
                with partial.open("wb") as file:
                    np.save(file, self._sample(tokens).cpu().view(torch.uint8).numpy())
                return path
            shape = len(self._places.values), backbone.dim * backbone.dtype.itemsize
            mapped = np.lib.format.open_memmap(partial, "w+", np.uint8, shape)
            self._compute(tokens, torch.from_numpy(mapped).view(backbone.dtype))
            mapped.flush()
        return path

    def _looked_at(self) -> npt.NDArray[np.int64]:
        """Return the places of the states that `scale` looks at, up to some ten thousand."""
        count = int(self._places.offsets[-1])
        return np.arange(0, count, max(1, count >> SAMPLE_SHIFT))

    def _sample(self, tokens: Ragged) -> Tensor:
        """Compute the states that `scale` looks at, and no more texts than hold them."""
        at, offsets = self._looked_at(), self._layout(tokens)
        texts = np.searchsorted(offsets, at, side="right") - 1
        some, of = np.unique(texts, return_inverse=True)
        starts = self._layout(tokens.take(some))[:-1]
        inside = as_index(starts[of] + at - offsets[texts], self._backbone.device)
        return self._computed(tokens.take(some)).index_select(0, inside)

    def _mapped(self, path: Path) -> Tensor:
        # Copy on write: nothing is written, but torch wants memory that could be.
        mapped = np.load(path, mmap_mode="c", allow_pickle=False)
        return torch.from_numpy(mapped).view(self._backbone.dtype).to(self._backbone.device)

    def _computed(self, tokens: Ragged) -> Tensor:
        backbone, total = self._backbone, int(self._layout(tokens)[-1])
        states = torch.empty(total, backbone.dim, dtype=backbone.dtype, device=backbone.device)
        self._compute(tokens, states)
        return states

    def _compute(self, tokens: Ragged, out: Tensor) -> None:
        """Write the states of all tokens of texts into out [n, D]."""
        offsets = self._layout(tokens)
        lower = partial(self._backbone.lower, self._cut)
        for read in read_texts(self._backbone, tokens, self._item_tokens, lower):
            place = flat_index(offsets[read.rows], np.diff(offsets)[read.rows])
            out[torch.from_numpy(place).to(out.device)] = read.states.to(out.device)

    def __len__(self) -> int:
        return len(self._places)

    def _take(self, index: Tensor) -> Tensor:
        """Return the states [n, D] at the given places [n] int64."""
        assert self._read, "only a sample of the states was kept"
        known = len(self._states)
        new = index >= known
        if not len(self._later) or not bool(new.any()):
            return self._states.index_select(0, index)
        x = self._states.index_select(0, index.clamp_max(known - 1))
        places, offsets = index[new].cpu().numpy(), self._places.offsets
        items, of_item = np.unique(
            np.searchsorted(offsets, places, side="right") - 1, return_inverse=True
        )
        starts = np.cumsum(self._places.lengths_of(items)) - self._places.lengths_of(items)
        inside = as_index(places - offsets[items][of_item] + starts[of_item], x.device)
        x[new] = torch.cat(self._states_of(items.tolist())).index_select(0, inside)
        return x

    def _states_of(self, items: list[int]) -> list[Tensor]:
        """Return the states of items that were added, kept or computed now."""
        missing = [item for item in items if item not in self._recent]
        if missing:
            first = len(self) - len(self._later)
            tokens = self._later.take(np.asarray(missing) - first)
            lengths = np.diff(self._layout(tokens)).tolist()
            parts = self._computed(tokens).split(lengths)
            self._recent |= {i: part.clone() for i, part in zip(missing, parts, strict=True)}
        found = [self._recent[item] for item in items]
        for item in items:
            self._recent.move_to_end(item)
        kept = sum(states.numel() for states in self._recent.values())
        while kept > RECENT_NUMBERS:
            kept -= self._recent.popitem(last=False)[1].numel()
        return found

    @property
    def scale(self) -> float:
        """Root mean square of the states, of up to some ten thousand tokens."""
        states = self._states
        if self._read:
            states = states[:: max(1, len(states) >> SAMPLE_SHIFT)]
        return float(states.float().square().mean().sqrt())

    def read(self, histories: Ragged, max_tokens: int, max_items: int) -> tuple[Tensor, Segments]:
        """Look up the states of the newest items."""
        read = semantic_tokens(
            histories,
            self._places,
            item_tokens=max_tokens,
            max_tokens=max_tokens,
            max_items=max_items,
            before=[],
            after=[],
            device=self._backbone.device,
        )
        return self._take(read.ids), read.segments

    def pooled(self, start: int = 0) -> Tensor:
        """Average the states of each text."""
        starts, lengths = self._places.offsets[start:-1], self._places.lengths[start:]

        def taken(places: npt.NDArray[np.int64]) -> Tensor:
            return self._take(as_index(places, self._backbone.device))

        return _means(starts, lengths, taken, self.width, self._backbone.device)

    def costs(self, items: npt.NDArray[np.integer] | slice) -> npt.NDArray[np.int64]:
        """Count states."""
        return self._places.lengths_of(items)

    def is_before(self, name: str) -> bool:
        """Return True for modules of the lowest K layers."""
        return self._cut.is_below(name)

    def run(self, x: Tensor, packing: Packing) -> Tensor:
        """Run the layers from K on."""
        return self._backbone.upper(self._cut, x, packing)

    def add(self, tokens: Ragged) -> None:
        """Take the tokens; the lowest K layers run on them when they are read."""
        self._later = stacked(self._later, tokens.head(self._item_tokens))
        before = self._places.offsets
        self._places = _numbered(np.concatenate((before, before[-1] + self._layout(tokens)[1:])))

    def shrink(self, count: int) -> None:
        """Cut the tokens that were added."""
        first = len(self) - len(self._later)
        self._places = _numbered(self._places.offsets[: count + 1])
        offsets = self._later.offsets[: max(0, count - first) + 1]
        self._later = Ragged(self._later.values[: offsets[-1]].copy(), offsets.copy())
        for item in [item for item in self._recent if item >= count]:
            del self._recent[item]


def _numbered(offsets: npt.NDArray[np.int64]) -> Ragged:
    """Return rows that start at ``offsets`` and hold their own places, 0, 1, ..."""
    return Ragged(np.arange(offsets[-1]), offsets)


def _means(
    starts: npt.NDArray[np.int64],
    lengths: npt.NDArray[np.int64],
    take: Callable[[npt.NDArray[np.int64]], Tensor],
    width: int,
    device: torch.device,
) -> Tensor:
    """Average runs of vectors: [n, D'] float32.

    starts, lengths: [n] of the runs. take: places [m] -> vectors [m, D'].
    """
    out = torch.zeros(len(lengths), width, device=device)
    if device.type == "meta":
        return out
    for first in range(0, len(lengths), POOLED_TOGETHER):
        some = slice(first, first + POOLED_TOGETHER)
        count = len(lengths[some])
        index = as_index(np.repeat(np.arange(count), lengths[some]), device)
        out[some] = mean_of(take(flat_index(starts[some], lengths[some])), index, count)
    return out
