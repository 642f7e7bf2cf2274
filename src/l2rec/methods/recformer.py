"""RecFormer: Text Is All You Need. Learning Language Representations for Sequential Recommendation.

Li, Wang, Li, Fu, Shen, Shang, McAuley. KDD '23, https://arxiv.org/abs/2305.13731

    x   = Embed(word) + A[type] + B[position of its item, newest = 1]      type: mark, key, value
    z   = Transformer(newest item, ..., oldest item)[CLS]                  an item: a row of one
    r_{u,i} = cos(z_u, z_i) / tau

Trained in three stages:

- pre-training (``pretrain_epochs``): a row is split at a random position of its second half; the
  item there is to be recognised among those of the batch, + ``mlm`` (MLM(row) + MLM(item)).
- fine-tuning: at the start of each epoch all items are encoded into a frozen table; one random
  target for each user and epoch, softmax over the whole table. Users are scored against the
  table they were trained with.
- fine-tuning beside a fixed table: on from the best weights and theirs, which is never encoded
  again.

With ``finetune=false`` a run is pre-training alone, for the ``--init`` of runs on other data.

Any backbone serves. A bidirectional one reads the newest item first and is read at its first
token. A causal one reads the oldest item first and is read at a learned [SEQ] vector after the
newest; in place of MLM it has the loss of the next token, in the same pass.

Choices and deviations:

- ``tuning=lora`` trains low-rank updates of the frozen backbone, ``full`` (the paper's) a float32
  copy of all its weights but the word embeddings. The paper's Longformer cannot run packed.
- A and B start at zero and are added to the backbone's own position and type embeddings.
- ``keys`` names the catalog's fields that are read as key-value pairs; the prepared text is one
  of them, ``text``, and a new item's only one.
- What exceeds ``max_tokens`` is dropped as whole items, oldest first.
- An item of the batch is no negative of a user whose next item it is, too.
- The output layer of both language losses is `l2rec.modules.words`. A tokenizer without a
  mask token hides words behind its unknown-word token.
- A new item is encoded by the weights as they are, also beside a fixed table.
"""

from __future__ import annotations

__all__ = ["RecFormer", "RecFormerConfig"]

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from l2rec.data.batches import Batch, TrainingBatches
from l2rec.data.catalog import TEXT, Catalog
from l2rec.data.ragged import Ragged, flat_index
from l2rec.data.text import tokenize
from l2rec.errors import BackboneError, ConfigError, DataError
from l2rec.modules.adapters import find_linears
from l2rec.modules.backbone import Attend, Backbone, Packing, pack
from l2rec.modules.item_text import separators
from l2rec.modules.lora import LoRA
from l2rec.modules.losses import in_batch_loss
from l2rec.modules.objectives import catalog_loss, cosine
from l2rec.modules.sequences import encode_rows
from l2rec.modules.words import WordHead, mask_token
from l2rec.protocols import Losses, Scorer, Stage, decayed, inner_product_scorer

MARK, KEY, VALUE = range(3)
"""Types of tokens."""


class RecFormerConfig(BaseModel):
    """Options of RecFormer."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    # input
    keys: tuple[str, ...] = ("text",)
    """Fields of the catalog in the order in which they are read, ``text`` the prepared text."""
    item_tokens: int = Field(96, ge=2)
    """Most tokens of an item, an equal share for each key with its value."""
    max_items: int = Field(50, ge=1)
    max_tokens: int = Field(512, ge=8)
    """Most tokens of a row; the paper has 1024."""

    # what is trained
    tuning: Literal["lora", "full"] = "lora"
    matrices: tuple[str, ...] = ("q", "v")
    rank: int = Field(8, ge=1)
    alpha: float = Field(16.0, gt=0)
    dropout: float = Field(0.1, ge=0, lt=1)
    """Of the inputs of the low-rank updates."""

    # stages and losses
    pretrain_epochs: int = Field(32, ge=0)
    """0: none."""
    finetune: bool = True
    """False: pre-training alone."""
    temperature: float = Field(0.05, gt=0)
    mlm: float = Field(0.1, ge=0)
    """Weight of the language losses."""
    mask_share: float = Field(0.15, gt=0, lt=1)
    """Share of words that MLM hides."""
    mlm_apart: bool = True
    """False: the contrast reads the rows with their gaps, too, which halves pre-training."""

    @model_validator(mode="after")
    def _consistent(self) -> RecFormerConfig:
        if not self.finetune and not self.pretrain_epochs:
            raise ValueError("finetune=false and pretrain_epochs=0 leave nothing to train")
        if not self.keys or self.item_tokens < 2 * len(self.keys):
            raise ValueError(
                f"item_tokens={self.item_tokens} for keys={list(self.keys)}; give at least one "
                "key, and two tokens or more for each"
            )
        return self


@dataclass(frozen=True)
class ItemTokens:
    """Token ids of every item and the type of each token: two tables of the same shape."""

    ids: Ragged
    types: Ragged

    def followed_by(self, other: ItemTokens) -> ItemTokens:
        """The items of both."""
        return ItemTokens(_stacked(self.ids, other.ids), _stacked(self.types, other.types))


@dataclass(frozen=True)
class Rows:
    """A packed batch of B rows, n tokens together.

    ids, types, items: [n] int64; ``items`` is where a token's item stands in its row, the newest
    at 1, and 0 for marks. lengths: [B] int64 tokens of each row. read: [B] int64 the token whose
    state stands for the row.
    """

    ids: Tensor
    types: Tensor
    items: Tensor
    lengths: Tensor
    read: Tensor


@dataclass(frozen=True)
class Reading:
    """rows as they were read, their last hidden states [n, D], and tokens computed for them."""

    rows: Rows
    states: Tensor
    computed: int

    @property
    def z(self) -> Tensor:
        """[B, D] float32 of unit length: inner products are cosines."""
        return F.normalize(self.states.index_select(0, self.rows.read).float(), dim=-1)


class RecFormer(nn.Module):
    """The recommender: users and items are rows of text, read by one language model."""

    Config = RecFormerConfig
    uses_backbone = True
    item_tensors = frozenset({"table", "kept"})

    def __init__(
        self,
        config: RecFormerConfig,
        catalog: Catalog,
        backbone: Backbone,
        *,
        cache: Path | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.before = separators(backbone)[0]
        _check(config, backbone, self.before)
        self.backbone = backbone
        if config.tuning == "full":
            weights = _weights(backbone)
            self._names = list(weights)
            self.tuned = nn.ParameterList(w.detach().float().clone() for w in weights.values())
        else:
            linears = find_linears(backbone.model, config.matrices)
            self.lora = LoRA(linears, rank=config.rank, alpha=config.alpha, dropout=config.dropout)
            self.lora.attach()
        self.types = nn.Parameter(torch.zeros(3, backbone.dim))
        self.positions = nn.Parameter(torch.zeros(1 + config.max_items, backbone.dim))
        if backbone.causal:
            scale = backbone.word_embeddings.weight.float().square().mean().sqrt()
            self.seq = nn.Parameter(torch.randn(backbone.dim) * scale.cpu())
        fields = [catalog.texts if key == TEXT else catalog.field(key) for key in config.keys]
        if config.keys == (TEXT,):
            catalog.require_texts("RecFormer")
        self.tokens = self._tokenize(fields, cache)
        self.head = WordHead(backbone, self.tokens.ids.values)
        self.mask = 0 if backbone.causal or config.mlm == 0 else mask_token(backbone)
        if config.pretrain_epochs == 0 or config.mlm == 0:
            self.head.requires_grad_(False)
        self.table: Tensor
        self.kept: Tensor
        self.continues: Tensor
        self.register_buffer("table", torch.zeros(len(catalog), backbone.dim))
        # Whether the table holds the items; until then they are encoded when they are asked for.
        self.register_buffer("kept", torch.tensor(False))
        self.register_buffer("continues", _continues_word(backbone), persistent=False)

    # -- items and rows as tokens ----------------------------------------------------------------

    @property
    def n_items(self) -> int:
        """N, items of the catalog, those added later included."""
        return len(self.tokens.ids)

    def _tokenize(self, fields: Sequence[Sequence[str]], cache: Path | None = None) -> ItemTokens:
        """The items with the given values, one list for each of the first keys."""
        tokenizer, config = self.backbone.tokenizer, self.config
        budget = config.item_tokens // len(config.keys)
        ids: list[Ragged] = []
        for key, texts in zip(config.keys, fields, strict=False):
            name = tokenizer(key, add_special_tokens=False)["input_ids"][: budget - 1]
            values = tokenize(texts, tokenizer, budget, cache).head(budget - len(name))
            named = (values.lengths > 0) * len(name)  # what has no value has no key either
            offsets = np.concatenate(([0], np.cumsum(named)))
            names = np.tile(np.asarray(name, dtype=np.int32), int((named > 0).sum()))
            ids += [Ragged(names, offsets), values]
        types = [
            Ragged(np.full_like(part.values, KEY if n % 2 == 0 else VALUE), part.offsets)
            for n, part in enumerate(ids)
        ]
        return ItemTokens(_joined(ids), _joined(types))

    def _rows(self, histories: Ragged) -> Rows:
        """Histories, oldest item first, as packed tokens: marks, and the newest items that fit."""
        config, causal, tokens = self.config, self.backbone.causal, self.tokens
        marks = [*self.before, 0] if causal else self.before  # 0 stands where [SEQ] will be
        kept = _newest_that_fit(
            histories.tail(config.max_items), tokens.ids.lengths, config.max_tokens - len(marks)
        )
        counts = kept.lengths
        place = flat_index(np.zeros_like(counts), counts)
        if causal:
            items, age = kept.values, np.repeat(counts, counts) - place
        else:
            items, age = kept.values[np.repeat(kept.offsets[1:], counts) - 1 - place], place + 1
        sizes = tokens.ids.lengths[items]
        text = flat_index(tokens.ids.offsets[:-1][items], sizes)
        until = np.concatenate(([0], np.cumsum(sizes)))[kept.offsets]
        ends = until[1:] + len(marks) * np.arange(1, len(kept) + 1)
        lengths = np.diff(ends, prepend=0)
        starts = ends - lengths
        is_text = np.ones(int(ends[-1]), dtype=bool)
        is_text[flat_index(starts, np.full_like(starts, len(self.before)))] = False
        if causal:
            is_text[ends - 1] = False

        def spread(marked: list[int], values: npt.NDArray[np.integer]) -> Tensor:
            out = np.empty(len(is_text), dtype=np.int64)
            out[~is_text] = np.tile(marked, len(kept))
            out[is_text] = values
            return torch.from_numpy(out).to(self.types.device)

        none = [MARK] * len(marks)
        return Rows(
            ids=spread(marks, tokens.ids.values[text]),
            types=spread(none, tokens.types.values[text]),
            items=spread(none, np.repeat(age, sizes)),
            lengths=torch.from_numpy(lengths).to(self.types.device),
            read=torch.from_numpy(ends - 1 if causal else starts).to(self.types.device),
        )

    # -- the model -------------------------------------------------------------------------------

    def forward(self, histories: Ragged) -> Reading:
        """Rows of items, oldest first, read by the adapted language model."""
        return self._read(self._rows(histories))

    def _read(self, rows: Rows) -> Reading:
        model = self.backbone
        x = model.embed(rows.ids) + F.embedding(rows.types, self.types)
        x = x + F.embedding(rows.items, self.positions)
        if model.causal:
            x = x.index_copy(0, rows.read, self.seq.expand(len(rows.read), -1))
        group, positions = pack(rows.lengths, Attend.CAUSAL if model.causal else Attend.FULL)
        packing = Packing((group,), positions)
        return Reading(rows, self._run(x, packing), packing.computed)

    def _run(self, x: Tensor, packing: Packing) -> Tensor:
        """The adapted language model: inputs [n, D] -> last hidden states [n, D]."""
        if self.config.tuning == "lora":
            with self.lora.enabled():
                return self.backbone(x, packing)  # type: ignore[no-any-return]
        tuned = (w.to(self.backbone.dtype) for w in self.tuned)
        own = dict(zip(self._names, tuned, strict=True))
        return functional_call(self.backbone, own, (x, packing))  # type: ignore[no-any-return]

    # -- training --------------------------------------------------------------------------------

    def stages(self, lr: float, weight_decay: float) -> list[Stage]:
        config = self.config
        named = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        reading = [p for name, p in named if not name.startswith("head.")]
        tuned = decayed(reading, lr, weight_decay)
        pretrain = Stage(
            "pre-training",
            decayed([p for _, p in named], lr, weight_decay),
            self.pretraining_batches,
            self.pretraining_loss,
            select=False,
            epochs=config.pretrain_epochs,
        )
        finetune = Stage(
            "fine-tuning", tuned, self.batches, self.loss, begin_epoch=self._renew_table
        )
        fixed = Stage(
            "fine-tuning beside a fixed table",
            tuned,
            self.batches,
            self.loss,
            begin_epoch=self._have_table,
        )
        return [pretrain] * (config.pretrain_epochs > 0) + [finetune, fixed] * config.finetune

    def pretraining_batches(
        self, sequences: Ragged, *, seed: int, epoch: int, batch_users: int, batch_tokens: int
    ) -> TrainingBatches:
        """The newest items of every training sequence, to be split by the loss."""
        return TrainingBatches(
            sequences,
            supervision="sequence",
            max_items=self.config.max_items + 1,
            window=int(sequences.lengths.max(initial=1)),  # one row for each user
            negatives=0,
            item_costs=self.tokens.ids.lengths,
            batch_users=batch_users,
            batch_tokens=batch_tokens,
            seed=seed,
            epoch=epoch,
        )

    def batches(
        self, sequences: Ragged, *, seed: int, epoch: int, batch_users: int, batch_tokens: int
    ) -> TrainingBatches:
        """One random target for each user, and the items before it."""
        return TrainingBatches(
            sequences,
            supervision="last",
            max_items=self.config.max_items,
            negatives=0,
            item_costs=self.tokens.ids.lengths,
            batch_users=batch_users,
            batch_tokens=batch_tokens,
            seed=seed,
            epoch=epoch,
        )

    def pretraining_loss(self, batch: Batch) -> Losses:
        """In-batch contrast of rows with their next items, + ``mlm`` times both language losses."""
        config = self.config
        histories, targets = split_rows(batch.histories)
        users, told_users, read = self._with_words(self._rows(histories))
        single = Ragged(targets, np.arange(len(targets) + 1))
        items, told_items, read_too = self._with_words(self._rows(single))
        scores = cosine(users.z, items.z) / config.temperature
        target = torch.from_numpy(targets.astype(np.int64)).to(scores.device)
        contrast, words = in_batch_loss(scores, target[:, None] == target), told_users + told_items
        parts = {"contrast": contrast.detach(), "words": words.detach()}
        return _losses(contrast + config.mlm * words, parts, read + read_too)

    def _with_words(self, rows: Rows) -> tuple[Reading, Tensor, list[Reading]]:
        """One side of the contrast, its language loss, and all that was read for the two."""
        if self.config.mlm == 0:
            reading = self._read(rows)
            return reading, reading.states.new_zeros(()), [reading]
        if self.backbone.causal:
            reading = self._read(rows)
            return reading, self._next_words(reading), [reading]
        ids, hidden = self._hide(rows)
        gaps = self._read(replace(rows, ids=ids))
        words = self._word_loss(gaps.states, rows.ids, hidden)
        if not self.config.mlm_apart:
            return gaps, words, [gaps]
        reading = self._read(rows)
        return reading, words, [reading, gaps]

    def loss(self, batch: Batch) -> Losses:
        """Softmax of cos / tau over the whole frozen table."""
        reading = self(batch.histories)
        scores = reading.z @ self.table.T / self.config.temperature
        targets = torch.from_numpy(batch.targets.astype(np.int64)).to(scores.device)
        total = catalog_loss(scores, targets)
        return _losses(total, {"rec": total.detach()}, [reading])

    def _next_words(self, reading: Reading) -> Tensor:
        """Cross-entropy of every word of the items given what is before it in its row."""
        rows = reading.rows
        predicted = rows.types != MARK
        predicted[rows.lengths.cumsum(0) - rows.lengths] = False  # nothing before it
        return self._word_loss(reading.states.roll(1, 0), rows.ids, predicted)

    def _word_loss(self, states: Tensor, ids: Tensor, chosen: Tensor) -> Tensor:
        """Mean over the chosen tokens [n] bool."""
        logits = self.head(states[chosen], self.backbone.word_embeddings.weight)
        loss = F.cross_entropy(logits, ids[chosen], reduction="sum")
        return loss / max(1, len(logits))

    def _hide(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """BERT's corruption, in whole words: ids with gaps [n], and which are to be told [n] bool.

        Of the hidden tokens 80% are masked, 10% are random words and 10% stay what they are.
        """
        tokenizer, ids = self.backbone.tokenizer, rows.ids
        begins = ~self.continues[ids]
        begins[1:] |= rows.items[1:] != rows.items[:-1]
        word = begins.cumsum(0) - 1
        chosen = torch.rand(len(ids), device=ids.device) < self.config.mask_share
        hidden = chosen[word] & (rows.types != MARK)
        fate = torch.rand(len(ids), device=ids.device)
        drawn = torch.randint(len(tokenizer), ids.shape, device=ids.device)
        told = torch.where(hidden & (fate < 0.8), self.mask, ids)
        return torch.where(hidden & (fate >= 0.9), drawn, told), hidden

    # -- the frozen table ------------------------------------------------------------------------

    def _renew_table(self, epoch: int) -> None:
        """All items by the weights of now; part of the state, and so of the best model."""
        self.table.copy_(self._encode(np.arange(self.n_items)))
        self.kept.fill_(True)

    def _have_table(self, epoch: int) -> None:
        """There is a table already, unless no epoch before this stage gave a better model."""
        if not self.kept:
            self._renew_table(epoch)

    # -- inference -------------------------------------------------------------------------------

    def encode_users(self, histories: Ragged) -> Tensor:
        """Unit-length user vectors [B, D] float32."""
        config = self.config
        return encode_rows(
            self,
            histories,
            lambda rows: self(rows).z,
            max_items=config.max_items,
            max_rows=512,
            max_cost=max(1, 16384 // config.item_tokens),
        )

    def _encode(self, items: npt.NDArray[np.integer]) -> Tensor:
        return self.encode_users(Ragged(items, np.arange(len(items) + 1)))

    def encode_items(self, items: npt.NDArray[np.integer] | Sequence[str]) -> Tensor:
        """Unit-length item vectors [n, D] float32, of catalog ints or of raw texts."""
        if len(items) and isinstance(items[0], str):
            return self._encode_texts([str(text) for text in items])
        chosen = np.asarray(items, dtype=np.int64)
        if not self.kept:
            return self._encode(chosen)
        return self.table.index_select(0, torch.from_numpy(chosen).to(self.table.device))

    def _encode_texts(self, texts: list[str]) -> Tensor:
        known = self.tokens, self.table
        try:
            return self.encode_items(self.add_items(texts))
        finally:
            self.tokens, self.table = known

    def add_items(self, texts: Sequence[str]) -> npt.NDArray[np.int32]:
        """New items by text alone, recommendable at once. Returns their item ints.

        Raises:
            DataError: an empty text.
        """
        if any(not text.strip() for text in texts):
            raise DataError("a new item needs a text: it is all that is known of it")
        first = self.n_items
        self.tokens = self.tokens.followed_by(self._tokenize([texts]))
        new = np.arange(first, self.n_items, dtype=np.int32)
        self.table = torch.cat((self.table, self._encode(new)))
        return new

    def scorer(self) -> Scorer:
        return inner_product_scorer(self)


def split_rows(rows: Ragged) -> tuple[Ragged, npt.NDArray[np.integer]]:
    """Each row cut before a random item of its second half, and these items [B].

    Rows have two items or more.
    """
    lengths = rows.lengths
    first = np.maximum(1, (lengths - 1) // 2)
    drawn = torch.rand(len(lengths), dtype=torch.float64).numpy()
    at = first + np.floor(drawn * (lengths - first)).astype(np.int64)
    return rows.gather(rows.offsets[:-1], at), rows.values[rows.offsets[:-1] + at]


def _newest_that_fit(rows: Ragged, costs: npt.NDArray[np.int64], budget: int) -> Ragged:
    """The newest items of each row that together cost no more than the budget."""
    total = np.concatenate(([0], np.cumsum(costs[rows.values])))
    to_end = np.repeat(total[rows.offsets[1:]], rows.lengths) - total[:-1]
    row = np.repeat(np.arange(len(rows)), rows.lengths)
    fitting = np.bincount(row[to_end <= budget], minlength=len(rows))
    return rows.gather(rows.offsets[1:] - fitting, fitting)


def _joined(parts: Sequence[Ragged]) -> Ragged:
    """Row i of all parts, one after the other, as row i."""
    lengths = np.stack([part.lengths for part in parts])
    offsets = np.concatenate(([0], np.cumsum(lengths.sum(0))))
    starts = offsets[:-1] + np.cumsum(lengths, axis=0) - lengths
    values = np.empty(int(offsets[-1]), dtype=np.int32)
    for part, start in zip(parts, starts, strict=True):
        values[flat_index(start, part.lengths)] = part.values
    return Ragged(values, offsets)


def _stacked(a: Ragged, b: Ragged) -> Ragged:
    """The rows of both."""
    return Ragged(
        np.concatenate((a.values, b.values)),
        np.concatenate((a.offsets, a.offsets[-1] + b.offsets[1:])),
    )


def _weights(backbone: Backbone) -> dict[str, nn.Parameter]:
    """What ``tuning=full`` trains: all but the word embeddings, and what nothing reads."""
    words = backbone.word_embeddings.weight
    return {
        name: p
        for name, p in backbone.named_parameters()
        if p is not words and "pooler" not in name
    }


def _continues_word(backbone: Backbone) -> Tensor:
    """[V] bool: tokens that continue the word before them, as vocabularies write it."""
    tokenizer = backbone.tokenizer
    tokens = [token or "" for token in tokenizer.convert_ids_to_tokens(range(len(tokenizer)))]
    found = torch.zeros(len(backbone.word_embeddings.weight), dtype=torch.bool)
    pieces = any(token.startswith("##") for token in tokens)
    marked = any(token.startswith(("\u0120", "\u2581")) for token in tokens)
    if pieces:
        continues = [token.startswith("##") for token in tokens]
    else:  # byte-level and SentencePiece vocabularies mark the space before a word
        continues = [marked and not token.startswith(("\u0120", "\u2581")) for token in tokens]
    found[: len(tokens)] = torch.tensor(continues)
    return found


def _check(config: RecFormerConfig, backbone: Backbone, before: list[int]) -> None:
    """The backbone can hold the rows and be read."""
    limit, marks = backbone.max_positions, len(before) + backbone.causal
    if limit is not None and config.max_tokens > limit:
        raise ConfigError(
            f"max_tokens={config.max_tokens}: backbone {backbone.name!r} has {limit} positions; "
            f"lower it to at most {limit}"
        )
    if config.item_tokens + marks > config.max_tokens:
        raise ConfigError(
            f"item_tokens={config.item_tokens} and {marks} mark(s) exceed "
            f"max_tokens={config.max_tokens}; lower item_tokens"
        )
    if backbone.causal:
        return
    if not before:
        raise BackboneError(
            f"the tokenizer of backbone {backbone.name!r} puts no token such as [CLS] before a "
            "text, at which a row could be read; choose another backbone"
        )


def _losses(total: Tensor, parts: dict[str, Tensor], read: Sequence[Reading]) -> Losses:
    return Losses(
        total,
        parts,
        tokens=sum(len(reading.rows.ids) for reading in read),
        computed_tokens=sum(reading.computed for reading in read),
    )
