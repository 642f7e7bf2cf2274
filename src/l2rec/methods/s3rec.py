"""S³-Rec: Self-Supervised Learning for Sequential Recommendation with Mutual Information
Maximization.

Zhou, Wang, Zhao, Zhu, Wang, Zhang, Wang, Wen. CIKM '20, https://arxiv.org/abs/2008.07873

One Transformer over item and position embeddings is trained twice. h_t are its states, E the
embeddings of items, F those of attributes, a_i the set of attributes of item i, and

    r(x, y, z) = -log sigmoid(sigmoid(x . y) - sigmoid(x . z))         y is nearer to x than z is

Stage 1, ``pretrain``, sees whole rows in both directions and sums four tasks:

    AAP   BCE(F W1 h_t, a_{i_t})                  attributes of the items that are shown
    MIP   r(W2 h_t, E[i_t], E[j])                 a hidden item against one not in the row
    MAP   BCE(F W3 h_t, a_{i_t})                  attributes of the hidden items
    SP    r(W4 c, s, s')                          a hidden segment s against a segment s' of others

c, s and s' are the last states of the row with a segment hidden, of the segment alone, and of an
equally long run of other rows of the batch in its place. A trained vector stands for whatever is
hidden.

Stage 2, ``finetune``, is SASRec from the same weights: a causal mask and the full softmax.

Task weights, hidden share and losses are those of RecBole and the authors' code, where the paper
leaves them open. Choices and deviations:

- Sums run over positions and attributes; their mean over rows is minimised, so that the learning
  rate does not depend on the size of a batch.
- Rows are padded on the right in both stages: position 0 is a row's oldest item in both.
- A row hides at least one item. A drawn negative that is in the row does not count.
- Attributes are the words of the item texts, or the values of raw fields (``attributes``). The
  row of S3-Rec in UniSRec's paper has the items themselves as attributes, and their text vectors
  for F.
- Pre-training has a fixed length (``pretrain_epochs``). The authors fine-tune several of its
  checkpoints and choose the best: here that is one run for each length. 0 leaves stage 2 alone,
  which is SASRec.
"""

from __future__ import annotations

__all__ = ["S3Rec", "S3RecConfig", "item_attributes"]

import re
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from l2rec.data.batches import Batch, TrainingBatches
from l2rec.data.catalog import Catalog
from l2rec.data.ragged import Ragged
from l2rec.errors import DataError
from l2rec.modules.backbone import Backbone
from l2rec.modules.encoder import SequenceEncoder, check_heads, computed_positions, initialize
from l2rec.modules.item_table import ItemTable
from l2rec.modules.sequences import last_of, newest_state, next_item_batches, pad, sequence_batches
from l2rec.protocols import Losses, Stage, UserEncoder, decayed

WORD = r"[^\W\d_]{3,}"
"""Pattern of a word that may be an attribute: three letters or more."""


class S3RecConfig(BaseModel):
    """Options of S³-Rec."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dim: int = Field(64, ge=1)
    """Width of item vectors and states."""
    layers: int = Field(2, ge=1)
    """Transformer layers."""
    heads: int = Field(2, ge=1)
    """Attention heads; they divide ``dim``."""
    inner: int = Field(256, ge=1)
    """Width of the feed-forward part."""
    max_items: int = Field(50, ge=1)
    """Most items of a history that are read, the newest."""
    dropout: float = Field(0.5, ge=0, lt=1)
    """Dropout rate of the embedded inputs and of what each layer adds."""
    attention_dropout: float = Field(0.5, ge=0, lt=1)
    """Dropout rate of attention weights."""

    # attributes
    attributes: Literal["words", "fields"] = "words"
    """Words of the item texts, in lower case, or values of catalog fields."""
    attribute_fields: tuple[str, ...] = ()
    """Raw catalog fields whose values are attributes, for ``attributes=fields``."""
    separators: str = Field(",|", min_length=1)
    """Characters between the values of a field."""
    max_attributes: int = Field(512, ge=1)
    """Largest number of attributes A; the most frequent stay."""
    min_items: int = Field(2, ge=1)
    """Fewest items of an attribute."""
    max_share: float = Field(0.25, gt=0, le=1)
    """Largest share of the items that may have a word: a word of all items tells nothing."""

    # stage 1
    pretrain_epochs: int = Field(100, ge=0)
    """Epochs of stage 1; 0 leaves it out."""
    hidden_share: float = Field(0.2, gt=0, le=1)
    """Share of a row's items that are hidden, for AAP, MIP and MAP."""
    aap: float = Field(0.2, ge=0)
    """Weight of AAP. UniSRec runs S³-Rec with task weights 1.0, 0.2, 1.0, 0.5 (in this order)."""
    mip: float = Field(1.0, ge=0)
    """Weight of MIP."""
    map: float = Field(1.0, ge=0)
    """Weight of MAP."""
    sp: float = Field(0.5, ge=0)
    """Weight of SP; 0 leaves its three passes out."""

    @model_validator(mode="after")
    def _consistent(self) -> S3RecConfig:
        check_heads(self.dim, self.heads)
        if (self.attributes == "fields") != bool(self.attribute_fields):
            raise ValueError(
                f"attributes={self.attributes} with {len(self.attribute_fields)} attribute_fields; "
                "name fields for attributes=fields, and none for attributes=words"
            )
        return self


def item_attributes(config: S3RecConfig, catalog: Catalog) -> tuple[list[str], Tensor]:
    """Choose the A attributes: their names, most frequent first, and which items have them.

    Returns:
        Names, and a matrix [N, A] bool.

    Raises:
        DataError: no item has a text, a field does not exist, or no attribute is left.
    """
    if config.attributes == "words":
        texts = catalog.require_texts("S³-Rec with attributes=words")
        columns, value = {"": [text.lower() for text in texts]}, WORD
        most = int(config.max_share * len(catalog))
    else:
        # A value belongs to its field: 1995 as a year is not 1995 as a price.
        columns = {f"{field}: ": catalog.field(field) for field in config.attribute_fields}
        value, most = f"[^{re.escape(config.separators)}]+", len(catalog)
    pairs = pl.concat(
        pl.DataFrame({"item": range(len(catalog)), "name": texts})
        .with_columns(pl.col("name").str.extract_all(value))
        .explode("name")
        .with_columns(pl.col("name").str.strip_chars())
        .filter(pl.col("name") != "")
        .select("item", name=pl.lit(prefix) + pl.col("name"))
        for prefix, texts in columns.items()
    ).unique()
    counts = pairs.group_by("name").len("items")
    chosen = (
        counts.filter(pl.col("items").is_between(config.min_items, most))
        .sort("items", "name", descending=[True, False])
        .head(config.max_attributes)
        .with_row_index("attribute")
    )
    if not len(chosen):
        raise DataError(
            f"none of the {len(counts)} {config.attributes} is in {config.min_items} to {most} of "
            f"the {len(catalog)} items; lower model.min_items, raise model.max_share, or choose "
            "other attributes"
        )
    pairs = pairs.join(chosen, on="name")
    matrix = np.zeros((len(catalog), len(chosen)), dtype=np.bool_)
    matrix[pairs["item"].to_numpy(), pairs["attribute"].to_numpy()] = True
    return chosen["name"].to_list(), torch.from_numpy(matrix)


class S3Rec(ItemTable):
    """The recommender. A user is the causal state after the newest item, an item its embedding."""

    Config = S3RecConfig
    uses_backbone = False
    item_tensors = frozenset({"items.weight", "attributes.weight"})

    def __init__(
        self,
        config: S3RecConfig,
        catalog: Catalog,
        backbone: Backbone | None = None,
        *,
        cache: Path | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.batches = next_item_batches(len(catalog), config.max_items)
        self.attribute_names, has = item_attributes(config, catalog)
        self.register_buffer("has_attribute", has, persistent=False)
        self.has_attribute: Tensor
        """a [N, A] bool."""
        self.items = nn.Embedding(len(catalog), config.dim)
        self.attributes = nn.Embedding(has.shape[1], config.dim)
        self.hidden = nn.Embedding(1, config.dim)
        self.tasks = nn.ModuleDict(
            {task: nn.Linear(config.dim, config.dim) for task in ("aap", "mip", "map", "sp")}
        )
        for part in (self.items, self.attributes, self.hidden, self.tasks):
            part.apply(initialize)
        self.encoder = SequenceEncoder.from_config(config, dim=config.dim)

    def forward(self, histories: Ragged) -> tuple[Tensor, Tensor]:
        """Encode rows of at most ``max_items`` items: states [B, T, h], which are real [B, T]."""
        items, real = pad(histories, self.items.weight.device)
        return self.encoder(self.items(items), real), real

    def user_encoder(self) -> UserEncoder:
        """Return the states after the newest items as a function of rows of E."""
        return newest_state(self.items.weight.detach(), self.encoder.whole, self.config.max_items)

    def stages(self, lr: float, weight_decay: float) -> list[Stage]:
        """Return pre-training, unless it has no epochs, and fine-tuning."""
        recommender = [*self.items.parameters(), *self.encoder.parameters()]
        pretrain = Stage(
            "pretrain",
            decayed(self.parameters(), lr, weight_decay),
            self.whole_rows,
            self.pretrain_loss,
            select=False,
            epochs=self.config.pretrain_epochs,
        )
        finetune = Stage(
            "finetune", decayed(recommender, lr, weight_decay), self.batches, self.next_item_loss
        )
        return [pretrain, finetune] if self.config.pretrain_epochs else [finetune]

    # -- stage 1 ---------------------------------------------------------------------------------

    def whole_rows(
        self, sequences: Ragged, *, seed: int, epoch: int, batch_users: int, batch_tokens: int
    ) -> TrainingBatches:
        """Return every training sequence once an epoch."""
        return sequence_batches(
            sequences,
            supervision="sequence",
            n_items=self.n_items,
            max_items=self.config.max_items,
            seed=seed,
            epoch=epoch,
            batch_users=batch_users,
            batch_tokens=batch_tokens,
        )

    def pretrain_loss(self, batch: Batch) -> Losses:
        """Compute the weighted sum of the tasks, mean over rows."""
        items, real = pad(batch.histories, self.items.weight.device)
        shown = self.items(items)
        hidden = hide(real, self.config.hidden_share)
        rows = [torch.where(hidden[..., None], self.hidden.weight, shown)]
        segment, others, fits = segments(items, real)
        if self.config.sp:
            inside = segment[..., None]
            rows += [
                torch.where(inside, self.hidden.weight, shown),
                torch.where(inside, shown, self.hidden.weight),
                torch.where(inside, self.items(others), self.hidden.weight),
            ]
        states = self.encoder(torch.cat(rows), real.repeat(len(rows), 1), causal=False)
        states, *of_segments = states.chunk(len(rows))
        visible = real & ~hidden
        sums = {
            "aap": self._attribute_loss("aap", states[visible], items[visible]),
            "mip": self._item_loss(states, items, real, hidden),
            "map": self._attribute_loss("map", states[hidden], items[hidden]),
        }
        if of_segments:
            context, truth, other = (last_of(x, real)[fits] for x in of_segments)
            sums["sp"] = nearer_loss(self.tasks["sp"](context), truth, other).sum()
        means = {task: value / len(items) for task, value in sums.items()}
        total = torch.stack([getattr(self.config, task) * x for task, x in means.items()]).sum()
        return Losses(
            total,
            {task: value.detach() for task, value in means.items()},
            int(real.sum()) * len(rows),
            computed_positions(real) * len(rows),
        )

    def _attribute_loss(self, task: str, states: Tensor, items: Tensor) -> Tensor:
        """Compute AAP or MAP summed over P positions; states: [P, h], items: [P]."""
        scores = self.tasks[task](states) @ self.attributes.weight.T  # [P, A]
        return F.binary_cross_entropy_with_logits(
            scores, self.has_attribute[items].to(scores.dtype), reduction="sum"
        )

    def _item_loss(self, states: Tensor, items: Tensor, real: Tensor, hidden: Tensor) -> Tensor:
        """Compute MIP summed over the hidden positions; states: [B, T, h], the others [B, T]."""
        row, _ = hidden.nonzero(as_tuple=True)
        drawn = torch.randint(self.n_items, (len(row),), device=items.device)
        counts = ~((items[row] == drawn[:, None]) & real[row]).any(1)
        loss = nearer_loss(
            self.tasks["mip"](states[hidden]), self.items(items[hidden]), self.items(drawn)
        )
        return (loss * counts).sum()


def nearer_loss(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Compute r(x, y, z) for rows of [P, h]: [P].

    It is never below log(1 + 1/e), as both scores are bounded.
    """
    return F.softplus(torch.sigmoid((x * z).sum(-1)) - torch.sigmoid((x * y).sum(-1)))


def hide(real: Tensor, share: float) -> Tensor:
    """Draw real positions to hide, each with probability ``share``: [B, T] bool.

    Every row hides at least one.
    """
    order = torch.rand(real.shape, device=real.device).masked_fill(~real, 2.0)
    lowest = F.one_hot(order.argmin(1), real.shape[1]).bool()
    return (order < share) | lowest


def segments(items: Tensor, real: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Draw a run of at most half of each row, and as many items of other rows in its place.

    Args:
        items: [B, T] int64, padding on the right.
        real: [B, T] bool.

    Returns:
        The run [B, T] bool; items [B, T], meaningful within the run alone, which follow each other
        somewhere in the other rows laid end to end in a circle; and the rows [B] bool that have
        both, which takes two items and other rows that are long enough.
    """
    lengths = real.sum(1)
    ends = lengths.cumsum(0)
    total = int(ends[-1])
    place = torch.arange(real.shape[1], device=real.device)  # [T]
    length = 1 + uniform(lengths // 2)
    start = uniform(lengths - length + 1)
    run = (place >= start[:, None]) & (place < (start + length)[:, None]) & real
    room = total - lengths - length + 1
    fits = (lengths >= 2) & (room > 0)
    first = ends + uniform(room) - start  # the others begin where the row ends
    others = items[real][(first[:, None] + place) % total]
    return run, others, fits


def uniform(limits: Tensor) -> Tensor:
    """Draw an int below each limit [B], 0 where a limit is not positive: [B] int64."""
    drawn = torch.rand(limits.shape, dtype=torch.float64, device=limits.device)
    return (drawn * limits.clamp(min=0)).long()
