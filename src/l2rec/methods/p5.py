"""P5: Recommendation as Language Processing, with items as numbers.

Geng, Liu, Fu, Ge, Zhang. RecSys '22, https://arxiv.org/abs/2203.13366; its task of sequential
recommendation, with the ways to number items of OpenP5 and of Hua et al. (How to Index Item IDs
for Recommendation Foundation Models, SIGIR-AP '23, https://arxiv.org/abs/2305.06569).

    an item is the tokens of its number; those of one item in a history share a whole-word
    embedding, by its place in the history, beside their own
    a T5 reads the history and says the next item's tokens; beam search among the catalog's numbers
    (l2rec.modules.code_generator)

How items are numbered (``index``):

- ``sequential``: by first appearance in the training sequences, one user after the other, so that
  items that are chosen one after the other have neighbouring numbers; items of no training
  sequence come last.
- ``random``: in random order.
- ``collaborative`` (Hua et al.): not numbers, but the way through a tree of clusters of items that
  the same training sequences hold, then the place in the last cluster (l2rec.modules.spectral):
  items that are chosen together begin alike. Items of no training sequence are a cluster of their
  own.
- ``leaky``: sequential over whole sequences, test items included, as the authors number: the next
  item is often the next number, and their scores are of that. It is there to reproduce them; it
  prints a warning, and stands beside the scores wherever they are shown.

Deviations:

- The T5 is trained from nothing, on the history alone: without pretrained words a prompt around it
  says nothing. The paper fine-tunes a T5-small or -base on prompts.
- No id of the user, as for TIGER. One task of five: no ratings, reviews or explanations are at
  hand.
- ``collaborative``: a cluster that has no inner structure is cut into equal parts. Tokens are the
  same at all depths, as those of numbers are.
- The beam is constrained to the catalog; the authors' is not, and loses beams on numbers of no
  item.
"""

from __future__ import annotations

__all__ = ["P5", "P5Config", "by_first_appearance"]

from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from l2rec.data.catalog import Catalog
from l2rec.data.ragged import Ragged
from l2rec.modules.backbone import Backbone
from l2rec.modules.code_generator import PRETRAINED, CodeGenerator, GeneratorConfig
from l2rec.modules.spectral import together, tree_codes
from l2rec.protocols import Scorer, Stage, decayed


class P5Config(GeneratorConfig):
    """Options of P5."""

    index: Literal["sequential", "random", "collaborative", "leaky"] = "sequential"
    """How items are numbered."""
    digits: int = Field(100, ge=2)
    """Values of one token of a number: 100 are two decimal digits, as a word piece often has. With
    ``index=collaborative`` the most items of a cluster that is not clustered again."""
    clusters: int = Field(20, ge=2)
    """Clusters of a cluster, with ``index=collaborative``; at most ``digits``."""

    @property
    def remarks(self) -> tuple[str, ...]:
        """What to know beside the scores."""
        return (*super().remarks, PRETRAINED)

    @property
    def leaks(self) -> str:
        """What is made of held-out items."""
        whole = "index=leaky numbers items over whole sequences, so that the next often follows"
        return whole * (self.index == "leaky")

    @model_validator(mode="after")
    def _consistent(self) -> P5Config:
        if self.index == "collaborative" and self.clusters > self.digits:
            raise ValueError(
                f"clusters={self.clusters} is more than digits={self.digits}, the tokens there "
                "are; lower clusters or raise digits"
            )
        return self


class P5(nn.Module):
    """The recommender. Items beyond the beam tie behind it."""

    Config = P5Config
    uses_backbone = False
    one_catalog = True
    """Items are codes of one catalog: a run is not trained on with more items."""
    item_tensors = frozenset({"generator.codes", "numbered"})
    sized_by_data = frozenset({"generator.codes"})
    """How deep a tree of clusters is, only the training sequences tell."""

    def __init__(
        self,
        config: P5Config,
        catalog: Catalog,
        backbone: Backbone | None = None,
        *,
        cache: Path | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        count, width = len(catalog), 1
        while config.digits**width < count:
            width += 1
        self.generator = CodeGenerator(
            config,
            count,
            width=width,
            codes=config.digits,
            dtype=torch.float32,
            own_tokens=False,
            whole_words=True,
        )
        self._number(torch.randperm(count).numpy())
        self.register_buffer("numbered", torch.tensor(config.index == "random"))
        self.numbered: Tensor

    @property
    def n_items(self) -> int:
        """N, number of items."""
        return len(self.generator)

    def _number(self, order: npt.NDArray[np.integer]) -> None:
        """Give the items numbers in this order, [N]."""
        number = np.empty(len(order), dtype=np.int64)
        number[order] = np.arange(len(order))
        width = self.generator.codes.shape[1]
        powers = self.config.digits ** np.arange(width)[::-1]
        codes = number[:, None] // powers % self.config.digits
        self.generator.codes.copy_(torch.from_numpy(codes))

    def calibrate(
        self, sequences: Ragged, histories: Ragged, targets: npt.NDArray[np.integer]
    ) -> None:
        """Give the items numbers by the training sequences, before anything is learned."""
        if bool(self.numbered):
            return
        if self.config.index == "collaborative":
            both, config = together(sequences, self.n_items), self.config
            codes = tree_codes(both, clusters=config.clusters, leaf=config.digits, seed=0)
            self.generator.write(codes)
        else:
            self._number(by_first_appearance(sequences, self.n_items))
        self.numbered.fill_(True)

    @property
    def leaks(self) -> str:
        """What is made of held-out items."""
        return self.config.leaks

    def leak(self, sequences: Ragged) -> None:
        """Give the items numbers by whole sequences, before anything is learned."""
        if not bool(self.numbered):
            self._number(by_first_appearance(sequences, self.n_items))
            self.numbered.fill_(True)

    # -- training --------------------------------------------------------------------------------

    def stages(self, lr: float, weight_decay: float) -> list[Stage]:
        """Return one stage."""
        generator = self.generator
        groups = decayed(self.parameters(), lr, weight_decay)
        return [Stage("train", groups, generator.batches, generator.loss)]

    # -- inference -------------------------------------------------------------------------------

    def scorer(self) -> Scorer:
        """Return histories -> log-probabilities [B, N] float32 of what the beam found, -inf for all
        other items.
        """
        return self.generator.scorer()


def by_first_appearance(sequences: Ragged, count: int) -> npt.NDArray[np.int64]:
    """Return item ints 0..count-1 in the order in which the sequences first name them, one sequence
    after the other; those that none names come last, in their own order.
    """
    named, first = np.unique(sequences.values, return_index=True)
    rest = np.setdiff1d(np.arange(count), named, assume_unique=True)
    return np.concatenate((named[np.argsort(first)], rest)).astype(np.int64)
