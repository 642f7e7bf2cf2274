"""One version of what is served: model, texts, index and catalog, never changed.

A request takes one `Version` and uses nothing else. Items that come and go make another version,
which shares the model: its catalog only ever grows, so that a row is the same item in all of them.
"""

from __future__ import annotations

__all__ = ["Change", "ItemState", "ItemTexts", "Version"]

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from l2rec.errors import DataError
from l2rec.index import Index
from l2rec.protocols import TakesNewItems
from l2rec.runs.predictor import Predictor
from l2rec.service.attributes import Attributes, Mask

ItemTexts = Mapping[str, tuple[str, Mapping[str, str]]]
"""Text and attributes by id."""
Change = Literal["kept", "updated", "new"]
"""What becomes of an item that is put."""
ItemState = tuple[ItemTexts, frozenset[str]]
"""Items of the event log that were put, and ids that were deleted."""


@dataclass(frozen=True, eq=False)
class Version:
    """Everything that one request is answered from.

    predictor: the model with the catalog, item ints by id. index: index of the first ``indexed``
    rows; None for a method that only ranks, and for a blended run. deleted: rows that are never
    recommended (deleted, or replaced by a newer row of the same id). name: name of the run folder.
    version: short hash of the trained tensors. report: content of report.json. loaded_at: unix
    seconds. serial: number of the loading; with it, a row is the same item for as long as the
    process lives. loaded: rows it was loaded with. run: the folder it was loaded from.
    same_for_all: it ranks alike for everybody, and so also for those of whom nothing is known.
    """

    predictor: Predictor
    index: Index | None
    indexed: int
    attributes: Attributes
    deleted: frozenset[int]
    name: str
    report: Mapping[str, Any]
    loaded_at: float
    serial: int
    loaded: int = 0
    run: Path | None = None
    same_for_all: bool = False

    @property
    def version(self) -> str:
        return self.predictor.version

    @property
    def ids(self) -> Sequence[str]:
        """External id of every row."""
        return self.predictor.ids

    @property
    def texts(self) -> Sequence[str]:
        """Text of every row."""
        return self.predictor.texts

    def __len__(self) -> int:
        """Count rows, deleted ones included."""
        return len(self.predictor.ids)

    @cached_property
    def matrix(self) -> Tensor | None:
        """[N, D] float32 item vectors in main memory."""
        vectors = self.predictor.vectors
        return None if vectors is None else vectors.float().cpu().contiguous()

    @cached_property
    def hidden(self) -> Mask:
        """[N] bool: rows that are never recommended."""
        mask = np.zeros(len(self), dtype=np.bool_)
        mask[list(self.deleted)] = True
        return mask

    @property
    def added(self) -> int:
        """Rows that the model has beyond those that were loaded, of this version or given up."""
        return int(self.predictor.model.n_items) - self.loaded

    @property
    def takes_new_items(self) -> bool:
        """Whether an item that was not trained on can be ranked, by its text."""
        return isinstance(self.predictor.model, TakesNewItems)

    def serves(self, item: str) -> bool:
        """Say whether this id can be recommended."""
        row = self.predictor.row_of(item)
        return row is not None and row not in self.deleted

    def attributes_of(self, row: int) -> dict[str, str]:
        """Return the attributes of an item without the empty ones."""
        return self.attributes.of(row)

    def changes(self, items: ItemTexts) -> dict[str, Change]:
        """Tell what `with_items` does with each of these ids.

        kept: it has this text, and keeps its row and what was learned of it. updated: it has
        another text, and gets a new row, read by the new text alone. new: it was not known.
        """
        changes: dict[str, Change] = {}
        for item, (text, _) in items.items():
            row = self.predictor.row_of(item)
            if row is None:
                changes[item] = "new"
            else:
                # Blanks at the ends do not survive a preparation of the log.
                same = self.texts[row].strip() == text.strip()
                changes[item] = "kept" if same else "updated"
        return changes

    def with_items(self, items: ItemTexts) -> Version:
        """Return another version in which these ids have these texts and attributes, this one if
        they have them already; see `changes`. Call it in the thread of the models.

        Raises:
            ConfigError: the method cannot take new items. DataError: an empty text, or one that
            the model reads nothing in, or too many attributes.
        """
        changes = self.changes(items)
        fresh = {item: items[item] for item, change in changes.items() if change != "kept"}
        deleted = set(self.deleted)
        attributes: dict[int, Mapping[str, str]] = {}
        for item, change in changes.items():
            row = self.predictor.row_of(item)
            if row is None:
                continue
            if change == "updated":
                deleted.add(row)
                continue
            deleted.discard(row)
            if self.attributes.of(row) != dict(items[item][1]):
                attributes[row] = items[item][1]
        if not fresh and not attributes and deleted == self.deleted:
            return self
        changed = replace(
            self, attributes=self.attributes.changed(attributes), deleted=frozenset(deleted)
        )
        return changed._with_rows(fresh) if fresh else changed

    def _with_rows(self, fresh: ItemTexts) -> Version:
        """Return another version with a new row for each of these ids."""
        predictor = self.predictor.with_items({i: text for i, (text, _) in fresh.items()})
        gap = len(predictor.ids) - len(self) - len(fresh)
        vectors = predictor.vectors
        if vectors is not None:
            good = torch.isfinite(vectors[len(self) + gap :]).all(-1).tolist()
            bad = [item for item, fine in zip(fresh, good, strict=True) if not fine]
            if bad:
                raise DataError(f"item {bad[0]!r}: the model reads nothing in its text")
        rows: list[Mapping[str, str]] = [{} for _ in range(gap)]
        rows += [attributes for _, attributes in fresh.values()]
        return replace(
            self,
            predictor=predictor,
            attributes=self.attributes.extended(rows),
            deleted=self.deleted | set(range(len(self), len(self) + gap)),
        )

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Return item vectors [n, D] float32 of raw texts. Call it in the thread of the models.

        Raises:
            DataError: a text that the model reads nothing in.
        """
        vectors = self.predictor.encode_items(texts).float().cpu()
        if not bool(torch.isfinite(vectors).all()):
            raise DataError("the model reads nothing in one of the texts")
        return vectors

    def brought_to(self, state: ItemState) -> Version:
        """Return a version, this one if nothing changes, with all items that were put and without
        those that were deleted. A method that cannot take new items gets the attributes of those
        that it has. Call it in the thread of the models.
        """
        put, gone = state
        return self.with_items(self.missing(put)).without_items(gone)

    def missing(self, items: ItemTexts) -> ItemTexts:
        """Return those of these items that this version has not, or has otherwise, and can take:
        a method that cannot take new items takes the attributes of those that it has.
        """

        def lacks(item: str, change: Change) -> bool:
            if change != "kept":
                return self.takes_new_items
            row = self.predictor.row_of(item)
            assert row is not None
            return row in self.deleted or self.attributes.of(row) != dict(items[item][1])

        return {i: items[i] for i, change in self.changes(items).items() if lacks(i, change)}

    def without_items(self, ids: Iterable[str]) -> Version:
        """Return another version that does not recommend these, this one if it does not already;
        unknown ids change nothing.
        """
        rows = {row for item in ids if (row := self.predictor.row_of(item)) is not None}
        return self if rows <= self.deleted else replace(self, deleted=self.deleted | rows)
